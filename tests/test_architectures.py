"""Architectures go through the same harness as `make test-architectures`, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from proofs.architecture_checks import COLUMNS, Cell
from proofs.architecture_table import Row, models_page
from proofs.architectures import examine
from proofs.small_bases import VARIANTS, architectures, kinds_and_variants, small_config

# PEFT warns of what it adapts by itself, such as GPT-2's transposed layers; the figures are what is compared.
pytestmark = [pytest.mark.run, pytest.mark.filterwarnings("ignore")]

FIRST = ["gpt2", "gemma3"]
"""A Conv1D, and a base with grouped keys and a tower that no text meets."""

OTHERS = [
    *["bart", "bert", "bloom", "falcon", "gpt_neox", "jamba", "mamba", "mixtral", "modernbert-decoder"],
    *["opt", "phi3", "phi4_multimodal", "qwen2", "zamba"],
]
REFUSED = {
    ("mamba", "targets"): "no default target modules",
    ("mamba", "all-linear"): "Mamba-based models",
    ("zamba", "merged"): "share one weight",
}


@pytest.mark.parametrize("kind", [*FIRST, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)])
def test_an_architecture_is_right_in_every_column_or_refused(kind: str, tmp_path: Path) -> None:
    examined = examine(kind, "", tmp_path)
    assert not examined.unbuilt
    for column, cell in examined.cells.items():
        reason = REFUSED.get((kind, column))
        assert cell.state == ("ok" if reason is None else "refused"), (column, cell)
        assert reason is None or reason in cell.detail


def test_what_is_no_causal_model_is_refused_everywhere(tmp_path: Path) -> None:
    examined = examine("bert", "encoder", tmp_path, ["targets", "run", "plan"])
    assert {cell.state for cell in examined.cells.values()} == {"refused"}
    assert all("is not causal" in cell.detail for cell in examined.cells.values())


def test_every_variant_names_an_architecture_and_keeps_its_type() -> None:
    known = architectures()
    assert VARIANTS.keys() <= set(known)
    assert {small_config(kind, variant).model_type for kind, variant in kinds_and_variants(FIRST)} == set(FIRST)


def test_the_page_counts_what_is_right_refused_and_wrong() -> None:
    right = dict.fromkeys(COLUMNS, Cell("ok", "0e+00 apart"))
    rows = [
        Row("alpha", right),
        Row("beta/odd", {**right, "merged": Cell("refused", "they share_one <weight>")}),
        Row("gamma", {**right, "export": Cell("wrong", "0.5 apart")}),
        Row("delta", {}, "it needs a camera"),
    ]
    page = models_page(rows, COLUMNS)
    assert "Of 3 variants of 3 types, 1 are right in every column, 1 are refused\nin some column" in page
    assert "and 1 go wrong somewhere" in page
    assert "- `beta/odd`, merged: they share\\_one ‹weight›" in page
    assert "- `gamma`, export: 0.5 apart" in page
    assert "- `delta`: it needs a camera" in page
    [line] = [line for line in page.splitlines() if line.startswith("| `beta/odd`")]
    assert line.count("✓") == len(COLUMNS) - 1
    assert line.count("–") == 1
