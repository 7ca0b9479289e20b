"""Prove that every round ends, however many clients fail, with the result of the remaining clients.

Every trial is a run of 100 rounds of real training on a tiny base, in which 10, 30, 50 or 90 % of every cohort fail: they drop
out before training or after it, as `federation.dropout` lets them; have no rows; diverge, among those that train in the same
batch; answer with NaN; or answer nothing. After every round all of `proofs.rounds` must hold, exactly those that were drawn
have failed, and where nobody answered the adapter is untouched.

    python -m proofs.dropouts --trials 1 --seed 7

repeats the trial of that seed alone.
"""

from __future__ import annotations

import functools
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hetlora.core.adapter import map_tensors
from hetlora.core.method import Engine, Method
from hetlora.core.round import run_round
from hetlora.core.sampling import DropOuts, sample_cohort
from hetlora.core.types import Client, ClientFailure, ClientUpdate, ServerState, TrainTask
from hetlora.data.tokenization import Example
from hetlora.methods import METHODS
from hetlora.model.lora_model import LoraModel, load_base
from hetlora.runs.process import quiet_transformers
from hetlora.training.local import LocalTraining
from hetlora.training.simulation import SimulationEngine
from proofs.outcome import Outcome, arguments
from proofs.processes import in_processes
from proofs.rounds import Watched, problems_of, same
from proofs.small_run import write_base

__all__ = ["WAYS", "main", "prove", "simulate"]

SHARES = (0.1, 0.3, 0.5, 0.9)
WAYS = ("before", "after", "no rows", "diverges", "NaN", "silent")
ROUNDS = 100
CLIENTS, COHORT = 12, 5
RULES: tuple[tuple[str, dict[str, Any], Mapping[str, str]], ...] = (
    ("hetlora", {"gamma": 0.7, "min_rank": 1, "penalty": 1.0}, {"sum": "padded", "weights": "norm"}),
    ("zeropad", {}, {"sum": "padded", "weights": "examples"}),
    ("rbla", {}, {"sum": "owners", "weights": "examples"}),
)
TRAINING = LocalTraining(learning_rate=3e-3, batch_size=2, steps=1)


@functools.cache
def model() -> LoraModel:
    """Return the tiny base with LoRA layers."""
    quiet_transformers()
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder))
        return LoraModel(load_base(folder), scaling=2.0)


@dataclass(frozen=True)
class Rows:
    """Random rows of every client; in a round some have none."""

    rows: Mapping[str, Sequence[Example]]
    without: set[str]

    def train(self, client: str) -> Sequence[Example]:
        """Return a client's rows."""
        return () if client in self.without else self.rows[client]


def _rows(seed: int) -> dict[str, list[Example]]:
    rng = random.Random(f"rows:{seed}")
    return {
        f"c{index}": [
            Example(tuple(rng.randrange(2, 258) for _ in range(rng.randint(4, 12))), 2) for _ in range(1 + index % 4)
        ]
        for index in range(CLIENTS)
    }


@dataclass(frozen=True)
class Failing:
    """An engine in which a share of every cohort fails in a given way, drawn like `DropOuts`.

    Attributes:
        engine: The engine of all clients.
        share: Failing share of the cohort.
        way: One of `WAYS`.
        seed: Seed of the draw.
        without: Filled with the clients that have no rows.
        gone: Filled with the clients that fail.
    """

    engine: Engine
    share: float
    way: str
    seed: int
    without: set[str]
    gone: set[str]

    def train(self, tasks: Sequence[TrainTask], method: Method[Any]) -> Iterator[ClientUpdate | ClientFailure]:
        """Yield the answers; the failing clients fail in the given way."""
        rng = random.Random(f"failing:{self.seed}:{tasks[0].round}")
        certain, chance = divmod(self.share * len(tasks), 1)
        self.gone.clear()
        self.gone.update(rng.sample(sorted(task.client for task in tasks), int(certain) + (rng.random() < chance)))
        self.without.clear()
        if self.way == "no rows":
            self.without.update(self.gone)
        if self.way == "diverges":
            tasks = [_far(task) if task.client in self.gone else task for task in tasks]
        for answer in self.engine.train(tasks, method):
            if answer.client not in self.gone or isinstance(answer, ClientFailure):
                yield answer
            elif self.way != "silent":
                yield replace(answer, adapter=map_tensors(lambda factor: factor * float("nan"), answer.adapter))


def _far(task: TrainTask) -> TrainTask:
    """Return the task with factors on which training diverges."""
    return replace(task, adapter=map_tensors(lambda factor: torch.full_like(factor, 1e30), task.adapter))


def simulate(seed: int, rounds: int = ROUNDS) -> tuple[list[str], dict[str, int]]:
    """Run the federation of a seed; return its problems and the work done."""
    share, way = SHARES[seed % len(SHARES)], WAYS[seed // len(SHARES) % len(WAYS)]
    name, options, rule = RULES[seed % len(RULES)]
    method = METHODS[name](**options)
    clients = [Client(f"c{index}", 1 + index % 4, 1 + index % 4) for index in range(CLIENTS)]
    without, gone = set[str](), set[str]()
    trains = SimulationEngine(model(), Rows(_rows(seed), without), TRAINING, seed=seed)
    engine: Engine = Failing(trains, share, way, seed, without, gone)
    if way in ("before", "after"):
        engine = DropOuts(trains, share, way, seed)  # type: ignore[arg-type]
    state = ServerState(model().initial_adapter(4, seed), seed=seed)
    problems: list[str] = []
    counts: Counter[str] = Counter()
    for number in range(rounds):
        cohort = sample_cohort(clients, COHORT, number, seed)
        watched = Watched(method)
        try:
            after, report = run_round(state, watched.method, engine, cohort)
        except Exception as error:  # noqa: BLE001  that is what must not happen
            return [*problems, f"round {number} ended with {error!r}"], dict(counts)
        found = list(problems_of(method, rule, state, after, report, cohort, watched.admitted))
        failed = {failure.client for failure in report.failures}
        if way not in ("before", "after") and failed != gone:
            found.append(f"{sorted(failed)} failed, drawn were {sorted(gone)}")
        if not int(share * COHORT) <= len(failed) <= int(share * COHORT) + 1:
            found.append(f"{len(failed)} of {COHORT} failed, at a share of {share}")
        counts.update(
            {"rounds": 1, "admitted": len(watched.admitted), "failed": len(failed), "nobody": not watched.admitted}
        )
        counts["pruned"] += sum(client.pruned for client in report.clients)
        problems += [f"round {number} ({share:.0%}, {way}): {problem}" for problem in found]
        state = after
    if counts["admitted"] and same(state, ServerState(model().initial_adapter(4, seed))):
        problems.append("nothing was learned")
    return problems, dict(counts)


def piece(seed: int, rounds: int) -> tuple[list[str], dict[str, int]]:
    """Run one trial; add the repeating command to each failure."""
    problems, counts = simulate(seed, rounds)
    return [f"{problem}; python -m proofs.dropouts --trials 1 --seed {seed}" for problem in problems], counts


def prove(trials: int, seed: int, rounds: int = ROUNDS, processes: int | None = None) -> Outcome:
    """Run the trials of consecutive seeds.

    Args:
        trials: Number of runs.
        seed: Seed of the first trial.
        rounds: Number of rounds per run.
        processes: Maximum number of processes; None for the number of cores.
    """
    outcome, counts = Outcome("dropouts", seed), Counter[str]()
    work: Callable[..., tuple[list[str], dict[str, int]]] = piece
    for problems, done in in_processes(work, [(number, rounds) for number in range(seed, seed + trials)], processes):
        counts.update(done)
        outcome.tried(problems, of=trials)
    outcome.figures |= {"rounds_a_run": rounds, "counts": dict(sorted(counts.items()))}
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Run the proof; return the exit code."""
    parser = arguments(__doc__ or "", trials=len(SHARES) * len(WAYS))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of every run")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    return prove(options.trials, options.seed, options.rounds).end()


if __name__ == "__main__":
    sys.exit(main())
