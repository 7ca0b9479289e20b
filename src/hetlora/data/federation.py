"""A federated data set: which client holds which rows, and on which side of the split."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar

from hetlora.core.population import LazyClientMap, NumberedNames, names_of
from hetlora.data.client_rows import ClientRows, SampledRows, Side
from hetlora.data.fields import Fields
from hetlora.data.templates import Record, Row, RowTemplate
from hetlora.errors import DataError, printable

__all__ = [
    "ClientField",
    "Federation",
    "Labeller",
    "Partitioner",
    "Source",
    "Split",
    "federate",
]

Key = TypeVar("Key")


@dataclass(frozen=True)
class Split:
    """How rows are divided into training and held-out ones.

    Attributes:
        field: The field that says so, or None to hold rows out by a stable hash of their text.
        train: Values of the field that train.
        test: Values of the field that are held out. Rows with neither are left out.
        share: Without a field, the share that is held out.
    """

    field: str | None = "split"
    train: tuple[str, ...] = ("train",)
    test: tuple[str, ...] = ("test",)
    share: float = 0.1

    def side(self, fields: Fields, row: Row, where: str) -> Side | None:
        """Return "train", "test" or None for one row; of a conversation, its last row speaks for all."""
        if self.field is None:
            return "test" if _place(row) < self.share * 2**64 else "train"
        if self.field not in fields:
            have = ", ".join(map(printable, sorted(fields)))
            raise DataError(
                f"{where}: field {self.field!r} is missing; the row has {have}. Mend the row, set data.split_field, "
                'or set it to "" to hold rows out by a hash of their text'
            )
        value = str(fields[self.field])
        return "train" if value in self.train else "test" if value in self.test else None


def _place(row: Row, purpose: str = "") -> int:
    """Return where in 0 ... 2^64 - 1 a row falls, by a stable hash of its text; purposes draw independently."""
    return int.from_bytes(hashlib.sha256(f"{purpose}{row.prompt}\x00{row.target}".encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Federation:
    """Clients with their rows, in a fixed order.

    Attributes:
        name: Where the rows come from.
        clients: Client name to its rows.
        left_out_rows: How many rows are on neither side of the split, by the value that says so.
        left_out: Clients that `select` left out, and why.
        labels: Client to how many of its records on either side of the split have which label; empty without labels.
        fields: The names of the fields that the records have, as far as they were read.
        hashed: Whether rows are held out by a hash of their text, not by a field.
        sampled: Where each client draws its rows when it is asked for; None where the rows are divided among them.
    """

    name: str
    clients: Mapping[str, ClientRows]
    left_out_rows: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    fields: tuple[str, ...] = ()
    hashed: bool = False
    sampled: SampledRows | None = None

    @property
    def names(self) -> Sequence[str]:
        """Return the names of the clients, in their order."""
        return names_of(self.clients)

    def holdings(self) -> Collection[ClientRows]:
        """Return all rows, each once: those of every client, or the pool that clients draw from."""
        return [self.sampled.pool] if self.sampled is not None else self.clients.values()

    def counts(self, side: Side) -> Mapping[str, int]:
        """Return each client's number of rows on one side of the split."""
        if self.sampled is not None:
            each = self.sampled.count(side)
            return LazyClientMap(self.names, lambda _: each)
        return {name: len(getattr(rows, side)) for name, rows in self.clients.items()}

    def total(self, side: Side) -> int:
        """Return the number of rows with a target that all clients have on one side of the split; others are dropped."""
        if self.sampled is not None:
            return len(self.clients) * self.sampled.count(side)
        return sum(not row.blank for own in self.clients.values() for row in getattr(own, side))

    def first_blank(self) -> str:
        """Return the place of a row without a target, the first in the order of the clients; empty where there is none."""
        rows = (row for own in self.holdings() for row in (*own.train, *own.test))
        return next((row.where for row in rows if row.blank), "")

    def sample(self, clients: int, rows: int, test_rows: int | None, seed: int) -> Federation:
        """Return a population of any size whose clients draw their rows from all of these, see `SampledRows`.

        Args:
            clients: How many, named ``"client-000"`` and on.
            rows: Training rows that each draws; held-out ones in proportion, at least one.
            test_rows: Held-out rows that each draws at most.
            seed: Of the run.

        Raises:
            DataError: There are fewer rows than a client is to draw.
        """
        everyone = self.clients.values()
        pool = ClientRows(
            tuple(row for own in everyone for row in own.train), tuple(row for own in everyone for row in own.test)
        )
        sampled = SampledRows(pool, NumberedNames(clients), rows, test_rows, seed)
        return replace(self, clients=LazyClientMap(sampled.names, sampled.at), sampled=sampled)

    def select(self, count: int | None, min_rows: int, seed: int, *, measured: bool = True) -> Federation:
        """Keep the clients with at least `min_rows` training rows and, if `measured`, a held-out one; draw `count` by `seed`.

        Raises:
            DataError: Fewer clients are left than asked for.
        """
        for side in ("train", "test") if measured else ("train",):
            if not any(getattr(rows, side) for rows in self.clients.values()):
                others = ", ".join(map(printable, sorted(self.left_out_rows)[:5]))
                seen = f" (other values of the field: {others})" if others else ""
                way_out = f'set data.{side}, or set data.split_field = "" to hold rows out by a hash of their text'
                if self.hashed:
                    way_out = f"{'lower' if side == 'train' else 'raise'} data.test_share, or give more rows"
                raise DataError(f"{self.name}: no row is on the side data.{side} of the split{seen}; {way_out}")
        reasons = {
            name: reason for name, rows in self.clients.items() if (reason := _lacks(rows, min_rows, measured=measured))
        }
        enough = [name for name in self.clients if name not in reasons]
        if not enough or (count is not None and count > len(enough)):
            wanted = f"{count} clients" if count else "a client"
            raise DataError(
                f"{self.name}: {wanted} asked for, but {len(enough)} of {len(self.clients)} have {min_rows} training rows or "
                f"more and a held-out one; lower {'data.clients or ' if count else ''}data.min_rows, or hold out more"
            )
        if count is not None:
            chosen = set(random.Random(f"clients:{seed}").sample(enough, count))
            reasons |= {name: "not drawn (data.clients)" for name in enough if name not in chosen}
        kept = {name: rows for name, rows in self.clients.items() if name not in reasons}
        return replace(self, clients=kept, left_out=reasons)

    def hold_out_validation(self, share: float) -> Federation:
        """Hold out `share` of every client's training records, by a stable hash of their text, in place of its test rows.

        What is tuned on these rows has never seen a test row. Every client keeps a training record; one with few may have
        none held out.

        Args:
            share: Of the training records, in (0, 1).

        Raises:
            DataError: No client has a row to hold out.
        """
        clients = {name: _hold_out(rows.train, share) for name, rows in self.clients.items()}
        if not any(rows.test for rows in clients.values()):
            raise DataError(
                f"{self.name}: a validation share of {share} holds out none of the "
                f"{sum(len(rows.train) for rows in self.clients.values())} training rows; raise data.validation_share"
            )
        return replace(self, clients=clients)


def _lacks(rows: ClientRows, min_rows: int, *, measured: bool) -> str:
    if len(rows.train) < min_rows:
        return f"fewer training rows than data.min_rows = {min_rows}"
    return "no held-out row" if measured and not rows.test else ""


def _hold_out(rows: tuple[Row, ...], share: float) -> ClientRows:
    # A record's rows stay together, as in the split: a conversation's later prompts hold its earlier answers.
    records = [tuple(own) for _, own in itertools.groupby(rows, key=lambda row: row.where or id(row))]
    places = [_place(own[-1], "validation") for own in records]
    bound = min(share * 2**64, max(places, default=0))  # the last record, and any equal to it, trains
    divided = list(zip(records, places, strict=True))
    train = tuple(row for own, place in divided if place >= bound for row in own)
    return ClientRows(train, tuple(row for own, place in divided if place < bound for row in own))


class Source(NamedTuple):
    """Where records come from.

    Attributes:
        name: Of the data set, for messages.
        records: The place of each record, for messages, and its fields.
        none_is_empty: Whether a template takes a field that is None as empty text. A data set of columns gives None for a
            field that a record does not have; in a JSON Lines file the field would not be there, and null is a mistake.
    """

    name: str
    records: Iterable[tuple[str, Fields]]
    none_is_empty: bool = False


class Partitioner(Protocol[Key]):
    """Says whose each record is: `ClientField`, or a `hetlora.data.partition.Partition`."""

    @property
    def whole(self) -> bool:
        """Whether records on neither side of the split belong to a client, too."""
        ...

    def key(self, record: Record) -> Key:
        """Return what the owner is found by."""
        ...

    def assign(self, keys: Sequence[Key]) -> Mapping[str, Sequence[int]]:
        """Return each client's records, by their index in `keys`; every record has one client."""
        ...


@dataclass(frozen=True)
class ClientField:
    """Every record belongs to the client that a field of it names: the natural partition."""

    field: str
    whole: bool = True

    def key(self, record: Record) -> str:
        """Return the client's name.

        Raises:
            DataError: The field is missing, or is neither text nor a whole number.
        """
        value = record.fields.get(self.field)
        if isinstance(value, str) and not value.strip():
            raise DataError(
                f"{record.where}: field {self.field!r}, the client, is empty, and rows of unknown owners are not those of one; "
                "mend the row or leave it out"
            )
        if not isinstance(value, (str, int)):
            state = "is neither text nor a whole number" if self.field in record.fields else "is missing"
            state = "is null" if value is None and self.field in record.fields else state
            have = ", ".join(map(printable, sorted(record.fields)))
            raise DataError(
                f"{record.where}: field {self.field!r}, the client, {state}; the row has {have}. Set data.client_field, or "
                "partition.kind if the data name no clients"
            )
        return str(value)

    def assign(self, keys: Sequence[str]) -> Mapping[str, Sequence[int]]:
        """Return each client's records, clients in the order of their first."""
        clients: dict[str, list[int]] = {}
        for index, name in enumerate(keys):
            clients.setdefault(name, []).append(index)
        return clients


class Labeller(Protocol):
    """Names a label for every record: `hetlora.data.partition.Labels`."""

    def key(self, record: Record) -> Any:
        """Return what the label is found by."""
        ...

    def names(self, keys: Sequence[Any]) -> Sequence[str]:
        """Return the label of each record."""
        ...


class _Entry(NamedTuple):
    rows: tuple[Row, ...]
    side: Side | None
    key: Any
    label: Any


def federate(
    source: Source, *, owner: Partitioner[Any], template: RowTemplate, split: Split, labels: Labeller | None = None
) -> Federation:
    """Read every record, divide them among clients, and each client's between training and held out.

    Args:
        source: The records.
        owner: Whose each one is.
        template: How a record's fields become rows.
        split: Which records are held out.
        labels: What to count each client's records by.

    Raises:
        DataError: A record cannot be used, or there is none; names its place.
    """
    entries: list[_Entry] = []
    left_out: Counter[str] = Counter()
    names: dict[str, None] = {}
    for where, fields in source.records:
        names |= dict.fromkeys(fields)
        record = _record(source, where, fields, template)
        key = owner.key(record)
        _check_encodable(record, key)
        side = split.side(fields, record.rows[-1], where)
        if side is None:
            left_out[str(fields.get(split.field or ""))] += len(record.rows)
        if side is not None or owner.whole:
            entries.append(_Entry(record.rows, side, key, labels.key(record) if labels else None))
    if not entries and not left_out:
        raise DataError(
            f"{source.name} holds no rows; give a file with one JSON object a line, or a data set with rows"
        )
    clients = owner.assign([entry.key for entry in entries]) if entries else {}
    if split.field is None:
        for own in clients.values():
            _put_on_both_sides(entries, own)
    return Federation(
        source.name,
        {name: ClientRows(_side(entries, own, "train"), _side(entries, own, "test")) for name, own in clients.items()},
        left_out_rows=left_out,
        labels=_counts(entries, clients, labels) if labels else {},
        fields=tuple(names),
        hashed=split.field is None,
    )


def _put_on_both_sides(entries: list[_Entry], own: Sequence[int]) -> None:
    """Give a client whose records all fell on one side the one nearest to the other side, with those of equal text.

    A hash of the text leaves a small client without a held-out row by chance, and a client without one cannot be measured.
    """
    places = {index: _place(entries[index].rows[-1]) for index in own}
    sides = {entries[index].side for index in own}
    if len(sides) != 1 or len(set(places.values())) < 2:
        return
    side: Side = "test" if sides == {"train"} else "train"
    nearest = (min if side == "test" else max)(places.values())
    for index in own:
        if places[index] == nearest:
            entries[index] = entries[index]._replace(side=side)


def _record(source: Source, where: str, fields: Fields, template: RowTemplate) -> Record:
    filled: Fields = fields
    if source.none_is_empty:
        filled = {name: _without_nulls(value) for name, value in fields.items()}
    return Record(where, fields, template.rows(filled, where))


def _without_nulls(value: object) -> object:
    """Return a value of a columnar file without nulls: it gives one to every field, and to every key of a list's objects."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_null_keys(inner) for inner in value]
    return "" if value is None else value


def _without_null_keys(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _without_null_keys(inner) for name, inner in value.items() if inner is not None}
    return [_without_null_keys(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _side(entries: Sequence[_Entry], own: Iterable[int], side: Side) -> tuple[Row, ...]:
    return tuple(row for index in own if entries[index].side == side for row in entries[index].rows)


def _counts(
    entries: Sequence[_Entry], clients: Mapping[str, Sequence[int]], labels: Labeller
) -> dict[str, dict[str, int]]:
    names = labels.names([entry.label for entry in entries])
    sided = [entry.side is not None for entry in entries]
    return {client: dict(Counter(names[index] for index in own if sided[index])) for client, own in clients.items()}


def _check_encodable(record: Record, client: object) -> None:
    """Refuse half of a surrogate pair, which JSON can spell and no tokenizer can read."""
    texts = [
        text for row in record.rows for text in (row.prompt, row.target, *(turn.content for turn in row.turns or ()))
    ]
    try:
        "".join([str(client), *texts]).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{record.where}: holds a lone surrogate, which is no text ({error.reason}); mend the row"
        ) from error
