"""The notebooks run from top to bottom, and the site shows what they print and draw without a network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs hetlora[docs]")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
pytestmark = pytest.mark.document

SHOWN = {"text/plain", "text/html", "text/markdown"}
"""Types of output that the site of `test_the_site_shows_outputs_without_a_network` has shown."""


def cells(notebook: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(notebook.read_text("utf8"))["cells"] if cell["cell_type"] == kind]


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with kernels that have this package, no network and no configuration of the person's own."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    for name, value in {
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "PLOTLY_RENDERER": "sphinx_gallery",
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }.items():
        monkeypatch.setenv(name, value)
    (folder := tmp_path / "work").mkdir()
    return folder


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.large
@pytest.mark.filterwarnings("default")  # Jupyter's own
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, kernels: Path):
    """An error of a cell, and an `assert` in it that does not hold, is an error of the test."""
    from nbclient import NotebookClient

    content = nbformat.read(notebook, as_version=4)
    NotebookClient(content, timeout=900, resources={"metadata": {"path": str(kernels)}}).execute()
    outputs = [output for cell in content.cells for output in cell.get("outputs", [])]
    kinds = [set(output["data"]) for output in outputs if "data" in output]
    assert kinds
    assert all(kind & SHOWN for kind in kinds)


def test_every_notebook_is_on_the_page_of_notebooks_and_asserts_something():
    page = (ROOT / "docs/notebooks/index.md").read_text("utf8")
    linked = set(re.findall(r"\]\((\w+\.ipynb)\)", page))
    assert linked == {path.name for path in NOTEBOOKS} == set(re.findall(r"\{download\}`(\w+\.ipynb)`", page))
    for notebook in NOTEBOOKS:
        assert any("assert " in "".join(cell["source"]) for cell in cells(notebook, "code")), notebook.name


def test_no_output_is_committed():
    for notebook in NOTEBOOKS:
        for cell in cells(notebook, "code"):
            assert (cell["outputs"], cell["execution_count"]) == ([], None), f"{notebook.name}: clear all outputs"


def test_no_link_of_a_notebook_leads_nowhere():
    for notebook in [*NOTEBOOKS, ROOT / "docs/notebooks/index.md"]:
        for link in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", notebook.read_text("utf8")):
            assert (notebook.parent / link).exists(), f"{notebook.name}: {link}"


# The site -----------------------------------------------------------------------------------------------------------

CELL = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
FIGURE = r"""
import plotly.graph_objects as go
from IPython.display import Markdown, display
display(Markdown("| drawn |\n| --- |\n| below |"))
go.Figure(go.Bar(y=[1, 2]))
"""


def build(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Build a site of one notebook with the settings of the docs."""
    text = {"cell_type": "markdown", "metadata": {}, "source": "# Drawn\n\n$$p_k = \\frac{1}{K}$$\n\nand $x$."}
    content = {
        "cells": [text | {"id": "a"}, CELL | {"id": "b", "source": code}],
        "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (folder / "source/notebooks").mkdir(parents=True)
    (folder / "source/notebooks/drawn.ipynb").write_text(json.dumps(content), encoding="utf8")
    (folder / "source/index.md").write_text("# Site\n\n```{toctree}\nnotebooks/drawn\n```\n", encoding="utf8")
    options = ["-W", "-q", "-c", str(ROOT / "docs"), "-d", str(folder / "doctrees")]
    return subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(folder / "source"), str(folder / "site")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.process
def test_the_site_shows_outputs_without_a_network(tmp_path: Path):
    done = build(tmp_path, FIGURE)
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip()
    page = (tmp_path / "site/notebooks/drawn.html").read_text("utf8")
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=[\"'](?:\w+:)?//[^\"']*", page)
    assert page.count("plotly.min.js") == 1
    assert (tmp_path / "site/_static/plotly.min.js").is_file()
    assert "Plotly.newPlot" in page
    assert re.search(r"<td>\s*<p>below</p>", page), "a table in Markdown"
    assert page.count("<math") == 2


@pytest.mark.slow
@pytest.mark.process
def test_the_site_is_not_built_where_a_notebook_raises(tmp_path: Path):
    done = build(tmp_path, "assert 1 + 1 == 3, 'wrong'")
    assert done.returncode != 0
    assert "AssertionError: wrong" in re.sub(r"\x1b\[[\d;]*m", "", done.stderr)


# Why ----------------------------------------------------------------------------------------------------------------


def test_every_measured_figure_of_why_is_in_the_results():
    """Figures of papers stand in lines that cite them; all others are in a table of results or printed by a command."""
    from_papers = {"53.93", "80.51", "307.96", "73.01", "86.91", "45.41", "68.53", "92.02", "70.67"}
    page = re.sub(r"arXiv\s+\d{4}\.\d{5}", "", (ROOT / "docs/why.md").read_text("utf8"))
    figures = set(re.findall(r"(?<![\w.])\d+\.\d+(?:e-\d+)?", page))
    files = [*sorted((ROOT / "results").glob("*/*.md")), ROOT / "docs/exactness.md", ROOT / "docs/costs.md"]
    measured = set(re.findall(r"\d+\.\d+(?:e-\d+)?", "\n".join(file.read_text("utf8") for file in files)))
    assert figures - measured == from_papers | {"5.8"}
