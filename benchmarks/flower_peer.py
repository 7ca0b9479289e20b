"""hetlora's engine against Flower's own simulation of the client that a user of PEFT would write: same result, what ratio?

Flower runs on Ray with two clients at a time, of one core and one thread each; hetlora's engine has the same two cores. Flower
stays up while the bench does a round of one, a round of the other, and so on, and after every pair of rounds both sides must
have reached the same losses and the same global adapter. Needs the environment of `make bench-setup`:

    .venv-bench/bin/python -m benchmarks.flower_peer            # or --quick
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.table import Row, row

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

    from benchmarks.peers.plain import PlainClient
    from benchmarks.peers.work import Answer, Work

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
CORES = 2
PAIRS = 5


def rows(quick: bool) -> Iterable[Row]:
    """Yield a row a model; none, with the reason, where Flower is not installed."""
    for module in ("flwr", "ray", "peft"):
        if importlib.util.find_spec(module) is None:
            print(f"flower_peer: left out, {module} is not installed here; run `make bench-setup` and use .venv-bench")
            return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for index, (work, target) in enumerate(cases(quick, place)):
            work.write(place / f"{index}.json")
            (place / f"{index}.target").write_text(target, encoding="utf8")
        environment = {
            **os.environ,
            "FLWR_HOME": folder,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),  # for Ray's processes
        }
        command = [sys.executable, "-m", "benchmarks.flower_peer", "--measure", folder, *(["--quick"] if quick else [])]
        with (place / "log").open("w+", encoding="utf8") as log:
            status = subprocess.run(command, env=environment, cwd=ROOT, stdout=log, stderr=log).returncode
            log.seek(0)
            lines = log.read().splitlines()
        results = place / "rows.jsonl"
        if results.exists():
            yield from (Row(**json.loads(line)) for line in results.read_text("utf8").splitlines())
        if status:
            raise RuntimeError("Flower's simulation failed:\n" + "\n".join(lines[-40:]))


def cases(quick: bool, folder: Path) -> Iterator[tuple[Work, str]]:
    """Yield what is compared and the target of each."""
    from benchmarks.peers.work import Work, random_llama, tokenized
    from hetlora.lora_model import load_base
    from hetlora.process import quiet_transformers

    quiet_transformers()
    rows, pad_id = tokenized("demo", "data.max_length=64")
    if quick:
        few = dict(list(rows.items())[:4])
        yield Work("random Llama", random_llama(0.3, folder), few, pad_id, cohort_size=2, steps=2, batch_size=2), ""
        return
    short, _ = tokenized("demo", "data.max_length=32")
    random = random_llama(0.3, folder)
    yield Work("random Llama, rows of <= 64 tokens", random, rows, pad_id), ">= 10"
    yield Work("random Llama, rows of <= 32 tokens", random, short, pad_id, batch_size=1), ">= 10"
    for base in (random, random_llama(1, folder), "nano", random_llama(6, folder), random_llama(20, folder)):
        name = "curve, nano" if base == "nano" else "curve, random Llama"
        yield Work(name, str(load_base(base).name_or_path), rows, pad_id, steps=3, batch_size=4), ""
    if not SHARED.is_dir():
        print(f"flower_peer: stories260K, and talk-6m on real messages, left out: there is no {SHARED}")
        return
    stories, talk = str(SHARED / "models" / "stories260K"), str(SHARED / "models" / "talk-6m")
    for length, batch_size in ((64, 8), (32, 1)):
        rows, pad_id = tokenized("demo", f"data.max_length={length}", f"model.base={stories}")
        yield Work(f"stories260K, rows of <= {length} tokens", stories, rows, pad_id, batch_size=batch_size), ">= 10"
    for data, file in (("ubuntu_irc", "messages"), ("msc", "sessions")):
        place = f"data.path={SHARED / 'data' / data / file}.jsonl"
        rows, pad_id = tokenized(data, "data.max_length=128", "data.clients=30", place, f"model.base={talk}")
        yield Work(f"talk-6m on {data}", talk, rows, pad_id, steps=3, batch_size=4), ">= 3"


# Flower's side, through what `flwr run` comes to: a ClientApp, and a ServerApp that does its rounds and ours in turn.


def client_app() -> ClientApp:
    """Return the client: it trains what it receives on its own rows."""
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.app import Message as Answer
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.query()
    def who(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"partition-id": int(context.node_config["partition-id"])})
        return Answer(RecordDict({"metrics": metrics}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        config = message.content["config"]
        client = _plain_client(str(config["work"]))
        name = sorted(client.work.rows)[int(context.node_config["partition-id"])]
        batches = client.work.batches(int(config["round"]), name)
        adapter, loss = client.fit(message.content["arrays"].to_torch_state_dict(), batches)
        metrics = MetricRecord({"num-examples": len(client.work.rows[name]), "loss": loss})
        return Answer(RecordDict({"arrays": ArrayRecord(adapter), "metrics": metrics}), reply_to=message)

    return app


@functools.lru_cache(maxsize=1)
def _plain_client(path: str) -> PlainClient:
    import torch

    from benchmarks.peers.plain import PlainClient
    from benchmarks.peers.work import Work

    torch.set_num_threads(1)
    return PlainClient(Work.read(path))


def server_app(folder: Path, quick: bool, began: float) -> ServerApp:
    """Return the server: it measures every work in the folder and writes a row of each."""
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001  Flower's signature
        nodes = _nodes(grid)
        start = time.perf_counter() - began
        for path in sorted(folder.glob("*.json"), key=lambda path: int(path.stem)):
            result = _measure(grid, nodes, path, 1 if quick else PAIRS, start, judge=not quick)
            with (folder / "rows.jsonl").open("a", encoding="utf8") as results:
                results.write(json.dumps(dataclasses.asdict(result)) + "\n")

    return app


def _nodes(grid: Grid) -> dict[int, int]:
    """Return partition to node, when all are there."""
    from flwr.app import Message, RecordDict

    expected = _clients(Path(os.environ["FLWR_HOME"]))
    while len(nodes := list(grid.get_node_ids())) < expected:
        time.sleep(0.1)
    replies = grid.send_and_receive([Message(RecordDict(), node, "query") for node in nodes])
    return {int(reply.content["metrics"]["partition-id"]): reply.metadata.src_node_id for reply in replies}


def _clients(folder: Path) -> int:
    return max(len(json.loads(path.read_text("utf8"))["rows"]) for path in folder.glob("*.json"))


def _measure(grid: Grid, nodes: Mapping[int, int], path: Path, pairs: int, start: float, *, judge: bool) -> Row:
    from benchmarks.peers.work import Ours, Work, check_same

    work = Work.read(path)
    ours = Ours(work)
    first = theirs = ours.adapter()
    seconds, ratios = [], []
    for number in range(1 + pairs):  # the first pair is the warm-up
        gc.collect()
        before = time.perf_counter()
        answer = _flower_round(grid, nodes, path, work, number, theirs)
        between = time.perf_counter()
        our_answer = ours.round()
        after = time.perf_counter()
        check_same(first, answer, our_answer)
        theirs, _ = answer
        seconds.append(between - before)
        ratios.append((between - before) / (after - between))
    parameters = sum(parameter.numel() for parameter in ours.model.base.parameters()) / 1e6
    return row(
        f"Flower's simulation / hetlora, a round: {work.name}, {parameters:.1f} M parameters",
        ratios[1:],
        path.with_suffix(".target").read_text("utf8"),
        judge=judge,
        note=f"{work.cohort_size} clients x {work.steps} steps x {work.batch_size} rows; Flower's start = "
        f"{start / sorted(seconds[1:])[pairs // 2]:.0f} of its rounds, not counted",
    )


def _flower_round(
    grid: Grid, nodes: Mapping[int, int], path: Path, work: Work, number: int, adapter: Mapping[str, Any]
) -> Answer:
    """Do a round as Flower's FedAvg does, with the cohort of ours."""
    from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
    from flwr.serverapp.strategy import FedAvg

    clients = {nodes[sorted(work.rows).index(name)]: name for name in work.cohort(number)}
    content = RecordDict(
        {"arrays": ArrayRecord(dict(adapter)), "config": ConfigRecord({"round": number, "work": str(path)})}
    )
    replies = list(grid.send_and_receive([Message(content, node, "train") for node in clients]))
    for reply in replies:
        if reply.has_error():
            raise RuntimeError(f"client {clients[reply.metadata.src_node_id]} of Flower's failed: {reply.error.reason}")
    losses = {clients[reply.metadata.src_node_id]: float(reply.content["metrics"]["loss"]) for reply in replies}
    arrays, _ = FedAvg().aggregate_train(number, replies)
    if arrays is None:
        raise RuntimeError("Flower's FedAvg aggregated nothing")
    return dict(arrays.to_torch_state_dict()), losses


def measure(folder: Path, quick: bool) -> None:
    """Start Flower's simulation over the works in a folder."""
    from hetlora.process import prepare_process, quiet_transformers

    prepare_process()  # as hetlora's own command does
    import torch
    from flwr.simulation import run_simulation

    quiet_transformers()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # Ray's processes inherit it
    torch.set_num_threads(CORES)

    began = time.perf_counter()
    run_simulation(
        server_app=server_app(folder, quick, began),
        client_app=client_app(),
        num_supernodes=_clients(folder),
        backend_config={
            "init_args": {"num_cpus": CORES, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        # By its name as a module, so that Ray's processes find the client by name too.
        from benchmarks import flower_peer

        flower_peer.measure(options.measure, options.quick)
        return
    for result in rows(options.quick):
        print(f"{result.name}: {result.ratio:.2f} ({result.min:.2f} to {result.max:.2f}) {result.target} {result.note}")


if __name__ == "__main__":
    main()
