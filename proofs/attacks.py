"""Prove that two hostile clients of ten neither take over the global adapter nor spoil what it learns.

Ten clients of the bundled data fine-tune the bundled base, with HetLoRA at three ranks. Two of them send something else than
what they have trained, in every round. Of each attack against each defence the largest change of the global product `B A` in a
round is measured against the largest change of an honest client in that round, and the final loss on held-out rows against that
of the run from which the two stay away. The paper's plain average is shown beside the defences that must hold, and so are the
attack that goes just as far as admission lets it, which nothing here holds off, and what a defence costs where nobody attacks.

    python -m proofs.attacks               # or --trials 1 --seed 3 --only bounds/gauge
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hetlora.config import parse_config
from hetlora.core.adapter import Adapter, LoraPair, delta_norm, map_tensors, stack, truncate
from hetlora.core.method import Engine, Method
from hetlora.core.robust import Robustness
from hetlora.core.round import run_rounds
from hetlora.core.types import ClientFailure, ClientUpdate, ServerState, TrainTask
from hetlora.runs.display import QuietDisplay
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.training.local import LocalTraining
from proofs.outcome import Outcome, arguments

HOSTILE, CLIENTS = 2, 10
LARGEST, WORSE = 1.25, 1.05
"""The most that the global change may be of the largest honest one, and the final loss of that without the hostile clients."""


class Defence(NamedTuple):
    """The server's defence.

    Attributes:
        admission: Whether updates that no training can have come to are refused.
        robust: The bounds.
        judged: Whether it must hold, or is shown for comparison.
    """

    admission: bool
    robust: Robustness | None
    judged: bool


BOUNDS = Robustness(clip=2.0, weight_cap=3.0, largest_share=0.2)
DEFENCES = {
    "none": Defence(admission=False, robust=None, judged=False),
    "admission": Defence(admission=True, robust=None, judged=False),
    "bounds": Defence(admission=True, robust=BOUNDS, judged=True),
    "bounds alone": Defence(admission=False, robust=BOUNDS, judged=True),
    "median": Defence(admission=True, robust=Robustness(clip=2.0, aggregation="median"), judged=True),
    "trimmed_mean": Defence(admission=True, robust=Robustness(clip=2.0, aggregation="trimmed_mean"), judged=True),
    "krum": Defence(admission=True, robust=Robustness(clip=2.0, aggregation="krum"), judged=False),
    "multi_krum": Defence(admission=True, robust=replace(BOUNDS, aggregation="multi_krum"), judged=True),
}


def _changed(scale: float) -> Callable[[TrainTask, ClientUpdate], ClientUpdate]:
    def attack(task: TrainTask, update: ClientUpdate) -> ClientUpdate:
        return _moved(task, update, lambda change: scale * change)

    return attack


def _moved(task: TrainTask, update: ClientUpdate, change: Callable[[Tensor], Tensor]) -> ClientUpdate:
    """Return an update with another change of the received factors."""
    start = truncate(task.adapter, update.rank)
    adapter = {
        module: LoraPair(start[module].A + change(A - start[module].A), start[module].B + change(B - start[module].B))
        for module, (A, B) in update.adapter.items()
    }
    return replace(update, adapter=adapter)


def _gauge(_: TrainTask, update: ClientUpdate) -> ClientUpdate:
    return replace(update, adapter={name: LoraPair(1000.0 * A, B / 1000.0) for name, (A, B) in update.adapter.items()})


def _nan(_: TrainTask, update: ClientUpdate) -> ClientUpdate:
    return replace(update, adapter=map_tensors(lambda factor: torch.full_like(factor, math.nan), update.adapter))


def _furthest(task: TrainTask, update: ClientUpdate) -> ClientUpdate:
    """Move every number to admission's bound, against the honest direction."""
    each = TRAINING.reach(update.steps).each
    return _moved(task, update, lambda change: -each * change.sign())


def _false_prune(_: TrainTask, update: ClientUpdate) -> ClientUpdate:
    """Prune all slots but one; the others count as zeros."""
    return replace(update, rank=1, adapter=truncate(update.adapter, 1))


def _concentrated(task: TrainTask, update: ClientUpdate) -> ClientUpdate:
    """Put the change of a whole factor into its first slot, with the sign reversed."""
    return _moved(task, update, _in_one_slot)


def _in_one_slot(change: Tensor) -> Tensor:
    slots = change if change.shape[0] < change.shape[1] else change.mT  # of A, or of B
    spent = torch.zeros_like(slots)
    spent[0] = -slots[0] / torch.linalg.vector_norm(slots[0]).clamp_min(1e-30) * torch.linalg.vector_norm(slots)
    return spent if slots is change else spent.mT


class _Replay:
    """Replay the update of the first round."""

    def __init__(self) -> None:
        self.first: dict[str, ClientUpdate] = {}

    def __call__(self, task: TrainTask, update: ClientUpdate) -> ClientUpdate:
        first = self.first.setdefault(update.client, update)
        rank = min(first.rank, task.rank) if isinstance(first.rank, int) and isinstance(task.rank, int) else task.rank
        return replace(first, round=task.round, rank=rank, adapter=truncate(first.adapter, rank))


TRAINING = LocalTraining(learning_rate=4e-3, batch_size=4, steps=2)
ATTACKS: Mapping[str, Callable[[], Callable[[TrainTask, ClientUpdate], ClientUpdate]]] = {
    "inflated norms": lambda: _changed(100.0),
    "gauge": lambda: _gauge,
    "NaN": lambda: _nan,
    "sign flip": lambda: _changed(-1.0),
    "replay": _Replay,
    "false prune": lambda: _false_prune,
    "concentrated": lambda: _concentrated,
    "furthest": lambda: _furthest,
}
"""Each makes a hostile client's answer from what it would honestly send."""
JUDGED = {"inflated norms", "gauge", "NaN", "sign flip", "replay", "false prune", "concentrated", "honest"}
AWAY, HONEST = "away", "honest"
"""The two stay away; the two are honest."""


@dataclass
class _Infiltrated:
    """An engine with some hostile clients; records the changes of the honest ones."""

    engine: Engine
    hostile: frozenset[str]
    attack: Callable[[TrainTask, ClientUpdate], ClientUpdate] | None
    away: bool
    honest: dict[int, float] = field(default_factory=lambda: defaultdict(float))

    def train(self, tasks: Sequence[TrainTask], method: Method[Any]) -> Iterator[ClientUpdate | ClientFailure]:
        asked = {task.client: task for task in tasks if not (self.away and task.client in self.hostile)}
        for answer in self.engine.train(list(asked.values()), method):
            task = asked[answer.client]
            if isinstance(answer, ClientFailure):
                yield answer
            elif answer.client in self.hostile and self.attack is not None:
                yield self.attack(task, answer)
            else:
                moved = product_change(truncate(task.adapter, answer.rank), answer.adapter)
                self.honest[task.round] = max(self.honest[task.round], moved)
                yield answer


def product_change(before: Adapter, after: Adapter) -> float:
    """Return `‖B' A' - B A‖_F` over all modules."""
    return float(delta_norm(stack([after, {name: LoraPair(A, -B) for name, (A, B) in before.items()}])))


class Result(NamedTuple):
    """The result of a run.

    Attributes:
        ratio: The largest change of the global product in a round, in largest changes of an honest client in that round.
        base: Loss on held-out rows before.
        loss: The same at the end.
        refused: Updates that were refused.
        bounded: Updates whose influence was bounded.
    """

    ratio: float
    base: float
    loss: float
    refused: int
    bounded: int


def trial(defence: str, attack: str, seed: int, rounds: int) -> Result:
    """Run one attack against one defence."""
    experiment, base = _experiment(seed, rounds)
    names = sorted(experiment.data.federation.names)
    hostile = frozenset(names[seed % 5 :: 5][:HOSTILE])
    make = ATTACKS.get(attack)
    engine = _Infiltrated(experiment.engine, hostile, make() if make else None, attack == AWAY)
    chosen = DEFENCES[defence]
    state, ratio, refused, bounded = experiment.first_state(), 0.0, 0, 0
    training = experiment.training if chosen.admission else None
    before = state
    run = run_rounds(
        state, experiment.method, engine, experiment.cohort, rounds, training=training, robust=chosen.robust
    )
    for state, report in run:
        moved = product_change(before.adapter, state.adapter)
        largest = engine.honest[report.round]
        ratio = max(
            ratio, moved / largest if largest else math.inf
        )  # nobody trains any more on what the others have made
        refused += len(report.failures)
        bounded += sum(bool(client.bounded) for client in report.clients)
        before = state
    return Result(ratio, base, _loss(experiment, state), refused, bounded)


@functools.cache
def _experiment(seed: int, rounds: int) -> tuple[LocalExperiment, float]:
    """Return an immutable federation and the loss of its base."""
    torch.set_num_threads(1)
    experiment = LocalExperiment(parse_config(document(seed, rounds)), QuietDisplay())
    return experiment, _loss(experiment, None)


def _loss(experiment: LocalExperiment, state: ServerState | None) -> float:
    perplexity = experiment.measure(state, generate=False).overall.perplexity
    return math.log(perplexity) if perplexity and math.isfinite(perplexity) else math.inf


def document(seed: int, rounds: int) -> dict[str, Any]:
    """Return the configuration of a federation of ten clients."""
    return {
        "seed": seed,
        "model": {"base": "nano", "device": "cpu"},
        "data": {
            "path": "stdlib",
            "prompt": "{prompt}\n\n# What it does: ",
            "target": "{target}",
            "max_length": 64,
            "min_rows": 20,
            "clients": CLIENTS,
        },
        "federation": {"rounds": rounds, "clients_per_round": CLIENTS},
        "ranks": {
            "kind": "tiers",
            "tiers": [{"rank": 4, "share": 0.5}, {"rank": 8, "share": 0.3}, {"rank": 16, "share": 0.2}],
        },
        "method": {"name": "hetlora", "gamma": 0.99, "min_rank": 2},
        "training": {
            "learning_rate": TRAINING.learning_rate,
            "batch_size": TRAINING.batch_size,
            "steps": TRAINING.steps,
        },
        "evaluation": {"every": 0, "rows_per_client": 8},
    }


def _trial(job: tuple[str, str, int, int]) -> tuple[tuple[str, str, int, int], Result]:
    return job, trial(*job)


def main(given: Sequence[str] | None = None) -> int:
    """Try every attack against every defence."""
    parser = arguments(__doc__ or "", trials=3)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", default="", help="DEFENCE/ATTACK, e.g. bounds/gauge")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(given)
    outcome = Outcome("attacks", options.seed)
    chosen = [("none", AWAY)]
    chosen += [(d, a) for d in DEFENCES for a in (HONEST, *ATTACKS) if options.only in ("", f"{d}/{a}")]
    seeds = range(options.seed, options.seed + options.trials)
    jobs = [
        (defence, attack, seed, options.rounds)
        for seed in seeds
        for defence, attack in chosen
        if seed == options.seed or attack == AWAY or DEFENCES[defence].judged  # for comparison one seed is enough
    ]
    results: dict[tuple[str, str], list[tuple[int, Result]]] = defaultdict(list)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for (defence, attack, seed, _), result in pool.imap_unordered(_trial, jobs):
            print(f"{defence}, {attack}, seed {seed}: {result}", file=sys.stderr, flush=True)
            results[defence, attack].append((seed, result))
    without = dict(results["none", AWAY])
    for (defence, attack), found in results.items():
        for seed, result in sorted(found):
            again = f"python -m proofs.attacks --trials 1 --seed {seed} --only '{defence}/{attack}'"
            outcome.tried(_problems(DEFENCES[defence], attack, result, without[seed].loss, again))
    table: dict[str, dict[str, Any]] = defaultdict(dict)
    for (defence, attack), found in results.items():
        table[defence][attack] = _figures(found, without)
    outcome.figures = {"rounds": options.rounds, "table": table}
    return outcome.end()


def _figures(found: Sequence[tuple[int, Result]], without: Mapping[int, Result]) -> dict[str, Any]:
    """Return the figures of one attack against one defence; null if not finite."""
    learned = [(result.base - result.loss) / (result.base - without[seed].loss) for seed, result in found]
    figures = {
        "ratio": max(result.ratio for _, result in found),
        "loss": max(result.loss / without[seed].loss for seed, result in found),
        "learned": statistics.fmean(learned),
    }
    return {
        **{name: round(value, 3) if math.isfinite(value) else None for name, value in figures.items()},
        "refused": sum(result.refused for _, result in found),
        "bounded": sum(result.bounded for _, result in found),
    }


def _problems(defence: Defence, attack: str, result: Result, without: float, again: str) -> list[str]:
    """Return the failures of a judged defence; none for others."""
    if not defence.judged or attack not in JUDGED:
        return []
    problems = []
    if not result.ratio <= LARGEST:
        problems.append(f"a global change of {result.ratio:.3g} times the largest honest one: {again}")
    if not result.loss <= WORSE * without:
        problems.append(f"a final loss of {result.loss:.3f}, and {without:.3f} without the hostile clients: {again}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
