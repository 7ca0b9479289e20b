"""The bytes that travel between server and client: a versioned format without pickle, read strictly and without copies.

The layout is that of safetensors: the length of the header (8 bytes, little-endian), the header as JSON, the numbers. Modules
of equal shapes and rank travel as one tensor a factor, float32: stack 0 of M modules is `0.A [M, r, in]` and
`0.B [M, out, r]`, the next one `1.A`. All else stands in the header's `__metadata__`: the format's version, what kind of
message it is, and as JSON the fields of the record and the names of every stack's modules.

Whatever the bytes hold, reading them gives a value or a `WireError`, touches none of the numbers and takes memory for
the header only. Compare their length with `most_bytes` before taking them in. Whether an update fits its task, and whether its
numbers are finite, is for `hetlora.admission`.

Example:
    >>> from hetlora.adapter import LoraPair
    >>> sent = ClientUpdate("ana", 3, 1, {"q": LoraPair(torch.ones(1, 2), torch.zeros(3, 1))}, 40, 5, loss=1.5)
    >>> came = parse_update(pack_update(sent))
    >>> came.client, came.loss, came.adapter["q"].A
    ('ana', 1.5, tensor([[1., 1.]]))
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from hetlora.adapter import Adapter, Stack, StackedAdapter, num_bytes
from hetlora.errors import WireError
from hetlora.federated import ClientUpdate, TrainTask

__all__ = ["most_bytes", "pack_task", "pack_update", "parse_task", "parse_update"]

VERSION = "1"
MOST_HEADER = 2**20
"""Bytes of the longest header that is read; one of 200 modules takes some 20,000."""
MOST_MESSAGE = 500
"""Characters of an error's message, which may quote what arrived."""
ALIGNMENT = 64
"""The numbers begin at a multiple of it; the header is padded with spaces, as safetensors pads it."""

Bytes = bytes | bytearray | memoryview
Record = TypeVar("Record", ClientUpdate, TrainTask)
FACTORS = ("", "A", "B", "AB")


def pack_update(update: ClientUpdate) -> bytes:
    """Return an update as bytes.

    Raises:
        WireError: The factors are not float32, or the loss is not finite.
    """
    return _pack("update", update, ("client", "round", "rank", "examples", "steps", "loss"))


def parse_update(data: Bytes) -> ClientUpdate:
    """Return the update that `data` holds; its factors are views of `data`, which must not change any more.

    Raises:
        WireError: Names what is wrong.
    """
    return _parse("update", ClientUpdate, data)


def pack_task(task: TrainTask) -> bytes:
    """Return a task as bytes.

    Raises:
        WireError: The factors are not float32, or something is folded into the base, which does not travel yet.
    """
    _require(not task.folded.delta, "what is folded into the base does not travel yet")
    return _pack("task", task, ("client", "round", "rank", "receives", "trains", "sends", "since"))


def parse_task(data: Bytes) -> TrainTask:
    """Return the task that `data` holds; its factors are views of `data`, which must not change any more.

    Raises:
        WireError: Names what is wrong.
    """
    return _parse("task", TrainTask, data)


def most_bytes(task: TrainTask) -> int:
    """Return how long the answer to a task can be: what is longer need not be taken in.

    Example:
        >>> from hetlora.adapter import LoraPair
        >>> most_bytes(TrainTask("ana", 0, 1, {"q": LoraPair(torch.ones(1, 2), torch.zeros(3, 1))})) == 2**20 + 8 + 5 * 4
        True
    """
    return 8 + MOST_HEADER + num_bytes(task.adapter)


def _pack(kind: str, record: ClientUpdate | TrainTask, names: tuple[str, ...]) -> bytes:
    layout, factors = _stacked(record.adapter)
    value = {name: getattr(record, name) for name in names}
    value["rank"] = dict(record.rank) if isinstance(record.rank, Mapping) else record.rank
    value["modules"] = [modules for modules, *_ in layout]
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise WireError(f"the {kind} of client {record.client!r} holds a number that is not finite") from error
    header: dict[str, Any] = {"__metadata__": {"format": "hetlora", "version": VERSION, "kind": kind, "value": text}}
    header |= _table(layout)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)
    _require(len(encoded) <= MOST_HEADER, f"a header of {len(encoded)} bytes is over the limit of {MOST_HEADER}")
    return b"".join([len(encoded).to_bytes(8, "little"), encoded, *(factor.numpy().data for factor in factors)])


def _stacked(adapter: Adapter) -> tuple[list[Stack], list[Tensor]]:
    """Return the layout of an adapter's stacks, and their factors, contiguous: A of the first one, its B, and so on."""
    alike: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for name, pair in adapter.items():
        _require(all(f.dtype == torch.float32 and f.dim() == 2 for f in pair), f"{name}: not two matrices in float32")
        alike.setdefault((pair.A.shape, pair.B.shape), []).append(name)
    layout: list[Stack] = []
    factors: list[Tensor] = []
    for names in alike.values():
        A, B = (torch.stack([getattr(adapter[name], side).detach().cpu() for name in names]) for side in "AB")
        layout.append((tuple(names), tuple(A.shape), tuple(B.shape)))  # type: ignore[arg-type]
        factors += [A, B]
    return layout, factors


def _table(layout: list[Stack]) -> dict[str, Any]:
    """Return what the header says of the tensors: one after the other, without gaps."""
    table, end = {}, 0
    for index, (_, *shapes) in enumerate(layout):
        for letter, shape in zip("AB", shapes, strict=True):
            begin, end = end, end + 4 * math.prod(shape)
            table[f"{index}.{letter}"] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    return table


def _parse(kind: str, record: type[Record], data: Bytes) -> Record:
    try:
        return _read(kind, record, memoryview(data).cast("B"))
    except WireError:
        raise
    except Exception as error:  # whatever a stranger's bytes do to the parser, the outcome is a refusal
        raise WireError(f"malformed {kind}: {error!r}"[:MOST_MESSAGE]) from error


def _read(kind: str, record: type[Record], data: memoryview) -> Record:
    _require(len(data) >= 8, f"{len(data)} bytes are no message")
    length = int.from_bytes(data[:8], "little")
    _require(length <= MOST_HEADER, f"a header of {length} bytes is over the limit of {MOST_HEADER}")
    _require((8 + length) % ALIGNMENT == 0, f"a header of {length} bytes is not padded")
    _require(8 + length <= len(data), f"a header of {length} bytes, and {len(data) - 8} arrived")
    header = _json(bytes(data[8 : 8 + length]))
    metadata = header.pop("__metadata__", None)
    _require(isinstance(metadata, dict) and metadata.get("format") == "hetlora", "no message of hetlora's")
    version, found = metadata.get("version"), metadata.get("kind")
    _require(version == VERSION, f"version {version!r} of the format, expected {VERSION!r}")
    _require(
        found == kind and metadata.keys() == {"format", "version", "kind", "value"},
        f"kind {found!r} of message, expected {kind!r}",
    )
    value = _json(metadata["value"])
    layout = _layout(value.pop("modules", None), header)
    size = 4 * sum(math.prod(shape) for _, *shapes in layout for shape in shapes)
    _require(8 + length + size == len(data), f"{size} bytes of numbers are announced, {len(data) - 8 - length} arrived")
    _check(value, record)
    adapter = StackedAdapter(_numbers(data, 8 + length), layout)
    return record(**value, adapter=adapter)


def _layout(modules: Any, table: dict[str, Any]) -> list[Stack]:
    """Return the layout, if the table is the one that follows from its shapes."""
    _require(isinstance(modules, list) and bool(modules), "no modules")
    _require(all(isinstance(stack, list) and stack for stack in modules), "modules that are no list of names")
    names = [name for stack in modules for name in stack]
    _require(all(isinstance(name, str) for name in names), "a module whose name is no text")
    _require(len(set(names)) == len(names), "a module that is named twice")
    layout: list[Stack] = []
    for index, stack in enumerate(modules):
        a, b = (table.get(f"{index}.{letter}", {}).get("shape") for letter in "AB")
        three = all(isinstance(s, list) and len(s) == 3 and all(type(n) is int and n > 0 for n in s) for s in (a, b))
        fit = three and a[0] == b[0] == len(stack) and a[1] == b[2]
        _require(fit, f"{', '.join(stack)}: shapes {a} of A and {b} of B are no factors of {len(stack)} modules")
        layout.append((tuple(stack), tuple(a), tuple(b)))
    expected = _table(layout)
    for name in sorted(expected.keys() | table.keys()):
        _require(table.get(name) == expected.get(name), f"tensor {name}: {table.get(name)}, not {expected.get(name)}")
    return layout


def _check(value: dict[str, Any], record: type) -> None:
    """Refuse fields that are missing, too many or of another type than the record's."""
    expected = {field.name for field in fields(record)} - {"adapter", "folded"}
    _require(value.keys() == expected, f"fields {', '.join(sorted(value))}, expected {', '.join(sorted(expected))}")
    for name, entry in value.items():
        if name == "client":
            fits = isinstance(entry, str)
        elif name == "loss":
            fits = type(entry) in (int, float) and math.isfinite(entry)
        elif name in ("receives", "trains", "sends"):
            fits = entry in FACTORS
        elif name == "rank" and isinstance(entry, dict):
            fits = all(type(rank) is int for rank in entry.values())
        else:
            fits = type(entry) is int
        _require(fits, f"{name}: {entry!r}")


def _numbers(data: memoryview, begin: int) -> Tensor:
    """Return the numbers from a byte on, as a view."""
    with warnings.catch_warnings():
        # A view of bytes that nobody may write to: nobody does, since adapters that arrive are never changed.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(data, dtype=torch.float32, offset=begin)


def _json(text: bytes | str) -> dict[str, Any]:
    value = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse)
    _require(isinstance(value, dict), "a header that is no object")
    return value  # type: ignore[no-any-return]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    _require(len(result) == len(pairs), "a key that stands twice in the header")
    return result


def _refuse(constant: str) -> None:
    raise WireError(f"{constant} is no number")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise WireError(otherwise[:MOST_MESSAGE])
