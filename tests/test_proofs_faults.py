"""The proof of faults in small, and that it detects planted faults."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs hetlora[flower]")

from hetlora.core import round as core_round
from hetlora.core.adapter import map_tensors
from hetlora.core.aggregation import WeightedSum
from hetlora.core.types import ClientFailure, ClientUpdate
from hetlora.errors import RefusedUpdateError
from hetlora.flower import client_runtime, engine
from hetlora.flower.client_runtime import ClientMemory, ClientRuntime
from hetlora.flower.engine import FlowerEngine
from proofs import faults

pytestmark = pytest.mark.slow


def test_forty_federations_in_which_all_goes_wrong(capsys: pytest.CaptureFixture[str]):
    outcome = faults.prove(40, seed=0)
    assert outcome.failures == []
    assert outcome.end() == 0
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])["counts"]
    kinds = {"lost", "late", "corrupt", "lie", "gone", "hangs", "refused", "crash"}
    assert all(counts[kind] > 0 for kind in kinds), counts
    assert 0 < counts["admitted"] < counts["asked"]


def test_a_trial_repeats_event_by_event():
    assert faults.simulate(7).events == faults.simulate(7).events
    assert faults.simulate(7).events != faults.simulate(8).events


def test_the_trace_is_printed(capsys: pytest.CaptureFixture[str]):
    assert faults.main(["--trials", "1", "--seed", "7", "--trace"]) == 0
    assert "round 0 of" in capsys.readouterr().out


def found(seeds: range) -> str:
    return "\n".join(faults.piece(seeds.start, seeds.stop)["problems"])


def test_an_update_that_is_counted_twice_is_seen(monkeypatch: pytest.MonkeyPatch):
    add, calls = WeightedSum.add, itertools.count()

    def every_third_twice(self: WeightedSum, adapter: Any, weight: float) -> WeightedSum:
        total = add(self, adapter, weight)
        return total if next(calls) % 3 else add(total, adapter, weight)

    monkeypatch.setattr(WeightedSum, "add", every_third_twice)
    text = found(range(12))
    assert "off the method's formula" in text
    assert "--trials 1 --seed" in text


def test_answers_of_another_round_that_are_admitted_are_seen(monkeypatch: pytest.MonkeyPatch):
    update = FlowerEngine._update

    def late(self: FlowerEngine, task: Any, data: bytes, node: Any, honest: Any) -> Any:
        """What is refused is answered by the client's own task, as if it had trained."""
        answer = update(self, task, data, node, honest)
        if isinstance(answer, ClientFailure):
            return ClientUpdate(task.client, task.round, task.rank, task.adapter, 1, 1, 0.0)
        return answer

    monkeypatch.setattr(FlowerEngine, "_update", late)
    seeds = [
        seed
        for seed in range(2000)
        if (drawn := faults.Federation.drawn(random.Random(f"faults:{seed}"))).faults.lie >= 0.4
        and not drawn.faults.corrupt
        and drawn.precision == "float32"
    ]
    assert any("nothing that it computed in this round" in found(range(seed, seed + 1)) for seed in seeds)


def test_a_client_that_is_told_twice_is_seen(monkeypatch: pytest.MonkeyPatch):
    send = FlowerEngine._send

    def doubled(self: FlowerEngine, *arguments: Any, **options: Any) -> Any:
        for failure in send(self, *arguments, **options):
            yield failure
            yield failure

    monkeypatch.setattr(FlowerEngine, "_send", doubled)
    assert "accounted for are" in found(range(40))


def test_a_server_that_lets_through_what_is_not_finite_is_seen(monkeypatch: pytest.MonkeyPatch):
    train = ClientRuntime.train

    def poisoned(self: ClientRuntime, *arguments: Any, **options: Any) -> Any:
        fit = self.fit

        def broken(task: Any) -> Any:
            answer = fit(task)
            if isinstance(answer, ClientFailure):
                return answer
            return replace(answer, adapter=map_tensors(lambda factor: factor * float("nan"), answer.adapter))

        self.fit = broken  # type: ignore[method-assign]
        try:
            return train(self, *arguments, **options)
        finally:
            del self.fit

    def lenient(update: Any, tasks: Any, answered: Any) -> Any:
        if update.client in answered:
            raise RefusedUpdateError("twice")
        return tasks[update.client]

    monkeypatch.setattr(ClientRuntime, "train", poisoned)
    assert found(range(12)) == "", "admission refuses what is not finite"
    monkeypatch.setattr(core_round, "admit", lenient)
    monkeypatch.setattr(engine, "admit", lenient)
    assert found(range(12)) != ""


def test_a_client_that_trains_on_the_factors_of_another_round_is_seen(monkeypatch: pytest.MonkeyPatch):
    def any_round(memory: ClientMemory, name: str, _: object) -> Any:
        return memory.received.get(name, (None, None))[1]

    monkeypatch.setattr(client_runtime, "_last_received", any_round)
    assert "trains on other factors" in found(range(3890, 3891)) + found(range(6394, 6395)) + found(range(14085, 14086))


def test_a_round_that_does_not_end_at_its_deadline_is_seen(monkeypatch: pytest.MonkeyPatch):
    train = FlowerEngine.train

    def late(self: FlowerEngine, *arguments: Any) -> Any:
        self.deadline += 1000.0
        yield from train(self, *arguments)

    monkeypatch.setattr(FlowerEngine, "train", late)
    assert "s is the most" in found(range(12))
