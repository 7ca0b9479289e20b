"""An independent second implementation of the update format of `hetlora.flower.wire.codec`.

It tells whether a message is one that an honest client could have sent in answer to a task, and it can make a message that is
right except for one given change. JSON is the standard library's, numbers are NumPy's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hetlora.core.types import TrainTask

__all__ = ["Draft", "acceptable", "tensors_of"]

MOST_HEADER = 2**20
FIELDS = {"client", "round", "rank", "examples", "steps", "loss", "precision", "factors", "stacks"}
STORED = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "int8": ("I8", 1)}


@dataclass
class Draft:
    """A parsed message whose parts can be replaced.

    Attributes:
        value: The fields.
        metadata: Other header entries.
        table: The table of tensors.
        body: The numbers.
    """

    value: dict[str, Any]
    metadata: dict[str, Any]
    table: dict[str, Any]
    body: bytes

    @classmethod
    def of(cls, data: bytes) -> Draft:
        """Parse an honest message."""
        length = int.from_bytes(data[:8], "little")
        table = json.loads(data[8 : 8 + length])
        metadata = table.pop("__metadata__")
        return cls(json.loads(metadata.pop("value")), metadata, table, data[8 + length :])

    def told_anew(self, body: bytes | None = None) -> Draft:
        """Let table and length of the numbers follow from the fields, whatever these are.

        Args:
            body: The numbers, repeated or cut as it must be; None for those that are there. More than a megabyte is not made.
        """
        self.table, size = tensors_of(self.value)
        source = (self.body if body is None else body) or b"\0"
        self.body = (source * (1 + size // len(source)))[:size] if size <= 2**20 else source
        return self

    def packed(self) -> bytes:
        """Return it as bytes."""
        return signed(
            json.dumps({"__metadata__": {**self.metadata, "value": json.dumps(self.value)}, **self.table}), self.body
        )


def signed(header: str | bytes, body: bytes) -> bytes:
    """Put a length before a header, padded, and the numbers behind it."""
    text = header.encode("utf8", "surrogatepass") if isinstance(header, str) else header
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + body


def tensors_of(value: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Return the table of the tensors that follow from an update's fields, and how many bytes they take."""
    rank, found = value["rank"], []
    for index, stack in enumerate(value["stacks"]):
        many = len(stack["modules"])
        slots = rank[stack["modules"][0]] if isinstance(rank, dict) else rank
        for letter, shape in (("A", [many, slots, stack["in"]]), ("B", [many, stack["out"], slots])):
            if letter in value["factors"]:
                found.append((f"{index}.{letter}", shape, [many, slots]))
    dtype, width = STORED[value["precision"]]
    tensors = [(f"{name}.scale", "F32", 4, scales) for name, _, scales in found] if dtype == "I8" else []
    tensors += [(name, dtype, width, shape) for name, shape, _ in found]
    table, end = {}, 0
    for name, kind, size, shape in tensors:
        begin, end = end, end + size * math.prod(shape)
        table[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    return table, end


def acceptable(data: bytes, task: TrainTask, precision: str) -> bool:
    """Say whether bytes are an update that answers a task in a precision."""
    try:
        _read(data, task, precision)
    except (_NotAcceptableError, ValueError, RecursionError, OverflowError):  # JSON's errors are ValueErrors
        return False
    return True


class _NotAcceptableError(Exception):
    """The message is not acceptable."""


def _must(holds: bool) -> None:
    if not holds:
        raise _NotAcceptableError


def _whole(number: object) -> bool:
    return type(number) is int


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _must(len({name for name, _ in pairs}) == len(pairs))
    return dict(pairs)


def _constant(_: str) -> None:
    raise _NotAcceptableError


def _object(text: str) -> dict[str, Any]:
    read = json.loads(text, object_pairs_hook=_once, parse_constant=_constant)
    _must(type(read) is dict)
    return read


def _read(data: bytes, task: TrainTask, precision: str) -> None:
    _must(len(data) >= 8)
    length = int.from_bytes(data[:8], "little")
    _must(length <= MOST_HEADER and (8 + length) % 64 == 0 and 8 + length <= len(data))
    _must(data[8:9] == b"{")
    table = _object(data[8 : 8 + length].decode("utf-8"))
    metadata = table.pop("__metadata__", None)
    _must(type(metadata) is dict and metadata.keys() == {"format", "version", "kind", "value"})
    _must([metadata[key] for key in ("format", "version", "kind")] == ["hetlora", "2", "update"])
    _must(type(metadata["value"]) is str)
    value = _object(metadata["value"])
    _must(value.keys() == FIELDS)
    _fields(value, task, precision)
    expected, size = tensors_of(value)
    _must(json.dumps(table, sort_keys=True) == json.dumps(expected, sort_keys=True))  # 1.0 is not 1, nor is true
    _must(8 + length + size == len(data))
    _numbers(value, data[8 + length :], task)


def _fields(value: Mapping[str, Any], task: TrainTask, precision: str) -> None:
    _must(value["client"] == task.client)
    _must(_whole(value["round"]) and value["round"] == task.round)
    _must(_whole(value["examples"]) and 1 <= value["examples"] <= 10**12)
    _must(_whole(value["steps"]) and 0 <= value["steps"] < 2**63)
    _must(type(value["loss"]) in (int, float) and math.isfinite(value["loss"]))
    _must(value["precision"] == precision and value["factors"] == task.sends)
    rank, stacks = value["rank"], value["stacks"]
    _must(_whole(rank) or (type(rank) is dict and rank.keys() == task.adapter.keys()))
    _must(type(stacks) is list)
    named: list[str] = []
    for stack in stacks:
        _must(type(stack) is dict and stack.keys() == {"modules", "out", "in"})
        _must(type(stack["modules"]) is list and bool(stack["modules"]))
        slots = set()
        for name in stack["modules"]:
            _must(type(name) is str and name in task.adapter)
            own = rank[name] if type(rank) is dict else rank
            most = task.rank[name] if isinstance(task.rank, Mapping) else task.rank
            _must(_whole(own) and 1 <= own <= most)
            slots.add(own)
            A, B = task.adapter[name]
            _must(_whole(stack["in"]) and _whole(stack["out"]) and (stack["out"], stack["in"]) == (len(B), A.shape[1]))
        _must(len(slots) == 1)
        named += stack["modules"]
    _must(sorted(named) == sorted(task.adapter))


def _numbers(value: Mapping[str, Any], body: bytes, task: TrainTask) -> None:
    """All that follows from the numbers must be finite: a value that was sent, or what a change makes of the task's."""
    table, _ = tensors_of(value)
    for index, stack in enumerate(value["stacks"]):
        for letter in value["factors"]:
            about = table[f"{index}.{letter}"]
            begin, end = about["data_offsets"]
            raw, shape = body[begin:end], about["shape"]
            if value["precision"] == "float32":
                numbers = np.frombuffer(raw, "<f4").reshape(shape)
            elif value["precision"] == "bfloat16":  # the upper half of a float32
                numbers = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
            else:
                first, last = table[f"{index}.{letter}.scale"]["data_offsets"]
                scale = np.frombuffer(body[first:last], "<f4").reshape(table[f"{index}.{letter}.scale"]["shape"])
                scale = scale[:, :, None] if letter == "A" else scale[:, None, :]
                with np.errstate(all="ignore"):
                    numbers = np.frombuffer(raw, "i1").reshape(shape).astype("<f4") * scale
            if value["precision"] != "float32":
                slots = shape[1] if letter == "A" else shape[2]
                for place, name in enumerate(stack["modules"]):
                    A, B = (factor.numpy() for factor in task.adapter[name])
                    with np.errstate(all="ignore"):
                        _must(bool(np.isfinite(numbers[place] + (A[:slots] if letter == "A" else B[:, :slots])).all()))
            else:
                _must(bool(np.isfinite(numbers).all()))
