"""Sampling of a round's cohort, and simulated drop-outs."""

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
    """Draw `size` different clients uniformly, from seed and round alone: a resumed run draws the same.

    Args:
        clients: The population, in a fixed order.
        size: Clients per round, at most the population.
        round_number: From 0.
        seed: Seed of the run.

    Example:
        >>> sample_cohort(["a", "b", "c"], 2, round_number=0, seed=0) == sample_cohort(["a", "b", "c"], 2, 0, 0)
        True
    """
    chosen = random.Random(f"cohort:{seed}:{round_number}").sample(range(len(clients)), size)
    return [clients[index] for index in chosen]


@dataclass(frozen=True)
class DropOuts:
    """An engine that lets a share of every cohort fail, drawn from seed and round alone.

    If the share is not a whole number of clients, one more client fails with the remaining probability.

    Attributes:
        engine: The engine that trains the others.
        share: Share of the cohort, in [0, 1).
        when: "before" training, which then costs no time, or "after" it, when only the answer is lost.
        seed: Seed of the run.
    """

    engine: Engine
    share: float
    when: Literal["before", "after"]
    seed: int

    def train(
        self, tasks: Sequence[TrainTask], method: Method[Any]
    ) -> Iterator[ClientUpdate | ClientFailure | PartialTotal]:
        """Yield the answers of the others and a failure per drop-out. A sum that contains a drop-out is lost as a whole."""
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
                    ClientFailure(name, "its sum was lost with one that dropped out") for name in {*clients} - gone
                )
        for name in sorted(gone):
            yield ClientFailure(name, f"dropped out {self.when} training")
