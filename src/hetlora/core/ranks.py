"""The clients' first ranks: one for all, an explicit list, tiers, by size of data, or drawn from a distribution.

A population may have a million clients: ranks are computed on access, except for what exact shares and quantiles need, and take
at most two bytes per client.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from statistics import NormalDist
from typing import Literal

from hetlora.core.population import MANY, LazyClientMap, names_of
from hetlora.errors import HetLoraError

__all__ = [
    "Ranks",
    "explicit_ranks",
    "normal_ranks",
    "power_law_ranks",
    "ranks_by_examples",
    "same_ranks",
    "tier_of",
    "tiered_ranks",
    "tiers_of",
    "uniform_ranks",
]


class Ranks(LazyClientMap[int]):
    """The first rank of every client.

    Args:
        names: The clients' names.
        at: Returns the rank of a client from its index in `names`.
        bound: An upper bound of the ranks.
    """

    def __init__(self, names: Sequence[str], at: Callable[[int], int], bound: int) -> None:
        super().__init__(names, at)
        self.bound = bound

    @property
    def largest(self) -> int:
        """Return the largest rank; for a large population the bound."""
        return max(self.values()) if len(self) <= MANY else self.bound

    def __repr__(self) -> str:
        return repr(dict(self)) if len(self) <= 20 else f"<ranks of {len(self)} clients, {self.bound} at most>"


def same_ranks(clients: Sequence[str], rank: int) -> Ranks:
    """Give every client one rank (the homogeneous baseline).

    Example:
        >>> same_ranks(["a", "b"], 4)
        {'a': 4, 'b': 4}
    """
    return Ranks(clients, lambda _: rank, rank)


def explicit_ranks(clients: Sequence[str], ranks: Mapping[str, int], default: int | None = None) -> Ranks:
    """Give clients the ranks listed by name, and the others `default`.

    Raises:
        HetLoraError: A client has no rank, or a rank is given to a client that does not exist.

    Example:
        >>> explicit_ranks(["a", "b"], {"a": 8}, default=2)
        {'a': 8, 'b': 2}
    """
    given = Ranks(clients, lambda place: ranks.get(clients[place], default or 0), max([*ranks.values(), default or 0]))
    unknown = sorted(name for name in ranks if name not in given)
    if unknown:
        raise HetLoraError(f"ranks.of names clients that the data do not have: {', '.join(unknown[:5])}; take them out")
    missing = [client for client in clients if client not in ranks] if default is None else []
    if missing:
        raise HetLoraError(f"no rank for {', '.join(missing[:5])}; add them to ranks.of, or set ranks.default")
    return given


def tiered_ranks(clients: Sequence[str], tiers: Sequence[tuple[int, float]], seed: int) -> Ranks:
    """Divide the clients among tiers of devices at random, in exact shares.

    Args:
        clients: Names.
        tiers: Pairs of rank and share; shares are relative to their sum.
        seed: Seed of the draw.

    Example:
        >>> sorted(tiered_ranks(["a", "b", "c", "d"], [(2, 0.75), (8, 0.25)], seed=0).values())
        [2, 2, 2, 8]
    """
    whole = sum(share for _, share in tiers)
    ends = [round(upper * len(clients)) for upper in accumulate(share / whole for _, share in tiers)]
    held, shuffled = array("H", bytes(2 * len(clients))), _shuffled(len(clients), f"ranks:{seed}")
    for (rank, _), (begin, end) in zip(tiers, pairwise([0, *ends]), strict=True):
        for place in shuffled[begin:end]:
            held[place] = rank
    return Ranks(clients, held.__getitem__, max(held, default=0))


def uniform_ranks(clients: Sequence[str], min_rank: int, max_rank: int, seed: int) -> Ranks:
    """Draw every client's rank from `min_rank … max_rank` with equal probability.

    Example:
        >>> uniform_ranks(["a", "b"], 3, 3, seed=0)
        {'a': 3, 'b': 3}
    """
    return _draw(clients, seed, max_rank, lambda rng: rng.randint(min_rank, max_rank))


def power_law_ranks(clients: Sequence[str], min_rank: int, max_rank: int, seed: int, exponent: float = 0.1) -> Ranks:
    """Draw every client's rank from a truncated power law, `P(r) ∝ r^(exponent - 1)` on `min_rank … max_rank`.

    The paper draws ranks on 5 ... 50 from a truncated power law with exponent 0.1, skewed to small ranks (likely). Its exponent
    is taken here as the a of the density `a x^(a-1)`, as in NumPy's and SciPy's power law (open).

    Example:
        >>> ranks = power_law_ranks([str(i) for i in range(1000)], 5, 50, seed=0).values()
        >>> min(ranks), max(ranks), sum(rank < 20 for rank in ranks) > 500
        (5, 50, True)
    """
    support = range(min_rank, max_rank + 1)
    weights = [rank ** (exponent - 1.0) for rank in support]
    return _draw(clients, seed, max_rank, lambda rng: rng.choices(support, weights)[0])


def normal_ranks(clients: Sequence[str], min_rank: int, max_rank: int, seed: int, *, mean: float, std: float) -> Ranks:
    """Draw every client's rank from a rounded normal distribution, truncated to `min_rank … max_rank`.

    `P(r) ∝ Φ((r + ½ - μ) / σ) - Φ((r - ½ - μ) / σ)`. Clipping instead would collect clients at the bounds, the two ranks that
    matter most: the cheapest, and the one that determines the size of the global adapter.

    Args:
        clients: Names.
        min_rank: Smallest rank.
        max_rank: Largest rank.
        seed: Seed of the draw.
        mean: `μ`, within the bounds.
        std: `σ`, more than 0.

    Raises:
        ValueError: The mean is not within the bounds, or the deviation is not positive.

    Example:
        >>> ranks = list(normal_ranks([str(i) for i in range(1000)], 1, 16, seed=0, mean=8, std=2).values())
        >>> 7.8 < sum(ranks) / 1000 < 8.2
        True
    """
    if not (min_rank <= mean <= max_rank and std > 0):
        raise ValueError(f"mean={mean}, std={std}: the mean must be in {min_rank} … {max_rank}, the deviation above 0")
    normal, support = NormalDist(mean, std), range(min_rank, max_rank + 1)
    weights = [normal.cdf(rank + 0.5) - normal.cdf(rank - 0.5) for rank in support]
    return _draw(clients, seed, max_rank, lambda rng: rng.choices(support, weights)[0])


def ranks_by_examples(
    examples: Mapping[str, int],
    min_rank: int,
    max_rank: int,
    order: Literal["increasing", "decreasing"] = "increasing",
) -> Ranks:
    """Let a client's rank grow linearly with the quantile of its number of training examples.

    `r_k = min + q_k (max - min)`, rounded. `q_k` in 0 … 1 is the share of the other clients with fewer examples, where clients
    with equally many count half: clients of equal size have equal ranks. Quantiles are used because a few clients usually
    hold most of the data.

    Args:
        examples: Client to its number of training examples.
        min_rank: Smallest rank.
        max_rank: Largest rank.
        order: Whether the rank increases or decreases with the examples.

    Example:
        >>> ranks_by_examples({"a": 10, "b": 500, "c": 20, "d": 20}, 2, 8)
        {'a': 2, 'b': 8, 'c': 5, 'd': 5}
        >>> ranks_by_examples({"a": 10, "b": 500}, 2, 8, "decreasing")
        {'a': 8, 'b': 2}
    """
    names, width, last = names_of(examples), max_rank - min_rank, 2 * (len(examples) - 1)
    if len(examples) == 1:
        return same_ranks(names, (min_rank + max_rank + 1) // 2)
    by_count, fewer = {}, 0
    for count, as_many in sorted(Counter(examples.values()).items()):
        # 2 q (n - 1), a whole number, so that the arithmetic is exact: fewer examples count 2, equally many count 1.
        position = 2 * fewer + as_many - 1
        if order == "decreasing":
            position = last - position
        by_count[count] = min_rank + (2 * position * width + last) // (2 * last)
        fewer += as_many
    return Ranks(names, lambda place: by_count[examples[names[place]]], max(by_count.values(), default=0))


def tiers_of(ranks: Sequence[int]) -> dict[int, str]:
    """Return the tier of every rank in `ranks`, see `tier_of`.

    Example:
        >>> tiers_of([2, 8, 2])
        {2: '2', 8: '8'}
    """
    return {rank: tier_of(rank, ranks) for rank in sorted(set(ranks))}


def tier_of(rank: int, ranks: Sequence[int], limit: int = 5) -> str:
    """Name the tier of a rank: the rank itself if `ranks` has at most `limit` different ones, else its quartile.

    Example:
        >>> tier_of(4, [2, 4, 8]), tier_of(7, list(range(1, 21)))
        ('4', '6-10')
    """
    distinct = sorted(set(ranks))
    if rank not in distinct:
        raise ValueError(f"rank {rank} is not among the {len(ranks)} ranks given")
    if len(distinct) <= limit:
        return str(rank)
    ordered = sorted(ranks)
    edges = sorted({ordered[len(ordered) * quarter // 4 - 1] for quarter in (1, 2, 3, 4)})
    edge = next(edge for edge in edges if rank <= edge)
    low = min(value for value in distinct if value > max((e for e in edges if e < rank), default=0))
    return f"{low}-{edge}" if low < edge else str(edge)


def _draw(clients: Sequence[str], seed: int, bound: int, draw: Callable[[random.Random], int]) -> Ranks:
    # One generator per client: its rank does not depend on the other clients, and is drawn on first access.
    drawn = array("H", bytes(2 * len(clients)))

    def at(place: int) -> int:
        if not drawn[place]:
            drawn[place] = draw(random.Random(f"rank:{seed}:{clients[place]}"))
        return drawn[place]

    return Ranks(clients, at, bound)


def _shuffled(count: int, seed: str) -> array[int]:
    """Return the numbers below `count` as `random.Random(seed).sample(range(count), count)` does, in a tenth of its memory.

    Example:
        >>> list(_shuffled(50, "x")) == random.Random("x").sample(range(50), 50)
        True
    """
    rng, pool = random.Random(seed), array("I", range(count))
    for left in range(count, 0, -1):
        # Drawn numbers move to the end, which is not drawn from any more.
        chosen = rng.randrange(left)
        pool[chosen], pool[left - 1] = pool[left - 1], pool[chosen]
    return pool[::-1]
