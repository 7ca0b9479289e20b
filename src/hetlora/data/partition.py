"""Which client holds which record, where the data do not say: IID, by label, by length, in shards, in uneven sizes."""

from __future__ import annotations

import itertools
import random
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hetlora.data.templates import Record
from hetlora.errors import DataError, printable

__all__ = ["LENGTH", "Labels", "Partition", "SharedPool"]

LENGTH = "length"
"""As a label, the length of a record's targets in characters, in bins of about as many records each."""

DRAWS = 10
"""How often "dirichlet" draws before it gives up."""

Label = str | int | float


@dataclass(frozen=True)
class Labels:
    """The label of a record: a field of it, or its length.

    Args:
        by: Name of the field, or ``"length"``.
        bins: Number of bins of length. Records of one length are in one bin, so there may be fewer.

    Example:
        >>> Labels("length", bins=2).names([3, 9, 4, 70])
        ['3-4', '9-70', '3-4', '9-70']
    """

    by: str
    bins: int = 5

    def key(self, record: Record) -> Label:
        """Return the field's value, or the length.

        Raises:
            DataError: The field is missing, or is neither text nor a number.
        """
        if self.by == LENGTH:
            return sum(len(row.target) for row in record.rows)
        value = record.fields.get(self.by)
        if not isinstance(value, (str, int, float)):
            state = "is neither text nor a number" if self.by in record.fields else "is missing"
            have = ", ".join(map(printable, sorted(record.fields)))
            raise DataError(
                f"{record.where}: field {self.by!r}, the label, {state}; the row has {have}. Set partition.by"
            )
        return value

    def names(self, keys: Sequence[Label]) -> list[str]:
        """Return the label of each record as text."""
        codes, names = self.codes(keys)
        return [names[code] for code in codes]

    def codes(self, keys: Sequence[Label]) -> tuple[list[int], list[str]]:
        """Return the label of each record as a number from 0, and the labels in that order: numbers by value, then texts."""
        if self.by == LENGTH:
            return _bins([int(key) for key in keys], self.bins)
        own = list(map(_name, keys))
        first = dict(zip(reversed(own), reversed(keys), strict=True))  # not a set of keys: 1, 1.0 and True are equal
        names = sorted(first, key=lambda name: (isinstance(first[name], str), *_value(first[name]), name))
        code = {name: index for index, name in enumerate(names)}
        return [code[name] for name in own], names


def _name(key: Label) -> str:
    """Return a label as text: 1.0 is 1, which files of numbers mix, but true is not."""
    return str(int(key)) if isinstance(key, float) and key.is_integer() and abs(key) < 2**53 else str(key)


def _value(key: Label) -> tuple[float, ...]:
    return () if isinstance(key, str) else (isinstance(key, bool), key)


def _bins(lengths: Sequence[int], count: int) -> tuple[list[int], list[str]]:
    ordered = sorted(lengths)
    edges = (
        sorted({ordered[len(ordered) * index // count] for index in range(1, count)} - {ordered[0]}) if ordered else []
    )
    places = [bisect_right(edges, length) for length in lengths]
    held: list[list[int]] = [[] for _ in range(len(edges) + 1)]
    for length, place in zip(lengths, places, strict=True):
        held[place].append(length)
    return places, [f"{min(own)}-{max(own)}" for own in held if own]


@dataclass(frozen=True)
class Partition:
    """Divides the records on both sides of the split among `clients` clients, all of them together.

    A client's held-out records so follow its own distribution, not that of all. Every record has one client, and the seed
    decides which.

    Args:
        kind: ``"iid"``: equal sizes at random. ``"dirichlet"``: each label's records in shares drawn from Dirichlet(α)
            (Yurochkin et al., 2019; Hsu et al., 2019). ``"shards"``: sorted by label, cut into even blocks, each client
            takes `shards_per_client` of them (McMahan et al., 2017). ``"quantity"``: at random, with sizes drawn from
            Dirichlet(α).
        clients: Number of clients, named ``"client-000"`` and on.
        seed: Of the draws.
        labels: What "dirichlet" and "shards" go by.
        alpha: Concentration α: near 0 a client holds almost one label or the sizes differ most, large values are even.
        shards_per_client: Blocks a client takes.
        min_rows: Records each client holds at least. In "dirichlet" the shares are drawn again until they do.
    """

    kind: Literal["iid", "dirichlet", "shards", "quantity"]
    clients: int
    seed: int
    labels: Labels | None = None
    alpha: float = 0.5
    shards_per_client: int = 2
    min_rows: int = 1
    whole: bool = False

    def key(self, record: Record) -> Label | None:
        """Return what the record's label is found by, where labels matter."""
        return self.labels.key(record) if self.labels else None

    def assign(self, keys: Sequence[Any]) -> Mapping[str, Sequence[int]]:
        """Return each client's records, by their index in `keys` and in that order.

        Raises:
            DataError: There are too few records for what is asked.

        Example:
            >>> Partition("shards", 2, seed=0, labels=Labels("topic"), shards_per_client=1).assign(["b", "a", "b", "a"])
            {'client-000': [1, 3], 'client-001': [0, 2]}
        """
        each = max(self.min_rows, self.shards_per_client if self.kind == "shards" else 1)
        if len(keys) < self.clients * each:
            raise DataError(
                f"partition.clients = {self.clients} with {each} rows each or more need {self.clients * each} rows on either "
                f"side of the split, but there are {len(keys)}; lower partition.clients or partition.min_rows"
            )
        width = max(3, len(str(self.clients - 1)))
        owned = _KINDS[self.kind](self, keys)
        return {f"client-{number:0{width}}": sorted(own) for number, own in enumerate(owned)}

    def codes(self, keys: Sequence[Label]) -> list[int]:
        """Return each record's label as a number from 0."""
        assert self.labels is not None, "validated by the configuration"
        return self.labels.codes(keys)[0]

    def draw_seed(self) -> int:
        """Return a seed of this purpose alone: other draws of the same run's seed are independent of it."""
        return random.Random(f"partition:{self.seed}").getrandbits(63)

    def shuffled(self, count: int) -> list[int]:
        """Return the numbers below `count` in an order by the seed."""
        return [int(index) for index in np.random.default_rng(self.draw_seed()).permutation(count)]


@dataclass(frozen=True)
class SharedPool:
    """Gives every record on either side of the split to one owner, from whom the clients of a sampled population draw."""

    whole: bool = False

    def key(self, _: Record) -> None:
        """Return nothing: there is one owner."""

    def assign(self, keys: Sequence[None]) -> Mapping[str, Sequence[int]]:
        """Return all records as those of one.

        Example:
            >>> SharedPool().assign([None, None])
            {'all': range(0, 2)}
        """
        return {"all": range(len(keys))}


def _iid(partition: Partition, keys: Sequence[Any]) -> list[list[int]]:
    return _cut(partition, keys, partition.clients)


def _dirichlet(partition: Partition, keys: Sequence[Any]) -> list[list[int]]:
    # flwr-datasets rounds every client's share of a label down and gives what is left over to the last client, which with
    # a few rows per label holds most of the data.
    codes = partition.codes(keys)
    held: list[list[int]] = [[] for _ in range(max(codes) + 1)]
    for index in partition.shuffled(len(keys)):
        held[codes[index]].append(index)
    generator = np.random.default_rng(partition.draw_seed() + 2)
    for _ in range(DRAWS):
        owned = _shared_out(held, partition.clients, float(partition.alpha), generator)
        if min(map(len, owned)) >= partition.min_rows:
            return owned
    even = _shared_out(held, partition.clients, 1e6, generator)
    helps = "raise partition.alpha, or " if min(map(len, even)) >= partition.min_rows else ""
    raise DataError(
        f"partition: none of {DRAWS} draws with alpha = {partition.alpha} gave each of {partition.clients} clients "
        f"{partition.min_rows} rows; {helps}lower partition.clients or partition.min_rows"
    )


def _shared_out(
    held: Sequence[Sequence[int]], clients: int, alpha: float, generator: np.random.Generator
) -> list[list[int]]:
    """Divide each label's records in shares drawn from Dirichlet(α); who holds more than the mean takes no more of them."""
    owned: list[list[int]] = [[] for _ in range(clients)]
    mean = sum(map(len, held)) / clients
    for records in held:
        opened = np.array([len(own) <= mean for own in owned])
        shares = generator.dirichlet([alpha] * clients) * opened
        if not shares.sum() > 0.0:  # a small alpha leaves nothing at all to those who are not full
            shares = opened.astype(float)
        # A common offset rounds each share up or down so that its mean is kept, and a new order whose neighbours do.
        order = generator.permutation(clients)
        ends = np.floor(np.cumsum(shares[order] / shares.sum()) * len(records) + generator.random()).astype(int)
        ends[-1] = len(records)
        for client, (start, end) in zip(order, itertools.pairwise([0, *ends]), strict=True):
            owned[client] += records[start:end]
    return owned


def _shards(partition: Partition, keys: Sequence[Any]) -> list[list[int]]:
    # flwr-datasets leaves out what does not fill a block, always of the last labels.
    codes = partition.codes(keys)
    order = sorted(partition.shuffled(len(keys)), key=codes.__getitem__)
    count = partition.clients * partition.shards_per_client
    blocks = [order[len(order) * index // count : len(order) * (index + 1) // count] for index in range(count)]
    random.Random(f"shards:{partition.seed}").shuffle(blocks)
    dealt = [blocks[client :: partition.clients] for client in range(partition.clients)]
    return [[index for block in own for index in block] for own in dealt]


def _quantity(partition: Partition, keys: Sequence[Any]) -> list[list[int]]:
    generator = np.random.default_rng(partition.draw_seed() + 1)
    shares = generator.dirichlet([float(partition.alpha)] * partition.clients)
    spare = len(keys) - partition.clients * partition.min_rows
    ends = [int(end * spare) + number * partition.min_rows for number, end in enumerate(np.cumsum(shares)[:-1], 1)]
    return _cut(partition, keys, ends)


def _cut(partition: Partition, keys: Sequence[Any], where: int | list[int]) -> list[list[int]]:
    """Cut the shuffled records into so many even parts, of which the first are longer by one, or at these places."""
    return [part.tolist() for part in np.array_split(partition.shuffled(len(keys)), where)]


_KINDS: dict[str, Callable[[Partition, Sequence[Any]], list[list[int]]]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "shards": _shards,
    "quantity": _quantity,
}
