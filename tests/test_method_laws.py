"""The laws of `hetlora.testing` over every method, and stricter ones. A table explains every exception.

Laws speak of what clients receive next: the factors, or the product `folded + B A` that they compute with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drawn_examples import examples
from fake_clients import (
    FULL,
    FakeEngine,
    answer,
    assert_same,
    assert_same_state,
    drawn_alike,
    grown,
    products,
    random_state,
    start_of,
    trained,
)
from hetlora.core.adapter import ModuleShape, map_tensors
from hetlora.core.method import Method
from hetlora.core.round import run_round
from hetlora.core.types import Client, ClientUpdate, TrainTask
from hetlora.flower.wire.codec import pack_update, parse_update
from hetlora.methods import METHODS, carryover, fedavg, fedopt, fedprox, hetlora
from hetlora.testing import check_method

laws = examples(6)
seeds = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Kind:
    """What the table knows of a method.

    Attributes:
        ranks: Of four clients that it accepts; the global adapter has rank `full`.
        full: The full rank.
        settings: Arguments that reach its branches.
        not_factors: Why a client of full rank does not get back the very factors it sent, only their product.
        not_trained: Why nobody gets anything back.
        not_fedavg: Why the factors of clients of full rank and equal weights are not FedAvg's.
        not_thin: Why clients that do not train may compute something else after the round.
        same: Training after which all clients of full rank have the same factors.
    """

    ranks: tuple[int, ...] = (1, 3, 6, FULL)
    full: int = FULL
    settings: Sequence[dict[str, Any]] = ({}, {"weights": "equal"})
    not_factors: str = ""
    not_trained: str = ""
    not_fedavg: str = ""
    not_thin: str = ""
    same: Callable[[TrainTask], ClientUpdate] = grown


EQUAL = (FULL, FULL, FULL, FULL)
SVD = {"not_factors": "the SVD turns the slots", "not_fedavg": "it averages products"}
NO_ARGUMENTS: dict[str, Any] = {"settings": ({},)}

TABLE = {
    "hetlora": Kind(
        settings=(
            {},
            {"gamma": 0.5, "min_rank": 1},
            {"gamma": 0.5, "min_rank": 1, "per_module": True},
            {"gamma": 1.0, "weights": "examples"},
            {"weights": "equal"},
        ),
        not_fedavg="its own laws below: norms weigh, tails are pruned",
    ),
    "zeropad": Kind(settings=({}, {"unowned": "zero"})),
    "replication": Kind(),
    "rbla": Kind(),
    "carryover": Kind(
        settings=({}, {"weights": "examples"}, {"weights": "equal"}),
        not_fedavg="its own law below: norms weigh by default",
    ),
    "steady": Kind(
        settings=({}, {"gamma": 0.5, "min_rank": 1, "weights": "equal"}),
        not_fedavg="norms weigh by default, and later rounds are averages",
    ),
    "principal": Kind(
        settings=({}, {"weights": "equal"}),
        not_thin="the best of what they lacked comes into their slots",
        **SVD,
    ),
    "flexlora": Kind(**SVD),
    "recon_svd": Kind(settings=({}, {"weights": "examples"}), **SVD),
    "flora": Kind(
        not_factors="they are folded into the base",
        not_fedavg="it averages products",
        same=drawn_alike,  # every client begins with an A of its own
    ),
    "fedex_lora": Kind(),
    "ffa_lora": Kind(),
    "rolora": Kind(),
    "fedsa_lora": Kind(not_fedavg="B is not averaged"),
    "fedavg": Kind(ranks=EQUAL),
    "fedit": Kind(ranks=EQUAL, **NO_ARGUMENTS),
    "full": Kind(ranks=(1, 1, 1, 1), full=1),
    "central": Kind(ranks=EQUAL, **NO_ARGUMENTS),
    "local": Kind(not_fedavg="nothing is averaged", **NO_ARGUMENTS),
    "zeroshot": Kind(not_trained="nobody trains, and nothing is learned", **NO_ARGUMENTS),
}

CASES = [
    pytest.param(TABLE[name], make(**arguments), id=f"{name}-{arguments}")
    for name, make in METHODS.items()
    for arguments in (TABLE[name].settings if name in TABLE else [])
]
every_method = pytest.mark.parametrize(("kind", "method"), CASES)
whatever_its_kind = pytest.mark.parametrize("method", [pytest.param(case.values[1], id=case.id) for case in CASES])
every_trained_method = pytest.mark.parametrize(("kind", "method"), [c for c in CASES if not c.values[0].not_trained])


def clients_of(kind: Kind) -> list[Client]:
    return [Client(f"client-{i}", rank, examples=1 + i) for i, rank in enumerate(kind.ranks)]


def full_clients(kind: Kind, count: int) -> list[Client]:
    return [Client(f"full-{i}", kind.full, examples=1 + i) for i in range(count)]


def assert_products(one, other, rtol=1e-6):
    """Equal to within `rtol` of the largest number; float32 factors and folded changes allow no more."""
    for module, product in other.items():
        torch.testing.assert_close(one[module], product, rtol=0.0, atol=rtol * float(product.abs().max()))


def test_the_table_knows_every_method():
    assert TABLE.keys() == METHODS.keys(), "say in TABLE what the new method accepts and which laws it does not obey"


@every_trained_method
@laws
@given(seed=seeds)
def test_thin_clients_that_do_not_train_change_nothing_of_what_they_compute(kind, method, seed):
    if kind.not_thin:
        pytest.skip(kind.not_thin)
    # Nobody else is asked, so that slots beyond theirs are nobody's: what is kept there must not leak into what is shared.
    rank = 2 if len(set(kind.ranks)) > 1 else kind.full
    cohort = [Client(f"thin-{i}", rank, examples=1 + i) for i in range(3)]
    state = start_of(method, seed)
    before = products(method, state, cohort[0])
    for _ in range(3):
        state, report = run_round(state, method, FakeEngine(answer), cohort)
        assert len(report.clients) == 3
        assert_products(products(method, state, cohort[0]), before, rtol=1e-5)


@every_method
def test_a_method_is_listed_under_its_name(kind, method):
    assert METHODS[method.name](**kind.settings[0]).name == method.name
    assert TABLE[method.name] is kind


@pytest.mark.run
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(case.values[1], id=case.id, marks=() if str(case.id).endswith("{}") else pytest.mark.slow)
        for case in CASES
    ],
)
def test_a_method_obeys_every_law(method):
    check_method(method)


@pytest.mark.slow
@whatever_its_kind
@laws
@given(seed=seeds)
def test_a_method_obeys_every_law_whatever_is_drawn(method, seed):
    check_method(method, seed=seed)


@every_method
def test_the_fake_clients_of_these_laws_are_all_admitted_and_some_prune_where_methods_prune(kind, method):
    # Otherwise the laws below would hold because nobody takes part.
    state, reports = start_of(method), []
    for _ in range(2):
        state, report = run_round(state, method, FakeEngine(trained), clients_of(kind))
        reports.append(report)
    assert [len(report.clients) for report in reports] == [4, 4]
    assert not any(report.failures for report in reports)


def test_the_cases_cover_pruned_and_unpruned_clients():
    method = hetlora(gamma=0.5, min_rank=1)
    _, report = run_round(start_of(method), method, FakeEngine(trained), clients_of(TABLE["hetlora"]))
    assert {client.pruned for client in report.clients} == {True, False}


@every_trained_method
@examples(2)
@given(order=st.permutations(range(5)), weight=st.sampled_from([1.0, 0.157429]))
def test_equal_weights_give_the_same_bits_in_every_order(kind, method, order, weight):
    """Of equal weights half of a mean's numbers lie between two float32 numbers, and the rounding of a sum on the way tells."""
    ranks = (8, 4, 8, 4, 2) if len(set(kind.ranks)) > 1 else (kind.full,) * 5
    before, _ = run_round(start_of(method), method, FakeEngine(trained), full_clients(kind, 2))
    updates = [trained(method.distribute(before, Client(f"client-{i}", rank, 1))) for i, rank in enumerate(ranks)]
    states = []
    for one in (updates, [updates[place] for place in order]):
        total = method.start(before)
        for update in one:
            total = method.add(total, update, weight)
        states.append(method.finish(before, total))
    assert_same_state(*states)


@every_method
def test_an_update_from_the_wire_changes_no_bit(kind, method):
    cohort = clients_of(kind)
    before, _ = run_round(start_of(method), method, FakeEngine(trained), cohort)
    expected, report = run_round(before, method, FakeEngine(trained), cohort)

    def prune(task: TrainTask, update: ClientUpdate) -> ClientUpdate:
        return parse_update(pack_update(method.prune(task, update), task).data, task)

    state, again = run_round(before, replace(method, prune=prune), FakeEngine(trained), cohort)
    assert again == report
    assert_same_state(replace(state, kept={}), replace(expected, kept={}))  # what clients keep does not travel


WIDE = {"q_proj": ModuleShape(300, 700), "v_proj": ModuleShape(300, 700), "up_proj": ModuleShape(700, 300)}
"""Factors of more numbers than torch computes in one thread."""


@pytest.mark.parametrize("name", ["hetlora", "rbla", "flexlora", "principal", "flora", "fedex_lora"])
def test_threads_that_share_the_work_change_no_bit(name):
    state, method = random_state(rank=64, shapes=WIDE), METHODS[name]()
    cohort = [Client(f"client-{i}", rank, 1) for i, rank in enumerate((64, 48, 64))]
    states = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            states.append(run_round(state, method, FakeEngine(trained), cohort)[0])
        finally:
            torch.set_num_threads(1)
    for other in states[1:]:
        assert_same_state(other, states[0])


@every_trained_method
@pytest.mark.parametrize("count", [1, 3])
@laws
@given(seed=seeds)
def test_clients_of_full_rank_that_send_the_same_get_it_back(kind, method, count, seed):
    # Bit for bit where the method keeps the slots: (w x) / w in float64 is off by less than half a unit of float32.
    cohort, state = full_clients(kind, count), start_of(method, seed)
    for round_number in range(3):
        engine = FakeEngine(kind.same)
        tasks = [method.distribute(state, client) for client in cohort]
        sent = [kind.same(task).adapter for task in tasks]
        folded = state.folded
        state, report = run_round(state, method, engine, cohort)
        assert all(client.weight > 0.0 for client in report.clients)
        for client, adapter in zip(cohort, sent, strict=True):
            assert_same(adapter, sent[0])
            expected = {
                name: pair.B.double() @ pair.A.double() + (folded.delta[name].double() if folded.delta else 0.0)
                for name, pair in adapter.items()
            }
            # An average over rounds is not what was sent, and what clients go on from is.
            assert_products(products(method, state.training_state, client), expected)
            if not kind.not_factors:
                assert_same(method.distribute(state, client).adapter, adapter)
        assert state.round == round_number + 1


@every_method
@laws
@given(seed=seeds)
def test_clients_of_full_rank_that_do_not_train_change_nothing(kind, method, seed):
    state, cohort = start_of(method, seed), full_clients(kind, 3)
    newcomer = Client("newcomer", kind.full, 1)
    for _ in range(2):
        before = state
        state, report = run_round(before, method, FakeEngine(answer), cohort)
        assert len(report.clients) == 3
        for client in [*cohort, newcomer]:
            assert_products(products(method, state, client), products(method, before, client))
            if not kind.not_factors:
                assert_same(method.distribute(state, client).adapter, method.distribute(before, client).adapter)


EQUAL_ARGUMENTS = {"zeropad": {}, "fedit": {}, "central": {}}
"""Arguments of equal weights; those that weigh by examples meet clients of as many."""


@pytest.mark.parametrize("name", [name for name, kind in TABLE.items() if not kind.not_fedavg + kind.not_trained])
@laws
@given(seed=seeds, count=st.integers(1, 5))
def test_clients_of_full_rank_and_equal_weights_are_averaged_as_by_fedavg(name, seed, count):
    method = METHODS[name](**EQUAL_ARGUMENTS.get(name, {"weights": "equal"}))
    cohort, before, sent = full_clients(TABLE[name], count), start_of(method, seed), {}

    def change(task):
        sent[task.client] = replace(trained(task), examples=2)
        return sent[task.client]

    one, report = run_round(before, method, FakeEngine(change), cohort)
    assert len(report.clients) == count
    plain = fedavg(weights="equal")
    other, _ = run_round(before, plain, FakeEngine(lambda task: sent[task.client]), cohort)
    assert_same(one.adapter, other.adapter)


# What travels and what is frozen -------------------------------------------------------------------------------------


@every_method
def test_a_client_that_changes_a_frozen_factor_is_refused(kind, method):
    state, frozen = start_of(method), set()

    def change(task):
        touched = map_tensors(lambda factor: factor + 1.0, task.adapter)
        frozen.update({"A", "B"} - set(task.trains))
        return answer(task, touched)

    after, report = run_round(state, method, FakeEngine(change), clients_of(kind))
    if frozen:
        assert_same_state(after, state)
        assert [f"{letter}: changed, though it is frozen" in failure.reason for failure in report.failures
                for letter in frozen] == [True] * 4  # fmt: skip
    else:
        assert not report.failures


@every_method
def test_bytes_and_trained_parameters_are_those_of_the_task(kind, method):
    state, engine = start_of(method), FakeEngine(trained)
    for _ in range(2):
        state, report = run_round(state, method, engine, clients_of(kind))
        tasks = engine.asked[-1]
        assert report.bytes_down == sum(task.bytes_down for task in tasks.values())
        for client in report.clients:
            task = tasks[client.client]
            sizes = {"A": 0, "B": 0}
            kept = {"A": 0, "B": 0}
            for module, pair in task.adapter.items():
                new = client.new_rank if isinstance(client.new_rank, int) else client.new_rank[module]
                for letter, length in (("A", pair.A.shape[1]), ("B", pair.B.shape[0])):
                    sizes[letter] += length * getattr(pair, letter).shape["BA".index(letter) - 1]
                    kept[letter] += length * new
            assert client.trained == sum(sizes[letter] for letter in task.trains)
            assert client.bytes_up == 4 * sum(kept[letter] for letter in task.sends)


# Wrappers ------------------------------------------------------------------------------------------------------------

WRAPPERS = {"server_optimizer": lambda m: fedopt(m, optimizer="momentum", learning_rate=1.0, beta1=0.0),
            "proximal": lambda m: fedprox(m, mu=0.5)}  # fmt: skip
REFUSED = {
    "server_optimizer": {
        "principal", "steady", "flexlora", "recon_svd", "flora", "fedex_lora", "rolora", "central", "local", "zeroshot",
    },
    "proximal": {"central", "local", "zeroshot"},
}  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
@every_method
def test_a_wrapper_fits_or_is_refused_with_the_methods_reason(kind, method, wrapper):
    if method.name in REFUSED[wrapper]:
        reason = method.refuses[wrapper]
        with pytest.raises(ValueError, match=f"{method.name} takes no .*: {reason}"):
            WRAPPERS[wrapper](method)
        return
    # Of an optimiser without memory and of step 1, and of a term that fake clients do not see, the method is left.
    wrapped, cohort = WRAPPERS[wrapper](method), clients_of(kind)
    state = expected = start_of(method)
    for _ in range(2):
        state, _ = run_round(state, wrapped, FakeEngine(trained), cohort)
        expected, _ = run_round(expected, method, FakeEngine(trained), cohort)
        for module, pair in expected.adapter.items():
            torch.testing.assert_close(state.adapter[module], pair, rtol=1e-5, atol=1e-5)
        state = replace(expected, moments=state.moments)


# HetLoRA and FedAvg are one where they must be -----------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["equal", "examples"])
@laws
@given(seed=seeds, count=st.integers(1, 5))
def test_hetlora_of_equal_ranks_without_pruning_is_fedavg(weights, seed, count):
    before = start_of(hetlora(), seed)
    cohort = [Client(f"{seed}-{i}", FULL, examples=1) for i in range(count)]
    one, _ = run_round(before, hetlora(gamma=1.0, weights=weights), FakeEngine(trained), cohort)
    other, _ = run_round(before, fedavg(weights=weights), FakeEngine(trained), cohort)
    assert_same(one.adapter, other.adapter)
    assert one.ranks == other.ranks == {}


@laws
@given(seed=seeds)
def test_hetlora_of_equal_ranks_and_equal_norms_is_fedavg_of_equal_weights(seed):
    # Turning the sign of A leaves the norm of B A.
    def change(task):
        sign = -1.0 if task.client == "turned" else 1.0
        return answer(
            task, {name: pair._replace(A=sign * pair.A, B=2.0 * pair.B) for name, pair in task.adapter.items()}
        )

    cohort = [Client(name, FULL, examples=1) for name in ("a", "turned", "b")]
    before = start_of(hetlora(), seed)
    one, _ = run_round(before, hetlora(gamma=1.0), FakeEngine(change), cohort)
    other, _ = run_round(before, fedavg(weights="equal"), FakeEngine(change), cohort)
    for module in before.adapter:
        torch.testing.assert_close(one.adapter[module], other.adapter[module], rtol=2.0**-23, atol=1e-14)


@pytest.mark.parametrize("weights", ["equal", "examples"])
@laws
@given(seed=seeds, count=st.integers(1, 5))
def test_carryover_of_equal_ranks_is_fedavg(weights, seed, count):
    before = start_of(carryover(), seed)
    cohort = [Client(f"{seed}-{i}", FULL, examples=1) for i in range(count)]
    one, _ = run_round(before, carryover(weights=weights), FakeEngine(trained), cohort)
    other, _ = run_round(before, fedavg(weights=weights), FakeEngine(trained), cohort)
    for module in before.adapter:
        torch.testing.assert_close(one.adapter[module], other.adapter[module], rtol=2.0**-23, atol=1e-14)


def test_a_method_is_a_value():
    assert isinstance(hetlora(), Method)
    with pytest.raises(AttributeError):
        hetlora().name = "other"
