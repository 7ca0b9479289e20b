"""A report's page in a real browser: drawn from the records, accessible, usable on a phone, and offline."""

from __future__ import annotations

import csv
import io
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hetlora.commands.report import write_report
from hetlora.runs.records import read_records
from report_runs import a_round, measured, real_runs, write_run

pytestmark = pytest.mark.run

playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("needs Chromium: apt-get install chromium", allow_module_level=True)

LOOKS = [
    (name, width, scheme)
    for name in ("one", "several", "failing")
    for width in (1280, 360)
    for scheme in ("light", "dark")
]
SCREENSHOTS = Path(__file__).resolve().parent.parent / "build" / "report"
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
HOSTILE = '</script><img src=x onerror="document.title=1"><b>&amp;'


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> dict[str, Path]:
    """Real runs, and one in which a client with a hostile name fails for hostile reasons."""
    folder = tmp_path_factory.mktemp("browser")
    failing = {"weights": {"a": 1.0}, "failures": {HOSTILE: HOSTILE}, "ranks": {"a": 4, HOSTILE: 8}, "clients": {}}
    rounds = [a_round(number, **failing, prunes={"a": 4 - number}) for number in (1, 2)]
    gone = a_round(3, loss=None, weights={}, clients={}, ranks={"a": 2}, failures={"a": "late"})
    records = [measured(0, 9.0, ["a", HOSTILE]), *rounds, gone]
    return {**real_runs(folder, tiny), "failing": write_run(folder / "failing", *records, complete=False)}


@pytest.fixture(scope="module")
def pages(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page about one run, one about several, and one about a run with failures that was ended."""
    folder = tmp_path_factory.mktemp("pages")
    shown = {"one": ["het"], "several": ["het", "het-1", "local"], "failing": ["failing"]}
    return {name: write_report([runs[run] for run in given], folder / f"{name}.html") for name, given in shown.items()}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium with a folder of its own."""
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS)
        yield opened
        opened.close()


Open = Callable[..., Any]


def is_other(asked: str, address: str) -> bool:
    return not asked.startswith((address, "data:", "blob:"))


@pytest.fixture
def opened(browser: Any, pages: dict[str, Path]) -> Iterator[Open]:
    """Open a page; at the end it has said nothing on the console and asked for nothing but itself."""
    contexts, events = [], []

    def open_page(name: str, width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            reduced_motion="reduce",
            accept_downloads=True,
        )
        contexts.append(context)
        page = context.new_page()
        address = pages[name].as_uri()
        page.on("console", lambda message: events.append(message.text))
        page.on("pageerror", lambda error: events.append(str(error)))
        page.on("dialog", lambda dialog: events.append(dialog.message))
        page.on("request", lambda request: events.append(request.url) if is_other(request.url, address) else None)
        page.goto(address)
        page.wait_for_selector("html[data-ready]", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not events


def drawn(page: Any) -> dict[str, Any]:
    """Return what plotly has drawn, by chart that is shown: the points of each trace, and the marks on the page."""
    return page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll("figure.chart")].filter((f) => f.offsetParent).map((f) => {
            const plot = f.querySelector(".plot");
            return [f.id, {
                traces: plot._fullData.map((t) => ({ name: t.name, visible: t.visible, x: t.x && [...t.x], y: t.y && [...t.y],
                                                     z: t.z && [...t.z].map((r) => [...r]) })),
                marks: plot.querySelectorAll(".scatterlayer .trace").length + plot.querySelectorAll(".barlayer .trace").length
                       + plot.querySelectorAll(".heatmaplayer image").length,
                width: plot.querySelector(".main-svg").getBoundingClientRect().width,
            }];
        }))"""
    )


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [LOOKS[0], *(pytest.param(*look, marks=pytest.mark.slow) for look in LOOKS[1:])],
)
def test_every_chart_is_drawn_and_fits(opened: Open, name: str, width: int, scheme: str):
    page = opened(name, width, scheme)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}-{width}-{scheme}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page itself never scrolls sideways"
    shown = drawn(page)
    clients = {
        "ranks-0",
        "distribution-0",
        "shares-0",
        "spread-0",
        "events-0",
        "slots",
        "traffic",
        "loss",
        "perplexity",
    }
    assert shown.keys() == clients | {"tiers"} | ({"clients-0"} if name != "failing" else set())
    for chart, found in shown.items():
        assert 200 < found["width"] <= width, chart
        assert found["traces"], chart
        assert found["marks"] == len(found["traces"]), f"{chart}: something is not drawn"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 26)")


@pytest.mark.slow
def test_what_is_drawn_is_what_was_recorded(opened: Open, runs: dict[str, Path]):
    records = [record for record in read_records(runs["het"] / "records.jsonl") if record["kind"] == "round"]
    shown = drawn(opened("one"))
    [loss] = shown["loss"]["traces"]
    assert loss["x"] == [1, 2, 3, 4]
    assert loss["y"] == pytest.approx([record["loss"] for record in records], rel=1e-5)
    ranks, prunes = shown["ranks-0"]["traces"]
    assert [len(row) for row in ranks["z"]] == [4] * 4
    assert len(prunes["x"]) == sum(len(record["prunes"]) for record in records) > 0
    assert sum(len(one["x"]) for one in shown["spread-0"]["traces"][:-1]) == sum(len(r["weights"]) for r in records)
    assert [sum(bar["y"]) for bar in shown["events-0"]["traces"]] == [
        sum(len(record[key]) for record in records) for key in ("prunes", "failures")
    ]


@pytest.mark.slow
def test_several_runs_share_charts_and_one_at_a_time_is_shown_in_detail(opened: Open):
    page = opened("several")
    shown = drawn(page)
    assert [one["name"] for one in shown["loss"]["traces"]] == [
        "het, 2 seeds: ± standard deviation",
        "het, 2 seeds",
        "local",
    ]
    assert "ranks-0" in shown
    page.select_option("#run", "2")
    shown = drawn(page)
    assert "ranks-2" in shown
    assert "ranks-0" not in shown
    assert "loss" in shown


@pytest.mark.slow
def test_a_legend_is_of_buttons_that_a_keyboard_reaches(opened: Open):
    page = opened("several")
    buttons = page.locator("#loss .legend button")
    assert buttons.all_inner_texts() == ["het, 2 seeds", "local"]
    buttons.first.focus()
    page.keyboard.press("Enter")
    assert buttons.first.get_attribute("aria-pressed") == "false"
    assert [one["visible"] for one in drawn(page)["loss"]["traces"]] == [False, False, True], "the line and its band"
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert [one["visible"] for one in drawn(page)["loss"]["traces"]] == [False, False, False]
    buttons.first.click()
    assert [one["visible"] for one in drawn(page)["loss"]["traces"]] == [True, True, False]


@pytest.mark.slow
def test_curves_are_shown_by_megabytes_too(opened: Open, runs: dict[str, Path]):
    page = opened("one")
    records = [record for record in read_records(runs["het"] / "records.jsonl") if record["kind"] == "round"]
    page.click("#perplexity .views button:nth-child(2)")
    x = drawn(page)["perplexity"]["traces"][0]["x"]
    assert x[0] == 0
    assert x[-1] == pytest.approx(sum(r["bytes_up"] + r["bytes_down"] for r in records) / 1e6, rel=1e-5)
    page.click("#perplexity .views button:nth-child(1)")
    assert drawn(page)["perplexity"]["traces"][0]["x"] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_the_theme_can_be_changed(opened: Open):
    page = opened("one", scheme="dark")
    assert page.get_attribute("#theme", "aria-pressed") == "true"
    page.click("#theme")
    assert page.get_attribute("#theme", "aria-pressed") == "false"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    paper = page.evaluate("document.querySelector('#loss .plot')._fullLayout.paper_bgcolor")
    assert paper == "#ffffff"


def test_names_and_reasons_are_shown_and_never_obeyed(opened: Open):
    page = opened("failing")
    assert page.title() == "Report: failing"
    assert page.locator("img").count() == 0
    assert HOSTILE in page.inner_text("#events")
    labels = page.locator("#ranks-0 .ytick text").all_text_contents()
    assert any("</script" in label for label in labels), "drawn as it is, shortened"
    assert page.locator("#ranks-0 .ytick a, #ranks-0 .ytick tspan[style*='bold']").count() == 0
    page.locator("#events-0 .plot .bars .point path").last.hover(force=True)


@pytest.mark.slow
def test_data_and_pictures_can_be_saved(opened: Open, tmp_path: Path):
    page = opened("failing")

    def saved(chart: str, kind: str) -> bytes:
        with page.expect_download() as download:
            page.click(f"#{chart} button[data-save={kind}]")
        assert download.value.suggested_filename == f"{chart}.{kind}"
        download.value.save_as(tmp_path / "saved")
        return (tmp_path / "saved").read_bytes()

    rows = list(csv.reader(io.StringIO(saved("events-0", "csv").decode("utf8"))))
    asked_and_given = [["1", "2", "1", "1", "1"], ["2", "2", "1", "1", "1"], ["3", "1", "0", "0", "1"]]
    assert rows == [["round", "asked", "gave an update", "pruned", "failed"], *asked_and_given]
    assert saved("ranks-0", "png").startswith(b"\x89PNG")
    assert saved("loss", "svg").startswith(b"<svg")


@pytest.mark.slow
def test_the_configuration_can_be_saved(opened: Open, tmp_path: Path):
    page = opened("one")
    with page.expect_download() as download:
        page.click("button[data-file]")
    download.value.save_as(tmp_path / "het.toml")
    assert download.value.suggested_filename == "het.toml"
    assert '[method]\nname = "hetlora"' in (tmp_path / "het.toml").read_text("utf8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "several"])
def test_a_screen_reader_finds_its_way(opened: Open, name: str):
    page = opened(name)
    levels = page.evaluate(
        "[...document.querySelectorAll('h1,h2,h3,h4')].filter((h) => h.offsetParent).map((h) => Number(h.tagName[1]))"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), "no level is left out"
    for landmark in ("header", "nav", "main", "footer"):
        assert page.locator(landmark).count() == 1
    missing = page.evaluate(
        """() => [...document.querySelectorAll("figure.chart")].filter((f) => !(
            f.querySelector("figcaption p").textContent.length > 20 && f.querySelector(".plot[role=img][aria-label]")
            && f.querySelectorAll("details table tbody tr").length && f.querySelector("details caption")
        )).map((f) => f.id)"""
    )
    assert missing == [], "every chart has a sentence, a name and a table"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, select, a')].filter((e) => !(e.textContent.trim())).length"
    )
    assert unnamed == 0
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    named_by = "[...document.querySelectorAll('[aria-labelledby]')].map((e) => e.getAttribute('aria-labelledby'))"
    assert set(page.evaluate(named_by)) <= set(ids)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_from_what_is_behind(opened: Open, scheme: str):
    page = opened("several", scheme=scheme)
    shown = page.evaluate(
        """() => {
            const text = [...document.querySelectorAll("p, h1, h2, h3, h4, a, button, summary, td, th, caption, code, select")]
                .filter((e) => e.offsetParent && e.getClientRects().length);
            const behind = (e) => { for (; e; e = e.parentElement) {
                const colour = getComputedStyle(e).backgroundColor;
                if (!/, 0\\)$/.test(colour)) return colour;
            } };
            const lines = [...document.querySelectorAll(".scatterlayer .js-line")].map((e) => e.style.stroke);
            return { text: text.map((e) => [getComputedStyle(e).color, behind(e)]),
                     lines: lines.filter((c) => c && !c.startsWith("rgba")).map((c) => [c, behind(document.body)]) };
        }"""
    )
    assert len(shown["text"]) > 50
    assert len(shown["lines"]) > 5
    assert min(contrast(*pair) for pair in shown["text"]) >= 4.5
    assert min(contrast(*pair) for pair in shown["lines"]) >= 3.0


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours, as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.slow
def test_it_prints_in_light_colours_within_the_paper(opened: Open):
    page = opened("several", scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    page.set_viewport_size({"width": 700, "height": 900})
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert all(found["width"] <= 700 for found in drawn(page).values())
    assert page.evaluate("document.querySelector('#loss .plot')._fullLayout.paper_bgcolor") == "#ffffff"
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "several-print.png", full_page=True)
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.querySelector('#loss .plot')._fullLayout.paper_bgcolor") == "#14171a"
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_without_scripts_every_sentence_and_table_is_there(browser: Any, pages: dict[str, Path]):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["several"].as_uri())
    assert page.locator("div.of-run >> visible=true").count() == 3 * 5, "of every run, for nobody can choose one"
    assert page.locator("noscript p").is_visible()
    context.close()


@pytest.mark.slow
def test_the_smallest_phone_in_a_long_run(browser: Any, tmp_path: Path):
    """A page of many clients opens, and fits."""
    names = [f"a client with quite a long name, number {number:04d}" for number in range(1000)]
    rounds = [
        a_round(number, ranks=dict.fromkeys(names[number : number + 50], 8), clients={},
                weights=dict.fromkeys(names[number : number + 50], 1 / 50))
        for number in range(1, 501)
    ]  # fmt: skip
    folder = write_run(tmp_path / "r", measured(0, 9.0, names), *rounds, measured(500, 5.0, names))
    page = browser.new_context(viewport={"width": 320, "height": 640}).new_page()
    page.goto(write_report([folder], tmp_path / "long.html").as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    assert len(drawn(page)["ranks-0"]["traces"][0]["z"]) == 60
    page.context.close()
