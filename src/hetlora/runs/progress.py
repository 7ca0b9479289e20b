"""A round while it is under way: who was asked, how many have answered, and what is being done; for a person to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hetlora.core.adapter import Rank
from hetlora.core.method import Engine, Method
from hetlora.core.types import Client, ClientFailure, ClientUpdate, PartialTotal, TrainTask
from hetlora.runs.former import former_names

__all__ = ["ObservedEngine", "RoundProgress"]


@dataclass(frozen=True)
class RoundProgress:
    """A round under way.

    Attributes:
        round: From 1, as people count.
        doing: "drawing the cohort", "training", "aggregating", "measuring" or "writing a checkpoint".
        ranks: The rank that each client of the cohort was sent; empty until it is drawn.
        answered: Clients that have given an update. Whether it is admitted is known when the round is over.
        failed: Clients that have given none, and never will.
    """

    round: int
    doing: str
    ranks: tuple[Rank, ...] = ()
    answered: int = 0
    failed: int = 0


class ObservedEngine(Engine):
    """Looks on while a round goes on, and changes nothing of it: an engine that hands on what another one yields.

    Args:
        engine: Where the clients train.
        changed: Is called for every change. Answers may be many: it must not take long.
    """

    def __init__(self, engine: Engine, changed: Callable[[RoundProgress], None]) -> None:
        self._engine = engine
        self._changed = changed
        self._now = RoundProgress(0, "drawing the cohort")

    def drawing(self, cohort: Callable[[int], Sequence[Client]]) -> Callable[[int], Sequence[Client]]:
        """Return what draws the same cohorts; over Flower that may wait for clients."""

        def draw(round_number: int) -> Sequence[Client]:
            self._now = RoundProgress(round_number + 1, "drawing the cohort")
            self._changed(self._now)
            return cohort(round_number)

        return draw

    def train(
        self, tasks: Sequence[TrainTask], method: Method[Any]
    ) -> Iterator[ClientUpdate | ClientFailure | PartialTotal]:
        """Yield what the engine yields, as it comes."""
        self.doing("training", ranks=tuple(task.rank for task in tasks))
        for answer in self._engine.train(tasks, method):
            if isinstance(answer, ClientFailure):
                self.doing("training", failed=self._now.failed + 1)
            else:
                several = len(answer.clients) if isinstance(answer, PartialTotal) else 1
                self.doing("training", answered=self._now.answered + several)
            yield answer
        self.doing("aggregating")

    def doing(self, what: str, **changes: Any) -> None:
        """Tell what is being done now, and what else has changed."""
        self._now = replace(self._now, doing=what, **changes)
        self._changed(self._now)


__getattr__ = former_names(__name__, UnderWay=RoundProgress)
