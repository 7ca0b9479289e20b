"""The cost of a population of a million against one of a hundred, and cost curves with their exponents.

python -m benchmarks.scale            # memory, start-up, the server's part of a round
python -m benchmarks.scale --curves   # over clients a round, ranks, length and model size
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.table import Row, paired, row
from hetlora.config import RunConfig, parse_config
from hetlora.core.method import Method
from hetlora.core.round import run_round
from hetlora.core.sampling import sample_cohort
from hetlora.core.types import Client, ClientFailure, ClientUpdate, ServerState, TrainTask
from hetlora.data import Example
from hetlora.methods import hetlora
from hetlora.model.lora_model import LoraModel, load_base
from hetlora.runs.display import QuietDisplay
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.training.local import LocalTraining
from hetlora.training.simulation import SimulationEngine

MILLION = 1_000_000


def config(population: int, cohort: int) -> RunConfig:
    """Return a run of the bundled base and data: each client draws one row and takes one step; ranks are drawn, too."""
    return parse_config(
        {
            "threads": 1,
            "data": {"target": "{target}", "max_length": 16},
            "partition": {"kind": "sampled", "clients": population, "rows_per_client": 1},
            "federation": {"rounds": 3, "clients_per_round": cohort},
            "ranks": {"kind": "tiers", "tiers": [{"rank": 2, "share": 0.7}, {"rank": 8, "share": 0.3}]},
            "training": {"steps": 1, "batch_size": 1},
            "evaluation": {"clients": 100},
        }
    )


# Memory and start-up ------------------------------------------------------------------------------------------------


def peak_megabytes() -> float:
    """Return the peak of this process's resident memory in 10^6 bytes; on Linux only."""
    # Not ru_maxrss, which a process inherits from the one that started it.
    [kilobytes] = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    return int(kilobytes) * 1024 / 1e6


def measure(population: int, cohort: int, rounds: int) -> dict[str, float]:
    """Do some rounds and a measurement in this process; return seconds to start, and how far the peak of memory grew.

    What any run needs comes first: the libraries, the base, and a round and a measurement of a population of two.
    """
    run(LocalExperiment(config(2, 2), QuietDisplay()), 2, 1)
    gc.collect()
    before, began = peak_megabytes(), time.perf_counter()
    experiment = LocalExperiment(config(population, cohort), QuietDisplay())
    start = time.perf_counter() - began
    run(experiment, cohort, rounds)
    return {"start": start, "growth": peak_megabytes() - before, "peak": peak_megabytes()}


def run(experiment: LocalExperiment, cohort: int, rounds: int) -> None:
    """Do rounds and measure the result."""
    state = ServerState(experiment.model.initial_adapter(experiment.max_rank, seed=0))
    for number in range(rounds):
        chosen = sample_cohort(experiment.trainers, cohort, number, seed=0)
        state, report = run_round(state, experiment.method, experiment.engine, chosen)
        if len(report.clients) != cohort:
            raise RuntimeError(f"{cohort - len(report.clients)} clients of round {number} gave no update")
    experiment.measure(state)


def measured(population: int, cohort: int, rounds: int) -> dict[str, float]:
    """Return the same from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "--population", str(population), str(cohort), str(rounds)]
    # With the default, glibc keeps what is freed in pieces that do not fit the next need, by chance more or less.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    figures: dict[str, float] = json.loads(out.splitlines()[-1])
    return figures


def memory_rows(small: int, cohort: int, rounds: int, pairs: int, *, judge: bool) -> Iterator[Row]:
    """Yield a million clients against `small`: peak memory of the process, and seconds to start."""
    taken = [(measured(MILLION, cohort, rounds), measured(small, cohort, rounds)) for _ in range(pairs)]
    whole = f"population of {MILLION:,} against {small:,}, {cohort:,} a round"
    sides = {
        key: " against ".join(f"{median(pair[side][key] for pair in taken):.{digits}f}" for side in (0, 1))
        for key, digits in (("start", 2), ("growth", 1))
    }
    yield row(
        f"peak memory, {whole}",
        [many["peak"] / few["peak"] for many, few in taken],
        "<= 1.1",
        judge=judge,
        note=f"resident memory of the process; on top of the libraries and the base {sides['growth']} MB",
    )
    yield row(f"start-up, {whole}", [many["start"] / few["start"] for many, few in taken], note=f"{sides['start']} s")


# The server's part of a round ---------------------------------------------------------------------------------------


class Echo:
    """An engine whose clients return what they received, so that only the server's part takes time."""

    def train(self, tasks: Sequence[TrainTask], _: Method[Any]) -> Iterator[ClientUpdate | ClientFailure]:
        """Yield an update a task."""
        for task in tasks:
            yield ClientUpdate(task.client, task.round, task.rank, task.adapter, examples=1, steps=1, loss=1.0)


@dataclass
class Server:
    """Rounds of a population with the server's part alone: draw a cohort, distribute, admit, add up, go on from there."""

    experiment: LocalExperiment
    cohort: int
    state: ServerState

    @classmethod
    def of(cls, population: int, cohort: int) -> Server:
        """Return a server before its first round."""
        experiment = LocalExperiment(config(population, cohort), QuietDisplay())
        return cls(experiment, cohort, ServerState(experiment.model.initial_adapter(experiment.max_rank, seed=0)))

    def __call__(self) -> None:
        """Do the next round."""
        chosen = sample_cohort(self.experiment.trainers, self.cohort, self.state.round, seed=0)
        self.state, report = run_round(self.state, hetlora(gamma=1.0), Echo(), chosen)
        if len(report.clients) != self.cohort:
            raise RuntimeError("an update was refused")


def server_row(cohort: int, *, judge: bool) -> Row:
    """Return the server's part of a round of a million clients against a population that just fills the cohort."""
    ratios = paired(Server.of(MILLION, cohort), Server.of(cohort, cohort))
    name = f"server's part of a round, population of {MILLION:,} against {cohort:,}, {cohort:,} a round"
    return row(name, ratios, "<= 1.1", judge=judge, note="clients answer at once with what they received")


# A round's cost as a curve ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A round: so many clients of one rank, each one step of one row of so many tokens, over a base so wide (None: nano)."""

    clients: int = 32
    rank: int = 8
    length: int = 32
    hidden: int | None = None


class Rows:
    """One row a client."""

    def __init__(self, length: int) -> None:
        self.examples = [Example(tuple(2 + index % 40 for index in range(length)), 1)]

    def train(self, _: str) -> Sequence[Example]:
        """Return the row."""
        return self.examples


def prepared(shape: Shape) -> tuple[Callable[[], object], int]:
    """Return a function that does a round, and the number of the base's parameters."""
    with tempfile.TemporaryDirectory() as folder:
        base = load_base("nano" if shape.hidden is None else llama(folder, shape.hidden))
    model = LoraModel(base)
    settings = LocalTraining(steps=1, batch_size=1)
    engine = SimulationEngine(model, Rows(shape.length), settings, seed=0)
    state = ServerState(model.initial_adapter(shape.rank, seed=0))
    cohort = [Client(f"client-{number}", shape.rank, 1) for number in range(shape.clients)]
    parameters = sum(parameter.numel() for parameter in base.parameters())
    return lambda: run_round(state, hetlora(gamma=1.0), engine, cohort), parameters


def llama(folder: str, hidden: int) -> str:
    """Write a random Llama of four layers and return its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = LlamaConfig(
            vocab_size=512,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
        LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median time of some repeats after a warm-up."""
    work()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return median(taken)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the least-squares slope of log cost over log size.

    Example:
        >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
        2.0
    """
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


CURVES: dict[str, list[Shape]] = {
    "clients a round": [Shape(clients=count) for count in (4, 16, 64, 256)],
    "rank": [Shape(rank=rank) for rank in (2, 8, 32, 128)],
    "length": [Shape(length=length) for length in (16, 64, 256)],
    "parameters of the base": [Shape(clients=8, hidden=hidden) for hidden in (64, 128, 256, 512)],
}


def size_of(curve: str, shape: Shape, parameters: int) -> int:
    """Return the x value of a curve."""
    values = {"clients a round": shape.clients, "rank": shape.rank, "length": shape.length}
    return values.get(curve, parameters)


def curve_rows(*, quick: bool) -> Iterator[Row]:
    """Yield every curve's exponent, with the least and the greatest between neighbours."""
    for curve, shapes in CURVES.items():
        sizes, costs = [], []
        for shape in shapes[:2] if quick else shapes:
            few = curve != "clients a round" and quick
            work, parameters = prepared(replace(shape, clients=2) if few else shape)
            sizes.append(float(size_of(curve, shape, parameters)))
            costs.append(seconds(work, repeats=1 if quick else 3))
        steps = [exponent(sizes[at : at + 2], costs[at : at + 2]) for at in range(len(sizes) - 1)]
        points = ", ".join(f"{size:,.0f}: {1e3 * cost:.0f} ms" for size, cost in zip(sizes, costs, strict=True))
        yield Row(
            f"exponent of a round's cost over {curve}", exponent(sizes, costs), min(steps), max(steps), note=points
        )


def rows(quick: bool) -> Iterable[Row]:
    """Yield the rows of the table."""
    if quick:
        yield from memory_rows(100, 4, 1, pairs=1, judge=False)
        yield server_row(20, judge=False)
    else:
        # Memory repeats within a percent, so that one pair tells; the server's part is timed in five.
        yield from memory_rows(100, 100, 1, pairs=1, judge=True)
        yield from memory_rows(1_000, 1_000, 1, pairs=1, judge=True)
        yield server_row(1_000, judge=True)
    yield from curve_rows(quick=quick)


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, not judged")
    parser.add_argument("--curves", action="store_true", help="only a round's cost as a curve")
    parser.add_argument("--population", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.population:
        print(json.dumps(measure(*options.population)))
        return
    for line in curve_rows(quick=options.quick) if options.curves else rows(options.quick):
        print(
            f"{line.name}: {line.ratio:.3f} ({line.min:.3f} to {line.max:.3f}) {line.target} {line.holds} | {line.note}"
        )


if __name__ == "__main__":
    main()
