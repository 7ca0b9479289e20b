"""What travels comes back as it was, and whatever else arrives is refused by the one error."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetlora.adapter import LoraPair, StackedAdapter, delta_norm, num_bytes
from hetlora.admission import admit
from hetlora.aggregation import WeightedSum
from hetlora.errors import RefusedUpdateError, WireError
from hetlora.federated import Client, ClientUpdate, Folded, ServerState, TrainTask, truncate_to_rank
from hetlora.wire import MOST_HEADER, most_bytes, pack_task, pack_update, parse_task, parse_update

laws = settings(deadline=None, derandomize=True, max_examples=60)


def pair(rank, out=3, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LoraPair(torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator))


UPDATE = ClientUpdate("ana", 4, 2, {"q": pair(2), "v": pair(2, seed=1), "up": pair(2, out=5)}, 10, 3, 1.5)
GOOD = pack_update(UPDATE)
LENGTH = 8 + int.from_bytes(GOOD[:8], "little")
HEADER = json.loads(GOOD[8:LENGTH])
VALUE = HEADER["__metadata__"]["value"]


def assert_equal(one, other):
    for field in fields(one):
        if field.name != "adapter":
            assert getattr(one, field.name) == getattr(other, field.name)
    assert one.adapter.keys() == other.adapter.keys()
    for name in one.adapter:
        for mine, its in zip(one.adapter[name], other.adapter[name], strict=True):
            assert torch.equal(mine.view(torch.int32), its.view(torch.int32)), name  # bit for bit, NaN and -0.0 too


# There and back ----------------------------------------------------------------------------------------------------

names = st.text(max_size=12)
numbers = st.floats(width=32)


@st.composite
def updates(draw):
    modules = draw(st.lists(names, min_size=1, max_size=6, unique=True))
    one = draw(st.integers(1, 4))
    rank = {name: draw(st.integers(1, 4)) for name in modules} if draw(st.booleans()) else one
    adapter = {}
    for name in modules:
        r = rank[name] if isinstance(rank, dict) else rank
        out, width = draw(st.sampled_from([(1, 1), (2, 3), (5, 2)]))
        value = draw(numbers)
        adapter[name] = LoraPair(torch.full((r, width), value), torch.arange(out * r).float().view(out, r) * value)
    whole = st.integers(-(2**70), 2**70)
    loss = draw(st.floats(allow_nan=False, allow_infinity=False))
    return ClientUpdate(draw(names), draw(whole), rank, adapter, draw(whole), draw(whole), loss)


@laws
@given(updates(), st.sampled_from([bytes, bytearray, memoryview]))
def test_an_update_comes_back_as_it_was(update, kind):
    assert_equal(parse_update(kind(pack_update(update))), update)


@pytest.mark.parametrize("rank", [2, {"q": 2, "v": 1}])
def test_a_task_comes_back_as_it_was(rank):
    adapter = {"q": pair(2), "v": pair(rank if isinstance(rank, int) else rank["v"])}
    task = TrainTask("ana", 3, rank, adapter, receives="A", trains="B", sends="B", since=2)
    assert_equal(parse_task(pack_task(task)), task)


def test_slots_of_a_wider_adapter_travel_though_they_are_no_contiguous_memory():
    state = ServerState({"q": pair(4), "v": pair(4, seed=1)})
    task = truncate_to_rank(state, Client("ana", 1, 5))
    assert not task.adapter["q"].B.is_contiguous()
    assert_equal(parse_task(pack_task(task)), task)


def test_the_factors_are_views_of_the_bytes():
    data = bytearray(GOOD)
    update = parse_update(data)
    data[LENGTH : LENGTH + 4] = b"\0\0\0\0"
    assert float(update.adapter["q"].A[0, 0]) == 0.0
    assert isinstance(update.adapter, StackedAdapter)
    assert [modules for modules, _ in update.adapter.stacks] == [("q", "v"), ("up",)]


def test_an_update_that_arrived_is_admitted_and_measured_like_the_one_sent():
    task = TrainTask("ana", 4, 2, {name: pair(2, out=p.B.shape[0]) for name, p in UPDATE.adapter.items()})
    arrived = parse_update(GOOD)
    assert admit(arrived, {"ana": task}, ()) is task
    torch.testing.assert_close(delta_norm(arrived.adapter), delta_norm(UPDATE.adapter), rtol=1e-14, atol=0.0)
    assert len(GOOD) <= most_bytes(task) == 8 + MOST_HEADER + num_bytes(task.adapter)


def test_updates_that_arrived_are_added_like_those_sent():
    # Six ranks: more layouts than have a sum of their own; some come again, one has no weight, one no bytes.
    rng = torch.Generator().manual_seed(0)
    empty = {"q": LoraPair(torch.zeros(8, 4), torch.zeros(3, 8)), "up": LoraPair(torch.zeros(8, 4), torch.zeros(5, 8))}
    arrived, sent = WeightedSum.like(empty), WeightedSum.like(empty)
    for index, rank in enumerate((2, 7, 2, 3, 4, 5, 6, 7, 6, 8)):
        adapter = {
            m: LoraPair(*(torch.randn(f.shape, generator=rng) for f in pair(rank, out=p.B.shape[0])))
            for m, p in empty.items()
        }
        weight = float(index % 4)
        came = parse_update(pack_update(replace(UPDATE, rank=rank, adapter=adapter))).adapter
        arrived, sent = arrived.add(adapter if index == 4 else came, weight), sent.add(adapter, weight)
    assert arrived.slots == sent.slots == {"q": 8, "up": 8}
    assert arrived.weight == sent.weight
    for again in range(2):  # the mean may be asked for twice, and more may come in between
        for module, mean in sent.mean(empty).items():
            for mine, its in zip(arrived.mean(empty)[module], mean, strict=True):
                torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-7, msg=f"{module}, time {again}")
        arrived, sent = arrived.add(came, 3.0), sent.add(adapter, 3.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["q", "up"])
def test_numbers_that_are_not_finite_are_refused_where_they_stand(name, value):
    adapter = {module: LoraPair(*(factor.clone() for factor in p)) for module, p in UPDATE.adapter.items()}
    adapter[name].B[1, 0] = value
    arrived = parse_update(pack_update(replace(UPDATE, adapter=adapter)))
    with pytest.raises(RefusedUpdateError, match=f"{name}.B: holds an infinity or NaN"):
        admit(arrived, {"ana": TrainTask("ana", 4, 2, UPDATE.adapter)}, ())


def test_large_numbers_whose_sum_overflows_are_admitted():
    adapter = {"m": LoraPair(torch.full((1, 4), 3e38), torch.full((2, 1), 3e38))}
    arrived = parse_update(pack_update(replace(UPDATE, rank=1, adapter=adapter)))
    admit(arrived, {"ana": TrainTask("ana", 4, 1, adapter)}, ())


@pytest.mark.parametrize(
    ("update", "says"),
    [
        (replace(UPDATE, loss=float("nan")), "not finite"),
        (replace(UPDATE, adapter={"q": LoraPair(*(f.double() for f in pair(2)))}), "q: not two matrices in float32"),
        (replace(UPDATE, adapter={"q": LoraPair(*(f[None] for f in pair(2)))}), "q: not two matrices in float32"),
        (replace(UPDATE, client="a" * MOST_HEADER), "over the limit"),
    ],
)
def test_what_the_format_does_not_carry_is_not_sent(update, says):
    with pytest.raises(WireError, match=says):
        pack_update(update)


def test_what_is_folded_into_the_base_is_not_forgotten_in_silence():
    task = TrainTask("ana", 0, 2, {"q": pair(2)}, folded=Folded({"q": torch.zeros(3, 4)}, {0: 8}))
    with pytest.raises(WireError, match="folded"):
        pack_task(task)


# What is refused ---------------------------------------------------------------------------------------------------


def message(header, numbers=GOOD[LENGTH:]):
    """The bytes of a header, given as JSON or as what it holds, and of numbers."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + numbers


def with_tensor(name, **changes):
    return HEADER | {name: HEADER[name] | changes}


def with_value(**changes):
    value = json.loads(VALUE) | changes
    value = {name: entry for name, entry in value.items() if entry is not ...}
    return with_metadata(value=json.dumps(value))


def with_metadata(**changes):
    return HEADER | {"__metadata__": HEADER["__metadata__"] | changes}


def without(name):
    return {key: entry for key, entry in HEADER.items() if key != name}


REFUSED = {
    "nothing": (b"", "0 bytes are no message"),
    "half a length": (GOOD[:5], "5 bytes are no message"),
    "a header without end": (b"\xff" * 64, "over the limit"),
    "a header over the limit": ((MOST_HEADER + 56).to_bytes(8, "little") + bytes(MOST_HEADER + 56), "over the limit"),
    "a header that is cut": (GOOD[: LENGTH - 1], "arrived"),
    "a header that is not padded": ((57).to_bytes(8, "little") + bytes(57), "not padded"),
    "no JSON": (message(b"\x80\x04N."), "malformed update"),
    "no object": (message([1]), "no object"),
    "nested without end": (message(b"[" * 100_000), "malformed update"),
    "a number of a million digits": (message(b'{"__metadata__": ' + b"9" * 10**6 + b"}"), "malformed update"),
    "NaN in the header": (message(b'{"__metadata__": NaN}'), "NaN is no number"),
    "a key twice": (message(b'{"0.A": {}, "0.A": {}}'), "twice"),
    "other safetensors": (message(without("__metadata__")), "no message of hetlora's"),
    "another version": (message(with_metadata(version="2")), "version '2' of the format, expected '1'"),
    "another kind": (message(with_metadata(kind="task")), "kind 'task' of message, expected 'update'"),
    "more metadata": (message(with_metadata(note="")), "expected 'update'"),
    "no fields": (message(with_metadata(value="[]")), "no object"),
    "a field too few": (message(with_value(loss=...)), "fields client"),
    "a field too many": (message(with_value(folded={})), "folded"),
    "a client of no name": (message(with_value(client=7)), "client: 7"),
    "a round that is true": (message(with_value(round=True)), "round: True"),
    "half an example": (message(with_value(examples=0.5)), "examples: 0.5"),
    "a rank of text": (message(with_value(rank="2")), "rank: '2'"),
    "ranks of text": (message(with_value(rank={"q": "2"})), "rank: {'q': '2'}"),
    "an infinite loss": (message(with_metadata(value=VALUE.replace("1.5", "1e999"))), "loss: inf"),
    "no modules": (message(with_value(modules=[])), "no modules"),
    "modules of text": (message(with_value(modules=["q", "v"])), "no list of names"),
    "a module without name": (message(with_value(modules=[["q", 1], ["up"]])), "no text"),
    "a module twice": (message(with_value(modules=[["q", "q"], ["up"]])), "named twice"),
    "a stack too many": (message(with_value(modules=[["q", "v"], ["up"], ["x"]])), "x: shapes None"),
    "a stack too few": (message(with_value(modules=[["q", "v"]])), "tensor 1.A"),
    "fewer names than modules": (message(with_value(modules=[["q"], ["up"]])), "no factors of 1 modules"),
    "a tensor too few": (message(without("1.B")), "up: shapes"),
    "a tensor too many": (message(HEADER | {"2.A": HEADER["1.A"]}), "tensor 2.A"),
    "another dtype": (message(with_tensor("0.A", dtype="F64")), "tensor 0.A"),
    "a shape of no matrix": (message(with_tensor("0.A", shape=[16])), "q, v: shapes"),
    "a size below zero": (message(with_tensor("0.A", shape=[2, 2, -4])), "q, v: shapes"),
    "a size of zero": (message(with_tensor("0.A", shape=[2, 2, 0])), "q, v: shapes"),
    "a size that is true": (message(with_tensor("1.A", shape=[True, 2, 4])), "up: shapes"),
    "a size beyond memory": (message(with_tensor("0.A", shape=[2, 2, 2**62])), "tensor 0.A"),
    "ranks that differ": (message(with_tensor("0.A", shape=[2, 1, 8])), "q, v: shapes"),
    "tensors that overlap": (message(with_tensor("0.B", data_offsets=[0, 48])), "tensor 0.B"),
    "a gap": (message(with_tensor("1.B", data_offsets=[148, 188])), "tensor 1.B"),
    "an offset out of range": (message(with_tensor("1.B", data_offsets=[144, 2**63])), "tensor 1.B"),
    "numbers that are cut": (GOOD[:-1], "bytes of numbers are announced"),
    "bytes too many": (GOOD + b"\0", "bytes of numbers are announced"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_it_is_refused(data, says):
    with pytest.raises(WireError, match=re.escape(says)) as refusal:
        parse_update(data)
    assert len(str(refusal.value)) <= 500


def test_the_unchanged_message_is_taken():
    assert_equal(parse_update(message(HEADER)), UPDATE)


@laws
@given(st.integers(0, len(GOOD) - 1))
def test_no_beginning_of_a_message_is_taken(length):
    with pytest.raises(WireError):
        parse_update(GOOD[:length])


@settings(laws, max_examples=1500)
@given(st.lists(st.tuples(st.integers(0, LENGTH - 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_bytes_that_flip_in_the_header_give_an_update_or_the_one_error(flips):
    data = bytearray(GOOD)
    for position, mask in flips:
        data[position] ^= mask
    try:
        update = parse_update(data)
    except WireError:
        return
    # A digit or a letter of a name changed: all that was read still fits together.
    assert sum(factor.numel() for pair in update.adapter.values() for factor in pair) * 4 == len(data) - LENGTH


@settings(laws, max_examples=300)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data):
    with pytest.raises(WireError):
        parse_update(data)
    with pytest.raises(WireError):
        parse_task(message(data))
