"""Admission: what it refuses, the message with client and value, and that a refusal costs only that client."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from hetlora.core.adapter import LoraPair, map_tensors
from hetlora.core.admission import admit
from hetlora.core.round import local_round, run_round
from hetlora.core.types import Client, ClientUpdate, ServerState, TrainTask
from hetlora.errors import RefusedUpdateError
from hetlora.methods import hetlora

NAN, INF = float("nan"), float("inf")


def pair(rank, width=4, out=3, value=1.0):
    return LoraPair(torch.full((rank, width), value), torch.full((out, rank), value))


def adapter(rank=2, **changes):
    """Two modules of rank `rank`; `v_proj=...` puts another pair in."""
    return {"q_proj": pair(rank), "v_proj": pair(rank, width=5)} | changes


def with_value(value, *, factor="A"):
    """The adapter with one number of `v_proj` replaced."""
    bad = adapter(v_proj=pair(2, width=5))
    getattr(bad["v_proj"], factor)[1, 1] = value
    return bad


TASK = TrainTask("mallory", 4, 2, adapter())
GOOD = ClientUpdate("mallory", 4, 2, adapter(), examples=10, steps=3, loss=1.5)

# Every change to GOOD that must be refused, and what the message must say besides the client.
REFUSED = {
    "an older round": ({"round": 3}, "answered round 3, asked was round 4"),
    "a later round": ({"round": 5}, "answered round 5, asked was round 4"),
    "negative examples": ({"examples": -1}, "reports -1 examples"),
    "no examples": ({"examples": 0}, "reports 0 examples"),
    "negative steps": ({"steps": -2}, "reports -2 steps"),
    "steps that no whole number of 64 bits holds": ({"steps": 2**63}, f"reports {2**63} steps"),
    "loss inf": ({"loss": INF}, "training loss of inf"),
    "loss -inf": ({"loss": -INF}, "training loss of -inf"),
    "loss NaN": ({"loss": NAN}, "training loss of nan"),
    "a module too many": ({"adapter": adapter(k_proj=pair(2))}, "other modules than it received: k_proj"),
    "a module too few": ({"adapter": {"q_proj": pair(2)}}, "other modules than it received: v_proj"),
    "a module renamed": ({"adapter": {"q_proj": pair(2), "V": pair(2)}}, "other modules than it received: V, v_proj"),
    "no modules": ({"adapter": {}}, "other modules than it received: q_proj, v_proj"),
    "rank 0": ({"rank": 0, "adapter": adapter(0)}, "q_proj: rank 0 is not within 1 ... 2"),
    "rank -1": ({"rank": -1}, "q_proj: rank -1 is not within 1 ... 2"),
    "rank above the assigned": ({"rank": 3, "adapter": adapter(3)}, "q_proj: rank 3 is not within 1 ... 2"),
    "rank of one module": (
        {"rank": {"q_proj": 2, "v_proj": 3}, "adapter": adapter(v_proj=pair(3, width=5))},
        "v_proj: rank 3 is not within 1 ... 2",
    ),
    "slots above its own rank": ({"rank": 1}, "q_proj.A: shape (2, 4) arrived, expected (1, 4)"),
    "slots below its own rank": ({"adapter": adapter(1)}, "q_proj.A: shape (1, 4) arrived, expected (2, 4)"),
    "another width": ({"adapter": adapter(v_proj=pair(2, 6))}, "v_proj.A: shape (2, 6) arrived, expected (2, 5)"),
    "another output": (
        {"adapter": adapter(v_proj=pair(2, 5, out=1))},
        "v_proj.B: shape (1, 2) arrived, expected (3, 2)",
    ),
    "factors exchanged": (
        {"adapter": adapter(q_proj=LoraPair(*reversed(pair(2))))},
        "q_proj.A: shape (3, 2) arrived, expected (2, 4)",
    ),
    "a batch dimension": (
        {"adapter": map_tensors(lambda factor: factor[None], adapter())},
        "q_proj.A: shape (1, 2, 4) arrived, expected (2, 4)",
    ),
    "float64": (
        {"adapter": map_tensors(torch.Tensor.double, adapter())},
        "q_proj.A: torch.float64 arrived, expected torch.float32",
    ),
    "float16 in one factor": (
        {"adapter": adapter(v_proj=LoraPair(torch.ones(2, 5), torch.ones(3, 2, dtype=torch.float16)))},
        "v_proj.B: torch.float16 arrived, expected torch.float32",
    ),
    "complex": (
        {"adapter": map_tensors(lambda factor: factor.to(torch.complex64), adapter())},
        "q_proj.A: torch.complex64 arrived",
    ),
    "NaN in A": ({"adapter": with_value(NAN)}, "v_proj.A: holds an infinity or NaN"),
    "NaN in B": ({"adapter": with_value(NAN, factor="B")}, "v_proj.B: holds an infinity or NaN"),
    "inf in A": ({"adapter": with_value(INF)}, "v_proj.A: holds an infinity or NaN"),
    "-inf in B": ({"adapter": with_value(-INF, factor="B")}, "v_proj.B: holds an infinity or NaN"),
}
refused = pytest.mark.parametrize(("changes", "says"), REFUSED.values(), ids=REFUSED.keys())


def check(update, *, task=TASK, answered=()):
    return admit(update, {task.client: task}, answered)


# What is let in --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="as assigned"),
        pytest.param({"rank": 1, "adapter": adapter(1)}, id="pruned"),
        pytest.param(
            {"rank": {"q_proj": 2, "v_proj": 1}, "adapter": adapter(v_proj=pair(1, width=5))}, id="pruned per module"
        ),
        pytest.param({"steps": 0}, id="no steps"),
        pytest.param({"steps": 2**63 - 1}, id="the most steps"),
        pytest.param({"loss": -0.5}, id="a negative loss"),
        pytest.param({"adapter": adapter(v_proj=pair(2, width=5, value=0.0))}, id="zeros"),
        pytest.param({"adapter": with_value(3e38)}, id="large but finite"),
        pytest.param({"adapter": dict(reversed(adapter().items()))}, id="modules in another order"),
    ],
)
def test_an_update_that_fits_its_task_is_admitted(changes):
    assert check(replace(GOOD, **changes)) is TASK


# What is refused, and how it is said -----------------------------------------------------------------------------------


@refused
def test_a_refusal_names_the_client_and_the_value(changes, says):
    with pytest.raises(RefusedUpdateError, match=re.escape(says)) as refusal:
        check(replace(GOOD, **changes))
    assert str(refusal.value).startswith("client 'mallory'")


def test_names_that_a_terminal_would_obey_or_no_file_holds_are_told_escaped():
    with pytest.raises(RefusedUpdateError) as refusal:
        check(replace(GOOD, adapter=adapter(**{"\x1b[2J \ud800": pair(2)})))
    assert str(refusal.value).endswith("other modules than it received: \\x1b[2J \\ud800")


def test_a_client_that_was_not_asked_is_refused():
    with pytest.raises(RefusedUpdateError, match="client 'eve' was not asked in round 4"):
        check(replace(GOOD, client="eve"))


def test_a_second_answer_is_refused():
    with pytest.raises(RefusedUpdateError, match="client 'mallory' answered round 4 twice"):
        check(GOOD, answered={"mallory"})


# What a refusal costs --------------------------------------------------------------------------------------------------

ALICE, MALLORY, BOB = Client("alice", 1, 5), Client("mallory", 2, 5), Client("bob", 2, 5)
METHOD = hetlora(gamma=1.0)


def state():
    return ServerState(adapter(), round=4)


def honest(task):
    """Every client trains to numbers of its own."""
    scale = {"alice": 2.0, "mallory": 3.0, "bob": 0.7}[task.client]
    after = map_tensors(lambda factor: factor * scale, task.adapter)
    return ClientUpdate(task.client, task.round, task.rank, after, examples=5, steps=3, loss=1.5)


class FakeEngine:
    """Trains every client by a pure function, except those whose answer is forged, on the way or by a client of its own
    making; `extra` answers come after the second client's.
    """

    def __init__(self, forged=None, extra=()):
        self.forged, self.extra = forged or {}, extra

    def train(self, tasks, method):
        for position, task in enumerate(tasks):
            if task.client in self.forged:
                yield self.forged[task.client]
            else:
                yield from local_round([task], method, lambda one, _penalty: [honest(one[0])])
            if position == 1:
                yield from self.extra


def assert_same_round(one, other):
    """State, bit for bit, and the part of the clients that were admitted."""
    (state_one, report_one), (state_other, report_other) = one, other
    for module in state_other.adapter:
        assert torch.equal(state_one.adapter[module].A, state_other.adapter[module].A)
        assert torch.equal(state_one.adapter[module].B, state_other.adapter[module].B)
    assert (state_one.round, state_one.ranks) == (state_other.round, state_other.ranks)
    assert report_one.clients == report_other.clients


@refused
def test_a_refused_update_costs_the_round_only_that_client(changes, says):
    engine = FakeEngine({"mallory": replace(GOOD, **changes)})
    after, report = run_round(state(), METHOD, engine, [ALICE, MALLORY, BOB])
    assert_same_round((after, report), run_round(state(), METHOD, FakeEngine(), [ALICE, BOB]))
    assert [failure.client for failure in report.failures] == ["mallory"]
    assert says in report.failures[0].reason


def test_an_answer_nobody_asked_for_costs_nobody():
    after, report = run_round(state(), METHOD, FakeEngine(extra=[replace(GOOD, client="eve")]), [ALICE, MALLORY, BOB])
    assert_same_round((after, report), run_round(state(), METHOD, FakeEngine(), [ALICE, MALLORY, BOB]))
    assert [(failure.client, failure.reason) for failure in report.failures] == [
        ("eve", "client 'eve' was not asked in round 4")
    ]


def test_a_second_answer_does_not_count_and_the_first_one_does():
    after, report = run_round(state(), METHOD, FakeEngine(extra=[GOOD, GOOD]), [ALICE, MALLORY, BOB])
    assert_same_round((after, report), run_round(state(), METHOD, FakeEngine(), [ALICE, MALLORY, BOB]))
    assert [failure.reason for failure in report.failures] == ["client 'mallory' answered round 4 twice"] * 2


def test_a_client_may_answer_well_after_it_was_refused():
    # A repaired transfer: the refused attempt is in the report, the good one in the sum.
    bad = {"mallory": replace(GOOD, adapter=with_value(NAN))}
    good = honest(METHOD.distribute(state(), MALLORY))
    after, report = run_round(state(), METHOD, FakeEngine(bad, extra=[good]), [ALICE, MALLORY, BOB])
    assert_same_round((after, report), run_round(state(), METHOD, FakeEngine(), [ALICE, MALLORY, BOB]))
    assert [failure.client for failure in report.failures] == ["mallory"]


def test_where_every_update_is_refused_the_adapter_stays():
    before = state()
    forged = {name: replace(GOOD, client=name, loss=NAN) for name in ("alice", "mallory", "bob")}
    after, report = run_round(before, METHOD, FakeEngine(forged), [ALICE, MALLORY, BOB])
    for module in before.adapter:
        assert torch.equal(after.adapter[module].A, before.adapter[module].A)
        assert torch.equal(after.adapter[module].B, before.adapter[module].B)
    assert (after.round, report.clients) == (5, ())
    assert [failure.client for failure in report.failures] == ["alice", "mallory", "bob"]


class Liar(torch.Tensor):
    @property
    def shape(self):
        return torch.Size([2, 4])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"rank": {"k_proj": 2}}, id="ranks of other modules"),
        pytest.param({"rank": {"q_proj": 2, "v_proj": 2, "k_proj": 2}}, id="ranks of more modules"),
        pytest.param({"rank": 2.0}, id="a rank that is no integer"),
        pytest.param({"examples": INF}, id="infinitely many examples"),
        pytest.param({"examples": 10**400}, id="more examples than a float holds"),
        pytest.param({"loss": None}, id="a loss that is no number"),
        pytest.param({"adapter": adapter(v_proj=None)}, id="a module without factors"),
        pytest.param({"adapter": map_tensors(torch.Tensor.to_sparse, adapter())}, id="sparse tensors"),
        pytest.param({"loss": True}, id="a loss that is a truth value"),
        pytest.param({"loss": torch.tensor(1.5)}, id="a loss that is a tensor, which no record holds"),
        pytest.param({"round": 4.0}, id="a round that is no integer"),
        pytest.param({"adapter": adapter(v_proj=tuple(pair(2, width=5)))}, id="factors without names"),
        pytest.param({"adapter": map_tensors(torch.Tensor.requires_grad_, adapter())}, id="tensors with a gradient"),
        pytest.param({"adapter": adapter(v_proj=pair(3, width=5, out=3))}, id="a rank that is another's"),
        pytest.param(
            {"adapter": adapter(q_proj=LoraPair(torch.ones(3, 4).as_subclass(Liar), torch.ones(3, 2)))},
            id="a tensor that lies about its shape",
        ),
    ],
)
def test_a_malformed_update_costs_the_round_only_that_client(changes):
    # Nothing that arrives from a client can end the run or reach the others' average.
    method = hetlora(gamma=1.0, weights="examples")
    engine = FakeEngine({"mallory": replace(GOOD, **changes)})
    after, report = run_round(state(), method, engine, [ALICE, MALLORY, BOB])
    assert_same_round((after, report), run_round(state(), method, FakeEngine(), [ALICE, BOB]))
    assert [failure.client for failure in report.failures] == ["mallory"]


@pytest.mark.parametrize(
    ("answer", "sender"),
    [(None, "None"), ({}, "None"), (replace(GOOD, client=["mallory"]), "['mallory']"), (replace(GOOD, client=7), "7")],
    ids=["nothing", "no update", "a client that is a list", "a client that is a number"],
)
def test_what_is_no_update_of_anybodys_does_not_end_the_round(answer, sender):
    after, report = run_round(state(), METHOD, FakeEngine({"mallory": answer}), [ALICE, MALLORY, BOB])
    assert_same_round((after, report), run_round(state(), METHOD, FakeEngine(), [ALICE, BOB]))
    assert [failure.client for failure in report.failures] == [sender, "mallory"], "and mallory is accounted for"
