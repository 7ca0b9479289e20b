"""Server optimisers and FedProx around a method, two rounds by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fake_clients import FakeEngine, answer, assert_same, literal, random_state, trained
from hetlora.core.adapter import LoraPair, map_tensors, tail
from hetlora.core.round import run_round
from hetlora.core.types import Client, ClientFailure, ServerState, TrainTask
from hetlora.methods import (
    averaged,
    fedavg,
    fedopt,
    fedprox,
    fedsa_lora,
    flexlora,
    flora,
    hetlora,
    rolora,
    steady,
    zeroshot,
)

ONE = [Client("a", 1, 1)]


def two_rounds(method, a_changes, b_changes):
    """A starts at 1, B at 1; the client moves each by these amounts. Returns both factors after every round."""
    state = ServerState({"m": literal([[1]], [[1]])})

    def change(task):
        A, B = task.adapter["m"]
        return answer(task, {"m": LoraPair(A + a_changes[task.round], B + b_changes[task.round])})

    seen = []
    for _ in range(2):
        state, _ = run_round(state, method, FakeEngine(change), ONE)
        seen.append((float(state.adapter["m"].A), float(state.adapter["m"].B)))
    return state, seen


def test_momentum_by_hand():
    # β₁ = η = 0.5. A moves by 2, then 1: m = 2, x = 1 + 1; m = 1 + 1, x = 2 + 1. B by -1, then 0: m = -1, x = 0.5;
    # m = -0.5, x = 0.25.
    method = fedopt(fedavg(), optimizer="momentum", learning_rate=0.5, beta1=0.5)
    state, seen = two_rounds(method, [2.0, 1.0], [-1.0, 0.0])
    assert seen == [(2.0, 0.5), (3.0, 0.25)]
    assert state.moments.keys() == {"first"}
    assert float(state.moments["first"]["m"].A) == 2.0


def test_adam_by_hand():
    # β₁ = 0.5, β₂ = 0.75, τ = 0.5, η = 2; v begins at τ² = 0.25. A moves by 2, then 1:
    # m = 1, v = 0.75 * 0.25 + 0.25 * 4 = 1.1875; m = 0.5 + 0.5 = 1, v = 0.75 * 1.1875 + 0.25 = 1.140625.
    # B moves by 0, then -2: m = 0; m = -1, v = 0.75 * 0.75 * 0.25 + 0.25 * 4 = 1.140625.
    method = fedopt(fedavg(), optimizer="adam", learning_rate=2.0, beta1=0.5, beta2=0.75, tau=0.5)
    _, seen = two_rounds(method, [2.0, 1.0], [0.0, -2.0])
    first = 1 + 2 * 1 / (math.sqrt(1.1875) + 0.5)
    step = 2 * 1 / (math.sqrt(1.140625) + 0.5)
    assert seen[0] == pytest.approx((first, 1.0), rel=1e-6)
    assert seen[1] == pytest.approx((first + step, 1 - step), rel=1e-6)


def test_yogi_by_hand():
    # As above, but v moves by (1 - β₂) Δ² towards Δ²: 0.25 + 0.25 * 4 = 1.25, then down to 1.25 - 0.25 * 1 = 1.
    method = fedopt(fedavg(), optimizer="yogi", learning_rate=2.0, beta1=0.5, beta2=0.75, tau=0.5)
    state, seen = two_rounds(method, [2.0, 1.0], [0.0, 0.0])
    first = 1 + 2 * 1 / (math.sqrt(1.25) + 0.5)
    assert seen[0] == pytest.approx((first, 1.0), rel=1e-6)
    assert seen[1] == pytest.approx((first + 2 * 1 / (1 + 0.5), 1.0), rel=1e-6)
    assert float(state.moments["second"]["m"].A) == pytest.approx(1.0)


def test_averages_by_hand_are_handed_out_and_clients_go_on_from_the_last_round():
    # A moves by 2 to 3, then by 1 to 4; B by -1 to 0, then by 4 to 4. η = 1: w = 2/2, then 2/3. η = 0: 1, then 1/2.
    state, seen = two_rounds(averaged(fedavg(), power=1.0), [2.0, 1.0], [-1.0, 4.0])
    assert seen[0] == (3.0, 0.0)
    assert seen[1] == pytest.approx((3 + 2 / 3, 8 / 3), rel=1e-6)
    assert float(state.moments["iterate"]["m"].A) == 4.0
    received = averaged(fedavg(), power=1.0).distribute(state, Client("next", 1, 1))
    assert float(received.adapter["m"].B) == 4.0
    served = averaged(fedavg(), power=1.0).distribute(state.serving_state, Client("next", 1, 1))
    assert float(served.adapter["m"].B) == pytest.approx(8 / 3)
    _, seen = two_rounds(averaged(fedavg(), power=0.0), [2.0, 1.0], [-1.0, 4.0])
    assert seen[1] == pytest.approx((3.5, 2.0))


def test_steady_does_the_rounds_of_hetlora():
    # In the last two rounds slots 2 ... are nobody's: they stay as the last round left them, and not as the average has them.
    steps = {"gamma": 0.5, "min_rank": 1, "penalty": 0.25}
    wide, thin = Client("wide", 8, 1), Client("thin", 2, 3)
    one = other = random_state()
    for cohort in ([wide, thin], [wide, thin], [thin], [thin]):
        one, own = run_round(one, steady(**steps), FakeEngine(trained), cohort)
        other, report = run_round(other, hetlora(**steps), FakeEngine(trained), cohort)
        assert own == report
        assert_same(one.moments["iterate"], other.adapter)
    assert one.ranks == other.ranks
    live = {"m": LoraPair(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0, 4.0]]]))}
    [mine] = steady(**steps).penalty(TASKS[:1])(live).tolist()
    assert mine == 0.25 * 2.0 * 4.0  # λ and the tail, slot 1


def test_nothing_from_before_the_first_answer_counts_in_an_average():
    state = ServerState({"m": literal([[1e8]], [[1]])})
    nobody = FakeEngine(lambda task: ClientFailure(task.client, "away"))
    somebody = FakeEngine(lambda task: answer(task, {"m": literal([[3]], [[5]])}))
    method = averaged(fedavg(), power=3.0)
    for engine in (nobody, nobody, somebody):
        state, _ = run_round(state, method, engine, ONE)
    assert (float(state.adapter["m"].A), float(state.adapter["m"].B)) == (3.0, 5.0)


def test_an_average_around_an_optimiser_leaves_its_steps_as_they_are():
    inner = fedopt(hetlora(gamma=1.0), optimizer="adam", learning_rate=0.1)
    cohort = [Client("wide", 8, 1), Client("thin", 2, 3)]
    one = other = random_state()
    for _ in range(3):
        one, _ = run_round(one, averaged(inner, power=1.0), FakeEngine(trained), cohort)
        other, _ = run_round(other, inner, FakeEngine(trained), cohort)
    assert_same(one.moments["iterate"], other.adapter)
    assert_same(one.moments["second"], other.moments["second"])


@pytest.mark.parametrize(
    ("make", "why"),
    [(flexlora, "the SVD turns the slots"), (flora, "every round begins with fresh"), (fedsa_lora, "each client's B")],
)
def test_an_average_over_rounds_that_means_nothing_is_refused(make, why):
    with pytest.raises(ValueError, match=f"{make().name} cannot be averaged over rounds: {why}"):
        averaged(make(), power=3.0)


@pytest.mark.parametrize("power", [-1.0, math.inf, math.nan])
def test_a_power_out_of_its_range_is_refused(power):
    with pytest.raises(ValueError, match=r"power=.* is not allowed; use 0 or more"):
        steady(power=power)


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi"])
def test_slots_that_nobody_has_rest(optimizer):
    method = fedopt(hetlora(gamma=1.0), optimizer=optimizer, learning_rate=0.1)
    wide, thin = Client("wide", 8, 1), Client("thin", 2, 1)
    state, _ = run_round(random_state(), method, FakeEngine(trained), [wide])
    after, _ = run_round(state, method, FakeEngine(trained), [thin])
    for side, other in ((state.adapter, after.adapter), (state.moments["first"], after.moments["first"])):
        assert_same(tail(side, 2), tail(other, 2))
        for name in side:
            assert not torch.isclose(side[name].A[:2], other[name].A[:2]).any()


@pytest.mark.parametrize("optimizer", ["adam", "yogi"])
def test_the_second_moment_of_a_slot_that_rests_stays_where_it_begins(optimizer):
    method = fedopt(hetlora(gamma=1.0), optimizer=optimizer, learning_rate=0.1, tau=0.5)
    after, _ = run_round(random_state(), method, FakeEngine(trained), [Client("thin", 2, 1)])
    for pair in tail(after.moments["second"], 2).values():
        assert torch.equal(pair.A, torch.full_like(pair.A, 0.25))
        assert torch.equal(pair.B, torch.full_like(pair.B, 0.25))


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi"])
def test_a_round_without_updates_moves_no_moment(optimizer):
    method = fedopt(hetlora(), optimizer=optimizer, learning_rate=0.1)
    clients = [Client("a", 2, 1), Client("b", 8, 1)]
    state, _ = run_round(random_state(), method, FakeEngine(trained), clients)
    after, _ = run_round(state, method, FakeEngine(trained), [])
    assert_same(after.adapter, state.adapter)
    assert after.moments is state.moments
    assert after.moments.keys() == ({"first"} if optimizer == "momentum" else {"first", "second"})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"optimizer": "sgd"}, "optimizer='sgd' is not allowed; use one of momentum, adam, yogi"),
        ({"learning_rate": 0.0}, "learning_rate=0.0.*must be more than 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"tau": 0.0}, "tau=0.0"),
        ({"beta1": 1.0}, "beta1=1.0"),
        ({"beta2": -0.1}, "beta2=-0.1"),
    ],
)
def test_arguments_of_a_server_optimiser_out_of_range_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        fedopt(fedavg(), **{"optimizer": "adam", "learning_rate": 1.0, **arguments})


def test_a_method_says_why_it_takes_no_wrapper():
    with pytest.raises(ValueError, match="flora takes no server optimiser: the adapter begins anew every round"):
        fedopt(flora(), optimizer="adam", learning_rate=1.0)
    with pytest.raises(ValueError, match="rolora takes no server optimiser: by momentum a factor would go on moving"):
        fedopt(rolora(), optimizer="momentum", learning_rate=1.0)
    with pytest.raises(ValueError, match="zeroshot takes no proximal term: nobody trains"):
        fedprox(zeroshot(), mu=1.0)


# FedProx -------------------------------------------------------------------------------------------------------------

RECEIVED = {"m": literal([[1], [2]], [[1, 3]])}
TASKS = [TrainTask("a", 0, 2, RECEIVED), TrainTask("b", 0, 1, {"m": literal([[9]], [[9]])})]


def live():
    """Both clients' factors during training, b's padded: a has moved A[1] and B[1] by 2, b its A by -1."""
    A = torch.tensor([[[1.0], [4.0]], [[8.0], [0.0]]], requires_grad=True)
    B = torch.tensor([[[1.0, 5.0]], [[9.0, 0.0]]], requires_grad=True)
    return {"m": LoraPair(A, B)}


def test_fedprox_pays_for_moving_away_from_what_was_received():
    # μ/2 ‖·‖²: 0.25 * (2² + 2²) = 2 and 0.25 * 1; the gradient is μ times the way: 1, 1 and -0.5.
    adapter = live()
    penalty = fedprox(fedavg(), mu=0.5).penalty(TASKS)(adapter)
    assert penalty.tolist() == [2.0, 0.25]
    penalty.sum().backward()
    assert adapter["m"].A.grad.flatten().tolist() == [0.0, 1.0, -0.5, 0.0]
    assert adapter["m"].B.grad.flatten().tolist() == [0.0, 1.0, 0.0, 0.0]


def test_fedprox_adds_to_the_methods_own_penalty():
    # HetLoRA's tail of client a is slot 1: 0.25 * 5 * 4 = 5 beside 2, its gradient 0.25 * 5 and 0.25 * 4; b has no tail.
    adapter = live()
    method = fedprox(hetlora(gamma=0.5, min_rank=1, penalty=0.25), mu=0.5)
    penalty = method.penalty(TASKS)(adapter)
    assert penalty.tolist() == [7.0, 0.25]
    penalty.sum().backward()
    assert adapter["m"].A.grad.flatten().tolist() == [0.0, 2.25, -0.5, 0.0]
    assert adapter["m"].B.grad.flatten().tolist() == [0.0, 2.0, 0.0, 0.0]
    assert method.prune is not fedavg().prune


def test_fedprox_of_what_was_received_is_nothing():
    adapter = map_tensors(lambda factor: factor[None], RECEIVED)
    assert fedprox(fedavg(), mu=3.0).penalty(TASKS[:1])(adapter).tolist() == [0.0]


@pytest.mark.parametrize("mu", [0.0, -1.0, math.nan, math.inf])
def test_a_mu_out_of_range_is_refused(mu):
    with pytest.raises(ValueError, match=f"mu={mu!r} is not allowed"):
        fedprox(fedavg(), mu=mu)
