"""Bounded influence: by hand, against NumPy in float64, and as laws over all methods that accept it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drawn_examples import examples
from fake_clients import SHAPES, FakeEngine, answer, assert_same, random_state, start_of, trained
from hetlora.config import parse_config
from hetlora.config.sections import RobustnessConfig
from hetlora.core.adapter import FlatAdapter, LoraPair, map_tensors, stack
from hetlora.core.admission import UpdateBound
from hetlora.core.robust import AGGREGATIONS, Aggregation, Robustness, cap_weights, krum_order, trimmed
from hetlora.core.round import run_round
from hetlora.core.types import Client, ClientUpdate, TrainTask
from hetlora.errors import ConfigError
from hetlora.methods import METHODS

laws = examples(25)
COHORT = [Client(name, rank, 10) for name, rank in zip("abcdefghij", (2, 3, 4, 4, 6, 6, 8, 8, 8, 8), strict=True)]
HOSTILE = ("c", "h")
BOUNDED = Robustness(clip=2.0, weight_cap=3.0, largest_share=0.2)
FEDERATED = sorted(name for name in METHODS if "robustness" not in METHODS[name]().refuses)
OF_SLOTS = sorted(name for name in FEDERATED if "over_slots" not in METHODS[name]().refuses)


def cohort_of(method):
    """Clients whose ranks the method takes."""
    ranks = {"fedavg": 8, "fedit": 8, "full": 1}
    return [replace(client, rank=ranks.get(method.name, client.rank)) for client in COHORT]


def refusal(method, aggregation):
    """Why a method does not take an aggregation; None where it does."""
    kind = {"median": "over_slots", "trimmed_mean": "over_slots", "krum": "product", "multi_krum": "product"}
    return method.refuses.get("robustness") or method.refuses.get(kind.get(aggregation, ""))


def unpruned(name):
    """A method whose clients keep their ranks: a prune changes more than any step."""
    return METHODS[name](gamma=1.0) if name in ("hetlora", "steady") else METHODS[name]()


def small_steps(task):
    """A change of alike size for all clients, drawn by name."""
    rng = np.random.default_rng([ord(task.client), task.round])
    after = {
        name: LoraPair(
            *(
                factor + 0.01 * torch.from_numpy(rng.standard_normal(tuple(factor.shape))).float()
                if letter in task.trains
                else factor
                for letter, factor in zip("AB", pair, strict=True)
            )
        )
        for name, pair in task.adapter.items()
    }
    return answer(task, after)


def changed(task, sent, received):
    """Scale the change of every trained factor."""
    return {
        name: LoraPair(
            *(
                start + scale * (factor - start) if letter in task.trains else factor
                for letter, factor, start, scale in zip("AB", pair, task.adapter[name], (sent, received), strict=True)
            )
        )
        for name, pair in small_steps(task).adapter.items()
    }


ATTACKS = {
    "inflated": lambda task: changed(task, 1000.0, 1000.0),
    "gauge": lambda task: {
        name: LoraPair(1000.0 * A, B / 1000.0) for name, (A, B) in small_steps(task).adapter.items()
    },
    "sign flip": lambda task: changed(task, -1.0, -1.0),
}


def attacked(attack):
    def change(task):
        return answer(task, ATTACKS[attack](task)) if task.client in HOSTILE else small_steps(task)

    return FakeEngine(change)


def moved(before, after):
    """Root of the summed squares of all changes of the factors."""
    return math.sqrt(
        sum(
            float((new - old).double().square().sum())
            for name in before
            for new, old in zip(after[name], before[name], strict=True)
        )
    )


# Weights ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "multiple", "share", "expected"),
    [
        ([1.0, 2.0, 3.0], None, None, [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 9.0], 2.0, None, [1.0, 2.0, 4.0]),
        (
            [0.0, 0.0, 0.0, 1.0, 2.0, 3.0],
            1.0,
            None,
            [0.0, 0.0, 0.0, 1.0, 2.0, 2.0],
        ),  # of those that have a weight
        ([1.0, 100.0], 2.0, None, [1.0, 2.0]),  # of two the larger does not make its own measure
        ([1.0, 1.0, 1.0, 1.0], None, 0.25, [1.0, 1.0, 1.0, 1.0]),
        ([1.0, 1.0, 2.0], None, 0.5, [1.0, 1.0, 2.0]),
        ([1.0, 1.0, 6.0], None, 0.5, [1.0, 1.0, 2.0]),
        ([1.0, 5.0, 6.0], None, 0.4, [1.0, 2.0, 2.0]),  # two are lowered: 2 is 40 % of 5
        ([1.0, 5.0, 6.0], None, 0.2, [1.0, 1.0, 1.0]),  # nobody of three can have less than a third
        ([0.0, 0.0], 2.0, 0.5, [0.0, 0.0]),
    ],
)
def test_weights_are_capped_by_hand(weights, multiple, share, expected):
    assert cap_weights(weights, multiple, share) == pytest.approx(expected, rel=1e-12)


@laws
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=12),
    st.floats(1.0, 10.0),
    st.floats(0.05, 1.0),
)
def test_no_weight_is_over_its_bounds_and_none_lower_than_it_must_be(weights, multiple, share):
    capped = cap_weights(weights, multiple, share)
    positive = [weight for weight in weights if weight > 0.0]
    assert all(0.0 <= after <= before for before, after in zip(weights, capped, strict=True))
    if not positive:
        return
    limit = multiple * sorted(positive)[(len(positive) - 1) // 2]
    total = math.fsum(capped)
    assert all(weight <= limit * (1 + 1e-12) for weight in capped)
    most = max(share, 1.0 / len(positive))
    assert max(capped) <= most * total * (1 + 1e-9)
    lowered = [after for before, after in zip(weights, capped, strict=True) if after < before]
    assert len({round(weight, 12) for weight in lowered}) <= 1, "the largest weights are lowered to one value"
    if lowered:  # nobody is lowered further than to one of the bounds
        assert max(capped) == pytest.approx(limit) or max(capped) >= most * total * (1 - 1e-9)


# Norm clipping ------------------------------------------------------------------------------------------------------


def test_a_change_is_clipped_by_hand():
    def task(name):
        return TrainTask(name, 0, 1, {"m": LoraPair(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0]]))})

    def update(name, a, b):
        adapter = {"m": LoraPair(torch.tensor([[1.0 + a, 1.0 + a]]), torch.tensor([[b]]))}
        return task(name), ClientUpdate(name, 0, 1, adapter, 1, 1, 0.0)

    answers = [update("x", 1.0, 1.0), update("y", 2.0, 2.0), update("z", 100.0, 3.0)]
    result = Robustness(clip=2.0)(answers, lambda _: 1.0)
    # The medians of the root mean squares of the one slot are 2 and 2, so A may change by 4 and B by 4.
    assert result.clients["z"].bounded == {"A": pytest.approx(0.04)}
    assert torch.allclose(result.clients["z"].update.adapter["m"].A, torch.tensor([[5.0, 5.0]]))
    assert result.clients["z"].update.adapter["m"].B is answers[2][1].adapter["m"].B
    assert not result.clients["x"].bounded
    assert result.clients["x"].update.adapter is answers[0][1].adapter, "what is within bounds is not touched"


def test_clipping_does_not_depend_on_the_rank():
    # One root mean square for all, at ranks 2 to 8: nobody is clipped though the norms differ twofold.
    def shifted(task):
        return answer(task, map_tensors(lambda factor: factor + 0.5, task.adapter))

    _, report = run_round(
        random_state(), METHODS["zeropad"](), FakeEngine(shifted), COHORT, robust=Robustness(clip=1.001)
    )
    assert not any(client.bounded for client in report.clients)


# What a bound costs where nobody attacks, and what an attack does where it is -----------------------------------------


@pytest.mark.parametrize("name", FEDERATED)
def test_bounds_that_nobody_reaches_change_nothing(name):
    method = METHODS[name]()
    state, cohort = start_of(method), cohort_of(method)
    wide = Robustness(clip=1e9, weight_cap=1e9, largest_share=1.0)
    plain, report = run_round(state, method, FakeEngine(trained), cohort)
    bounded, same = run_round(state, method, FakeEngine(trained), cohort, robust=wide)
    assert_same(plain.adapter, bounded.adapter)
    assert report == same


@pytest.mark.parametrize(
    "robust", [BOUNDED, *(Robustness(clip=2.0, aggregation=name) for name in AGGREGATIONS[1:])], ids=str
)
@pytest.mark.parametrize("name", FEDERATED)
def test_the_order_in_which_answers_come_does_not_matter(name, robust):
    method = METHODS[name]()
    if reason := refusal(method, robust.aggregation):
        pytest.skip(reason)
    state, cohort = start_of(method), cohort_of(method)
    one, report = run_round(state, method, FakeEngine(trained), cohort, robust=robust)
    other, same = run_round(
        state, method, FakeEngine(trained, order=lambda tasks: list(tasks)[::-1]), cohort, robust=robust
    )
    assert_same(one.adapter, other.adapter)
    assert report == same


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", ["hetlora", "zeropad", "rbla", "fedavg", "replication"])
def test_two_hostile_of_ten_move_the_average_no_further_than_an_honest_client_moves(name, attack):
    method = unpruned(name)
    cohort = [replace(client, rank=8) for client in COHORT]  # no dilution, whose change is no client's
    state = random_state()
    honest = max(moved(state.adapter, small_steps(method.distribute(state, client)).adapter) for client in cohort)
    for robust in (BOUNDED, Robustness(aggregation="median"), Robustness(aggregation="trimmed_mean", byzantine=0.2)):
        after, _ = run_round(state, method, attacked(attack), cohort, robust=robust)
        assert moved(state.adapter, after.adapter) <= 1.25 * honest
    if attack != "sign flip":
        broken, _ = run_round(state, method, attacked(attack), cohort)
        assert moved(state.adapter, broken.adapter) > 10 * honest, "the attack is one"


def test_what_was_bounded_is_reported():
    _, report = run_round(random_state(), METHODS["zeropad"](), attacked("gauge"), COHORT, robust=BOUNDED)
    bounded = {client.client: client.bounded for client in report.clients if client.bounded}
    assert bounded.keys() == set(HOSTILE)
    assert all(0.0 < parts["A"] < 1e-3 for parts in bounded.values())
    after, report = run_round(random_state(), METHODS["hetlora"](), attacked("inflated"), COHORT, robust=BOUNDED)
    assert max(report.shares().values()) <= 0.2 + 1e-9
    assert all(math.isfinite(float(factor.sum())) for pair in after.adapter.values() for factor in pair)


def test_a_weight_is_that_of_the_clipped_update():
    _, report = run_round(
        random_state(), METHODS["hetlora"](), attacked("inflated"), COHORT, robust=Robustness(clip=1.0)
    )
    _, honest = run_round(random_state(), METHODS["hetlora"](), FakeEngine(small_steps), COHORT)
    weights = {client.client: client.weight for client in honest.clients}
    assert all(client.weight == pytest.approx(weights[client.client], rel=0.1) for client in report.clients)


# Aggregations over slots ----------------------------------------------------------------------------------------------


def test_trimmed_means_by_hand():
    values = torch.tensor([9.0, 1.0, 5.0, 3.0, 100.0])
    assert float(trimmed(values, 0)) == pytest.approx(23.6)
    assert float(trimmed(values, 1)) == pytest.approx(17 / 3)
    assert float(trimmed(values, 2)) == 5.0
    assert float(trimmed(values, 9)) == 5.0, "never more than leaves the median"
    assert float(trimmed(values[:4], 9)) == 4.0
    assert float(trimmed(values[:1], 9)) == 9.0


@laws
@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=9),
    st.integers(0, 2**31),
    st.sampled_from(["median", "trimmed_mean"]),
)
def test_an_aggregation_over_slots_is_that_of_numpy_over_each_slots_owners(ranks, seed, aggregation):
    state = random_state(seed)
    cohort = [Client(f"client {index}", rank, 1) for index, rank in enumerate(ranks)]
    engine = FakeEngine(trained)
    robust = Robustness(aggregation=aggregation, byzantine=0.25)
    after, _ = run_round(state, METHODS["zeropad"](), engine, cohort, robust=robust)
    updates = [trained(task) for task in engine.asked[0].values()]
    hostile = min(math.ceil(0.25 * len(ranks)), max(0, (len(ranks) - 3) // 2))
    for module in SHAPES:
        for slot in range(8):
            owners = [update.adapter[module] for update, rank in zip(updates, ranks, strict=True) if rank > slot]
            if not owners:
                expected_a, expected_b = state.adapter[module].A[slot], state.adapter[module].B[:, slot]
            else:
                cut = (len(owners) - 1) // 2
                cut = min(hostile, cut) if aggregation == "trimmed_mean" else cut
                expected_a, expected_b = (
                    np.sort(np.stack([vector.double().numpy() for vector in vectors]), axis=0)[
                        cut : len(owners) - cut
                    ].mean(0)
                    for vectors in ([pair.A[slot] for pair in owners], [pair.B[:, slot] for pair in owners])
                )
            np.testing.assert_allclose(after.adapter[module].A[slot], expected_a, rtol=1e-6)
            np.testing.assert_allclose(after.adapter[module].B[:, slot], expected_b, rtol=1e-6)


@pytest.mark.parametrize("name", OF_SLOTS)
@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean"])
def test_a_minority_cannot_move_a_slot_beyond_what_its_honest_owners_say(name, aggregation):
    method = unpruned(name)
    if method.name in ("principal", "flexlora", "recon_svd", "replication", "fedsa_lora"):
        pytest.skip("what the server keeps is not the average itself")
    state, cohort = start_of(method), [replace(client, rank=1 if name == "full" else 8) for client in COHORT]

    def change(task):
        update = small_steps(task)
        if task.client in HOSTILE:
            adapter = {
                module: LoraPair(
                    *(
                        factor * -1e6 if letter in task.trains else factor
                        for letter, factor in zip("AB", pair, strict=True)
                    )
                )
                for module, pair in update.adapter.items()
            }
            return replace(update, adapter=adapter)
        return update

    robust = Robustness(aggregation=aggregation, byzantine=0.2)
    after, _ = run_round(state, method, FakeEngine(change), cohort, robust=robust)
    honest = [small_steps(method.distribute(state, client)).adapter for client in cohort if client.name not in HOSTILE]
    for module in state.adapter:
        for index in (0, 1):
            values = torch.stack([adapter[module][index] for adapter in honest])
            new = after.adapter[module][index]
            assert bool((new >= values.amin(0) - 1e-6).all()), (module, index)
            assert bool((new <= values.amax(0) + 1e-6).all()), (module, index)


# Krum ---------------------------------------------------------------------------------------------------------------


def dense_order(answers, hostile):
    """Krum on the products themselves, in NumPy float64."""
    changes = []
    for task, update in answers:
        parts = []
        for module, (A, B) in update.adapter.items():
            rank = len(A)
            sent_a, sent_b = task.adapter[module].A[:rank], task.adapter[module].B[:, :rank]
            parts.append((B.double() @ A.double() - sent_b.double() @ sent_a.double()).flatten())
        changes.append(torch.cat(parts).numpy())
    count = len(changes)
    near = max(1, count - hostile - 2)
    scores = []
    for i in range(count):
        distances = sorted(float(((changes[i] - changes[j]) ** 2).sum()) for j in range(count) if j != i)
        scores.append(sum(distances[:near]))
    return sorted(range(count), key=lambda index: scores[index])


@laws
@given(st.integers(0, 2**31), st.integers(3, 9), st.integers(0, 3))
def test_krums_order_is_that_of_the_dense_products(seed, count, hostile):
    state = random_state(seed)
    clients = [Client(f"client {index}", 1 + index % 8, 1) for index in range(count)]
    tasks = [METHODS["zeropad"]().distribute(state, client) for client in clients]
    answers = [(task, trained(task)) for task in tasks]
    assert krum_order(answers, hostile) == dense_order(answers, hostile)


@pytest.mark.parametrize("aggregation", ["krum", "multi_krum"])
@pytest.mark.parametrize("attack", ["inflated", "sign flip"])
@pytest.mark.parametrize(
    "name", sorted({*FEDERATED} - {"flora", "fedsa_lora"})
)  # FLoRA's clients draw A: none are alike
def test_krum_leaves_the_hostile_out(name, aggregation, attack):
    method = METHODS[name]()
    state, cohort = start_of(method), cohort_of(method)

    def change(task):
        # Honest clients move alike, or nobody could tell who is not one of them.
        common = small_steps(replace(task, client="a" if task.client in HOSTILE else task.client))
        alike = {
            module: LoraPair(
                *(
                    start + 0.1 + 0.1 * (factor - start) if letter in task.trains else factor
                    for letter, factor, start in zip("AB", pair, task.adapter[module], strict=True)
                )
            )
            for module, pair in common.adapter.items()
        }
        if task.client in HOSTILE:
            scale = 1000.0 if attack == "inflated" else -1.0
            alike = {
                module: LoraPair(
                    *(start + scale * (f - start) if letter in task.trains else f
                      for letter, f, start in zip("AB", pair, task.adapter[module], strict=True))
                )
                for module, pair in alike.items()
            }  # fmt: skip
        return answer(task, alike)

    robust = Robustness(aggregation=aggregation, byzantine=0.2)
    _, report = run_round(state, method, FakeEngine(change), cohort, robust=robust)
    counted = {client.client for client in report.clients if client.weight > 0.0}
    assert not counted & set(HOSTILE)
    assert len(counted) == (1 if aggregation == "krum" else 8)
    assert all(client.bounded == {"weight": 0.0} for client in report.clients if client.client not in counted)


def test_krum_does_not_see_the_gauge():
    state = random_state()
    tasks = [METHODS["zeropad"]().distribute(state, client) for client in COHORT]
    answers = [(task, trained(task)) for task in tasks]
    turned = [
        (task, replace(update, adapter={m: LoraPair(4.0 * A, B / 4.0) for m, (A, B) in update.adapter.items()}))
        for task, update in answers
    ]
    assert krum_order(answers, 2) == krum_order(turned, 2)


# The rest -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["hetlora", "replication", "flexlora"])
def test_a_round_of_few_answers_ends_well_and_learns(name, aggregation, count):
    robust = Robustness(clip=2.0, aggregation=aggregation)
    state, cohort = random_state(), COHORT[:count]
    after, report = run_round(state, METHODS[name](), FakeEngine(trained), cohort, robust=robust)
    assert len(report.clients) == count
    assert (moved(state.adapter, after.adapter) > 0.0) == bool(count)
    assert all(bool(factor.isfinite().all()) for pair in after.adapter.values() for factor in pair)


def test_of_two_answers_the_larger_change_is_clipped_to_twice_the_smaller():
    def change(task):
        return answer(task, map_tensors(lambda factor: factor + (1000.0 if task.client == "b" else 1.0), task.adapter))

    cohort = [Client(name, 8, 1) for name in "ab"]
    for aggregation in ("mean", "median", "trimmed_mean"):
        robust = Robustness(clip=2.0, aggregation=aggregation)
        after, report = run_round(
            random_state(), METHODS["rbla"](weights="equal"), FakeEngine(change), cohort, robust=robust
        )
        change_of_a = after.adapter["q_proj"].A - random_state().adapter["q_proj"].A
        torch.testing.assert_close(change_of_a, torch.full_like(change_of_a, 1.5), rtol=1e-4, atol=1e-4)
        assert report.clients[1].bounded == {"A": pytest.approx(0.002), "B": pytest.approx(0.002)}


def test_a_change_cannot_be_spent_in_one_slot():
    # Over the whole factor the root mean square would be that of the others.
    def change(task):
        update = small_steps(task)
        if task.client not in HOSTILE:
            return update
        adapter = {name: LoraPair(A.clone(), B) for name, (A, B) in task.adapter.items()}
        adapter["q_proj"].A[0] += 0.01 * math.sqrt(8)
        return answer(task, adapter)

    cohort = [replace(client, rank=8) for client in COHORT]
    _, report = run_round(random_state(), METHODS["zeropad"](), FakeEngine(change), cohort, robust=Robustness(clip=1.5))
    assert {client.client for client in report.clients if "A" in client.bounded} == set(HOSTILE)


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean"])
def test_where_all_count_alike_nobody_s_weight_is_lowered(aggregation):
    robust = Robustness(aggregation=aggregation)
    _, report = run_round(random_state(), METHODS["hetlora"](), FakeEngine(trained), COHORT, robust=robust)
    assert {client.weight for client in report.clients} == {1.0}
    assert not any(client.bounded for client in report.clients)


def test_of_those_that_krum_takes_none_has_more_than_its_share():
    robust = Robustness(aggregation="multi_krum", byzantine=0.4, largest_share=0.2)
    _, report = run_round(random_state(), METHODS["hetlora"](gamma=1.0), FakeEngine(trained), COHORT, robust=robust)
    taken = [share for share in report.shares().values() if share > 0.0]
    assert len(taken) == 7, "of ten answers at most three can be outvoted"
    assert max(taken) <= 0.2 + 1e-9


def test_what_does_not_travel_is_not_looked_at():
    # FedSA-LoRA keeps B on the client: no server could bound it.
    def change(task):
        update = small_steps(task)
        scale = 1000.0 if task.client == "e" else 1.0
        return replace(update, adapter={name: LoraPair(A, scale * B) for name, (A, B) in update.adapter.items()})

    _, report = run_round(
        random_state(), METHODS["fedsa_lora"](), FakeEngine(change), COHORT, robust=Robustness(clip=1.5)
    )
    assert not any("B" in client.bounded for client in report.clients)


def test_stacked_updates_are_taken_like_others():
    names = tuple(SHAPES)
    layout = [((name,), (1, 8, SHAPES[name].in_features), (1, SHAPES[name].out_features, 8)) for name in names]

    def change(task):
        update = trained(task)
        numbers = torch.cat([factor.flatten() for name in names for factor in update.adapter[name]])
        return replace(update, adapter=FlatAdapter(numbers, layout))

    cohort = [replace(client, rank=8) for client in COHORT]
    for aggregation in AGGREGATIONS:
        robust = Robustness(clip=2.0, aggregation=aggregation)
        one, _ = run_round(random_state(), METHODS["rbla"](), FakeEngine(change), cohort, robust=robust)
        other, _ = run_round(random_state(), METHODS["rbla"](), FakeEngine(trained), cohort, robust=robust)
        for name in names:
            torch.testing.assert_close(one.adapter[name], other.adapter[name])


def test_ranks_a_module_are_taken():
    rank = {"q_proj": 2, "v_proj": 5}
    cohort = [Client(name, rank if name in "ab" else 3, 1) for name in "abcde"]
    for aggregation in AGGREGATIONS:
        robust = Robustness(clip=2.0, aggregation=aggregation)
        after, report = run_round(random_state(), METHODS["rbla"](), FakeEngine(trained), cohort, robust=robust)
        assert len(report.clients) == 5
        assert after.adapter["v_proj"].A.shape[0] == 8


@pytest.mark.parametrize(
    "wrong",
    [{"clip": 0.5}, {"clip": math.inf}, {"weight_cap": 0.0}, {"largest_share": 0.0}, {"largest_share": 1.5},
     {"aggregation": "best"}, {"byzantine": 0.5}, {"byzantine": -0.1}],
    ids=str,
)  # fmt: skip
def test_arguments_out_of_their_range_are_refused_by_name(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value!r} is not allowed"):
        Robustness(**wrong)


def document(**changes):
    return {
        "data": {"target": "{target}"},
        "federation": {"rounds": 1, "clients_per_round": 2},
        "ranks": {"kind": "same", "rank": 2},
        "training": {"steps": 1},
        **changes,
    }


def test_a_configuration_names_the_aggregations_that_there_are():
    assert get_args(RobustnessConfig.model_fields["aggregation"].annotation) == get_args(Aggregation)
    assert parse_config(document()).robustness is None
    section = {"clip": 2.0, "aggregation": "median"}
    assert parse_config(document(robustness=section)).robustness == RobustnessConfig(clip=2.0, aggregation="median")


@pytest.mark.parametrize(("name", "aggregation"), list(itertools.product(METHODS, AGGREGATIONS)))
def test_a_method_that_takes_no_bounds_says_why(name, aggregation):
    reason = refusal(METHODS[name](), aggregation)
    bounds = {"clip": 2.0} if aggregation == "mean" else {}
    changed = document(method={"name": name}, robustness={"aggregation": aggregation, **bounds})
    if reason is None:
        assert parse_config(changed).method.name == name
    else:
        with pytest.raises(ConfigError, match=reason):
            parse_config(changed)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({}, "robustness bounds nothing"),
        ({"byzantine": 0.3}, "robustness bounds nothing"),
        ({"clip": 2.0, "byzantine": 0.3}, "robustness.byzantine has no meaning"),
        ({"aggregation": "median", "weight_cap": 3.0}, "robustness.weight_cap has no meaning"),
        ({"aggregation": "krum", "largest_share": 0.3}, "robustness.largest_share has no meaning"),
    ],
)
def test_keys_that_would_bound_nothing_are_refused(section, said):
    with pytest.raises(ConfigError, match=said):
        parse_config(document(robustness=section))


def test_a_reach_that_is_infinite_bounds_nothing():
    class Boundless:
        def count(self, _rows):
            return 1

        def reach(self, _steps):
            return UpdateBound(math.inf, math.inf, 0.0)

    _, report = run_round(random_state(), METHODS["zeropad"](), FakeEngine(trained), COHORT, training=Boundless())
    assert len(report.clients) == len(COHORT)


def test_what_stacks_is_what_it_says():
    # Guards the test of Krum: the change of a product is that of the stacked factors.
    one, other = random_state(1).adapter, random_state(2).adapter
    joined = stack([one, {name: LoraPair(A, -B) for name, (A, B) in other.items()}])
    for name in one:
        expected = one[name].B @ one[name].A - other[name].B @ other[name].A
        torch.testing.assert_close(joined[name].B @ joined[name].A, expected)
