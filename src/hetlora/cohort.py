"""Which clients take part in a round."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

__all__ = ["sample_cohort"]

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
