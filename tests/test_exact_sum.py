"""Exact sums equal sums of fractions up to the stated grid, in any order, grouping and number of additions."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drawn_examples import examples
from hetlora.core import exact_sum
from hetlora.core.adapter import FlatAdapter, LoraPair, ordered_delta
from hetlora.core.aggregation import FactorSum, Owners, StackedSum
from hetlora.core.exact_sum import BLOCK, SETTLE, ExactSum, Summand, tree_sum

laws = examples(60)

numbers = st.floats(allow_nan=False, allow_infinity=False, width=32) | st.floats(-1.0, 1.0, width=32)
close = st.floats(-1.0, 1.0, width=32)
weights = st.sampled_from([0.157429, 1.0, 3.0, 1e-30, 1e12]) | st.floats(2.0**-400, 2.0**400)
GRID = Fraction(2) ** -51
"""What a product may be off by, of the largest product of the sum."""


def summed(values, weights, order=None) -> torch.Tensor:
    """The sum of `w x` over rows of numbers, added in an order."""
    rows = [torch.tensor([row], dtype=torch.float32) for row in values]
    total = ExactSum(rows[0].shape)
    for index in order if order is not None else range(len(rows)):
        total.add([Summand(rows[index], weights[index])])
    return total.total()[0]


def rounded(weight: float, number: float) -> Fraction:
    return Fraction(float(np.float64(weight) * np.float64(np.float32(number))))


@laws
@given(st.data(), st.integers(1, 7), st.integers(1, 4), st.booleans())
def test_a_sum_is_that_of_fractions_up_to_its_grid(data, count, width, any_size):
    kind = numbers if any_size else close
    values = data.draw(st.lists(st.lists(kind, min_size=width, max_size=width), min_size=count, max_size=count))
    factors = data.draw(st.lists(weights, min_size=count, max_size=count))
    products = [[rounded(weight, x) for x in row] for weight, row in zip(factors, values, strict=True)]
    largest = max(abs(p) for row in products for p in row)
    total = summed(values, factors)
    for place in range(width):
        exact = sum(row[place] for row in products)
        got = Fraction(float(total[place]))
        # Each summand is off by the grid, and the result is rounded to float64 a few times.
        assert abs(got - exact) <= count * GRID * largest + abs(exact) * Fraction(2) ** -50


@laws
@given(st.data(), st.integers(2, 5), st.booleans())
def test_every_order_gives_the_same_bits(data, count, equal):
    values = data.draw(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=count, max_size=count))
    factors = [0.157429] * count if equal else data.draw(st.lists(weights, min_size=count, max_size=count))
    expected = summed(values, factors)
    for order in itertools.permutations(range(count)):
        assert torch.equal(summed(values, factors, order), expected), order


def test_equal_weights_whose_mean_lies_between_two_float32_numbers():
    """The case that a float64 sum gets wrong: the mean of two neighbours is a tie, and so is that of four."""
    one = 1.0 + 2.0**-23
    values, factors = [[1.0], [one], [1.0], [one]], [0.157429] * 4
    means = {float((summed(values, factors, order) / 0.629716).float()) for order in itertools.permutations(range(4))}
    assert len(means) == 1


@pytest.mark.parametrize("power", [-40, -26, 0, 30])
def test_a_single_tensor_comes_back_whole(power):
    generator = torch.Generator().manual_seed(power)
    tensor = torch.randn(10_000, generator=generator) * 2.0**power
    weight = 0.3
    total = summed([tensor.tolist()], [weight])
    assert torch.equal((total / weight).float(), tensor)


def test_what_is_far_below_the_largest_is_dropped_whenever_it_came():
    tiny, huge = [2.0**-100, 0.0], [0.0, 1.0]
    for values in ([tiny, huge], [huge, tiny], [tiny, tiny, huge, tiny]):
        assert summed(values, [1.0] * len(values)).tolist() == [0.0, 1.0]
    assert summed([tiny], [1.0]).tolist() == tiny


def test_more_additions_than_64_bits_hold_at_once():
    values = torch.tensor([[2.0**50, -(2.0**50), 2.0**50 - 1, 1.0]], dtype=torch.float64)
    count = 2 * SETTLE + 7
    total, other, at_once = ExactSum((1, 4)), ExactSum((1, 4)), ExactSum((1, 4))
    at_once.add([Summand(values, 1.0)] * count)
    assert torch.equal(at_once.total(), values * count)
    for number in range(count // 7 + 1):
        (total if number % 3 else other).add([Summand(values, 1.0)] * min(7, count - 7 * number))
    total.merge(other)
    assert torch.equal(total.total(), values * count)


@pytest.mark.parametrize("settle", [3, SETTLE])
def test_sums_that_were_settled_merge_rise_and_part(settle, monkeypatch):
    monkeypatch.setattr(exact_sum, "SETTLE", settle)
    values = torch.tensor([[2.0**50, -(2.0**50), 5.0], [1.0, 3.0, -(2.0**49)]], dtype=torch.float64)
    one, other = ExactSum((2, 3)), ExactSum((2, 3))
    for total in [one] * 40 + [other] * 7:
        total.add([Summand(values, 1.0)])
    one.merge(other)
    assert torch.equal(one.total(), 47 * values)
    high = torch.tensor([[2.0**60, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    one.add([Summand(high, 1.0)])
    parts = one.unbind((2, 3))
    assert torch.equal(torch.cat([part.total() for part in parts]), 47 * values + high)
    for part, row in zip(parts, values, strict=True):
        part.add([Summand(row[None], 1.0)] * 5)
    assert torch.equal(torch.cat([part.total() for part in parts]), 52 * values + high)


def test_after_many_additions_a_larger_number_drops_what_is_far_below():
    low, high = torch.tensor([[2.0**-40, 1.0]]), torch.tensor([[0.0, 2.0**55]])
    total = ExactSum((1, 2))
    total.add([Summand(low, 1.0)] * (2 * SETTLE))
    assert total.total().tolist() == [[2 * SETTLE * 2.0**-40, 2.0 * SETTLE]]
    total.add([Summand(high, 1.0)])
    assert total.total().tolist() == [[0.0, 2.0**55 + 2 * SETTLE]]


def test_each_tensor_has_grids_of_its_own():
    """One number of another tensor, however large, takes no digit away: that of a message with a flipped bit, say."""
    values = torch.tensor([[3e38, 1.0], [1e-3, 2e-9]])
    total = ExactSum((2, 2))
    total.add([Summand(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), 0.3), Summand(values, 0.3)])
    assert total.total()[0].tolist() == [float(np.float64(0.3) * np.float32(3e38)), 0.0]
    assert total.total()[1].tolist() == pytest.approx([0.3 * (1.0 + 1e-3), 0.3 * (1.0 + 2e-9)], rel=1e-9)


def test_sums_of_parts_merge_like_the_whole():
    rows = [torch.tensor([[1.0, 2.0**-30], [3.0, 4.0]]), torch.tensor([[0.1, 0.2]]), torch.tensor([[5e20, 7e-9]])]
    for order in itertools.permutations(rows):
        whole, flat, padded = ExactSum((1, 2, 2)), ExactSum((1, 1, 2)), ExactSum((1, 2, 2))
        for row in order:
            part = (slice(0, len(row)), slice(0, 2))
            whole.add([Summand(row[None], 0.7)], part)
            (padded if len(row) == 2 else flat).add([Summand(row[None], 0.7)])
        [one] = flat.unbind((1, 1, 2))
        padded.merge(one, (slice(0, 1), slice(0, 2)))
        assert torch.equal(whole.total(), padded.total())


@pytest.mark.parametrize("shape", [(1, 2 * BLOCK + 3), (3, BLOCK - 1), (BLOCK // 2 + 1, 4), (5, 3, 2)])
def test_tensors_of_several_blocks_are_added_like_each_apart(shape):
    rows = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    whole = ExactSum(shape)
    whole.add([Summand(row, 0.157429) for row in rows])
    for place in {0, shape[0] // 2, shape[0] - 1}:
        apart = ExactSum((1, *shape[1:]))
        for row in rows:
            apart.add([Summand(row[place : place + 1], 0.157429)], tuple(slice(0, size) for size in shape[1:]))
        assert torch.equal(whole.total()[place], apart.total()[0])


@pytest.mark.parametrize("number", [math.inf, math.nan, -math.inf])
def test_a_number_that_is_none_is_refused(number):
    with pytest.raises(ValueError, match="no grid"):
        ExactSum((1, 2)).add([Summand(torch.tensor([[1.0, number]]), 1.0)])


@laws
@given(st.lists(st.tuples(st.integers(1, 4), st.floats(0.0, 1e6)), min_size=1, max_size=6))
def test_weights_of_owners_are_exact_and_know_no_order(clients):
    one, other = Owners(), Owners()
    for owners, order in ((one, clients), (other, clients[::-1])):
        for rank, weight in order:
            owners.add({"m": LoraPair(torch.zeros(rank, 1), torch.zeros(1, rank))}, weight)
    assert one.weight == other.weight == float(sum(Fraction(weight) for _, weight in clients))
    assert torch.equal(one.of_slots("m", 4), other.of_slots("m", 4))
    expected = [float(sum(Fraction(weight) for rank, weight in clients if rank > slot)) for slot in range(4)]
    assert one.of_slots("m", 4).tolist() == expected
    assert one.widest == ({"m": max(r for r, w in clients if w > 0)} if any(w > 0 for _, w in clients) else {})


def test_stacked_and_plain_adapters_add_up_to_the_same_bits():
    generator = torch.Generator().manual_seed(1)
    shapes = {name: (torch.Size((4, 3)), torch.Size((5, 4))) for name in ("q", "v")}
    plain, mixed = FactorSum(shapes), FactorSum(shapes)
    for index, rank in enumerate((4, 2, 3, 4, 1, 2)):  # more layouts than have a sum of their own
        layout = [(("q", "v"), (2, rank, 3), (2, 5, rank))]
        stacked = FlatAdapter(torch.randn(2 * 8 * rank, generator=generator), layout)
        plain.add(dict(stacked), 0.157429)
        mixed.add(stacked if index % 4 else dict(stacked), 0.157429)
    for name, pair in plain.totals().items():
        for mine, its in zip(pair, mixed.totals()[name], strict=True):
            assert torch.equal(mine, its), name


@laws
@given(st.lists(close, min_size=0, max_size=9))
def test_a_tree_sum_is_a_sum(values):
    got = float(tree_sum(torch.tensor(values, dtype=torch.float64)))
    assert got == pytest.approx(math.fsum(values), abs=1e-14)


def test_a_product_slot_after_slot_is_that_of_fractions():
    generator = torch.Generator().manual_seed(2)
    A, B = torch.randn(3, 4, generator=generator), torch.randn(5, 3, generator=generator)
    product = ordered_delta(LoraPair(A, B))
    for i, j in itertools.product(range(5), range(4)):
        exact = sum(Fraction(float(B[i, k])) * Fraction(float(A[k, j])) for k in range(3))
        assert float(product[i, j]) == pytest.approx(float(exact), rel=1e-15, abs=1e-15)


# Stacks of products ---------------------------------------------------------------------------------------------------


def ramp(ranks: dict[str, int], begin: float = 1.0) -> dict[str, LoraPair]:
    """Factors of 40 x 40 weights that hold begin, begin + 1, … from the first number of the first module on."""
    sizes = [40 * ranks[name] for name in sorted(ranks) for _ in "AB"]
    parts = iter(torch.split(begin + torch.arange(float(sum(sizes))), sizes))
    return {
        name: LoraPair(next(parts).view(ranks[name], 40), next(parts).view(40, ranks[name])) for name in sorted(ranks)
    }


@pytest.mark.parametrize(
    "updates",
    [
        [ramp({"m": 1, "n": 1}), ramp({"m": 2, "n": 2}), ramp({"m": 1, "n": 1}, 7.0)],
        [ramp({"m": 1, "n": 2}), ramp({"m": 2, "n": 1})],  # the same bytes one after the other, in other shapes
    ],
)
def test_stacks_lie_in_an_order_of_their_contents(updates):
    means = []
    for order in itertools.permutations(updates):
        total = StackedSum()
        for adapter in order:
            total.add(adapter, 0.25)
        assert total.dense is None, "else it is the dense sums that are compared"
        means.append(total.mean())
        pairs = StackedSum().add(order[0], 0.25).merge(StackedSum().add(order[1], 0.25))
        for adapter in order[2:]:
            pairs.add(adapter, 0.25)
        means.append(pairs.mean())
    for mean in means:
        for name, pair in mean.items():
            assert torch.equal(pair.A, means[0][name].A)
            assert torch.equal(pair.B, means[0][name].B)
