"""`hetlora compare`: resolved settings, refusals, resuming after a kill, repeatability, and its counts."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import hetlora.commands.compare.comparison
import hetlora.commands.compare.run_names
from hetlora.cli import main
from hetlora.commands.compare.comparison import _replaces
from hetlora.commands.compare.formats import cells, escape_latex, print_table, to_csv, to_latex, to_markdown
from hetlora.commands.compare.grid import Comparison, PlannedRun, load_comparison, plan
from hetlora.commands.compare.statistics import MethodRow, holm, notes, paired_test, table
from hetlora.commands.compare.workers import WorkerPool, _Worker, execute_planned, read_result
from hetlora.config import load_config
from hetlora.data import ClientRows, Federation, Row
from hetlora.errors import ConfigError, DataError
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.runs.result import RunResult
from processes import HANGS, children, has_ended, started, wait_until
from proofs.small_run import write_rows
from small_federations import PHONES, phones

RUNS = 2 * 2 + 2 * 2  # a method: one tuning run a learning rate, one final run a seed


# What is resolved ---------------------------------------------------------------------------------------------------


def document(**compare: Any) -> dict[str, Any]:
    """Return the smallest comparison, with keys of `[compare]` replaced."""
    return {
        "data": {"target": "{target}"},
        "federation": {"rounds": 1, "clients_per_round": 2},
        "ranks": {"kind": "same", "rank": 8},
        "training": {"steps": 1},
        "compare": {"methods": [{"name": "hetlora"}], **compare},
    }


def problems(**compare: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        plan(document(**compare))
    return list(caught.value.problems)


def test_every_method_rate_and_seed_becomes_a_whole_run():
    methods = [{"name": "hetlora", "gamma": 0.5}, {"name": "rbla", "label": "RBLA"}]
    comparison = plan(document(methods=methods, seeds=[3, 5], learning_rates=[1e-2, 1e-3]))
    assert [method.label for method in comparison.methods] == ["hetlora", "RBLA"]
    first = comparison.methods[0]
    assert [(rate, run.seed, run.tuning) for rate, run in first.tuning.items()] == [(1e-2, 3, True), (1e-3, 3, True)]
    assert {rate: [run.seed for run in runs] for rate, runs in first.final.items()} == {1e-2: [3, 5], 1e-3: [3, 5]}
    for rate, runs in first.final.items():
        for run in runs:
            assert (run.config.training.learning_rate, run.config.seed) == (rate, run.seed)
            assert run.config.method.arguments == {"gamma": 0.5}
            assert run.config.data.validation_share == 0.0, "final runs train on all training rows"
    for run in first.tuning.values():
        assert run.config.data.validation_share == 0.2
        assert run.config.evaluation.every == 0, "only the end is judged"


def test_one_rate_is_not_tuned():
    for compare in ({}, {"learning_rates": [0.5]}):
        [method] = plan(document(**compare)).methods
        assert not method.tuning
        assert list(method.final) == [compare.get("learning_rates", [1e-3])[0]]


def test_a_method_may_have_a_grid_or_a_rate_of_its_own():
    own = [
        {"name": "hetlora", "learning_rates": [0.1, 0.2, 0.3]},
        {"name": "rbla", "set": {"training.learning_rate": 0.5}},
        {"name": "zeropad"},
    ]
    comparison = plan(document(methods=own, learning_rates=[1e-2, 1e-3]))
    assert [list(method.final) for method in comparison.methods] == [[0.1, 0.2, 0.3], [0.5], [1e-2, 1e-3]]


def test_a_method_may_take_the_rate_that_another_is_tuned_to():
    taking = [
        {"name": "hetlora", "gamma": 0.5, "rate_of": "plain"},
        {"name": "hetlora", "label": "plain", "learning_rates": [0.1, 0.2]},
        {"name": "zeropad"},
    ]
    taker, giver, other = plan(document(methods=taking, learning_rates=[1e-2, 1e-3])).methods
    assert (taker.rate_of, giver.rate_of) == ("plain", None)
    assert [list(method.final) for method in (taker, giver, other)] == [[0.1, 0.2], [0.1, 0.2], [1e-2, 1e-3]]
    assert [len(method.tuning) for method in (taker, giver, other)] == [0, 2, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"ranks.kind": "tiers", "ranks.tiers": [{"rank": 4, "share": 1.0}], "federation.rounds": 7},
        {"ranks": {"kind": "tiers", "tiers": [{"rank": 4, "share": 1.0}]}, "federation": {"rounds": 7}},
    ],
    ids=["dotted", "tables"],
)
def test_changes_of_a_method_are_dotted_or_tables_and_a_kind_replaces_its_section(changes: dict[str, Any]):
    [method, other] = plan(document(methods=[{"name": "hetlora", "set": changes}, {"name": "rbla"}])).methods
    [[run]], [[unchanged]] = method.final.values(), other.final.values()
    assert run.config.ranks.largest == 4
    assert (run.config.federation.rounds, run.config.federation.clients_per_round) == (7, 2)
    assert (unchanged.config.ranks.largest, unchanged.config.federation.rounds) == (8, 1)


def folders(comparison: Comparison) -> set[Path]:
    runs = [run for method in comparison.methods for runs in method.final.values() for run in runs]
    return {run.folder for run in runs} | {
        run.folder for method in comparison.methods for run in method.tuning.values()
    }


def test_a_run_is_kept_in_a_folder_named_after_all_that_decides_it(tmp_path: Path):
    methods = [{"name": "hetlora", "label": "HetLoRA γ=0.5!", "gamma": 0.5}]
    whole = folders(plan(document(methods=methods, seeds=[0, 1], learning_rates=[1e-2, 1e-3])))
    assert len(whole) == 2 + 2 * 2
    assert all(re.fullmatch(r"runs/run/runs/hetlora-0\.5-[0-9a-f]{12}", folder.as_posix()) for folder in whole)
    # Another number of jobs, fewer seeds, another target: the same runs.
    assert folders(plan(document(methods=methods, learning_rates=[1e-2, 1e-3], target=3.0), jobs=2)) < whole
    changed = document(methods=methods, seeds=[0, 1], learning_rates=[1e-2, 1e-3])
    changed["training"]["steps"] = 2
    assert not folders(plan(changed)) & whole

    data = tmp_path / "rows.jsonl"
    seen = set()
    for content in ("a", "b", "a"):
        data.write_text(content, encoding="utf8")
        local = document(methods=methods)
        local["data"]["path"] = str(data)
        seen |= folders(plan(local))
    assert len(seen) == 2, "the data decide, too"


def test_a_local_model_and_the_versions_decide_where_a_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for key in ("base", "tokenizer"):
        seen = set()
        for name, content in (
            ("w.safetensors", "a"),
            ("w.safetensors", "b"),
            ("tokenizer.json", "{}"),
            ("README", "c"),
        ):
            (tmp_path / name).write_text(content, encoding="utf8")
            seen |= folders(plan({**document(), "model": {key: str(tmp_path)}}))
        assert len(seen) == 3, "a README decides nothing"
        (tmp_path / "tokenizer.json").unlink()
    before = folders(plan(document()))
    monkeypatch.setattr(hetlora.commands.compare.run_names, "_versions", lambda: {"torch": "0"})
    assert not folders(plan(document())) & before


def test_it_is_said_when_the_tables_of_another_configuration_are_replaced(tmp_path: Path):
    def planned(rounds: int, seeds: Sequence[int]) -> Comparison:
        return plan({**document(seeds=seeds), "federation": {"rounds": rounds}, "output": str(tmp_path)})

    first, longer = planned(1, [0]), planned(2, [0])
    assert _replaces(tmp_path, first) is None, "there is no table yet"
    results = {"tuning": [], "runs": [{"folder": path.name} for path in folders(first)]}
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf8")
    assert _replaces(tmp_path, first) is None
    assert _replaces(tmp_path, planned(1, [0, 1])) is None, "the same, with another seed"
    count = len(folders(first))
    assert f"{count} of their {count} runs are of another configuration" in str(_replaces(tmp_path, longer))


def test_labels_that_become_the_same_name_have_folders_of_their_own():
    methods = [{"name": "hetlora", "label": "γ"}, {"name": "hetlora", "label": "δ"}]
    assert len(folders(plan(document(methods=methods)))) == 2


def test_the_problems_of_all_methods_come_at_once_with_their_labels():
    methods = [
        {"name": "hetlora", "label": "too wide", "gamma": 2.0},
        {"name": "hetlora", "label": "no rank", "set": {"ranks.rank": 0}},
        {"name": "nosuch"},
        {"name": "rbla", "label": "fine"},
    ]
    found = problems(methods=methods, seeds=[0, 1], learning_rates=[1e-2, 1e-3])
    assert len(found) == 3, "each once, not once a seed and rate"
    assert [problem.split(":")[0] for problem in found] == ["too wide", "no rank", "nosuch"]
    assert "ranks.rank = 0" in found[1]
    assert "is not a method" in found[2]


def test_a_problem_of_the_run_itself_is_said_once():
    broken = document(methods=[{"name": "hetlora"}, {"name": "rbla"}])
    broken["federation"]["round"] = 3
    with pytest.raises(ConfigError) as caught:
        plan(broken)
    [problem] = caught.value.problems
    assert problem.startswith("every method: federation.round is not a key")


@pytest.mark.parametrize(
    ("compare", "said"),
    [
        ({"methods": []}, "compare.methods"),
        ({"methods": [{"label": "a"}]}, "name is missing"),
        ({"methods": [{"name": "rbla"}, {"name": "rbla"}]}, "two methods are called 'rbla'"),
        ({"methods": [{"name": "rbla", "label": "a\nb"}]}, "printable"),
        ({"seeds": []}, "compare.seeds"),
        ({"seeds": [1, 1]}, "names 1 twice"),
        ({"learning_rates": [0.0]}, "compare.learning_rates.0 = 0.0"),
        ({"seed": [1]}, "did you mean 'seeds'"),
        ({"metric": "accuracy"}, "'rougeL'"),
        ({"metric": "rougeL"}, "evaluation.generate"),
        ({"metric": "rougeL", "target": 3.0}, "only perplexity"),
        ({"reference": "HetLoRA"}, "use one of hetlora"),
        ({"validation_share": 0.0}, "validation_share = 0.0"),
        ({"jobs": 0}, "compare.jobs = 0"),
        ({"methods": [{"name": "rbla", "set": {"seed": 3}}]}, "rbla: set.seed is not for a method to change"),
        ({"methods": [{"name": "rbla", "set": {"method.name": "x"}}]}, "set.method is not for a method"),
        ({"methods": [{"name": "rbla", "set": {"data.validation_share": 0.5}}]}, "compare.validation_share"),
        (
            {"methods": [{"name": "rbla", "set": {"ranks.rank": 3, "ranks": {"rank": 4}}}]},
            "set.ranks.rank is given twice",
        ),
        ({"methods": [{"name": "rbla", "set": {"ranks.rank": 3, "ranks": 3}}]}, "set.ranks is given twice"),
        ({"methods": [{"name": "rbla", "set": {"ranks": 3, "ranks.rank": 3}}]}, "ranks is a value there"),
        (
            {"methods": [{"name": "rbla", "learning_rates": [1.0], "set": {"training.learning_rate": 1.0}}]},
            "both give the rate",
        ),
        (
            {"methods": [{"name": "rbla", "rate_of": "zeropad"}, {"name": "zeropad", "learning_rates": [1.0]}]},
            "no method that is tuned; use one of none",
        ),
        (
            {"methods": [{"name": "rbla"}, {"name": "zeropad", "rate_of": "zeropad"}], "learning_rates": [0.1, 0.2]},
            "no method that is tuned; use one of rbla",
        ),
        (
            {"methods": [{"name": "rbla", "rate_of": "zeroshot"}, {"name": "zeroshot"}]},
            "no method that is tuned",
        ),
        (
            {"methods": [{"name": "zeroshot", "rate_of": "rbla"}, {"name": "rbla"}]},
            "zeroshot: nobody trains",
        ),
        (
            {"methods": [{"name": "rbla", "rate_of": "zeropad", "learning_rates": [1.0]}, {"name": "zeropad"}]},
            "keep one",
        ),
        (
            {
                "methods": [
                    {"name": "rbla", "rate_of": "zeropad"},
                    {"name": "zeropad", "set": {"training.learning_rate": 1.0}},
                ]
            },
            "no method that is tuned",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_comparison_that_makes_no_sense_is_refused(compare: dict[str, Any], said: str):
    [problem] = problems(**compare)
    assert said in problem


def test_a_file_without_a_comparison_is_refused():
    with pytest.raises(ConfigError, match=r"\[compare\] is missing; examples/compare_stdlib.toml"):
        plan({"data": {"target": "{target}"}})


# The validation split -----------------------------------------------------------------------------------------------


def federation(*sizes: int) -> Federation:
    clients = {
        f"c{client}": ClientRows(tuple(Row("", f"row {row} of {client}") for row in range(size)), (Row("", "test"),))
        for client, size in enumerate(sizes)
    }
    return Federation("rows", clients)


def test_validation_rows_come_from_the_training_rows_and_no_test_row_is_left():
    whole = federation(200, 50)
    held = whole.hold_out_validation(0.2)
    for name, rows in held.clients.items():
        before = whole.clients[name]
        assert sorted(rows.train + rows.test) == sorted(before.train)
        assert Row("", "test") not in rows.test
        assert list(rows.train) == [row for row in before.train if row in set(rows.train)], "in their order"
    assert 0.12 < len(held.clients["c0"].test) / 200 < 0.28
    assert held.hold_out_validation(0.5).clients != held.clients
    assert whole.hold_out_validation(0.2) == held, "stable"
    wider = whole.hold_out_validation(0.4)
    assert set(held.clients["c0"].test) < set(wider.clients["c0"].test)


def test_every_client_keeps_a_training_row_and_equal_rows_stay_together():
    held = federation(1, 2, 3, 4).hold_out_validation(0.999)
    assert [len(rows.train) for rows in held.clients.values()] == [1, 1, 1, 1]
    twins = Federation("twins", {"a": ClientRows((Row("", "x"), Row("", "x"), Row("", "y")), ())})
    [rows] = twins.hold_out_validation(0.999).clients.values()
    assert not set(rows.train) & set(rows.test)


def test_a_share_that_holds_out_nothing_is_refused():
    with pytest.raises(DataError, match=r"none of the 1 training rows; raise data\.validation_share"):
        federation(1).hold_out_validation(0.5)


# The figures, worked out by hand ------------------------------------------------------------------------------------


def figures(*perplexities: float | None, base: float | None = 40.0, every: int = 1, **other: Any) -> dict[str, Any]:
    """Return a run of one round a perplexity, each with 1 MB up and 2 MB down."""
    return {
        "base": {"perplexity": base, "rougeL": None},
        "final": {"perplexity": perplexities[-1], "rougeL": None},
        "rounds": [
            {"round": number, "perplexity": value, "bytes_up": 1_000_000, "bytes_down": 2_000_000}
            for number, value in enumerate(perplexities, start=1)
        ],
        "every": every,
        "bytes_up": len(perplexities) * 1_000_000,
        "bytes_down": len(perplexities) * 2_000_000,
        "prunes": 1,
        "self_pruning": True,
        "updates": 4,
        "failures": 0,
        "dropped": 0,
        "ranks": {"a": 2, "b": {"q": 4, "v": 8}},
        "trainable_parameters": {"a": 10, "b": 30},
        "base_parameters": 1000,
        "seconds": 3.0,
        **other,
    }


def results(runs: dict[str, Sequence[dict[str, Any] | None]], **settings: Any) -> dict[str, Any]:
    return {
        "metric": "perplexity",
        "target": 25.0,
        "reference": None,
        "seeds": list(range(max(map(len, runs.values()), default=0))),
        "methods": [{"label": label, "method": "hetlora", "learning_rate": 0.01} for label in runs],
        "tuning": [],
        "runs": [
            {
                "run": f"{label}, {seed}",
                "label": label,
                "seed": seed,
                "figures": run,
                "failed": None if run else "it broke",
            }
            for label, own in runs.items()
            for seed, run in enumerate(own)
        ],
        **settings,
    }


def test_a_row_is_what_its_runs_say():
    [row] = table(results({"a": [figures(30.0, 22.0, 24.0), figures(24.0, 26.0, 20.0)]}))
    assert row.mean == 22.0
    assert row.std == pytest.approx(math.sqrt(8.0))  # of 24 and 20: ((2² + 2²) / (2 - 1))^½
    assert row.best_round == 2.5  # 2 and 3
    assert (row.rounds_to_target, row.megabytes_to_target, row.reached) == (1.5, 4.5, 2)  # after 2 and 1 rounds of 3 MB
    assert row.trained_share == pytest.approx(0.02)
    assert row.final_rank == 4.0  # of 2 and the mean of 4 and 8
    assert row.pruned_share == 0.25
    assert (row.megabytes_up, row.megabytes_down, row.seconds) == (3.0, 6.0, 3.0)
    assert row.verdict == "reference"
    assert cells(row) == [
        "a", "0.01", "22.00 ± 2.83", "—", "2.5", "1.5", "4.50", "2.00%", "4.0", "25%", "3.00", "6.00", "3", "—", "reference",
    ]  # fmt: skip


def test_what_is_missing_is_a_dash():
    one, none, diverged = table(
        results({"one": [figures(30.0, None, 28.0, every=2)], "none": [figures(30.0, every=0)], "inf": [figures(None)]})
    )
    assert (one.std, one.rounds_to_target, one.best_round) == (None, None, 3)
    assert cells(one)[2:7] == ["28.00", "—", "3", "—", "—"]
    assert cells(none)[2:7] == ["30.00", "—", "—", "—", "—"]
    assert cells(diverged)[2] == "— (1 not finite)"
    assert one.verdict == "reference"
    assert none.verdict == "one seed: no test"


def test_the_base_is_round_zero_and_a_run_without_rounds_has_figures():
    still = figures(20.0, base=20.0) | {"rounds": [], "bytes_up": 0, "bytes_down": 0, "updates": 0, "prunes": 0}
    [row] = table(results({"zeroshot": [still]}))
    assert (row.mean, row.best_round, row.rounds_to_target, row.megabytes_to_target) == (20.0, 0, 0, 0.0)
    assert row.pruned_share is None
    [row] = table(results({"b": [figures(20.0) | {"self_pruning": False}]}))
    assert row.pruned_share is None


def test_nobody_is_not_tuned():
    methods = [{"name": "zeroshot"}, {"name": "rbla"}]
    zeroshot, other = plan(document(methods=methods, learning_rates=[1e-2, 1e-3])).methods
    assert (zeroshot.trains, len(zeroshot.tuning), len(zeroshot.final)) == (False, 0, 1)
    assert (other.trains, len(other.tuning), len(other.final)) == (True, 2, 2)


def test_runs_that_failed_or_missed_the_target_are_counted():
    rows = table(results({"a": [figures(20.0), None], "b": [figures(30.0), figures(24.0)], "c": [None, None]}))
    assert [row.failed for row in rows] == [1, 0, 2]
    assert [cells(row)[2] for row in rows] == ["20.00 (1 failed)", "27.00 ± 4.24", "failed"]
    assert cells(rows[1])[5:7] == ["1.0 (1 of 2)", "3.00 (1 of 2)"]
    said = notes(rows, results({"a": [figures(20.0), None], "b": [figures(30.0)]}))
    assert any("FAILED a, 1: it broke" in note for note in said)


def test_notes_say_once_what_was_not_measured():
    raw = results({"a": [figures(20.0, every=0)], "b": [figures(20.0, every=0)]})
    assert sum("evaluation.every = 0" in note for note in notes(table(raw), raw)) == 1


@pytest.mark.parametrize(("rate", "edge"), [(0.01, False), (0.1, True), (0.001, True)])
def test_notes_say_where_the_chosen_rate_is_the_last_one_tried(rate: float, edge: bool):
    raw = results({"a": [figures(20.0)]})
    raw["methods"][0]["learning_rate"] = rate
    tried = [{"run": "t", "label": "a", "learning_rate": own, "figures": figures(1.0)} for own in (0.1, 0.01, 0.001)]
    said = notes(table(raw), raw | {"tuning": tried})
    assert [f"may be better: a ({rate:g})." in note for note in said if "edge" in note] == [True] * edge
    assert not any("edge" in note for note in notes(table(raw), raw | {"tuning": tried[:1]})), "one rate has no edge"
    raw["methods"][0] |= {"label": "taker", "rate_of": "a"}  # the one that was tuned is not in the table
    raw["runs"][0]["label"] = "taker"
    said = notes(table(raw), raw | {"tuning": tried})
    assert [f"may be better: taker ({rate:g})." in note for note in said if "edge" in note] == [True] * edge


def test_notes_say_that_no_rate_was_tuned():
    raw = results({"a": [figures(20.0)], "b": [figures(21.0)]})
    note = "Learning rates were not tuned: one rate for all methods, 0.01, and another may order them otherwise."
    assert [note in said for said in notes(table(raw), raw) if "tune" in said] == [True]
    tried = [{"run": "t", "label": "a", "learning_rate": 0.1, "figures": figures(1.0)}]
    raw["methods"][1]["learning_rate"] = 0.1  # somebody has chosen these two
    assert not any("tuned:" in said for said in notes(table(raw), raw))
    assert not any("tuned:" in said for said in notes(table(raw), raw | {"tuning": tried}))


def test_a_column_without_a_figure_is_left_out_and_rouge_stands_where_every_run_has_it():
    scored = figures(20.0) | {"final": {"perplexity": 20.0, "rougeL": 31.25}}
    for second, there in ((scored, True), (figures(20.0), False)):
        raw = results({"a": [scored, second]}, target=None)
        head, _, row = to_markdown(table(raw), [], raw).splitlines()[:3]
        assert ("ROUGE-L" in head, "31.25" in row) == (there, there)
        assert "target" not in head
        assert "| 1 |" in row, "the best round is a whole number"
    raw = results({"a": [scored]}, metric="rougeL", target=None)
    assert "| ROUGE-L | perplexity |" in to_markdown(table(raw), [], raw)


def test_notes_say_whose_rate_a_method_takes():
    raw = results({"a": [figures(20.0)], "b": [figures(21.0)], "c": [figures(22.0)]})
    for method in raw["methods"][1:]:
        method["rate_of"] = "a"
    assert "At the learning rate tuned for a: b, c." in notes(table(raw), raw)


def test_notes_say_where_clients_gave_nothing_beyond_the_drop_outs_asked_for():
    failing, dropping = {"failures": 3, "dropped": 1, "updates": 5}, {"failures": 2, "dropped": 2}
    raw = results({"a": [figures(20.0, **failing), figures(20.0), None], "b": [figures(20.0, **dropping)]})
    said = [note for note in notes(table(raw), raw) if "client turns" in note]
    assert said == ["a: 2 of 12 client turns gave nothing; records.jsonl of its runs says why."]


def test_differences_are_tested_in_pairs_and_corrected_for_their_number():
    reference = [20.0, 21.0, 22.0]
    runs = {
        "best": [figures(value) for value in reference],
        # differences 1, 1.1, 0.9: mean 1, sd 0.1, t = 1 / (0.1 / √3) = 17.32; two-sided p with 2 degrees of freedom is
        # 1 - t / √(2 + t²) = 0.00332
        "worse": [figures(value + more) for value, more in zip(reference, (1.0, 1.1, 0.9), strict=True)],
        # differences 3, -2, 2: mean 1, sd √7, t = √(3/7) = 0.6547; p = 1 - 0.6547 / √2.4286 = 0.5799
        "noisy": [figures(value + more) for value, more in zip(reference, (3.0, -2.0, 2.0), strict=True)],
        "twin": [figures(value) for value in reference],
        "shifted": [figures(value + 1.0) for value in reference],
    }
    best, worse, noisy, twin, shifted = table(results(runs))
    assert best.verdict == "reference"
    assert worse.p_value == pytest.approx(1 - 17.3205 / math.sqrt(302.0), abs=1e-5)
    assert worse.p_holm == pytest.approx(2 * (worse.p_value or 0.0)), "the smaller of two"
    assert worse.verdict == "worse"
    assert noisy.p_value == pytest.approx(0.5799, abs=1e-4)
    assert (noisy.p_holm, noisy.verdict) == (noisy.p_value, "noise")
    assert (twin.p_value, twin.verdict) == (None, "the same figures")
    assert (shifted.p_value, shifted.verdict) == (None, "the same difference in every seed: no test")


def test_a_reference_may_be_asked_for_and_higher_rouge_is_better():
    def run(score: float) -> dict[str, Any]:
        return figures(30.0) | {"final": {"perplexity": 30.0, "rougeL": score}}

    runs = {"low": [run(10.0), run(11.0), run(12.0)], "high": [run(20.0), run(21.1), run(21.9)]}
    low, high = table(results(runs, metric="rougeL", reference="low", target=None))
    assert (low.verdict, high.verdict) == ("reference", "better")
    assert (high.best_round, high.rounds_to_target) == (None, None)
    low, high = table(results(runs, metric="rougeL", target=None))
    assert (low.verdict, high.verdict) == ("worse", "reference")


def test_seeds_that_only_one_of_two_has_are_left_out_of_the_test():
    runs = {"a": [figures(20.0), figures(21.0), figures(22.0)], "b": [figures(25.0), None, figures(26.5)]}
    _, second = table(results(runs))
    assert second.p_value == paired_test([(25.0, 20.0), (26.5, 22.0)])


def test_a_method_whose_hard_seeds_failed_is_judged_by_the_seeds_both_finished():
    hard = [figures(value) for value in (10.0, 20.1, 30.05, 100.2, 200.0)]
    easy = [figures(value) for value in (11.01, 21.2, 31.0)] + [None, None]
    for reference in ("a", None):
        raw = results({"a": hard, "b": easy}, reference=reference)
        first, second = table(raw)
        assert (second.mean or 0.0) < (first.mean or 0.0), "of fewer seeds, the easy ones"
        assert (first.verdict, second.verdict) == ("reference", "worse")
        assert second.pairs == 3
        assert cells(second)[-1] == "worse (n = 3)"
        assert "over the seeds that both finished, n of 5" in notes([first, second], raw)[0]
    raw = results({"a": [hard[0], None], "b": [easy[0], None]})
    assert [row.verdict for row in table(raw)] == ["reference", "one seed: no test"], "where all failed somewhere"


def test_a_difference_that_only_rounding_tells_apart_is_no_test():
    assert paired_test([(1.2, 1.1), (2.3000000000000003, 2.2)]) == "the same difference in every seed: no test"
    assert paired_test([(1.2, 1.2), (2.3000000000000003, 2.3)]) == "the same figures"


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        ([], []),
        ([0.2], [0.2]),
        ([0.01, 0.02, 0.03], [0.03, 0.04, 0.04]),  # 3 · 0.01; 2 · 0.02; max(0.04, 1 · 0.03)
        ([0.5, 0.001, 0.9], [1.0, 0.003, 1.0]),
    ],
)
def test_holm_steps_down(p_values: list[float], corrected: list[float]):
    assert holm(p_values) == pytest.approx(corrected)


# The forms, read back -----------------------------------------------------------------------------------------------

HARD = 'a|b_c & 50 % {γ} #1 $x^2 "q", \\n~'
ROWS = [
    MethodRow(HARD, "hetlora", 0.004, mean=20.1234567890123, std=0.5, seeds=2, reached=1, rounds_to_target=3.0),
    MethodRow("plain", "fedavg", None, failed=2),
]


def test_the_csv_holds_every_figure_unrounded():
    first, second = csv.DictReader(to_csv(ROWS).splitlines())
    assert first["label"] == HARD
    assert float(first["mean"]) == 20.1234567890123
    assert (second["mean"], second["learning_rate"], second["failed"]) == ("", "", "2")
    assert list(first) == list(MethodRow.__dataclass_fields__)


def shown(rows: Sequence[MethodRow]) -> list[list[str]]:
    """The cells in the files: a column without a figure is left out."""
    return [
        list(line) for line in zip(*(c for c in zip(*map(cells, rows), strict=True) if set(c) != {"—"}), strict=True)
    ]


def test_the_markdown_splits_into_the_same_cells():
    lines = [line for line in to_markdown(ROWS, ["a note"], results({})).splitlines() if line.startswith("|")]
    split = [[re.sub(r"\\(.)", r"\1", part.strip()) for part in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert split[0][:3] == ["method", "learning rate", "perplexity"]
    assert split[2:] == [[" ".join(cell.split()) for cell in line] for line in shown(ROWS)]


def test_the_latex_splits_into_the_same_cells_and_escapes_them():
    text = to_latex(ROWS, ["100 % sure"], results({}))
    assert "% 100 % sure" in text
    spec = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)
    body = text[text.index(r"\midrule") + 9 : text.index(r"\bottomrule")].strip().splitlines()
    assert spec
    for line, own in zip(body, shown(ROWS), strict=True):
        parts = [part.strip() for part in re.split(r"(?<!\\)&", line.removesuffix(r"\\"))]
        assert len(parts) == len(spec[1]) == len(own)
        assert parts == [escape_latex(cell).strip() for cell in own]
    first = body[0]
    assert r"50 \% \{$\gamma$\} \#1 \$x\textasciicircum{}2" in first
    assert r"20.12 $\pm$ 0.50" in first
    assert "---" in body[1]


@pytest.mark.parametrize("label", ["[1] first", "*", " * starred"])
def test_a_label_in_latex_is_no_argument_of_the_line_before(label: str):
    text = to_latex([MethodRow(label, "hetlora", None)], [], results({}))
    assert not re.search(r"(\\\\|rule)\s*[\[*]", text)
    mark = label.strip()[0]
    assert f"{{{mark}}}" in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_a_terminal_shows_every_figure_whole_and_no_line_too_long(columns: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    raw = results({"one": [figures(20.0), figures(22.0)], "two": [figures(31.0), figures(30.0)]})
    screen = Terminal()
    print_table(table(raw), [], raw, screen)
    text = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    assert max(map(len, text.splitlines())) <= columns
    for row in table(raw):
        for cell in cells(row):
            assert cell in text


# Real runs ----------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


Compare = Callable[..., Outcome]


@pytest.fixture
def place(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a small federation and the TOML file of a comparison."""
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path, tiny)
    return tmp_path


def furnish(folder: Path, base: str) -> None:
    """Write the federation and the file."""
    write_rows(folder / "rows.jsonl", PHONES, count=8, train=6)
    methods = [
        {"name": "hetlora", "label": "HetLoRA γ=0.5", "gamma": 0.5, "penalty": 5.0, "min_rank": 1},
        {"name": "fedavg", "set": {"ranks": {"kind": "same", "rank": 2}}},
    ]
    compare = {
        "seeds": [0, 1],
        "learning_rates": [1e-2, 1e-3],
        "validation_share": 0.4,
        "target": 1e9,
        "methods": methods,
    }
    training = {"steps": 2, "batch_size": 2, "learning_rate": 1e-2}
    text = phones(base, threads=1, training=training, method=None, evaluation=None, compare=compare)
    (folder / "compare.toml").write_text(text, encoding="utf8")


class Whole(NamedTuple):
    """A comparison that is done: the folder it was called in, and what it said."""

    place: Path
    outcome: Outcome


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Whole:
    """A comparison that nothing befell, which nobody changes."""
    folder, out, err = tmp_path_factory.mktemp("whole"), io.StringIO(), io.StringIO()
    furnish(folder, tiny)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(folder)
        code = main(["compare", str(folder / "compare.toml"), "--json"])
    return Whole(folder, Outcome(code, out.getvalue(), err.getvalue()))


@pytest.fixture
def compare(place: Path, capsys: pytest.CaptureFixture[str]) -> Compare:
    """Run the command in this process with `--set` for each change."""

    def call(*changes: str, options: Sequence[str] = ("--json",)) -> Outcome:
        capsys.readouterr()
        changed = [part for change in changes for part in ("--set", change)]
        code = main(["compare", str(place / "compare.toml"), *options, *changed])
        return Outcome(code, *capsys.readouterr())

    return call


def timeless(value: Any) -> Any:
    """Return results without what differs between two runs of the same thing: how long they took."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in ("seconds", "kept", "folder")}
    return [timeless(item) for item in value] if isinstance(value, list) else value


@pytest.mark.process
def test_a_comparison_writes_its_tables_and_repeats_no_finished_run(
    whole: Whole, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    place, first = whole
    code, out, err = first
    assert code == 0
    assert out.count("\n") == 1
    assert f"[{RUNS}/{RUNS}]" in err
    assert "ETA" in err
    folder = place / "runs/phones"
    assert first.json["kept"] == first.json["failed"] == 0
    on_disk = json.loads((folder / "results.json").read_text("utf8"))
    assert timeless(on_disk) == timeless({key: value for key, value in first.json.items() if key in on_disk})
    assert len(list((folder / "runs").iterdir())) == RUNS
    assert not list(folder.rglob("checkpoints")), "an unfinished run begins anew"

    for row, entry in zip(on_disk["table"], on_disk["methods"], strict=True):
        judged = {run["learning_rate"]: run for run in on_disk["tuning"] if run["label"] == entry["label"]}
        best = min(judged, key=lambda rate: judged[rate]["figures"]["final"]["perplexity"])
        assert entry["learning_rate"] == row["learning_rate"] == best
        finals = [run["figures"]["final"]["perplexity"] for run in on_disk["runs"] if run["label"] == entry["label"]]
        assert row["mean"] == pytest.approx(sum(finals) / 2)
        assert row["std"] == pytest.approx(abs(finals[0] - finals[1]) / math.sqrt(2))
    assert [row.label for row in table(on_disk)] == [row["label"] for row in on_disk["table"]], "from the file alone"
    averaged = on_disk["table"][1]
    assert averaged["final_rank"] == 2.0
    # Rank 2 of q_proj [32, 32] and v_proj [16, 32] in two layers, of all numbers of the base.
    [base] = {run["figures"]["base_parameters"] for run in on_disk["runs"]}
    assert averaged["trained_share"] == pytest.approx(2 * 2 * ((32 + 32) + (32 + 16)) / base)
    # 2 rounds of 3 clients, float32, and as much down as up.
    assert averaged["megabytes_up"] == averaged["megabytes_down"] == 2 * 3 * 4 * 2 * 2 * (64 + 48) / 1e6
    assert averaged["rounds_to_target"] == 0.0, "the target is above the base"

    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    monkeypatch.chdir(place)
    monkeypatch.setattr("hetlora.commands.compare.preconditions.load_federation", None)  # nothing is left to be checked
    assert main(["compare", str(place / "compare.toml")]) == 0
    out, err = capsys.readouterr()
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    assert "kept 4 finished runs" in err
    assert "replaced" not in err
    assert "hetlora report runs/phones" in out
    assert "HetLoRA γ=0.5" in out
    assert "paired t-test over 2 seeds" in out
    assert {path.name for path in folder.iterdir()} >= {"table.md", "table.csv", "table.tex", "results.json"}


@pytest.mark.process
def test_tuning_never_sees_a_test_row_and_final_runs_train_on_all_training_rows(whole: Whole):
    shares = {}
    for path in (whole.place / "runs/phones/runs").glob("*/records.jsonl"):
        run = json.loads(path.read_text("utf8").splitlines()[0])
        shares.setdefault(run["config"]["data"]["validation_share"], set()).add((run["train_rows"], run["test_rows"]))
    assert shares[0.0] == {(24, 8)}
    [(train, held)] = shares[0.4]
    assert train + held == 24
    assert held > 0


def one_run(place: Path, *changes: str) -> PlannedRun:
    comparison = load_comparison(place / "compare.toml", ["compare.learning_rates=", "compare.seeds=[0]", *changes])
    [[run]] = comparison.methods[0].final.values()
    return run


@pytest.mark.process
@pytest.mark.parametrize("when", ["before", "while"])
def test_a_run_that_read_other_data_than_planned_leaves_no_result(
    place: Path, monkeypatch: pytest.MonkeyPatch, when: str
):
    run = one_run(place)
    edit = functools.partial((place / "rows.jsonl").write_text, (place / "rows.jsonl").read_text("utf8") + "\n", "utf8")
    whole = LocalExperiment.run

    def edited(experiment: LocalExperiment) -> RunResult:
        edit()
        return whole(experiment)

    if when == "before":
        edit()
    else:
        monkeypatch.setattr(LocalExperiment, "run", edited)
    reason = execute_planned(run.config, run.stamps, 1)
    assert reason == "data.path = 'rows.jsonl' changed while the comparison ran; call it again"
    assert read_result(run.folder) is None
    assert run.folder.exists() == (when == "while")
    monkeypatch.setattr(LocalExperiment, "run", whole)
    again = one_run(place)
    assert again.folder != run.folder
    assert execute_planned(again.config, again.stamps, 1) is None


@pytest.mark.process
def test_a_table_is_printed_in_any_encoding(place: Path, monkeypatch: pytest.MonkeyPatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    entry = 'compare.methods=[{name="zeroshot", label="γ=0.5"}]'
    assert main(["compare", str(place / "compare.toml"), "--quiet", "--set", entry]) == 0
    out.seek(0)
    assert "gamma=0.5" in out.read(), "in letters that the encoding has"


@pytest.mark.process
def test_drop_outs_are_told_apart_from_failures(place: Path):
    run = one_run(place, "federation.dropout=0.67")
    assert execute_planned(run.config, run.stamps, 1) is None
    figures = read_result(run.folder)
    assert figures
    assert figures["dropped"] == figures["failures"] > 0
    [row] = table(results({"a": [figures]}))
    assert row.seeds == 1, "a table takes what a run gives"


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"final": 1}', json.dumps(figures(2.0) | {"final": 1}), json.dumps(figures(2.0))[:-9]]
)
def test_a_result_that_is_none_is_not_taken_for_one(tmp_path: Path, content: str):
    (tmp_path / "result.json").write_text(json.dumps(figures(2.0)), encoding="utf8")
    assert read_result(tmp_path) == figures(2.0)
    (tmp_path / "result.json").write_text(content, encoding="utf8")
    assert read_result(tmp_path) is None


Limit = Callable[[int], None]


@pytest.fixture
def limit_files() -> Iterator[Limit]:
    """Let no file grow beyond a size: for who writes, a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.process
@pytest.mark.parametrize(("size", "method"), [(0, "rbla"), (2000, "rbla"), (20_000, "full")])
def test_a_full_disk_ends_a_run_with_one_error(
    place: Path, capsys: pytest.CaptureFixture[str], limit_files: Limit, size: int, method: str
):
    limit_files(size)
    code = main(["run", str(place / "compare.toml"), "--quiet", "--set", f"method.name={method}"])
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("hetlora: cannot write to 'runs")
    assert "free some space" in err


@pytest.mark.process
def test_a_full_disk_ends_a_comparison_with_one_error(compare: Compare, place: Path, limit_files: Limit):
    limit_files(0)
    code, out, err = compare("compare.learning_rates=")
    assert (code, out) == (2, "")
    assert "hetlora: cannot write to 'runs/phones': " in err
    assert "FAILED: OSError" in err
    assert "error.txt" not in err
    assert not list((place / "runs").rglob("*.part"))


@pytest.mark.slow
@pytest.mark.process
def test_a_worker_reads_text_in_whatever_encoding_it_has(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    run = one_run(place, "data.prompt=Überschrift — {question}")
    with WorkerPool(1, place) as pool:
        assert [reason for _, reason in pool.run([run], lambda _: None)] == [None]
    assert json.loads((run.folder / "config.json").read_text("utf8"))["data"]["prompt"] == "Überschrift — {question}"


def command(place: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "hetlora.cli", "compare", str(place / "compare.toml"), *options]


LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds worker processes in /proc")


def ended(processes: Sequence[int]) -> bool:
    return all(has_ended(process) for process in processes)


@pytest.mark.slow
@pytest.mark.process
@LINUX
def test_killed_and_called_again_it_goes_on_and_gives_the_same_numbers(compare: Compare, place: Path, whole: Whole):
    runs = place / "runs/phones/runs"
    line = command(place, "--jobs", "2")
    with (place / "log").open("wb") as log, started(line, cwd=place, stdout=log, stderr=log) as process:
        wait_until(lambda: len(list(runs.glob("*/result.json"))) >= 3, process)
        workers = children(process.pid)
        process.kill()
        assert process.wait() == -signal.SIGKILL, (place / "log").read_text("utf8")
    wait_until(lambda: ended(workers))
    done = list(runs.glob("*/result.json"))
    assert 3 <= len(done) < RUNS
    stamps = {path: path.stat().st_mtime_ns for path in done}
    # What a kill in the middle of a run leaves.
    for path in runs.iterdir():
        if not (path / "result.json").exists():
            (path / "leftover").write_text("half", encoding="utf8")
    code, _, _ = again = compare()
    assert code == 0
    assert again.json["kept"] == len(done)
    assert {path: path.stat().st_mtime_ns for path in done} == stamps
    assert not list(runs.glob("*/leftover"))
    for part in ("table", "runs", "tuning"):
        assert timeless(whole.outcome.json[part]) == timeless(again.json[part])


@pytest.mark.slow
@pytest.mark.process
def test_two_jobs_give_what_one_gives_bit_for_bit(compare: Compare, place: Path, whole: Whole):
    two = compare(options=("--json", "--jobs", "2"))
    assert two.code == 0
    assert timeless(whole.outcome.json) == timeless(two.json)
    adapters = list(whole.place.glob("runs/phones/runs/*/adapter/adapter_model.safetensors"))
    assert len(adapters) == RUNS
    for path in adapters:
        assert (place / path.relative_to(whole.place)).read_bytes() == path.read_bytes()
    assert not list((place / "runs/phones").glob("worker-*.log")), "nothing was said there"


@pytest.mark.process
@LINUX
@pytest.mark.parametrize("jobs", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ctrl_c_exits_with_130_and_leaves_no_worker(place: Path, jobs: int):
    line = command(place, "--jobs", str(jobs), "--set", "federation.rounds=200")
    with started(line, cwd=place, stderr=subprocess.PIPE, text=True) as process:
        # Workers are ended whatever they do: to wait until they train, too, would only load PyTorch in each.
        runs = place / "runs/phones/runs"
        if jobs == 1:
            wait_until(lambda: any(runs.glob("*/records.jsonl")), process)
        else:
            wait_until(lambda: len(children(process.pid)) == jobs, process)
        workers = children(process.pid)
        assert len(workers) == (jobs if jobs > 1 else 0)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=HANGS)
    assert process.returncode == 130
    assert "the same command goes on" in err
    assert "Traceback" not in err
    wait_until(lambda: ended(workers))


@pytest.mark.process
@LINUX
def test_a_worker_that_dies_costs_its_run_and_the_rest_goes_on(compare: Compare, monkeypatch: pytest.MonkeyPatch):
    """Of two runs the second one needs a new worker, for there is one at a time: each loads PyTorch and transformers."""
    monkeypatch.setattr(hetlora.commands.compare.comparison, "WorkerPool", lambda _, logs: WorkerPool(1, logs))
    alive, first = _Worker._alive, threading.Lock()

    def killed(self: _Worker) -> subprocess.Popen[str] | None:
        process = alive(self)
        if process is not None and first.acquire(blocking=False):
            process.kill()
        return process

    monkeypatch.setattr(_Worker, "_alive", killed)
    small = ("compare.learning_rates=", "compare.seeds=[0]")
    code, _, err = outcome = compare(*small, options=("--json", "--jobs", "2"))
    assert code == 1
    failed = [run for run in outcome.json["runs"] if run["failed"]]
    assert len(failed) == outcome.json["failed"] == 1
    assert "its worker process ended by signal 9" in failed[0]["failed"]
    assert failed[0]["run"] in err
    assert sum(row["failed"] for row in outcome.json["table"]) == 1
    again = compare(*small)
    assert (again.code, again.json["kept"], again.json["failed"]) == (0, 1, 0)


@pytest.mark.process
def test_a_run_that_fails_is_shown_with_its_reason_and_the_rest_goes_on(compare: Compare, place: Path):
    base = place / "no weights"
    shutil.copytree(load_config(place / "compare.toml").model.base, base)
    (base / "model.safetensors").write_bytes(b"")
    entry = f'{{name="rbla", label="broken", set={{"model.base"="{base}"}}}}'
    code, out, err = compare(f'compare.methods=[{entry}, {{name="hetlora", min_rank=1}}]', options=())
    assert code == 1
    assert "FAILED broken" in out
    assert "cannot load the base model" in out
    assert "2 runs are not done: no learning rate gave a finite figure" in err
    table_md = (place / "runs/phones/table.md").read_text("utf8")
    row = next(line for line in table_md.splitlines() if line.startswith("| broken"))
    assert [part.strip() for part in row.split("|")[2:4]] == ["—", "failed"]
    assert next(line for line in table_md.splitlines() if line.startswith("| hetlora")).count("—") < 3


@pytest.mark.process
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["data.path=nowhere.jsonl"], ["'nowhere.jsonl'", "does not exist", "HetLoRA γ=0.5, fedavg"]),
        (["data.target={text}"], ["rows.jsonl, line 1", "'text' is missing"]),
        (["compare.validation_share=1e-9"], ["validation share", "raise data.validation_share"]),
        (["federation.rounds=0"], ["every method: federation.rounds = 0"]),
        (["compare="], ["[compare] is missing"]),
        (["compare.jobs=0"], ["compare.jobs = 0"]),
        (["output=~nosuchuser/x"], ["cannot write to '~nosuchuser/x/phones'", "set output"]),
        (["model.base=/nonexistent"], ["HetLoRA γ=0.5, fedavg: the base model '/nonexistent' is not a folder"]),
        (["model.tokenizer=/nonexistent"], ["'/nonexistent'"]),
        (['model.target_modules=["nope"]'], ["HetLoRA γ=0.5, fedavg", "'nope'"]),
        (["data.max_length=513"], ["data.max_length = 513", "512"]),
        (["federation.clients_per_round=5"], ["the data have 4 clients"]),
        (
            ["ranks=", "ranks.kind=memory", "ranks.max=4", "ranks.tiers=[{megabytes=0.001, share=1.0}]"],
            ["HetLoRA γ=0.5: ranks.tiers.0.megabytes = 0.001"],
        ),
        (["data.chat=true"], ["has no chat template"]),
        (
            [
                "compare.metric=rougeL",
                "evaluation.generate=2",
                "evaluation.max_new_tokens=8",
                "data.prompt=",
                "compare.target=",
            ],
            ["no validation row has a prompt", "no held-out row has a prompt"],
        ),
    ],
    ids=lambda value: value[0] if "=" in value[0] else None,
)
def test_bad_input_is_refused_before_anything_is_written(
    compare: Compare, place: Path, changes: list[str], said: list[str]
):
    code, out, err = compare(*changes)
    assert (code, out) == (2, "")
    for part in said:
        assert part in err
    assert "Traceback" not in err
    assert not (place / "runs").exists()


@pytest.mark.process
def test_a_conversation_that_the_template_refuses_is_refused_before_anything_is_written(compare: Compare, place: Path):
    base = place / "chatty"
    shutil.copytree(load_config(place / "compare.toml").model.base, base)
    template = "{% for m in messages %}{% if '7' in m.content %}{{ raise_exception('no sevens') }}{% endif %}"
    (base / "chat_template.jinja").write_text(template + "{{ m.content }}{% endfor %}", encoding="utf8")
    code, _, err = compare(f"model.base={base}", "data.chat=true")
    assert code == 2
    assert "no sevens" in err
    assert not (place / "runs").exists()


@pytest.mark.process
def test_a_second_call_at_the_same_time_is_refused(compare: Compare, place: Path):
    fcntl = pytest.importorskip("fcntl")
    (place / "runs/phones").mkdir(parents=True)
    with (place / "runs/phones/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = compare()
    assert code == 2
    assert "another hetlora compare is at work" in err


@pytest.mark.process
def test_other_commands_pass_the_comparison_over(place: Path):
    assert load_config(place / "compare.toml").federation.rounds == 2
