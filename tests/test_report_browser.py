"""A report's page in a real browser: drawn from the records, accessible, usable on a phone, and offline."""

from __future__ import annotations

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
    records = [measured(0, 9.0, ["a", HOSTILE]), *rounds, gone, measured(3, 8.0, ["a", HOSTILE])]
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
    """Return what plotly has drawn, by chart that is shown: the x of each trace, the marks on the page, the width."""
    return page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll("figure")].map((f) => [f, f.querySelector(".plot")])
            .filter(([f, plot]) => plot.data).map(([f, plot]) => {
            return [f.id, {
                traces: plot._fullData.map((t) => ({ name: t.name, visible: t.visible, x: [...t.x] })),
                marks: plot.querySelectorAll(".scatterlayer .trace, .barlayer .trace").length,
                width: plot.querySelector(".main-svg").getBoundingClientRect().width,
            }];
        }))"""
    )


def open_all(page: Any) -> None:
    """Open every part of the page that is closed, and wait until its charts are drawn."""
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    page.wait_for_function(
        "[...document.querySelectorAll('figure .plot')].every((plot) => plot.querySelector('.main-svg'))"
    )


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [LOOKS[0], *(pytest.param(*look, marks=pytest.mark.slow) for look in LOOKS[1:])],
)
def test_every_chart_is_drawn_and_fits(opened: Open, name: str, width: int, scheme: str):
    page = opened(name, width, scheme)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}-{width}-{scheme}.png", full_page=True)
    before = drawn(page)
    open_all(page)
    shown = drawn(page)
    assert (before.keys() < shown.keys()) == (name == "several"), "what is closed is drawn when it is opened"
    assert len(shown) == page.locator("figure").count()
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page itself never scrolls sideways"
    for chart, found in shown.items():
        visible = [one for one in found["traces"] if one["visible"] is True]
        assert found["marks"] >= len(visible) > 0, chart
        assert 0 < found["width"] <= width, chart


def test_the_first_screen_of_a_phone_is_the_result(opened: Open):
    page = opened("one", 360)
    boxes = [tile.bounding_box() for tile in page.locator(".tile").all()]
    assert len(boxes) == 4
    assert all(box["y"] + box["height"] < 500 for box in boxes)
    assert page.locator("#curves").bounding_box()["y"] > max(box["y"] for box in boxes)
    page = opened("one", 1280)
    tile, curve = page.locator(".tile").first.bounding_box(), page.locator("#curves .plot").bounding_box()
    assert curve["x"] > tile["x"] + tile["width"], "the curve stands beside them"
    assert curve["y"] + curve["height"] < 720


@pytest.mark.slow
def test_curves_are_shown_by_megabytes_too(opened: Open, runs: dict[str, Path]):
    page = opened("one")
    records = [record for record in read_records(runs["het"] / "records.jsonl") if record["kind"] == "round"]
    button = page.locator("#curves .updatemenu-button")
    button.nth(1).click()
    x = drawn(page)["curves"]["traces"][0]["x"]
    assert x[0] == 0
    assert x[-1] == pytest.approx(sum(r["bytes_up"] + r["bytes_down"] for r in records) / 1e6, rel=1e-5)
    assert page.locator("#curves .x2title").text_content() == "MB sent until then"
    button.nth(0).click()
    assert drawn(page)["curves"]["traces"][0]["x"] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_the_colours_follow_the_theme(opened: Open):
    page = opened("one", scheme="dark")
    label = "getComputedStyle(document.querySelector('#curves .xtick text, #curves .x2tick text')).fill"
    assert page.evaluate(label) == "rgb(232, 234, 236)"
    page.emulate_media(color_scheme="light")
    assert page.evaluate(label) == "rgb(27, 31, 36)"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_names_and_reasons_are_shown_and_never_obeyed(opened: Open):
    page = opened("failing")
    open_all(page)
    assert page.title() == "Report: failing"
    assert page.locator("img").count() == 0
    assert HOSTILE in page.locator("th", has_text="onerror").first.inner_text()
    labels = page.locator("#clients-0 .ytick text").all_text_contents()
    assert any("</script" in label for label in labels), "drawn as it is, shortened"
    page.locator("#clients-0 .points path").last.hover(force=True)
    assert page.locator(".plot a, .plot tspan[style*='bold']").count() == 0


@pytest.mark.slow
def test_a_picture_and_the_configuration_can_be_saved(opened: Open, tmp_path: Path):
    page = opened("one")
    page.hover("#curves .plot")
    with page.expect_download() as download:
        page.click("#curves .modebar-btn[data-title*='Download']")
    assert download.value.suggested_filename == "curves.svg"
    download.value.save_as(tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text("utf8").startswith("<svg")
    open_all(page)
    with page.expect_download() as download:
        page.click("a[download]")
    download.value.save_as(tmp_path / "het.toml")
    assert download.value.suggested_filename == "het.toml"
    assert '[method]\nname = "hetlora"' in (tmp_path / "het.toml").read_text("utf8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "several"])
def test_a_screen_reader_finds_its_way(opened: Open, name: str):
    page = opened(name)
    open_all(page)
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), "no level is left out"
    for landmark in ("header", "main", "footer"):
        assert page.locator(landmark).count() == 1
    missing = page.evaluate(
        """() => [...document.querySelectorAll("figure")].filter((f) => !(
            f.querySelector("figcaption p").textContent.length > 20 && f.querySelector(".plot[role=img][aria-label]")
            && (f.closest("details.run") || f.querySelector("details caption + thead + tbody tr"))
        )).map((f) => f.id)"""
    )
    assert missing == [], "every chart has a sentence and a name, and but for those of one run of several a table"
    ids = page.evaluate("[...document.querySelectorAll('[id]:not(svg *)')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    named_by = "[...document.querySelectorAll('[aria-labelledby]')].map((e) => e.getAttribute('aria-labelledby'))"
    assert set(page.evaluate(named_by)) <= set(ids)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_from_what_is_behind(opened: Open, scheme: str):
    page = opened("several", scheme=scheme)
    open_all(page)
    shown = page.evaluate(
        """() => {
            const text = [...document.querySelectorAll("p, h1, h2, h3, a, summary, td, th, caption, code, .tile span, dt, dd")]
                .filter((e) => e.offsetParent && e.getClientRects().length);
            const behind = (e) => { for (; e; e = e.parentElement) {
                const colour = getComputedStyle(e).backgroundColor;
                if (!/, 0\\)$/.test(colour)) return colour;
            } };
            const page = behind(document.body);
            const marks = [...document.querySelectorAll(".scatterlayer .point")].map((e) => getComputedStyle(e).stroke);
            const lines = [...document.querySelectorAll(".scatterlayer .js-line")].map((e) => getComputedStyle(e).stroke);
            return { text: text.map((e) => [getComputedStyle(e).color, behind(e)]),
                     labels: [...document.querySelectorAll(".plot text")].map((e) => [getComputedStyle(e).fill, page]),
                     lines: [...marks, ...lines].filter((c) => /^rgb\\(/.test(c)).map((c) => [c, page]) };
        }"""
    )
    assert len(shown["text"]) > 50
    assert len(shown["lines"]) > 20
    assert min(contrast(*pair) for pair in shown["text"]) >= 4.5
    assert min(contrast(*pair) for pair in shown["labels"]) >= 4.5
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
    assert {found["width"] for found in drawn(page).values()} == {660}
    assert page.evaluate("getComputedStyle(document.querySelector('#curves .plot text')).fill") == "rgb(27, 31, 36)"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_without_scripts_every_sentence_and_table_is_there(browser: Any, pages: dict[str, Path]):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["several"].as_uri())
    assert page.locator("details.run >> visible=true").count() == 3
    assert page.locator("figcaption p >> visible=true").count() >= 2
    assert page.locator("noscript p").is_visible()
    context.close()


@pytest.mark.slow
def test_the_smallest_phone_in_a_long_run(browser: Any, tmp_path: Path):
    """A page of many clients opens, and fits."""
    names = [f"a client with quite a long name, number {number:04d}" for number in range(1000)]
    rounds = [
        a_round(number, ranks=dict.fromkeys(names[number : number + 50], 8), clients={},
                weights={name: (1 + at % 2) / 75 for at, name in enumerate(names[number : number + 50])})
        for number in range(1, 501)
    ]  # fmt: skip
    folder = write_run(tmp_path / "r", measured(0, 9.0, names), *rounds, measured(500, 5.0, names))
    page = browser.new_context(viewport={"width": 320, "height": 640}).new_page()
    page.goto(write_report([folder], tmp_path / "long.html").as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    assert len(drawn(page)["clients-0"]["traces"][1]["x"]) + len(drawn(page)["clients-0"]["traces"][3]["x"]) == 60
    page.context.close()
