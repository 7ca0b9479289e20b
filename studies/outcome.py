"""A study's outcome as one small JSON Lines file: enough for every table and figure, without the run folders.

The first line is the study: its configuration, its methods with the learning rate that each was given, and the versions. Each
other line is a run, one that counts or one that only tuned a learning rate.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hetlora.commands.compare.comparison import ComparisonResult
from hetlora.commands.report.summary import first_ranks, perplexities, ranks_over_rounds
from hetlora.core.adapter import Adapter
from hetlora.errors import HetLoraError
from hetlora.model.peft_files import read_adapter
from hetlora.runs.folder import atomic_write_text
from hetlora.runs.reader import Run, final_ranks, read_run
from hetlora.runs.records import plain
from studies.study import Study

__all__ = ["Outcome", "outcome_lines", "read_outcome", "slot_sizes", "write_outcome"]

DIGITS = 6
"""Significant digits that are kept: seeds differ in the third."""

Outcome = Mapping[str, Any]
"""A study's first line with its `runs` and its `tuning`: what `hetlora.commands.compare.statistics.table` takes."""

_COLUMNS = ("round", "perplexity", "bytes_up", "bytes_down")


def outcome_lines(study: Study, result: ComparisonResult) -> Iterator[dict[str, Any]]:
    """Yield the study, and then every run of it."""
    raw = result.results
    versions = next((run["figures"].get("versions") for run in raw["runs"] if run["figures"]), None)
    yield {
        "kind": "study",
        "study": study.name,
        "question": study.settings.question,
        **{key: raw[key] for key in ("hetlora", "metric", "target", "reference", "seeds", "methods")},
        "versions": versions,
        "config": study.document,
    }
    for kind in ("runs", "tuning"):
        for entry in raw[kind]:
            folder = result.folder / "runs" / entry["folder"]
            yield {"kind": kind, **_run(entry, folder, whole=kind == "runs")}


def write_outcome(study: Study, result: ComparisonResult, path: Path) -> None:
    """Write the lines.

    Raises:
        HetLoraError: The records of a run cannot be read.
        OSError: The file cannot be written.
    """
    lines = (json.dumps(_short(plain(line)), ensure_ascii=False) for line in outcome_lines(study, result))
    atomic_write_text(path, "".join(f"{line}\n" for line in lines))


def read_outcome(path: Path) -> Outcome:
    """Read what `write_outcome` wrote.

    Raises:
        HetLoraError: The file cannot be read, or is none of these.
    """
    try:
        head, *lines = [json.loads(line) for line in path.read_text("utf8").splitlines()]
        runs: dict[str, list[dict[str, Any]]] = {"runs": [], "tuning": []}
        for line in lines:
            runs[line["kind"]].append(_expanded(line))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HetLoraError(
            f"{str(path)!r} is no file of a study's runs: {error}; hetlora reproduce writes one"
        ) from error
    return {**head, **runs}


def _run(entry: Mapping[str, Any], folder: Path, *, whole: bool) -> dict[str, Any]:
    """Return one run; its rounds as columns, which take a third of the room of rows."""
    figures = entry["figures"]
    if figures is None:
        return dict(entry)
    if not whole:
        return {**entry, "figures": {key: figures[key] for key in ("base", "final", "seconds")}}
    rounds = {name: [record[name] for record in figures["rounds"]] for name in _COLUMNS}
    kept = {key: value for key, value in figures.items() if key not in ("rounds", "versions", "ranks")}
    # Only their mean and its share of the base are shown, and those of a hundred clients are long.
    kept["trainable_parameters"] = {"mean": statistics.fmean(figures["trainable_parameters"].values() or [0])}
    run = read_run(folder)
    return {**entry, "figures": {**kept, "rounds": rounds, "ranks": final_ranks(run), **_more(run, folder)}}


def _more(run: Run, folder: Path) -> dict[str, Any]:
    """Return what figures show beyond the comparison's table."""
    first = first_ranks(run)
    by_client = ranks_over_rounds(run, list(first))
    shares = [
        [item.ranks[client], share * len(item.weights)]
        for item in run.rounds
        for client, share in item.weights.items()
        if client in item.ranks
    ]
    return {
        "loss": [item.loss for item in run.rounds],
        "first_ranks": first,
        "mean_rank": [statistics.fmean(ranks) for ranks in zip(*by_client.values(), strict=True)],
        "shares": shares,
        "tiers": {
            when: {name: tier["perplexity"] for name, tier in scores.tiers.items()}
            for when, scores in (("base", run.base), ("final", run.final))
            if scores is not None
        },
        "clients": dict(perplexities(run.final)),
        "slots": slot_sizes(read_adapter(folder / "adapter").adapter) if (folder / "adapter").is_dir() else None,
    }


def slot_sizes(adapter: Adapter) -> list[float]:
    """Return the size of every slot, `sqrt(Σ_modules (‖B[:, i]‖ ‖A[i]‖)²)`.

    Example:
        >>> from hetlora.core.adapter import LoraPair
        >>> slot_sizes({"m": LoraPair(torch.tensor([[3.0], [0.0]]), torch.tensor([[2.0, 1.0]]))})
        [6.0, 0.0]
    """
    widest = max(A.shape[0] for A, _ in adapter.values())
    squares = torch.zeros(widest, dtype=torch.float64)
    for A, B in adapter.values():
        norms = torch.linalg.vector_norm(A.double(), dim=1) * torch.linalg.vector_norm(B.double(), dim=0)
        squares[: len(norms)] += norms.square()
    return [float(size) for size in squares.sqrt()]


def _expanded(line: dict[str, Any]) -> dict[str, Any]:
    figures = line["figures"]
    if figures is None or "rounds" not in figures:
        return line
    columns: Sequence[Sequence[Any]] = [figures["rounds"][name] for name in _COLUMNS]
    rows = [dict(zip(_COLUMNS, values, strict=True)) for values in zip(*columns, strict=True)]
    return {**line, "figures": {**figures, "rounds": rows}}


def _short(value: Any) -> Any:
    """Return plain data with its fractions rounded to so many significant digits.

    Example:
        >>> _short({"loss": 1.23456789, "bytes": 123456789})
        {'loss': 1.23457, 'bytes': 123456789}
    """
    if isinstance(value, Mapping):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
