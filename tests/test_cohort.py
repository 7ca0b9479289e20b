"""Which clients take part in a round: no client twice, and by seed and round alone."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetlora.cohort import sample_cohort

laws = settings(deadline=None, derandomize=True, max_examples=60)
seeds = st.integers(0, 10**6)
rounds = st.integers(0, 10**4)


@laws
@given(st.integers(0, 40), st.data(), rounds, seeds)
def test_a_cohort_is_that_many_different_clients_of_the_population(count, data, round_number, seed):
    size = data.draw(st.integers(0, count))
    cohort = sample_cohort(range(count), size, round_number, seed)
    assert len(cohort) == len(set(cohort)) == size
    assert set(cohort) <= set(range(count))


@laws
@given(st.integers(1, 30), st.data(), rounds, seeds)
def test_a_cohort_depends_on_seed_and_round_alone(count, data, round_number, seed):
    # A resumed run draws round 7 without having drawn 0 ... 6, and whatever else has used random numbers.
    size = data.draw(st.integers(1, count))
    first = sample_cohort(range(count), size, round_number, seed)
    sample_cohort(range(count), size, round_number + 1, seed)
    assert sample_cohort(range(count), size, round_number, seed) == first
    named = [f"client-{i}" for i in range(count)]
    assert sample_cohort(named, size, round_number, seed) == [f"client-{i}" for i in first]


def test_rounds_and_seeds_draw_different_cohorts():
    drawn = {tuple(sample_cohort(range(100), 5, number, seed)) for number in range(10) for seed in range(10)}
    assert len(drawn) == 100


def test_seed_and_round_do_not_run_into_each_other():
    # Seed 1 in round 11 is not seed 11 in round 1.
    assert sample_cohort(range(100), 5, 11, 1) != sample_cohort(range(100), 5, 1, 11)


def test_every_client_is_equally_likely():
    held = Counter(client for number in range(2000) for client in sample_cohort(range(10), 3, number, seed=0))
    sigma = (2000 * 0.3 * 0.7) ** 0.5
    assert all(abs(held[client] - 600) < 4 * sigma for client in range(10))


def test_sampling_leaves_the_population_and_the_global_random_state_alone():
    population, before = ["a", "b", "c"], random.getstate()
    sample_cohort(population, 2, 0, 0)
    assert population == ["a", "b", "c"]
    assert random.getstate() == before


def test_a_cohort_larger_than_the_population_is_an_error():
    with pytest.raises(ValueError, match="larger than population"):
        sample_cohort(["a", "b"], 3, 0, 0)
