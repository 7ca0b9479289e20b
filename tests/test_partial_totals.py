"""Engines that yield sums of several clients, as secure or hierarchical aggregation does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from fake_clients import FakeEngine, assert_same_state, start_of, trained
from hetlora.core.admission import admit
from hetlora.core.method import Method, expected
from hetlora.core.robust import Robustness
from hetlora.core.round import partial_total, run_round, run_rounds
from hetlora.core.sampling import DropOuts
from hetlora.core.types import Client, ClientFailure, ClientUpdate, PartialTotal, TrainTask
from hetlora.errors import RefusedUpdateError
from hetlora.methods import METHODS
from hetlora.runs.display import describe
from hetlora.runs.result import round_record

RANKS = {"a": 8, "b": 2, "c": 5, "d": 8, "e": 1, "f": 3, "g": 7}
"""More ranks than there are layouts with a sum of their own."""


class InPairs:
    """Adds the updates of another engine up by twos, as a node above two devices would; the last one may be alone."""

    def __init__(self, change: Callable[[TrainTask], Any] = trained, size: int = 2) -> None:
        self.engine, self.size = FakeEngine(change), size

    def train(
        self, tasks: Sequence[TrainTask], method: Method[Any]
    ) -> Iterator[ClientUpdate | ClientFailure | PartialTotal]:
        asked, waiting = {task.client: task for task in tasks}, []
        for answer in self.engine.train(tasks, method):
            if isinstance(answer, ClientFailure):
                yield answer
                continue
            admit(answer, asked, set(), expected(method, None))
            waiting.append(answer)
            if len(waiting) == self.size:
                yield partial_total(method, tasks, waiting)
                waiting = []
        if waiting:
            yield partial_total(method, tasks, waiting)


SUMMED = sorted(
    name
    for name, make in METHODS.items()
    if make().averages != "nothing" and make().keep is None and make().clients == "sampled"
)


def clients(method: Method[Any]) -> list[Client]:
    return [Client(name, 1 if method.trains == "weights" else rank, 9) for name, rank in RANKS.items()]


@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("name", SUMMED)
def test_sums_of_several_clients_give_the_state_of_single_updates(name: str, size: int):
    method = METHODS[name](**({"gamma": 0.5, "min_rank": 1} if name == "hetlora" else {}))
    start, cohort = start_of(method), clients(method)
    if method.ranks == "equal":
        cohort = [replace(client, rank=8) for client in cohort]
    [*_, (alone, _)] = run_rounds(start, method, FakeEngine(trained), lambda _: cohort, 3)
    [*_, (summed, report)] = run_rounds(start, method, InPairs(size=size), lambda _: cohort, 3)
    assert_same_state(alone, summed)
    assert summed.answered == alone.answered
    assert tuple(report.summed) == tuple(RANKS)
    if name == "hetlora":
        assert summed.ranks, "some pruned, and the server sends them less from then on"
        assert round_record(report, summed.adapter, 1.0).bytes_up > 0
    assert not report.clients
    assert not report.failures


def test_steady_is_among_them():
    assert {"hetlora", "steady", "flora", "flexlora", "principal", "replication", "fedex_lora", "full"} <= set(SUMMED)


def test_a_sum_is_taken_beside_single_updates_and_the_record_says_of_whom_no_more_is_known():
    method = METHODS["zeropad"]()

    class Mixed(InPairs):
        def train(self, tasks, method):
            updates = list(self.engine.train(tasks, method))
            yield from updates[:2]
            yield partial_total(method, tasks, updates[2:6])
            yield ClientFailure("g", "gone")

    cohort = [Client(name, 4, 9) for name in RANKS]
    state, report = run_round(start_of(method), method, Mixed(), cohort)
    expected_state, _ = run_round(start_of(method), method, FakeEngine(trained), cohort[:6])
    assert_same_state(state, replace(expected_state, round=1))
    record = round_record(report, state.adapter, 1.0)
    assert record.summed == ["c", "d", "e", "f"]
    assert set(record.clients) == {"a", "b"}
    assert record.weights == {}, "nobody's share of the average is known"
    assert record.failures == {"g": "gone"}
    assert "4 of 7 clients as sums" in describe(record)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda total: replace(total, ranks={"a": 4, "b": 4, "z": 4}), "not some of those that were asked"),
        (lambda total: replace(total, ranks={"a": 4, "b": 5}), "client 'b' has rank 5, and was sent 4"),
        (lambda total: replace(total, ranks={"a": 4, "b": {"q_proj": 4}}), "client 'b' has rank"),
        (lambda total: replace(total, total={"b": 1, "a": 2}), "has no merge"),
    ],
)
def test_a_sum_of_others_is_refused_and_changes_nothing(spoil, reason):
    method = METHODS["zeropad"]()

    class Spoilt(InPairs):
        def train(self, tasks, method):
            first, *others = super().train(tasks, method)
            yield spoil(first)
            yield from others

    cohort = [Client(name, 4, 9) for name in "abcd"]
    state, report = run_round(start_of(method), method, Spoilt(), cohort)
    alone, _ = run_round(start_of(method), method, FakeEngine(trained), cohort[2:])
    assert_same_state(state, alone)
    assert tuple(report.summed) == ("c", "d")
    assert any(reason in failure.reason for failure in report.failures)
    assert {failure.client for failure in report.failures} >= {"a", "b"}


def test_a_client_counts_once():
    method = METHODS["zeropad"]()

    class Twice(InPairs):
        def train(self, tasks, method):
            updates = list(self.engine.train(tasks, method))
            yield partial_total(method, tasks, updates[:2])
            yield updates[0]
            yield partial_total(method, tasks, updates[1:3])
            yield updates[2]

    cohort = [Client(name, 4, 9) for name in "abc"]
    state, report = run_round(start_of(method), method, Twice(), cohort)
    alone, _ = run_round(start_of(method), method, FakeEngine(trained), cohort)
    assert_same_state(state, alone)
    assert (tuple(report.summed), [client.client for client in report.clients]) == (("a", "b"), ["c"])
    assert [failure.client for failure in report.failures] == ["a", "c"]


def test_what_needs_single_updates_refuses_sums():
    cohort = [Client(name, 4, 9) for name in "abcd"]
    for method, robust in ((METHODS["zeropad"](), Robustness(clip=1.0)), (METHODS["fedsa_lora"](), None)):
        start = start_of(method)
        state, report = run_round(start, method, InPairs(), cohort, robust=robust)
        assert state.adapter is start.adapter
        assert {failure.client for failure in report.failures} == set("abcd")
        assert all("needs each client's update" in failure.reason for failure in report.failures)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_client_that_drops_out_takes_with_it_the_sum_that_it_is_in(when):
    method, cohort = METHODS["zeropad"](), [Client(name, 4, 9) for name in "abcdefgh"]
    engine = DropOuts(InPairs(), 0.25, when, seed=3)
    _, report = run_round(start_of(method), method, engine, cohort)
    gone = {failure.client for failure in report.failures if f"dropped out {when}" in failure.reason}
    assert len(gone) == 2
    assert gone.isdisjoint(report.summed)
    assert len(report.summed) == 6 if when == "before" else len(report.summed) in (4, 6)
    lost = {failure.client for failure in report.failures if "its sum was lost" in failure.reason}
    assert len(lost) == 6 - len(report.summed)


def test_an_update_without_a_weight_is_in_no_sum():
    method = replace(METHODS["zeropad"](), weigh=lambda _: math.inf)
    task = TrainTask("a", 0, 4, start_of(method).truncated(4))
    with pytest.raises(RefusedUpdateError, match="has a weight of inf"):
        partial_total(method, [task], [trained(task)])


def test_a_sum_of_nobody_is_a_failure():
    class Nobody(InPairs):
        def train(self, tasks, method):
            yield replace(next(super().train(tasks, method)), ranks={})

    method = METHODS["zeropad"]()
    _, report = run_round(start_of(method), method, Nobody(), [Client(name, 4, 9) for name in "ab"])
    assert {failure.client for failure in report.failures} == {"a sum of nobody", "a", "b"}
