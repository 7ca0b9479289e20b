"""Codecs: the rounding error stays within its bound, and error feedback loses nothing permanently."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drawn_examples import examples
from hetlora.core.adapter import FlatAdapter, LoraPair, map_tensors, pad, truncate
from hetlora.core.admission import admit
from hetlora.core.codecs import dequantize_slots, quantize_slots
from hetlora.core.types import ClientUpdate, TrainTask
from hetlora.errors import RefusedUpdateError, WireError
from hetlora.flower.wire.codec import pack_task, pack_update, parse_task, parse_update
from hetlora.flower.wire.numbers import compress, decompress

laws = examples(60)
LOSSY = ["bfloat16", "int8"]
WIDTH, OUT = 4, 3


def drawn(rank, seed, scale=1.0):
    """An adapter of modules with ranks of their own; two of them are of one shape."""
    rng = torch.Generator().manual_seed(seed)
    ranks = rank if isinstance(rank, dict) else dict.fromkeys(("q", "v", "up"), rank)
    outs = {"q": OUT, "v": OUT, "up": 5}
    return {
        name: LoraPair(scale * torch.randn(r, WIDTH, generator=rng), scale * torch.randn(outs[name], r, generator=rng))
        for name, r in ranks.items()
    }


def difference(one, other):
    return {name: LoraPair(A - other[name].A, B - other[name].B) for name, (A, B) in one.items()}


def plus(one, other):
    return difference(one, map_tensors(torch.neg, other))


def float64(adapter):
    return {
        (name, letter): f.double().numpy() for name, p in adapter.items() for letter, f in zip("AB", p, strict=True)
    }


# A scale a slot -----------------------------------------------------------------------------------------------------


def test_int8_by_hand():
    A = torch.tensor([[1.27, -0.635, 0.0], [0.0, 0.0, 0.0], [127.0, 0.5, 1.5]])
    q, scale = quantize_slots(A, "A")
    torch.testing.assert_close(scale, torch.tensor([0.01, 0.0, 1.0]))
    assert q[1:].tolist() == [[0, 0, 0], [127, 0, 2]]  # halves go to the even neighbour
    assert q[0, 0] == 127
    back = dequantize_slots(q, scale, "A")
    assert torch.equal(back[1], torch.zeros(3))
    # B's slots are its columns: the same numbers, transposed.
    q_b, scale_b = quantize_slots(A.mT.contiguous(), "B")
    assert torch.equal(q_b, q.mT)
    assert torch.equal(scale_b, scale)
    assert torch.equal(dequantize_slots(q_b, scale_b, "B"), back.mT)


large, small = 2.0**127, 2.0**-116
numbers = st.one_of(st.floats(-bound, bound, width=32) for bound in (large, 1.0, small))


@examples(400)
@given(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=5), st.sampled_from("AB"))
def test_int8_is_within_half_a_scale(rows, letter):
    factor = torch.tensor(rows) if letter == "A" else torch.tensor(rows).mT.contiguous()
    q, scale = quantize_slots(factor, letter)
    assert int(q.abs().max()) <= 127
    back = dequantize_slots(q, scale, letter)
    x, y = (f.double().numpy() if letter == "A" else f.double().numpy().T for f in (factor, back))
    largest = np.abs(x).max(axis=1)
    np.testing.assert_allclose(scale.numpy(), np.where(largest < 127 * 2.0**-126, 0.0, largest / 127), rtol=2.0**-23)
    bound = np.maximum(scale.double().numpy() / 2 * (1 + 2.0**-15), 127 * 2.0**-126)
    assert (np.abs(x - y) <= bound[:, None]).all()
    assert (y[x == 0.0] == 0.0).all()


@laws
@given(st.integers(0, 100), st.sampled_from(["A", "B", "AB"]))
def test_stacks_are_compressed_like_each_module_by_itself(seed, factors):
    adapter = drawn({"q": 2, "v": 2, "up": 3}, seed)
    layout = ((("q", "v"), (2, 2, WIDTH), (2, OUT, 2)), (("up",), (1, 3, WIDTH), (1, 5, 3)))
    flat = [
        f.flatten() for names, *_ in layout for letter in "AB" for f in [getattr(adapter[n], letter) for n in names]
    ]
    stacked = FlatAdapter(torch.cat(flat), layout)
    expected = [
        dequantize_slots(*quantize_slots(getattr(adapter[name], letter), letter), letter).flatten()
        for names, *_ in layout
        for letter in factors
        for name in names
    ]
    assert torch.equal(decompress(compress(stacked, "int8", factors)), torch.cat(expected))
    exact = [getattr(adapter[name], letter).flatten() for names, *_ in layout for letter in factors for name in names]
    assert torch.equal(decompress(compress(stacked, "float32", factors)), torch.cat(exact))
    assert torch.equal(decompress(compress(stacked, "bfloat16", factors)), torch.cat(exact).bfloat16().float())


# What is not finite -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", LOSSY)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_sent(value, precision):
    task = TrainTask("ana", 0, 2, drawn(2, 0))
    broken = map_tensors(torch.clone, drawn(2, 1))
    broken["v"].B[0, 1] = value
    with pytest.raises(WireError, match=f"client 'ana' holds a number that is not finite, or not in {precision}"):
        pack_update(ClientUpdate("ana", 0, 2, broken, 10, 3, 1.0), task, precision=precision)
    with pytest.raises(WireError, match="the task of client 'ana' holds a number that is not finite"):
        pack_task(replace(task, adapter=broken), precision=precision)


@pytest.mark.parametrize("precision", LOSSY)
def test_a_change_that_overflows_is_not_sent(precision):
    task = TrainTask("ana", 0, 1, {"q": LoraPair(torch.full((1, 4), -3e38), torch.zeros(3, 1))})
    update = ClientUpdate("ana", 0, 1, {"q": LoraPair(torch.full((1, 4), 3e38), torch.zeros(3, 1))}, 10, 3, 1.0)
    with pytest.raises(WireError, match="not finite"):
        pack_update(update, task, precision=precision)


def test_a_number_that_bfloat16_rounds_to_infinity_is_not_sent():
    largest = torch.finfo(torch.float32).max
    task = TrainTask("ana", 0, 1, {"q": LoraPair(torch.full((1, 4), largest), torch.zeros(3, 1))})
    with pytest.raises(WireError, match="not in bfloat16"):
        pack_task(task, precision="bfloat16")


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan])
def test_a_scale_that_is_not_finite_is_seen_by_the_admission(scale):
    task = TrainTask("ana", 0, 2, drawn(2, 0))
    data = bytearray(pack_update(ClientUpdate("ana", 0, 2, drawn(2, 1), 10, 3, 1.0), task, precision="int8").data)
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin : begin + 4] = np.float32(scale).tobytes()  # of slot 0 of q's A
    arrived = parse_update(data, task)
    with pytest.raises(RefusedUpdateError, match=r"q\.A: holds an infinity or NaN"):
        admit(arrived, {"ana": task}, ())


def test_a_scale_whose_products_overflow_is_seen_by_the_admission():
    task = TrainTask("ana", 0, 2, drawn(2, 0))
    data = bytearray(pack_update(ClientUpdate("ana", 0, 2, drawn(2, 1), 10, 3, 1.0), task, precision="int8").data)
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin : begin + 4] = np.float32(3e38).tobytes()
    with pytest.raises(RefusedUpdateError, match=r"q\.A: holds an infinity or NaN"):
        admit(parse_update(data, task), {"ana": task}, ())


# An update is a change ----------------------------------------------------------------------------------------------


@laws
@given(st.integers(0, 1000), st.sampled_from(LOSSY), st.sampled_from([2, {"q": 2, "v": 1, "up": 3}]))
def test_a_compressed_update_is_the_change_within_the_bound(seed, precision, rank):
    task = TrainTask("ana", 0, 3, drawn(3, seed))
    update = ClientUpdate("ana", 0, rank, truncate(plus(task.adapter, drawn(3, seed + 1, 0.01)), rank), 10, 3, 1.0)
    arrived = parse_update(pack_update(update, task, precision=precision).data, task)
    admit(arrived, {"ana": task}, ())
    change, came = (float64(difference(u.adapter, truncate(task.adapter, rank))) for u in (update, arrived))
    for (name, letter), meant in change.items():
        axis = 1 if letter == "A" else 0
        largest = np.abs(meant).max(axis=axis, keepdims=True)
        bound = largest / 254 if precision == "int8" else np.abs(meant) * 2.0**-8
        # The sum with the server's numbers, of size 4 at most, is rounded to float32.
        assert (np.abs(meant - came[name, letter]) <= bound + 2.0**-21).all(), (name, letter)


@laws
@given(st.integers(0, 1000), st.sampled_from(LOSSY), st.sampled_from(LOSSY))
def test_the_error_of_a_compressed_task_does_not_enter_the_update(seed, down, up):
    task = TrainTask("ana", 0, 3, drawn(3, seed))
    received = parse_task(pack_task(task, precision=down))
    lost = difference(received.adapter, task.adapter)
    assert max(float(f.abs().max()) for pair in lost.values() for f in pair) > 1e-4
    # Who changes nothing gives the server its own numbers back, and not those that arrived.
    idle = ClientUpdate("ana", 0, 2, truncate(received.adapter, 2), 10, 3, 1.0)
    came = parse_update(pack_update(idle, received, precision=up).data, task)
    for name, pair in truncate(task.adapter, 2).items():
        assert torch.equal(came.adapter[name].A, pair.A)
        assert torch.equal(came.adapter[name].B, pair.B)
    # A change that every precision holds arrives whole, on top of the server's numbers.
    step = map_tensors(lambda f: torch.full_like(f, 0.5), received.adapter)
    moved = replace(idle, rank=3, adapter=plus(received.adapter, step))
    came = parse_update(pack_update(moved, received, precision=up).data, task)
    for key, whole in float64(plus(task.adapter, step)).items():
        np.testing.assert_allclose(float64(came.adapter)[key], whole, atol=1e-5)


def test_an_update_in_float32_is_absolute_whatever_the_task_lost():
    task = TrainTask("ana", 0, 3, drawn(3, 0))
    received = parse_task(pack_task(task, precision="int8"))
    owed = drawn(3, 5)
    packed = pack_update(
        ClientUpdate("ana", 0, 3, received.adapter, 10, 3, 1.0), received, precision="float32", residual=owed
    )
    assert packed.residual is owed
    arrived = parse_update(packed.data, task)
    assert torch.equal(arrived.adapter["q"].A, received.adapter["q"].A)
    assert not torch.equal(arrived.adapter["q"].A, task.adapter["q"].A)


def test_a_frozen_factor_comes_back_bit_for_bit():
    task = TrainTask("ana", 0, 3, drawn(3, 0), trains="B")
    received = parse_task(pack_task(task, precision="int8"))
    trained = {name: LoraPair(A, B + 0.1) for name, (A, B) in received.adapter.items()}
    arrived = parse_update(
        pack_update(ClientUpdate("ana", 0, 3, trained, 10, 3, 1.0), received, precision="int8").data, task
    )
    assert admit(arrived, {"ana": task}, ()) is task  # which compares A with what the server sent


# Error feedback -----------------------------------------------------------------------------------------------------


@laws
@given(
    st.integers(0, 1000),
    st.sampled_from(LOSSY),
    st.lists(st.integers(1, 3), min_size=2, max_size=6).map(lambda ranks: sorted(ranks, reverse=True)),
)
def test_what_was_reconstructed_differs_from_what_was_meant_by_the_last_residual_only(seed, precision, ranks):
    """Of the slots that were kept to the end: `Σ_t (A_t^ - A_server) + e_T = Σ_t (A_t - A_received)`."""
    last = ranks[-1]
    meant = dict.fromkeys(float64(drawn(last, 0)), 0.0)
    sent = dict(meant)
    residual = None
    for number, rank in enumerate(ranks):
        task = TrainTask("ana", number, 3, drawn(3, seed + number))
        received = parse_task(pack_task(task, precision=precision))
        change = drawn(3, seed + number + 500, 0.01)
        update = ClientUpdate("ana", number, rank, truncate(plus(received.adapter, change), rank), 10, 3, 1.0)
        data, residual = pack_update(update, received, precision=precision, residual=residual)
        assert {pair.A.shape[0] for pair in residual.values()} == {rank}
        arrived = parse_update(data, task)
        for sums, after, before in ((meant, update, received), (sent, arrived, task)):
            one, other = float64(truncate(after.adapter, last)), float64(truncate(before.adapter, last))
            for key in sums:
                sums[key] = sums[key] + one[key] - other[key]
    for key, left in float64(truncate(residual, last)).items():
        np.testing.assert_allclose(sent[key] + left, meant[key], atol=len(ranks) * 2.0**-21)
    without = max(np.abs(sent[key] - meant[key]).max() for key in sent)
    assert without > 1e-6  # so that the residual is not all zeros


def test_feedback_makes_good_what_one_round_is_too_coarse_for():
    # A change of 0.004 is nothing beside one of 1.27 in the same slot, whose scale is 0.01, but it adds up.
    start = {"q": LoraPair(torch.zeros(1, 2), torch.zeros(1, 1))}
    step = {"q": LoraPair(torch.tensor([[1.27, 0.004]]), torch.zeros(1, 1))}
    arrived, residual = [], None
    for number in range(5):
        task = TrainTask("ana", number, 1, start)
        update = ClientUpdate("ana", number, 1, step, 1, 1, 1.0)
        data, residual = pack_update(update, task, precision="int8", residual=residual)
        arrived.append(round(float(parse_update(data, task).adapter["q"].A[0, 1]), 4))
    assert arrived == [0.0, 0.01, 0.0, 0.01, 0.0]
    torch.testing.assert_close(residual["q"].A, torch.tensor([[0.0, 0.0]]), atol=1e-6, rtol=0.0)


def test_the_residual_of_a_factor_that_does_not_travel_waits():
    # RoLoRA sends A in one round and B in the next.
    owed = drawn(3, 7, 0.01)
    task = TrainTask("ana", 0, 3, drawn(3, 0), sends="A")
    update = ClientUpdate("ana", 0, 2, truncate(drawn(3, 1), 2), 10, 3, 1.0)
    _, residual = pack_update(update, task, precision="int8", residual=owed)
    assert torch.equal(residual["up"].B, owed["up"].B[:, :2])
    assert not torch.equal(residual["up"].A, owed["up"].A[:2])
    _, first = pack_update(update, task, precision="int8")
    assert torch.equal(first["up"].B, torch.zeros(5, 2))


@pytest.mark.parametrize("sends", ["AB", "B"])
def test_the_residual_of_a_frozen_factor_waits(sends):
    """RoLoRA trains A in one round and B in the next: what is owed to A must not change it while it is frozen."""
    owed = drawn(3, 7, 0.01)
    task = TrainTask("ana", 0, 3, drawn(3, 0), trains="B", sends=sends)
    adapter = {name: LoraPair(pair.A, drawn(3, 1)[name].B) for name, pair in task.adapter.items()}
    update = ClientUpdate("ana", 0, 3, adapter, 10, 3, 1.0)
    data, left = pack_update(update, task, precision="int8", residual=owed)
    arrived = parse_update(data, task)
    assert admit(arrived, {"ana": task}, ()) is task
    for name, pair in owed.items():
        assert torch.equal(left[name].A, pair.A), name
        meant = adapter[name].B - task.adapter[name].B + pair.B
        torch.testing.assert_close(
            arrived.adapter[name].B - task.adapter[name].B + left[name].B, meant, atol=1e-5, rtol=0
        )
        assert left[name].B.abs().max() > 0.0


def test_a_residual_of_fewer_slots_owes_nothing_to_the_others():
    # The pruned answer was lost on its way, so that the server asks at the old rank again.
    owed = drawn(1, 7, 0.01)
    task = TrainTask("ana", 0, 3, drawn(3, 0))
    update = ClientUpdate("ana", 0, 3, drawn(3, 1), 10, 3, 1.0)
    packed = pack_update(update, task, precision="int8", residual=owed)
    assert packed.data == pack_update(update, task, precision="int8", residual=pad(owed, 3)).data


@pytest.mark.parametrize(
    ("residual", "says"),
    [
        ({"q": drawn(2, 0)["q"]}, "only one side has up, v"),
        ({**drawn(2, 0), "up": LoraPair(torch.zeros(2, 9), torch.zeros(5, 2))}, "up has A"),
    ],
)
def test_a_residual_of_other_weights_is_refused(residual, says):
    task = TrainTask("ana", 0, 2, drawn(2, 0))
    with pytest.raises(WireError, match=f"the residual of client 'ana' does not fit its update: {says}"):
        pack_update(ClientUpdate("ana", 0, 2, drawn(2, 1), 10, 3, 1.0), task, precision="int8", residual=residual)


def test_inputs_are_never_changed():
    task, owed = TrainTask("ana", 0, 3, drawn(3, 0)), drawn(3, 7)
    update = ClientUpdate("ana", 0, 3, drawn(3, 1), 10, 3, 1.0)
    before = [map_tensors(torch.clone, adapter) for adapter in (task.adapter, owed, update.adapter)]
    data, left = pack_update(update, task, precision="int8", residual=owed)
    again = map_tensors(torch.clone, left)
    arrived = parse_update(data, task)
    pack_update(replace(update, adapter=arrived.adapter), task, precision="int8", residual=left)
    for one, other in zip([*before, again], (task.adapter, owed, update.adapter, left), strict=True):
        for name, pair in one.items():
            assert torch.equal(pair.A, other[name].A)
            assert torch.equal(pair.B, other[name].B)
