"""Cohorts and drop-outs: no client twice, and drawn from seed and round alone."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drawn_examples import examples
from fake_clients import FakeEngine, answer, random_state, trained
from hetlora.core.round import run_round
from hetlora.core.sampling import DropOuts, sample_cohort
from hetlora.core.types import Client, ClientFailure
from hetlora.methods import hetlora

laws = examples(60)
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


# Drop-outs -----------------------------------------------------------------------------------------------------------

CLIENTS = [Client(f"client-{i}", 2, 1) for i in range(10)]


def dropped(share, *, when="before", seed=0, round_number=0, clients=CLIENTS):
    """The engine that was asked, the names that dropped out, and those whose updates counted."""
    engine, method = FakeEngine(trained), hetlora()
    state = replace(random_state(rank=2), round=round_number)
    after, report = run_round(state, method, DropOuts(engine, share, when, seed), clients)
    assert {failure.reason for failure in report.failures} <= {f"dropped out {when} training"}
    assert after.round == round_number + 1
    return engine, [failure.client for failure in report.failures], [client.client for client in report.clients]


@pytest.mark.parametrize(("share", "gone"), [(0.0, 0), (0.1, 1), (0.3, 3), (0.5, 5), (0.9, 9)])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_share_of_a_cohort_that_drops_out_is_exact(when, share, gone):
    _, failed, stayed = dropped(share, when=when)
    assert (len(failed), len(stayed)) == (gone, 10 - gone)
    assert sorted(failed + stayed) == sorted(client.name for client in CLIENTS)


@pytest.mark.run
def test_what_is_left_of_a_share_is_a_probability():
    # 0.34 of 10 clients are 3, and a fourth in 4 of 10 rounds; 0.1 of 2 clients are nobody, and one in 2 of 10 rounds.
    many = Counter(len(dropped(0.34, round_number=number)[1]) for number in range(100))
    assert many.keys() == {3, 4}
    assert 25 <= many[4] <= 55
    few = Counter(len(dropped(0.1, round_number=number, clients=CLIENTS[:2])[1]) for number in range(100))
    assert few.keys() == {0, 1}
    assert 8 <= few[1] <= 32


def test_before_training_drop_outs_cost_no_work_and_after_it_they_do():
    before, failed, _ = dropped(0.3, when="before")
    [asked] = before.asked
    assert asked.keys() == {client.name for client in CLIENTS} - set(failed)
    after, same, _ = dropped(0.3, when="after")
    assert same == failed, "who drops out does not depend on when"
    assert after.asked[0].keys() == {client.name for client in CLIENTS}


def test_drop_outs_cost_the_round_only_themselves():
    state, method = random_state(rank=2), hetlora()
    one, report = run_round(state, method, DropOuts(FakeEngine(trained), 0.3, "after", 0), CLIENTS)
    stayed = [client for client in CLIENTS if client.name in {report.client for report in report.clients}]
    other, _ = run_round(state, method, FakeEngine(trained), stayed)
    assert all(torch.equal(pair.A, other.adapter[name].A) for name, pair in one.adapter.items())
    assert one.ranks == other.ranks


def test_drop_outs_depend_on_seed_and_round_alone():
    def names(seed, round_number, clients=CLIENTS):
        return tuple(sorted(dropped(0.5, seed=seed, round_number=round_number, clients=clients)[1]))

    assert names(3, 4) == names(3, 4, clients=CLIENTS[::-1])
    assert len({names(seed, number) for seed in range(6) for number in range(6)}) > 30
    assert names(1, 11) != names(11, 1)


def test_a_client_that_fails_by_itself_and_drops_out_is_told_once():
    engine = FakeEngine(lambda task: ClientFailure(task.client, "battery"))
    _, report = run_round(random_state(rank=2), hetlora(), DropOuts(engine, 0.3, "after", 0), CLIENTS)
    assert Counter(failure.client for failure in report.failures) == Counter(client.name for client in CLIENTS)
    assert Counter(failure.reason for failure in report.failures) == {"battery": 7, "dropped out after training": 3}


def test_a_cohort_of_nobody_loses_nobody():
    _, report = run_round(random_state(rank=2), hetlora(), DropOuts(FakeEngine(answer), 0.5, "before", 0), [])
    assert report.failures == ()
