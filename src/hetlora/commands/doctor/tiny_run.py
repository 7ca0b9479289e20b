"""A federation cut down to a minute: a few clients of different ranks and a few short rows, with the run's method and base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hetlora.config import RunConfig
from hetlora.config.build import local_training, make_method, make_robust
from hetlora.core.adapter import Adapter, Rank
from hetlora.core.method import Method
from hetlora.core.ranks import Ranks
from hetlora.core.robust import Robustness
from hetlora.core.round import RoundReport, run_round
from hetlora.core.types import Client, ClientFailure, ClientUpdate, ServerState, TrainTask
from hetlora.data import Example
from hetlora.methods import METHODS
from hetlora.model.initial_adapter import first_adapter
from hetlora.model.lora_model import LoraModel
from hetlora.training.local import LocalTraining
from hetlora.training.simulation import SimulationEngine

__all__ = ["TinyFederation", "TinyRound", "shortened"]

CLIENTS, ROWS, TOKENS, BATCH, STEPS = 4, 4, 48, 2, 2


@dataclass(frozen=True)
class TinyRound:
    """One round: the state before it, what was sent, what came back, and the state after it."""

    before: ServerState
    tasks: Mapping[str, TrainTask]
    answers: tuple[ClientUpdate | ClientFailure, ...]
    after: ServerState
    report: RoundReport

    @property
    def updates(self) -> list[ClientUpdate]:
        """Return the admitted updates, in the cohort's order."""
        own = {answer.client: answer for answer in self.answers if isinstance(answer, ClientUpdate)}
        return [own[client.client] for client in self.report.clients]


@dataclass(frozen=True)
class TinyFederation:
    """What two tiny rounds need.

    Attributes:
        config: Of the run.
        model: Its base, with layers.
        rows: Client to its few short rows.
        cohort: The clients.
        method: The run's, within its wrappers.
        plain: The method without wrappers.
        settings: Local training of two steps.
        robust: The run's bounds.
        imported: What the run starts from; None for fresh factors.
    """

    config: RunConfig
    model: LoraModel
    rows: Mapping[str, Sequence[Example]]
    cohort: tuple[Client, ...]
    method: Method[Any]
    plain: Method[Any]
    settings: LocalTraining
    robust: Robustness | None
    imported: Adapter | None = None

    @classmethod
    def of(
        cls,
        config: RunConfig,
        model: LoraModel,
        ranks: Ranks,
        examples: Mapping[str, Sequence[Example]],
        imported: Adapter | None = None,
    ) -> TinyFederation:
        """Cut a run down.

        Args:
            config: Of the run.
            model: Its base, with layers.
            ranks: Every client's.
            examples: Training rows of clients to choose from.
            imported: What the run starts from; empty or None for fresh factors.
        """
        method = make_method(config)
        names = chosen({name: ranks[name] for name, own in examples.items() if own})
        rows = {name: [shortened(row) for row in sorted(examples[name], key=_size)[:ROWS]] for name in names}
        clients = [Client(name, 1 if method.trains == "weights" else ranks[name], len(rows[name])) for name in names]
        if method.clients == "pooled":
            rows = {"everyone": [row for own in rows.values() for row in own]}
            clients = [Client("everyone", max(ranks[name] for name in names), len(rows["everyone"]))]
        own = local_training(config)
        return cls(
            config,
            model,
            rows,
            tuple(clients),
            method,
            METHODS[config.method.name](**config.method.arguments),
            replace(own, steps=STEPS, epochs=None, batch_size=min(own.batch_size, BATCH)),
            make_robust(config),
            imported or None,
        )

    @property
    def largest(self) -> int:
        """Return the largest rank of the cohort."""
        return max(_number(client.rank) for client in self.cohort)

    def first_state(self) -> ServerState:
        """Return the state before the first round."""
        first = first_adapter(self.model, self.largest, self.config.seed, self.imported)
        return ServerState(first, seed=self.config.seed)

    def engine(
        self, settings: LocalTraining | None = None, model: LoraModel | None = None, **options: Any
    ) -> SimulationEngine:
        """Return where the clients train: as in the run, or with other settings."""
        return SimulationEngine(
            model or self.model, _Rows(self.rows), settings or self.settings, seed=self.config.seed, **options
        )

    def round(self, state: ServerState) -> TinyRound:
        """Do one round."""
        watched = _Watched(self.engine())
        after, report = run_round(state, self.method, watched, self.cohort, training=self.settings, robust=self.robust)
        return TinyRound(state, watched.tasks, tuple(watched.answers), after, report)


@dataclass(frozen=True)
class _Rows:
    rows: Mapping[str, Sequence[Example]]

    def train(self, client: str) -> Sequence[Example]:
        return self.rows[client]


class _Watched:
    """An engine that keeps what it was given and what it gave."""

    def __init__(self, engine: SimulationEngine) -> None:
        self.engine = engine
        self.tasks: dict[str, TrainTask] = {}
        self.answers: list[ClientUpdate | ClientFailure] = []

    def train(self, tasks: Sequence[TrainTask], method: Method[Any]) -> Iterator[ClientUpdate | ClientFailure]:
        self.tasks = {task.client: task for task in tasks}
        for answer in self.engine.train(tasks, method):
            self.answers.append(answer)
            yield answer


def chosen(ranks: Mapping[str, int]) -> list[str]:
    """Return a few clients: of the largest rank, the smallest, then of those between, and then again.

    Example:
        >>> chosen({"a": 4, "b": 4, "c": 8, "d": 16, "e": 4})
        ['d', 'a', 'c', 'b']
    """
    by_rank: dict[int, list[str]] = {}
    for name, rank in ranks.items():
        by_rank.setdefault(rank, []).append(name)
    in_order = sorted(by_rank)
    groups = [by_rank[rank] for rank in [*in_order[-1:], *in_order[:-1]]]
    found: list[str] = []
    while len(found) < min(CLIENTS, len(ranks)):
        found += [group.pop(0) for group in groups if group]
    return found[:CLIENTS]


def shortened(row: Example) -> Example:
    """Return a row of few tokens, some of them before the target and some of it.

    Example:
        >>> short = shortened(Example(tuple(range(500)), scored_from=300))
        >>> short.ids[0], len(short.ids), short.scored
        (276, 48, 24)
    """
    start = max(0, row.scored_from - TOKENS // 2)
    return Example(row.ids[start : start + TOKENS], row.scored_from - start)


def _size(row: Example) -> tuple[int, tuple[int, ...]]:
    return len(row.ids), row.ids


def _number(rank: Rank) -> int:
    return rank if isinstance(rank, int) else max(rank.values())
