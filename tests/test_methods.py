"""FedAvg, HetLoRA, zero-padding and RBLA by hand, and HetLoRA's round against a reference."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drawn_examples import examples
from fake_clients import (
    FULL,
    SHAPES,
    FakeEngine,
    answer,
    assert_pair,
    assert_same,
    grown,
    literal,
    random_state,
    sends,
)
from hetlora.core.adapter import LoraPair, ModuleShape, delta_norm, map_tensors, tail_norm
from hetlora.core.round import run_round, run_rounds
from hetlora.core.types import Client, ClientUpdate, ServerState, TrainTask
from hetlora.errors import ShapeError
from hetlora.methods import carryover, fedavg, hetlora, rbla, zeropad
from hetlora.methods.hetlora import norm_weight, prune_by_tail, tail_penalty, tail_start

laws = examples(30)
seeds = st.integers(0, 2**32 - 1)

CLIENTS = [Client(f"client-{i}", rank, examples=1 + i) for i, rank in enumerate((1, 3, 6, FULL))]


# FedAvg by hand ----------------------------------------------------------------------------------------------------

ONE_BY_ONE = {"m": ModuleShape(1, 1)}


def test_fedavg_weighs_by_examples():
    # n = 1, 3, 4: A = (1*8 + 3*0 + 4*2) / 8 = 2 and B = (1*4 + 3*4 + 4*8) / 8 = 6.
    engine = FakeEngine(sends(a=literal([[8]], [[4]]), b=literal([[0]], [[4]]), c=literal([[2]], [[8]])))
    cohort = [Client(name, 1, examples=1) for name in "abc"]
    state, report = run_round(random_state(rank=1, shapes=ONE_BY_ONE), fedavg(), engine, cohort)
    assert_pair(state.adapter["m"], [[2]], [[6]])
    assert report.shares() == {"a": 0.125, "b": 0.375, "c": 0.5}


def test_fedavg_of_equal_weights_is_the_plain_mean():
    # A = (8 + 0 + 1) / 3 = 3 and B = (4 + 4 + 7) / 3 = 5, whatever the examples.
    engine = FakeEngine(sends(a=literal([[8]], [[4]]), b=literal([[0]], [[4]]), c=literal([[1]], [[7]])))
    cohort = [Client(name, 1, examples=1) for name in "abc"]
    state, _ = run_round(random_state(rank=1, shapes=ONE_BY_ONE), fedavg(weights="equal"), engine, cohort)
    assert_pair(state.adapter["m"], [[3]], [[5]])


def test_fedavg_refuses_to_mix_ranks():
    cohort = [Client("wide", FULL, 1), Client("thin", 2, 1)]
    with pytest.raises(ShapeError, match="client 'thin' has rank 2, the global adapter 8"):
        run_round(random_state(), fedavg(), FakeEngine(answer), cohort)


def test_fedavg_names_weights_it_does_not_know():
    with pytest.raises(ValueError, match="weights='norm' is not allowed; use one of examples, equal"):
        fedavg(weights="norm")


# HetLoRA's distribution and aggregation by hand ----------------------------------------------------------------------


def test_hetlora_distributes_the_first_slots_by_index():
    state = ServerState({"m": literal([[1], [2], [3]], [[4, 5, 6]])}, ranks={"pruned": 1})
    method = hetlora()
    task = method.distribute(state, Client("fresh", 2, 1))
    assert (task.client, task.round, task.rank) == ("fresh", 0, 2)
    assert_same(task.adapter, {"m": literal([[1], [2]], [[4, 5]])})
    assert_same(method.distribute(state, Client("pruned", 3, 1)).adapter, {"m": literal([[1]], [[4]])})


THIN = literal([[3, 4]], [[1]])  # rank 1: B A = [3, 4], of norm 5
THICK = literal([[1, 0], [0, 2]], [[6, 4]])  # rank 2: B A = [6, 8], of norm 10
TWO = [Client("a", 1, examples=1), Client("b", 2, examples=3)]
TWO_SLOTS = ServerState({"m": literal([[1, 1], [1, 1]], [[1, 1]])})


def test_hetlora_averages_padded_factors_by_the_norms_of_their_products():
    # Norms 5 and 10 are shares 1/3 and 2/3; slot 1 is the thick client's alone, and still takes only 2/3 of it:
    # A = [[(3 + 2*1) / 3, (4 + 2*0) / 3], [0, 2*2 / 3]],  B = [[(1 + 2*6) / 3, 2*4 / 3]].
    state, report = run_round(TWO_SLOTS, hetlora(), FakeEngine(sends(a=THIN, b=THICK)), TWO)
    assert [client.weight for client in report.clients] == pytest.approx([5.0, 10.0], rel=1e-12)
    assert report.shares() == pytest.approx({"a": 1 / 3, "b": 2 / 3}, rel=1e-12)
    assert_pair(state.adapter["m"], [[5 / 3, 4 / 3], [0, 4 / 3]], [[13 / 3, 8 / 3]])


def test_hetlora_of_example_weights_is_naive_zero_padding():
    # n = 1 and 3 are shares 1/4 and 3/4: A = [[(3 + 3) / 4, 4 / 4], [0, 6 / 4]],  B = [[(1 + 18) / 4, 12 / 4]].
    state, _ = run_round(TWO_SLOTS, hetlora(weights="examples"), FakeEngine(sends(a=THIN, b=THICK)), TWO)
    assert_pair(state.adapter["m"], [[1.5, 1.0], [0, 1.5]], [[4.75, 3.0]])


def test_a_penalty_without_pruning_leaves_every_rank_as_it_is():
    def shrunk(task):  # which would prune every client but for the switch
        return answer(task, map_tensors(lambda factor: factor * 0.5, task.adapter))

    arguments = {"gamma": 0.5, "min_rank": 1}
    _, pruned = run_round(random_state(), hetlora(**arguments), FakeEngine(shrunk), CLIENTS)
    method = hetlora(**arguments, pruning=False)
    _, kept = run_round(random_state(), method, FakeEngine(shrunk), CLIENTS)
    assert any(client.pruned for client in pruned.clients)
    assert not any(client.pruned for client in kept.clients)
    assert method.penalty([TrainTask("a", 0, 2, RECEIVED)]) is not None


def test_hetlora_of_equal_weights_is_the_mean_of_padded_factors():
    state, _ = run_round(TWO_SLOTS, hetlora(weights="equal"), FakeEngine(sends(a=THIN, b=THICK)), TWO)
    assert_pair(state.adapter["m"], [[2.0, 2.0], [0, 1.0]], [[3.5, 2.0]])


def test_hetlora_gives_a_client_one_weight_over_all_its_modules():
    # Norms 3 and 4 of two modules are a weight of 5; with a weight a module, A would be 3/4 and 4/5 of what it is.
    update = ClientUpdate("a", 0, 1, {"m": literal([[3]], [[1]]), "n": literal([[1]], [[-4]])}, 7, 1, 1.0)
    assert norm_weight(update) == pytest.approx(5.0, rel=1e-12)
    assert norm_weight(update, "examples") == 7.0
    assert norm_weight(update, "equal") == 1.0

    def change(task):  # b: norms 15 and 0, a weight of 15
        other = {"m": literal([[15]], [[1]]), "n": literal([[8]], [[0]])}
        return answer(task, update.adapter if task.client == "a" else other)

    before = ServerState({"m": literal([[1]], [[1]]), "n": literal([[1]], [[1]])})
    state, _ = run_round(before, hetlora(), FakeEngine(change), [Client(name, 1, 1) for name in "ab"])
    assert_pair(state.adapter["m"], [[(3 + 3 * 15) / 4]], [[1]])
    assert_pair(state.adapter["n"], [[(1 + 3 * 8) / 4]], [[-4 / 4]])


def test_hetlora_weighs_what_is_left_after_pruning():
    # Client a received a tail product of 3*1 and trained it to 1*1, so its slot 1 goes: B A is 4*1 instead of 4*1 + 1*1.
    before = ServerState({"m": literal([[1], [3]], [[1, 1]])})
    engine = FakeEngine(sends(a=literal([[4], [1]], [[1, 1]]), b=literal([[12]], [[1]])))
    cohort = [Client("a", 2, 1), Client("b", 1, 1)]
    state, report = run_round(before, hetlora(gamma=0.5, min_rank=1, unowned="zero"), engine, cohort)
    assert [client.weight for client in report.clients] == pytest.approx([4.0, 12.0], rel=1e-12)
    assert_pair(state.adapter["m"], [[(4 + 3 * 12) / 4], [0]], [[1, 0]])
    assert (report.clients[0].rank, report.clients[0].new_rank, report.clients[0].pruned) == (2, 1, True)
    assert report.clients[0].bytes_up == 2 * 4
    assert report.bytes_down == 4 * 4 + 2 * 4


@pytest.mark.parametrize("weights", ["norm", "equal"])
def test_a_client_of_norm_zero_has_no_share_by_norm(weights):
    engine = FakeEngine(sends(a=literal([[9]], [[0]]), b=literal([[2]], [[6]])))
    before = ServerState({"m": literal([[1]], [[1]])})
    state, _ = run_round(before, hetlora(weights=weights), engine, [Client(name, 1, 1) for name in "ab"])
    assert_pair(state.adapter["m"], *(([[2]], [[6]]) if weights == "norm" else ([[5.5]], [[3]])))


def test_where_all_norms_are_zero_the_adapter_stays():
    # Nothing to divide by: neither NaN nor an adapter of zeros, though clients sent other values of A.
    before = ServerState({"m": literal([[1], [2]], [[0, 0]])})
    engine = FakeEngine(sends(a=literal([[9]], [[0]]), b=literal([[9], [9]], [[0, 0]])))
    state, report = run_round(before, hetlora(), engine, TWO)
    assert_same(state.adapter, before.adapter)
    assert report.shares() == {"a": 0.0, "b": 0.0}
    assert state.round == 1


# HetLoRA's self-pruning by hand --------------------------------------------------------------------------------------

RECEIVED = {"m": literal([[1], [2]], [[1, 3]])}  # two slots; at γ = 0.5 the tail is slot 1, its product 3 * 2 = 6


def pruned(received, after, *, rank=2, gamma=0.5, min_rank=1, per_module=False):
    task = TrainTask("a", 0, rank, received)
    return prune_by_tail(task, answer(task, after), gamma=gamma, min_rank=min_rank, per_module=per_module)


def test_a_tail_that_became_smaller_is_cut():
    update = pruned(RECEIVED, {"m": literal([[5], [5]], [[7, 1]])})  # 1 * 5 < 6
    assert update.rank == 1
    assert_same(update.adapter, {"m": literal([[5]], [[7]])})


@pytest.mark.parametrize(
    ("A", "B"),
    [
        pytest.param(7.0, 1.0, id="larger, though B shrank: 7 > 6"),
        pytest.param(2.0, 3.0, id="untouched: 6 = 6"),
        pytest.param(3.0, 2.0, id="equal with other factors: 6 = 6"),
        pytest.param(-2.0, 3.0, id="equal with another sign"),
    ],
)
def test_a_tail_that_did_not_become_strictly_smaller_stays(A, B):
    after = {"m": literal([[0], [A]], [[0, B]])}  # the head vanished, which is not the tail's business
    update = pruned(RECEIVED, after)
    assert update.rank == 2
    assert_same(update.adapter, after)


@pytest.mark.parametrize("B", [0.0, 0.5])
def test_a_received_tail_of_zero_cannot_be_pruned(B):
    # B = 0 at the start of a federation: nothing is strictly smaller than 0, so nobody prunes in round 0.
    assert pruned({"m": literal([[1], [2]], [[0, 0]])}, {"m": literal([[1], [0.1]], [[1, B]])}).rank == 2


def test_a_client_whose_tail_is_nan_does_not_prune():
    # Its update is refused later, whole, with its own message.
    assert pruned(RECEIVED, {"m": literal([[1], [float("nan")]], [[1, 1]])}).rank == 2


def test_a_prune_stops_at_min_rank():
    # γ r = 1, but r_min = 3: the tail is slot 3 alone, whose product fell from 1 to 0.25; slots 0 ... 2 stay.
    received = {"m": literal([[1], [1], [1], [1]], [[1, 1, 1, 1]])}
    after = {"m": literal([[1], [1], [1], [0.5]], [[1, 1, 1, 0.5]])}
    assert pruned(received, after, rank=4, gamma=0.25, min_rank=3).rank == 3
    # And slots 1, 2, which r_min protects, do not count: they shrank here, the tail did not.
    assert (
        pruned(received, {"m": literal([[1], [0], [0], [1]], [[1, 0, 0, 1]])}, rank=4, gamma=0.25, min_rank=3).rank == 4
    )


@pytest.mark.parametrize("min_rank", [2, 5])
def test_a_rank_at_or_below_min_rank_stays(min_rank):
    update = pruned(RECEIVED, {"m": literal([[0], [0]], [[0, 0]])}, min_rank=min_rank)
    assert update.rank == 2
    assert update.adapter["m"].A.shape == (2, 1)


def test_without_decay_nobody_prunes():
    assert pruned(RECEIVED, {"m": literal([[0], [0]], [[0, 0]])}, gamma=1.0).rank == 2


TWO_MODULES = {"m": RECEIVED["m"], "n": RECEIVED["m"]}
ONE_SHRANK = {"m": literal([[5], [1]], [[5, 1]]), "n": literal([[5], [2]], [[5, 4]])}  # products 1 and 8, were 6 and 6
ONE_GREW = {"m": literal([[5], [1]], [[5, 1]]), "n": literal([[5], [6]], [[5, 2]])}  # products 1 and 12, were 6 and 6


def test_one_rank_a_client_compares_the_sum_over_its_modules():
    update = pruned(TWO_MODULES, ONE_SHRANK)  # 1 + 8 < 12: both modules are cut, though one grew
    assert update.rank == 1
    assert_same(update.adapter, {"m": literal([[5]], [[5]]), "n": literal([[5]], [[5]])})
    assert pruned(TWO_MODULES, ONE_GREW).rank == 2  # 1 + 12 > 12


@pytest.mark.parametrize("after", [ONE_SHRANK, ONE_GREW])
def test_per_module_every_module_is_pruned_on_its_own_test(after):
    update = pruned(TWO_MODULES, after, per_module=True)
    assert update.rank == {"m": 1, "n": 2}
    assert_same(update.adapter, {"m": literal([[5]], [[5]]), "n": after["n"]})


def test_per_module_ranks_are_kept_and_go_on_from_there():
    method = hetlora(gamma=0.5, min_rank=1, per_module=True)
    client = Client("a", 2, 1)
    engine = FakeEngine(lambda task: answer(task, ONE_GREW if task.round == 0 else task.adapter))
    state, report = run_round(ServerState(TWO_MODULES), method, engine, [client])
    assert state.ranks == {"a": {"m": 1, "n": 2}}
    assert report.clients[0].pruned
    state, report = run_round(state, method, engine, [client])
    assert engine.asked[1]["a"].rank == {"m": 1, "n": 2}
    assert engine.asked[1]["a"].adapter["m"].A.shape == (1, 1)
    assert state.ranks == {"a": {"m": 1, "n": 2}}
    assert not report.clients[0].pruned


def test_per_module_a_client_that_cut_nothing_did_not_prune():
    method = hetlora(gamma=0.5, min_rank=1, per_module=True)
    state, report = run_round(ServerState(TWO_MODULES), method, FakeEngine(answer), [Client("a", 2, 1)])
    assert not report.clients[0].pruned
    assert state.ranks == {}


# Where the tail starts -----------------------------------------------------------------------------------------------


def test_the_tail_starts_at_the_floor_taken_in_decimals():
    # 0.29 * 100 is 28.999999999999996 in binary floating point, and 0.07 * 100 is 7.000000000000001.
    assert tail_start(100, 0.29, 1) == 29
    assert tail_start(100, 0.07, 1) == 7
    for rank, hundredths in itertools.product(range(1, 201), range(1, 101)):
        expected = min(rank, max(1, hundredths * rank // 100))
        assert tail_start(rank, hundredths / 100, 1) == expected, (rank, hundredths)


def test_at_gamma_99_the_tail_is_one_slot_up_to_rank_100():
    assert [rank - tail_start(rank, 0.99, 1) for rank in range(2, 101)] == [1] * 99
    assert 101 - tail_start(101, 0.99, 1) == 2


@laws
@given(st.integers(1, 300), st.floats(1e-9, 1.0), st.integers(1, 300))
def test_the_tail_starts_between_min_rank_and_rank(rank, gamma, min_rank):
    start = tail_start(rank, gamma, min_rank)
    assert min(rank, min_rank) <= start <= rank
    assert start < rank or gamma == 1.0 or rank <= min_rank


def test_repeated_prunes_end_at_min_rank():
    rank, seen = 50, []
    while rank not in seen:
        seen.append(rank)
        rank = tail_start(rank, 0.85, 5)
    assert seen == [50, 42, 35, 29, 24, 20, 17, 14, 11, 9, 7, 5]


# The tail penalty ----------------------------------------------------------------------------------------------------


def test_the_penalty_is_lambda_times_the_tails_of_every_client():
    # γ = 0.5, r_min = 1: tails are slot 1 of rank 2, none of rank 1; padded slots do not count.
    tasks = [TrainTask("a", 0, 2, RECEIVED), TrainTask("b", 0, 1, {"m": literal([[9]], [[9]])})]
    live = {"m": LoraPair(torch.tensor([[[1.0], [4.0]], [[9.0], [0.0]]]), torch.tensor([[[1.0, 5.0]], [[9.0, 0.0]]]))}
    penalty = hetlora(gamma=0.5, min_rank=1, penalty=0.25).penalty(tasks)
    assert penalty(live).tolist() == [0.25 * 5 * 4, 0.0]


def test_a_client_at_min_rank_pays_no_penalty():
    penalty = hetlora(gamma=0.5, min_rank=2).penalty([TrainTask("a", 0, 2, RECEIVED)])
    assert penalty({"m": literal([[[7], [7]]], [[[7, 7]]])}).tolist() == [0.0]


def test_the_penalty_follows_ranks_per_module():
    task = TrainTask("a", 0, {"m": 2, "n": 1}, {"m": RECEIVED["m"], "n": literal([[9]], [[9]])})
    penalty = tail_penalty([task], gamma=0.5, penalty=1.0, min_rank=1)
    assert penalty({"m": literal([[[1], [2]]], [[[1, 3]]]), "n": literal([[[9]]], [[[9]]])}).tolist() == [6.0]


@pytest.mark.parametrize("arguments", [{"gamma": 1.0}, {"penalty": 0.0}])
def test_without_tail_or_lambda_there_is_no_penalty(arguments):
    assert hetlora(**arguments).penalty([TrainTask("a", 0, 2, RECEIVED)]) is None


def test_the_penalty_of_what_was_received_is_what_pruning_compares_with():
    # The term in the loss and the test after it must speak of the same slots.
    state = random_state()
    task = hetlora().distribute(state, Client("a", 7, 1))
    penalty = hetlora(gamma=0.5, min_rank=2, penalty=1.0).penalty([task])
    live = map_tensors(lambda factor: factor[None], task.adapter)
    torch.testing.assert_close(penalty(live)[0], tail_norm(task.adapter, 3))


# Ranks last ----------------------------------------------------------------------------------------------------------


def shrinks(task):
    """Every factor halves: every tail that is not zero is cut."""
    return answer(task, map_tensors(lambda factor: factor / 2, task.adapter))


def test_an_absent_clients_pruned_rank_waits_for_its_next_distribution():
    method = hetlora(gamma=0.5, min_rank=1)
    here, away = Client("here", 8, 1), Client("away", 8, 1)
    engine = FakeEngine(lambda task: shrinks(task) if task.round == 0 else answer(task))
    cohorts = [[here, away], [here], [here], [here, away]]
    states = [state for state, _ in run_rounds(random_state(), method, engine, cohorts.__getitem__, rounds=4)]
    assert [state.ranks for state in states] == [{"here": 4, "away": 4}] * 4
    assert [tasks["away"].rank for tasks in (engine.asked[0], engine.asked[3])] == [8, 4]
    assert engine.asked[3]["away"].adapter["q_proj"].A.shape == (4, 5)


def test_ranks_fall_round_by_round_and_never_grow():
    method = hetlora(gamma=0.5, min_rank=2)
    engine = FakeEngine(lambda task: shrinks(task) if task.round < 3 else grown(task))
    client = Client("a", 8, 1)
    states = [state for state, _ in run_rounds(random_state(), method, engine, lambda _: [client], rounds=5)]
    assert [state.rank(client) for state in states] == [4, 2, 2, 2, 2]


def test_a_client_that_never_pruned_keeps_its_first_rank():
    state, _ = run_round(random_state(), hetlora(gamma=0.5, min_rank=1), FakeEngine(grown), CLIENTS)
    assert state.ranks == {}
    assert [state.rank(client) for client in CLIENTS] == [1, 3, 6, FULL]


def test_a_refused_update_prunes_nobody():
    def change(task):
        return replace(shrinks(task), loss=float("inf") if task.client == "client-3" else 1.0)

    state, report = run_round(random_state(), hetlora(gamma=0.5, min_rank=1), FakeEngine(change), CLIENTS)
    assert [failure.client for failure in report.failures] == ["client-3"]
    assert state.ranks == {"client-1": 1, "client-2": 3}


def test_slots_that_nobody_in_the_cohort_has_are_kept_or_set_to_zero():
    # Global rank 3; the cohort has ranks 1 and 2. Slot 2 is nobody's: kept as it was, or zero in A and B for good.
    before = ServerState({"m": literal([[1], [3], [7]], [[1, 1, 5]])})
    cohort = [Client("a", 2, 1), Client("b", 1, 1)]
    engine = FakeEngine(sends(a=literal([[4], [0]], [[1, 0]]), b=literal([[12]], [[1]])))
    kept, _ = run_round(before, hetlora(gamma=1.0), engine, cohort)
    assert_pair(kept.adapter["m"], [[(4 + 3 * 12) / 4], [0], [7]], [[1, 0, 5]])
    lost, _ = run_round(before, hetlora(gamma=1.0, unowned="zero"), engine, cohort)
    assert_pair(lost.adapter["m"], [[(4 + 3 * 12) / 4], [0], [0]], [[1, 0, 0]])


def test_an_update_without_weight_owns_no_slots():
    # Client a answers B = 0 at rank 3: nothing to average, so its slots 1 and 2 are not overwritten by the zeros of b.
    before = ServerState({"m": literal([[1], [3], [7]], [[1, 1, 5]])})
    engine = FakeEngine(sends(a=literal([[4], [2], [2]], [[0, 0, 0]]), b=literal([[12]], [[1]])))
    after, _ = run_round(before, hetlora(gamma=1.0), engine, [Client("a", 3, 1), Client("b", 1, 1)])
    assert_pair(after.adapter["m"], [[12], [3], [7]], [[1, 1, 5]])


def test_the_slots_in_use_are_those_that_some_client_still_has():
    state = ServerState({"m": literal([[1], [2], [3]], [[4, 5, 6]])}, ranks={"a": 2, "b": 1})
    clients = [Client("a", 3, 1), Client("b", 3, 1)]
    assert_pair(state.owned_slots(clients)["m"], [[1], [2]], [[4, 5]])
    assert_pair(state.owned_slots([*clients, Client("absent", 3, 1)])["m"], [[1], [2], [3]], [[4, 5, 6]])


def test_a_cohort_that_names_a_client_twice_is_refused():
    state = ServerState({"m": literal([[1]], [[1]])})
    with pytest.raises(ValueError, match="round 0 names a twice"):
        run_round(state, hetlora(), FakeEngine(answer), [Client("a", 1, 1), Client("a", 1, 1)])


# Zero-padding and RBLA ------------------------------------------------------------------------------------------------


def test_zeropad_by_hand_and_as_an_ablation_of_hetlora():
    # n = 3 and 1: slot 0 is (3*4 + 1*12) / 4, slot 1 is (3*0 + 1*8) / 4, the zero being a's padding; slot 2 is nobody's.
    before = ServerState({"m": literal([[1], [3], [7]], [[1, 1, 5]])})
    cohort = [Client("a", 1, 3), Client("b", 2, 1)]

    def change(task):
        trained = {"a": literal([[4]], [[2]]), "b": literal([[12], [8]], [[6, 4]])}[task.client]
        return answer(task, {"m": trained}, examples=3 if task.client == "a" else 1)

    for method in (zeropad(), hetlora(gamma=1.0, weights="examples")):
        after, _ = run_round(before, method, FakeEngine(change), cohort)
        assert_pair(after.adapter["m"], [[6], [2], [7]], [[3, 1, 5]])
    after, _ = run_round(before, zeropad(unowned="zero"), FakeEngine(change), cohort)
    assert_pair(after.adapter["m"], [[6], [2], [0]], [[3, 1, 0]])


def test_rbla_by_hand():
    # The same round: slot 1 has one owner and is not diluted, slot 2 has none and stays.
    before = ServerState({"m": literal([[1], [3], [7]], [[1, 1, 5]])})
    cohort = [Client("a", 1, 3), Client("b", 2, 1)]

    def change(task):
        trained = {"a": literal([[4]], [[2]]), "b": literal([[12], [8]], [[6, 4]])}[task.client]
        return answer(task, {"m": trained}, examples=3 if task.client == "a" else 1)

    after, _ = run_round(before, rbla(), FakeEngine(change), cohort)
    assert_pair(after.adapter["m"], [[6], [8], [7]], [[3, 4, 5]])
    after, _ = run_round(before, rbla(weights="equal"), FakeEngine(change), cohort)
    assert_pair(after.adapter["m"], [[8], [8], [7]], [[4, 4, 5]])


@laws
@given(seed=seeds, ranks=st.lists(st.integers(1, FULL), min_size=1, max_size=5))
def test_rbla_does_not_decay_where_nobody_trains(seed, ranks):
    before = random_state(seed)
    cohort = [Client(str(index), rank, examples=1 + index) for index, rank in enumerate(ranks)]
    after, _ = run_round(before, rbla(), FakeEngine(answer), cohort)
    for module in SHAPES:
        torch.testing.assert_close(after.adapter[module], before.adapter[module], rtol=2.0**-23, atol=0.0)


def test_carryover_by_hand():
    # The same round: slot 0 moves by (3*3 + 1*11) / 4, slot 1 by (1*5) / 4, a being one that saw no change; slot 2 by nothing.
    before = ServerState({"m": literal([[1], [3], [7]], [[1, 1, 5]])})
    cohort = [Client("a", 1, 3), Client("b", 2, 1)]

    def change(task):
        trained = {"a": literal([[4]], [[2]]), "b": literal([[12], [8]], [[6, 4]])}[task.client]
        return answer(task, {"m": trained}, examples=3 if task.client == "a" else 1)

    after, _ = run_round(before, carryover(weights="examples"), FakeEngine(change), cohort)
    assert_pair(after.adapter["m"], [[6], [4.25], [7]], [[3, 1.75, 5]])
    # Norms 2*4 = 8 and 6*12 + 4*8 = 104 are shares of 1/14 and 13/14.
    after, _ = run_round(before, carryover(), FakeEngine(change), cohort)
    assert_pair(after.adapter["m"], [[160 / 14], [3 + 65 / 14], [7]], [[(14 + 1 + 65) / 14, 1 + 39 / 14, 5]])


@laws
@given(
    seed=seeds,
    ranks=st.lists(st.integers(1, FULL), min_size=1, max_size=5),
    weights=st.sampled_from(["norm", "examples"]),
)
def test_carryover_changes_nothing_where_nobody_trains_or_nothing_weighs(seed, ranks, weights):
    before = random_state(seed)
    cohort = [Client(str(index), rank, examples=1 + index) for index, rank in enumerate(ranks)]
    after, _ = run_round(before, carryover(weights=weights), FakeEngine(answer), cohort)
    for module in SHAPES:
        torch.testing.assert_close(after.adapter[module], before.adapter[module], rtol=2.0**-23, atol=0.0)
    nothing = FakeEngine(lambda task: answer(task, map_tensors(torch.zeros_like, task.adapter)))
    after, _ = run_round(before, carryover(), nothing, cohort)
    assert_same(after.adapter, before.adapter)


@pytest.mark.parametrize(
    "make", [lambda: zeropad(unowned="drop"), lambda: rbla(weights="norm"), lambda: carryover(weights="slots")]
)
def test_unknown_choices_are_refused_with_the_known_ones(make):
    with pytest.raises(ValueError, match="is not allowed; use one of"):
        make()


# Dilution ------------------------------------------------------------------------------------------------------------


def test_idle_rounds_dilute_the_slots_that_few_clients_have():
    # Eight clients of rank 2, two of rank 8, nobody trains. Slots of unit, orthogonal products make the norms plain:
    # sqrt(2) for the thin, sqrt(2 + 6 s²) for the thick ones, s the product's size in slots 2 ... 7. Both factors of
    # these slots are multiplied by m = Σ_{thick} p_k a round, so s by m²: the paper's rule, and its known weakness.
    state = ServerState({"m": LoraPair(torch.eye(8), torch.eye(8))})
    cohort = [Client(f"thin-{i}", 2, 1) for i in range(8)] + [Client(f"thick-{i}", 8, 1) for i in range(2)]
    s, shrank = 1.0, []
    for _ in range(5):
        thin, thick = 2**0.5, (2 + 6 * s * s) ** 0.5
        m = 2 * thick / (8 * thin + 2 * thick)
        state, _ = run_round(state, hetlora(gamma=1.0), FakeEngine(answer), cohort)
        s *= m * m
        shrank.append(m * m)
        product = state.adapter["m"].B @ state.adapter["m"].A
        expected = torch.diag(torch.tensor([1.0] * 2 + [s] * 6))
        torch.testing.assert_close(product, expected, rtol=1e-5, atol=0.0)
    assert shrank[0] == pytest.approx(1 / 9)  # norms sqrt(2) and sqrt(8): m = 2 * 2 / (8 * 1 + 2 * 2) = 1/3
    assert shrank[-1] == pytest.approx(1 / 25, rel=1e-6)  # at last all norms are equal: m = 2 / 10
    tail_size = float(delta_norm({"m": LoraPair(state.adapter["m"].A[2:], state.adapter["m"].B[:, 2:])}))
    assert 1e-7 < tail_size < 1e-6


# The whole round against a reference ---------------------------------------------------------------------------------


def reference_round(adapter, ranks, train, gamma, min_rank, unowned):
    """HetLoRA's round in plain NumPy, float64: truncate, train, prune, pad, weigh, average."""
    clients = []
    for k, rank in enumerate(ranks):
        received = {name: (A[:rank], B[:, :rank]) for name, (A, B) in adapter.items()}
        after = train(k, received)
        start = min(rank, max(min_rank, gamma.numerator * rank // gamma.denominator))

        def product(factors, start=start):
            return sum(np.linalg.norm(B[:, start:]) * np.linalg.norm(A[start:]) for A, B in factors.values())

        new_rank = start if product(after) < product(received) else rank
        clients.append((new_rank, {name: (A[:new_rank], B[:, :new_rank]) for name, (A, B) in after.items()}))

    norms = [np.sqrt(sum(np.linalg.norm(B @ A) ** 2 for A, B in factors.values())) for _, factors in clients]
    mean = {name: (np.zeros_like(A), np.zeros_like(B)) for name, (A, B) in adapter.items()}
    for norm, (rank, factors) in zip(norms, clients, strict=True):
        for name, (A, B) in factors.items():
            mean[name][0][:rank] += norm / sum(norms) * A
            mean[name][1][:, :rank] += norm / sum(norms) * B
    if unowned == "keep":
        widest = max(rank for rank, _ in clients)
        for name, (A, B) in adapter.items():
            mean[name][0][widest:] = A[widest:]
            mean[name][1][:, widest:] = B[:, widest:]
    return mean, [rank for rank, _ in clients], norms


@examples(60)
@given(
    ranks=st.lists(st.integers(1, FULL), min_size=1, max_size=5),
    gamma=st.fractions(0, 1, max_denominator=10).filter(lambda g: g > 0 and 10 % g.denominator == 0),
    min_rank=st.integers(1, 5),
    seed=seeds,
    unowned=st.sampled_from(["keep", "zero"]),
)
def test_a_round_of_hetlora_equals_its_reference_in_numpy(ranks, gamma, min_rank, seed, unowned):
    state = random_state(seed)
    cohort = [Client(str(k), rank, examples=1) for k, rank in enumerate(ranks)]

    def train(k, received):
        # Rounded to float32 here, so that both sides hold the same numbers; half the tails shrink.
        rng = np.random.default_rng([seed, k])
        draw = {name: (rng.standard_normal(A.shape), rng.standard_normal(B.shape)) for name, (A, B) in received.items()}
        return {name: tuple(factor.astype(np.float32).astype(np.float64) for factor in d) for name, d in draw.items()}

    def change(task):
        received = {name: tuple(factor.double().numpy() for factor in pair) for name, pair in task.adapter.items()}
        after = train(int(task.client), received)
        return answer(task, {name: LoraPair(*(torch.from_numpy(f).float() for f in d)) for name, d in after.items()})

    adapter = {name: tuple(factor.double().numpy() for factor in pair) for name, pair in state.adapter.items()}
    mean, new_ranks, norms = reference_round(adapter, ranks, train, gamma, min_rank, unowned)

    method = hetlora(gamma=float(gamma), min_rank=min_rank, unowned=unowned)
    after, report = run_round(state, method, FakeEngine(change), cohort)
    assert [client.new_rank for client in report.clients] == new_ranks
    np.testing.assert_allclose([client.weight for client in report.clients], norms, rtol=1e-9)
    for name, (A, B) in mean.items():
        np.testing.assert_allclose(after.adapter[name].A.numpy(), A, rtol=2.0**-22, atol=1e-9)
        np.testing.assert_allclose(after.adapter[name].B.numpy(), B, rtol=2.0**-22, atol=1e-9)


# Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("gamma", 0.0),
        ("gamma", -0.5),
        ("gamma", 1.01),
        ("gamma", float("nan")),
        ("penalty", -0.1),
        ("penalty", float("nan")),
        ("min_rank", 0),
        ("min_rank", -3),
        ("weights", "samples"),
    ],
)
def test_hetlora_names_the_argument_and_the_value_it_does_not_allow(argument, value):
    with pytest.raises(ValueError, match=f"{argument}={value!r} is not allowed; use "):
        hetlora(**{argument: value})


@pytest.mark.parametrize("arguments", [{"gamma": 1.0}, {"gamma": 1e-9}, {"penalty": 0.0}, {"min_rank": 1}])
def test_hetlora_allows_the_ends_of_its_ranges(arguments):
    assert hetlora(**arguments).name == "hetlora"
