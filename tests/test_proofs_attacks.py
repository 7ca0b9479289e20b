"""`make prove-attacks` in small: plain averaging is taken over, and bounds hold."""

from __future__ import annotations

import pytest

from proofs.attacks import DEFENCES, LARGEST, WORSE, _problems, trial

pytestmark = pytest.mark.slow

ROUNDS = 2


@pytest.fixture(scope="module")
def without() -> float:
    return trial("none", "away", 0, ROUNDS).loss


@pytest.mark.parametrize("attack", ["inflated norms", "gauge"])
def test_the_plain_average_is_taken_over(attack, without):
    result = trial("none", attack, 0, ROUNDS)
    assert result.ratio > 10 * LARGEST
    assert result.loss > WORSE * without
    assert len(_problems(DEFENCES["bounds"], attack, result, without, "")) == 2, "and the proof would say so"


@pytest.mark.parametrize("attack", ["gauge"])
def test_admission_takes_the_hostile_for_what_they_are(attack, without):
    result = trial("admission", attack, 0, ROUNDS)
    assert result.refused == 2 * ROUNDS
    assert result.loss == pytest.approx(without, abs=1e-4)


@pytest.mark.parametrize("attack", ["gauge", "concentrated"])
def test_bounds_alone_hold(attack, without):
    result = trial("bounds alone", attack, 0, ROUNDS)
    assert result.bounded
    assert not _problems(DEFENCES["bounds alone"], attack, result, without, "")
