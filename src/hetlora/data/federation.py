"""A federated data set: which client holds which rows, and on which side of the split."""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
import json
import os
import random
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from hetlora.data.text import Example, Row, Template, Tokenization
from hetlora.errors import DataError

__all__ = ["STDLIB", "ClientRows", "Federation", "Split", "TokenizedFederation", "read_jsonl"]

STDLIB = "stdlib"
"""Name of the bundled federated data set; see its README in `hetlora/data/bundled/stdlib`."""


@dataclass(frozen=True)
class ClientRows:
    """The rows of one client."""

    train: tuple[Row, ...]
    test: tuple[Row, ...]


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

    def side(self, fields: Mapping[str, object], row: Row, where: str) -> str | None:
        """Return "train", "test" or None for one row."""
        if self.field is None:
            return "test" if _place(row) < self.share * 2**64 else "train"
        if self.field not in fields:
            have = ", ".join(sorted(fields))
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
        left_out_clients: Clients that `select` left out.
    """

    name: str
    clients: Mapping[str, ClientRows]
    left_out_rows: Mapping[str, int] = field(default_factory=dict)
    left_out_clients: int = 0

    def select(self, count: int | None, min_rows: int, seed: int) -> Federation:
        """Keep the clients with at least `min_rows` training rows and a held-out one; of those, `count` drawn by `seed`.

        Raises:
            DataError: Fewer clients are left than asked for.
        """
        for side in ("train", "test"):
            if not any(getattr(rows, side) for rows in self.clients.values()):
                others = ", ".join(sorted(self.left_out_rows)[:5])
                seen = f" (other values of the field: {others})" if others else ""
                raise DataError(f"{self.name}: no row is on the side data.{side} of the split{seen}; set data.{side}")
        enough = [name for name, rows in self.clients.items() if len(rows.train) >= min_rows and rows.test]
        if not enough or (count is not None and count > len(enough)):
            wanted = f"{count} clients" if count else "a client"
            raise DataError(
                f"{self.name}: {wanted} asked for, but {len(enough)} of {len(self.clients)} have {min_rows} training rows or "
                "more and a held-out one; lower data.clients or data.min_rows"
            )
        if count is not None:
            chosen = set(random.Random(f"clients:{seed}").sample(enough, count))
            enough = [name for name in enough if name in chosen]
        chosen_rows = {name: self.clients[name] for name in enough}
        return replace(self, clients=chosen_rows, left_out_clients=len(self.clients) - len(enough))

    def hold_out_validation(self, share: float) -> Federation:
        """Hold out `share` of every client's training rows, by a stable hash of their text, in place of its test rows.

        What is tuned on these rows has never seen a test row. Every client keeps a training row; one with few rows may have
        none held out.

        Args:
            share: Of the training rows, in (0, 1).

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


def _hold_out(rows: tuple[Row, ...], share: float) -> ClientRows:
    places = [_place(row, "validation") for row in rows]
    bound = min(share * 2**64, max(places, default=0))  # the last row, and any equal to it, trains
    divided = list(zip(rows, places, strict=True))
    train = tuple(row for row, place in divided if place >= bound)
    return ClientRows(train, tuple(row for row, place in divided if place < bound))


def read_jsonl(path: str, *, client: str, template: Template, split: Split) -> Federation:
    """Read a federation from a JSON Lines file (``.gz`` allowed), or the bundled one by the name ``"stdlib"``.

    Args:
        path: The file.
        client: Name of the field that says whose row it is.
        template: How a row's fields become prompt and target.
        split: Which rows are held out.

    Raises:
        DataError: The file is missing, or a line is not JSON or lacks a field; names the line.
    """
    train: dict[str, list[Row]] = {}
    test: dict[str, list[Row]] = {}
    left_out: Counter[str] = Counter()
    for where, fields in _lines(path):
        if not isinstance(fields.get(client), (str, int)):
            state = "is neither text nor a whole number" if client in fields else "is missing"
            have = ", ".join(sorted(fields))
            raise DataError(
                f"{where}: field {client!r}, the client, {state}; the row has {have}. Set data.client_field"
            )
        name, row = str(fields[client]), template.row(fields, where)
        _encodable(name, row, where)
        side = split.side(fields, row, where)
        train.setdefault(name, []), test.setdefault(name, [])
        if side is None:
            left_out[str(fields.get(split.field or ""))] += 1
        else:
            (train if side == "train" else test)[name].append(row)
    if not train:
        raise DataError(f"{path} holds no rows; give a file with one JSON object a line")
    clients = {name: ClientRows(tuple(train[name]), tuple(test[name])) for name in train}
    return Federation(path, clients, left_out_rows=left_out)


def _encodable(name: str, row: Row, where: str) -> None:
    """Refuse half of a surrogate pair, which JSON can spell and no tokenizer can read."""
    try:
        "".join((name, row.prompt, row.target)).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: holds a lone surrogate, which is no text ({error.reason}); mend the row") from error


def _lines(path: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    file = _bundled() if path == STDLIB else Path(os.path.expanduser(path))  # noqa: PTH111  never raises
    if not file.is_file():
        raise DataError(
            f"the data file {path!r} does not exist; give a JSON Lines file, or {STDLIB!r} for the bundled one"
        )
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _object(line, where)
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        way_out = "give a JSON Lines file in UTF-8, packed by gzip if its name ends in .gz"
        raise DataError(f"{path} cannot be read as text ({error}); {way_out}") from error


def _object(line: str, where: str) -> Mapping[str, object]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise DataError(f"{where}: not JSON ({reason}); every line must be one JSON object") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: a {type(fields).__name__}, not an object; every line must be one JSON object")
    return fields


def _bundled() -> Path:
    # The package is installed as files (it holds a model, too), so the resource is a path.
    return Path(str(importlib.resources.files("hetlora"))) / "data" / "bundled" / STDLIB / "rows.jsonl.gz"


@dataclass(frozen=True)
class TokenizedFederation:
    """A federation as tokens. A client is tokenized when it is first needed."""

    federation: Federation
    tokenization: Tokenization

    @cached_property
    def _cache(self) -> dict[tuple[str, str], list[Example]]:
        return {}

    def train(self, client: str) -> Sequence[Example]:
        """Return the training examples of a client."""
        return self._side(client, "train")

    def test(self, client: str) -> Sequence[Example]:
        """Return the held-out examples of a client."""
        return self._side(client, "test")

    def test_rows(self, client: str) -> Sequence[Row]:
        """Return the held-out rows of a client as text."""
        return self.federation.clients[client].test

    def _side(self, client: str, side: str) -> list[Example]:
        key = (client, side)
        if key not in self._cache:
            rows = self.federation.clients[client]
            self._cache[key] = self.tokenization.examples(rows.train if side == "train" else rows.test)
        return self._cache[key]
