"""Run a study and write its records, tables and figures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hetlora.commands.compare.comparison import compare
from hetlora.commands.compare.display import CompareDisplay
from hetlora.errors import HetLoraError
from hetlora.runs.folder import atomic_write_text
from studies.figures import draw, need_matplotlib
from studies.outcome import Outcome, read_outcome, write_outcome
from studies.study import Study
from studies.tables import markdown_table

__all__ = ["RUNS", "Reproduction", "reproduce", "shown_again"]

RUNS = "runs.jsonl"


@dataclass(frozen=True)
class Reproduction:
    """The results of a study.

    Attributes:
        folder: With `runs.jsonl`, a Markdown file for every table and an SVG file for every figure.
        files: All of them.
        text: The tables.
        failed: Number of failed runs.
        kept: Number of runs finished by an earlier call.
    """

    folder: Path
    files: tuple[Path, ...]
    text: str
    failed: int
    kept: int

    def summary(self) -> dict[str, Any]:
        """Return the object that ``hetlora reproduce --json`` prints."""
        files = [str(path) for path in self.files]
        return {"folder": str(self.folder), "files": files, "failed": self.failed, "kept": self.kept}


def reproduce(study: Study, folder: Path, display: CompareDisplay) -> Reproduction:
    """Run a study, or go on with it, and write what it shows.

    Args:
        study: From `studies.study.load_study`.
        folder: Where records, tables and figures go; what an earlier call wrote is replaced.
        display: Shows the progress.

    Raises:
        HetLoraError: matplotlib is not installed, the data do not allow it, or the folder cannot be written.
        KeyboardInterrupt: Ctrl-C; finished runs are kept.
    """
    need_matplotlib()
    _make(folder)  # before hours of work, and not after them
    result = compare(study.comparison, display)
    write_outcome(study, result, folder / RUNS)
    return replace(shown_again(study, folder), kept=result.kept)


def shown_again(study: Study, folder: Path) -> Reproduction:
    """Write tables and figures from the records in a folder, without running anything.

    Raises:
        HetLoraError: The records cannot be read, or lack what the study shows; or matplotlib is not installed.
        OSError: A file cannot be written.
    """
    outcome = read_outcome(folder / RUNS)
    _check_complete(outcome, study, folder / RUNS)
    failed = sum(run["figures"] is None for run in (*outcome["runs"], *outcome["tuning"]))
    tables = {folder / f"{entry.name}.md": markdown_table(outcome, entry) for entry in study.settings.tables}
    figures = {folder / f"{entry.name}.svg": draw(outcome, entry) for entry in study.settings.figures}
    for path, text in (tables | figures).items():
        atomic_write_text(path, text)
    files = (folder / RUNS, *tables, *figures)
    return Reproduction(folder, files, "\n".join(tables.values()), failed, kept=0)


def _check_complete(outcome: Outcome, study: Study, path: Path) -> None:
    """Refuse records without a method that a table or figure shows: of a study that has changed since they were made."""
    there = {method["label"] for method in outcome["methods"]}
    tuned = {run["label"] for run in outcome["tuning"]}
    missing = {label for entry in (*study.settings.tables, *study.settings.figures) for label in entry.methods} - there
    missing |= {label for entry in study.settings.figures if entry.kind == "rates" for label in entry.methods} - tuned
    if missing:
        raise HetLoraError(
            f"{str(path)!r} has no runs of {', '.join(map(repr, sorted(missing)))}, or none that tuned them: the study has "
            f"changed since; hetlora reproduce {study.name} makes it again"
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise HetLoraError(f"cannot write to {str(folder)!r}: {error}; set --output to a folder you own") from error
