"""Prove that a federation of real processes survives what real clients do, and ends with the adapter it should.

A SuperLink with TLS that authenticates three SuperNodes, each a process with a file of its own. In ten rounds a client is
killed, one hangs past the deadline, one sends garbage, a new one joins, and the server is killed and goes on from its
checkpoint. The run must end, its records say what happened to whom, and its adapter be bit for bit that of a replay: every
update that was admitted, trained once more in this process, and added up anew.

    python -m proofs.flower            # or --short: two rounds, nobody fails; --hosted: clients of the configuration
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from proofs.federation import Federation, free_port, stopped

RANKS = {"ana": 8, "ben": 4, "cleo": 2, "dora": 4}
SETTINGS = {
    "data.prompt": "{prompt}",
    "data.target": "{target}",
    "data.max_length": 64,
    "ranks.max": 8,
    "training.steps": 2,
    "training.batch_size": 4,
    "evaluation.every": 0,
    "threads": 1,
}


def app(folder: Path, rounds: int, names: Iterable[str] = RANKS, /, **changes: Any) -> Path:
    """Write the Flower App of a run and the clients' files, and return its folder."""
    from hetlora.flower.new_app import new_app

    place = folder / "app"
    new_app(place)
    for index, name in enumerate(names):
        rows = [
            {"prompt": f"What does {name} count?", "target": f"{name} counts {number * (index + 1)} steps."}
            for number in range(30 + 10 * index)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {**SETTINGS, "federation.rounds": rounds, "output": str(folder / "runs"), **changes}
    text = (place / "run.toml").read_text()
    for key, value in settings.items():
        text = _set(text, key, value)
    (place / "run.toml").write_text(text)
    return place


def _set(text: str, key: str, value: Any) -> str:
    """Change a key of the template, or add it to its section."""
    section, _, name = key.rpartition(".")
    lines, here, header = text.splitlines(), "", 0
    shown = f"{name} = {json.dumps(value)}"
    for index, line in enumerate(lines):
        if line.startswith("["):
            here = line[1 : line.index("]")]
        if here == section:
            header = index
            if line.split("=")[0].strip() == name:
                lines[index] = shown
                return "\n".join(lines) + "\n"
    if section and f"[{section}]" not in text:
        return text + f"\n[{section}]\n{shown}\n"
    lines.insert(
        next(i for i, line in enumerate(lines) if line.startswith("[") and not section) if not section else header + 1,
        shown,
    )
    return "\n".join(lines) + "\n"


def node_config(folder: Path, name: str) -> str:
    """Return the `--node-config` of a client's SuperNode."""
    return f'data="{folder / name}.jsonl" name="{name}" rank={RANKS.get(name, 2)}'


def records(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run so far."""
    path = run / "records.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text("utf8").splitlines() if line.endswith("}")]


def rounds_of(run: Path) -> dict[int, dict[str, Any]]:
    """Return the records of the rounds that are done, by number from 1."""
    return {record["round"]: record for record in records(run) if record["kind"] == "round"}


# The replay ---------------------------------------------------------------------------------------------------------


def replay(run: Path, folder: Path) -> tuple[Mapping[str, Any], float]:
    """Train every admitted update once more, in this process, and add them up in the cohort's order and in the reverse of it.

    Returns:
        The global factors after the last round, and the median of a round's seconds.

    Raises:
        AssertionError: Who was pruned differs from the record, or the two orders give other bits.
    """
    import torch

    from hetlora.config import load_run_config
    from hetlora.config.build import make_robust
    from hetlora.core.round import run_round
    from hetlora.core.types import Client, ClientFailure, ClientUpdate, ServerState, TrainTask
    from hetlora.flower.client_runtime import ClientRuntime
    from hetlora.flower.node_config import NodeConfig

    torch.set_num_threads(1)
    config = load_run_config(run / "config.json")
    here: dict[str, ClientRuntime] = {}

    def fit(task: TrainTask) -> ClientUpdate | ClientFailure:
        if task.client not in here:
            settings = {"data": str(folder / f"{task.client}.jsonl"), "name": task.client, "rank": RANKS[task.client]}
            here[task.client] = ClientRuntime(config, NodeConfig.read(settings))
        return here[task.client].fit(task)

    class Again:
        """The clients of this process, one after the other."""

        def train(self, tasks: Sequence[TrainTask], _: Any) -> Iterator[ClientUpdate | ClientFailure]:
            self.answers = [fit(task) for task in tasks]
            yield from self.answers

    class Backwards:
        """The same answers, the last one first."""

        def train(self, _: Sequence[TrainTask], __: Any) -> Iterator[ClientUpdate | ClientFailure]:
            yield from reversed(again.answers)

    first = ClientRuntime(config, NodeConfig.read({"data": str(folder / "ana.jsonl"), "name": "ana", "rank": 8}))
    state = ServerState(first.model.initial_adapter(config.ranks.largest, config.seed), seed=config.seed)
    again, robust, seconds = Again(), make_robust(config), []
    for record in rounds_of(run).values():
        admitted = [Client(name, RANKS[name], entry["examples"]) for name, entry in record["clients"].items()]
        began = time.perf_counter()
        before, (state, report) = state, run_round(state, first.method, again, admitted, robust=robust)
        seconds.append(time.perf_counter() - began)
        pruned = {client.client: client.new_rank for client in report.clients if client.pruned}
        if pruned != record["prunes"] or report.failures:
            raise AssertionError(
                f"round {record['round']}: {pruned} and {report.failures}, recorded {record['prunes']}"
            )
        # With bounds of `[robustness]` the loop adds in the cohort's order, so that it is the cohort that is turned.
        backwards, _ = run_round(before, first.method, Backwards(), admitted[::-1], robust=robust)
        _require_same_bits(backwards.adapter, state.adapter, f"round {record['round']} added in the reversed order")
    return state.adapter, statistics.median(seconds)


def check_equal(run: Path, folder: Path) -> str:
    """Compare a replay with the last checkpoint, bit for bit; return the seconds per round of both.

    Raises:
        AssertionError: A number differs.
    """
    from hetlora.runs.checkpoint import newest

    adapter, here = replay(run, folder)
    checkpoint = newest(run, print)
    if checkpoint is None:
        raise AssertionError(f"{run} has no checkpoint")
    _require_same_bits(adapter, checkpoint.progress.state.adapter, "the replay")
    over = statistics.median(record["seconds"] for record in rounds_of(run).values() if not record["failures"])
    return f"a round over Flower took {over:.1f} s, the same clients one after the other in this process {here:.2f} s"


def _require_same_bits(one: Mapping[str, Any], other: Mapping[str, Any], what: str) -> None:
    for module, pair in one.items():
        for letter, mine, theirs in zip("AB", pair, other[module], strict=True):
            if not mine.equal(theirs):
                raise AssertionError(f"{what}: {int((mine != theirs).sum())} numbers of {module}.{letter} differ")


# What happens -------------------------------------------------------------------------------------------------------


def short(folder: Path) -> dict[str, Any]:
    """Two rounds of two clients with files of their own in which nothing goes wrong."""
    place, run = app(folder, 2, **{"federation.clients_per_round": 2}), folder / "runs" / "federation"
    with Federation(folder) as federation:
        start(federation, {name: node_config(folder, name) for name in ("ana", "ben")})
        federation.complete(federation.run(place, 'config="run.toml"'), run, 240)
    return {
        "messages": [
            "the adapter equals the replay of the admitted updates, in either order",
            check_equal(run, folder),
        ],
        "run": run,
    }


def hosted(folder: Path) -> dict[str, Any]:
    """Two rounds over two nodes that host ten clients; and SuperNodes that must be refused."""
    place, run = hosted_app(folder), folder / "runs" / "hosted"
    with Federation(folder) as federation:
        start(federation, {f"host-{index}": f"partition-id={index} num-partitions=2" for index in range(2)})
        federation.complete(federation.run(place, 'config="run.toml"'), run, 240)
        refused = refusals(federation)
    check_hosted(folder)
    messages = [f"a SuperNode {way} was refused: {said.strip()[:160]}" for way, said in refused.items()]
    return {
        "messages": [*messages, "two nodes that host ten clients gave the adapter of one process, bit for bit"],
        "run": run,
    }


def start(federation: Federation, configs: Mapping[str, str]) -> None:
    """Register and start SuperNodes, by name."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(federation.register, configs))
    for name, config in configs.items():
        federation.node(name, config)


HOSTED = """
name = "hosted"
threads = 1
output = "OUTPUT"
[data]
prompt = "{prompt}"
target = "{target}"
max_length = 32
[partition]
kind = "sampled"
clients = 10
rows_per_client = 6
[federation]
rounds = 2
clients_per_round = 6
[ranks]
kind = "uniform"
min = 2
max = 8
[method]
name = "hetlora"
gamma = 0.6
min_rank = 2
penalty = 30.0
[training]
steps = 2
batch_size = 2
learning_rate = 0.03
[evaluation]
every = 0
rows_per_client = 1
"""


def hosted_app(folder: Path) -> Path:
    """Write the Flower App of a run whose ten clients are those of its configuration."""
    from hetlora.flower.new_app import new_app

    place = folder / "hosted"
    new_app(place)
    (place / "run.toml").write_text(HOSTED.replace("OUTPUT", str(folder / "runs")))
    return place


def check_hosted(folder: Path) -> None:
    """Compare the hosted run's adapter with that of a run in this process, one client at a time, bit for bit.

    Raises:
        AssertionError: A file differs, or somebody failed.
    """
    from hetlora.config import load_run_config
    from hetlora.runs.display import QuietDisplay
    from hetlora.runs.local_experiment import LocalExperiment

    run = folder / "runs" / "hosted"
    config = load_run_config(run / "config.json").model_copy(update={"output": str(folder / "here")})
    here = LocalExperiment(config, QuietDisplay())
    here.engine.group_size, here.engine.workers = 1, 1  # type: ignore[attr-defined]
    result = here.run()
    ours, theirs = (path / "adapter" / "adapter_model.safetensors" for path in (folder / "here" / "hosted", run))
    failures = [record["failures"] for record in rounds_of(run).values() if record["failures"]]
    if failures or not result.prunes or ours.read_bytes() != theirs.read_bytes():
        raise AssertionError(
            f"the hosted run differs from that of one process; failures {failures}, {result.prunes} prunes"
        )


def refusals(federation: Federation) -> dict[str, str]:
    """Start SuperNodes that must be refused; return their messages."""
    from proofs.federation import certificates, key

    certificates(federation.folder / "foreign")
    key(federation.folder / "stranger")
    common = (
        "flower-supernode",
        "--superlink",
        f"127.0.0.1:{federation.port}",
        "--max-retries",
        "1",
        "--max-wait-time",
        "5",
    )
    ours = ("--root-certificates", str(federation.folder / "ca.crt"))
    ways = {
        "without a key": (ours, "All SuperNodes must be registered"),
        "with a key nobody registered": (
            (*ours, "--auth-supernode-private-key", str(federation.folder / "stranger")),
            "Failed to activate SuperNode",
        ),
        "in plain text": (("--insecure",), "Connection reset by peer|Server disconnected"),
        "with another authority's certificate": (
            ("--root-certificates", str(federation.folder / "foreign" / "ca.crt")),
            "CERTIFICATE_VERIFY_FAILED",
        ),
    }
    processes = {
        way: federation.start(f"refused-{index}", *common, "--port", str(free_port()), *options)
        for index, (way, (options, _)) in enumerate(ways.items())
    }
    said = {}
    for index, (way, (_, reason)) in enumerate(ways.items()):
        process, name = processes[way], f"refused-{index}"
        federation.wait_for(lambda process=process: process.poll() is not None, f"the SuperNode {way} to end", 60)  # type: ignore[misc]
        lines = [line for line in federation.log(name).splitlines() if re.search(reason, line)]
        if process.returncode == 0 or not lines:
            raise AssertionError(f"a SuperNode {way} was not refused, or not for that:\n{federation.log(name)}")
        said[way] = lines[-1]
        del federation.processes[name]
    return said


class Story:
    """Ten rounds with faults.

    Args:
        federation: The processes.
        folder: With the clients' files.
        run: The folder of the run.
    """

    def __init__(self, federation: Federation, folder: Path, run: Path) -> None:
        self.federation, self.folder, self.run = federation, folder, run

    def during(self, number: int) -> None:
        """Wait until a round trains: the one before is recorded."""
        self.federation.wait_for(
            lambda: number == 1 or number - 1 in rounds_of(self.run), f"round {number} to begin", 180
        )

    def restart(self, name: str) -> threading.Thread:
        """Start a killed SuperNode again until it is let in: its lease lasts a minute."""

        def again() -> None:
            while name not in self.federation.processes or self.federation.processes[name].poll() is not None:
                self.federation.processes.pop(name, None)
                self.federation.node(name, node_config(self.folder, name))
                time.sleep(5)

        thread = threading.Thread(target=again, daemon=True)
        thread.start()
        return thread

    def garbage(self, name: str) -> Callable[[], None]:
        """Replace a client's process by a lying one; return the function that removes it."""
        from hetlora.flower.envelope import Envelope

        [place] = [path.parent for path in self.federation.state(name).glob("*/settings.json")]
        for pid in self.federation.workers(name):
            os.kill(pid, signal.SIGKILL)
        (place / "socket").unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(place / "socket"))
        listener.listen(8)

        def lie() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    length = int.from_bytes(connection.recv(8), "little")
                    while length > 0:
                        length -= len(connection.recv(min(length, 2**20)))
                    said = Envelope("train", {"answers": [{"client": name}]}, [os.urandom(4096)]).packed()
                    connection.sendall(len(said).to_bytes(8, "little") + said)

        threading.Thread(target=lie, daemon=True).start()

        def end() -> None:
            listener.close()
            (place / "socket").unlink(missing_ok=True)

        return end


def whole(folder: Path) -> dict[str, Any]:
    """The ten rounds; returns the records."""
    place = app(
        folder,
        10,
        **{"federation.clients_per_round": 4, "flower.deadline": 30, "flower.min_clients": 2, "flower.wait": 120},
    )
    run = folder / "runs" / "federation"
    with Federation(folder) as federation:
        story = Story(federation, folder, run)
        start(federation, {name: node_config(folder, name) for name in ("ana", "ben", "cleo")})
        number = federation.run(place, 'config="run.toml"')
        story.during(3)
        federation.kill("ana")  # with the process of the client, at whatever it is
        for pid in federation.workers("ana"):
            os.kill(pid, signal.SIGKILL)
        story.during(4)
        story.restart("ana")
        story.during(5)
        with stopped(federation.workers("ben")):
            time.sleep(15)  # by then cleo has answered, and the round waits for ben alone
            end = story.garbage("cleo")
            story.during(6)
        story.during(7)
        end()
        federation.register("dora")
        federation.node("dora", node_config(folder, "dora"))
        story.during(8)
        server = server_process(federation)
        os.kill(server, signal.SIGKILL)
        federation.wait_for(lambda: federation.status(number).startswith("finished"), "the SuperLink to notice", 120)
        done = len(rounds_of(run))
        number = federation.run(place, f'resume="{run}"')
        federation.complete(number, run, 400)
    by_round = rounds_of(run)
    expected = {3: ("ana", "no answer"), 5: ("ben", "no answer"), 6: ("cleo", "refused: ")}
    for number, (name, reason) in expected.items():
        if not by_round[number]["failures"].get(name, "").startswith(reason):
            raise AssertionError(
                f"round {number} should say of {name}: {reason}, and says {by_round[number]['failures']}"
            )
    if not any("dora" in record["clients"] for record in by_round.values()):
        raise AssertionError("dora joined and took part in no round")
    killed = f"the server was killed after round {done}, and the run went on from there"
    equal = "the adapter equals the replay of the admitted updates, added in their order and in the reverse of it"
    return {"messages": [killed, equal, check_equal(run, folder)], "run": run}


def ancestors(pid: int) -> list[int]:
    """Return the ancestors of a process, its parent first."""
    found = []
    while pid > 1:
        # The name of a process stands in brackets and may hold anything; its state and its parent follow.
        pid = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def server_process(federation: Federation) -> int:
    """Return the running ServerApp's process."""
    superlink = federation.processes["superlink"].pid
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"flwr-serverapp" in entry.read_bytes() and superlink in ancestors(int(entry.parent.name)):
                return int(entry.parent.name)
        except OSError:
            continue
    raise RuntimeError("there is no flwr-serverapp")


def main() -> int:
    """Run the proof; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="two rounds in which nobody fails")
    parser.add_argument(
        "--hosted", action="store_true", help="two nodes that host ten clients, and nodes that are refused"
    )
    parser.add_argument("--keep", type=Path, help="keep everything in this folder")
    options = parser.parse_args()
    began = time.monotonic()
    proof = short if options.short else hosted if options.hosted else whole
    with tempfile.TemporaryDirectory() as temporary:
        found = proof(options.keep or Path(temporary))
        for number, record in rounds_of(found["run"]).items():
            said = "; ".join(f"{name}: {why[:100]}" for name, why in record["failures"].items()) or "all answered"
            print(f"round {number:2}: {', '.join(record['clients']) or 'nobody'} admitted; {said}")
    print(*found["messages"], f"{time.monotonic() - began:.0f} s in all", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
