"""Progress within a round, for displays."""

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
    """Progress of a round.

    Attributes:
        round: Number of the round, from 1.
        doing: "drawing the cohort", "training", "aggregating", "measuring" or "writing a checkpoint".
        ranks: The rank sent to each client of the cohort; empty until the cohort is drawn.
        answered: Clients that have sent an update. Whether it is admitted is known at the end of the round.
        failed: Clients that have failed.
    """

    round: int
    doing: str
    ranks: tuple[Rank, ...] = ()
    answered: int = 0
    failed: int = 0


class ObservedEngine(Engine):
    """An engine that yields the answers of another one and reports the progress of the round.

    Args:
        engine: Where the clients train.
        changed: Is called for every change, also for every answer, and must return quickly.
    """

    def __init__(self, engine: Engine, changed: Callable[[RoundProgress], None]) -> None:
        self._engine = engine
        self._changed = changed
        self._now = RoundProgress(0, "drawing the cohort")

    def drawing(self, cohort: Callable[[int], Sequence[Client]]) -> Callable[[int], Sequence[Client]]:
        """Return a function that reports and draws the same cohorts; over Flower it may wait for clients."""

        def draw(round_number: int) -> Sequence[Client]:
            self._now = RoundProgress(round_number + 1, "drawing the cohort")
            self._changed(self._now)
            return cohort(round_number)

        return draw

    def train(
        self, tasks: Sequence[TrainTask], method: Method[Any]
    ) -> Iterator[ClientUpdate | ClientFailure | PartialTotal]:
        """Yield the engine's answers as they come."""
        self.doing("training", ranks=tuple(task.rank for task in tasks))
        for answer in self._engine.train(tasks, method):
            if isinstance(answer, ClientFailure):
                self.doing("training", failed=self._now.failed + 1)
            else:
                count = len(answer.clients) if isinstance(answer, PartialTotal) else 1
                self.doing("training", answered=self._now.answered + count)
            yield answer
        self.doing("aggregating")

    def doing(self, what: str, **changes: Any) -> None:
        """Report the current activity and other changes."""
        self._now = replace(self._now, doing=what, **changes)
        self._changed(self._now)


__getattr__ = former_names(__name__, UnderWay=RoundProgress)
