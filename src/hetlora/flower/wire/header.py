"""The bytes of a message: a strictly validated JSON header and the numbers, as described in `hetlora.flower.wire.codec`.

Every length, shape and offset of a tensor must be the one that follows from the fields, so that tensors neither overlap nor are
missing. Reading a header takes memory for the header only.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from hetlora.core.adapter import Factors, Rank, Stack
from hetlora.core.codecs import CODECS, STORED
from hetlora.core.types import ClientUpdate, TrainTask
from hetlora.errors import WireError, printable
from hetlora.flower.wire.numbers import Compressed, places, slot_shape

__all__ = ["MOST_HEADER", "VERSION", "Header", "encode", "longest", "read_header", "read_numbers", "refusal"]

VERSION = "2"
MOST_HEADER = 2**20
"""Maximal size of a header in bytes; 200 modules take about 20,000."""
MOST_MESSAGE = 500
"""Maximal length of an error's message, which may quote received text."""
ALIGNMENT = 64
"""The numbers start at a multiple of it; the header is padded with spaces, as in safetensors."""

Kind = Literal["task", "update"]
FACTORS = ("", "A", "B", "AB")
RECORDS: Mapping[str, type] = {"task": TrainTask, "update": ClientUpdate}
FIELDS = {kind: {field.name for field in fields(record)} - {"adapter", "folded"} for kind, record in RECORDS.items()}
ABOUT_NUMBERS = {"precision", "factors", "stacks"}


@dataclass(frozen=True)
class Header:
    """The parsed header of a message.

    Attributes:
        fields: Fields of the record without its adapter, of the right types; their values are not checked yet.
        precision: Of its numbers.
        factors: The factors in the message.
        layout: Names of the modules and shapes of both factors, including those not in the message.
        begin: Number of bytes before the numbers.
        size: Number of bytes of the numbers.
    """

    fields: Mapping[str, Any]
    precision: str
    factors: Factors
    layout: tuple[Stack, ...]
    begin: int
    size: int


# Writing ------------------------------------------------------------------------------------------------------------


def encode(record: ClientUpdate | TrainTask, part: Compressed) -> bytes:
    """Return the message of a record whose factors travel as `part`.

    Raises:
        WireError: A field is not finite, or the header would be too long.
    """
    header = _header(record, part.layout, part.precision, part.factors)
    if len(header) - 8 > MOST_HEADER:
        raise WireError(f"a header of {len(header) - 8} bytes is over the limit of {MOST_HEADER}")
    return b"".join([header, *(numbers.view(torch.uint8).numpy().data for numbers in (part.scales, part.values))])


def longest(update: ClientUpdate, precision: str, factors: Factors) -> int:
    """Return the length of an update's message with one stack per module, which has the longest header."""
    layout = tuple(((name,), (1, *A.shape), (1, *B.shape)) for name, (A, B) in update.adapter.items())
    header = _header(update, layout, precision, factors)
    return min(len(header), 8 + MOST_HEADER) + _table(layout, precision, factors)[1]


def _header(record: ClientUpdate | TrainTask, layout: tuple[Stack, ...], precision: str, factors: Factors) -> bytes:
    kind = next(kind for kind, known in RECORDS.items() if isinstance(record, known))
    value = {name: getattr(record, name) for name in sorted(FIELDS[kind])}
    value["rank"] = dict(record.rank) if isinstance(record.rank, Mapping) else record.rank
    value |= {"precision": precision, "factors": factors}
    value["stacks"] = [{"modules": names, "out": b[1], "in": a[2]} for names, a, b in layout]
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise WireError(f"the {kind} of client {record.client!r} holds a number that is not finite") from error
    metadata = {"format": "hetlora", "version": VERSION, "kind": kind, "value": text}
    encoded = json.dumps({"__metadata__": metadata, **_table(layout, precision, factors)[0]}).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)
    return len(encoded).to_bytes(8, "little") + encoded


def _table(layout: tuple[Stack, ...], precision: str, factors: Factors) -> tuple[dict[str, Any], int]:
    """Return the header's table of contiguous tensors, and their size in bytes."""
    travel = [(f"{index}.{letter}", letter, shape) for index, letter, shape in places(layout, factors)]
    tensors: list[tuple[str, str, int, tuple[int, ...]]] = []
    codec = CODECS[precision]
    if codec.scaled:  # scales come first, where they are aligned
        tensors += [(f"{name}.scale", "F32", 4, slot_shape(shape, letter)) for name, letter, shape in travel]
    tensors += [(name, STORED[codec.dtype], codec.dtype.itemsize, shape) for name, _, shape in travel]
    table, end = {}, 0
    for name, dtype, width, shape in tensors:
        begin, end = end, end + width * math.prod(shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return table, end


# Reading ------------------------------------------------------------------------------------------------------------


def read_header(data: memoryview, kind: Kind) -> Header:
    """Return the header of a message of the expected kind, even if its numbers have not arrived yet.

    Raises:
        WireError: With the problem. Other errors also mean malformed bytes; the caller must translate them.
    """
    if len(data) < 8:
        raise WireError(f"{len(data)} bytes are no message")
    length = int.from_bytes(data[:8], "little")
    if length > MOST_HEADER:
        raise WireError(f"a header of {length} bytes is over the limit of {MOST_HEADER}")
    if (8 + length) % ALIGNMENT:
        raise WireError(f"a header of {length} bytes is not padded")
    if 8 + length > len(data):
        raise WireError(f"a header of {length} bytes, and {len(data) - 8} arrived")
    text = bytes(data[8 : 8 + length])
    if not text.startswith(b"{"):
        raise WireError("a header that is no object: it does not begin with '{'")
    table = _json(text.decode("utf8"))  # json.loads would guess other encodings
    value = _value(table.pop("__metadata__", None), kind)
    about = {name: value.pop(name) for name in ABOUT_NUMBERS}
    layout = _layout(about["stacks"], value["rank"])
    expected, size = _table(layout, about["precision"], about["factors"])
    for name in sorted(expected.keys() | table.keys()):
        if not (name in table and name in expected and _equal(table[name], expected[name])):
            raise refusal(f"tensor {name}: {table.get(name)}, not {expected.get(name)}")
    return Header(value, about["precision"], about["factors"], layout, 8 + length, size)


def read_numbers(header: Header, data: memoryview) -> Compressed:
    """Return the numbers behind a header, as views of `data`.

    Raises:
        WireError: There are more or fewer bytes than the header announces.
    """
    arrived = len(data) - header.begin
    if arrived != header.size:
        raise WireError(f"{header.size} bytes of numbers are announced, {arrived} arrived")
    codec, travel = CODECS[header.precision], places(header.layout, header.factors)
    slots = sum(math.prod(slot_shape(shape, letter)) for _, letter, shape in travel)
    scales = _view(data, torch.float32, header.begin, slots if codec.scaled else 0)
    count = sum(math.prod(shape) for *_, shape in travel)
    values = _view(data, codec.dtype, header.begin + scales.nbytes, count)
    return Compressed(header.precision, header.factors, header.layout, values, scales)


def _view(data: memoryview, dtype: torch.dtype, begin: int, count: int) -> Tensor:
    if not count:
        return torch.empty(0, dtype=dtype)
    with warnings.catch_warnings():
        # The view of read-only bytes is safe, because received adapters are never changed.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(data, dtype=dtype, count=count, offset=begin)


def _value(metadata: Any, kind: Kind) -> dict[str, Any]:
    """Return the fields of a message, after validating kind, version and types."""
    if not (isinstance(metadata, dict) and metadata.get("format") == "hetlora"):
        raise WireError("no message of hetlora's")
    version, found = metadata.get("version"), metadata.get("kind")
    if version != VERSION:
        raise refusal(f"version {version!r} of the format, expected {VERSION!r}; both sides need the same hetlora")
    if found != kind or metadata.keys() != {"format", "version", "kind", "value"}:
        raise refusal(f"kind {found!r} of message, expected {kind!r}")
    value, expected = _json(metadata["value"]), FIELDS[kind] | ABOUT_NUMBERS
    if value.keys() != expected:
        raise refusal(f"fields {', '.join(sorted(value))}, expected {', '.join(sorted(expected))}")
    for name, entry in value.items():
        if not _fits(name, entry):
            raise refusal(f"{name}: {entry!r}")
    return value


def _fits(name: str, entry: Any) -> bool:
    if name == "client":
        return isinstance(entry, str)
    if name == "loss":
        return type(entry) in (int, float) and math.isfinite(entry)
    if name in ("receives", "trains", "sends", "factors"):
        return entry in FACTORS
    if name == "precision":
        return isinstance(entry, str) and entry in CODECS
    if name == "stacks":
        return isinstance(entry, list)
    if name == "rank" and isinstance(entry, dict):
        return all(type(rank) is int for rank in entry.values())
    return type(entry) is int


def _layout(stacks: list[Any], rank: Rank) -> tuple[Stack, ...]:
    """Return the validated layout of stacks whose modules have these ranks."""
    if not stacks:
        raise WireError("no modules")
    for stack in stacks:
        if not (isinstance(stack, dict) and stack.keys() == {"modules", "out", "in"}):
            raise refusal(f"stack {stack}: expected modules, out and in")
        if not (isinstance(stack["modules"], list) and stack["modules"]):
            raise WireError("modules that are no list of names")
    names = [name for stack in stacks for name in stack["modules"]]
    if not all(isinstance(name, str) for name in names):
        raise WireError("a module whose name is no text")
    if len(set(names)) != len(names):
        raise WireError("a module that is named twice")
    if isinstance(rank, dict) and rank.keys() != set(names):
        raise refusal(f"ranks of {', '.join(sorted(rank))}, and modules {', '.join(sorted(names))}")
    layout: list[Stack] = []
    for stack in stacks:
        modules, out, width = stack["modules"], stack["out"], stack["in"]
        ranks = {rank[name] for name in modules} if isinstance(rank, Mapping) else {rank}
        slots = min(ranks)
        if not (type(out) is int and type(width) is int and min(out, width, slots) >= 1 and len(ranks) == 1):
            raise refusal(f"{', '.join(modules)}: no stack of weights {out} x {width} with ranks {sorted(ranks)}")
        layout.append((tuple(modules), (len(modules), slots, width), (len(modules), out, slots)))
    return tuple(layout)


def _equal(tensor: Any, expected: dict[str, Any]) -> bool:
    """Whether a tensor of the header is the expected one; true and 1.0 equal 1 but are refused as sizes."""
    return tensor == expected and all(type(size) is int for size in [*tensor["shape"], *tensor["data_offsets"]])


def _json(text: str) -> dict[str, Any]:
    value = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse)
    if not isinstance(value, dict):
        raise WireError("a header that is no object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise WireError("a key that stands twice in the header")
    return result


def _refuse(constant: str) -> None:
    raise WireError(f"{constant} is no number")


def refusal(message: str) -> WireError:
    """Return an error with a printable message of limited length."""
    return WireError(printable(message[:MOST_MESSAGE])[:MOST_MESSAGE])
