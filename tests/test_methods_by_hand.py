"""Each method's server step worked out by hand, with the arithmetic in the comments."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drawn_examples import examples
from fake_clients import FULL, SHAPES, FakeEngine, answer, assert_pair, assert_same, literal, random_state, sends
from hetlora.core.adapter import LoraPair, ModuleShape, delta, map_tensors, truncate, with_factor, zeros
from hetlora.core.round import run_round
from hetlora.core.types import BaseDelta, Client, ClientUpdate, ServerState
from hetlora.errors import ShapeError
from hetlora.methods import (
    METHODS,
    central,
    fedex_lora,
    fedit,
    fedsa_lora,
    ffa_lora,
    flexlora,
    flora,
    full,
    local,
    principal,
    rbla,
    recon_svd,
    replication,
    rolora,
    zeroshot,
)

laws = examples(20)
seeds = st.integers(0, 2**32 - 1)

# The two clients of most examples, on a module of [2, 2]: n = 1 and 3, ranks 1 and 2.
A_CLIENT = literal([[0, 1]], [[-12], [0]])  # B A = [[0, -12], [0, 0]]
B_CLIENT = literal([[1, 0], [2, 0]], [[0, 0], [4, 2]])  # B A = [[0, 0], [4 + 2*2, 0]] = [[0, 0], [8, 0]]
TWO = [Client("a", 1, examples=1), Client("b", 2, examples=3)]
MEAN = [[0, -3], [6, 0]]  # (1 * [[0, -12], [0, 0]] + 3 * [[0, 0], [8, 0]]) / 4
BEFORE = ServerState({"m": literal([[1, 1], [2, 3], [5, 7]], [[1, 1, 1], [1, 1, 0]])}, seed=3)


def one_round(method, state=BEFORE, cohort=TWO, **pairs):
    engine = FakeEngine(sends(**(pairs or {"a": A_CLIENT, "b": B_CLIENT})))
    state, report = run_round(state, method, engine, cohort)
    assert not report.failures
    return state


def assert_folded(state, expected):
    torch.testing.assert_close(state.folded.delta["m"], torch.tensor(expected, dtype=torch.float32))


# Replication ---------------------------------------------------------------------------------------------------------


def test_replication_fills_missing_slots_with_those_of_the_highest_rank():
    # n = 1, 3, 4 and ranks 1, 2, 3; c is the highest. Slot 0: (8 + 3*0 + 4*2) / 8 and (4 + 3*4 + 4*8) / 8.
    # Slot 1, where a takes c's: (3*4 + 4*8 + 1*8) / 8 and (3*0 + 4*2 + 1*2) / 8. Slot 2: c's alone. Slot 3 is nobody's.
    before = ServerState({"m": literal([[1], [1], [1], [7]], [[1, 1, 1, 5]])})
    cohort = [Client("a", 1, 1), Client("b", 2, 3), Client("c", 3, 4)]
    pairs = {
        "a": literal([[8]], [[4]]),
        "b": literal([[0], [4]], [[4, 0]]),
        "c": literal([[2], [8], [6]], [[8, 2, 5]]),
    }
    after = one_round(replication(), before, cohort, **pairs)
    assert_pair(after.adapter["m"], [[2], [6.5], [6], [7]], [[6, 1.25, 5, 5]])
    # Of equal weights: slot 0 (8 + 0 + 2) / 3 and 16 / 3, slot 1 (4 + 8 + 8) / 3 and (0 + 2 + 2) / 3.
    after = one_round(replication(weights="equal"), before, cohort, **pairs)
    assert_pair(after.adapter["m"], [[10 / 3], [20 / 3], [6], [7]], [[16 / 3, 4 / 3, 5, 5]])


def test_replication_takes_the_mean_over_several_clients_of_the_highest_rank():
    # b and c have n = 3 and 4: slot 1 of A is (3*4 + 4*8) / 7 = 44/7, which a replicates.
    before = ServerState({"m": literal([[1], [1]], [[1, 1]])})
    cohort = [Client("a", 1, 1), Client("b", 2, 3), Client("c", 2, 4)]
    after = one_round(
        replication(),
        before,
        cohort,
        a=literal([[8]], [[4]]),
        b=literal([[0], [4]], [[4, 0]]),
        c=literal([[2], [8]], [[8, 7]]),
    )
    assert_pair(after.adapter["m"], [[2], [44 / 7]], [[6, 4]])


@laws
@given(seed=seeds, wide=st.integers(2, FULL), counts=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_replication_with_two_ranks_is_the_mean_over_owners(seed, wide, counts):
    ranks = [1] * counts[0] + [wide] * counts[1]
    cohort = [Client(str(i), rank, 1) for i, rank in enumerate(ranks)]

    def change(task):
        draw = random_state(seed + int(task.client), rank=task.rank)
        return answer(task, draw.adapter, examples=1 + int(task.client))

    one, _ = run_round(random_state(seed), replication(), FakeEngine(change), cohort)
    other, _ = run_round(random_state(seed), rbla(), FakeEngine(change), cohort)
    for module in SHAPES:
        torch.testing.assert_close(one.adapter[module], other.adapter[module], rtol=2.0**-22, atol=1e-7)


# FlexLoRA and Recon+SVD ----------------------------------------------------------------------------------------------


def test_flexlora_redistributes_the_mean_product_by_its_svd():
    # [[0, -3], [6, 0]] has the singular values 6 and 3: 6 = [0, 1]ᵀ 6 [1, 0], and 3 = [-1, 0]ᵀ 3 [0, 1], where the sign
    # goes to B, since the largest entry of a row of A is positive. Slot 2 is beyond the rank: A as it was, B = 0.
    after = one_round(flexlora())
    assert_pair(after.adapter["m"], [[1, 0], [0, 1], [5, 7]], [[0, -3, 0], [6, 0, 0]])
    thin = flexlora().distribute(after, Client("thin", 1, 1))
    assert_pair(thin.adapter["m"], [[1, 0]], [[0], [6]])


def test_recon_svd_weighs_equally():
    # [[0, -12], [8, 0]] / 2 has the singular values 6 and 4, in the other order.
    after = one_round(recon_svd())
    assert_pair(after.adapter["m"], [[0, 1], [1, 0], [5, 7]], [[-6, 0, 0], [0, 4, 0]])
    weighed = one_round(recon_svd(weights="examples"))
    assert_same(weighed.adapter, one_round(flexlora()).adapter)


def test_flexlora_keeps_a_where_the_mean_has_less_rank_than_its_factors_slots():
    # b alone: [[0, 0], [8, 0]] has rank 1, though b sends two slots; slots 1 and 2 stay alive with B = 0 exactly.
    after = one_round(flexlora(), cohort=TWO[1:])
    assert_pair(after.adapter["m"], [[1, 0], [2, 3], [5, 7]], [[0, 0, 0], [8, 0, 0]])
    assert torch.equal(after.adapter["m"].B[:, 1:], torch.zeros(2, 2))
    assert torch.equal(after.adapter["m"].A[1:], BEFORE.adapter["m"].A[1:])


def test_flexlora_keeps_the_adapter_alive_where_all_products_are_zero():
    after = one_round(flexlora(), a=literal([[0, 1]], [[0], [0]]), b=literal([[1, 0], [2, 0]], [[0, 0], [0, 0]]))
    assert torch.equal(after.adapter["m"].A, BEFORE.adapter["m"].A)
    assert torch.equal(after.adapter["m"].B, torch.zeros(2, 3))


def test_flexlora_loses_the_singular_values_beyond_the_global_rank():
    # Global rank 1: of 6 and 3 only 6 stays.
    state = replace(BEFORE, adapter=truncate(BEFORE.adapter, 1))
    engine = FakeEngine(lambda task: answer(task, {"m": A_CLIENT if task.client == "a" else literal([[1, 0]], [[0], [8]])},
                                            examples={"a": 1, "b": 3}[task.client]))  # fmt: skip
    after, _ = run_round(state, flexlora(), engine, [Client("a", 1, 1), Client("b", 1, 3)])
    assert_pair(after.adapter["m"], [[1, 0]], [[0], [6]])


# FLoRA ---------------------------------------------------------------------------------------------------------------


def test_flora_folds_the_mean_product_and_begins_afresh():
    after = one_round(flora())
    assert_folded(after, MEAN)
    # a sends 1 slot of 2 + 2 numbers, b 2: 12 numbers of 4 bytes.
    assert after.folded.sizes == {0: 48}
    assert torch.equal(after.adapter["m"].B, torch.zeros(2, 3)), "what was in the factors is in the base"
    # A second round folds on top: (1 * [[4, 0], [0, 0]] + 3 * [[0, 0], [0, 4]]) / 4 = [[1, 0], [0, 3]].
    again = one_round(flora(), after, a=literal([[4, 0]], [[1], [0]]), b=literal([[0, 4], [9, 9]], [[0, 0], [1, 0]]))
    assert_folded(again, [[1, -3], [6, 3]])
    assert again.folded.sizes == {0: 48, 1: 48}
    assert_folded(after, MEAN)


def test_floras_clients_each_begin_a_round_with_an_a_of_their_own():
    state = ServerState({"m": BEFORE.adapter["m"], "n": BEFORE.adapter["m"]}, seed=3)
    begins = {
        "first": flora().distribute(state, Client("a", 3, 1)),
        "other client": flora().distribute(state, Client("b", 3, 1)),
        "other round": flora().distribute(replace(state, round=1), Client("a", 3, 1)),
        "other seed": flora().distribute(replace(state, seed=4), Client("a", 3, 1)),
    }
    drawn = [pair.A for task in begins.values() for pair in task.adapter.values()]
    assert len(torch.cat(drawn).unique()) == 4 * 2 * 6, "every client, round, seed and module draws its own"
    assert max(float(A.abs().max()) for A in drawn) <= 2**-0.5
    for task in begins.values():
        assert task.receives == ""
        assert all(torch.equal(pair.B, torch.zeros(2, 3)) for pair in task.adapter.values())
    assert_same(flora().distribute(state, Client("a", 3, 1)).adapter, begins["first"].adapter)
    assert_same(
        flora().distribute(replace(state, folded=BaseDelta({}, {7: 1})), Client("a", 3, 9)).adapter,
        begins["first"].adapter,
    )


def test_a_thin_client_of_flora_computes_with_all_that_was_folded():
    after = one_round(flora())
    task = flora().distribute(after, Client("thin", 1, 1))
    assert task.adapter["m"].A.shape == (1, 2)
    assert torch.equal(task.folded.delta["m"], torch.tensor(MEAN, dtype=torch.float32))


# FedEx-LoRA ----------------------------------------------------------------------------------------------------------


def test_fedex_lora_folds_what_the_averaged_factors_miss():
    # Ā = [(1*[0, 1] + 3*[1, 0]) / 4; 3*[2, 0] / 4; kept], B̄ = [(1*[-12, 0] + 3*[0, 4]) / 4, 3*[0, 2] / 4, kept].
    # In the cohort's slots B̄ Ā = [-3, 3]ᵀ[.75, .25] + [0, 1.5]ᵀ[1.5, 0] = [[-2.25, -.75], [4.5, .75]], and the residual is
    # [[0, -3], [6, 0]] less that. Nobody's slot 2 is no part of it: it would be subtracted anew in every such round.
    after = one_round(fedex_lora())
    assert_pair(after.adapter["m"], [[0.75, 0.25], [1.5, 0], [5, 7]], [[-3, 0, 1], [3, 1.5, 0]])
    assert_folded(after, [[2.25, -2.25], [1.5, -0.75]])
    product = after.adapter["m"].B[:, :2] @ after.adapter["m"].A[:2] + after.folded.delta["m"]
    torch.testing.assert_close(product, torch.tensor(MEAN, dtype=torch.float32))
    # The stacks of a and b, 12 numbers, beside two slots of Ā and B̄, 8 numbers.
    assert after.folded.sizes == {0: 80}


def test_fedex_lora_adds_the_next_residual_to_the_last():
    # One client of full rank: nothing is missed, so the first residual stays.
    first = one_round(fedex_lora())
    after, _ = run_round(first, fedex_lora(), FakeEngine(answer), [Client("c", 3, 4)])
    assert_folded(after, [[2.25, -2.25], [1.5, -0.75]])
    assert after.folded.sizes == {0: 80, 1: 96}


# FFA-LoRA ------------------------------------------------------------------------------------------------------------


def test_ffa_lora_averages_b_beside_the_servers_a():
    # B = [(1*[4, 8] + 3*[4, 0]) / 4, 3*[8, 4] / 4, kept]; A is the server's own, whose row 1 a does not have: averaged,
    # it would be 3/4 of [2, 3].
    before = BEFORE.adapter["m"]
    pairs = {
        "a": LoraPair(before.A[:1], torch.tensor([[4.0], [8.0]])),
        "b": LoraPair(before.A[:2], torch.tensor([[4.0, 8.0], [0.0, 4.0]])),
    }
    after = one_round(ffa_lora(), **pairs)
    assert torch.equal(after.adapter["m"].A, before.A)
    assert_pair(after.adapter["m"], before.A.tolist(), [[4, 6, 1], [2, 3, 0]])
    mean = 0.25 * pairs["a"].B @ pairs["a"].A + 0.75 * pairs["b"].B @ pairs["b"].A
    torch.testing.assert_close(after.adapter["m"].B[:, :2] @ after.adapter["m"].A[:2], mean)


def test_ffa_lora_takes_a_from_the_server_whatever_arrives():
    # Admission would refuse this one; the sum does not depend on it.
    method = ffa_lora()
    update = ClientUpdate("c", 0, 3, {"m": literal([[9, 9]] * 3, [[1, 2, 3], [4, 5, 6]])}, 1, 1, 1.0)
    after = method.finish(BEFORE, method.add(method.start(BEFORE), update, 2.0))
    assert torch.equal(after.adapter["m"].A, BEFORE.adapter["m"].A)
    assert_pair(after.adapter["m"], BEFORE.adapter["m"].A.tolist(), [[1, 2, 3], [4, 5, 6]])


def test_ffa_lora_trains_and_sends_b_alone():
    task = ffa_lora().distribute(BEFORE, TWO[1])
    assert (task.receives, task.trains, task.sends) == ("B", "B", "B")
    assert_same(task.adapter, truncate(BEFORE.adapter, 2))


# RoLoRA --------------------------------------------------------------------------------------------------------------


def test_rolora_averages_one_factor_in_turn():
    # Round 0, B: [(1*[4, 8] + 3*[4, 0]) / 4, 3*[8, 4] / 4, kept], as in FFA-LoRA.
    A, B = BEFORE.adapter["m"]
    even = one_round(
        rolora(),
        a=LoraPair(A[:1], torch.tensor([[4.0], [8.0]])),
        b=LoraPair(A[:2], torch.tensor([[4.0, 8.0], [0.0, 4.0]])),
    )
    assert torch.equal(even.adapter["m"].A, A)
    assert_pair(even.adapter["m"], A.tolist(), [[4, 6, 1], [2, 3, 0]])
    # Round 1, A: [(1*[4, 0] + 3*[0, 4]) / 4; 3*[8, 4] / 4; kept] beside round 0's B.
    B = even.adapter["m"].B
    odd = one_round(
        rolora(),
        even,
        a=LoraPair(torch.tensor([[4.0, 0.0]]), B[:, :1]),
        b=LoraPair(torch.tensor([[0.0, 4.0], [8.0, 4.0]]), B[:, :2]),
    )
    assert torch.equal(odd.adapter["m"].B, B)
    assert_pair(odd.adapter["m"], [[1, 3], [6, 3], [5, 7]], B.tolist())


def test_rolora_sends_what_a_client_has_not_got():
    method, client = rolora(), Client("a", 1, 1)

    def factors(round_number, answered):
        task = method.distribute(replace(BEFORE, round=round_number, answered=answered), client)
        return task.receives, task.trains, task.sends

    assert factors(0, {}) == ("AB", "B", "B")
    assert factors(1, {"a": 0}) == ("B", "A", "A"), "round 0 changed B, and a has its A"
    assert factors(1, {"b": 0}) == ("AB", "A", "A"), "a was not there"
    assert factors(2, {"a": 1}) == ("A", "B", "B")
    assert factors(2, {"a": 0}) == ("AB", "B", "B"), "since round 0 both changed"
    assert factors(7, {"a": 6}) == ("B", "A", "A")


# FedSA-LoRA ----------------------------------------------------------------------------------------------------------


def test_fedsa_lora_averages_a_over_owners_and_leaves_b_with_its_client():
    # n = 1 and 3. Slot 0 of A: (1*[0, 1] + 3*[1, 0]) / 4; slot 1 is b's own, not 3/4 of it; slot 2 stays.
    before = replace(BEFORE, adapter=with_factor(BEFORE.adapter, "B", zeros({"m": ModuleShape(2, 2)}, 3)))
    method = fedsa_lora()
    after = one_round(method, before)
    assert_pair(after.adapter["m"], [[0.75, 0.25], [2, 0], [5, 7]], [[0, 0, 0], [0, 0, 0]])
    # Next: a has its own B beside the common A, b too, and a client that never took part has B = 0: the base.
    assert_pair(method.distribute(after, TWO[0]).adapter["m"], [[0.75, 0.25]], [[-12], [0]])
    assert_pair(method.distribute(after, TWO[1]).adapter["m"], [[0.75, 0.25], [2, 0]], [[0, 0], [4, 2]])
    new = method.distribute(after, Client("new", 3, 1))
    assert_pair(new.adapter["m"], [[0.75, 0.25], [2, 0], [5, 7]], [[0, 0, 0], [0, 0, 0]])
    assert (new.receives, new.trains, new.sends) == ("A", "AB", "A")


def test_fedsa_lora_keeps_an_absent_clients_b():
    after = one_round(fedsa_lora())
    later = one_round(fedsa_lora(), after, cohort=TWO[:1], a=literal([[4, 4]], [[9], [9]]))
    assert_pair(fedsa_lora().distribute(later, TWO[1]).adapter["m"], [[4, 4], [2, 0]], [[0, 0], [4, 2]])
    assert_pair(fedsa_lora().distribute(later, TWO[0]).adapter["m"], [[4, 4]], [[9], [9]])


# Full fine-tuning, and the federation's bounds -----------------------------------------------------------------------


def test_full_averages_the_changes_of_every_weight():
    # n = 1 and 3: (1*8 + 3*4) / 4 = 5 and (1*0 + 3*2) / 4 = 1.5; A stays the constant 1.
    before = ServerState({"m": literal([[1]], [[0], [0]])})
    cohort = [Client("a", 1, 1), Client("b", 1, 3)]
    after = one_round(full(), before, cohort, a=literal([[1]], [[8], [0]]), b=literal([[1]], [[4], [2]]))
    assert_pair(after.adapter["m"], [[1]], [[5], [1.5]])
    task = full().distribute(after, cohort[0])
    assert (task.receives, task.trains, task.sends) == ("B", "B", "B")
    assert full().trains == "weights"


def test_central_takes_over_what_the_one_client_has_learned():
    method = central()
    sent = {"m": literal([[4, 2], [3, 3], [1, 0]], [[1, 2, 3], [4, 5, 6]])}
    everyone = Client("everyone", 3, 4)
    after, _ = run_round(BEFORE, method, FakeEngine(lambda task: answer(task, sent, examples=4)), [everyone])
    assert_same(after.adapter, sent)
    assert method.clients == "pooled"


def test_local_clients_go_on_from_their_own_and_nothing_is_shared():
    method = local()
    after = one_round(method)
    assert_same(after.adapter, BEFORE.adapter)
    assert_same(method.distribute(after, TWO[0]).adapter, {"m": A_CLIENT})
    assert_same(method.distribute(after, TWO[1]).adapter, {"m": B_CLIENT})
    later = one_round(method, after, cohort=TWO[:1], a=literal([[4, 4]], [[9], [9]]))
    assert_same(method.distribute(later, TWO[0]).adapter, {"m": literal([[4, 4]], [[9], [9]])})
    assert_same(method.distribute(later, TWO[1]).adapter, {"m": B_CLIENT}, )  # fmt: skip
    assert_same(method.distribute(later, Client("new", 1, 1)).adapter, truncate(BEFORE.adapter, 1))


def test_zeroshot_learns_nothing_whatever_is_sent():
    after = one_round(zeroshot())
    assert_same(after.adapter, BEFORE.adapter)
    assert (after.kept, after.folded.delta) == ({}, {})
    assert zeroshot().clients == "nobody"


def test_fedit_weighs_by_examples_and_refuses_to_mix_ranks():
    # n = 1 and 3: (1*8 + 3*0) / 4 and (1*4 + 3*8) / 4.
    before = ServerState({"m": literal([[1]], [[1]])})
    cohort = [Client("a", 1, 1), Client("b", 1, 3)]
    after = one_round(fedit(), before, cohort, a=literal([[8]], [[4]]), b=literal([[0]], [[8]]))
    assert_pair(after.adapter["m"], [[2]], [[7]])
    with pytest.raises(ShapeError, match="client 'a' has rank 1, the global adapter 3"):
        one_round(fedit())


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, make in METHODS.items()
        if name not in ("hetlora", "carryover", "principal", "steady", "rbla", "fedavg")
        and "weights" in inspect.signature(make).parameters
    ],
)
def test_weights_a_method_does_not_know_are_named(name):
    with pytest.raises(ValueError, match="weights='norm' is not allowed; use one of examples, equal"):
        METHODS[name](weights="norm")


def test_personal_methods_are_those_that_keep_something():
    assert {name for name, make in METHODS.items() if make().keep is not None} == {"fedsa_lora", "local"}


# Principal slots ------------------------------------------------------------------------------------------------------


def test_principal_keeps_what_a_client_lacks_and_sends_the_largest_first():
    # ΔW = diag(6, 3) and n = 1, 3. a, of rank 1, changes it by diag(12, 0), b by diag(0, 12): diag(6 + 3, 3 + 9) = diag(9, 12).
    before = ServerState({"m": literal([[1, 0], [0, 1], [5, 7]], [[6, 0, 0], [0, 3, 0]])})
    pairs = {"a": literal([[1, 0]], [[18], [0]]), "b": literal([[1, 0], [0, 1]], [[6, 0], [0, 15]])}
    after = one_round(principal(weights="examples"), before, **pairs)
    assert_pair(after.adapter["m"], [[0, 1], [1, 0], [5, 7]], [[0, 9, 0], [12, 0, 0]])
    thin = principal().distribute(after, Client("thin", 1, 1))
    assert_pair(thin.adapter["m"], [[0, 1]], [[0], [12]])
    # Norms: a's 10 and b's |diag(6, 8)| = 10, half each: diag(6 + 2, 3 + 2.5).
    pairs = {"a": literal([[1, 0]], [[10], [0]]), "b": literal([[1, 0], [0, 1]], [[6, 0], [0, 8]])}
    after = one_round(principal(), before, **pairs)
    assert_pair(after.adapter["m"], [[1, 0], [0, 1], [5, 7]], [[8, 0, 0], [0, 5.5, 0]])
    assert_same(one_round(principal(weights="equal"), before, **pairs).adapter, after.adapter)


@laws
@given(seed=seeds, ranks=st.lists(st.integers(1, FULL), min_size=1, max_size=5))
def test_principal_changes_no_product_where_nobody_trains_and_nothing_where_nothing_weighs(seed, ranks):
    before = random_state(seed)
    cohort = [Client(str(index), rank, examples=1 + index) for index, rank in enumerate(ranks)]
    after, _ = run_round(before, principal(), FakeEngine(answer), cohort)
    for module, pair in before.adapter.items():
        torch.testing.assert_close(delta(after.adapter[module]), delta(pair), rtol=0.0, atol=1e-5)
    nothing = FakeEngine(lambda task: answer(task, map_tensors(torch.zeros_like, task.adapter)))
    after, _ = run_round(before, principal(), nothing, cohort)
    assert_same(after.adapter, before.adapter)


@laws
@given(seed=seeds, count=st.integers(1, 4))
def test_principal_of_full_ranks_is_flexlora(seed, count):
    cohort = [Client(str(index), FULL, examples=1 + index) for index in range(count)]

    def change(task):
        drawn = random_state(seed + int(task.client) + 1, rank=FULL).adapter
        return answer(task, drawn, examples=1 + int(task.client))

    one, _ = run_round(random_state(seed), principal(weights="examples"), FakeEngine(change), cohort)
    other, _ = run_round(random_state(seed), flexlora(), FakeEngine(change), cohort)
    for module in one.adapter:
        torch.testing.assert_close(delta(one.adapter[module]), delta(other.adapter[module]), rtol=0.0, atol=1e-4)


# Bytes and trained parameters ----------------------------------------------------------------------------------------

# One module of [20, 30]: a slot of A is 30 numbers or 120 bytes, of B 20 or 80 bytes. Client a has rank 1, b rank 2.
# Rounds 0 and 2 ask both, round 1 asks a alone. Down and up by round, and numbers trained by a and b in round 2.
TRUNCATING = ([600, 200, 600], [600, 200, 600], [50, 100])
ONE_RANK = ([800, 400, 800], [800, 400, 800], [100, 100])
BYTES = {
    "hetlora": TRUNCATING,
    "zeropad": TRUNCATING,
    "replication": TRUNCATING,
    "rbla": TRUNCATING,
    "carryover": TRUNCATING,
    "principal": TRUNCATING,
    "steady": TRUNCATING,
    "flexlora": TRUNCATING,
    "recon_svd": TRUNCATING,
    # Nothing at first. In round 1, a gets round 0's stack of 1 + 2 slots; in round 2, a gets round 1's of 1 slot and b both.
    "flora": ([0, 600, 200 + 800], [600, 200, 600], [50, 100]),
    # A and B, and the residual: 1 + 2 + 2 slots of round 0, 1 + 1 of round 1. a: 200 + 400, b: 400 + 1000 + 400.
    "fedex_lora": ([600, 200 + 1000, 600 + 1800], [600, 200, 600], [50, 100]),
    "ffa_lora": ([240, 80, 240], [240, 80, 240], [20, 40]),
    # Both factors, then B; in round 2, a gets A and b, which missed round 1, both. Up: B, A, B.
    "rolora": ([600, 80, 120 + 400], [240, 120, 240], [20, 40]),
    "fedsa_lora": ([360, 120, 360], [360, 120, 360], [50, 100]),
    "fedavg": ONE_RANK,
    "fedit": ONE_RANK,
    "central": ONE_RANK,
    # Whole weights: one of 6 and one of 2 numbers.
    "full": ([64, 32, 64], [64, 32, 64], [8, 8]),
    "local": ([0, 0, 0], [0, 0, 0], [50, 100]),
    # Nobody is asked; if somebody were, it would be as in any method that truncates.
    "zeroshot": TRUNCATING,
}


@pytest.mark.parametrize("name", METHODS)
def test_bytes_by_hand(name):
    down, up, numbers = BYTES[name]
    method = METHODS[name]()
    ranks = (2, 2) if BYTES[name] is ONE_RANK else (1, 2)
    state = random_state(rank=2, shapes={"m": ModuleShape(20, 30)})
    if method.trains == "weights":
        ranks = (1, 1)
        state = ServerState({"w": literal([[1]], [[0]] * 6), "b": literal([[1]], [[0]] * 2)})
    a, b = (Client(client, rank, 1) for client, rank in zip("ab", ranks, strict=True))
    reports = []
    for cohort in ([a, b], [a], [a, b]):
        state, report = run_round(state, method, FakeEngine(answer), cohort)
        assert len(report.clients) == len(cohort)
        reports.append(report)
    assert [report.bytes_down for report in reports] == down
    assert [sum(client.bytes_up for client in report.clients) for report in reports] == up
    assert [client.trained for client in reports[2].clients] == numbers


def test_what_was_folded_travels_as_its_dense_sum_where_that_is_smaller():
    # [2, 2] in float32 is 16 bytes; the stacks of two rounds are 48 each.
    method = flora()
    after = one_round(method, one_round(method))
    assert after.folded.sizes == {0: 48, 1: 48}
    assert method.distribute(after, TWO[0]).bytes_down == 16
    assert method.distribute(after, Client("new", 1, 1)).bytes_down == 16


def test_folded_bytes_are_those_of_the_missed_rounds():
    delta = {"m": torch.zeros(10, 10)}  # 400 bytes
    folded = BaseDelta(delta, {0: 100, 3: 120, 4: 150})
    assert [folded.num_bytes(since) for since in range(6)] == [370, 270, 270, 270, 150, 0]
    assert BaseDelta(delta, {0: 300, 1: 300}).num_bytes(0) == 400
    assert BaseDelta().num_bytes(0) == 0


def test_only_a_client_that_answered_is_known_to_have_what_was_folded():
    method = flora()
    first, b = one_round(method), TWO[1]
    failed, report = run_round(first, method, FakeEngine(lambda _: None, order=lambda _: []), [b])
    assert report.bytes_down == 16
    assert method.distribute(failed, b).bytes_down == 16, "it may have got it, or not"
    answered = one_round(method, first, cohort=[b])
    task = method.distribute(replace(answered, folded=first.folded), b)
    assert (task.since, task.bytes_down) == (1, 0)


def test_rolora_sends_both_factors_to_a_client_that_failed():
    method, a = rolora(), TWO[0]
    failed, _ = run_round(BEFORE, method, FakeEngine(lambda _: None, order=lambda _: []), [a])
    assert method.distribute(failed, a).receives == "AB"
