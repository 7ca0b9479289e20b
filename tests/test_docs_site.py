"""The documentation site builds offline and without warnings, and contains what it should."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

import hetlora

pytestmark = [pytest.mark.slow, pytest.mark.document]

pytest.importorskip("sphinx", reason="needs hetlora[docs]")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built by the line of `make docs`."""
    folder = tmp_path_factory.mktemp("site")
    recipe = (ROOT / "Makefile").read_text("utf8").partition("\ndocs:")[2].splitlines()[1]
    program, *arguments = shlex.split(recipe)
    assert program == "$(BIN)/python"
    arguments = [argument.replace("build/", f"{folder}/") for argument in arguments]
    assert {"-W", "-n"} <= set(arguments), "warnings are errors, and a name that leads nowhere is one"
    arguments += ["-D", "nb_execution_mode=off"]  # tests/test_notebooks.py executes them, one by one
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip()
    return folder / "docs"


class Asked(HTMLParser):
    """What a page asks for by itself when it is opened: scripts, styles, images."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.places.append(own.get("src") or "")
        if tag == "link" and own.get("rel") not in ("author", "index", "search", "next", "prev", "canonical"):
            self.places.append(own.get("href") or "")


def test_every_page_is_in_it(site: Path):
    pages = {
        path.with_suffix(".html") for pattern in ("*.md", "*.rst", "*.ipynb") for path in (ROOT / "docs").rglob(pattern)
    }
    for page in pages:
        assert (site / page.relative_to(ROOT / "docs")).is_file(), page


def test_no_page_asks_another_host_for_anything(site: Path):
    sources = sorted((site / "_modules").rglob("*.html"))[:2]  # of one kind, and many
    for page in (*site.glob("*.html"), *site.glob("api/*.html"), *site.glob("notebooks/*.html"), *sources):
        asked = Asked()
        asked.feed(page.read_text("utf8"))
        assert asked.places
        assert not [place for place in asked.places if re.match(r"(\w+:)?//", place)], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(\W?(https?:)?//", style.read_text("utf8")), style.name


def test_pages_of_the_root_are_whole_and_link_to_the_site(site: Path):
    for page, words in (
        ("security", "What a run leaks"),
        ("contributing", "Adding a method"),
        ("changelog", "not released yet"),
    ):
        text = (site / f"{page}.html").read_text("utf8")
        assert words in text
        assert "This page of the site is the text of" not in text
    assert 'href="security.html"' in (site / "reliability.html").read_text("utf8").partition("<article")[2]
    assert 'href="reliability.html"' in (site / "changelog.html").read_text("utf8").partition("<article")[2]


def test_every_public_name_is_in_the_reference(site: Path):
    """The list of names that Sphinx writes for other projects: its first four lines are in plain text."""
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    described = {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}
    for name in hetlora.__all__:
        home = f"hetlora.methods.{name}" if name == "METHODS" else f"{hetlora._MODULE_OF[name]}.{name}"
        value = getattr(hetlora, name)
        places = {home, f"{getattr(value, '__module__', '')}.{name}"}
        assert places & described, name


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.process
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_search_finds_a_heading_first(site: Path):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto((site / "search.html").as_uri() + "?q=out+of+memory")
        first = page.locator("#search-results li a").first
        assert first.inner_text(timeout=60_000) == "Troubleshooting > Out of memory"
        browser.close()
