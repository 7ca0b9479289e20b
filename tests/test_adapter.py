"""Laws of the adapter algebra, over ranks, shapes and leading batch dimensions."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drawn_examples import examples
from hetlora.core.adapter import (
    BLOCK,
    FlatAdapter,
    LoraPair,
    ModuleShape,
    batch,
    delta,
    delta_norm,
    map_tensors,
    num_bytes,
    pad,
    product_norm,
    stack,
    tail,
    tail_norm,
    truncate,
    unbatch,
    zeros,
)
from hetlora.errors import ShapeError

laws = examples(40)

seeds = st.integers(0, 2**32 - 1)
ranks = st.integers(1, 6)
leadings = st.lists(st.integers(1, 3), max_size=2).map(tuple)
shapes = st.dictionaries(
    st.sampled_from(["q_proj", "v_proj", "down_proj"]),
    st.builds(ModuleShape, st.integers(1, 7), st.integers(1, 7)),
    min_size=1,
)


def random_adapter(shape, rank, leading=(), *, seed=0, dtype=torch.float32):
    """Normal factors; `rank` is one number or one a module."""
    rng = np.random.default_rng(seed)
    return map_tensors(
        lambda factor: torch.from_numpy(rng.standard_normal(tuple(factor.shape))).to(dtype),
        zeros(shape, rank, leading=leading),
    )


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name].A, other[name].A), name
        assert torch.equal(one[name].B, other[name].B), name


def dense(pair):
    """The product `B A` in NumPy, float64."""
    return pair.B.detach().double().numpy() @ pair.A.detach().double().numpy()


def reference_norm(adapter):
    """`sqrt(Σ_modules ‖B A‖²)` from the dense products: what delta_norm must equal without forming them."""
    return np.sqrt(sum((dense(pair) ** 2).sum(axis=(-2, -1)) for pair in adapter.values()))


def reference_tail(adapter, start):
    """`Σ_modules ‖B[:, start:]‖ ‖A[start:]‖` of one client without batch dimensions, in float64."""
    total = 0.0
    for name, (A, B) in adapter.items():
        first = start if isinstance(start, int) else start[name]
        a, b = A.double().numpy()[first:], B.double().numpy()[:, first:]
        total += np.sqrt((a**2).sum()) * np.sqrt((b**2).sum())
    return total


# Slots: truncate, pad, tail, stack ---------------------------------------------------------------------------------


@laws
@given(shapes, st.data(), leadings, seeds)
def test_truncating_what_was_padded_gives_it_back(shape, data, leading, seed):
    rank = {name: data.draw(ranks) for name in shape}
    wider = {name: slots + data.draw(st.integers(0, 4)) for name, slots in rank.items()}
    adapter = random_adapter(shape, rank, leading, seed=seed)
    assert_same(truncate(pad(adapter, wider), rank), adapter)


@laws
@given(shapes, ranks, st.integers(0, 4), leadings, seeds)
def test_padding_keeps_the_product_and_its_norm(shape, rank, more, leading, seed):
    adapter = random_adapter(shape, rank, leading, seed=seed)
    padded = pad(adapter, rank + more)
    for name in shape:
        assert padded[name].A.shape == (*leading, rank + more, shape[name].in_features)
        assert padded[name].B.shape == (*leading, shape[name].out_features, rank + more)
        torch.testing.assert_close(delta(padded[name]), delta(adapter[name]))
    torch.testing.assert_close(delta_norm(padded), delta_norm(adapter), rtol=1e-12, atol=0.0)


@laws
@given(shapes, ranks, st.integers(1, 4), leadings, seeds)
def test_padded_slots_are_exactly_zero(shape, rank, more, leading, seed):
    for A, B in tail(pad(random_adapter(shape, rank, leading, seed=seed), rank + more), rank).values():
        assert A.shape[-2] == B.shape[-1] == more
        assert not A.any()
        assert not B.any()


@laws
@given(shapes, st.data(), leadings, seeds)
def test_head_and_tail_partition_the_product(shape, data, leading, seed):
    adapter = random_adapter(shape, 6, leading, seed=seed)
    cut = {name: data.draw(st.integers(0, 6)) for name in shape}
    head, rest = truncate(adapter, cut), tail(adapter, cut)
    for name in shape:
        np.testing.assert_allclose(dense(head[name]) + dense(rest[name]), dense(adapter[name]), atol=1e-13)
    assert_same(stack([head, rest]), adapter)


@laws
@given(shapes, st.lists(ranks, min_size=1, max_size=4), leadings, seeds)
def test_stacking_adds_the_products(shape, each, leading, seed):
    adapters = [random_adapter(shape, rank, leading, seed=seed + i) for i, rank in enumerate(each)]
    stacked = stack(adapters)
    for name in shape:
        assert stacked[name].A.shape[-2] == sum(each)
        np.testing.assert_allclose(dense(stacked[name]), sum(dense(one[name]) for one in adapters), atol=1e-12)


# Batches -----------------------------------------------------------------------------------------------------------


@laws
@given(shapes, st.data(), st.integers(1, 4), leadings, seeds)
def test_unbatch_is_the_inverse_of_batch_for_mixed_ranks(shape, data, count, leading, seed):
    each = [{name: data.draw(ranks) for name in shape} for _ in range(count)]
    adapters = [random_adapter(shape, rank, leading, seed=seed + i) for i, rank in enumerate(each)]
    together = batch(adapters)
    for name in shape:
        widest = max(rank[name] for rank in each)
        assert together[name].A.shape == (count, *leading, widest, shape[name].in_features)
        assert together[name].B.shape == (count, *leading, shape[name].out_features, widest)
    for one, back in zip(adapters, unbatch(together, each), strict=True):
        assert_same(back, one)


def test_unbatch_gives_copies_so_that_a_client_cannot_change_the_batch():
    together = batch([random_adapter({"m": ModuleShape(2, 3)}, rank) for rank in (1, 2)])
    before = map_tensors(torch.clone, together)
    for client in unbatch(together, [1, 2]):
        map_tensors(torch.Tensor.zero_, client)
    assert_same(together, before)


@laws
@given(shapes, st.integers(1, 4), seeds)
def test_a_batch_measures_every_client_as_that_client_alone(shape, count, seed):
    # Padding to the widest rank must not leak from one client into another.
    adapters = [random_adapter(shape, 1 + i, seed=seed + i) for i in range(count)]
    alone = torch.stack([delta_norm(one) for one in adapters])
    torch.testing.assert_close(delta_norm(batch(adapters)), alone, rtol=1e-12, atol=0.0)


@laws
@given(shapes, leadings, seeds)
def test_no_function_changes_what_it_is_given(shape, leading, seed):
    adapter = random_adapter(shape, 4, leading, seed=seed)
    before = map_tensors(torch.clone, adapter)
    truncate(adapter, 2)
    pad(adapter, 6)
    tail(adapter, 1)
    stack([adapter, adapter])
    unbatch(batch([adapter, adapter]), [1, 4])
    delta_norm(adapter)
    tail_norm(adapter, 2)
    num_bytes(adapter)
    zeros(shape, 2)
    assert_same(adapter, before)


# Norms -------------------------------------------------------------------------------------------------------------


@laws
@given(shapes, ranks, leadings, seeds)
def test_delta_norm_equals_the_norm_of_the_dense_products(shape, rank, leading, seed):
    adapter = random_adapter(shape, rank, leading, seed=seed)
    norm = delta_norm(adapter)
    assert norm.dtype == torch.float64
    assert norm.shape == leading
    np.testing.assert_allclose(norm.numpy(), reference_norm(adapter), rtol=1e-6)


@examples(300)
@given(st.integers(1, 20), st.integers(1, 20), ranks, st.floats(-6.5, -1.0), seeds)
def test_delta_norm_keeps_its_digits_where_slots_cancel(out, width, rank, power, seed):
    # B = [b, -b] and A = [a; a + t d] leave only -t b d of the product: float32 Gram matrices lose it at t = 1e-4,
    # float64 ones at 1e-8, and the threshold between Gram and QR lies within the powers drawn here.
    rng = np.random.default_rng(seed)
    b, a, d = (
        torch.from_numpy(rng.standard_normal(size)).float() for size in ((out, rank), (rank, width), (rank, width))
    )
    pair = LoraPair(torch.cat([a, a + 10.0**power * d]), torch.cat([b, -b], dim=1))
    # At the smallest t float32 may round t d away altogether; what is left is then float64's own rounding.
    rounding = 1e-14 * float(torch.linalg.vector_norm(pair.A) * torch.linalg.vector_norm(pair.B))
    np.testing.assert_allclose(float(delta_norm({"m": pair})), reference_norm({"m": pair}), rtol=1e-6, atol=rounding)


def test_float32_gram_matrices_would_lose_the_cancelling_product():
    # The reason for float64 and QR: without it, the law above has no teeth.
    rng = np.random.default_rng(0)
    b, a, d = (torch.from_numpy(rng.standard_normal(size)).float() for size in ((30, 2), (2, 40), (2, 40)))
    A, B = torch.cat([a, a + 1e-4 * d]), torch.cat([b, -b], dim=1)
    naive = float(((A @ A.mT) * (B.mT @ B)).sum().clamp_min(0.0).sqrt())
    exact = float(reference_norm({"m": LoraPair(A, B)}))
    assert abs(naive - exact) > 0.1 * exact
    assert float(product_norm(LoraPair(A, B))) == pytest.approx(exact, rel=1e-6)


@laws
@given(leadings, seeds)
def test_delta_norm_finds_the_cancelling_clients_of_a_batch(leading, seed):
    # One client in a batch cancels, its neighbours do not, one is zero: each is measured as if alone.
    rng = np.random.default_rng(seed)
    A = torch.from_numpy(rng.standard_normal((*leading, 3, 4, 5))).float()
    B = torch.from_numpy(rng.standard_normal((*leading, 3, 6, 4))).float()
    A[..., 0, 2:, :] = A[..., 0, :2, :] * (1 + 2.0**-20)
    B[..., 0, :, 2:] = -B[..., 0, :, :2]
    B[..., 1, :, :] = 0.0
    norm = delta_norm({"m": LoraPair(A, B)}).numpy()
    np.testing.assert_allclose(norm, reference_norm({"m": LoraPair(A, B)}), rtol=1e-6)
    assert (norm[..., 1] == 0.0).all()


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e30])
def test_delta_norm_neither_overflows_nor_vanishes(size):
    pair = LoraPair(torch.full((1, 4), size), torch.full((9, 1), size))  # 36 entries of size², and sqrt(36) = 6
    assert float(delta_norm({"m": pair})) == pytest.approx(6.0 * float(pair.A[0, 0]) ** 2, rel=1e-12)


def exactly(pair):
    """`‖B A‖` where products and sums are rounded at 2⁻⁶⁴: NumPy's longdouble."""
    product = pair.B.numpy().astype(np.longdouble) @ pair.A.numpy().astype(np.longdouble)
    return float(np.sqrt((product**2).sum(axis=(-2, -1)).astype(np.longdouble)))


@examples(300)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 48),
    st.sampled_from(["normal", "equal", "positive", "one direction", "dynamic range", "denormal", "half zero"]),
    st.floats(-7.0, 0.0),
    seeds,
)
def test_product_norm_against_longdouble(out, width, rank, kind, power, seed):
    # Ranks above both dimensions included. Slots come in pairs that cancel but for a share of 10**power.
    rng = np.random.default_rng(seed)
    b, a, d = rng.standard_normal((out, rank)), rng.standard_normal((rank, width)), rng.standard_normal((rank, width))
    if kind == "equal":  # float32 rounds every partial sum of such products the same way
        b, a = np.full_like(b, 0.1), np.full_like(a, 0.3)
    elif kind == "positive":
        b, a = abs(b), abs(a)
    elif kind == "one direction":
        b, a = b[:, :1] + 1e-3 * b, a[:1] + 1e-3 * a
    elif kind == "dynamic range":
        size = 10.0 ** rng.uniform(-15, 15, rank)
        b, a = b * size, a / size[:, None]
    elif kind == "denormal":
        b, a, d = b * 1e-42, a * 1e-42, d * 1e-42
    elif kind == "half zero":
        b[:, ::2] = 0.0
    B = torch.from_numpy(np.concatenate([b, -b], axis=1)).float()
    A = torch.from_numpy(np.concatenate([a, a + 10.0**power * d])).float()
    for pair in (LoraPair(A, B), LoraPair(A[:rank], B[:, :rank])):
        # Where float32 rounds the difference away altogether, what is left is float64's rounding of the slots.
        slots = float(
            (torch.linalg.vector_norm(pair.A.double(), dim=1) * torch.linalg.vector_norm(pair.B.double(), dim=0)).sum()
        )
        assert float(product_norm(pair)) == pytest.approx(exactly(pair), rel=1e-6, abs=1e-14 * slots)


def test_product_norm_is_exact_where_a_factor_takes_several_blocks():
    width = BLOCK // 8 + 5  # of 16 slots, so that the columns do not fit a block
    pair = LoraPair(torch.full((16, width), 0.1), torch.full((3, 16), 0.7))
    exact = 16 * float(pair.A[0, 0]) * float(pair.B[0, 0]) * (3 * width) ** 0.5
    assert float(product_norm(pair)) == pytest.approx(exact, rel=1e-12)
    many = LoraPair(pair.A.expand(3, 16, width), pair.B.expand(3, 3, 16))
    np.testing.assert_allclose(product_norm(many), exact, rtol=1e-12)


@pytest.mark.parametrize("leading", [(), (2,)])
def test_product_norm_of_no_slots_is_zero(leading):
    norm = product_norm(LoraPair(torch.zeros(*leading, 0, 3), torch.zeros(*leading, 2, 0)))
    assert norm.shape == leading
    assert not norm.any()


@laws
@given(st.integers(1, 4), leadings, seeds)
def test_product_norm_has_the_gradient_of_the_dense_norm(rank, leading, seed):
    pair = random_adapter({"m": ModuleShape(4, 5)}, rank, leading, seed=seed, dtype=torch.float64)["m"]
    live = LoraPair(*(factor.requires_grad_() for factor in pair))
    ours = torch.autograd.grad(product_norm(live).sum(), live)
    dense_norm = torch.linalg.matrix_norm(live.B @ live.A).sum()
    for mine, its in zip(ours, torch.autograd.grad(dense_norm, live), strict=True):
        torch.testing.assert_close(mine, its)


# Stacks ------------------------------------------------------------------------------------------------------------


def test_stacked_modules_are_views_that_measure_like_modules_apart():
    numbers = torch.arange(2 * (2 * 3 + 4 * 2) + 2 * (3 + 5), dtype=torch.float32).sin()
    layout = [(("q", "v"), (2, 2, 3), (2, 4, 2)), (("up", "down"), (2, 1, 3), (2, 5, 1))]
    stacked = FlatAdapter(numbers, layout)
    assert list(stacked) == ["q", "v", "up", "down"]
    assert stacked["v"].A.shape == (2, 3)
    assert stacked["down"].B.shape == (5, 1)
    assert torch.equal(torch.cat([factor.flatten() for _, pair in stacked.stacks for factor in pair]), numbers)
    torch.testing.assert_close(delta_norm(stacked), delta_norm(dict(stacked)), rtol=1e-14, atol=0.0)
    numbers[6] = 7.0
    assert float(stacked["v"].A[0, 0]) == 7.0


@laws
@given(shapes, st.integers(0, 6), seeds)
def test_tail_norm_with_one_start_for_all(shape, start, seed):
    adapter = random_adapter(shape, 6, seed=seed)
    np.testing.assert_allclose(float(tail_norm(adapter, start)), reference_tail(adapter, start), rtol=1e-5)


@laws
@given(shapes, st.data(), seeds)
def test_tail_norm_with_a_start_per_module(shape, data, seed):
    adapter = random_adapter(shape, 6, seed=seed)
    start = {name: data.draw(st.integers(0, 6)) for name in shape}
    np.testing.assert_allclose(float(tail_norm(adapter, start)), reference_tail(adapter, start), rtol=1e-5)


@laws
@given(shapes, st.data(), st.integers(1, 4), seeds)
def test_tail_norm_with_a_start_per_client(shape, data, count, seed):
    # Clients of different ranks at one padded rank, each with a tail of its own, measured as if alone.
    each = [{name: data.draw(ranks) for name in shape} for _ in range(count)]
    starts = [{name: data.draw(st.integers(0, rank[name])) for name in shape} for rank in each]
    adapters = [random_adapter(shape, rank, seed=seed + i) for i, rank in enumerate(each)]
    per_client = {name: torch.tensor([start[name] for start in starts]) for name in shape}
    expected = [reference_tail(one, start) for one, start in zip(adapters, starts, strict=True)]
    np.testing.assert_allclose(tail_norm(batch(adapters), per_client).numpy(), expected, rtol=1e-5)


PER_CLIENT = {"q_proj": torch.tensor([1, 2, 3]), "v_proj": torch.tensor([0, 3, 1])}
STARTS = pytest.mark.parametrize(
    "start", [1, {"q_proj": 2, "v_proj": 0}, PER_CLIENT], ids=["one", "per module", "per client"]
)


def live(adapter):
    """The factors as leaves that want gradients, in a flat tuple, and the way back to an adapter."""
    flat = [factor.clone().requires_grad_() for pair in adapter.values() for factor in pair]

    def build(*factors):
        pairs = zip(factors[::2], factors[1::2], strict=True)
        return {name: LoraPair(A, B) for name, (A, B) in zip(adapter, pairs, strict=True)}

    return flat, build


@STARTS
def test_the_gradient_of_tail_norm_equals_finite_differences(start):
    # Start 3 of 3 slots is an empty tail: its product is zero and so is its gradient.
    shape = {"q_proj": ModuleShape(2, 3), "v_proj": ModuleShape(4, 2)}
    factors, build = live(random_adapter(shape, 3, (3,), seed=5, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *flat: tail_norm(build(*flat), start), factors)


@STARTS
@pytest.mark.parametrize("zero", ["B", "both"])
def test_the_gradient_of_tail_norm_is_finite_where_lora_starts(start, zero):
    # LoRA starts at B = 0; the root of a sum of squares has a NaN gradient there, and one NaN takes the federation.
    shape = {"q_proj": ModuleShape(2, 3), "v_proj": ModuleShape(4, 2)}
    adapter = {
        name: LoraPair(torch.zeros_like(A) if zero == "both" else A, torch.zeros_like(B))
        for name, (A, B) in random_adapter(shape, 3, (3,), seed=5).items()
    }
    factors, build = live(adapter)
    value = tail_norm(build(*factors), start)
    value.sum().backward()
    assert (value == 0.0).all()
    for factor in factors:
        assert (factor.grad == 0.0).all()  # NaN fails this too


# Errors and bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [5, -1])
def test_truncate_names_the_module_and_both_ranks(rank):
    adapter = random_adapter({"q_proj": ModuleShape(2, 3), "v_proj": ModuleShape(2, 3)}, {"q_proj": 9, "v_proj": 4})
    with pytest.raises(ShapeError, match=f"v_proj: cannot truncate 4 slots to rank {rank};"):
        truncate(adapter, {"q_proj": 9, "v_proj": rank})


def test_pad_names_the_module_and_both_ranks():
    adapter = random_adapter({"q_proj": ModuleShape(2, 3), "v_proj": ModuleShape(2, 3)}, {"q_proj": 1, "v_proj": 4})
    with pytest.raises(ShapeError, match="v_proj: cannot pad 4 slots to rank 3;"):
        pad(adapter, 3)


@pytest.mark.parametrize("join", [stack, batch])
def test_joining_adapters_of_different_modules_names_the_difference(join):
    one = random_adapter({"q_proj": ModuleShape(2, 3), "v_proj": ModuleShape(2, 3)}, 1)
    other = random_adapter({"q_proj": ModuleShape(2, 3), "k_proj": ModuleShape(2, 3)}, 1)
    with pytest.raises(ShapeError, match=re.escape("only one side has k_proj, v_proj")):
        join([one, other])


@laws
@given(shapes, ranks, leadings, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_num_bytes_counts_every_number_at_its_size(shape, rank, leading, dtype):
    numbers = sum(rank * (out + width) for out, width in shape.values()) * int(np.prod(leading, dtype=int))
    size = {torch.float32: 4, torch.bfloat16: 2, torch.float64: 8}[dtype]
    assert num_bytes(zeros(shape, rank, leading=leading, dtype=dtype)) == numbers * size


@laws
@given(shapes, ranks, st.integers(0, 5))
def test_a_truncated_adapter_travels_in_proportion_to_its_rank(shape, rank, more):
    # The views of truncate count their own numbers, not those of the wide adapter behind them.
    wide = zeros(shape, rank + more)
    assert num_bytes(truncate(wide, rank)) == num_bytes(zeros(shape, rank))


def test_the_norm_of_slots_that_cancel_depends_on_no_thread():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(8, 20_000, generator=generator), torch.randn(20_000, 8, generator=generator)
    A[4:] = A[:4] + 1e-7 * torch.randn(4, 20_000, generator=generator)
    B[:, 4:] = -B[:, :4]
    norms = set()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            norms.add(float(delta_norm({"m": LoraPair(A, B)})))
        finally:
            torch.set_num_threads(1)
    assert len(norms) == 1


def test_the_order_of_modules_changes_no_bit_of_a_tails_norm():
    """It decides whether a client prunes, and over the wire modules come in another order than in process."""
    generator = torch.Generator().manual_seed(0)
    adapter = {
        f"m{number:02d}": LoraPair(torch.randn(4, 5, generator=generator), torch.randn(6, 4, generator=generator))
        for number in range(40)
    }
    turned = dict(reversed(adapter.items()))
    for start in (0, 1, 2, 3):
        assert torch.equal(tail_norm(adapter, start), tail_norm(turned, start))
