"""`hetlora reproduce`: tables and figures equal a study's runs, and are rebuilt from the records alone."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import statistics
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.stats import ttest_rel

from hetlora import cli
from hetlora.errors import ConfigError, HetLoraError
from hetlora.runs.records import read_records
from studies import figures as drawing
from studies.figures import paired, tier_means
from studies.outcome import read_outcome
from studies.reproduction import RUNS, shown_again
from studies.study import KINDS, FigureEntry, TableEntry, known_studies, load_study
from studies.tables import chosen, markdown_table

pytestmark = pytest.mark.run

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'hetlora[reproduce]'")

ROOT = Path(__file__).resolve().parent.parent
HETLORA, HOMLORA = "HetLoRA γ=0.5", "HomLoRA r=2"


def reproduce(place: Path, *more: str) -> dict[str, Any]:
    """Run the smallest study by its command, or go on with it; return what it prints."""
    out, where = io.StringIO(), f"output={json.dumps(str(place / 'runs'))}"
    with contextlib.redirect_stdout(out):
        arguments = ["reproduce", "smoke", "--json", "--quiet", "--output", str(place / "results"), "--set", where]
        assert cli.main([*arguments, *more]) == 0
    return json.loads(out.getvalue())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("smoke")
    result = reproduce(place)
    assert (result["failed"], result["kept"]) == (0, 0)
    assert {Path(file).name for file in result["files"]} == {path.name for path in (place / "results").iterdir()}
    return place


def runs(place: Path, label: str, kind: str = "runs") -> list[dict[str, Any]]:
    return [run for run in read_outcome(place / "results" / RUNS)[kind] if run["label"] == label]


def folder(place: Path, run: dict[str, Any]) -> Path:
    return place / "runs" / "study-smoke" / "runs" / str(run["folder"])


# What is kept of a run -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_figure_kept_of_a_run_is_that_of_its_records(smoke: Path) -> None:
    for run in runs(smoke, HETLORA):
        figures = run["figures"]
        head, base, *rounds, final = read_records(folder(smoke, run) / "records.jsonl")
        assert figures["base"]["perplexity"] == pytest.approx(base["overall"]["perplexity"], rel=1e-5)
        assert figures["final"]["perplexity"] == pytest.approx(final["overall"]["perplexity"], rel=1e-5)
        assert figures["loss"] == pytest.approx([record["loss"] for record in rounds], rel=1e-5)
        for key in ("perplexity", "bytes_up", "bytes_down"):
            there = [record[key] for record in rounds]
            assert [record[key] for record in figures["rounds"]] == pytest.approx(there, rel=1e-5)
        trained = statistics.fmean(head["trainable_parameters"].values())
        assert figures["trainable_parameters"]["mean"] == pytest.approx(trained, rel=1e-5)
        shares = [[r["ranks"][c], share * len(r["weights"])] for r in rounds for c, share in r["weights"].items()]
        assert figures["shares"] == [[rank, pytest.approx(share, rel=1e-5)] for rank, share in shares]


@pytest.mark.slow
def test_mean_ranks_follow_the_prunes(smoke: Path) -> None:
    pruned = 0
    for run in runs(smoke, HETLORA):
        head, _, *rounds, _ = read_records(folder(smoke, run) / "records.jsonl")
        now = dict(run["figures"]["first_ranks"])
        assert len(now) == head["clients"]
        for record, mean in zip(rounds, run["figures"]["mean_rank"], strict=True):
            now |= record["prunes"]
            pruned += len(record["prunes"])
            assert mean == pytest.approx(statistics.fmean(now.values()), rel=1e-5)
        assert now == run["figures"]["ranks"]
    assert pruned, "or the test says nothing"


@pytest.mark.slow
def test_sizes_of_slots_are_those_of_the_adapter_that_was_written(smoke: Path) -> None:
    for run in runs(smoke, "zeropad"):
        tensors = load_file(folder(smoke, run) / "adapter" / "adapter_model.safetensors")
        squares = np.zeros(8)
        for name, A in tensors.items():
            if ".lora_A." in name:
                B = tensors[name.replace("lora_A", "lora_B")].astype(np.float64)
                squares += np.square(np.linalg.norm(A.astype(np.float64), axis=1) * np.linalg.norm(B, axis=0))
        assert run["figures"]["slots"] == pytest.approx(np.sqrt(squares).tolist(), rel=1e-5)


@pytest.mark.slow
def test_tuning_is_shorter_and_counts_for_the_rate_alone(smoke: Path) -> None:
    judged = {run["learning_rate"]: run["figures"]["final"]["perplexity"] for run in runs(smoke, "zeropad", "tuning")}
    assert set(judged) == {0.004, 0.016}
    assert {run["learning_rate"] for run in runs(smoke, "zeropad")} == {min(judged, key=judged.__getitem__)}
    assert not runs(smoke, HETLORA, "tuning"), "it takes zeropad's rate"
    assert {run["learning_rate"] for run in runs(smoke, HETLORA)} == {min(judged, key=judged.__getitem__)}
    for run in runs(smoke, "zeropad", "tuning"):
        kinds = [record["kind"] for record in read_records(folder(smoke, run) / "records.jsonl")]
        assert kinds.count("round") == 2


# Tables and figures --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_table_says_means_differences_and_tests_of_its_runs(smoke: Path) -> None:
    finals = {
        label: [run["figures"]["final"]["perplexity"] for run in runs(smoke, label)] for label in (HETLORA, "zeropad")
    }
    text = (smoke / "results" / "methods.md").read_text("utf8")
    [row] = [line.split(" | ") for line in text.splitlines() if line.startswith(f"| {HETLORA} ")]
    mean, deviation = statistics.fmean(finals[HETLORA]), statistics.stdev(finals[HETLORA])
    assert row[2] == f"{mean:.2f} ± {deviation:.2f}"
    shares = [own / other - 1 for own, other in zip(finals[HETLORA], finals["zeropad"], strict=True)]
    assert row[3] == f"{statistics.fmean(shares):+.2%}"
    # Three methods are tested against zeropad, so that Holm multiplies the smallest p by three.
    p_values = {}
    for label in ("zeroshot", HOMLORA, HETLORA):
        own = [run["figures"]["final"]["perplexity"] for run in runs(smoke, label)]
        p_values[label] = float(ttest_rel(own, finals["zeropad"]).pvalue)
    smallest = min(p_values, key=p_values.__getitem__)
    [tested] = [line.split(" | ") for line in text.splitlines() if line.startswith(f"| {smallest} ")]
    assert tested[4] == f"{min(1.0, 3 * p_values[smallest]):.3f}"


@pytest.mark.slow
def test_a_table_corrects_for_its_own_rows_alone(smoke: Path) -> None:
    outcome = read_outcome(smoke / "results" / RUNS)
    two = chosen(outcome, [HETLORA, "zeropad"], "zeropad")
    assert [entry["label"] for entry in two["methods"]] == [HETLORA, "zeropad"]
    assert {run["label"] for run in two["runs"]} == {HETLORA, "zeropad"}
    assert two["reference"] == "zeropad"
    assert {run["label"] for run in chosen(outcome, [HETLORA])["tuning"]} == {"zeropad"}, "that judged its rate"


@pytest.mark.slow
def test_a_table_whose_clients_count_alike_averages_them(smoke: Path) -> None:
    means = [
        statistics.geometric_mean(run["figures"]["clients"].values()) for run in runs(smoke, HETLORA)
    ]  # of each seed's run over its clients
    assert means != pytest.approx([run["figures"]["final"]["perplexity"] for run in runs(smoke, HETLORA)], rel=1e-3)
    text = (smoke / "results" / "clients.md").read_text("utf8")
    [row] = [line.split(" | ") for line in text.splitlines() if line.startswith(f"| {HETLORA} ")]
    assert row[2] == f"{statistics.fmean(means):.2f} ± {statistics.stdev(means):.2f}"


@pytest.mark.slow
def test_clients_that_count_alike_are_compared_and_tested_alike(smoke: Path) -> None:
    means = {
        label: [statistics.geometric_mean(run["figures"]["clients"].values()) for run in runs(smoke, label)]
        for label in ("zeroshot", "zeropad", HETLORA)
    }
    p_values = {label: float(ttest_rel(means[label], means["zeropad"]).pvalue) for label in ("zeroshot", HETLORA)}
    # Holm: the smaller one twice, and the other at least that.
    first, second = sorted(p_values, key=p_values.__getitem__)
    corrected = {first: min(1.0, 2 * p_values[first])}
    corrected[second] = max(corrected[first], p_values[second])
    text = (smoke / "results" / "clients.md").read_text("utf8")
    for label, expected in corrected.items():
        [row] = [line.split(" | ") for line in text.splitlines() if line.startswith(f"| {label} ")]
        shares = [own / other - 1 for own, other in zip(means[label], means["zeropad"], strict=True)]
        assert row[3:5] == [f"{statistics.fmean(shares):+.2%}", f"{expected:.3f}"]
    assert "over the clients, which all count alike" in text
    assert "target" not in text.lower(), "which is of the other mean"
    assert "| pruned |" in text, "which is of the whole run, as the mean is"


@pytest.mark.slow
def test_a_table_of_a_round_takes_its_perplexity_and_the_bytes_until_then_by_hand(smoke: Path) -> None:
    outcome = read_outcome(smoke / "results" / RUNS)
    own = [run for run in outcome["runs"] if run["label"] == "zeropad"]
    for run, perplexity in zip(own, (20.0, 30.0), strict=True):
        for record in run["figures"]["rounds"]:
            record |= {"perplexity": perplexity + record["round"], "bytes_up": 10**6 * record["round"]}
            record["bytes_down"] = 5e5
    text = markdown_table(outcome, TableEntry(name="t", title="T", methods=["zeropad", "zeroshot"], round=2))
    head, _, row, zeroshot = ([cell.strip() for cell in line.split("|")] for line in text.splitlines()[2:6])
    cells = dict(zip(head, row, strict=True))
    # After the second of three rounds 22 and 32: mean 27, deviation 10/√2. One and two megabytes up, twice half a one down.
    assert (cells["perplexity"], cells["MB up"], cells["MB down"]) == ("27.00 ± 7.07", "3.00", "1.00")
    assert not {"ROUGE-L", "final rank", "pruned"} & cells.keys()
    assert "after round 2" in text
    assert "target" not in text.lower()
    assert zeroshot[head.index("MB up")] == "0.00", "which has no rounds"


@pytest.mark.slow
def test_a_table_of_a_round_has_no_rouge_of_the_last_one(smoke: Path) -> None:
    outcome = read_outcome(smoke / "results" / RUNS)
    for run in outcome["runs"]:
        run["figures"]["final"]["rougeL"] = 9.5
    shown = {
        entry.round: markdown_table(outcome, entry)
        for entry in (TableEntry(name="t", title="T", methods=["zeropad"], round=number) for number in (2, None))
    }
    assert "9.50" in shown[None]
    assert "ROUGE-L" not in shown[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "label"), [("tables", "flora"), ("rounds", "flora"), ("tiers", "flora"), ("rates", HETLORA)]
)
def test_records_of_an_older_study_are_refused(smoke: Path, kind: str, label: str) -> None:
    study = load_study("smoke")
    shown: dict[str, Any] = {"name": "t", "title": "T", "methods": ["zeropad", label]}
    if kind == "tables":
        settings = study.settings.model_copy(update={"tables": [TableEntry(**shown)]})
    else:
        settings = study.settings.model_copy(update={"figures": [FigureEntry.model_validate({**shown, "kind": kind})]})
    with pytest.raises(HetLoraError, match=f"has no runs of '{label}'.*hetlora reproduce smoke makes it again"):
        shown_again(replace(study, settings=settings), smoke / "results")


def test_rates_are_drawn_as_they_tuned_with_a_mark_where_one_diverged() -> None:
    from matplotlib.figure import Figure

    finals = {4e-3: 50.0, 1e-3: 60.0, 1.6e-2: 900.0, 6.4e-2: None}
    tuning = [
        {"label": "a", "learning_rate": rate, "figures": {"final": {"perplexity": value}}}
        for rate, value in finals.items()
    ]
    tuning += [{"label": "a", "learning_rate": 2e-3, "figures": None}]
    tuning += [{"label": "b", "learning_rate": 8e-3, "figures": {"final": {"perplexity": 40.0}}}]
    axes = Figure().add_subplot()
    drawing._rates(axes, {"metric": "perplexity", "tuning": tuning}, ["a"])
    line, beyond = axes.lines
    assert np.array_equal(line.get_xydata(), [[1e-3, 60.0], [4e-3, 50.0], [1.6e-2, 900.0]])
    assert axes.get_ylim() == pytest.approx((49.0, 70.0)), "fourteen tenths of the lowest at most"
    across, up = np.asarray(beyond.get_xydata()).T
    assert across.tolist() == [2e-3, 1.6e-2, 6.4e-2], "failed, too high, not finite"
    assert 50.0 < up.min() <= up.max() < 70.0, "where it can be seen"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.001", "0.002", "0.004", "0.016", "0.064"]


@pytest.mark.slow
def test_each_kind_of_figure_is_drawn_with_its_methods(smoke: Path) -> None:
    study = load_study("smoke")
    assert {entry.kind for entry in study.settings.figures} == set(KINDS), "the smallest study has one of each"
    for entry in study.settings.figures:
        path = smoke / "results" / f"{entry.name}.svg"
        words = " ".join(element.text or "" for element in ET.parse(path).getroot().iter())
        assert entry.title in words
        assert all(label in words for label in entry.methods), entry.name


def test_clients_are_in_the_tier_that_another_method_gives_them_by_hand() -> None:
    # Ann and bob have rank 2 with "het", cyd 8; what "one" gave them is averaged by that: sqrt(4 * 9) = 6, and 5.
    tiers, clients = {"base": {"2": 1.0, "8": 1.0}}, {"ann": 4.0, "bob": 9.0, "cyd": 5.0}
    ranks = {"ann": 2, "bob": 2, "cyd": 8}
    figures = {"het": {"tiers": tiers, "first_ranks": ranks, "clients": dict.fromkeys(clients, 1.0)}}
    figures["one"] = {"tiers": {"base": {"4": 1.0}}, "first_ranks": dict.fromkeys(clients, 4), "clients": clients}
    outcome = {"runs": [{"label": label, "seed": 0, "figures": own} for label, own in figures.items()]}
    assert tier_means(outcome, "one", "het") == pytest.approx({"2": 6.0, "8": 5.0})


def test_what_a_seed_does_to_all_methods_is_taken_out_by_hand() -> None:
    # Round 1: seed 0 has 10 and 14, seed 1 20 and 26, means 12 and 23, together 17.5. Before it 40 and 60, together 50.
    def run(label: str, seed: int, base: float, after: float) -> dict[str, Any]:
        figures = {"base": {"perplexity": base}, "rounds": [{"perplexity": after}]}
        return {"label": label, "seed": seed, "figures": figures}

    outcome = {"runs": [run("a", 0, 40, 10), run("b", 0, 40, 14), run("a", 1, 60, 20), run("b", 1, 60, 26)]}
    curves = paired(outcome, ["a", "b"])
    assert curves == {"a": [[50.0, 15.5], [50.0, 14.5]], "b": [[50.0, 19.5], [50.0, 20.5]]}
    assert paired({"runs": outcome["runs"][:3]}, ["a", "b"])["a"] == [[40.0, 10.0], [60.0, 20.0]], "b lacks a seed"
    outcome["runs"][3] |= {"seed": 2}
    assert paired(outcome, ["a", "b"])["a"] == [[40.0, 10.0], [60.0, 20.0]], "as many runs, of other seeds"


@pytest.mark.slow
def test_records_alone_give_the_same_tables_and_figures(smoke: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / RUNS).write_bytes((smoke / "results" / RUNS).read_bytes())
    reproduce(tmp_path, "--show")
    assert not (tmp_path / "runs").exists(), "nothing is run"
    for path in (smoke / "results").iterdir():
        assert (tmp_path / "results" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
def test_called_again_it_keeps_every_run_and_writes_the_same(smoke: Path) -> None:
    before = {path.name: path.read_bytes() for path in (smoke / "results").iterdir()}
    lost = runs(smoke, "zeropad")[0]
    (folder(smoke, lost) / "result.json").unlink()  # as a kill leaves it: the run is not finished
    result = reproduce(smoke)
    assert result["kept"] == 11, "of twelve"
    after = {path.name: path.read_bytes() for path in (smoke / "results").iterdir()}
    assert {name: after[name] for name in after if name != RUNS} == {n: before[n] for n in before if n != RUNS}


# What is refused -----------------------------------------------------------------------------------------------------


def test_studies_are_listed_with_their_questions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == known_studies().keys()


@pytest.mark.parametrize("name", known_studies())
def test_every_study_of_the_package_can_be_planned(name: str) -> None:
    study = load_study(name)
    assert len(study.comparison.methods) >= 3
    assert study.settings.question


def test_a_study_that_is_none_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "nothing"]) == 2
    assert "'nothing' is no study and no file of one; use one of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ('study.tables=[{name="t", title="T", methods=["other"]}]', "'other', which no method is called"),
        ('study.tables=[{name="t", title="T", methods=["zeropad"], reference="zeroshot"}]', "which is not one of its"),
        ('study.figures=[{name="methods", title="T", kind="ranks", methods=["zeropad"]}]', "are called 'methods'"),
        ('study.figures=[{name="t", title="T", kind="pie", methods=["zeropad"]}]', "study.figures"),
        (
            'study.figures=[{name="t", title="T", kind="rates", methods=["zeropad", "zeroshot"]}]',
            "'t' shows learning rates of 'zeroshot', which are not tuned here",
        ),
        (
            'study.tables=[{name="t", title="T", methods=["zeropad"], mean="clients"}]\ncompare.metric="rougeL"',
            "'t' sets mean, for perplexity, while compare.metric is 'rougeL'; set compare.metric = 'perplexity', or take mean",
        ),
        (
            'study.tables=[{name="t", title="T", methods=["zeropad"], mean="clients", round=1}]',
            "'t' sets mean and round; clients are measured after the last round only",
        ),
        (
            'study.tables=[{name="t", title="T", methods=["zeropad"], round=4}]',
            "'t' is of round 4, after which 'zeropad' is not measured; use one of 1, 2, 3",
        ),
        (
            'study.tables=[{name="t", title="T", methods=["zeropad", "zeroshot"], round=2}]\nevaluation.every=0',
            "'t' is of round 2, after which 'zeropad' is not measured; use one of 3",
        ),
        ("study=", "study"),
    ],
)
def test_a_table_or_figure_that_cannot_be_made_is_refused_before_anything_runs(change: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_study("smoke", [*change.splitlines(), "compare.target=", "evaluation.generate=2"])
    assert problem in str(refused.value)
    assert len(refused.value.problems) == 1


def test_records_that_are_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / RUNS).write_text('{"kind": "study"}\n{"kind": "other"}\n')
    assert cli.main(["reproduce", "smoke", "--show", "--output", str(tmp_path)]) == 2
    assert "is no file of a study's runs" in capsys.readouterr().err


# The figures that are published ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*/" + RUNS)), ids=lambda path: path.parent.name)
def test_what_is_published_is_what_its_records_say(path: Path, tmp_path: Path) -> None:
    (tmp_path / RUNS).write_bytes(path.read_bytes())
    assert cli.main(["reproduce", path.parent.name, "--show", "--output", str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in path.parent.iterdir()}
    for written in tmp_path.glob("*.md"):
        assert written.read_text("utf8") == (path.parent / written.name).read_text("utf8"), written.name


def test_the_kinds_of_figures_that_the_page_lists_are_those_there_are() -> None:
    rows = {f"| `{kind}` | {shows} |" for kind, shows in KINDS.items()}
    page = (ROOT / "docs/results.md").read_text("utf8").partition("| `kind` |")[2]
    assert set(page.partition("\n\n")[0].splitlines()[2:]) == rows


@pytest.mark.parametrize("page", ["docs/results.md", "docs/performance.md", "README.md"])
def test_tables_of_a_page_are_those_of_the_studies(page: str) -> None:
    filled = runpy.run_path(str(ROOT / "tools/fill_results.py"))["filled"]
    assert filled(page) == (ROOT / page).read_text("utf8"), "python tools/fill_results.py"
