"""Messages are parsed back as packed, and every other message is refused with the same error class."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from drawn_examples import examples
from fake_clients import FULL, FakeEngine, assert_same_state, start_of, trained
from hetlora.core.adapter import FlatAdapter, LoraPair, delta_norm, map_tensors, num_bytes, pad, truncate
from hetlora.core.admission import admit
from hetlora.core.aggregation import WeightedSum
from hetlora.core.codecs import CODECS
from hetlora.core.method import truncate_to_rank
from hetlora.core.round import run_rounds
from hetlora.core.types import BaseDelta, Client, ClientUpdate, ServerState, TrainTask
from hetlora.errors import RefusedUpdateError, WireError
from hetlora.flower.wire.codec import max_update_bytes, pack_task, pack_update, parse_task, parse_update
from hetlora.flower.wire.header import MOST_HEADER, read_header
from hetlora.methods import METHODS

laws = examples(60)


def pair(rank, out=3, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LoraPair(torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator))


UPDATE = ClientUpdate("ana", 4, 2, {"q": pair(2), "v": pair(2, seed=1), "up": pair(2, out=5)}, 10, 3, 1.5)
TASK = TrainTask("ana", 4, 3, {"q": pair(3, seed=2), "v": pair(3, seed=3), "up": pair(3, out=5, seed=4)})
GOOD = pack_update(UPDATE, TASK).data
LENGTH = 8 + int.from_bytes(GOOD[:8], "little")
HEADER = json.loads(GOOD[8:LENGTH])
VALUE = HEADER["__metadata__"]["value"]
TEXT = json.dumps(HEADER)


def answered(update, **changes):
    """Return a task that the update answers unpruned."""
    task = TrainTask(update.client, update.round, update.rank, map_tensors(torch.neg, update.adapter))
    return replace(task, **changes)


def there_and_back(update, task=None, **how):
    task = task or answered(update)
    return parse_update(pack_update(update, task, **how).data, task)


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
    task = answered(update)
    assert_equal(parse_update(kind(pack_update(update, task).data), task), update)


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
    update = parse_update(data, TASK)
    data[LENGTH : LENGTH + 4] = b"\0\0\0\0"
    assert float(update.adapter["q"].A[0, 0]) == 0.0
    assert isinstance(update.adapter, FlatAdapter)
    assert [modules for modules, _ in update.adapter.stacks] == [("q", "v"), ("up",)]


def test_an_update_that_arrived_is_admitted_and_measured_like_the_one_sent():
    arrived = parse_update(GOOD, TASK)
    assert admit(arrived, {"ana": TASK}, ()) is TASK
    torch.testing.assert_close(delta_norm(arrived.adapter), delta_norm(UPDATE.adapter), rtol=1e-14, atol=0.0)


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
        came = there_and_back(replace(UPDATE, rank=rank, adapter=adapter)).adapter
        arrived, sent = arrived.add(adapter if index == 4 else came, weight), sent.add(adapter, weight)
    assert arrived.slots == sent.slots == {"q": 8, "up": 8}
    assert arrived.weight == sent.weight
    for again in range(2):  # the mean may be asked for twice, and more may come in between
        for module, mean in sent.mean(empty).items():
            for mine, its in zip(arrived.mean(empty)[module], mean, strict=True):
                assert torch.equal(mine, its), f"{module}, time {again}"
        arrived, sent = arrived.add(came, 3.0), sent.add(adapter, 3.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["q", "up"])
def test_numbers_that_are_not_finite_are_refused_where_they_stand(name, value):
    adapter = {module: LoraPair(*(factor.clone() for factor in p)) for module, p in UPDATE.adapter.items()}
    adapter[name].B[1, 0] = value
    arrived = there_and_back(replace(UPDATE, adapter=adapter), TASK)
    with pytest.raises(RefusedUpdateError, match=f"{name}.B: holds an infinity or NaN"):
        admit(arrived, {"ana": TASK}, ())


def test_large_numbers_whose_sum_overflows_are_admitted():
    adapter = {"m": LoraPair(torch.full((1, 4), 3e38), torch.full((2, 1), 3e38))}
    update = replace(UPDATE, rank=1, adapter=adapter)
    admit(there_and_back(update), {"ana": answered(update)}, ())


@pytest.mark.parametrize(
    ("update", "says"),
    [
        (replace(UPDATE, loss=float("nan")), "not finite"),
        (replace(UPDATE, adapter={"q": LoraPair(*(f.double() for f in pair(2)))}), "q: not two matrices in float32"),
        (replace(UPDATE, adapter={"q": LoraPair(*(f[None] for f in pair(2)))}), "q: not two matrices in float32"),
        (replace(UPDATE, client="a" * MOST_HEADER), "over the limit"),
        (replace(UPDATE, rank=1), "'ana', q: rank 1, and 2 slots of A and 2 of B"),
        (replace(UPDATE, rank={"q": 2, "v": 2}), r"ranks of \['q', 'v'\], modules \['q', 'up', 'v'\]"),
        (replace(UPDATE, adapter={}), "modules"),
    ],
)
def test_what_the_format_does_not_carry_is_not_sent(update, says):
    with pytest.raises(WireError, match=says):
        pack_update(update, replace(TASK, client=update.client))


def test_what_is_folded_into_the_base_is_not_forgotten_in_silence():
    task = TrainTask("ana", 0, 2, {"q": pair(2)}, folded=BaseDelta({"q": torch.zeros(3, 4)}, {0: 8}))
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


def with_stack(index, **changes):
    stacks = json.loads(VALUE)["stacks"]
    stacks[index] |= changes
    return with_value(stacks=stacks)


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
    "no JSON": (message(b"{\x80\x04N."), "malformed update"),
    "no object": (message([1]), "no object"),
    "a header after white space": (message(b" " + json.dumps(HEADER).encode()), "does not begin with '{'"),
    "a header in UTF-16": (message((TEXT + " " * (-(4 + len(TEXT)) % 32)).encode("utf-16-le")), "malformed update"),
    "a header in UTF-8 with its mark": (message(json.dumps(HEADER).encode("utf-8-sig")), "does not begin with '{'"),
    "a name that no file holds": (message(with_stack(0, modules=["q", "\ud800"])), "\\ud800"),
    "nested without end": (message(b'{"a":' * 100_000), "malformed update"),
    "a number of a million digits": (message(b'{"__metadata__": ' + b"9" * 10**6 + b"}"), "malformed update"),
    "NaN in the header": (message(b'{"__metadata__": NaN}'), "NaN is no number"),
    "a key twice": (message(b'{"0.A": {}, "0.A": {}}'), "twice"),
    "other safetensors": (message(without("__metadata__")), "no message of hetlora's"),
    "another version": (message(with_metadata(version="1")), "version '1' of the format, expected '2'"),
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
    "a precision of ours that is none": (message(with_value(precision="int4")), "precision: 'int4'"),
    "a precision of no name": (message(with_value(precision=[])), "precision: []"),
    "factors of no name": (message(with_value(factors="BA")), "factors: 'BA'"),
    "another precision": (message(with_value(precision="int8")), "tensor 0.A: {'dtype': 'F32'"),
    "other factors": (message(with_value(factors="A")), "tensor 0.B"),
    "no modules": (message(with_value(stacks=[])), "no modules"),
    "stacks of text": (message(with_value(stacks="qv")), "stacks: 'qv'"),
    "a stack that is text": (message(with_value(stacks=["q", "v"])), "stack q: expected modules"),
    "a stack without a size": (message(with_value(stacks=[{"modules": ["q"], "out": 3}])), "expected modules, out and in"),
    "modules of text": (message(with_stack(0, modules="qv")), "no list of names"),
    "a stack of no modules": (message(with_stack(0, modules=[])), "no list of names"),
    "a module without name": (message(with_stack(0, modules=["q", 1])), "no text"),
    "a module twice": (message(with_stack(0, modules=["q", "q"])), "named twice"),
    "a stack too many": (
        message(with_value(stacks=[*json.loads(VALUE)["stacks"], {"modules": ["x"], "out": 1, "in": 1}])), "tensor 2.A",
    ),
    "a stack too few": (message(with_value(stacks=json.loads(VALUE)["stacks"][:1])), "tensor 1.A"),
    "fewer names than modules": (message(with_stack(0, modules=["q"])), "tensor 0.A"),
    "ranks of other modules": (message(with_value(rank={"q": 2, "v": 2})), "ranks of q, v, and modules q, up, v"),
    "ranks that differ in a stack": (message(with_value(rank={"q": 2, "v": 1, "up": 2})), "q, v: no stack"),
    "a rank of zero": (message(with_value(rank=0)), "q, v: no stack"),
    "a rank beyond memory": (message(with_value(rank=2**62)), "tensor 0.A"),
    "a weight of no size": (message(with_stack(0, out=0)), "q, v: no stack"),
    "a weight below zero": (message(with_stack(1, **{"in": -4})), "up: no stack"),
    "a weight whose size is true": (message(with_stack(1, out=True)), "up: no stack"),
    "half a weight": (message(with_stack(1, out=5.0)), "up: no stack"),
    "a weight beyond memory": (message(with_stack(1, out=2**62)), "tensor 1.B"),
    "a tensor too few": (message(without("1.B")), "tensor 1.B: None"),
    "a tensor too many": (message(HEADER | {"2.A": HEADER["1.A"]}), "tensor 2.A"),
    "a tensor of nothing": (message(HEADER | {"2.A": None}), "tensor 2.A"),
    "another dtype": (message(with_tensor("0.A", dtype="F64")), "tensor 0.A"),
    "a shape of no matrix": (message(with_tensor("0.A", shape=[16])), "tensor 0.A"),
    "a size below zero": (message(with_tensor("0.A", shape=[2, 2, -4])), "tensor 0.A"),
    "a size of zero": (message(with_tensor("0.A", shape=[2, 2, 0])), "tensor 0.A"),
    "a size that is true": (message(with_tensor("1.A", shape=[True, 2, 4])), "tensor 1.A"),
    "a size beyond memory": (message(with_tensor("0.A", shape=[2, 2, 2**62])), "tensor 0.A"),
    "ranks that differ": (message(with_tensor("0.A", shape=[2, 1, 8])), "tensor 0.A"),
    "tensors that overlap": (message(with_tensor("0.B", data_offsets=[0, 48])), "tensor 0.B"),
    "a gap": (message(with_tensor("1.B", data_offsets=[148, 188])), "tensor 1.B"),
    "an offset out of range": (message(with_tensor("1.B", data_offsets=[144, 2**63])), "tensor 1.B"),
    "numbers that are cut": (GOOD[:-1], "bytes of numbers are announced"),
    "bytes too many": (GOOD + b"\0", "bytes of numbers are announced"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_it_is_refused(data, says):
    with pytest.raises(WireError, match=re.escape(says)) as refusal:
        parse_update(data, TASK)
    assert len(str(refusal.value)) <= 500
    assert str(refusal.value).isprintable()


def test_what_a_terminal_would_obey_is_told_escaped():
    value = json.loads(VALUE)
    value["stacks"][1]["modules"] = ["\x1b[2J" * 200]
    with pytest.raises(WireError, match=re.escape("than it received: \\x1b[2J\\x1b[2J")) as refusal:
        parse_update(message(with_value(stacks=value["stacks"])), TASK)
    assert len(str(refusal.value)) == 500
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("precision", list(CODECS))
def test_an_answer_in_another_precision_than_was_asked_for_is_refused(precision):
    data = pack_update(UPDATE, TASK, precision=precision).data
    assert_equal(parse_update(data, TASK, precision), parse_update(data, TASK))
    for asked in set(CODECS) - {precision}:
        with pytest.raises(WireError, match=f"client 'ana' answered in {precision}, asked was {asked}"):
            parse_update(data, TASK, asked)


def test_the_unchanged_message_is_taken():
    assert_equal(parse_update(message(HEADER), TASK), UPDATE)


MISFITS = {
    "another client": (replace(TASK, client="bea"), "client 'bea' was asked, and client 'ana' answered"),
    "another round": (replace(TASK, round=5), "client 'ana' answered round 4, asked was round 5"),
    "other factors": (replace(TASK, sends="B"), "client 'ana' sent the factors 'AB', the task asks for 'B'"),
    "another module": (
        replace(TASK, adapter={"q": pair(3), "k": pair(3), "up": pair(3, out=5)}), "other modules than it received: k, v",
    ),
    "a module too many": (
        replace(TASK, adapter={"q": pair(3), "up": pair(3, out=5)}), "other modules than it received: v",
    ),
    "a module too few": (replace(TASK, adapter={**TASK.adapter, "k": pair(3)}), "other modules than it received: k"),
    "a rank too large": (
        replace(TASK, rank={"q": 2, "v": 1, "up": 2}), "client 'ana', v: rank 2 is not within 1 ... 1, its assigned rank",
    ),
    "another width": (
        replace(TASK, adapter={**TASK.adapter, "up": pair(3, out=5, width=6)}),
        "client 'ana', up: factors of a weight 5 x 4 arrived, expected 5 x 6",
    ),
    "another height": (
        replace(TASK, adapter={**TASK.adapter, "v": pair(3, out=7)}),
        "client 'ana', v: factors of a weight 3 x 4 arrived, expected 7 x 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("precision", list(CODECS))
@pytest.mark.parametrize(("task", "says"), MISFITS.values(), ids=MISFITS.keys())
def test_what_does_not_fit_the_task_is_neither_taken_nor_sent(task, says, precision):
    data = pack_update(UPDATE, TASK, precision=precision).data
    with pytest.raises(WireError, match=re.escape(says)):
        parse_update(data, task)
    if task.sends == "AB":
        with pytest.raises(WireError, match=re.escape(says)):
            pack_update(UPDATE, task, precision=precision)


# Bytes that nobody sent ---------------------------------------------------------------------------------------------

SHAPES = {
    "float32": {"precision": "float32"},
    "bfloat16, only A": {"precision": "bfloat16", "sends": "A"},
    "int8, ranks": {"precision": "int8", "rank": {"q": 2, "v": 1, "up": 2}},
    "int8, only B": {"precision": "int8", "sends": "B"},
    "nothing": {"precision": "float32", "sends": ""},
}


def shaped(precision, sends="AB", rank=2):
    task = replace(TASK, sends=sends)
    return pack_update(
        replace(UPDATE, rank=rank, adapter=truncate(UPDATE.adapter, rank)), task, precision=precision
    ).data, task


MESSAGES = {name: shaped(**shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(("data", "task"), MESSAGES.values(), ids=MESSAGES.keys())
def test_no_beginning_of_a_message_is_taken(data, task):
    for length in range(len(data)):
        with pytest.raises(WireError):
            parse_update(data[:length], task)
    parse_update(data, task)


@pytest.mark.parametrize(("data", "task"), MESSAGES.values(), ids=MESSAGES.keys())
def test_bytes_that_flip_give_an_update_that_can_be_judged_or_the_one_error(data, task):
    outcomes = {"refused": 0, "admitted": 0}

    @examples(400)
    @given(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(1, 255)), min_size=1, max_size=4))
    def flips(changes):
        flipped = bytearray(data)
        for position, mask in changes:
            flipped[position] ^= mask
        try:
            update = parse_update(flipped, task)
        except WireError:
            outcomes["refused"] += 1
            return
        try:
            admit(update, {"ana": task}, ())
        except RefusedUpdateError:
            outcomes["refused"] += 1
            return
        outcomes["admitted"] += 1
        assert update.adapter.keys() == task.adapter.keys()
        assert all(bool(factor.isfinite().all()) for pair in update.adapter.values() for factor in pair)

    flips()
    assert outcomes["refused"] > sum(outcomes.values()) / 4


TASKS = [pack_task(TASK), pack_task(TASK, precision="int8"), pack_task(TASK, precision="bfloat16", factors="A")]


@examples(400)
@given(st.sampled_from(TASKS), st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(1, 255)), min_size=1, max_size=4))
def test_bytes_that_flip_give_a_task_or_the_one_error(data, changes):
    flipped = bytearray(data)
    for place, mask in changes:
        flipped[int(place * (len(data) - 1))] ^= mask
    try:
        task = parse_task(flipped, TASK.adapter)
    except WireError:
        return
    assert {name: (A.shape[0], B.shape[1]) for name, (A, B) in task.adapter.items()} == dict.fromkeys(
        task.adapter, (task.rank, task.rank)
    )


FIELDS = st.sampled_from([
    "client", "round", "rank", "examples", "steps", "loss", "precision", "factors", "stacks", "modules", "out", "in",
    "dtype", "shape", "data_offsets", "0.A", "0.B", "1.A", "1.B", "0.A.scale", "__metadata__", "q", "v",
])  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4) | FIELDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS | st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@examples(500)
@given(st.sampled_from(list(MESSAGES.values())), st.data())
def test_whatever_a_header_holds_gives_an_update_that_can_be_judged_or_the_one_error(sent, draw):
    data, task = sent
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])
    value = json.loads(header["__metadata__"]["value"])
    places = [value, value["stacks"][0], header, *(entry for name, entry in header.items() if name != "__metadata__")]
    place = draw.draw(st.sampled_from(places))
    place[draw.draw(st.sampled_from(sorted(place)) | FIELDS)] = draw.draw(JSON)
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["value"] = json.dumps(value)
    numbers = data[length:] + bytes(draw.draw(st.integers(0, 8)))
    try:
        admit(parse_update(message(header, numbers), task), {"ana": task}, ())
    except RefusedUpdateError:
        return


@examples(300)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data):
    for received in (data, message(data)):
        with pytest.raises(WireError):
            parse_update(received, TASK)
        with pytest.raises(WireError):
            parse_task(received, TASK.adapter)


# Factors that stay where they are -----------------------------------------------------------------------------------


@laws
@given(updates(), st.sampled_from(list(CODECS)), st.sampled_from(["", "A", "B", "AB"]), st.integers(0, 2))
def test_a_task_brings_its_factors_and_takes_the_others_from_the_known_adapter(update, precision, factors, more):
    sane = map_tensors(lambda f: f.nan_to_num(0.5).clamp(-1e30, 1e30), update.adapter)
    task = TrainTask(update.client, update.round, update.rank, sane, receives="A", sends="B", since=3)
    known = {name: LoraPair(A + 1.0, B + 1.0) for name, (A, B) in sane.items()}
    known = pad(known, {name: A.shape[0] + more for name, (A, _) in known.items()})
    came = parse_task(pack_task(task, precision=precision, factors=factors), known)
    for name, expected in sane.items():
        for letter, factor in zip("AB", came.adapter[name], strict=True):
            if letter not in factors:
                assert torch.equal(factor, getattr(truncate(known, update.rank)[name], letter))
            elif precision == "float32":
                assert torch.equal(factor, getattr(expected, letter))
            else:
                largest = float(getattr(expected, letter).abs().max())
                torch.testing.assert_close(factor, getattr(expected, letter), rtol=2**-8, atol=largest / 250 + 1e-35)
    assert_equal(replace(came, adapter=sane), task)


@pytest.mark.parametrize(
    ("factors", "known", "says"),
    [
        ("A", None, "the task of client 'ana' comes without B, and no known adapter is given"),
        ("B", None, "without A, and"),
        ("", None, "without A and B, and"),
        ("A", {"q": pair(3), "v": pair(3)}, "only one side has up"),
        ("A", truncate(TASK.adapter, {"q": 3, "v": 2, "up": 3}), "does not fit: v of rank 2, the task has rank 3"),
        ("A", {**TASK.adapter, "up": pair(3, out=6)}, r"up has A \(3, 4\) and B \(6, 3\), the weight is 5 x 4"),
        ("B", {**TASK.adapter, "up": pair(3, out=5, width=1)}, "up has A"),
        ("B", {**TASK.adapter, "up": LoraPair(*(f.double() for f in pair(3, out=5)))}, "up has A torch.float64"),
    ],
)
def test_a_factor_that_is_missing_is_named(factors, known, says):
    with pytest.raises(WireError, match=says):
        parse_task(pack_task(TASK, factors=factors), known)


@pytest.mark.parametrize("precision", list(CODECS))
@pytest.mark.parametrize("sends", ["", "A", "B"])
def test_factors_that_an_update_leaves_out_are_the_tasks_at_its_rank(sends, precision):
    rank = {"q": 2, "v": 1, "up": 2}
    task = replace(TASK, sends=sends)
    update = replace(UPDATE, rank=rank, adapter=truncate(UPDATE.adapter, rank))
    arrived = there_and_back(update, task, precision=precision)
    assert_equal(replace(arrived, adapter=update.adapter), update)
    assert isinstance(arrived.adapter, FlatAdapter)
    admit(arrived, {"ana": task}, ())
    for name, its in truncate(TASK.adapter, rank).items():
        for letter in set("AB") - set(sends):
            assert torch.equal(getattr(arrived.adapter[name], letter), getattr(its, letter))
    whole = len(pack_update(update, replace(TASK, sends="AB"), precision=precision).data)
    assert len(pack_update(update, task, precision=precision).data) < whole


@pytest.mark.parametrize("precision", list(CODECS))
def test_others_that_know_safetensors_can_read_it(precision):
    tensors = safetensors.torch.load(pack_update(UPDATE, TASK, precision=precision).data)
    scales = {"0.A.scale", "0.B.scale", "1.A.scale", "1.B.scale"} if precision == "int8" else set()
    assert tensors.keys() == {"0.A", "0.B", "1.A", "1.B"} | scales
    assert {tensors[name].dtype for name in ("0.A", "1.B")} == {getattr(torch, precision)}
    if precision == "float32":
        assert torch.equal(tensors["0.A"][1], UPDATE.adapter["v"].A)


class Devices:
    """Clients that keep what they have received, and receive and send bytes."""

    def __init__(self):
        self.known, self.down = {}, []

    def train(self, tasks, method):
        for task in tasks:
            known = self.known.get(task.client)
            self.down.append(pack_task(task, factors="AB" if known is None else task.receives))
            received = parse_task(self.down[-1], known)
            self.known[task.client] = received.adapter
            for update in FakeEngine(trained).train([received], method):
                yield parse_update(pack_update(update, received).data, task)


@pytest.mark.parametrize("name", ["hetlora", "zeropad", "rbla", "flexlora", "ffa_lora", "rolora", "full"])
def test_a_federation_over_the_wire_is_the_one_without(name):
    method = METHODS[name]()
    ranks = (1, 1, 1) if name == "full" else (2, 5, FULL)
    clients = [Client(client, rank, 10) for client, rank in zip("abc", ranks, strict=True)]
    devices, states = Devices(), []
    for engine in (devices, FakeEngine(trained)):
        [*_, (state, report)] = run_rounds(start_of(method), method, engine, lambda _: clients, 4)
        assert len(report.clients) == 3
        states.append(state)
    assert_same_state(*states)
    halved = read_header(memoryview(devices.down[-1]), "task").factors != "AB"
    assert halved == (name in ("ffa_lora", "rolora", "full"))


# How long it can be -------------------------------------------------------------------------------------------------


@laws
@given(updates(), st.sampled_from(list(CODECS)), st.sampled_from(["", "A", "B", "AB"]), st.data())
def test_no_honest_answer_is_longer_than_the_bound(update, precision, sends, draw):
    sane = map_tensors(lambda f: f.nan_to_num(0.5).clamp(-1e30, 1e30), update.adapter)
    task = answered(replace(update, adapter=sane), sends=sends)
    pruned = {name: draw.draw(st.integers(1, A.shape[0])) for name, (A, _) in sane.items()}
    honest = replace(update, adapter=truncate(sane, pruned), rank=pruned, examples=10**12, steps=10**12)
    length = len(pack_update(honest, task, precision=precision).data)
    assert length <= max_update_bytes(task, precision)


@pytest.mark.parametrize("precision", list(CODECS))
def test_the_bound_is_tight(precision):
    adapter = {f"model.layers.{i}.self_attn.q_proj": pair(8, out=64, width=64) for i in range(24)}
    task = TrainTask("ana", 0, 8, adapter)
    length = len(pack_update(ClientUpdate("ana", 0, 8, adapter, 10, 5, 1.5), task, precision=precision).data)
    assert length <= max_update_bytes(task, precision) <= length + 500 * len(adapter)
    assert num_bytes(adapter) < max_update_bytes(task) < MOST_HEADER


def test_the_bound_holds_where_thousands_of_modules_share_a_stack():
    """Every module in a stack of its own would take a longer header than is read; the honest message is far from it."""
    adapter = {f"model.layers.{index}.self_attn.q_proj": pair(1, out=1, width=1) for index in range(4000)}
    task = TrainTask("ana", 0, 1, adapter)
    length = len(pack_update(ClientUpdate("ana", 0, 1, adapter, 10, 5, 1.5), task).data)
    assert length < MOST_HEADER / 2
    assert length <= max_update_bytes(task) <= MOST_HEADER + 8 + num_bytes(adapter)
