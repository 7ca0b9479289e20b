"""The result in words where the clients measured at the end differ from those at the start."""

from __future__ import annotations

from hetlora.runs.result import Measurement
from hetlora.runs.summary_text import _describe_scores
from hetlora.training.evaluation import Score


def measured(**nll: float) -> Measurement:
    scores = {name: Score(value, 1) for name, value in nll.items()}
    return Measurement(scores, {str(rank): score for rank, score in enumerate(scores.values(), 2)}, ())


def test_the_same_clients_are_compared_tier_by_tier():
    lines = _describe_scores(measured(ana=0.0, ben=2.0), measured(ana=0.0, ben=0.0))
    assert lines[0] == "held-out perplexity 2.72 -> 1.00 (-63.2%)"
    assert lines[2] == "  tier of rank 3: perplexity 7.39 -> 1.00 (-86.5%)"


def test_of_others_only_those_that_were_there_both_times_are_compared():
    lines = _describe_scores(measured(ana=2.0, ben=5.0), measured(ana=0.0, cleo=9.0))
    assert lines == ["held-out perplexity of the 1 clients measured before and after 7.39 -> 1.00 (-86.5%)", ""]


def test_of_nobody_nothing_is_compared():
    assert "of the 0 clients" in _describe_scores(measured(), measured(ana=1.0))[0]
    assert "not measured" in _describe_scores(measured(), measured(ana=1.0))[0]
