"""The clients of a run, and the ones that are evaluated."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import overload

from hetlora.core.ranks import Ranks
from hetlora.core.types import Client

__all__ = ["ClientList", "sample_evaluated_clients"]


class ClientList(Sequence[Client]):
    """The clients of a federation, created on access: a population of a million takes no memory.

    Args:
        ranks: Their first ranks.
        rows: Their numbers of training rows.

    Example:
        >>> from hetlora.core.ranks import same_ranks
        >>> ClientList(same_ranks(["a", "b"], 4), {"a": 10, "b": 20})[1]
        Client(name='b', rank=4, examples=20)
    """

    def __init__(self, ranks: Ranks, rows: Mapping[str, int]) -> None:
        self.ranks = ranks
        self.rows = rows

    def __len__(self) -> int:
        return len(self.ranks)

    @overload
    def __getitem__(self, index: int) -> Client: ...
    @overload
    def __getitem__(self, index: slice) -> list[Client]: ...
    def __getitem__(self, index: int | slice) -> Client | list[Client]:
        names = self.ranks.names[index]
        return self.named(names) if isinstance(names, str) else [self.named(name) for name in names]

    def __iter__(self) -> Iterator[Client]:
        return map(self.named, self.ranks.names)

    def named(self, name: str) -> Client:
        """Return the client of a name."""
        return Client(name, self.ranks[name], self.rows[name])


def sample_evaluated_clients(names: Sequence[str], count: int | None, seed: int) -> Sequence[str]:
    """Return the evaluated clients in their order: all, or `count` drawn by `seed`.

    Example:
        >>> sample_evaluated_clients(["a", "b", "c"], 5, seed=0), len(sample_evaluated_clients(["a", "b", "c"], 2, seed=0))
        (['a', 'b', 'c'], 2)
    """
    if count is None or count >= len(names):
        return names
    return [names[place] for place in sorted(random.Random(f"measured:{seed}").sample(range(len(names)), count))]
