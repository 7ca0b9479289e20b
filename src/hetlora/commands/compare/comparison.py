"""A comparison: tune every method, run it over the seeds, keep finished runs, and write one table.

`grid` plans the runs, `workers` executes them, `statistics` computes the figures and `formats` writes them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hetlora._version import __version__
from hetlora.commands.compare.display import CompareDisplay
from hetlora.commands.compare.formats import print_table, to_csv, to_latex, to_markdown
from hetlora.commands.compare.grid import Comparison, PlannedMethod, PlannedRun
from hetlora.commands.compare.preconditions import check_comparison
from hetlora.commands.compare.statistics import MethodRow, notes, table
from hetlora.commands.compare.workers import (
    Outcome,
    Started,
    WorkerPool,
    read_result,
    run_sequentially,
)
from hetlora.errors import HetLoraError, expand_path
from hetlora.runs.folder import atomic_write_text, folder_lock
from hetlora.runs.records import plain
from hetlora.runs.text import figure

__all__ = ["ComparisonResult", "compare"]


@dataclass(frozen=True)
class ComparisonResult:
    """The result of a comparison.

    Attributes:
        folder: Folder of the comparison.
        results: The raw figures, as in `results.json`.
        rows: The table.
        notes: The notes below the table.
        kept: Runs that an earlier call had finished.
        failed: Runs that failed, or were not run because the method's tuning failed.
    """

    folder: Path
    results: Mapping[str, Any]
    rows: tuple[MethodRow, ...]
    notes: tuple[str, ...]
    kept: int
    failed: int

    def __str__(self) -> str:
        text = io.StringIO()
        print_table(self.rows, self.notes, self.results, text)
        return text.getvalue()

    def table(self) -> list[dict[str, Any]]:
        """Return one dictionary per method with all figures, for pandas and the like."""
        return [dataclasses.asdict(row) for row in self.rows]

    def report(self, output: os.PathLike[str] | str | None = None) -> Path:
        """Write the page of ``hetlora report`` to `output`, by default ``report.html`` in the folder; return its path.

        Raises:
            HetLoraError: The page cannot be written.
        """
        from hetlora.commands.report import write_report

        return write_report([self.folder], self.folder / "report.html" if output is None else expand_path(output))

    def summary(self) -> dict[str, Any]:
        """Return the object that ``hetlora compare --json`` prints."""
        return {"folder": str(self.folder), "kept": self.kept, "failed": self.failed, **self.results}


class _Execute(Protocol):
    def __call__(self, runs: Sequence[PlannedRun], started: Started) -> Iterator[Outcome]: ...


@dataclass
class _RunQueue:
    """The runs of one call of `compare`, with the reasons of failures by folder."""

    execute: _Execute
    display: CompareDisplay
    kept: int = 0
    reasons: dict[Path, str] = field(default_factory=dict)

    def do(self, runs: Sequence[PlannedRun], metric: str) -> None:
        """Execute the runs that are not finished, from their beginning."""
        missing = list({run.folder: run for run in runs if read_result(run.folder) is None}.values())
        self.kept += len(runs) - len(missing)
        for run in missing:
            shutil.rmtree(run.folder, ignore_errors=True)
        for run, reason in self.execute(missing, self.display.started):
            if reason is not None:
                self.reasons[run.folder] = reason
            self.display.ended(run, _headline(run, metric) if reason is None else f"FAILED: {reason}")

    def result_entry(self, run: PlannedRun, otherwise: str = "not run") -> dict[str, Any]:
        """Return the entry of a run in the results, with its figures or the reason of its failure."""
        figures = read_result(run.folder)
        return {
            "run": str(run),
            "label": run.label,
            "seed": run.seed,
            "learning_rate": run.learning_rate,
            "folder": run.folder.name,
            "failed": None if figures else self.reasons.get(run.folder, otherwise),
            "figures": figures,
        }


def compare(comparison: Comparison, display: CompareDisplay) -> ComparisonResult:
    """Run or resume a comparison; write its tables and raw results.

    Args:
        comparison: The plan, from `hetlora.commands.compare.grid.load_comparison`.
        display: Shows the progress.

    Raises:
        OSError: The tables cannot be written: the disk is full.
        HetLoraError: A precondition fails, the folder cannot be written, or another call is at work in it.
        KeyboardInterrupt: Ctrl-C; finished runs are kept.
    """
    folder = _expanded(comparison.folder)
    check_comparison(comparison)
    settings = comparison.settings
    tuning = [run for method in comparison.methods for run in method.tuning.values()]
    counted = len(comparison.methods) * len(settings.seeds)
    with _locked(folder), _executor(settings.jobs, folder) as execute, display:
        session = _RunQueue(execute, display)
        if note := _replaces(folder, comparison):
            display.say(note)
        finished = sum(read_result(run.folder) is not None for run in tuning)
        display.begin(len(tuning) + counted, finished, f"{len(tuning)} to tune, {counted} to count")
        session.do(tuning, settings.metric)
        chosen = _chosen(comparison.methods, settings.metric)
        finals = [run for method in comparison.methods for run in method.final.get(chosen[method.label] or 0.0, ())]
        display.go_on(sum(read_result(run.folder) is not None for run in finals), counted - len(finals))
        session.do(finals, settings.metric)
        results = _results(comparison, session, tuning, chosen)
        return _written(folder, results, session.kept)


def _replaces(folder: Path, comparison: Comparison) -> str | None:
    """Return a note if the folder's tables have runs that are no part of this comparison, which will replace them."""
    try:
        results = json.loads((folder / "results.json").read_text("utf8"))
        former = {run["folder"] for run in (*results["tuning"], *results["runs"])}
    except (OSError, ValueError, LookupError, TypeError):  # there are none, or none that can be read
        return None
    planned = {run.folder.name for method in comparison.methods for run in method.tuning.values()}
    planned |= {run.folder.name for method in comparison.methods for runs in method.final.values() for run in runs}
    others = former - planned
    return (
        f"the tables in {folder} will be replaced: {len(others)} of their {len(former)} runs are of another configuration or "
        "version. The runs are kept, and their own command writes their tables again; --set name=NAME takes another folder"
        if others
        else None
    )


def _expanded(folder: Path) -> Path:
    try:
        return expand_path(folder, strict=True)
    except RuntimeError as error:  # ~ of an unknown user
        raise HetLoraError(f"cannot write to {str(folder)!r}: {error}; set output to a folder you own") from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Create the folder and lock it against a second call."""
    with contextlib.ExitStack() as held:
        try:
            (folder / "runs").mkdir(parents=True, exist_ok=True)
            held.enter_context(
                folder_lock(folder, f"another hetlora compare is at work in {folder}; wait for it, or set name")
            )
        except (OSError, ValueError) as error:
            raise HetLoraError(f"cannot write to {str(folder)!r}: {error}; set output to a folder you own") from error
        yield


@contextlib.contextmanager
def _executor(jobs: int, folder: Path) -> Iterator[_Execute]:
    if jobs == 1:
        yield run_sequentially
    else:
        with WorkerPool(jobs, folder) as pool:
            yield pool.run


def _headline(run: PlannedRun, metric: str) -> str:
    figures = read_result(run.folder)
    value = figures["final"][metric] if figures else None
    return f"{metric} {figure(value, '.2f', missing='not finite')}"


def _chosen(methods: Sequence[PlannedMethod], metric: str) -> dict[str, float | None]:
    """Return every method's learning rate: its own best rate, or that of the method in `rate_of`."""
    own = {method.label: _best_rate(method, metric) for method in methods if method.rate_of is None}
    return {method.label: own[method.rate_of or method.label] for method in methods}


def _best_rate(method: PlannedMethod, metric: str) -> float | None:
    """Return the learning rate with the best validation metric, the first of equals; None if all runs failed."""
    if not method.tuning:
        return next(iter(method.final))
    judged = {rate: read_result(run.folder) for rate, run in method.tuning.items()}
    known = {
        rate: value for rate, figures in judged.items() if figures and (value := figures["final"][metric]) is not None
    }
    best = min if metric == "perplexity" else max
    return best(known, key=lambda rate: known[rate]) if known else None


def _results(
    comparison: Comparison, session: _RunQueue, tuning: Sequence[PlannedRun], chosen: Mapping[str, float | None]
) -> dict[str, Any]:
    """Return the raw figures of all runs, in the order of the file."""
    settings = comparison.settings
    finals = []
    for method in comparison.methods:
        rate = chosen[method.label]
        untuned = f"not run: no learning rate of {method.rate_of or method.label} gave a finite figure while tuning"
        for run in method.final[next(iter(method.final)) if rate is None else rate]:
            entry = session.result_entry(run)
            finals.append(entry if rate is not None else {**entry, **_UNRUN, "failed": untuned})
    return {
        "name": comparison.name,
        "hetlora": __version__,
        "metric": settings.metric,
        "target": settings.target,
        "reference": settings.reference,
        "seeds": settings.seeds,
        "methods": [
            {
                "label": method.label,
                "method": method.name,
                "learning_rate": chosen[method.label] if method.trains else None,
                "rate_of": method.rate_of,
            }
            for method in comparison.methods
        ],
        "tuning": [session.result_entry(run) for run in tuning],
        "runs": finals,
    }


_UNRUN: Mapping[str, Any] = {"figures": None, "learning_rate": None}


def _written(folder: Path, raw: dict[str, Any], kept: int) -> ComparisonResult:
    rows = table(raw)
    beside = notes(rows, raw)
    results = plain({**raw, "table": [dataclasses.asdict(row) for row in rows], "notes": beside})
    atomic_write_text(folder / "results.json", json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    atomic_write_text(folder / "table.md", to_markdown(rows, beside, raw))
    atomic_write_text(folder / "table.csv", to_csv(rows))
    atomic_write_text(folder / "table.tex", to_latex(rows, beside, raw))
    failed = sum(not run["figures"] for run in (*raw["tuning"], *raw["runs"]))
    return ComparisonResult(folder, results, tuple(rows), tuple(beside), kept, failed)
