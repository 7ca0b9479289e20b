"""Prove that Flower's real processes, with TLS and keys, carry what a federation asks of them, and say what is wrong.

Each part prints one line of JSON with its figures, whether it passed, and its problems:

hosted     two nodes that host 400 and then 1,000 clients, all of them in one round
nodes      24 SuperNodes with a client each, three rounds
fleet      10, 100 and 300 nodes with a client each, without a process for each: one round, and what they take when idle
liars      three honest nodes, and five that answer with far too much, or never, in ten rounds
database   20 rounds, after which the SuperLink's database must not have grown with the finished ones
restart    the SuperLink killed in a run, restarted on its database, and the run resumed
twice      two runs at once on the same three nodes; a run that is stopped and resumed
refused    eight mistakes that people make: each must be answered in a line, with no traceback
disk       a full disk under the SuperLink's database

    python -m proofs.load              # or --part NAME; --short makes each small
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from proofs.federation import Federation, listening
from proofs.flower import app, hosted_app, node_config, records, rounds_of, server_process, start
from proofs.load_figures import Found, Watch, cpu_seconds
from proofs.load_fleet import fleet_round
from proofs.load_mistakes import disk, refused

RATIO = 1.5
"""The largest ratio of two rounds' seconds, where one has 2.5 times the clients of the other."""

DOWN = 10.0
"""Seconds for which a killed SuperLink is not there."""

THREE = ("ana", "ben", "cleo")

LYING = Path(__file__).parent / "lying"
LIES = ("large", "arrays", "many-arrays", "text", "silent")


def hosted(folder: Path, found: Found, *, short: bool) -> None:
    """Let two nodes host the clients of the configuration: few of them, then many, each in one round."""
    from proofs.small_run import write_base

    write_base(folder / "base")
    place = hosted_app(folder)
    sizes = (40, 100) if short else (400, 1000)
    seconds: list[float] = []
    with Federation(folder) as federation, Watch(federation, found):
        start(federation, {f"host-{index}": f"partition-id={index} num-partitions=2" for index in range(2)})
        for clients in sizes:
            changes = {
                "name": f"hosted-{clients}",
                "model.base": folder / "base",
                "partition.clients": clients,
                "partition.rows_per_client": 2,
                "federation.clients_per_round": clients,
                "federation.rounds": 1,
                "training.steps": 1,
                "training.batch_size": 1,
                "evaluation.clients": 2,
            }
            before = cpu_seconds(federation.processes["superlink"].pid)
            run = folder / "runs" / f"hosted-{clients}"
            federation.complete(federation.run(place, changed(changes)), run, 1800)
            record = rounds_of(run)[1]
            used = cpu_seconds(federation.processes["superlink"].pid) - before
            found.figures[f"seconds_{clients}"] = round(record["seconds"], 1)
            found.figures[f"superlink_processor_seconds_{clients}"] = round(used, 1)
            found.admitted(run, 1, clients)
            seconds.append(record["seconds"])
    ratio = seconds[1] / seconds[0]
    found.figures |= {"ratio": round(ratio, 2), "ratio_allowed": RATIO}
    found.require(ratio <= RATIO, f"{sizes[1]} clients take {ratio:.2f} times as long as {sizes[0]}")


def nodes(folder: Path, found: Found, *, short: bool) -> None:
    """Run three rounds over many nodes with a client each."""
    count, rounds = (4, 2) if short else (24, 3)
    names = [f"client{index:02}" for index in range(count)]
    keys = {"federation.clients_per_round": count, "flower.min_clients": count, "training.steps": 1}
    place, run = app(folder, rounds, names, **keys), folder / "runs" / "federation"
    with Federation(folder) as federation, Watch(federation, found):
        # A worker without messages ends soon, so that all of them fit into the memory of one machine.
        start(federation, {name: f"{node_config(folder, name)} idle=30" for name in names})
        federation.complete(federation.run(place, changed()), run, 900)
    found.seconds(run)
    found.admitted(run, rounds, count)


def fleet(folder: Path, found: Found, *, short: bool) -> None:
    """Run a round over many nodes of one client each, without a process for each."""
    for count in (10,) if short else (10, 100, 300):
        (folder / str(count)).mkdir()
        found.figures[f"nodes_{count}"] = figures = fleet_round(folder / str(count), count)
        found.require(figures["admitted"] == count, f"{figures['admitted']} of {count} nodes admitted")
        found.require(not figures["errors"], f"{count} nodes: {figures['errors']}")


def liars(folder: Path, found: Found, *, short: bool) -> None:
    """Let nodes lie in every round; the honest ones' updates must be admitted, and the run complete."""
    lies = [lie for lie in LIES if not short or lie in ("arrays", "text")]
    rounds = 4 if short else 10
    everybody = [*THREE, *lies]
    keys = {"federation.clients_per_round": len(everybody), "flower.min_clients": len(THREE), "flower.deadline": 40}
    place, run = app(folder, rounds, everybody, **keys), folder / "runs" / "federation"
    with Federation(folder) as federation, Watch(federation, found) as watch:
        start(federation, {name: node_config(folder, name) for name in THREE})
        for lie in lies:
            federation.register(lie)
            _start_liar(federation, folder, lie)
        number = federation.run(place, changed())
        # The run begins with the honest ones, and the others join it: else a round could begin before all of those are there.
        federation.wait_for(lambda: len(records(run)) > 1, "the honest nodes to be measured", 240)
        (folder / "measured").touch()
        try:
            federation.complete(number, run, 1500)
        finally:
            found.seconds(run)
            found.figures["admitted"] = [len(record["clients"]) for record in rounds_of(run).values()]
            found.figures["failures"] = _failures(run)
            found.figures["database_megabytes"] = round(database_bytes(folder) / 1e6, 1)
            if (code := federation.processes["superlink"].poll()) is not None:
                found.problems.append(f"the SuperLink ended with {code}: {watch.reason(code)}")
        found.figures["status"] = federation.status(number)
    by_round = rounds_of(run)
    found.require(len(by_round) == rounds, f"{len(by_round)} of {rounds} rounds")
    for round_number, record in by_round.items():
        if lacking := [name for name in THREE if name not in record["clients"]]:
            why = {name: record["failures"].get(name, "not asked") for name in lacking}
            found.problems.append(f"round {round_number} has no update of an honest client: {why}")
    for lie in lies:
        found.require(lie in found.figures["failures"], f"{lie!r} was never asked, or never refused")
    found.require((run / "adapter" / "adapter_model.safetensors").is_file(), "no adapter was written")


def _start_liar(federation: Federation, folder: Path, lie: str) -> None:
    from proofs.federation import free_port

    words = federation.node_command(lie, node_config(folder, lie))
    path = os.pathsep.join([str(LYING), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"HETLORA_STATE": str(federation.state(lie)), "PYTHONPATH": path, "LIE": lie}
    environment["LIE_FROM"] = str(folder / "measured")
    federation.start(lie, *words, "--host", "127.0.0.1", "--port", str(free_port()), environment=environment)


def _failures(run: Path) -> dict[str, dict[str, int]]:
    """Return how often each client failed, by the reason that the records hold."""
    counted: dict[str, dict[str, int]] = {}
    for record in rounds_of(run).values():
        for name, reason in record["failures"].items():
            reasons = counted.setdefault(name, {})
            reasons[reason[:200]] = reasons.get(reason[:200], 0) + 1
    return counted


def database(folder: Path, found: Found, *, short: bool) -> None:
    """Look at the SuperLink's database after every round: a finished round must leave nothing behind."""
    looks = (2, 4, 6) if short else (5, 10, 20)
    place = app(folder, looks[-1], THREE, **{"federation.clients_per_round": 3})
    run, sizes = folder / "runs" / "federation", []
    with Federation(folder) as federation, Watch(federation, found):
        start(federation, {name: node_config(folder, name) for name in THREE})
        number = federation.run(place, changed())
        for each in range(1, looks[-1] + 1):
            federation.wait_for(lambda each=each: each in rounds_of(run), f"round {each} to end", 180)  # type: ignore[misc]
            sizes.append(database_bytes(folder))
            if each in looks:
                found.figures[f"database_after_{each}"] = contents(folder / "state.db")
        federation.complete(number, run, 120)
    found.admitted(run, looks[-1], 3)
    network = rounds_of(run)[looks[-1]]["network"]
    messages = network["bytes_down"] + network["bytes_up"]
    grown = sizes[-1] - sizes[looks[1] - 1]
    found.figures |= {"bytes_by_round": sizes, "bytes_of_a_rounds_messages": messages, "grown": grown}
    found.require(grown <= messages, f"rounds {looks[1]} to {looks[2]} left {grown} bytes in the database")


def database_bytes(folder: Path) -> int:
    """Return the size of the SuperLink's database with its journal."""
    files = [folder / f"state.db{suffix}" for suffix in ("", "-wal")]
    return sum(file.stat().st_size for file in files if file.exists())


def contents(path: Path) -> dict[str, Any]:
    """Return the rows of a database by table, and its pages: all, and those that are free."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30.0)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {name: connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in tables}
        pages = {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count")}
    return {"rows": {name: count for name, count in sorted(rows.items()) if count}, **pages}


def restart(folder: Path, found: Found, *, short: bool) -> None:
    """Kill the SuperLink in a run, restart it on its database, and resume the run."""
    rounds = 4 if short else 8
    place = app(folder, rounds, THREE, **{"federation.clients_per_round": 3})
    run = folder / "runs" / "federation"
    with Federation(folder) as federation, Watch(federation, found):
        start(federation, {name: node_config(folder, name) for name in THREE})
        number = federation.run(place, changed())
        federation.wait_for(lambda: rounds // 2 in rounds_of(run), f"round {rounds // 2} to end", 240)
        server = Path(f"/proc/{server_process(federation)}")
        federation.kill("superlink")
        time.sleep(DOWN)
        federation.start("superlink", *federation.superlink_command())
        federation.wait_for(lambda: listening(federation.port), "the SuperLink to listen")
        back = time.monotonic()
        # Until then it holds the folder of the run, which nobody else may resume.
        with contextlib.suppress(TimeoutError):
            federation.wait_for(lambda: not server.exists(), "the server to end", 120)
        found.figures["server_ended_seconds_after_superlink_was_back"] = round(time.monotonic() - back, 1)
        if server.exists():
            found.problems.append("the old ServerApp holds the run's folder two minutes after the SuperLink is back")
            os.kill(int(server.name), signal.SIGKILL)
        found.figures |= {"rounds_before": len(rounds_of(run)), "status_of_the_first_run": federation.status(number)}
        federation.complete(federation.run(place, f'resume="{run}"'), run, 400)
        federation.check()
    found.seconds(run)
    found.admitted(run, rounds, 3)


def twice(folder: Path, found: Found, *, short: bool) -> None:
    """Do two runs at once on the same nodes; stop a third one, and resume it."""
    rounds = 2 if short else 4
    place = app(folder, rounds, THREE, **{"federation.clients_per_round": 3})
    runs = {name: folder / "runs" / name for name in ("one", "two", "three")}
    with Federation(folder) as federation, Watch(federation, found):
        start(federation, {name: node_config(folder, name) for name in THREE})
        numbers = {name: federation.run(place, changed({"name": name})) for name in ("one", "two")}
        for name, number in numbers.items():
            federation.complete(number, runs[name], 600)
        number = federation.run(place, changed({"name": "three", "federation.rounds": rounds + 2}))
        federation.wait_for(lambda: rounds_of(runs["three"]), "round 1 of the third run", 240)
        began = time.monotonic()
        found.figures["stop_said"] = federation.flwr("stop", str(number), "here").strip()
        federation.wait_for(lambda: not _servers(federation), "the stopped ServerApp to end", 120)
        found.figures["server_ended_after_seconds"] = round(time.monotonic() - began, 1)
        found.figures["status_of_the_stopped_run"] = federation.status(number)
        found.figures["rounds_before_stop"] = len(rounds_of(runs["three"]))
        federation.complete(federation.run(place, f'resume="{runs["three"]}"'), runs["three"], 400)
    for name, run in runs.items():
        found.seconds(run, name)
        found.admitted(run, rounds + 2 * (name == "three"), 3)


def _servers(federation: Federation) -> bool:
    try:
        return bool(server_process(federation))
    except RuntimeError:
        return False


def changed(changes: dict[str, Any] | None = None) -> str:
    """Return the `--run-config` of the app's run, with keys changed."""
    words = " ".join(f"{key}={value}" for key, value in (changes or {}).items())
    return f'config="run.toml" set="{words}"'


PARTS: dict[str, Callable[..., None]] = {
    part.__name__: part for part in (hosted, nodes, fleet, liars, database, restart, twice, refused, disk)
}


def attempt(name: str, folder: Path, *, short: bool) -> bool:
    """Do a part, print its line, and return whether it passed."""
    found, began = Found(), time.monotonic()
    try:
        PARTS[name](folder, found, short=short)
    except Exception as error:  # noqa: BLE001  the other parts are done all the same
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        found.problems.append(f"{type(error).__name__}: {error}"[:2000])
    line = {"part": name, "passed": not found.problems, "problems": found.problems, **found.figures}
    print(json.dumps({**line, "seconds": round(time.monotonic() - began, 1)}), flush=True)
    return not found.problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the parts; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="this part only; may be given several times")
    parser.add_argument("--short", action="store_true", help="a small version of each part")
    parser.add_argument("--keep", type=Path, help="keep everything in this folder, which must not exist")
    options = parser.parse_args(arguments)
    passed = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.part or PARTS:
            folder = (options.keep or Path(temporary)) / name
            folder.mkdir(parents=True)
            passed.append(attempt(name, folder, short=options.short))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
