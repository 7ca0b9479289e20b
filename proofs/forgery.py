"""Forged updates: handwritten classes, invalid by construction, and random mutations."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetlora.core.adapter import LoraPair, map_tensors, rank_of
from hetlora.core.types import ClientUpdate, TrainTask
from proofs.wire_oracle import Draft, signed

__all__ = ["BYTES", "MUTATIONS", "OBJECTS", "Honest"]

NAN, INF = float("nan"), float("inf")
HUGE = (2**31, 2**40, 2**62, 2**63, 2**64, 10**30, 10**400)


@dataclass(frozen=True)
class Honest:
    """The answer of an honest client.

    Attributes:
        task: The task, as the server has it.
        update: As a value.
        data: As bytes.
        others: Names of the other clients of the round.
    """

    task: TrainTask
    update: ClientUpdate
    data: bytes
    others: tuple[str, ...]

    def draft(self) -> Draft:
        """Return the parsed message."""
        return Draft.of(self.data)


Bytes = Callable[[random.Random, Honest], bytes]
Answers = Callable[[random.Random, Honest], Any]
BYTES: dict[str, Bytes] = {}
"""Messages that are invalid whatever is drawn."""
OBJECTS: dict[str, Answers] = {}
"""Values in place of a `ClientUpdate` that are invalid whatever is drawn."""
MUTATIONS: dict[str, Bytes] = {}
"""Messages that may be valid by chance; the oracle says which."""


def _bytes(name: str) -> Callable[[Bytes], Bytes]:
    return lambda forge: BYTES.setdefault(name, forge)


def _mutation(name: str) -> Callable[[Bytes], Bytes]:
    return lambda forge: MUTATIONS.setdefault(name, forge)


def _object(name: str) -> Callable[[Answers], Answers]:
    return lambda forge: OBJECTS.setdefault(name, forge)


def _header(data: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def _odd(rng: random.Random) -> Any:
    """Return a JSON value of any type and size."""
    return rng.choice(
        [
            *(
                None,
                True,
                False,
                0,
                1,
                -1,
                2,
                3,
                255,
                1.0,
                0.5,
                -0.0,
                1e308,
                "",
                "0",
                "1",
                "A",
                "AB",
                "int8",
                "float32",
            ),
            *([], {}, [1], [[]], {"": 0}, [None] * 3, "\0", "\ud800", "é" * 9, "ana", "mallory", "x" * 300),
            *HUGE[:-1],
            rng.getrandbits(80),
            rng.uniform(-1e9, 1e9),
        ]
    )


# Bytes that are none ------------------------------------------------------------------------------------------------


@_bytes("garbage")
def _(rng: random.Random, _: Honest) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 7, 8, 64, 72, 500, 2000)))


@_bytes("a header's length that lies")
def _(rng: random.Random, honest: Honest) -> bytes:
    length = int.from_bytes(honest.data[:8], "little")
    lie = rng.choice([0, 1, 8, 56, length - 64, length + 64, len(honest.data), 2**20, 2**20 + 56, *HUGE[:4], 2**64 - 8])
    return min(lie, 2**64 - 1).to_bytes(8, "little") + honest.data[8:] if lie != length else b""


@_bytes("truncated")
def _(rng: random.Random, honest: Honest) -> bytes:
    return honest.data[: rng.randrange(len(honest.data))]


@_bytes("extended")
def _(rng: random.Random, honest: Honest) -> bytes:
    return honest.data + rng.randbytes(rng.choice((1, 2, 4, 64, 4096)))


@_bytes("a header that is not padded")
def _(rng: random.Random, honest: Honest) -> bytes:
    header, body = _header(honest.data)
    header += b" " * rng.randrange(1, 64)
    return len(header).to_bytes(8, "little") + header + body


@_bytes("a header over the limit")
def _(rng: random.Random, honest: Honest) -> bytes:
    # A real one of a megabyte now and then, since it takes as long as a thousand others.
    header, body = _header(honest.data)
    if rng.random() < 0.02:
        header += b" " * (2**20 - len(header) + 56)
        return len(header).to_bytes(8, "little") + header + body
    return (2**20 + 56 + 64 * rng.randrange(2**20)).to_bytes(8, "little") + honest.data[8:]


@_bytes("a header in another encoding")
def _(rng: random.Random, honest: Honest) -> bytes:
    header, body = _header(honest.data)
    text = header.decode().rstrip()
    way = rng.choice(["utf-16", "utf-32", "utf-8-sig", "bytes", "space", "overlong"])
    if way == "bytes":
        return signed(text[:-1].encode() + rng.choice((b"\xff", b"\x80", b"\xed\xa0\x80")) + b"}", body)
    if way == "overlong":
        return signed(text.replace("hetlora", "hetlor\0").encode().replace(b"\0", b"\xc1\xa1"), body)
    return signed(b" " + text.encode() if way == "space" else text.encode(way), body)


@_bytes("a header that is no JSON")
def _(rng: random.Random, honest: Honest) -> bytes:
    header, body = _header(honest.data)
    text = header.decode().rstrip()
    tails = ["{}", "]", ",", "\0", "//", "x"]
    return signed(rng.choice([text + rng.choice(tails), text[:-1], text[:-1] + ",}", text.replace('"', "'")]), body)


@_bytes("a header that is no object")
def _(rng: random.Random, honest: Honest) -> bytes:
    header, body = _header(honest.data)
    return signed(rng.choice(["[]", "null", "1", '"a"', "{}", "[" + header.decode() + "]"]), body)


@_bytes("a key that stands twice")
def _(rng: random.Random, honest: Honest) -> bytes:
    draft = honest.draft()
    value = json.dumps(draft.value)
    key = rng.choice(sorted(draft.value))
    if rng.random() < 0.5:
        value = value[:-1] + f", {json.dumps(key)}: {json.dumps(draft.value[key])}}}"
        header = json.dumps({"__metadata__": {**draft.metadata, "value": value}, **draft.table})
        return signed(header, draft.body)
    header = _header(honest.data)[0].decode().rstrip()
    name = rng.choice(sorted(draft.table))
    return signed(header[:-1] + f", {json.dumps(name)}: {json.dumps(draft.table[name])}}}", draft.body)


@_bytes("nested deeply")
def _(rng: random.Random, honest: Honest) -> bytes:
    draft, depth = honest.draft(), rng.choice((500, 2000, 20_000))
    deep = rng.choice(("[" * depth, "[" * depth + "]" * depth, '{"a":' * depth, '{"a":' * depth + "1" + "}" * depth))
    if rng.random() < 0.5:
        draft.metadata["value"] = deep
        return signed(json.dumps({"__metadata__": draft.metadata, **draft.table}), draft.body)
    return signed(f'{{"__metadata__": {deep}}}', draft.body)


@_bytes("numbers that are none")
def _(rng: random.Random, honest: Honest) -> bytes:
    draft = honest.draft()
    key = rng.choice(("loss", "round", "examples", "steps"))
    draft.value[key] = "HERE"
    number = rng.choice(
        ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "0x1", "01", "+1", "1.", ".5", "--1")
    )
    value = json.dumps(draft.value).replace('"HERE"', number)
    header = json.dumps({"__metadata__": {**draft.metadata, "value": value}, **draft.table})
    return signed(header, draft.body)


# Messages of another kind -------------------------------------------------------------------------------------------


@_bytes("another format, version or kind")
def _(rng: random.Random, honest: Honest) -> bytes:
    draft = honest.draft()
    key, other = rng.choice(
        [
            *(("version", other) for other in ("1", "3", 2, ["2"])),
            *(("kind", other) for other in ("task", "", ["update"], {})),
            *(("format", "pt"), ("format", None), ("note", "x")),
        ]
    )
    draft.metadata[key] = other
    if rng.random() < 0.2:
        del draft.metadata[rng.choice(["version", "format", "kind"])]
    return draft.packed()


@_bytes("a field too many or too few")
def _(rng: random.Random, honest: Honest) -> bytes:
    draft = honest.draft()
    if rng.random() < 0.5:
        del draft.value[rng.choice(sorted(draft.value))]
    else:
        draft.value[rng.choice(["adapter", "Client", "since", "", "__class__", "receives"])] = _odd(rng)
    return draft.packed()


@_bytes("a field of another type")
def _(rng: random.Random, honest: Honest) -> bytes:
    draft = honest.draft()
    key = rng.choice(sorted(draft.value))
    right = {"loss": (int, float), "rank": (int, dict)}.get(key, (type(draft.value[key]),))
    wrong = [None, True, False, 1.5, 1.0, "1", [], {}, [1], {"a": 1}, 3]
    draft.value[key] = rng.choice([entry for entry in wrong if type(entry) not in right])
    return draft.packed()


@_bytes("another round")
def _(rng: random.Random, honest: Honest) -> bytes:
    draft = honest.draft()
    draft.value["round"] = rng.choice(
        [honest.task.round + step for step in (-2, -1, 1, 2, 100)] + [-1 - honest.task.round, *HUGE[:-1]]
    )
    return draft.packed()


@_bytes("another client")
def _(rng: random.Random, honest: Honest) -> bytes:
    draft = honest.draft()
    name = honest.task.client
    others = ["", name + " ", " " + name, name.upper(), name + "\0", "mаllory", "\ud800", name * 1000, "\x1b[2J"]
    draft.value["client"] = rng.choice([*others, *honest.others])
    return draft.packed()


@_bytes("examples, steps or a loss that cannot be")
def _(rng: random.Random, honest: Honest) -> bytes:
    draft = honest.draft()
    key, lie = rng.choice(
        [("examples", number) for number in (0, -1, 10**12 + 1, *HUGE[1:-1], -(10**30))]
        + [("steps", number) for number in (-1, 2**63, 2**64, 10**30, -(2**63))]
        + [("loss", 10**400), ("loss", -(10**309))]
    )
    draft.value[key] = lie
    return draft.packed()


# Ranks, modules, tensors; all else follows from the lie ---------------------------------------------------------------


def _slots(rng: random.Random, honest: Honest, slots: int) -> bytes:
    """Return a consistent message in which a module has this number of slots."""
    draft = honest.draft()
    draft.value["rank"] = slots
    modules = [(stack["modules"], stack["out"], stack["in"]) for stack in draft.value["stacks"]]
    draft.value["stacks"] = [{"modules": names, "out": out, "in": width} for names, out, width in modules]
    return draft.told_anew(rng.randbytes(8) if slots < 0 else None).packed()


@_bytes("a rank above the assigned one")
def _(rng: random.Random, honest: Honest) -> bytes:
    most = max(rank_of(honest.task.rank, module) for module in honest.task.adapter)
    return _slots(rng, honest, most + rng.choice((1, 2, 30)))


@_bytes("a rank of nothing, or less")
def _(rng: random.Random, honest: Honest) -> bytes:
    return _slots(rng, honest, -rng.choice((0, 1, 5, 2**40)))


@_bytes("ranks of other modules")
def _(rng: random.Random, honest: Honest) -> bytes:
    draft = honest.draft()
    names = sorted(honest.task.adapter)
    ranks: dict[str, Any] = dict.fromkeys(names, 1)
    lie = rng.choice(
        [{"x": 1}, {names[0]: True}, {names[0]: "1"}, {names[0]: 1.0}, {names[0]: None}, {names[0]: 10**30}, None]
    )
    draft.value["rank"] = {names[0]: 1} if lie is None else {**ranks, **lie}
    return draft.packed()


@_bytes("modules that lie")
def _(rng: random.Random, honest: Honest) -> bytes:
    draft = honest.draft()
    stacks = draft.value["stacks"]
    stack = rng.choice(stacks)
    names = stack["modules"]
    ways: list[Callable[[], Any]] = [
        lambda: names.append(names[0]),
        lambda: names.append("another"),
        lambda: names.pop(),
        lambda: names.__setitem__(
            0, rng.choice(["", "another", names[0] + " ", "\ud800", names[0].upper(), "q" * 5000])
        ),
        lambda: stacks.append(copy.deepcopy(stack)),
        lambda: stacks.append({"modules": ["another"], "out": 1, "in": 1}),
        lambda: stack.update({"out": stack["out"] + 1}),
        lambda: stack.update({"in": stack["in"] + rng.choice((1, 7))}),
        lambda: stack.update({"out": 0}),
    ]
    rng.choice(ways)()
    if isinstance(draft.value["rank"], dict):
        draft.value["rank"] = {name: 1 for stack in stacks for name in stack["modules"]}
    if all(stack["modules"] for stack in stacks):
        draft.told_anew()
    return draft.packed()


@_bytes("stacks that are none")
def _(rng: random.Random, honest: Honest) -> bytes:
    draft = honest.draft()
    stack = draft.value["stacks"][0]
    lies: list[Any] = [[], [[]], [None], ["q"], [{}], [{**stack, "modules": []}], [{**stack, "modules": "q"}]]
    lies += [
        [{**stack, "modules": [1]}],
        [{**stack, "modules": [["q"]]}],
        [{**stack, "out": True}],
        [{**stack, "in": 3.0}],
    ]
    lies += [[{**stack, "note": 1}], [{**stack, "modules": {}}]]
    draft.value["stacks"] = rng.choice(lies)
    return draft.packed()


@_bytes("sizes beyond all memory")
def _(rng: random.Random, honest: Honest) -> bytes:
    draft = honest.draft()
    size = rng.choice(HUGE[:-1])
    if rng.random() < 0.5:
        draft.value["stacks"][0][rng.choice(("in", "out"))] = size
    else:
        draft.value["rank"] = size
    body, draft.body = draft.body, b""
    if rng.random() < 0.8:  # the table agrees, and only the numbers are missing
        from proofs.wire_oracle import tensors_of

        draft.table, _ = tensors_of(draft.value)
    draft.body = body
    return draft.packed()


@_bytes("a table that lies")
def _(rng: random.Random, honest: Honest) -> bytes:
    draft = honest.draft()
    name = rng.choice(sorted(draft.table))
    about = draft.table[name]
    begin, end = about["data_offsets"]
    shape = about["shape"]
    ways: list[Callable[[], Any]] = [
        lambda: about.update(dtype=rng.choice(["F64", "F16", "I64", "U8", "", None, 32, "f32"])),
        lambda: about.update(
            shape=rng.choice([[*shape[::-1], 1], [*shape, 1], shape[1:], [], None, [float(n) for n in shape]])
        ),
        lambda: about.update(shape=[-size for size in shape]),
        lambda: about.update(
            data_offsets=rng.choice([[begin + 4, end + 4], [begin, end + 1], [end, begin - 1], [-begin - 1, end]])
        ),
        lambda: about.update(data_offsets=[float(begin), float(end)]),
        lambda: about.update(data_offsets=[bool(begin), end]),
        lambda: about.update(data_offsets=[begin, end, end]),
        lambda: about.update(data_offsets=[begin, rng.choice(HUGE[:-1])]),
        lambda: about.update(note="x"),
        lambda: about.pop(rng.choice(sorted(about))),
        lambda: draft.table.pop(name),
        lambda: draft.table.update({name + "x": about}),
        lambda: draft.table.update({rng.choice(["9.A", "", "0", "0.C", "__metadata"]): _odd(rng)}),
        lambda: draft.table.update({name: rng.choice([None, [], 1, "F32", {}])}),
    ]
    rng.choice(ways)()
    return draft.packed()


@_bytes("another precision")
def _(rng: random.Random, honest: Honest) -> bytes:
    draft = honest.draft()
    draft.value["precision"] = rng.choice(
        [name for name in ("float32", "bfloat16", "int8") if name != draft.value["precision"]]
    )
    return draft.told_anew().packed()


@_bytes("other factors")
def _(rng: random.Random, honest: Honest) -> bytes:
    draft = honest.draft()
    draft.value["factors"] = rng.choice([name for name in ("", "A", "B", "AB") if name != draft.value["factors"]])
    return draft.told_anew().packed()


@_bytes("NaN or infinity in the numbers")
def _(rng: random.Random, honest: Honest) -> bytes:
    draft = honest.draft()
    body = bytearray(draft.body)
    if draft.value["precision"] == "bfloat16":
        pattern = struct.pack("<H", rng.choice([0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF]))
        place = 2 * rng.randrange(len(body) // 2)
    else:
        # Of int8 the scales are the only floats, and they come first. A value of zero makes a NaN of an infinite scale.
        floats = len(body)
        if draft.value["precision"] == "int8":
            floats = max(about["data_offsets"][1] for name, about in draft.table.items() if name.endswith(".scale"))
        pattern = struct.pack("<I", rng.choice([0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF]))
        place = 4 * rng.randrange(floats // 4)
    body[place : place + len(pattern)] = pattern
    draft.body = bytes(body)
    return draft.packed()


@_bytes("an update of somebody else")
def _(rng: random.Random, honest: Honest) -> bytes:
    return honest.data.replace(
        honest.task.client.encode(),
        rng.choice(honest.others).encode()[: len(honest.task.client)].ljust(len(honest.task.client), b"_"),
    )


@_bytes("a header of many keys")
def _(rng: random.Random, honest: Honest) -> bytes:
    draft, many = honest.draft(), 20_000 if rng.random() < 0.005 else 200
    draft.table |= {f"{index}.A": {"dtype": "F32"} for index in range(10, many)}
    return draft.packed()


# Mutations that may be valid ----------------------------------------------------------------------------------------


@_mutation("bits flipped")
def _(rng: random.Random, honest: Honest) -> bytes:
    data = bytearray(honest.data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


@_mutation("bits of the numbers flipped")
def _(rng: random.Random, honest: Honest) -> bytes:
    data = bytearray(honest.data)
    begin = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice((1, 2, 8, 32))):
        data[rng.randrange(begin, len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


@_mutation("bytes copied, cut, put in")
def _(rng: random.Random, honest: Honest) -> bytes:
    data = bytearray(honest.data)
    for _ in range(rng.choice((1, 2, 4))):
        place, other, size = rng.randrange(len(data)), rng.randrange(len(data)), rng.choice((1, 4, 16, 100))
        way = rng.randrange(4)
        if way == 0:
            data[place : place + size] = data[other : other + size]
        elif way == 1:
            del data[place : place + size]
        elif way == 2:
            data[place:place] = rng.randbytes(size)
        else:
            data[place : place + size] = rng.randbytes(size)
        data = data or bytearray(1)
    return bytes(data)


@_mutation("a header changed and signed anew")
def _(rng: random.Random, honest: Honest) -> bytes:
    header, body = _header(honest.data)
    text = bytearray(header.rstrip())
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = rng.randrange(len(text))
        sign = rng.choice(b'0123456789"{}[],:. eE-truefalsnABF\\\n\x00\xc3')
        if rng.random() < 0.4:
            del text[place : place + rng.choice((1, 2))]
        elif rng.random() < 0.5:
            text[place] = sign
        else:
            text.insert(place, sign)
    return signed(bytes(text), body)


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path to every part of a JSON value."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, child in children for place in _places(child, (*path, key)))]


@_mutation("JSON edited")
def _(rng: random.Random, honest: Honest) -> bytes:
    draft = honest.draft()
    whole = {"value": draft.value, "table": draft.table, "metadata": draft.metadata}
    for _ in range(rng.choice((1, 1, 1, 2))):
        *way, last = rng.choice([place for place in _places(whole) if len(place) > 1])
        node = whole
        for key in way:
            node = node[key]
        change = rng.randrange(5)
        if change == 0:
            del node[last]  # type: ignore[arg-type]
        elif change == 1 and type(node[last]) is int:
            node[last] += rng.choice((-1, 1, 2))
        elif change == 2 and isinstance(node, dict):
            node[rng.choice(["", "a", "rank", "A"])] = node.pop(last)
        elif change == 3 and isinstance(node, list):
            rng.shuffle(node)
        else:
            node[last] = _odd(rng)
    if rng.random() < 0.3:
        # Where nothing follows from the fields any more, the table stays the old one.
        with contextlib.suppress(TypeError, KeyError, ValueError, IndexError, OverflowError, AttributeError):
            draft.told_anew()
    return draft.packed()


@_mutation("told another way")
def _(rng: random.Random, honest: Honest) -> bytes:
    """Mostly valid: other orders, spaces, numbers and names of the same thing."""
    draft = honest.draft()
    value = dict(rng.sample(sorted(draft.value.items()), len(draft.value)))
    value["loss"] = rng.choice([value["loss"], 0, -1, 1e300, 5])
    value["examples"] = rng.choice([value["examples"], 1, 10**12, 10**12 + 1])
    value["steps"] = rng.choice([value["steps"], 0, 2**63 - 1, 2**63])
    if rng.random() < 0.3 and not isinstance(value["rank"], dict):
        names = sorted(honest.task.adapter)
        value["rank"] = dict.fromkeys(rng.sample(names, len(names)), value["rank"])
    text = json.dumps(value, indent=rng.choice([None, 0, 2]), ensure_ascii=rng.random() < 0.5)
    table = dict(rng.sample(sorted(draft.table.items()), len(draft.table)))
    metadata = dict(rng.sample([*draft.metadata.items(), ("value", text)], 1 + len(draft.metadata)))
    parts = [("__metadata__", metadata), *table.items()]
    header = json.dumps(dict(rng.sample(parts, len(parts))), indent=rng.choice([None, 1]))
    return signed(header + rng.choice(["", "\n", "\t \r\n", " " * 64]), draft.body)


# Values in place of an update -----------------------------------------------------------------------------------------


def _changed(rng: random.Random, honest: Honest, change: Callable[[Tensor], Any]) -> ClientUpdate:
    """Return the update with one factor of one module changed."""
    adapter: dict[str, Any] = dict(honest.update.adapter)
    name, letter = rng.choice(sorted(adapter)), rng.choice("AB")
    adapter[name] = LoraPair(*adapter[name])._replace(**{letter: change(getattr(adapter[name], letter).clone())})
    return replace(honest.update, adapter=adapter)


def _set(factor: Tensor, place: int, value: float) -> Tensor:
    factor.view(-1)[place % factor.numel()] = value
    return factor


class _Liar(Tensor):
    """Claims a small length."""

    @property
    def shape(self) -> Any:
        return torch.Size([1, 1])


class _Thief(Tensor):
    """An object that answers every operation."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("stolen")


@_object("no update at all")
def _(rng: random.Random, honest: Honest) -> Any:
    return rng.choice([None, 17, "update", [], {}, honest.draft(), honest.task, object(), (honest.update,), NAN])


@_object("a client that is no name of the round's")
def _(rng: random.Random, honest: Honest) -> Any:
    names: list[Any] = [
        None,
        5,
        True,
        [],
        {},
        ["mallory"],
        ("mallory",),
        b"mallory",
        "",
        "eve",
        "mallory ",
        "\ud800",
        NAN,
        {1},
    ]
    return replace(honest.update, client=rng.choice(names))


@_object("a round that is another's or none")
def _(rng: random.Random, honest: Honest) -> Any:
    now = honest.task.round
    rounds: list[Any] = [
        now + 1,
        now - 1,
        float(now),
        str(now),
        None,
        [],
        NAN,
        torch.tensor(now),
        np.int64(now),
        -5,
        10**400,
    ]
    return replace(honest.update, round=rng.choice([*rounds, bool(now)]))


@_object("examples that are none")
def _(rng: random.Random, honest: Honest) -> Any:
    lies: list[Any] = [
        0,
        -1,
        True,
        1.0,
        "3",
        None,
        [],
        NAN,
        INF,
        10**12 + 1,
        10**400,
        torch.tensor(3),
        np.int64(3),
        3 + 0j,
        {},
    ]
    return replace(honest.update, examples=rng.choice(lies))


@_object("steps that are none")
def _(rng: random.Random, honest: Honest) -> Any:
    lies: list[Any] = [-1, True, 1.0, "3", None, [], NAN, 2**63, 10**400, torch.tensor(3), np.int64(3), 3j]
    return replace(honest.update, steps=rng.choice(lies))


@_object("a loss that is none")
def _(rng: random.Random, honest: Honest) -> Any:
    lies: list[Any] = [
        NAN,
        INF,
        -INF,
        None,
        "1.0",
        [],
        True,
        10**400,
        1j,
        torch.tensor(1.0),
        torch.tensor([1.0, 2.0]),
        b"1",
    ]
    return replace(honest.update, loss=rng.choice([*lies, np.float32(1.0), torch.tensor(NAN)]))


@_object("a rank that is none")
def _(rng: random.Random, honest: Honest) -> Any:
    names = sorted(honest.task.adapter)
    most = max(rank_of(honest.task.rank, name) for name in names)
    lies: list[Any] = [
        0,
        -1,
        most + 1,
        2**70,
        1.0,
        True,
        "1",
        None,
        [],
        {},
        {names[0]: 1},
        {"x": 1},
        (1,),
        torch.tensor(1),
        np.int64(1),
    ]
    lies += [
        {**dict.fromkeys(names, 1), "x": 1},
        dict.fromkeys(names),
        dict.fromkeys(names, True),
        dict.fromkeys(names, 0),
    ]
    return replace(honest.update, rank=rng.choice(lies))


@_object("a rank that its factors do not have")
def _(rng: random.Random, honest: Honest) -> Any:
    update, step = honest.update, rng.choice((-1, 1))

    def resized(factor: Tensor, dim: int) -> Tensor:
        size = list(factor.shape)
        size[dim] = max(0, size[dim] + step)
        return torch.ones(size)

    adapter: dict[str, Any] = dict(update.adapter)
    name = rng.choice(sorted(adapter))
    A, B = adapter[name]
    adapter[name] = rng.choice(
        [LoraPair(resized(A, 0), resized(B, 1)), LoraPair(resized(A, 0), B), LoraPair(A, resized(B, 1))]
    )
    return replace(update, adapter=adapter)


@_object("other modules")
def _(rng: random.Random, honest: Honest) -> Any:
    adapter: dict[Any, Any] = dict(honest.update.adapter)
    name = rng.choice(sorted(adapter))
    lie = rng.randrange(3)
    if lie == 0:
        del adapter[name]
    elif lie == 1:
        adapter[rng.choice(["x", "", 3, None, (), "\ud800"])] = adapter[name]
    else:
        adapter[name.upper()] = adapter.pop(name)
    return replace(honest.update, adapter=adapter)


@_object("an adapter that is none")
def _(rng: random.Random, honest: Honest) -> Any:
    lies: list[Any] = [
        None,
        [],
        {},
        5,
        "adapter",
        list(honest.update.adapter),
        list(honest.update.adapter.items()),
        torch.ones(2, 2),
    ]
    return replace(honest.update, adapter=rng.choice(lies))


@_object("a pair that is none")
def _(rng: random.Random, honest: Honest) -> Any:
    adapter: dict[str, Any] = dict(honest.update.adapter)
    name = rng.choice(sorted(adapter))
    A, B = adapter[name]
    adapter[name] = rng.choice(
        [None, (A, B), [A, B], (A,), (A, B, A), A, {"A": A, "B": B}, "AB", LoraPair(A, None), LoraPair(None, B)]
    )
    return replace(honest.update, adapter=adapter)


@_object("NaN or infinity")
def _(rng: random.Random, honest: Honest) -> Any:
    return _changed(rng, honest, lambda factor: _set(factor, rng.randrange(10**6), rng.choice((NAN, INF, -INF))))


@_object("infinities that cancel")
def _(rng: random.Random, honest: Honest) -> Any:
    return _changed(rng, honest, lambda factor: _set(_set(factor, 0, INF), 1, -INF))


@_object("another type of number")
def _(rng: random.Random, honest: Honest) -> Any:
    kinds = (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int8,
        torch.int64,
        torch.bool,
        torch.complex64,
        torch.uint8,
    )
    return _changed(rng, honest, lambda factor: factor.to(rng.choice(kinds)))


@_object("another shape")
def _(rng: random.Random, honest: Honest) -> Any:
    def reshaped(factor: Tensor) -> Tensor:
        ways = [factor[None], factor[..., None], factor.flatten(), factor.sum(), factor[:0], factor[:, :0]]
        ways += [
            torch.cat([factor, factor]),
            torch.cat([factor, factor], dim=1),
            torch.ones(1, 1, 1, 1),
            torch.empty(0),
        ]
        return rng.choice([way for way in ways if way.shape != factor.shape])

    return _changed(rng, honest, reshaped)


@_object("another layout, or no memory behind it")
def _(rng: random.Random, honest: Honest) -> Any:
    ways: list[Callable[[Tensor], Any]] = [
        Tensor.to_sparse,
        Tensor.to_sparse_csr,
        Tensor.to_sparse_csc,
        lambda factor: factor.to("meta"),
        lambda _: torch.empty(2**40, 2**20, device="meta"),
        lambda factor: factor.to_mkldnn(),
        lambda _: torch.zeros(1, 1).expand(2**30, 2**30),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some of these are new to PyTorch
        return _changed(rng, honest, rng.choice(ways))


@_object("no plain tensor")
def _(rng: random.Random, honest: Honest) -> Any:
    ways: list[Callable[[Tensor], Any]] = [
        lambda factor: torch.nn.Parameter(factor),
        lambda factor: factor.requires_grad_(),
        lambda factor: factor.requires_grad_() * 2.0,
        lambda factor: factor.as_subclass(_Liar),
        lambda factor: factor.as_subclass(_Thief),
        lambda _: torch.ones(50, 50).as_subclass(_Liar),
        Tensor.numpy,
        Tensor.tolist,
        lambda _: None,
        lambda _: 1.0,
        lambda _: "tensor",
    ]
    return _changed(rng, honest, rng.choice(ways))


@_object("a frozen factor that changed")
def _(rng: random.Random, honest: Honest) -> Any:
    frozen = [letter for letter in "AB" if letter not in honest.task.trains]
    if not frozen:  # all may change: then not even a number
        return _changed(rng, honest, lambda factor: _set(factor, 0, NAN))
    adapter: Mapping[str, Any] = map_tensors(torch.clone, honest.update.adapter)
    factor = getattr(adapter[rng.choice(sorted(adapter))], rng.choice(frozen))
    place = rng.randrange(factor.numel())
    factor.view(-1)[place] += 1.0 + abs(float(factor.view(-1)[place]))
    return replace(honest.update, adapter=adapter)


@_object("the answer to another task")
def _(rng: random.Random, honest: Honest) -> Any:
    """A replay: correct except for the round or the client's name."""
    if rng.random() < 0.5:
        return replace(honest.update, round=honest.task.round - 1)
    return replace(honest.update, client=honest.task.client + "-2")
