"""Ranks: exact shares, draws that repeat by seed, and ranks that do not change when clients join."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawn_examples import examples
from hetlora.core.ranks import (
    explicit_ranks,
    normal_ranks,
    power_law_ranks,
    ranks_by_examples,
    same_ranks,
    tier_of,
    tiered_ranks,
    uniform_ranks,
)
from hetlora.errors import HetLoraError

laws = examples(60)
seeds = st.integers(0, 10**6)
names = st.lists(st.text("abcäж7-", min_size=1, max_size=4), unique=True, max_size=20)

DRAWS = {
    "tiered": lambda clients, seed: tiered_ranks(clients, [(2, 0.5), (4, 0.3), (8, 0.2)], seed),
    "uniform": lambda clients, seed: uniform_ranks(clients, 2, 9, seed),
    "power law": lambda clients, seed: power_law_ranks(clients, 5, 50, seed),
    "normal": lambda clients, seed: normal_ranks(clients, 1, 16, seed, mean=8, std=4),
}
draws = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())


def clients(count):
    return [f"client-{i}" for i in range(count)]


# Fixed ranks -------------------------------------------------------------------------------------------------------


def test_same_ranks_gives_every_client_one():
    assert same_ranks(["a", "b", "c"], 7) == {"a": 7, "b": 7, "c": 7}


def test_explicit_ranks_win_over_the_default():
    assert explicit_ranks(["a", "b", "c"], {"b": 8}, default=2) == {"a": 2, "b": 8, "c": 2}


def test_explicit_ranks_without_a_default_need_every_client():
    assert explicit_ranks(["a", "b"], {"b": 8, "a": 1}) == {"a": 1, "b": 8}
    with pytest.raises(HetLoraError, match=r"no rank for b, d; add them to ranks\.of, or set ranks\.default"):
        explicit_ranks(["a", "b", "c", "d"], {"a": 1, "c": 1})


def test_explicit_ranks_of_unknown_clients_are_an_error_that_names_them():
    # A name with a typo would otherwise silently train at the default rank.
    with pytest.raises(HetLoraError, match="clients that the data do not have: x, y;"):
        explicit_ranks(["a"], {"y": 1, "a": 1, "x": 2}, default=2)


# Tiers -------------------------------------------------------------------------------------------------------------


@laws
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(sum), st.integers(1, 4), seeds)
def test_tiers_get_exactly_their_shares_where_these_are_whole(counts, times, seed):
    people = clients(sum(counts) * times)
    tiers = [(rank, count / sum(counts)) for rank, count in enumerate(counts, start=1)]
    held = Counter(tiered_ranks(people, tiers, seed).values())
    assert [held[rank] for rank, _ in tiers] == [count * times for count in counts]


@laws
@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=6), st.integers(0, 40), seeds)
def test_tiers_are_never_off_by_more_than_one_client_and_leave_nobody_out(shares, count, seed):
    # Shares are relative to their sum, and rounding is cumulative: no tier pays for all the others.
    tiers = list(enumerate(shares, start=1))
    ranks = tiered_ranks(clients(count), tiers, seed)
    assert list(ranks) == clients(count)
    held = Counter(ranks.values())
    for rank, share in tiers:
        assert abs(held[rank] - count * share / sum(shares)) <= 1.0 + 1e-9


def test_tiers_do_not_follow_the_order_of_the_clients():
    # The order of clients is often an order of their data.
    ranks = list(tiered_ranks(clients(100), [(2, 0.5), (8, 0.5)], seed=0).values())
    assert 10 < ranks[:50].count(2) < 40


# Draws -------------------------------------------------------------------------------------------------------------


@draws
def test_a_draw_repeats_by_seed_and_changes_with_it(draw):
    people = clients(50)
    assert draw(people, 1) == draw(people, 1)
    assert draw(people, 1) != draw(people, 2)


@draws
def test_a_draw_leaves_the_global_random_state_alone(draw):
    before = random.getstate()
    draw(clients(5), 0)
    assert random.getstate() == before


@pytest.mark.parametrize("draw", [DRAWS[name] for name in ("uniform", "power law", "normal")])
@laws
@given(here=names, more=names, seed=seeds)
def test_a_clients_rank_does_not_move_when_others_join_or_change_places(draw, here, more, seed):
    alone = draw(here, seed)
    joined = draw([name for name in more if name not in here] + here[::-1], seed)
    assert {name: joined[name] for name in here} == alone


@laws
@given(st.integers(1, 20), st.integers(0, 20), seeds)
def test_draws_stay_within_their_bounds(low, width, seed):
    for draw in (uniform_ranks, power_law_ranks, partial(normal_ranks, mean=low + width / 3, std=3.0)):
        ranks = draw(clients(20), low, low + width, seed)
        assert list(ranks) == clients(20)
        assert all(low <= rank <= low + width for rank in ranks.values())


def within_four_sigma(hits, draws, probability):
    return abs(hits - draws * probability) < 4.0 * (draws * probability * (1.0 - probability)) ** 0.5


def test_uniform_ranks_are_equally_likely_bounds_included():
    held = Counter(uniform_ranks(clients(3000), 3, 6, seed=0).values())
    assert sorted(held) == [3, 4, 5, 6]
    assert all(within_four_sigma(count, 3000, 0.25) for count in held.values())


@pytest.mark.parametrize("exponent", [0.1, 1.0, 2.0])
def test_power_law_ranks_follow_their_density(exponent):
    # P(r) ∝ r^(exponent - 1): skewed to small ranks below exponent 1, uniform at 1.
    held = Counter(power_law_ranks(clients(3000), 5, 12, seed=0, exponent=exponent).values())
    weights = {rank: rank ** (exponent - 1.0) for rank in range(5, 13)}
    for rank, weight in weights.items():
        assert within_four_sigma(held[rank], 3000, weight / sum(weights.values())), rank


@pytest.mark.parametrize(("mean", "std"), [(6.0, 2.0), (4.0, 1.0), (10.0, 5.0)])
def test_normal_ranks_are_rounded_draws_with_those_outside_drawn_again(mean, std):
    # Clipping would instead heap what lies outside on the bounds.
    normal, rng, drawn = NormalDist(mean, std), random.Random(0), Counter()
    while drawn.total() < 30_000:
        rank = round(rng.gauss(mean, std))
        drawn[rank] += 4 <= rank <= 10
    held = Counter(normal_ranks(clients(3000), 4, 10, seed=0, mean=mean, std=std).values())
    whole = normal.cdf(10.5) - normal.cdf(3.5)
    for rank in range(4, 11):
        share = (normal.cdf(rank + 0.5) - normal.cdf(rank - 0.5)) / whole
        assert within_four_sigma(held[rank], 3000, share), rank
        assert within_four_sigma(drawn[rank], 30_000, share), rank


def test_a_normal_draw_of_hardly_any_width_is_its_mean():
    assert set(normal_ranks(clients(50), 1, 64, seed=0, mean=7, std=1e-9).values()) == {7}


@pytest.mark.parametrize(("mean", "std"), [(0.5, 1.0), (9.0, 1.0), (4.0, 0.0)])
def test_a_mean_outside_the_bounds_or_no_width_is_refused(mean, std):
    with pytest.raises(ValueError, match="the mean must be in 1 … 8"):
        normal_ranks(["a"], 1, 8, 0, mean=mean, std=std)


# By data -----------------------------------------------------------------------------------------------------------


def test_ranks_follow_the_quantiles_of_the_examples_not_their_numbers():
    examples = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 100_000}
    assert ranks_by_examples(examples, 2, 10) == {"a": 2, "b": 4, "c": 6, "d": 8, "e": 10}
    assert ranks_by_examples(examples, 2, 10, "decreasing") == {"a": 10, "b": 8, "c": 6, "d": 4, "e": 2}


def test_clients_with_as_many_examples_share_a_rank():
    assert ranks_by_examples({"a": 5, "b": 1, "c": 5, "d": 9}, 1, 7) == {"a": 4, "b": 1, "c": 4, "d": 7}
    assert ranks_by_examples(dict.fromkeys("abc", 4), 2, 8) == dict.fromkeys("abc", 5)
    assert ranks_by_examples({"a": 4}, 2, 8) == {"a": 5}
    assert ranks_by_examples({}, 2, 8) == {}


@laws
@given(
    st.dictionaries(st.text("abcd", min_size=1), st.integers(0, 9), min_size=1), st.integers(1, 9), st.integers(0, 9)
)
def test_more_examples_never_mean_a_smaller_rank(examples, low, width):
    up = ranks_by_examples(examples, low, low + width)
    down = ranks_by_examples(examples, low, low + width, "decreasing")
    for a, b in ((a, b) for a in examples for b in examples if examples[a] <= examples[b]):
        assert low <= up[a] <= up[b] <= low + width
        assert low <= down[b] <= down[a] <= low + width


# Tiers of a report -------------------------------------------------------------------------------------------------


def test_a_tier_is_the_rank_itself_where_ranks_are_few():
    assert [tier_of(rank, [8, 2, 4, 2]) for rank in (2, 4, 8)] == ["2", "4", "8"]


def test_a_tier_is_a_quartile_where_ranks_are_many():
    ranks = list(range(1, 9))
    assert [tier_of(rank, ranks) for rank in ranks] == ["1-2", "1-2", "3-4", "3-4", "5-6", "5-6", "7-8", "7-8"]


def test_the_quartiles_follow_the_clients_not_the_numbers():
    # Of twelve clients nine have rank 1: three quartiles end there, and what is left is one tier.
    ranks = [1] * 9 + [2, 3, 4]
    assert tier_of(1, ranks, limit=3) == "1"
    assert {tier_of(rank, ranks, limit=3) for rank in (2, 3, 4)} == {"2-4"}


@laws
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 6))
def test_every_rank_is_in_the_tier_that_bears_its_name(ranks, most):
    tiers = {rank: tier_of(rank, ranks, most) for rank in ranks}
    assert len(set(tiers.values())) <= max(most, 4)
    for rank, tier in tiers.items():
        low, _, high = tier.partition("-")
        assert int(low) <= rank <= int(high or low)


def test_a_rank_above_all_others_has_no_tier():
    with pytest.raises(ValueError, match="rank 21 is not among the 20 ranks given"):
        tier_of(21, list(range(1, 21)))
