"""`hetlora report`: the page equals the records, for runs in any state and clients with any name."""

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

import hetlora
from hetlora.cli import main
from hetlora.commands.report import write_report
from hetlora.commands.report.chart import Chart
from hetlora.commands.report.client_charts import ranks_chart
from hetlora.commands.report.curves import loss_chart, perplexity_chart, slots_chart, traffic_chart
from hetlora.commands.report.page import _chart, as_toml, render
from hetlora.commands.report.share_charts import shares_chart, spread_chart
from hetlora.commands.report.summary import chosen_clients, grouped, local_run
from hetlora.commands.report.tier_chart import tiers_chart
from hetlora.config import load_config, load_run_config
from hetlora.errors import HetLoraError
from hetlora.methods import METHODS
from hetlora.runs.reader import read_run, read_runs
from hetlora.runs.records import RunRecord, read_records
from report_runs import ROUNDS, RUN, a_round, measured, real_runs, write_config, write_run
from small_federations import phones

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.run


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


def head(**changes: Any) -> RunRecord:
    """Return the first record of a run with other parts in its configuration."""
    return replace(RUN, config={**RUN.config, **changes})


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
    assert [point[2:] for point in line["customdata"]] == [
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
    bounded = [(r["round"], c) for r in records for c, entry in r["clients"].items() if "bounded" in entry]
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
    assert sentence in page.text
    assert sentence in repr(hetlora.open_run(folder))
    assert "ROUGE-L 10.00 (the base alone: 10.00)" in page.text
    assert page.charts["perplexity"]["traces"][0]["y"] == [622.12, 600.0, 536.04]
    curve, tiers = perplexity_chart(grouped([run])), tiers_chart(grouped([run]))
    assert curve is not None
    assert "was 622.12 before the first round" in curve.sentence
    assert "Round 0 is with the adapter that r started from; the base alone has 1,033." in curve.sentence
    assert tiers is not None
    assert "rank 4 622.12 → 536.04" in tiers.sentence
    assert trace(tiers, "before (the adapter started from)")["x"] == [622.12, 622.12]
    clients = {one["name"]: one["x"] for one in page.charts["clients-0"]["traces"]}
    assert clients["before (the adapter started from)"] == [622.12, 622.12]


def test_the_adapter_that_a_run_started_from_is_not_its_result(tmp_path: Path):
    begun = [measured(0, 1033.27), measured(0, 900.0)]
    rounds = [a_round(1, perplexity=857.02), a_round(2, perplexity=826.3)]
    folder = write_run(tmp_path / "r", *begun, *rounds, complete=False, head=head(model={"adapter": "before"}))
    run, page = read_run(folder), page_of(folder)
    assert run.final is None
    assert "perplexity 900.00 → 826.30 (−8.2 %)" in page.text
    assert "900.00 → 826.30" in repr(hetlora.open_run(folder))
    assert "The tiers were measured once only" in page.text
    assert "clients-0" not in page.charts


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
        groups = grouped(read_runs(given))
        assert [group.label for group in groups] == names
        charts = [loss_chart(groups), tiers_chart(groups)]
        drawn = [[one["name"] for one in chart.traces] for chart in charts if chart is not None]
        assert drawn == [names, ["before (the base)", *names]]
    tiers = tiers_chart(grouped(read_runs(folders)))
    assert [trace(tiers, name)["x"] for name in ("a/runs/demo", "b/runs/demo")] == [[7.0, 7.0], [5.0, 5.0]]
    assert tiers is not None
    assert tiers.sentence.startswith("Over its tiers, b/runs/demo has the lowest mean perplexity, 5.000")


def test_the_end_of_a_line_is_said_of_the_rounds_that_all_seeds_have(tmp_path: Path):
    long = [a_round(number, loss=loss) for number, loss in enumerate([9.0, 7.0, 6.0, 1.0], start=1)]
    short = [a_round(number, loss=loss) for number, loss in enumerate([9.0, 5.0], start=1)]
    folders = [
        write_run(tmp_path / "a", measured(0, 9.0), *long, measured(4, 3.0)),
        write_run(tmp_path / "b", measured(0, 5.0), *short, complete=False, head=head(seed=1)),
    ]
    groups = grouped(read_runs(folders))
    loss, perplexity, tiers = loss_chart(groups), perplexity_chart(groups), tiers_chart(groups)
    assert loss is not None
    assert "was 9.000 in round 1 and is 6.000 ± 1.414 after round 2." in loss.sentence
    assert loss.sentence.endswith("Later figures of a, 2 seeds are of fewer runs.")
    assert trace(loss, "a, 2 seeds")["y"] == [9.0, 6.0, 6.0, 1.0]
    assert perplexity is not None
    assert perplexity.sentence == "The perplexity of a, 2 seeds is known before the first round only: 7.000."
    assert tiers is not None
    assert "rank 4 9.000 → 3.000" in tiers.sentence, "before and after are of the same run"
    assert tiers.sentence.endswith("Measured at their end: 1 of 2 runs of a, 2 seeds.")


def test_trackers_do_not_split_seeds_and_runs_of_one_seed_are_not_called_seeds(tmp_path: Path):
    tracked = head(seed=1, tracking={"to": ["tensorboard"], "project": "hetlora"})
    first, second = write_run(tmp_path / "a", a_round(1)), write_run(tmp_path / "b", a_round(1), head=tracked)
    [group] = grouped(read_runs([first, second]))
    assert group.label == "a, 2 seeds"
    [again] = grouped(read_runs([first, write_run(tmp_path / "c", a_round(1))]))
    assert again.label == "a, 2 runs of 1 seed"
    assert "Runs of one configuration, whatever their seeds, are one line" in page_of(first, tmp_path / "c").text


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
    text = page_of(*folders).text
    assert ("got lower than by training alone" in text) is comparable
    assert ("is of another base or other rows, and nobody is compared with it" in text) is not comparable


def test_shares_and_slots_are_of_an_average_and_alone_there_is_none(runs: dict[str, Path], tmp_path: Path):
    page = page_of(runs["local"])
    assert not {"shares-0", "spread-0", "slots"} & page.charts.keys()
    assert "Nothing is averaged: each client goes on from its own adapter" in page.text
    assert "Nothing is averaged in local, and so no slot is diluted there." in page.text
    both = read_runs([runs["het"], runs["local"]])
    slots = slots_chart(grouped(both))
    assert slots is not None
    assert not [one for one in slots.traces if "local" in one["name"]]
    averaged = write_run(tmp_path / "r", a_round(1), head=head(method={"name": "fedsa_lora"}))
    assert {"shares-0", "spread-0", "slots"} <= page_of(averaged).charts.keys(), "of its A"


# The configuration repeats the run ----------------------------------------------------------------------------------


def test_the_configuration_on_the_page_is_the_runs_as_a_file_that_is_accepted(runs: dict[str, Path], tmp_path: Path):
    text = render(read_runs([runs["het"]]))
    written = html.unescape(re.findall(r'<pre id="config-0"[^>]*>(.*?)</pre>', text, flags=re.DOTALL)[0])
    (tmp_path / "het.toml").write_text(written, encoding="utf8")
    assert load_config(tmp_path / "het.toml") == load_run_config(runs["het"] / "config.json")


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_command_for_training_alone_is_accepted(
    wrapped: bool, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    run = read_run(runs["het"])
    if wrapped:
        training = {**run.config["training"], "proximal": 0.1}
        optimizer = {"name": "momentum", "learning_rate": 1.0}
        run = replace(run, config={**run.config, "training": training, "server_optimizer": optimizer})
        assert METHODS["local"]().refuses.keys() == {"server_optimizer", "robustness", "proximal", "average"}, (
            "all that is set here, and an average"
        )
        assert run.config["robustness"]
    Path("het.toml").write_text(as_toml(run.config), encoding="utf8")
    assert load_config(Path("het.toml")).method.name == "hetlora"
    [command] = re.findall(r"hetlora run het\.toml --set [^<]*?(?= makes one)", Page(render([run])).text)
    words = shlex.split(command)
    config = load_config(Path(words[2]), [word for word in words[3:] if word != "--set"])
    assert (config.method.name, config.name) == ("local", "local")


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
    results = {"runs": [{"folder": image, "label": image}, {"folder": "other", "label": image}]}
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf8")
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
    assert "distribution-0" in page_of(*folders).charts


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
