"""Every block of the docs pages is run or parsed by its reader, and its output compared."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from doc_blocks import ROOT, Block, Page, blocks_of, commands_of
from doc_commands import ONLY_READ, check_command, only_read
from hetlora import cli, errors
from hetlora.api import ENGINES
from hetlora.core.codecs import CODECS
from hetlora.runs.tracking import TRACKERS

pytestmark = pytest.mark.document

PAGES = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
DATA = "docs/data.md"


@pytest.fixture(scope="module")
def workspace(short_demo: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages speak of: the examples, the demonstration's run, and the files of docs/data.md."""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copytree(Path(short_demo["records"]).parent, folder / "runs/demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        Page(folder).run([block for block in blocks_of(DATA) if block.text.startswith(("import json", "# mine.toml"))])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_a_page_runs(page: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True)
    for other in ("het", "het-2", "local"):  # docs/report.md puts several runs side by side
        shutil.copytree(tmp_path / "runs/demo", tmp_path / "runs" / other)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with mock.patch.dict(TRACKERS), mock.patch.dict(CODECS), mock.patch.dict(ENGINES):  # pages add some
        Page(tmp_path).run(blocks_of(page))


@pytest.mark.parametrize("page", ["README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_commands_of_a_page_of_the_root_are_there(page: str, tmp_path: Path):
    """tests/test_readme.py runs the README; here its commands are read, as are those of pages that have none yet."""
    blocks = blocks_of(page)
    assert {block.language for block in blocks} <= {"console", "sh", "python", "toml"}
    assert page == "README.md" or not blocks, "run them"
    for block in blocks:
        for command, _ in commands_of(block) if is_commands(block) else ():
            words = shlex.split(command, comments=True)
            if check_command(command, words, tmp_path, run=False) is None:
                cli._parser().parse_args(words[1:])


def test_what_is_only_read_is_on_a_page():
    shown = [block for page in [*PAGES, "README.md"] for block in blocks_of(page)]
    begins = {only_read(command) for block in shown if is_commands(block) for command, _ in commands_of(block)}
    assert set(ONLY_READ) == begins - {None}


def is_commands(block: Block) -> bool:
    return block.language in ("console", "sh")


def test_no_link_of_a_page_leads_nowhere():
    for page in [*PAGES, "README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"]:
        text = (ROOT / page).read_text("utf8")
        for link in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text):
            assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"


# Pages that list what the code has --------------------------------------------------------------------------------


def listed(page: str, heading: str, which: int = 0) -> list[str]:
    """Return the names in the first column of a table below a heading."""
    _, found, section = (ROOT / page).read_text("utf8").partition(f"\n{heading}\n")
    assert found, heading
    tables = re.findall(r"^\| -.*\n((?:\|.*\n)+)", section, flags=re.MULTILINE)
    return [re.split(r" \| ", row)[0].strip("| ").strip("`") for row in tables[which].splitlines()]


def test_every_field_of_a_record_is_explained():
    from hetlora.runs.records import EvaluationRecord, RoundRecord, RunRecord

    for kind in (RunRecord, RoundRecord, EvaluationRecord):
        fields = [one.name for one in dataclasses.fields(kind)]
        name = kind.__name__.removesuffix("Record").lower()
        assert listed("docs/records.md", f'## `records.jsonl`: `kind = "{name}"`') == fields


def test_every_figure_within_a_record_is_explained(workspace: Path):
    from hetlora.flower.session import Network
    from hetlora.runs.records import read_records

    kinds = {record["kind"]: record for record in read_records(workspace / "runs/demo/records.jsonl")}
    client = list(next(iter(kinds["round"]["clients"].values())))
    assert listed("docs/records.md", '## `records.jsonl`: `kind = "round"`', 1) == [*client, "bounded"]
    sent = set(re.findall(r'"(\w+)"(?::|\] =)', source_of(Network.annotate)))
    assert set(listed("docs/records.md", '## `records.jsonl`: `kind = "round"`', 2)) == sent
    figures = list(kinds["evaluation"]["overall"])
    assert listed("docs/records.md", '## `records.jsonl`: `kind = "evaluation"`', 1) == figures


def source_of(function: object) -> str:
    import inspect

    return inspect.getsource(function)  # type: ignore[arg-type]


def test_every_field_of_a_summary_is_explained(workspace: Path):
    from hetlora import open_run

    summary = open_run(workspace / "runs/demo").summary()
    assert summary is not None
    assert listed("docs/records.md", "## `summary.json`") == list(summary)


def test_every_column_of_a_comparison_is_explained():
    from hetlora.commands.compare.formats import header
    from hetlora.commands.compare.statistics import MethodRow

    columns = header({"metric": "perplexity"})
    shown = listed("docs/records.md", "## A comparison's table")
    assert [name.split("`")[0] for name in shown] == columns
    assert listed("docs/records.md", "## A comparison's table", 1) == [
        one.name for one in dataclasses.fields(MethodRow)
    ]


def test_every_error_has_its_example_and_its_cure():
    page = (ROOT / "docs/troubleshooting.md").read_text("utf8")
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", page, flags=re.MULTILINE | re.DOTALL))
    kinds = {name for name in errors.__all__ if isinstance(getattr(errors, name), type)}
    assert sections.keys() == kinds
    for name, text in sections.items():
        assert "**Raised by**" in text, name
        assert "**Cure.**" in text, name
        assert re.search(rf"^(hetlora: |hetlora\.errors\.{name}: )", text, flags=re.MULTILINE), name
