"""`make prove-admission` in small, and that it detects planted faults."""

from __future__ import annotations

import gc
import json

import pytest

pytest.importorskip("flwr", reason="a part of it goes over Flower")

import torch

from hetlora.core import admission
from hetlora.flower.wire import header as message
from hetlora.flower.wire.codec import pack_update
from processes import HANGS
from proofs import admission as proof
from proofs.forgery import BYTES, MUTATIONS, OBJECTS
from proofs.wire_oracle import Draft, acceptable

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _on_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof judges how long an answer takes; the tests judge what becomes of it."""
    monkeypatch.setattr(proof, "SLOWEST", HANGS)


def test_an_answer_that_takes_long_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(proof, "SLOWEST", 0.0)
    [failure] = proof.prove(proof.BLOCK, seed=0).failures
    assert "an answer of " in failure
    assert " s; in the seeds 0 ... 49" in failure


def test_two_thousand_malformed_updates_cost_nobody_anything(capsys: pytest.CaptureFixture[str]):
    outcome = proof.prove(2000, seed=0)
    assert outcome.failures == []
    assert outcome.end() == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["proof"], line["trials"], line["failures"]) == ("admission", 2000, 0)
    assert sum(line["classes"].values()) == line["trials"] == line["malformed"] + line["valid_by_chance"]
    assert len(BYTES) + len(OBJECTS) >= 25
    assert line["valid_by_chance"] > 0, "the oracle says yes as well as no"


def test_what_the_process_holds_is_not_collected_on_an_answers_time(monkeypatch: pytest.MonkeyPatch):
    before, within = gc.get_freeze_count(), []
    monkeypatch.setattr(proof, "block", lambda *_: within.append(gc.get_freeze_count()))
    proof.piece(0, proof.BLOCK, warmed=False)
    assert min(within) > before + 10_000
    assert gc.get_freeze_count() == 0


def test_some_come_over_flower():
    first = (proof.FLOWER - 1) * proof.BLOCK
    outcome = proof.prove(60, seed=first)
    assert outcome.failures == []
    assert any(name.startswith("flower: ") for name in outcome.figures["classes"])


def test_every_class_is_forged_for_every_kind_of_round():
    import random

    for number in range(proof.SCENES):
        honest = proof.scene(number).liar
        assert acceptable(honest.data, honest.task, proof.scene(number).precision), "the honest message is acceptable"
        assert Draft.of(honest.data).packed() == honest.data
        for name, forge in BYTES.items():
            for seed in range(3):
                data = forge(random.Random(seed), honest)
                assert not acceptable(data, honest.task, proof.scene(number).precision), name
        for forge in [*MUTATIONS.values(), *OBJECTS.values()]:
            forge(random.Random(number), honest)


FAULTS = {
    "numbers that are not finite": (admission, "_finite", lambda _: True),
    "a truth value for a number": (admission, "_whole", lambda number: isinstance(number, int)),
    "keys that stand twice": (message, "_once", dict),
    "tables that lie": (message, "_equal", lambda *_: True),
    "any number of examples": (admission, "MOST_EXAMPLES", 10**30),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_admission_that_lets_through_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch):
    proof.scene.cache_clear()
    try:
        for number in range(3):
            proof.scene(number)
        monkeypatch.setattr(*FAULTS[fault])
        outcome = proof.prove(1500, seed=0)
        assert outcome.failures
        assert "--trials 1 --seed" in outcome.failures[0]
        assert outcome.end() == 1
    finally:
        proof.scene.cache_clear()


def test_an_admission_that_is_too_strict_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(admission, "MOST_STEPS", 1)
    assert any("it was refused" in failure or "admitted were" in failure for failure in proof.prove(500, 0).failures)


def test_a_failure_is_repeated_by_its_seed_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(admission, "_finite", lambda _: True)
    found = [failure for failure in proof.prove(500, 0).failures if "it was admitted" in failure]
    seed = int(found[0].rpartition(" ")[2])
    assert proof.prove(1, seed).failures[0].split(";")[0] == found[0].split(";")[0]


def test_an_update_that_says_it_is_huge_takes_no_memory():
    before = proof.memory()
    place = proof.scene(0)
    import random

    for seed in range(200):
        proof.received(BYTES["sizes beyond all memory"](random.Random(seed), place.liar), place)
    assert max(now - then for now, then in zip(proof.memory(), before, strict=True)) < proof.GROWTH


def test_the_oracle_knows_numbers_that_are_not_finite():
    place = proof.scene(0)
    update = place.liar.update
    name = next(iter(update.adapter))
    update.adapter[name].A[0, 0] = torch.nan
    try:
        assert not acceptable(pack_update(update, place.liar.task).data, place.liar.task, "float32")
    finally:
        proof.scene.cache_clear()
