"""Which clients take part in a round, and which of them drop out."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from hetlora.core.method import Engine, Method
from hetlora.core.types import ClientFailure, ClientUpdate, PartialTotal, TrainTask

__all__ = ["DropOuts", "sample_cohort"]

T = TypeVar("T")


def sample_cohort(clients: Sequence[T], size: int, round_number: int, seed: int) -> list[T]:
    """Draw `size` different clients, uniformly, by seed and round alone: a resumed run draws the same.

    Args:
        clients: The population, in a fixed order.
        size: Clients a round, at most the population.
        round_number: From 0.
        seed: Of the run.

    Example:
        >>> sample_cohort(["a", "b", "c"], 2, round_number=0, seed=0) == sample_cohort(["a", "b", "c"], 2, 0, 0)
        True
    """
    chosen = random.Random(f"cohort:{seed}:{round_number}").sample(range(len(clients)), size)
    return [clients[index] for index in chosen]


@dataclass(frozen=True)
class DropOuts:
    """An engine some of whose clients fail: a share of every cohort, drawn by seed and round alone.

    Where the share of a cohort is no whole number of clients, the last one fails with the probability that is left over.

    Attributes:
        engine: Where the others train.
        share: Of the cohort, in [0, 1).
        when: "before" training, which then costs no time, or "after" it, when the work is done and the answer is lost.
        seed: Of the run.
    """

    engine: Engine
    share: float
    when: Literal["before", "after"]
    seed: int

    def train(
        self, tasks: Sequence[TrainTask], method: Method[Any]
    ) -> Iterator[ClientUpdate | ClientFailure | PartialTotal]:
        """Yield the answers of those that stay, and a failure for each one that drops out; with it a sum it is in is lost."""
        names = sorted(task.client for task in tasks)
        rng = random.Random(f"dropout:{self.seed}:{tasks[0].round if tasks else 0}")
        certain, chance = divmod(self.share * len(names), 1)
        gone = set(rng.sample(names, int(certain) + (rng.random() < chance)))
        asked = [task for task in tasks if task.client not in gone or self.when == "after"]
        for answer in self.engine.train(asked, method):
            clients = answer.clients if isinstance(answer, PartialTotal) else (answer.client,)
            if gone.isdisjoint(clients):
                yield answer
            else:
                yield from (
                    ClientFailure(one, "its sum was lost with one that dropped out") for one in {*clients} - gone
                )
        for name in sorted(gone):
            yield ClientFailure(name, f"dropped out {self.when} training")
