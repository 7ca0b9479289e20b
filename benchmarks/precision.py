"""A base of lower precision against float32: time per round, loss curve, and bytes of the weights.

A curve is the mean training loss of the clients of each round. Two curves agree within seed noise where they differ, at the
same seed, by less than curves of different seeds spread: a round's rms over seeds of the difference, over the standard
deviation over seeds. A seed here draws the first adapter and the order of rows alone; clients, ranks and cohorts, which would
spread the curves much further, are the same for all.

    OMP_NUM_THREADS=1 python benchmarks/precision.py
"""

from __future__ import annotations

import functools
import importlib.util
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.table import Row, paired, row
from hetlora.config import load_config
from hetlora.config.build import local_training
from hetlora.config.preconditions import slow_dtype_warning
from hetlora.core.method import Engine
from hetlora.core.round import run_round
from hetlora.core.sampling import sample_cohort
from hetlora.core.types import ServerState
from hetlora.model.quantize import quantized_layers
from hetlora.runs.display import QuietDisplay
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.training.simulation import SimulationEngine

CONFIG = Path(__file__).resolve().parent.parent / "examples" / "demo.toml"
SIZES = {
    True: ["data.max_length=32", "data.clients=4", "training.steps=1", "training.batch_size=2"],
    False: ["data.max_length=48", "training.steps=2", "training.batch_size=2"],
}
SEEDS = {True: 2, False: 4}
ROUNDS = {True: 1, False: 2}
COHORT = 3
CPU = torch.device("cpu")


def rows(quick: bool) -> Iterator[Row]:
    """Yield the rows of the table."""
    pairs = 1 if quick else 5
    base, half = prepared(quick), prepared(quick, "model.dtype=bfloat16")
    exact = curves(base, quick)
    emulated = slow_dtype_warning(torch.bfloat16, CPU) is not None
    yield row(
        "bfloat16 base against float32, time of a round",
        paired(functools.partial(curve, base, 0, 1), functools.partial(curve, half, 0, 1), pairs),
        ">= 2",
        judge=not quick and not emulated,
        note="emulated: this processor has no instructions for it, use float32" if emulated else "",
    )
    yield agreement("bfloat16", exact, curves(half, quick), "<= 1", judge=not quick)
    kinds = ("bfloat16",) if importlib.util.find_spec("bitsandbytes") is None else ("bfloat16", "int8", "nf4")
    for kind in kinds:
        few = prepared(quick, f"model.quantize={kind}")
        ratios = paired(functools.partial(curve, base, 0, 1), functools.partial(curve, few, 0, 1), pairs)
        yield row(f"base stored as {kind} against float32, time of a round", ratios)
        yield row(f"base stored as {kind}, bytes of its linear layers: of float32's", [share_of_bytes(few)])
        yield agreement(f"stored as {kind}", exact, curves(few, quick))


def prepared(quick: bool, *changes: str) -> LocalExperiment:
    """Return the demonstration on the CPU, in little."""
    always = [
        "threads=1",
        "model.device=cpu",
        "evaluation.generate=0",
        f"federation.clients_per_round={COHORT}",
        *SIZES[quick],
    ]
    return LocalExperiment(load_config(CONFIG, [*always, *changes]), QuietDisplay())


def curves(experiment: LocalExperiment, quick: bool) -> list[list[float]]:
    """Return a loss curve a seed."""
    return [curve(experiment, seed, ROUNDS[quick]) for seed in range(SEEDS[quick])]


def curve(
    experiment: LocalExperiment, seed: int, rounds: int, around: Callable[[Engine], Engine] | None = None
) -> list[float]:
    """Train for some rounds and return each one's mean loss over its clients.

    Args:
        experiment: What is trained.
        seed: Of the first adapter and the order of rows.
        rounds: How many.
        around: From the engine, the one that trains in its place.
    """
    engine: Engine = SimulationEngine(experiment.model, experiment.data, local_training(experiment.config), seed=seed)
    engine = engine if around is None else around(engine)
    state = ServerState(experiment.model.initial_adapter(16, seed), seed=seed)
    losses = []
    for number in range(rounds):
        cohort = sample_cohort(experiment.clients, COHORT, number, seed=0)
        state, report = run_round(state, experiment.method, engine, cohort)
        losses.append(statistics.fmean(client.loss for client in report.clients))
    return losses


def agreement(
    name: str, exact: Sequence[list[float]], other: Sequence[list[float]], target: str = "", *, judge: bool = True
) -> Row:
    """Return the row of a curve's difference over the spread over seeds, round by round."""
    apart, spread = differences(exact, other), [statistics.stdev(losses) for losses in zip(*exact, strict=True)]
    figures = f"rms difference {max(apart):.4f} at most, spread over {len(exact)} seeds {min(spread):.3f} at least"
    ratios = [difference / by_chance for difference, by_chance in zip(apart, spread, strict=True)]
    title = f"loss curve, {name} against float32: difference over seed spread"
    return row(title, ratios, target, judge=judge, note=figures)


def differences(exact: Sequence[list[float]], other: Sequence[list[float]]) -> list[float]:
    """Return the root mean square over seeds of the difference, a round.

    Example:
        >>> differences([[4.0, 3.0], [5.0, 4.0]], [[4.0, 3.5], [5.0, 3.5]])
        [0.0, 0.5]
    """
    pairs = [[a - b for a, b in zip(one, two, strict=True)] for one, two in zip(exact, other, strict=True)]
    return [math.sqrt(statistics.fmean(apart**2 for apart in seeds)) for seeds in zip(*pairs, strict=True)]


def share_of_bytes(experiment: LocalExperiment) -> float:
    """Return the bytes of the base's quantised layers, scales included, over those of the same in float32."""
    layers: Iterable[Any] = quantized_layers(experiment.model.base).values()
    stored = whole = 0
    for layer in layers:
        weight = layer.weight
        scales = getattr(weight, "SCB", weight.quant_state.absmax if hasattr(weight, "quant_state") else None)
        stored += weight.nbytes + (0 if scales is None else scales.nbytes)
        whole += 4 * layer.in_features * layer.out_features
    return stored / whole


def main() -> None:
    """Print the rows."""
    for line in rows("--quick" in sys.argv):
        verdict = "" if line.holds is None else " holds" if line.holds else " DOES NOT HOLD"
        shown = f"{line.ratio:.3f} ({line.min:.3f} to {line.max:.3f})"
        print(f"{line.name}: {shown} {line.target}{verdict} {line.note}", flush=True)


if __name__ == "__main__":
    main()
