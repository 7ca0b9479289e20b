"""The bound on local training: no honest client exceeds it, and every larger update is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drawn_examples import examples
from fake_clients import FakeEngine, answer, random_state
from hetlora.core.adapter import LoraPair, ModuleShape, map_tensors, truncate, zeros
from hetlora.core.admission import SLACK, AdmissionRule, admit
from hetlora.core.codecs import CODECS
from hetlora.core.round import run_round
from hetlora.core.types import Client, ClientUpdate, TrainTask
from hetlora.errors import RefusedUpdateError
from hetlora.flower.wire.codec import pack_update, parse_update
from hetlora.methods import METHODS
from hetlora.training.local import LocalTraining

laws = examples(60)
ADAMW = LocalTraining(learning_rate=1e-2, steps=3, weight_decay=0.1)
SGD = LocalTraining(learning_rate=0.1, steps=3, optimizer="sgd", clip_norm=0.5)


def walked(training: LocalTraining, gradients: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Where the optimiser itself comes to, in float64, by gradients `[steps, n]` that are clipped as a client's are."""
    values = start.clone().requires_grad_()
    optimizer = training.make_optimizer([values])
    for gradient in gradients:
        values.grad = gradient.clone()
        if training.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_([values], training.clip_norm)
        optimizer.step()
    return values.detach()


@laws
@given(
    st.integers(1, 40),
    st.integers(0, 2**31),
    st.sampled_from(["normal", "growing", "shrinking", "rare", "alternating", "constant"]),
    st.sampled_from(["adamw", "sgd"]),
    st.sampled_from([0.0, 0.3]),
)
def test_no_gradients_take_the_optimiser_further(steps, seed, kind, optimizer, decay):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(steps, 6, generator=generator, dtype=torch.float64)
    growth = float(torch.rand((), generator=generator)) * 3.0
    times = torch.arange(steps, dtype=torch.float64)[:, None]
    gradients = {
        "normal": gradients,
        "growing": torch.exp(growth * times).clamp_max(1e30).expand(-1, 6) * gradients[:1].sign(),
        "shrinking": torch.exp(-growth * times) * gradients[:1],
        "rare": torch.where(torch.rand(steps, 6, generator=generator) < 0.1, 1e6 * gradients, 1e-3 * gradients),
        "alternating": gradients[:1] * (-1.0) ** times,
        "constant": gradients[:1].expand(steps, 6),
    }[kind]
    training = LocalTraining(
        learning_rate=0.05,
        steps=steps,
        optimizer=optimizer,
        weight_decay=decay,
        clip_norm=None if optimizer == "adamw" else 0.7,
    )
    start = torch.randn(6, generator=generator, dtype=torch.float64)
    change = walked(training, gradients, start) - start
    reach = training.reach(steps)
    assert float(change.abs().max()) <= (reach.each + reach.decay * float(start.abs().max())) * (1 + 1e-9)
    assert float(change.norm()) <= (reach.joint + reach.decay * float(start.norm())) * (1 + 1e-9)


@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_the_bound_of_a_step_of_adamw_is_reached(steps):
    # The gradients for which Cauchy and Schwarz is an equality: a_i / b_i, of the weights in both means.
    times = torch.arange(steps, dtype=torch.float64)
    worst = (0.9 / 0.999) ** (steps - 1 - times)
    training = LocalTraining(learning_rate=1.0, steps=steps, clip_norm=None)
    before = walked(training, 1e6 * worst[:-1, None], torch.zeros(1, dtype=torch.float64))
    after = walked(training, 1e6 * worst[:, None], torch.zeros(1, dtype=torch.float64))
    last = training.reach(steps).each - (training.reach(steps - 1).each if steps > 1 else 0.0)
    assert float((before - after).abs()) == pytest.approx(last, rel=1e-9)


def test_constant_gradients_go_as_many_learning_rates_as_there_are_steps():
    change = walked(
        replace(ADAMW, weight_decay=0.0), torch.ones(3, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    )
    assert float(change.abs()) == pytest.approx(0.03, rel=1e-6)
    assert float(change.abs()) == pytest.approx(replace(ADAMW, weight_decay=0.0).reach(3).each, rel=0.01)


def test_many_steps_are_bounded_as_fast_as_few():
    reach = LocalTraining(learning_rate=1.0, steps=1).reach(10**9)
    assert reach.each == pytest.approx(7.27029e9, rel=1e-4)


# Admission ----------------------------------------------------------------------------------------------------------


def task_of(seed=3, rank=4):
    state = random_state(seed)
    return METHODS["zeropad"]().distribute(state, Client("ana", rank, 5))


def trained_by(task: TrainTask, training: LocalTraining, seed=0) -> ClientUpdate:
    """An update whose every number went as far as constant gradients take it, to either side."""
    generator = torch.Generator().manual_seed(seed)

    def go(factor):
        signs = torch.where(torch.rand(factor.numel(), generator=generator) < 0.5, -1.0, 1.0)
        gradients = signs.expand(training.steps, -1)
        return walked(training, gradients, factor.flatten()).view(factor.shape)

    if training.optimizer == "adamw":
        adapter = map_tensors(go, task.adapter)
    else:  # the gradient's norm is that of all factors of a client
        flat = torch.cat([factor.flatten() for pair in task.adapter.values() for factor in pair])
        parts = iter(go(flat).split([factor.numel() for pair in task.adapter.values() for factor in pair]))
        adapter = map_tensors(lambda factor: next(parts).view(factor.shape), task.adapter)
    return ClientUpdate("ana", 0, 4, adapter, 8, training.steps, 1.0)


@pytest.mark.parametrize("training", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("precision", list(CODECS))
def test_who_goes_as_far_as_training_goes_is_admitted_over_any_wire(training, precision):
    task, residual = task_of(), None
    for seed in range(5):  # what an earlier round lost by rounding is in the next one's change
        update = trained_by(task, training, seed)
        data, residual = pack_update(update, task, precision=precision, residual=residual)
        honest = AdmissionRule(training, rounding=CODECS[precision].rounding_bound)
        assert admit(parse_update(data, task, precision), {"ana": task}, (), honest) is task


@pytest.mark.parametrize("levels", [1, 3, 7, 127])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_honest_clients_of_a_coarse_code_with_error_feedback_are_admitted(levels, clip):
    """As far as training goes, in the same direction, round after round: what was lost before comes on top."""
    training = LocalTraining(learning_rate=0.1, steps=1, optimizer="sgd" if clip else "adamw", clip_norm=clip)
    began = map_tensors(torch.zeros_like, zeros({"m": ModuleShape(2, 64)}, 1))["m"]
    generator = torch.Generator().manual_seed(levels)
    residual, refused = torch.zeros_like(began.A), 0
    for number in range(12):
        gradient = torch.randn(began.A.shape, generator=generator)
        change = 0.1 * (0.5 * gradient / gradient.norm() if clip else gradient / gradient.abs().max())
        wanted = change + residual
        scale = wanted.abs().max() / levels
        sent = scale * (wanted / scale).round()
        residual = wanted - sent
        task = TrainTask("ana", number, 1, {"m": began})
        update = ClientUpdate("ana", number, 1, {"m": began._replace(A=sent)}, 8, 1, 1.0)
        admit(update, {"ana": task}, (), AdmissionRule(training, rounding=0.5 / levels))
        try:
            admit(update, {"ana": task}, (), AdmissionRule(training))
        except RefusedUpdateError:
            refused += 1
    if levels < 7:
        assert refused, "without the code's bound honest clients are refused"


@pytest.mark.parametrize("training", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("letter", ["A", "B"])
def test_who_goes_further_is_refused_and_told_how_far(training, letter):
    task = task_of()
    update = trained_by(task, training)
    reach = training.reach(3)
    further = {name: LoraPair(A.clone(), B.clone()) for name, (A, B) in update.adapter.items()}
    factor, start = getattr(further["v_proj"], letter), getattr(task.adapter["v_proj"], letter)
    factor[0, 0] = start[0, 0] + 1.01 * SLACK * (reach.each + reach.decay * float(start.abs().max()))
    with pytest.raises(RefusedUpdateError, match=rf"'ana', v_proj\.{letter}: moved by .* as far as training goes"):
        admit(replace(update, adapter=further), {"ana": task}, (), AdmissionRule(training))


def test_of_clipped_sgd_all_numbers_together_go_no_further():
    task = task_of()
    reach = SGD.reach(3)
    each = 0.5 * reach.each  # within what one number can do, and far beyond what all can
    spread = map_tensors(lambda factor: factor + each, task.adapter)
    with pytest.raises(RefusedUpdateError, match=r"'ana': moved by .* in all"):
        admit(ClientUpdate("ana", 0, 4, spread, 8, 3, 1.0), {"ana": task}, (), AdmissionRule(SGD))


@pytest.mark.parametrize("attack", ["inflated", "gauge"])
def test_inflated_norms_and_the_gauge_are_refused(attack):
    task = task_of()
    update = trained_by(task, ADAMW)
    change = {
        "inflated": lambda pair: LoraPair(pair.A, 100.0 * pair.B),
        "gauge": lambda pair: LoraPair(1000.0 * pair.A, pair.B / 1000.0),
    }[attack]
    adapter = {name: change(pair) for name, pair in update.adapter.items()}
    admit(replace(update, adapter=adapter), {"ana": task}, ())  # finite numbers of the right shapes
    with pytest.raises(RefusedUpdateError, match="as far as training goes"):
        admit(replace(update, adapter=adapter), {"ana": task}, (), AdmissionRule(ADAMW))


def test_steps_are_those_that_the_training_takes():
    task, training = task_of(), LocalTraining(learning_rate=1e-2, epochs=2, batch_size=3)
    update = ClientUpdate("ana", 0, 4, task.adapter, 7, 6, 1.0)
    assert admit(update, {"ana": task}, (), AdmissionRule(training)) is task
    with pytest.raises(RefusedUpdateError, match="reports 60 steps on 7 examples, not 6"):
        admit(replace(update, steps=60), {"ana": task}, (), AdmissionRule(training))


def test_unclipped_sgd_is_not_bounded():
    reach = LocalTraining(steps=1, optimizer="sgd", clip_norm=None).reach(1)
    assert math.isinf(reach.each)
    assert math.isinf(reach.joint)


def test_what_is_refused_costs_the_round_only_that_client():
    def change(task):
        scale = 1000.0 if task.client == "mallory" else 1.0
        return answer(task, map_tensors(lambda factor: scale * factor, task.adapter))

    cohort = [Client(name, 4, 1) for name in ("ana", "mallory")]
    training = LocalTraining(learning_rate=1e-2, steps=1)
    _, report = run_round(random_state(), METHODS["hetlora"](), FakeEngine(change), cohort, training=training)
    assert [client.client for client in report.clients] == ["ana"]
    assert [failure.client for failure in report.failures] == ["mallory"]


@pytest.mark.parametrize("weight", [math.nan, math.inf, -1.0])
def test_a_weight_that_is_none_is_refused(weight):
    method = replace(METHODS["zeropad"](), weigh=lambda update: weight if update.client == "mallory" else 1.0)
    cohort = [Client(name, 4, 1) for name in ("ana", "mallory")]
    _, report = run_round(random_state(), method, FakeEngine(answer), cohort)
    assert [client.client for client in report.clients] == ["ana"]
    assert report.failures[0].reason == f"client 'mallory' has a weight of {weight}"


def test_a_slot_with_one_large_number_is_rounded_further_and_still_admitted():
    # In int8 its other numbers lie just over a half of the scale: in the Euclidean norm that is far more than five per cent.
    training = LocalTraining(learning_rate=0.1, steps=1, optimizer="sgd")
    shape = ModuleShape(2, 11008)
    task = TrainTask("ana", 0, 1, map_tensors(torch.zeros_like, zeros({"m": shape}, 1)))
    gradient = torch.full((1, shape.in_features), 0.51 / 127)
    gradient[0, 0] = 1.0
    adapter = {"m": LoraPair(0.1 * gradient / gradient.norm(), task.adapter["m"].B)}
    update = ClientUpdate("ana", 0, 1, adapter, 8, 1, 1.0)
    for precision in list(CODECS):
        data, _ = pack_update(update, task, precision=precision)
        honest = AdmissionRule(training, rounding=CODECS[precision].rounding_bound)
        assert admit(parse_update(data, task, precision), {"ana": task}, (), honest) is task


def test_a_client_has_no_more_examples_than_are_known_of():
    # In epochs they make its steps, and these how far it can come.
    training = LocalTraining(learning_rate=1e-3, epochs=1, batch_size=8)
    state, method = random_state(), METHODS["zeropad"]()

    def change(task):
        examples = 10**9 if task.client == "mallory" else 40
        adapter = map_tensors(lambda factor: factor * 1.001, task.adapter)
        return ClientUpdate(task.client, 0, task.rank, adapter, examples, training.count(examples), 1.0)

    cohort = [Client(name, 4, 40) for name in ("ana", "mallory")]
    _, report = run_round(state, method, FakeEngine(change), cohort, training=training)
    assert [client.client for client in report.clients] == ["ana"]
    assert report.failures[0].reason == "client 'mallory' reports 1000000000 examples, and has 40"


@pytest.mark.parametrize(
    ("method", "lowest"),
    [(METHODS["zeropad"](), 8), (METHODS["hetlora"](gamma=1.0), 8), (METHODS["hetlora"](gamma=0.75, min_rank=2), 6)],
    ids=["zeropad", "hetlora without pruning", "hetlora"],
)
def test_no_rank_is_lower_than_pruning_can_have_left(method, lowest):
    # A slot that is missing counts as zeros: who leaves out most of them shrinks what the others have learned.
    def change(task):
        rank = {"mallory": lowest - 1, "bob": lowest}.get(task.client, 8)
        return ClientUpdate(task.client, 0, rank, truncate(task.adapter, rank), 1, 1, 1.0)

    cohort = [Client(name, 8, 1) for name in ("ana", "bob", "mallory")]
    plain = replace(method, prune=lambda _, update: update) if method.lowest_rank else method
    _, report = run_round(random_state(), plain, FakeEngine(change), cohort)
    assert [client.client for client in report.clients] == ["ana", "bob"]
    assert f"rank {lowest - 1} is not within {lowest} ... 8" in report.failures[0].reason


def test_what_a_prune_of_ones_own_changes_is_not_held_against_training():
    def balanced(_, update):
        return replace(update, adapter={name: LoraPair(2.0 * A, B / 2.0) for name, (A, B) in update.adapter.items()})

    method = replace(METHODS["zeropad"](), prune=balanced)
    training = LocalTraining(learning_rate=1e-3, steps=1)
    _, report = run_round(random_state(), method, FakeEngine(answer), [Client("ana", 4, 1)], training=training)
    assert len(report.clients) == 1


@pytest.mark.parametrize("loss", [1e200, -1.0], ids=["overflows", "is complex"])
def test_a_weight_that_cannot_be_computed_costs_its_client_only(loss):
    method = replace(METHODS["zeropad"](), weigh=lambda update: update.loss**2.5 if update.client == "mallory" else 1.0)
    cohort = [Client(name, 4, 1) for name in ("ana", "mallory")]
    _, report = run_round(random_state(), method, FakeEngine(lambda task: answer(task, loss=loss)), cohort)
    assert [client.client for client in report.clients] == ["ana"]
    assert report.failures[0].reason.startswith("client 'mallory' cannot be weighed: ")


def test_decay_that_overshoots_is_not_bounded():
    assert math.isinf(LocalTraining(learning_rate=1.0, weight_decay=3.0, steps=5).reach(5).decay)
