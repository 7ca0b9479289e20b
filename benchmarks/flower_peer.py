"""hetlora's engine against a PEFT client in Flower's simulation: the same result, and the ratio of times.

Flower runs on Ray with two clients at a time, of one core and one thread each; hetlora's engine has the same two cores. Flower
stays up while the bench does a round of one, a round of the other, and so on, and after every pair of rounds both sides must
have reached the same losses and the same global adapter. Needs the environment of `make bench-setup`:

    .venv-bench/bin/python -m benchmarks.flower_peer            # or --quick
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
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


def rows(quick: bool) -> Iterable[Row]:
    """Yield a row a model; none, with the reason, where Flower is not installed."""
    for module in ("flwr", "ray", "peft"):
        if importlib.util.find_spec(module) is None:
            print(f"flower_peer: left out, {module} is not installed here; run `make bench-setup` and use .venv-bench")
            return
    from benchmarks.peers.cases import PAIRS, cases

    with tempfile.TemporaryDirectory() as folder:
        works = list(cases(quick, Path(folder)))
        for index, (work, _) in enumerate(works):
            work.write(Path(folder) / f"{index}.json")
        _run_measurement(Path(folder), 1 if quick else PAIRS)
        results = (Path(folder) / "results.jsonl").read_text("utf8").splitlines()
    for (work, target), line in zip(works, results, strict=True):
        result = json.loads(line)
        yield row(
            f"Flower's simulation / hetlora, a round: {work.name}, {result['parameters'] / 1e6:.1f} M parameters",
            result["ratios"],
            target,
            judge=not quick,
            note=f"{work.cohort_size} clients x {work.steps} steps x {work.batch_size} rows; Flower's start, not counted, "
            f"takes {result['start']:.0f} of its rounds",
        )


def _run_measurement(folder: Path, pairs: int) -> None:
    """Measure the works in a folder, in a process whose environment is as Flower needs it from the start."""
    environment = {
        **os.environ,
        "FLWR_HOME": str(folder),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),  # for Ray's processes
    }
    command = [sys.executable, "-m", "benchmarks.flower_peer", "--measure", str(folder), "--pairs", str(pairs)]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError("Flower's simulation failed:\n" + "\n".join(done.stdout.splitlines()[-40:]))


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


def server_app(folder: Path, pairs: int, began: float) -> ServerApp:
    """Return the server: it measures every work in the folder and writes a line of each."""
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001  Flower's signature
        nodes = _nodes(grid, _clients(folder))
        start = time.perf_counter() - began
        with (folder / "results.jsonl").open("w", encoding="utf8") as results:
            for path in _works(folder):
                results.write(json.dumps(_measure(grid, nodes, path, pairs, start)) + "\n")

    return app


def _works(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"), key=lambda path: int(path.stem))


def _clients(folder: Path) -> int:
    from benchmarks.peers.work import Work

    return max(len(Work.read(path).rows) for path in _works(folder))


def _nodes(grid: Grid, expected: int) -> dict[int, int]:
    """Return partition to node, when all are there."""
    from flwr.app import Message, RecordDict

    while len(nodes := list(grid.get_node_ids())) < expected:
        time.sleep(0.1)
    replies = grid.send_and_receive([Message(RecordDict(), node, "query") for node in nodes])
    return {int(reply.content["metrics"]["partition-id"]): reply.metadata.src_node_id for reply in replies}


def _measure(grid: Grid, nodes: Mapping[int, int], path: Path, pairs: int, start: float) -> dict[str, Any]:
    """Return the ratios of the pairs, the base's number of parameters, and Flower's start in its rounds."""
    from benchmarks.peers.work import Ours, Work, check_same

    work = Work.read(path)
    ours = Ours(work)
    first = adapter = ours.adapter()
    seconds, ratios = [], []
    for number in range(1 + pairs):  # the first pair is the warm-up
        gc.collect()
        before = time.perf_counter()
        theirs = _flower_round(grid, nodes, path, work, number, adapter)
        between = time.perf_counter()
        answer = ours.round()
        after = time.perf_counter()
        check_same(first, theirs, answer)
        adapter, _ = theirs
        seconds.append(between - before)
        ratios.append((between - before) / (after - between))
    return {
        "ratios": ratios[1:],
        "parameters": ours.model.base.num_parameters(),
        "start": start / statistics.median(seconds[1:]),
    }


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


def measure(folder: Path, pairs: int) -> None:
    """Start Flower's simulation over the works in a folder."""
    from hetlora.runs.process import prepare_process, quiet_transformers

    prepare_process()  # as hetlora's own command does
    import torch
    from flwr.simulation import run_simulation

    from benchmarks.peers.cases import CORES

    quiet_transformers()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # Ray's processes inherit it
    torch.set_num_threads(CORES)
    began = time.perf_counter()
    run_simulation(
        server_app=server_app(folder, pairs, began),
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
    parser.add_argument("--pairs", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        # By its name as a module, so that Ray's processes find the client by name too.
        from benchmarks import flower_peer

        flower_peer.measure(options.measure, options.pairs)
        return
    for result in rows(options.quick):
        print(f"{result.name}: {result.ratio:.2f} ({result.min:.2f} to {result.max:.2f}) {result.target} {result.note}")


if __name__ == "__main__":
    main()
