"""The proof of drop-outs in small, and that it detects planted faults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hetlora.core import round as core_round
from hetlora.core.sampling import DropOuts
from hetlora.core.types import ServerState
from proofs import dropouts

pytestmark = pytest.mark.slow


def test_every_way_to_fail_at_every_share_for_three_rounds():
    outcome = dropouts.prove(24, seed=0, rounds=3, processes=1)
    assert outcome.failures == []
    counts = outcome.figures["counts"]
    assert counts["rounds"] == 72
    assert counts["nobody"] > 0, "at 90 % there are rounds where nobody answers"
    assert counts["failed"] + counts["admitted"] == 72 * dropouts.COHORT


def test_a_round_without_updates_that_moves_the_adapter_is_seen(monkeypatch: pytest.MonkeyPatch):
    original = dropouts.run_round

    def moving(state: ServerState, *arguments: Any) -> Any:
        after, report = original(state, *arguments)
        if not report.clients:
            for pair in after.adapter.values():
                after = replace(
                    after, adapter={name: pair._replace(B=pair.B + 1.0) for name, pair in after.adapter.items()}
                )
        return after, report

    monkeypatch.setattr(dropouts, "run_round", moving)
    problems, _ = dropouts.simulate(3, 10)
    assert any("nobody was admitted, and the state changed" in problem for problem in problems)


def test_a_client_that_drops_out_and_counts_all_the_same_is_seen(monkeypatch: pytest.MonkeyPatch):
    def all_answer(self: DropOuts, tasks: Any, method: Any) -> Any:
        yield from self.engine.train(tasks, method)

    monkeypatch.setattr(DropOuts, "train", all_answer)
    problems, _ = dropouts.simulate(2, 2)
    assert any("failed, at a share of" in problem for problem in problems)


def test_a_nan_that_is_admitted_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(core_round, "admit", lambda *_: None)
    seed = 4 * dropouts.WAYS.index("NaN") + 2
    problems, _ = dropouts.simulate(seed, 2)
    assert problems
