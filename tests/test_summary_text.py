"""The result in words where the clients measured at the end differ from those at the start."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path

from hetlora.core.types import ServerState
from hetlora.runs.result import Measurement, RunResult
from hetlora.runs.summary_text import describe_result, describe_scores, print_result
from hetlora.training.evaluation import Answer, Score


def measured(**nll: float) -> Measurement:
    scores = {name: Score(value, 1) for name, value in nll.items()}
    return Measurement(scores, {str(rank): score for rank, score in enumerate(scores.values(), 2)}, ())


def test_the_same_clients_are_compared_tier_by_tier():
    lines = describe_scores(measured(ana=0.0, ben=2.0), measured(ana=0.0, ben=0.0))
    assert lines[0] == "held-out perplexity 2.72 -> 1.00 (-63.2%)"
    assert lines[2] == "  tier of rank 3: perplexity 7.39 -> 1.00 (-86.5%)"


def test_of_others_only_those_that_were_there_both_times_are_compared():
    lines = describe_scores(measured(ana=2.0, ben=5.0), measured(ana=0.0, cleo=9.0))
    assert lines == ["held-out perplexity of the 1 client measured before and after 7.39 -> 1.00 (-86.5%)"]


def test_of_nobody_nothing_is_compared():
    assert "of the 0 clients" in describe_scores(measured(), measured(ana=1.0))[0]
    assert "not measured" in describe_scores(measured(), measured(ana=1.0))[0]


def result(before: Measurement, after: Measurement) -> RunResult:
    return RunResult(
        "run",
        before,
        after,
        ServerState({}),
        1,
        {"ana": 2},
        0,
        1,
        0,
        10,
        10,
        1.0,
        None,
        None,
        Path("records.jsonl"),
        False,
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_scores_are_a_table():
    answers = [(Answer("ana", "what?", "this", text, 0.5),) for text in ("that", "")]
    before, after = (
        dataclasses.replace(measured(ana=loss, ben=2.0), answers=own)
        for loss, own in zip((3.0, 1.0), answers, strict=True)
    )
    file = Terminal()
    print_result(result(before, after), file)
    shown = re.sub(r"\x1b\[[\d;]*m", "", file.getvalue())
    assert re.search(r"tier of rank 2: perplexity +20.09 +2.72 +-86.5%", shown)
    assert "after:    (nothing)" in shown
    assert "1 round, 0 prunes" in shown
    plain = io.StringIO()
    print_result(result(before, after), plain)
    assert plain.getvalue() == describe_result(result(before, after)) + "\n"
    assert "\x1b" not in plain.getvalue()
