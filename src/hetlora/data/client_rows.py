"""The rows of a client, and of a population whose clients draw theirs from one pool when somebody asks for them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hetlora.core.population import NumberedNames
from hetlora.data.templates import Row
from hetlora.errors import DataError

__all__ = ["ClientRows", "SampledRows", "Side"]

Side = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class ClientRows:
    """The rows of one client."""

    train: tuple[Row, ...]
    test: tuple[Row, ...]


@dataclass(frozen=True)
class SampledRows:
    """The rows of a population of any size: each client draws its own from the pool, by the seed and its name alone.

    A client's rows are different ones; clients draw independently, so that a row can be with many of them or with none.
    Nothing is kept a client: asking again draws the same again.

    Args:
        pool: All rows, on either side of the split.
        names: The clients'.
        train: Training rows that each draws.
        most: Held-out rows that each draws at most; None for no bound.
        seed: Of the run.

    Raises:
        DataError: The pool has fewer rows than a client is to draw.
    """

    pool: ClientRows
    names: NumberedNames
    train: int
    most: int | None
    seed: int

    def __post_init__(self) -> None:
        have = len(self.pool.train)
        if have < self.train:
            raise DataError(
                f"partition.rows_per_client = {self.train}, but there are {have} training rows to draw from; lower it"
            )

    def count(self, side: Side) -> int:
        """Return how many rows each client draws; held-out ones in the pool's proportion, at least one."""
        if side == "train":
            return self.train
        own = max(1, round(self.train * len(self.pool.test) / len(self.pool.train)))
        return own if self.most is None else min(own, self.most)

    def at(self, place: int) -> ClientRows:
        """Return the rows of the client at a place of `names`."""
        name = self.names[place]
        return ClientRows(self._draw(name, "train", self.pool.train), self._draw(name, "test", self.pool.test))

    def _draw(self, name: str, side: Side, rows: Sequence[Row]) -> tuple[Row, ...]:
        chosen = random.Random(f"rows:{self.seed}:{side}:{name}").sample(range(len(rows)), self.count(side))
        return tuple(rows[index] for index in sorted(chosen))
