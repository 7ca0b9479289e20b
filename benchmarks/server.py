"""The server's part of a round: bytes of updates per second, against Flower's and the machine's memory bandwidth.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m benchmarks.server [--quick]

An update is parsed from its bytes, admitted, weighed by `‖BA‖_F` and added exactly; Flower's server parses protobuf, reads
NumPy files from it and adds up in float32, without checks and norms. Its rows are left out where `flwr` is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks import flexlora
from benchmarks.table import Row, paired, row
from hetlora.core.adapter import FlatAdapter, LoraPair, ModuleShape, delta, map_tensors, product_norm, zeros
from hetlora.core.admission import admit
from hetlora.core.aggregation import WeightedSum
from hetlora.core.method import Method
from hetlora.core.round import run_round
from hetlora.core.types import Client, ClientUpdate, ServerState, TrainTask
from hetlora.flower.wire.codec import pack_update, parse_update
from hetlora.methods import hetlora, zeropad

SIZES = {
    # Hidden size, adapted projections, ranks of the clients, clients a round.
    "6 M model": (256, 24, (4, 8, 16, 32), 48),
    "hidden 2048": (2048, 64, (8, 16, 32), 18),
}
SMALL = {"hidden 64": (64, 4, (2, 4), 6)}
METHODS = {"norms": hetlora(gamma=1.0), "no norms": zeropad()}


def cohort(hidden: int, modules: int, ranks: Sequence[int], count: int) -> tuple[ServerState, list[ClientUpdate]]:
    """Draw a state of the largest rank and `count` updates of the ranks in turn."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        f"model.layers.{i // 2}.self_attn.{'qv'[i % 2]}_proj": ModuleShape(hidden, hidden) for i in range(modules)
    }
    updates = []
    for index in range(count):
        rank = ranks[index % len(ranks)]
        adapter = map_tensors(lambda f: torch.randn(f.shape, generator=generator) / 16, zeros(shapes, rank))
        updates.append(ClientUpdate(f"client-{index}", 0, rank, adapter, 10 + index, 5, 1.5))
    return ServerState(zeros(shapes, max(ranks))), updates


def aggregate(
    state: ServerState, method: Method[Any], messages: Mapping[str, bytes], tasks: Mapping[str, TrainTask]
) -> Any:
    """Do what a round does with every client's message, and return the sum."""
    total = method.start(state)
    answered: set[str] = set()
    for client, message in messages.items():
        update = parse_update(message, tasks[client])
        admit(update, tasks, answered)
        answered.add(update.client)
        total = method.add(total, update, method.weigh(update))
    return total


def aggregation(name: str, size: tuple[int, int, Sequence[int], int], judge: bool) -> Iterator[Row]:
    """Yield the rows of one size of model."""
    state, updates = cohort(*size)
    tasks = {u.client: TrainTask(u.client, 0, u.rank, state.truncated(u.rank)) for u in updates}
    messages = {u.client: pack_update(u, tasks[u.client]).data for u in updates}
    volume = sum(map(len, messages.values()))
    numbers = torch.randn(2**24 if judge else 2**20)
    limit = numbers.numel() * 4 / min(seconds(numbers.sum) for _ in range(5)) / 1e9
    for kind, method in METHODS.items():
        aggregate(state, method, messages, tasks)
        rates = [volume / seconds(lambda m=method: aggregate(state, m, messages, tasks)) / 1e9 for _ in range(7)]
        note = f"GB of updates a second, ranks {size[2]}; one thread reads {limit:.1f} GB/s"
        yield row(f"aggregation, {kind}, {name}", rates, ">= 8", judge=judge, note=note)
    yield from against_float64(name, state, messages, tasks, judge)
    if importlib.util.find_spec("flwr"):
        yield from against_flower(name, size, judge)


class Float64Sum:
    """The sum as it would be without exactness: float64 numbers, one flat array a layout, whose bits depend on the order."""

    def __init__(self) -> None:
        self.sums: dict[Any, torch.Tensor] = {}

    def add(self, update: ClientUpdate, weight: float) -> Float64Sum:
        """Add one update."""
        adapter = update.adapter
        assert isinstance(adapter, FlatAdapter)
        if adapter.layout not in self.sums:
            self.sums[adapter.layout] = torch.zeros_like(adapter.numbers, dtype=torch.float64)
        for total, part in zip(
            torch.split(self.sums[adapter.layout], 2**17), torch.split(adapter.numbers, 2**17), strict=True
        ):
            total.add_(part, alpha=weight)
        return self


def against_float64(
    name: str, state: ServerState, messages: Mapping[str, bytes], tasks: Mapping[str, TrainTask], judge: bool
) -> Iterator[Row]:
    """Yield how much longer exact sums take, alone and on the server's whole path, than sums in float64."""
    updates = [parse_update(message, tasks[client]) for client, message in messages.items()]

    def plain(method: Method[Any]) -> Method[Any]:
        return replace(
            method, start=lambda _: Float64Sum(), add=lambda total, update, weight: total.add(update, weight)
        )

    def sums(method: Method[Any]) -> Callable[[], None]:
        def work() -> None:
            total = method.start(state)
            for update in updates:
                total = method.add(total, update, 0.3)
            flushed(total)

        return work

    def path(method: Method[Any]) -> Callable[[], None]:
        return lambda: flushed(aggregate(state, method, messages, tasks))

    for what, make, kind in (
        ("the sum alone", sums, "no norms"),
        ("the server's path, no norms", path, "no norms"),
        ("the server's path, norms", path, "norms"),
    ):
        method = METHODS[kind]
        ratios = paired(make(method), make(plain(method)), 9)
        yield row(
            f"exact sums against float64: {what}, {name}", ratios, "<= 1.3", judge=judge, note="seconds over seconds"
        )


def flushed(total: Any) -> None:
    """Let what waits be added, too."""
    if isinstance(total, WeightedSum):
        total.factors.add_waiting()


def against_flower(name: str, size: tuple[int, int, Sequence[int], int], judge: bool) -> Iterator[Row]:
    """Yield the ratios to Flower's own aggregation, on equal ranks, since it knows no others."""
    hidden, modules, ranks, count = size
    middle = ranks[len(ranks) // 2]
    state, updates = cohort(hidden, modules, (middle,), count)
    tasks = {u.client: TrainTask(u.client, 0, u.rank, state.adapter) for u in updates}
    messages = {u.client: pack_update(u, tasks[u.client]).data for u in updates}
    theirs = flower(updates)
    mean = METHODS["no norms"].finish(state, aggregate(state, METHODS["no norms"], messages, tasks)).adapter
    their_mean = theirs()
    for module, pair in mean.items():
        for letter, factor in zip("AB", pair, strict=True):
            np.testing.assert_allclose(factor, their_mean[f"{module}.{letter}"].numpy(), rtol=1e-4, atol=1e-7)
    for kind, method in METHODS.items():
        ratios = paired(theirs, lambda m=method: m.finish(state, aggregate(state, m, messages, tasks)), 7)
        note = (
            f"rank {middle}, the same weighted mean" if kind == "no norms" else f"rank {middle}, and norms on our side"
        )
        yield row(f"aggregation against Flower's, {kind}, {name}", ratios, ">= 4", judge=judge, note=note)


def flower(updates: Sequence[ClientUpdate]) -> Callable[[], Any]:
    """Return Flower's aggregation of these updates, from the bytes that it sends."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    messages = []
    for update in updates:
        arrays = {f"{m}.{s}": Array(getattr(p, s).numpy()) for m, p in update.adapter.items() for s in "AB"}
        records = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": update.examples})}
        proto = recorddict_to_proto(RecordDict(records))
        messages.append(proto.SerializeToString())

    def work() -> Any:
        records = [recorddict_from_proto(type(proto).FromString(message)) for message in messages]
        return aggregate_arrayrecords(records, "num-examples")

    return work


# Memory -------------------------------------------------------------------------------------------------------------


class Arriving:
    """An engine whose clients answer by messages, each parsed on demand and not kept."""

    def train(self, tasks: Sequence[TrainTask], method: Method[Any]) -> Iterator[ClientUpdate]:  # noqa: ARG002
        """Yield one update a task."""
        for task in tasks:
            adapter = map_tensors(lambda factor: factor + 1.0, task.adapter)
            answer = ClientUpdate(task.client, task.round, task.rank, adapter, 10, 5, 1.5)
            yield parse_update(pack_update(answer, task).data, task)


def peak_of_a_round(clients: int, hidden: int) -> int:
    """Run a round of so many clients and return this process's peak resident memory in bytes."""
    shapes = {f"layers.{index}": ModuleShape(hidden, hidden) for index in range(24)}
    state = ServerState(zeros(shapes, 32))
    members = [Client(f"client-{index}", (4, 8, 16, 32)[index % 4], 10) for index in range(clients)]
    run_round(state, METHODS["norms"], Arriving(), members)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(few: int, many: int, hidden: int, judge: bool) -> Row:
    """Return the row of a round's peak memory in processes of its own."""
    peaks = []
    for count in (few, many):
        command = [sys.executable, "-m", "benchmarks.server", "--peak", str(count), "--hidden", str(hidden)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        child = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        peaks.append(int(child.stdout))
    note = f"peak resident memory of the process, {peaks[0] / 2**20:.0f} and {peaks[1] / 2**20:.0f} MiB, once each"
    return row(
        f"server memory, {many:,} updates against {few}", [peaks[1] / peaks[0]], "<= 1.05", judge=judge, note=note
    )


# Norms and decompositions -------------------------------------------------------------------------------------------


def norms(hidden: int, judge: bool) -> Iterator[Row]:
    """Yield the rows of `‖BA‖_F`: its time and its error."""
    generator = torch.Generator().manual_seed(0)
    pair = LoraPair(torch.randn(16, hidden, generator=generator), torch.randn(hidden, 16, generator=generator))

    def formed() -> torch.Tensor:
        return torch.linalg.matrix_norm(delta(pair))

    assert abs(float(formed()) / float(product_norm(pair)) - 1.0) < 1e-3  # the norm of a matrix in float32
    ratios = paired(formed, lambda: product_norm(pair), 9)
    note = f"{hidden} x {hidden}, rank 16; formed in float32, ours in float64"
    yield row("||BA||_F against forming BA", ratios, ">= 50", judge=judge, note=note)
    errors = [cancelling_error(10.0**-power, seed) for power in range(8) for seed in range(4)]
    note = "maximum counts; B = [b, -b], A = [a, a + t d] with t from 1 to 1e-7, against the product in float64"
    yield row("||BA||_F relative error under cancellation", [max(errors)], "<= 1e-6", judge=judge, note=note)


def cancelling_error(size: float, seed: int) -> float:
    """Return the relative error where slots cancel but for a share `size`."""
    generator = torch.Generator().manual_seed(seed)
    b, a, d = (torch.randn(shape, generator=generator) for shape in ((200, 8), (8, 300), (8, 300)))
    pair = LoraPair(torch.cat([a, a + size * d]), torch.cat([b, -b], dim=1))
    # What float32 left of the difference is exact in float64, so the reference cancels nothing.
    exact = torch.linalg.matrix_norm(b.double() @ (pair.A[:8].double() - pair.A[8:].double()))
    return abs(float(product_norm(pair)) / float(exact) - 1.0)


def decomposition(size: int, judge: bool) -> Row:
    """Return the row of FlexLoRA's server step."""
    ratio, error = flexlora.measure(size, 20 if judge else 4)
    assert error < 1e-5
    note = f"{size} x {size}, relative difference of the products {error:.1e}; one dense SVD against the median of five"
    return row("server step of FlexLoRA against the dense SVD", [ratio], ">= 1", judge=judge, note=note)


def seconds(work: Callable[[], Any]) -> float:
    """Return how long it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def rows(quick: bool) -> Iterable[Row]:
    """Yield the server's lines of the table."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, size in (SMALL if quick else SIZES).items():
            yield from aggregation(name, size, judge=not quick)
        yield from norms(128 if quick else 4096, judge=not quick)
        yield decomposition(64 if quick else 512, judge=not quick)
        yield memory(*((3, 30, 32) if quick else (10, 10_000, 64)), judge=not quick)
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    """Print the rows; as a child, a round's peak memory."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peak", type=int)
    parser.add_argument("--hidden", type=int)
    options = parser.parse_args()
    if options.peak:
        print(peak_of_a_round(options.peak, options.hidden))
        return
    for line in rows(options.quick):
        print(
            f"{line.name}: {line.ratio:.3g} ({line.min:.3g} to {line.max:.3g}) {line.target} {line.holds} {line.note}"
        )


if __name__ == "__main__":
    main()
