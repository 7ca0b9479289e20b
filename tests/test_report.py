"""`hetlora report`: the page equals the records, for runs in any state and clients with any name."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import re
import statistics
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import hetlora
from hetlora.cli import main
from hetlora.commands.compare.formats import cells
from hetlora.commands.compare.statistics import table
from hetlora.commands.report import write_report
from hetlora.commands.report.answers import samples
from hetlora.commands.report.charts import TIERS, Chart, curves_chart, slots_chart, tiers_chart
from hetlora.commands.report.client_charts import clients_chart, ranks_chart, shares_chart
from hetlora.commands.report.comparison import read_comparison
from hetlora.commands.report.page import as_toml, render
from hetlora.commands.report.summary import devices, grouped, local_run
from hetlora.config import load_config, load_run_config
from hetlora.errors import HetLoraError
from hetlora.runs.reader import read_run, read_runs
from hetlora.runs.records import RunRecord, read_records
from report_runs import ROUNDS, RUN, a_round, measured, real_runs, write_config, write_run
from small_federations import phones

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> dict[str, Path]:
    """Real runs, a few rounds each."""
    return real_runs(tmp_path_factory.mktemp("report"), tiny)


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_records(folder / "records.jsonl") if record["kind"] == "round"]


def trace(chart: Chart | None, name: str) -> Any:
    assert chart is not None
    [found] = [trace for trace in chart.figure.data if trace.name == name and trace.mode != "none"]
    return found


def tiers_of(folder: Path) -> dict[str, int]:
    """Return each client's rank before it pruned."""
    ranks: dict[str, int] = {}
    for record in reversed(rounds_of(folder)):
        ranks |= record["ranks"]
    return json.loads((folder / "summary.json").read_text("utf8"))["ranks"] | ranks


class Page(HTMLParser):
    """The page without the scripts it is drawn with: tags in order, data of charts, and what a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.charts: dict[str, Any] = {}
        self.seen: list[str] = []
        self.scripts: list[str] = []
        self.within: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.within.append(tag)
        if tag == "figure":
            self.figure = dict(attrs)["id"] or ""
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, _: str) -> None:
        self.within.append("")

    def handle_data(self, data: str) -> None:
        kind = self.within[-1] if self.within else ""
        if kind == "script" and self.tags[-1][1].get("type") == "application/json":
            self.charts[self.figure] = json.loads(data)
        elif kind == "script":
            self.scripts.append(data)
        elif kind != "style":
            self.seen.append(data)
        if kind in ("th", "td"):
            self.rows[-1].append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.seen).split())


def page_of(*folders: Path) -> Page:
    return Page(render(read_runs(folders), read_comparison(folders[0])))


def head(**changes: Any) -> RunRecord:
    """Return the first record of a run with other parts in its configuration."""
    return replace(RUN, config={**RUN.config, **changes})


# What is drawn is what was recorded ---------------------------------------------------------------------------------


def test_curves_are_the_records_figures_by_round_and_by_megabytes(runs: dict[str, Path]):
    records = rounds_of(runs["het"])
    chart = page_of(runs["het"]).charts["curves"]
    perplexity, loss = chart["data"]
    base = read_records(runs["het"] / "records.jsonl")[1]["overall"]["perplexity"]
    assert loss["y"] == pytest.approx([record["loss"] for record in records], rel=1e-5)
    assert perplexity["y"] == pytest.approx([base, *(record["perplexity"] for record in records)], rel=1e-5)
    sent = [0.0]
    for record in records:
        sent.append(sent[-1] + (record["bytes_up"] + record["bytes_down"]) / 1e6)
    by_round, by_megabytes = (button["args"][0]["x"] for button in chart["layout"]["updatemenus"][0]["buttons"])
    assert by_round == [[0, 1, 2, 3, 4], [1, 2, 3, 4]]
    assert by_megabytes[0] == pytest.approx(sent, rel=1e-5)
    assert by_megabytes[1] == pytest.approx(sent[1:], rel=1e-5)


def test_runs_that_differ_in_the_seed_only_are_one_line_with_a_band(runs: dict[str, Path]):
    groups = grouped(read_runs(list(runs.values())))
    assert [(group.label, len(group.runs)) for group in groups] == [("het, 2 seeds", 2), ("local", 1)]
    pairs = list(zip(*([record["loss"] for record in rounds_of(runs[name])] for name in ("het", "het-1")), strict=True))
    means, deviations = list(map(statistics.fmean, pairs)), list(map(statistics.stdev, pairs))
    chart = curves_chart(groups)
    line = trace(chart, "het, 2 seeds: training loss")
    assert list(line.y) == pytest.approx(means, rel=1e-5)
    assert [list(point) for point in line.customdata] == [[pytest.approx(std, rel=1e-4), 2] for std in deviations]
    assert chart is not None
    [band] = [one for one in chart.figure.data if one.mode == "none" and one.name == line.name]
    high = [mean + std for mean, std in zip(means, deviations, strict=True)]
    low = [mean - std for mean, std in zip(means, deviations, strict=True)]
    assert list(band.y) == pytest.approx([*high, *reversed(low)], rel=1e-5)
    assert band.legendgroup == line.legendgroup, "both go and come together"
    without = curves_chart(groups, bands=False)
    assert without is not None
    assert not [one for one in without.figure.data if one.mode == "none"]


def test_ranks_shares_and_failures_are_those_of_the_records(runs: dict[str, Path]):
    records, charts = rounds_of(runs["het"]), page_of(runs["het"]).charts
    prunes = [(record["round"], rank, client) for record in records for client, rank in record["prunes"].items()]
    assert prunes, "the run is to have pruned something"
    ranks = charts["ranks-0"]["data"]
    marks = [mark for one in ranks if "text" in one for mark in zip(one["x"], one["y"], one["text"], strict=True)]
    assert sorted(marks) == sorted(prunes)
    summary, tiers = json.loads((runs["het"] / "summary.json").read_text("utf8")), tiers_of(runs["het"])
    means = [one for one in ranks if one["mode"] == "lines"]
    assert [one["name"] for one in means] == [f"tier {rank}" for rank in sorted(set(tiers.values()))]
    for one in means:
        began = int(one["name"].split()[1])
        now = [rank for client, rank in summary["ranks"].items() if tiers[client] == began]
        assert (one["y"][0], one["y"][-1]) == (began, pytest.approx(statistics.fmean(now)))
    drawn = {
        (x, text.split("<br>")[0]): (y, width)
        for one in charts["shares-0"]["data"]
        for x, y, text, width in zip(one["x"], one["y"], one["text"], one["marker"]["line"]["width"], strict=True)
    }
    expected = {(r["round"], c): share * len(r["weights"]) for r in records for c, share in r["weights"].items()}
    assert {key: times for key, (times, _) in drawn.items()} == pytest.approx(expected, rel=1e-5)
    bounded = {(r["round"], c) for r in records for c, entry in r["clients"].items() if "bounded" in entry}
    assert bounded, "the run is to have bounded something"
    assert {key for key, (_, width) in drawn.items() if width} == bounded
    failures = [(record["round"], reason) for record in records for reason in record["failures"].values()]
    reason = failures[0][1]
    at = [number for number, other in failures if other == reason]
    [row] = [row for row in page_of(runs["het"]).rows if row[0] == reason]
    assert row[1:3] == [str(len(at)), f"{at[0]} to {at[-1]}"]


def test_the_first_screen_says_what_was_run_and_its_result(runs: dict[str, Path]):
    summary = json.loads((runs["het"] / "summary.json").read_text("utf8"))
    page = page_of(runs["het"])
    before, after = (
        f"{summary[part]['perplexity']:,.{0 if summary[part]['perplexity'] >= 1000 else 2}f}"
        for part in ("base", "final")
    )
    share = percent_of(summary["final"]["perplexity"], summary["base"]["perplexity"])
    assert f"held-out perplexity {before} → {after} {share}" in page.text
    assert f"{ROUNDS} rounds, {summary['prunes']} prunes, {summary['failures']} failures" in page.text
    sent, base = summary["bytes_up"] + summary["bytes_down"], read_run(runs["het"]).head["base_parameters"]
    asked = sum(len(record["ranks"]) for record in rounds_of(runs["het"]))
    full = 4 * base * (asked + summary["updates"])
    assert f"{sent / 1e6:.3g}" in page.text
    assert f"{100 * sent / full:.1f} % of full fine-tuning's" in page.text
    assert re.search(
        r"Report: het model .* data rows\.jsonl method hetlora date \d{4}-\d\d-\d\d seed 0 hetlora", page.text
    )
    order = [page.text.index(part) for part in ("held-out perplexity", "Over the rounds", "Sample answers", "by tier")]
    assert order == sorted(order)
    assert len(page.charts) <= 8


def percent_of(after: float, before: float) -> str:
    return f"{100 * (after / before - 1):+,.1f} %".replace("-", "−")


def test_the_date_is_that_of_the_records(tmp_path: Path):
    folder = write_run(tmp_path / "r", a_round(1))
    os.utime(folder / "records.jsonl", (1e9, 1e9))
    assert "date 2001-09-09 seed 0" in page_of(folder).text


def test_seeds_are_means_in_the_tiles(tmp_path: Path):
    ends = [(0, 4.0), (1, 6.0)]
    folders = [
        write_run(tmp_path / str(seed), measured(0, 10.0), a_round(1), measured(1, after), head=head(seed=seed))
        for seed, after in ends
    ]
    text = page_of(*folders).text
    assert "held-out perplexity 10.00 → 5.000 −50.0 %, ± 1.414 over 2 runs" in text
    assert "seeds 0, 1" in text


def test_a_tile_compares_only_runs_that_have_both_ends(tmp_path: Path):
    done = write_run(tmp_path / "0", measured(0, 20.0), a_round(1), measured(1, 15.0), head=head(seed=0))
    begun = write_run(tmp_path / "1", measured(0, 50.0), a_round(1), head=head(seed=1))
    assert "held-out perplexity 20.00 → 15.00 −25.0 %, 1 of 2 runs" in page_of(done, begun).text


def test_a_page_compares_with_training_alone(runs: dict[str, Path]):
    chart = page_of(runs["het"], runs["local"]).charts["clients-0"]
    [alone] = [one for one in chart["data"] if one.get("name") == "alone"]
    figures = json.loads((runs["local"] / "summary.json").read_text("utf8"))["final"]["clients"]
    names = chart["layout"]["yaxis"]["ticktext"]
    assert alone["x"] == pytest.approx([figures[names[int(at)]]["perplexity"] for at in alone["y"]], rel=1e-5)
    assert not [one for one in page_of(runs["het"]).charts["clients-0"]["data"] if one.get("name") == "alone"]


def test_what_full_fine_tuning_would_send_is_arithmetic_on_the_base(tmp_path: Path):
    failing = a_round(2, weights={"a": 1.0}, failures={"b": "late"})
    text = page_of(write_run(tmp_path / "r", a_round(1), failing)).text
    assert "sent up and down 0.006 MB 21.4 % of full fine-tuning's 0.028 MB" in text, "4 bytes to 4 clients and from 3"


def test_several_runs_stand_in_a_table_the_best_mean_first(tmp_path: Path):
    ends = {"x": [(0, 9.0), (1, 2.0)], "y": [(0, 5.0), (1, 5.0)]}
    folders = [
        write_run(
            tmp_path / f"{name}{seed}",
            *(measured(0, 10.0), a_round(1), measured(1, after)),
            head=head(seed=seed, method={"name": "hetlora", "gamma": 0.5 + (name == "x") / 4}),
        )
        for name, runs in ends.items()
        for seed, after in runs
    ]
    page = page_of(*folders)
    rows = [row for row in page.rows if row[0] in ("x0, 2 seeds", "y0, 2 seeds")]
    assert [row[0] for row in rows[:2]] == ["y0, 2 seeds", "x0, 2 seeds"], "by the mean, though x has the best run"
    assert [row[2:4] for row in rows[:2]] == [["5.000 ± 0.000", "10.00 ± 0.000"], ["5.500 ± 4.950", "10.00 ± 0.000"]]


def test_every_chart_has_its_data_as_a_table(runs: dict[str, Path]):
    page = page_of(runs["het"])
    records = rounds_of(runs["het"])
    for record in records:
        assert ["het: training loss", "", str(record["round"]), f"{record['loss']:.6g}"] in padded(page.rows)
    clients = read_records(runs["het"] / "records.jsonl")[-1]["clients"]
    for name, scores in clients.items():
        after = f"{scores['perplexity']:.6g}"
        assert [f"tier {tiers_of(runs['het'])[name]}, after", "", after, name] in padded(page.rows)
    assert [tag for tag, _ in page.tags].count("figure") == len(page.charts)


def padded(rows: list[list[str]]) -> list[list[str]]:
    """An empty cell has no data; of the rows of charts it is the second."""
    return [[row[0], "", *row[1:]] if len(row) == 3 else row for row in rows]


# Tiers --------------------------------------------------------------------------------------------------------------


def scored(number: int, by_client: dict[str, float], tokens: dict[str, int], tiers: dict[str, float]) -> Any:
    clients = {name: {"perplexity": value, "tokens": tokens[name]} for name, value in by_client.items()}
    record = measured(number, 9.0)
    return replace(record, clients=clients, tiers={name: {"perplexity": value} for name, value in tiers.items()})


def test_a_tier_is_the_devices_also_where_a_method_gives_all_one_rank(tmp_path: Path):
    tokens = {"a": 10, "b": 30, "c": 20}
    ranks = {"a": 4, "b": 16, "c": 16}
    base = scored(0, {"a": 9.0, "b": 8.0, "c": 7.0}, tokens, {"4": 9.0, "16": 7.6})
    own = scored(1, {"a": 5.0, "b": 4.0, "c": 3.0}, tokens, {"4": 5.0, "16": 3.57})
    flat = scored(1, {"a": 6.0, "b": 5.0, "c": 2.0}, tokens, {"4": 4.0})
    folders = [
        write_run(tmp_path / "het", base, a_round(1, ranks=ranks), own),
        write_run(
            tmp_path / "homo",
            replace(base, tiers={"4": {"perplexity": 7.8}}),
            *(a_round(1, ranks=dict.fromkeys("abc", 4)), flat),
            head=head(method={"name": "fedit"}),
        ),
    ]
    runs = read_runs(folders)
    chart = tiers_chart(grouped(runs), devices(runs))
    assert chart is not None
    assert chart.figure.layout.yaxis.ticktext == ("before (the base)", "het", "homo")
    assert list(trace(chart, "tier 4").x) == pytest.approx([9.0, 5.0, 6.0])
    wide = math.exp((30 * math.log(5.0) + 20 * math.log(2.0)) / 50)
    assert trace(chart, "tier 16").x[2] == pytest.approx(wide, rel=1e-5)
    assert "tier 4 5.000 of het; tier 16 3.466 of homo" in chart.sentence
    [alone] = read_runs(folders[1:])
    assert devices([alone]).names == ["4"], "alone, nothing tells the devices apart"


def test_a_tier_has_one_colour_on_the_whole_page(runs: dict[str, Path]):
    colours: dict[str, set[str]] = {}
    for name, chart in page_of(*runs.values()).charts.items():
        for one in chart["data"] if name not in ("curves", "slots") else ():
            if found := re.match(r"tier (\d+)", one.get("name", "")):
                colours.setdefault(found[1], set()).add(one["marker"]["color"])
    ranks = sorted(set(tiers_of(runs["het"]).values()))
    assert colours == {str(rank): {colour} for rank, colour in zip(ranks, TIERS, strict=False)}
    assert len(colours) > 1
    lines = {one["line"]["color"] for one in page_of(*runs.values()).charts["curves"]["data"] if "line" in one}
    assert lines
    assert not lines & set(TIERS), "a line of a run is no tier"


def test_a_chart_that_says_nothing_is_not_drawn(tmp_path: Path):
    equal = dict.fromkeys("ab", 0.5)
    page = page_of(write_run(tmp_path / "r", measured(0, 9.0), a_round(1, weights=equal), measured(1, 5.0)))
    assert set(page.charts) == {"curves", "tiers", "clients-0"}, "no prune, equal shares, every slot alive, no failure"
    assert "Every update had the equal share in its round." in page.text
    dying = [a_round(1, live_slots=8), a_round(2, live_slots=6)]
    chart = slots_chart(grouped(read_runs([write_run(tmp_path / "s", *dying)])))
    assert chart is not None
    assert list(trace(chart, "s").y) == [8, 8, 6]
    assert chart.sentence.startswith("Dead: 2 of 8 slots of s by round 2.")


# Sample answers -----------------------------------------------------------------------------------------------------


def write_answers(folder: Path, base: Any, final: Any) -> None:
    """Write the header of a checkpoint that holds answers."""
    (folder / "checkpoints").mkdir()
    state = {"base": {"answers": base}, "final": None if final is None else {"answers": final}}
    header = json.dumps({"__metadata__": {"state": json.dumps(state)}}).encode()
    (folder / "checkpoints" / "round-000003.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def answers_of(count: int, text: str) -> list[dict[str, Any]]:
    shared = {"expected": "wanted", "rouge_l": 0.5}
    return [{"client": f"c{at}", "prompt": f"p{at}", "text": f"{text} {at}", **shared} for at in range(count)]


def test_answers_are_those_of_the_newest_checkpoint_chosen_by_the_seed(runs: dict[str, Path], tmp_path: Path):
    found = samples(read_run(runs["het"]))
    assert len(found) == 4
    text = page_of(runs["het"]).text
    assert all(" ".join(one.prompt.split()) in text for one in found)
    assert all(one.before is not None and one.after is not None for one in found)
    chosen = []
    for seed in (0, 1, 0):
        folder = write_run(tmp_path / str(len(chosen)), a_round(1), head=head(seed=seed))
        write_answers(folder, answers_of(20, "was"), answers_of(20, "is"))
        chosen.append(samples(read_run(folder)))
    assert chosen[0] == chosen[2] != chosen[1]
    for one in chosen[0]:
        at = one.client.removeprefix("c")
        assert (one.prompt, one.expected, one.before, one.after) == (f"p{at}", "wanted", f"was {at}", f"is {at}")


def test_answers_that_are_missing_are_said_to_be(tmp_path: Path):
    folder = write_run(tmp_path / "r", a_round(1), complete=False)
    assert "No checkpoint of the run holds answers" in page_of(folder).text
    write_answers(folder, answers_of(1, "was"), None)
    assert "before was 0 after not generated" in page_of(folder).text
    for damage in (b"", b"\xff" * 40, (2).to_bytes(8, "little") + b"[]"):
        (folder / "checkpoints" / "round-000004.safetensors").write_bytes(damage)
        assert samples(read_run(folder))[0].before == "was 0", "a damaged one is passed over"


# Runs that start from an adapter ------------------------------------------------------------------------------------


def test_what_the_rounds_gave_is_counted_from_the_adapter_that_a_run_started_from(tmp_path: Path):
    start = measured(0, 622.12)  # whose answers nobody has the model give
    folder = write_run(
        tmp_path / "r",
        *(measured(0, 1033.27), replace(start, overall={**start.overall, "rougeL": None})),
        *(a_round(1, perplexity=600.0), a_round(2), a_round(3, perplexity=536.04), measured(3, 536.04)),
        head=head(model={"adapter": "before"}),
    )
    page, run = page_of(folder), read_run(folder)
    sentence = "held-out perplexity 622.12 → 536.04 (−13.8 %) from the adapter it started from (the base alone: 1,033)"
    assert sentence in repr(hetlora.open_run(folder))
    assert "held-out perplexity 622.12 → 536.04 −13.8 %, the base alone: 1,033" in page.text
    assert "ROUGE-L — → 10.00 the base alone: 10.00" in page.text
    assert page.charts["curves"]["data"][0]["y"] == [622.12, 600.0, 536.04]
    assert "Round 0 is the adapter started from; the base alone has 1,033 for r." in page.text
    chart = tiers_chart(grouped([run]), devices([run]))
    assert chart is not None
    assert "tier 4 622.12 → 536.04" in chart.sentence
    assert chart.figure.layout.yaxis.ticktext[0] == "before (the adapter started from)"[:11] + "…" + "arted from)"[-10:]
    before = trace(clients_chart(run, "c", devices([run]), None), "tier 4, before")
    assert list(before.x) == [622.12]


def test_the_adapter_that_a_run_started_from_is_not_its_result(tmp_path: Path):
    begun = [measured(0, 1033.27), measured(0, 900.0)]
    rounds = [a_round(1, perplexity=857.02), a_round(2, perplexity=826.3)]
    folder = write_run(tmp_path / "r", *begun, *rounds, complete=False, head=head(model={"adapter": "before"}))
    run, page = read_run(folder), page_of(folder)
    assert run.final is None
    assert "900.00 → 826.30 −8.2 %" in page.text
    assert "900.00 → 826.30" in repr(hetlora.open_run(folder))
    assert not {"tiers", "clients-0"} & page.charts.keys()


def test_without_an_adapter_a_second_measurement_of_round_0_is_the_result(tmp_path: Path):
    run = read_run(
        write_run(tmp_path / "r", measured(0, 9.0), measured(0, 9.0), head=head(method={"name": "zeroshot"}))
    )
    assert run.start is None
    assert run.final == run.base == run.before


# Lines and their names ----------------------------------------------------------------------------------------------


def compared(folder: Path, label: str, *configs: dict[str, Any]) -> Path:
    """Write a comparison whose runs all have one label."""
    for at, config in enumerate(configs):
        write_run(folder / "runs" / f"r{at}", measured(0, 9.0), a_round(1), measured(1, 5.0), head=head(**config))
    results = {"runs": [{"folder": f"r{at}", "label": label} for at in range(len(configs))]}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf8")
    return folder


def test_no_two_lines_have_one_name_and_none_is_dropped(tmp_path: Path):
    configs: list[dict[str, Any]] = [{"method": {"name": "hetlora", "gamma": gamma}} for gamma in (0.5, 0.9)]
    folders = [
        write_run(
            tmp_path / name / "runs" / "demo", measured(0, 9.0), a_round(1), measured(1, after), head=head(**config)
        )
        for name, config, after in zip("ab", configs, (7.0, 5.0), strict=True)
    ]
    comparisons = [compared(tmp_path / f"table-{at}", "HetLoRA", config) for at, config in enumerate(configs)]
    both = compared(tmp_path / "both", "HetLoRA", *configs)
    for given, names in [
        (folders, ["a/runs/demo", "b/runs/demo"]),
        (comparisons, ["table-0/HetLoRA", "table-1/HetLoRA"]),
        ([both], ["HetLoRA", "HetLoRA (2)"]),
    ]:
        runs = read_runs(given)
        groups = grouped(runs)
        assert [group.label for group in groups] == names
        curves, tiers = curves_chart(groups), tiers_chart(groups, devices(runs))
        assert curves is not None
        assert [one.name for one in curves.figure.data if one.showlegend] == names
        assert tiers is not None
        assert list(tiers.figure.layout.yaxis.ticktext) == ["before (the base)", *names]
    runs = read_runs(folders)
    tiers = tiers_chart(grouped(runs), devices(runs))
    assert list(trace(tiers, "tier 8").x) == [9.0, 7.0, 5.0]
    assert tiers is not None
    assert tiers.sentence.startswith("Lowest mean perplexity: tier 4 5.000 of b/runs/demo;")


def test_an_axis_is_not_so_narrow_that_equal_figures_look_different(tmp_path: Path):
    folders = [write_run(tmp_path / name, a_round(1, loss=loss)) for name, loss in [("a", 5.62809), ("b", 5.62812)]]
    chart = curves_chart(grouped(read_runs(folders)))
    assert chart is not None
    assert chart.figure.layout.yaxis.range == pytest.approx((5.6225, 5.6337), abs=1e-3)
    assert curves_chart(grouped(read_runs(folders[:1]))) is not None


def test_the_end_of_a_line_is_said_of_the_rounds_that_all_seeds_have(tmp_path: Path):
    long = [a_round(number, loss=loss) for number, loss in enumerate([9.0, 7.0, 6.0, 1.0], start=1)]
    short = [a_round(number, loss=loss) for number, loss in enumerate([9.0, 5.0], start=1)]
    folders = [
        write_run(tmp_path / "a", measured(0, 9.0), *long, measured(4, 3.0)),
        write_run(tmp_path / "b", measured(0, 5.0), *short, complete=False, head=head(seed=1)),
    ]
    groups = grouped(read_runs(folders))
    curves, tiers = curves_chart(groups), tiers_chart(groups, devices(read_runs(folders)))
    assert curves is not None
    assert "Training loss of a, 2 seeds, round 1 to 2: 9.000 → 6.000 (−33.3 %)." in curves.sentence
    assert "Perplexity of a, 2 seeds is known in round 0 only: 7.000." in curves.sentence
    assert tiers is not None
    assert "tier 4 9.000 → 3.000" in tiers.sentence, "before and after are of the same run"
    assert tiers.sentence.endswith("Measured at their end: 1 of 2 runs of a, 2 seeds.")


def test_trackers_do_not_split_seeds_and_runs_of_one_seed_are_not_called_seeds(tmp_path: Path):
    tracked = head(seed=1, tracking={"to": ["tensorboard"], "project": "hetlora"})
    first, second = write_run(tmp_path / "a", a_round(1)), write_run(tmp_path / "b", a_round(1), head=tracked)
    [group] = grouped(read_runs([first, second]))
    assert group.label == "a, 2 seeds"
    [again] = grouped(read_runs([first, write_run(tmp_path / "c", a_round(1))]))
    assert again.label == "a, 2 runs of 1 seed"


# Training alone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "other", "comparable"),
    [
        ({}, {"seed": 7}, True),
        ({"evaluation": {"rows_per_client": 2}}, {"evaluation": {"rows_per_client": 2, "every": 2}}, True),
        ({}, {"evaluation": {"rows_per_client": 1}}, False),
        ({"partition": {"kind": "iid", "clients": 2}}, {"partition": {"kind": "iid", "clients": 2}}, True),
        ({"partition": {"kind": "iid", "clients": 2}}, {"partition": {"kind": "iid", "clients": 2}, "seed": 7}, False),
        ({"partition": {"kind": "natural"}}, {"partition": {"kind": "natural"}, "seed": 7}, True),
        ({}, {"data": {"path": "others.jsonl"}}, False),
    ],
)
def test_a_run_of_everyone_alone_is_compared_with_on_the_same_rows_only(
    own: dict[str, Any], other: dict[str, Any], comparable: bool, tmp_path: Path
):
    ended = [measured(0, 9.0), a_round(1), measured(1, 5.0)]
    folders = [
        write_run(tmp_path / "het", *ended, head=head(**own)),
        write_run(tmp_path / "local", *ended, head=head(method={"name": "local"}, **other)),
    ]
    run, local = runs = read_runs(folders)
    assert local_run(run, runs) == (local if comparable else None)
    assert ("got lower than by training alone" in page_of(*folders).text) is comparable


def test_shares_are_of_an_average_and_alone_there_is_none(runs: dict[str, Path], tmp_path: Path):
    page = page_of(runs["local"])
    assert not {"shares-0", "slots"} & page.charts.keys()
    assert "Nothing is averaged: each client goes on from its own adapter" in page.text
    averaged = write_run(tmp_path / "r", a_round(1), head=head(method={"name": "fedsa_lora"}))
    assert "shares-0" in page_of(averaged).charts, "of its A"


# The configuration repeats the run ----------------------------------------------------------------------------------


def test_the_configuration_on_the_page_is_the_runs_as_a_file_that_is_accepted(runs: dict[str, Path], tmp_path: Path):
    text = render(read_runs([runs["het"]]))
    written = html.unescape(re.findall(r'<pre [^>]*class="config">(.*?)</pre>', text, flags=re.DOTALL)[0])
    [link] = re.findall(r'download="het.toml" href="data:application/toml;base64,([^"]*)"', text)
    assert base64.b64decode(link).decode("utf8").strip() == written.strip()
    (tmp_path / "het.toml").write_text(written, encoding="utf8")
    assert load_config(tmp_path / "het.toml") == load_run_config(runs["het"] / "config.json")


@pytest.mark.parametrize(
    "text", ["", 'a"b\\c', "line\nbreak\ttab", "\x7f\x00\x1f", "größer ✓ 😀", "]]>'''", "half \ud83d"]
)
def test_any_text_and_key_survives_toml(text: str):
    config = {"a": text, "part": {text or "key": [1, 2.5, 1e-05, True, {"b c": text}], "none": None}}
    text = text.replace("\ud83d", "?")
    expected = {"a": text, "part": {text or "key": [1, 2.5, 1e-05, True, {"b c": text}]}}
    assert tomllib.loads(as_toml(config)) == expected


# Hostile text -------------------------------------------------------------------------------------------------------

HOSTILE = [
    "</script><script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "{{script}}{{plotly}}{% raw %}",
    "</pre><!-- ",
    "\u202egnp.exe \x1b[2J \ud800",
    "<b>bold</b>&lt;",
    "x" * 5000,
]


def hostile_run(folder: Path) -> Path:
    ranks = dict.fromkeys(HOSTILE, 4)
    share = {name: (1 + place) / 21 for place, name in enumerate(HOSTILE[1:])}
    written = write_run(
        folder,
        measured(0, 9.0, HOSTILE),
        a_round(1, ranks=ranks, weights=share, failures={HOSTILE[0]: HOSTILE[1]}, prunes={HOSTILE[2]: 2}, clients={}),
        measured(1, 5.0, HOSTILE),
    )
    texts = [{"client": name, "prompt": name, "expected": name, "text": name} for name in HOSTILE[:5]]
    write_answers(written, texts, texts)
    return written


def test_names_reasons_and_answers_are_text_and_nothing_else(tmp_path: Path):
    text = render(read_runs([hostile_run(tmp_path / "r")]))
    page = Page(text)
    assert len(page.scripts) == 2, "plotly and the page's own script"
    assert not [tag for tag, _ in page.tags if tag in ("img", "b")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    own = text.replace(page.scripts[0], "").replace(page.scripts[1], "")
    assert not re.search("[\u202e\x1b\ud800]", own)
    assert page.text.count('<img src=x onerror="alert(1)">') > 3, "it is shown as it is"
    assert "{{script}}{{plotly}}{% raw %}" in page.text, "what is put in is not looked at again"
    assert r"\u202egnp.exe \x1b[2J \ud800" in page.text
    assert text.encode("utf8")
    assert {"clients-0", "ranks-0", "shares-0"} <= page.charts.keys()
    for chart in page.charts.values():
        drawn = list(chart["layout"]["yaxis"].get("ticktext", []))
        drawn += [label for one in chart["data"] for label in one.get("text", [])]
        drawn += [one.get("name", "") for one in chart["data"]]
        assert not [label for label in drawn if "<" in label.replace("<br>", "")], "plotly reads tags"


def test_folders_labels_and_configurations_are_text_too(tmp_path: Path):
    image = "<img src=x\u202e onerror='alert(1)'>"
    config = {**RUN.config, "name": image, "seed": 1, image: image, "method": {"name": image}}
    head = replace(RUN, config=config, versions={image: image})
    write_run(tmp_path / "runs" / image, a_round(1), complete=False, head=head)
    write_run(tmp_path / "runs" / "other", a_round(1))
    results = {"runs": [{"folder": image, "label": image}, {"folder": "other", "label": image + "\ud800"}]}
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf8")
    page = page_of(tmp_path)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert page.text.count(image.replace("\u202e", r"\u202e")) > 5
    assert "\u202e" not in page.text
    assert render(read_runs([tmp_path])).encode("utf8")


def test_a_chart_cannot_end_its_script(tmp_path: Path):
    name = "</script <!--<script>\u2028"
    folder = write_run(tmp_path / "r", measured(0, 9.0, [name]), measured(1, 5.0, [name]))
    text = render(read_runs([folder]))
    page = Page(text)
    assert html.unescape(page.charts["clients-0"]["layout"]["yaxis"]["ticktext"][0]).startswith("</script")
    assert text.lower().count("</script") == 2 + len(page.charts), (
        "browsers end a script where this parser does not yet"
    )
    assert "<!--" not in text.replace(page.scripts[0], "")


def test_the_page_may_run_its_two_scripts_and_ask_nobody_for_anything(tmp_path: Path):
    page = page_of(write_run(tmp_path / "r", a_round(1)))
    [policy] = [
        a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    digests = {f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in page.scripts}
    assert set(rules["script-src"].split()) == digests
    assert (rules["default-src"], rules["connect-src"]) == ("'none'", "'none'")
    sources = [value for _, a in page.tags for key, value in a.items() if key in ("src", "href") and value]
    assert all(source.startswith(("#", "data:")) for source in sources)


# Runs that are not as they should be --------------------------------------------------------------------------------


def test_a_run_that_was_ended_gives_a_report_as_far_as_it_goes(tmp_path: Path):
    folder = write_run(tmp_path / "r", measured(0, 9.0), a_round(1, perplexity=7.0), a_round(2), complete=False)
    with (folder / "records.jsonl").open("a", encoding="utf8") as file:
        file.write('{"round": 3, "loss": 1.0, "ran')  # what a killed process leaves
    page = page_of(folder)
    assert "is not complete: 2 of 3 rounds are recorded" in page.text
    assert f"hetlora resume {folder}" in page.text
    assert "1 line of its records cannot be read" in page.text
    assert page.charts["curves"]["data"][1]["x"] == [1, 2]
    assert "perplexity 9.000 → 7.000" in page.text, "as last measured"


def test_a_run_without_rounds(tmp_path: Path):
    page = page_of(write_run(tmp_path / "r", measured(0, 9.0), complete=False))
    assert "0 of 3 rounds" in page.text
    assert set(page.charts) == {"curves"}
    assert "Perplexity of r is known in round 0 only: 9.000." in page.text
    assert "No update was admitted in any round" in page.text


def test_a_run_that_was_ended_before_its_first_record(tmp_path: Path):
    folder = write_run(tmp_path / "r", complete=False)
    (folder / "records.jsonl").write_bytes(b"")
    page = page_of(folder)
    assert "0 of 3 rounds" in page.text
    assert not page.charts
    assert "There is no curve" in page.text


def test_a_run_in_which_everybody_failed(tmp_path: Path):
    gone = {"loss": None, "weights": {}, "failures": {"a": "late", "b": "sent garbage"}, "clients": {}, "bytes_up": 0}
    page = page_of(
        write_run(tmp_path / "r", measured(0, 9.0), *(a_round(n, **gone) for n in (1, 2, 3)), measured(3, 9.0))
    )
    assert [one["name"] for one in page.charts["curves"]["data"]] == ["r"], "no loss"
    assert "6 failures, 100.0 % of 6 times that a client was asked; 3 rounds without any update." in page.text
    assert "shares-0" not in page.charts
    assert [row for row in page.rows if "sent garbage" in row] == [["sent garbage", "3", "1 to 3", "b"]]


def test_losses_that_are_not_finite_leave_gaps(tmp_path: Path):
    losses = [2.0, float("nan"), 1.0]
    rounds = [a_round(n, loss=loss, perplexity=float("inf")) for n, loss in enumerate(losses, start=1)]
    [run] = read_runs([write_run(tmp_path / "r", *rounds)])
    chart = curves_chart(grouped([run]))
    assert chart is not None
    [line] = chart.figure.data
    assert list(line.y) == [2.0, None, 1.0], "and no perplexity"
    assert chart.sentence.endswith("1 round had no finite loss.")


def test_one_client_and_a_rank_for_every_module(tmp_path: Path):
    ranks = [{"q_proj": 2, "v_proj": 4}, {"q_proj": 2, "v_proj": 3}]
    rounds = [a_round(n + 1, ranks={"a": ranks[n]}, weights={"a": 1.0}, clients={}) for n in (0, 1)]
    rounds[0] = replace(rounds[0], prunes={"a": ranks[1]})
    page = page_of(write_run(tmp_path / "r", measured(0, 9.0, ["a"]), *rounds, measured(2, 5.0, ["a"])))
    line, prune = page.charts["ranks-0"]["data"]
    assert (line["y"], prune["y"]) == ([4, 3, 3], [3]), "the largest of its modules"
    assert "1 of 1 measured client got a lower perplexity: a most (9.000 → 5.000 (−44.4 %))." in page.text


def test_records_from_before_bounds_and_networks_were_written(tmp_path: Path):
    folder = write_run(tmp_path / "r", measured(0, 9.0), a_round(1), measured(1, 5.0))
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text("utf8").splitlines()]
    for line in lines:
        for key in ("network", "base_parameters", "trainable_parameters", "self_pruning"):
            line.pop(key, None)
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf8")
    assert {"curves", "tiers", "shares-0", "clients-0"} == page_of(folder).charts.keys()


def test_records_of_the_wrong_kinds_are_no_reason_to_fail(tmp_path: Path):
    folder = write_run(tmp_path / "r", a_round(1))
    odd = [
        '[1]', '"text"', "null", "{", '{"kind": "round"}', "[" * 100_000,
        '{"kind": "round", "round": 2, "ranks": 3, "weights": []}',
        '{"kind": "round", "round": 3, "loss": 1' + "0" * 400 + ', "clients": {"a": 1}, "ranks": {"a": "x", "b": true}}',
        '{"kind": "evaluation", "tiers": [], "clients": {"a": null}, "overall": 1}',
    ]  # fmt: skip
    with (folder / "records.jsonl").open("a", encoding="utf8") as file:
        file.write("\n".join(odd) + "\n")
    run = read_run(folder)
    assert [item.number for item in run.rounds] == [1, 2, 3]
    assert run.unreadable == 6
    assert render([run])


@pytest.mark.parametrize("odd", ["many", [4], {"a": 1}, True])
def test_a_first_record_of_the_wrong_kinds_is_no_reason_to_fail(odd: Any, tmp_path: Path):
    folders = [write_run(tmp_path / name, measured(0, 9.0), a_round(1), measured(1, 5.0)) for name in "ab"]
    for folder in folders:
        first, *rest = (folder / "records.jsonl").read_text("utf8").splitlines()
        head = json.loads(first)
        for key in ("clients", "max_rank", "base_parameters", "train_rows"):
            head[key] = odd
        head["config"]["seed"] = odd
        (folder / "records.jsonl").write_text("\n".join([json.dumps(head), *rest]) + "\n", encoding="utf8")
    assert {"curves", "tiers", "clients-1"} <= page_of(*folders).charts.keys()


def test_a_thousand_clients_and_five_hundred_rounds_fit_a_page_and_say_what_is_left_out(tmp_path: Path):
    names = [f"client-{number:04d}" for number in range(1000)]

    def cohort(number: int) -> dict[str, Any]:
        some = [names[(number * 37 + at * 11) % 1000] for at in range(90)]
        return {
            "ranks": dict.fromkeys(some, 8),
            "weights": dict.fromkeys(some[10:], 1 / 80),
            "failures": dict.fromkeys(some[:10], "dropped out before training"),
            "clients": {name: {"loss": 1.0} for name in some[10:]},
        }

    rounds = [a_round(number, **cohort(number)) for number in range(1, 501)]
    folder = write_run(tmp_path / "r", measured(0, 9.0, names), *rounds, measured(500, 5.0, names))
    page = write_report([folder], tmp_path / "big.html")
    assert page.stat().st_size < 3e6
    drawn = Page(page.read_text("utf8"))
    assert "60 of 1,000 clients are shown" in drawn.text
    assert "updates are shown, evenly" not in drawn.text, "their shares are equal"
    assert len(drawn.charts["clients-0"]["layout"]["yaxis"]["ticktext"]) == 60
    assert "The first 500 of 501 marks." in drawn.text


def test_of_many_clients_those_that_changed_most_are_shown_and_the_others_evenly(tmp_path: Path):
    names = [f"c{number:03d}" for number in range(100)]
    final = measured(1, 5.0, names)
    final = replace(final, clients={**final.clients, "c041": {"perplexity": 1.0}, "c077": {"perplexity": 99.0}})
    run = read_run(write_run(tmp_path / "r", measured(0, 9.0, names), a_round(1), final))
    chart = clients_chart(run, "clients", devices([run]), None)
    assert chart is not None
    shown = chart.figure.layout.yaxis.ticktext
    assert (len(shown), shown[0], shown[-1]) == (60, "c041", "c077")


def test_many_updates_are_thinned_evenly_and_equal_shares_are_not_drawn(tmp_path: Path):
    names = [f"c{number:03d}" for number in range(200)]
    unequal = {name: (1 + place % 2) / 300 for place, name in enumerate(names)}
    for weights, count in ((dict.fromkeys(names, 1 / 200), 0), (unequal, 3000)):
        rounds = [a_round(n, ranks=dict.fromkeys(names, 8), weights=weights, clients={}) for n in range(1, 21)]
        run = read_run(write_run(tmp_path / str(count), *rounds))
        chart = shares_chart(run, "shares", devices([run]))
        assert (chart is not None) == bool(count)
    assert chart is not None
    assert chart.sentence.endswith("3,000 of 4,000 updates are shown, evenly.")
    assert len(trace(chart, "tier 8").x) == 3000
    assert ranks_chart(run, "ranks", devices([run])) is None


# Folders and the command --------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_into_the_folder_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_run(tmp_path / "r", a_round(1))
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"
    assert (folder / "report.html").read_bytes().startswith(b"<!doctype html>")
    assert not list(folder.glob("*.part"))


def test_several_runs_become_one_page_where_it_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folders = [write_run(tmp_path / name / "run", a_round(1)) for name in "ab"]
    output = tmp_path / "new" / "page.html"
    assert main(["report", *map(str, folders), str(folders[0]), "--output", str(output)]) == 0
    assert capsys.readouterr().err == ""
    page = Page(output.read_text("utf8"))
    assert page.text.count("/run, seed 0 (hetlora):") == 2, "a folder given twice is one run"
    assert "a/run, seed 0" in page.text


@pytest.mark.parametrize("kind", ["absent", "empty", "file", "no records", "runs of one's own"])
def test_a_folder_that_is_no_run_is_refused_by_name(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "somewhere"
    if kind == "file":
        folder.write_text("x", encoding="utf8")
    elif kind != "absent":
        folder.mkdir()
    if kind == "no records":
        (folder / "records.jsonl").write_text("garbage\n", encoding="utf8")
    if kind == "runs of one's own":
        write_run(folder / "runs" / "r", a_round(1))
    good = write_run(tmp_path / "good", a_round(1))
    assert main(["report", str(good), str(folder), "--output", str(tmp_path / "r.html")]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 1
    assert str(folder) in err
    assert "give the folder of a run" in err
    assert not (tmp_path / "r.html").exists()


def test_a_page_never_takes_the_place_of_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_run(tmp_path / "r", a_round(1))
    before = (folder / "records.jsonl").read_bytes()
    assert main(["report", str(folder), "--output", str(folder / "records.jsonl")]) == 2
    assert "end it with .html" in capsys.readouterr().err
    assert (folder / "records.jsonl").read_bytes() == before


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    folder = write_run(tmp_path / "r", a_round(1))
    (tmp_path / "file").write_text("x", encoding="utf8")
    with pytest.raises(HetLoraError, match=r"cannot write .*page\.html.*--output"):
        write_report([folder], tmp_path / "file" / "page.html")


def test_a_comparison_stands_for_the_runs_its_table_counts(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, tiny)
    methods = [{"name": "hetlora", "label": "HetLoRA γ=1", "gamma": 1.0, "min_rank": 1}]
    compare = {"seeds": [0, 1], "learning_rates": [1e-2, 1e-3], "validation_share": 0.4, "methods": methods}
    federation = {"rounds": 1, "clients_per_round": 3, "dropout": 0.3}
    text = phones(tiny, name="table", federation=federation, method=None, evaluation=None, compare=compare)
    config.write_text(text, encoding="utf8")
    assert main(["compare", str(config), "--quiet"]) == 0
    folder = tmp_path / "runs" / "table"
    every = list((folder / "runs").iterdir())
    counted = read_runs([folder])
    assert (len(every), len(counted)) == (4, 2), "those that tune are not counted"
    assert [group.label for group in grouped(counted)] == ["HetLoRA γ=1, 2 seeds"]
    assert main(["report", str(folder)]) == 0
    page = Page((folder / "report.html").read_text("utf8"))
    assert "Comparison: table 2 runs, 1 configuration" in page.text
    results = json.loads((folder / "results.json").read_text("utf8"))
    [row] = table(results)
    assert row.mean is not None
    assert page.rows[1][:2] == [cells(row)[0], cells(row)[2]]
    assert cells(row)[2] in (folder / "table.md").read_text("utf8")
    (folder / "results.json").unlink()  # as it is until the comparison has ended
    assert {run.folder for run in read_runs([folder])} == {run.folder for run in counted}
    assert "Report: HetLoRA γ=1" not in page_of(folder).text


def write_comparison(folder: Path, ends: dict[str, list[float | None]], reference: str | None = None) -> Path:
    """Write a comparison of methods, each with its final perplexity by seed; None is a run that failed."""
    entries = []
    for method, finals in ends.items():
        for seed, final in enumerate(finals):
            name = f"{method}-{seed}"
            entry = {"run": name, "label": method, "seed": seed, "learning_rate": 0.1, "folder": name, "figures": None}
            if final is not None:
                records = [measured(0, 9.0), a_round(1, perplexity=final + 1), a_round(2, perplexity=final)]
                config = head(seed=seed, method={"name": "hetlora", "gamma": list(ends).index(method) / 100})
                write_run(folder / "runs" / name, *records, measured(2, final), head=config)
                rounds = [{"round": 2, "perplexity": final, "bytes_up": 1000, "bytes_down": 2000}]
                scores = {"base": {"perplexity": 9.0, "rougeL": 1.0}, "final": {"perplexity": final, "rougeL": 1.0}}
                costs = {"bytes_up": 1000, "bytes_down": 2000, "prunes": 0, "updates": 4, "failures": 0, "dropped": 0}
                sizes = {"ranks": {"a": 4}, "trainable_parameters": {"a": 40}, "base_parameters": 1000, "seconds": 1.0}
                entry["figures"] = {**scores, **costs, **sizes, "rounds": rounds, "every": 1, "self_pruning": True}
            entries.append({**entry, "failed": None if final is not None else "late"})
    results = {
        "name": "mine",
        "metric": "perplexity",
        "target": None,
        "reference": reference,
        "tuning": [],
        "runs": entries,
        "seeds": list(range(len(next(iter(ends.values()))))),
        "methods": [{"label": name, "method": "hetlora", "learning_rate": 0.1, "rate_of": None} for name in ends],
    }
    (folder / "results.json").write_text(json.dumps(results), encoding="utf8")
    return folder


THREE: dict[str, list[float | None]] = {"lucky": [1.0, 8.0, 9.0], "steady": [5.0, 5.5, 5.2], "near": [5.1, 5.7, 5.3]}


def test_a_comparison_is_one_table_by_the_mean_and_its_differences_are_paired(tmp_path: Path):
    folder = write_comparison(tmp_path / "c", THREE)
    page = page_of(folder)
    assert "steady has the lowest mean perplexity over 3 seeds: 5.23." in page.text, "though lucky has the best run"
    rows = {row.label: cells(row) for row in table(json.loads((folder / "results.json").read_text("utf8")))}
    shown = [row for row in page.rows if row[0] in THREE and len(row) > 5]
    assert [row[0] for row in shown] == ["steady", "near", "lucky"]
    assert page.rows[0][1:5] == ["perplexity, mean ± sd", "minus steady, paired", "p (Holm)", "verdict"]
    assert [row[2] for row in shown] == ["—", "+0.13 ± 0.06", "+0.77 ± 4.18"]
    assert [[row[1], row[3], row[4]] for row in shown] == [[rows[row[0]][at] for at in (2, 13, 14)] for row in shown]
    assert [row[4] for row in shown] == ["reference", "noise", "noise"]
    assert "Compared with steady, the best mean: paired t-test over 3 seeds" in page.text
    lines = {one["name"]: one for one in page.charts["differences"]["data"] if one["mode"] != "none"}
    assert list(lines) == ["near", "lucky"], "in the table's order, the reference is zero"
    assert (lines["near"]["x"], lines["near"]["y"][0]) == ([0, 1, 2], 0.0)
    assert lines["near"]["y"][2] == pytest.approx(0.4 / 3, rel=1e-5)
    [band] = [one for one in page.charts["differences"]["data"] if one["mode"] == "none" and one["name"] == "lucky"]
    differences = [-4.0, 2.5, 3.8]
    mean, std = statistics.fmean(differences), statistics.stdev(differences)
    assert [band["y"][2], band["y"][3]] == pytest.approx([mean + std, mean - std], rel=1e-5)
    assert not [one for one in page.charts["curves"]["data"] if one["mode"] == "none"], "no band of the seeds' spread"
    assert [one["name"] for one in page.charts["curves"]["data"] if one.get("showlegend")] == [
        "steady",
        "near",
        "lucky",
    ]


def test_differences_are_from_the_reference_that_was_asked_for(tmp_path: Path):
    page = page_of(write_comparison(tmp_path / "c", THREE, reference="near"))
    assert "minus near, paired" in page.rows[0]
    assert [row[4] for row in page.rows if row[0] in THREE and len(row) > 5] == ["noise", "reference", "noise"]
    clear = page_of(write_comparison(tmp_path / "d", {"a": [5.0, 5.5, 5.2], "b": [6.0, 6.51, 6.2]})).text
    assert "Told apart from the reference: b (worse)." in clear


def test_fewer_than_three_seeds_tell_nothing(tmp_path: Path):
    page = page_of(write_comparison(tmp_path / "c", {name: ends[:2] for name, ends in THREE.items()}))
    assert "With 2 seeds nothing can be told" in page.text
    assert "Told apart" not in page.text
    assert "paired t-test" not in page.text
    shown = [row for row in page.rows if row[0] in THREE and len(row) > 5]
    assert [row[3:5] for row in shown] == [["—", "reference"], *[["—", "too few seeds"]] * 2]
    failed = page_of(write_comparison(tmp_path / "d", {"a": [5.0, 5.5, 5.2], "b": [1.0, None, 1.2]}))
    assert "a has the lowest mean perplexity over 3 seeds" in failed.text, "hard seeds of b may have failed"
    assert "FAILED b-1: late" in failed.text


def test_a_method_that_failed_and_a_comparison_without_a_reference_have_no_verdict_of_seeds(tmp_path: Path):
    failed = page_of(write_comparison(tmp_path / "c", {"a": [5.0, 5.5, 5.2], "b": [None, None, None]}))
    [row] = [row for row in failed.rows if row[0] == "b" and len(row) > 5]
    assert "too few seeds" not in row
    (tmp_path / "d").mkdir()
    nothing = read_comparison(write_comparison(tmp_path / "d", {"a": [None, None, None], "b": [None, None, None]}))
    assert nothing is not None
    assert nothing.lead == "No method has a finite mean."
    assert not [cell for row in (nothing.columns, *nothing.rows) for cell in row if "None" in cell or "seeds" in cell]


def test_a_table_that_cannot_be_read_is_left_out(tmp_path: Path):
    folder = write_comparison(tmp_path / "c", THREE)
    whole = json.loads((folder / "results.json").read_text("utf8"))
    for damage in ({"seeds": 3}, {"methods": None}, {"metric": "x"}, {"methods": []}):
        (folder / "results.json").write_text(json.dumps({**whole, **damage}), encoding="utf8")
        assert page_of(folder).text.startswith("Report: lucky, 3 seeds")


def test_the_page_of_a_whole_comparison_is_small(tmp_path: Path):
    names = [f"client-{number:02d}" for number in range(24)]
    folders = [
        write_run(
            tmp_path / f"{method}-{seed}",
            *(measured(0, 9.0, names), *(a_round(number, ranks=dict.fromkeys(names, 4)) for number in range(1, 7))),
            measured(6, 5.0, names),
            head=head(seed=seed, method={"name": "hetlora", "gamma": method / 100}),
        )
        for method in range(13)
        for seed in range(3)
    ]
    assert write_report(folders, tmp_path / "page.html").stat().st_size <= 1.8e6


def test_a_report_is_small_and_its_script_fits_the_pinned_plotly(runs: dict[str, Path], tmp_path: Path):
    from plotly.offline import get_plotlyjs_version

    page = write_report([runs["het"]], tmp_path / "page.html")
    assert page.stat().st_size <= 1.8e6
    scripts = Page(page.read_text("utf8")).scripts
    assert f"plotly.js (basic - minified) v{get_plotlyjs_version()}\n" in scripts[0]
    licence = Path(hetlora.__file__).parent / "commands/report/plotly-LICENSE.txt"
    assert licence.read_text("utf8").startswith("MIT License")


def test_a_run_says_where_it_came_from(runs: dict[str, Path]):
    page = page_of(runs["het"])
    for name in ("records.jsonl", "config.json"):
        assert f"{name}: SHA-256 {hashlib.sha256((runs['het'] / name).read_bytes()).hexdigest()}" in page.text
    assert "hetlora run het.toml" in page.text
    assert f"torch {read_run(runs['het']).head['versions']['torch']}" in page.text
    assert len(rounds_of(runs["het"])) == ROUNDS
