"""`hetlora report`: what its page says is what the records say, whatever became of the run and whoever named the clients."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shlex
import statistics
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hetlora.cli import main
from hetlora.config import load_config, read_written
from hetlora.errors import HetLoraError
from hetlora.records import read_records
from hetlora.report import write_report
from hetlora.report.chart import Chart
from hetlora.report.client_figures import ranks_chart
from hetlora.report.facts import chosen_clients, grouped
from hetlora.report.figures import loss_chart, perplexity_chart, traffic_chart
from hetlora.report.influence import shares_chart, spread_chart
from hetlora.report.page import _chart, render
from hetlora.report.read import read_run, read_runs
from hetlora.report.toml_text import toml_text
from report_runs import ROUNDS, RUN, a_round, measured, real_runs, write_config, write_run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytest.importorskip("plotly", reason="a report needs plotly: pip install 'hetlora[report]'")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> dict[str, Path]:
    """Real runs, a few rounds each."""
    return real_runs(tmp_path_factory.mktemp("report"), tiny)


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_records(folder / "records.jsonl") if record["kind"] == "round"]


def trace(chart: Chart | None, name: str) -> dict[str, Any]:
    assert chart is not None
    [found] = [trace for trace in chart.traces if trace["name"] == name]
    return found


class Page(HTMLParser):
    """The page without the script it is drawn with: tags in order, data of charts, and what a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.charts: dict[str, Any] = {}
        self.seen: list[str] = []
        self.scripts: list[str] = []
        self.within: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.within.append(tag if tag in ("script", "style") else "")
        if tag == "figure":
            self.figure = dict(attrs)["id"] or ""

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

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.seen).split())


def page_of(*folders: Path) -> Page:
    return Page(render(read_runs(folders)))


# What is drawn is what was recorded ---------------------------------------------------------------------------------


def test_curves_are_the_records_figures_by_round_and_by_megabytes(runs: dict[str, Path]):
    records = rounds_of(runs["het"])
    page = page_of(runs["het"])
    loss, perplexity = page.charts["loss"], page.charts["perplexity"]
    base = read_records(runs["het"] / "records.jsonl")[1]["overall"]["perplexity"]
    assert loss["traces"][0]["y"] == pytest.approx([record["loss"] for record in records], rel=1e-5)
    assert perplexity["traces"][0]["y"] == pytest.approx(
        [base, *(record["perplexity"] for record in records)], rel=1e-5
    )
    sent = [0.0]
    for record in records:
        sent.append(sent[-1] + (record["bytes_up"] + record["bytes_down"]) / 1e6)
    by_round, by_megabytes = perplexity["views"]
    assert by_round["x"] == [[0, 1, 2, 3, 4]]
    assert by_megabytes["x"][0] == pytest.approx(sent, rel=1e-5)


def test_runs_that_differ_in_the_seed_only_are_one_line_with_a_band(runs: dict[str, Path]):
    groups = grouped(read_runs(list(runs.values())))
    assert [(group.label, len(group.runs)) for group in groups] == [("het, 2 seeds", 2), ("local", 1)]
    losses = [[record["loss"] for record in rounds_of(runs[name])] for name in ("het", "het-1")]
    means = [statistics.fmean(pair) for pair in zip(*losses, strict=True)]
    deviations = [statistics.stdev(pair) for pair in zip(*losses, strict=True)]
    chart = loss_chart(groups)
    line = trace(chart, "het, 2 seeds")
    assert line["y"] == pytest.approx(means, rel=1e-5)
    assert [told[2:] for told in line["customdata"]] == [
        [pytest.approx(std, rel=1e-4), pytest.approx(min(pair), rel=1e-5), pytest.approx(max(pair), rel=1e-5), 2]
        for std, pair in zip(deviations, zip(*losses, strict=True), strict=True)
    ]
    band = trace(chart, "het, 2 seeds: ± standard deviation")
    high = [mean + std for mean, std in zip(means, deviations, strict=True)]
    low = [mean - std for mean, std in zip(means, deviations, strict=True)]
    assert band["y"] == pytest.approx([*high, *reversed(low)], rel=1e-5)
    assert band["legendgroup"] == line["legendgroup"], "both go and come together"


def test_ranks_shares_and_events_are_those_of_the_records(runs: dict[str, Path]):
    records, charts = rounds_of(runs["het"]), page_of(runs["het"]).charts
    heat = charts["ranks-0"]["traces"][0]
    names = charts["ranks-0"]["layout"]["yaxis"]["ticktext"]
    assert sorted(names) == ["phone-1", "phone-2", "tablet-1", "tablet-2"]
    summary = json.loads((runs["het"] / "summary.json").read_text("utf8"))
    assert {name: row[-1] for name, row in zip(names, heat["z"], strict=True)} == summary["ranks"]
    for number, record in enumerate(records):
        for client, rank in record["ranks"].items():
            assert heat["z"][names.index(client)][number] == record["prunes"].get(client, rank)
    prunes = [(record["round"], client) for record in records for client in record["prunes"]]
    marks = charts["ranks-0"]["traces"][1]
    assert [(x, names[y]) for x, y in zip(marks["x"], marks["y"], strict=True)] == prunes
    shares = charts["shares-0"]
    order = shares["layout"]["yaxis"]["ticktext"]
    for number, record in enumerate(records):
        for client in names:
            drawn = shares["traces"][0]["customdata"][order.index(client)][number]
            assert (
                drawn == pytest.approx(record["weights"].get(client), rel=1e-5)
                if drawn
                else client not in record["weights"]
            )
    bounded = [(r["round"], c) for r in records for c, told in r["clients"].items() if "bounded" in told]
    assert bounded, "the run is to have bounded something"
    assert [(x, order[y]) for x, y in zip(shares["traces"][1]["x"], shares["traces"][1]["y"], strict=True)] == bounded
    events = charts["events-0"]["traces"]
    assert [bar["y"] for bar in events] == [[len(r[key]) for r in records] for key in ("prunes", "failures")]


def test_the_page_says_the_result_and_compares_with_training_alone(runs: dict[str, Path]):
    summary = json.loads((runs["het"] / "summary.json").read_text("utf8"))
    one = page_of(runs["het"])
    before, after = (
        f"{summary[part]['perplexity']:,.{0 if summary[part]['perplexity'] >= 1000 else 2}f}"
        for part in ("base", "final")
    )
    assert f"het, seed 0 (hetlora): held-out perplexity {before} → {after}" in one.text
    assert f"{summary['prunes']} prunes, {summary['failures']} failures." in one.text
    assert "--set method.name=local" in one.text
    both = page_of(runs["het"], runs["local"])
    assert "--set method.name=local" not in both.text
    alone = [t for t in both.charts["clients-0"]["traces"] if t["name"] == "alone (method local)"]
    figures = json.loads((runs["local"] / "summary.json").read_text("utf8"))["final"]["clients"]
    names = both.charts["clients-0"]["layout"]["yaxis"]["ticktext"]
    assert alone[0]["x"] == pytest.approx([figures[name]["perplexity"] for name in names], rel=1e-5)


def test_plotly_knows_every_property_that_charts_set(runs: dict[str, Path]):
    import plotly.graph_objects

    def coloured(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: coloured(item) for key, item in value.items()}
        if isinstance(value, list):
            return [coloured(item) for item in value]
        return "#123456" if isinstance(value, str) and re.fullmatch(r"@\w+(:[\d.]+)?", value) else value

    charts = page_of(*runs.values()).charts
    assert len(charts) > 15
    for chart in charts.values():
        plotly.graph_objects.Figure(coloured(chart["traces"]), coloured(chart["layout"]))
        for view in chart["views"]:
            plotly.graph_objects.layout.XAxis(**view["axis"])


def test_what_full_fine_tuning_would_send_is_arithmetic_on_the_base(tmp_path: Path):
    failing = a_round(2, weights={"a": 1.0}, failures={"b": "late"})
    [run] = read_runs([write_run(tmp_path / "r", a_round(1), failing)])
    chart = traffic_chart(grouped([run]))
    assert trace(chart, "full fine-tuning, up")["x"] == [pytest.approx(3 * 4 * 1000 / 1e6)]
    assert trace(chart, "full fine-tuning, down")["x"] == [pytest.approx(4 * 4 * 1000 / 1e6)]
    assert trace(chart, "sent up")["x"] == [pytest.approx(2 * 1000 / 1e6)]


# The configuration repeats the run ----------------------------------------------------------------------------------


def test_the_configuration_on_the_page_is_the_runs_as_a_file_that_is_accepted(runs: dict[str, Path], tmp_path: Path):
    text = render(read_runs([runs["het"]]))
    written = html.unescape(re.findall(r'<pre id="config-0"[^>]*>(.*?)</pre>', text, flags=re.DOTALL)[0])
    (tmp_path / "het.toml").write_text(written, encoding="utf8")
    assert load_config(tmp_path / "het.toml") == read_written(runs["het"] / "config.json")


def test_the_command_for_training_alone_is_accepted(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("het.toml").write_text(toml_text(read_run(runs["het"]).config), encoding="utf8")
    [command] = re.findall(r"hetlora run het\.toml --set [^<]*?(?= makes one)", page_of(runs["het"]).text)
    words = shlex.split(command)
    config = load_config(Path(words[2]), [word for word in words[3:] if word != "--set"])
    assert (config.method.name, config.name) == ("local", "local")


@pytest.mark.parametrize("text", ["", 'a"b\\c', "line\nbreak\ttab", "\x7f\x00\x1f", "größer ✓ 😀", "]]>'''"])
def test_any_text_and_key_survives_toml(text: str):
    config = {"a": text, "part": {text or "key": [1, 2.5, 1e-05, True, {"b c": text}], "none": None}}
    expected = {"a": text, "part": {text or "key": [1, 2.5, 1e-05, True, {"b c": text}]}}
    assert tomllib.loads(toml_text(config)) == expected


# Hostile text -------------------------------------------------------------------------------------------------------

HOSTILE = [
    "</script><script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "{{script}}{{plotly}}",
    "@0",
    "=cmd|' /C calc'!A0",
    "\u202egnp.exe \x1b[2J \ud800",
    "<b>bold</b>&lt;",
    "x" * 5000,
]


def hostile_run(folder: Path) -> Path:
    ranks = dict.fromkeys(HOSTILE, 4)
    share = {name: 1 / len(HOSTILE) for name in HOSTILE[1:]}
    return write_run(
        folder,
        measured(0, 9.0, HOSTILE),
        a_round(1, ranks=ranks, weights=share, failures={HOSTILE[0]: HOSTILE[1]}, prunes={HOSTILE[2]: 2}, clients={}),
        measured(1, 5.0, HOSTILE),
    )


def test_names_and_reasons_are_text_and_nothing_else(tmp_path: Path):
    text = render(read_runs([hostile_run(tmp_path / "r")]))
    page = Page(text)
    assert len(page.scripts) == 2, "plotly and the page's own script"
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    own = text.replace(page.scripts[0], "").replace(page.scripts[1], "")
    assert not re.search("[\u202e\x1b\ud800]", own)
    assert '<img src=x onerror="alert(1)">' in page.text, "it is shown as it is"
    assert "{{script}}{{plotly}}" in page.text, "what is put in is not looked at again"
    assert r"\u202egnp.exe \x1b[2J \ud800" in page.text
    assert text.encode("utf8")
    for chart in page.charts.values():
        drawn = list(chart["layout"]["yaxis"].get("ticktext", []))
        drawn += [str(one["text"]) for one in chart["traces"] if "text" in one]
        assert not [label for label in drawn if "<" in label.replace("<br>", "")], "plotly reads tags"


def test_folders_labels_and_configurations_are_text_too(tmp_path: Path):
    image = "<img src=x onerror='alert(1)'>"
    head = replace(RUN, config={**RUN.config, "name": image, "seed": 1, image: image}, versions={image: image})
    write_run(tmp_path / "runs" / image, a_round(1), complete=False, head=head)
    write_run(tmp_path / "runs" / "other", a_round(1))
    told = {"runs": [{"folder": image, "label": image}, {"folder": "other", "label": image}]}
    (tmp_path / "results.json").write_text(json.dumps(told), encoding="utf8")
    page = page_of(tmp_path)
    assert [tag for tag, _ in page.tags].count("option") == 2
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert page.text.count(image) > 5


def test_a_chart_cannot_end_its_script(tmp_path: Path):
    [run] = read_runs([write_run(tmp_path / "r", a_round(1))])
    chart = loss_chart(grouped([run]))
    assert chart is not None
    hostile = replace(chart, traces=[{**chart.traces[0], "name": "</script <!--<script>\u2028"}])
    within = Page(_chart(hostile))
    assert within.charts["loss"]["traces"][0]["name"] == "</script <!--<script>\u2028"
    assert _chart(hostile).lower().count("</script") == 1, "browsers end a script where this parser does not yet"
    assert "<!--" not in _chart(hostile)
    assert not within.scripts


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
    assert page.charts["loss"]["traces"][0]["x"] == [1, 2]
    assert "perplexity 9.000 → 7.000" in page.text, "as last measured"


def test_a_run_without_rounds(tmp_path: Path):
    page = page_of(write_run(tmp_path / "r", measured(0, 9.0), complete=False))
    assert "0 of 3 rounds" in page.text
    assert set(page.charts) == {"perplexity", "tiers"}
    assert "No rank is recorded" in page.text
    assert "No update was admitted" in page.text


def test_a_run_that_was_ended_before_its_first_record(tmp_path: Path):
    folder = write_run(tmp_path / "r", complete=False)
    (folder / "records.jsonl").write_bytes(b"")
    page = page_of(folder)
    assert "0 of 3 rounds" in page.text
    assert not page.charts


def test_a_run_in_which_everybody_failed(tmp_path: Path):
    gone = {"loss": None, "weights": {}, "failures": {"a": "late", "b": "sent garbage"}, "clients": {}, "bytes_up": 0}
    page = page_of(
        write_run(tmp_path / "r", measured(0, 9.0), *(a_round(n, **gone) for n in (1, 2, 3)), measured(3, 9.0))
    )
    assert "There is no curve of the training loss" in page.text
    assert "6 failures, 100.0 % of 6 times that a client was asked. In 3 rounds nobody gave anything." in page.text
    assert page.charts["events-0"]["traces"][0]["y"] == [2, 2, 2]
    assert "shares-0" not in page.charts
    assert page.text.count("sent garbage") == 1 + 3, "the reason once, each failure once"


def test_losses_that_are_not_finite_leave_gaps(tmp_path: Path):
    losses = [2.0, float("nan"), 1.0]
    rounds = [a_round(n, loss=loss, perplexity=float("inf")) for n, loss in enumerate(losses, start=1)]
    [run] = read_runs([write_run(tmp_path / "r", *rounds)])
    chart = loss_chart(grouped([run]))
    assert trace(chart, "r")["y"] == [2.0, None, 1.0]
    assert chart is not None
    assert "Gaps: 1 round without a finite loss" in chart.sentence
    assert perplexity_chart(grouped([run])) is None


def test_one_client_and_a_rank_for_every_module(tmp_path: Path):
    ranks = [{"q_proj": 2, "v_proj": 4}, {"q_proj": 2, "v_proj": 3}]
    rounds = [a_round(n + 1, ranks={"a": ranks[n]}, weights={"a": 1.0}, clients={}) for n in (0, 1)]
    page = page_of(write_run(tmp_path / "r", measured(0, 9.0, ["a"]), *rounds, measured(2, 5.0, ["a"])))
    assert page.charts["ranks-0"]["traces"][0]["z"] == [[4, 3]], "the largest of its modules"
    assert "1 of 1 measured client got a lower perplexity" in page.text


def test_records_from_before_bounds_and_networks_were_written(tmp_path: Path):
    folder = write_run(tmp_path / "r", measured(0, 9.0), a_round(1), measured(1, 5.0))
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text("utf8").splitlines()]
    for line in lines:
        for key in ("network", "base_parameters", "trainable_parameters", "self_pruning"):
            line.pop(key, None)
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf8")
    assert {"loss", "ranks-0", "shares-0", "slots"} <= page_of(folder).charts.keys()


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
    assert page.stat().st_size < 15e6
    drawn = Page(page.read_text("utf8"))
    assert "60 of 1,000 clients are shown" in drawn.text
    assert "the first 500 of 5,000" in drawn.text
    assert len(drawn.charts["ranks-0"]["traces"][0]["z"]) == 60
    assert {len(row) for row in drawn.charts["ranks-0"]["traces"][0]["z"]} == {500}


def test_those_whose_rank_changed_are_shown_first_and_the_others_evenly(tmp_path: Path):
    names = [f"c{number:03d}" for number in range(100)]
    equal = dict.fromkeys(names, 0.01)
    folder = write_run(
        tmp_path / "r",
        a_round(1, ranks=dict.fromkeys(names, 8), weights=equal, prunes={"c041": 3, "c099": 2}, clients={}),
    )
    chart = ranks_chart(read_run(folder), "ranks", 10)
    assert chart is not None
    shown = [row[0] for row in chart.table.rows]
    assert len(shown) == 10
    assert {"c041", "c099", "c000"} <= set(shown)
    assert chosen_clients(names, [], 3) == ["c000", "c050", "c099"]


def test_equal_shares_are_said_to_be_equal_and_many_are_drawn_as_three_lines(tmp_path: Path):
    names = [f"c{number:03d}" for number in range(200)]
    rounds = [
        a_round(n, ranks=dict.fromkeys(names, 8), weights=dict.fromkeys(names, 1 / 200), clients={})
        for n in range(1, 21)
    ]
    run = read_run(write_run(tmp_path / "r", *rounds))
    shares, chart = shares_chart(run, "shares", 60), spread_chart(run, "spread")
    assert shares is not None
    assert shares.sentence.startswith("Everyone had the equal share in every round.")
    assert chart is not None
    assert [one["name"] for one in chart.traces] == ["largest share", "median share", "least share", "equal share"]


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
    options = [attributes for tag, attributes in page.tags if tag == "option"]
    assert len(options) == 2, "a folder given twice is one run"
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


def test_without_plotly_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_run(tmp_path / "r", a_round(1))
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(HetLoraError, match=r"pip install 'hetlora\[report\]'"):
        write_report([folder], tmp_path / "page.html")


def test_a_comparison_stands_for_the_runs_its_table_counts(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, tiny)
    more = """
[compare]
seeds = [0, 1]
learning_rates = [1e-2, 1e-3]
validation_share = 0.4
[[compare.methods]]
name = "hetlora"
label = "HetLoRA γ=1"
gamma = 1.0
min_rank = 1
"""
    text = re.sub(r"\[method\].*?(?=\[training\])", "", config.read_text("utf8"), flags=re.DOTALL)
    text = re.sub(r"\[evaluation\].*", "", text, flags=re.DOTALL).replace("rounds = 4", "rounds = 1")
    config.write_text('name = "table"\n' + text + more, encoding="utf8")
    assert main(["compare", str(config), "--quiet"]) == 0
    folder = tmp_path / "runs" / "table"
    every = list((folder / "runs").iterdir())
    counted = read_runs([folder])
    assert (len(every), len(counted)) == (4, 2), "those that tune are not counted"
    assert [group.label for group in grouped(counted)] == ["HetLoRA γ=1, 2 seeds"]
    assert main(["report", str(folder)]) == 0
    assert "<title>Report: HetLoRA γ=1, 2 seeds</title>" in (folder / "report.html").read_text("utf8")
    (folder / "results.json").unlink()  # as it is until the comparison has ended
    assert {run.folder for run in read_runs([folder])} == {run.folder for run in counted}


def test_a_run_says_where_it_came_from(runs: dict[str, Path]):
    page = page_of(runs["het"])
    for name in ("records.jsonl", "config.json"):
        assert f"{name}: SHA-256 {hashlib.sha256((runs['het'] / name).read_bytes()).hexdigest()}" in page.text
    assert "hetlora run het.toml" in page.text
    assert f"torch {read_run(runs['het']).head['versions']['torch']}" in page.text
    assert len(rounds_of(runs["het"])) == ROUNDS
