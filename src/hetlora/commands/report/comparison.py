"""The table and the differences of a comparison, from its `results.json`: the figures of its `table.md`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetlora.commands.report.summary import Group, mean_and_std
from hetlora.runs.text import MISSING, many, several

if TYPE_CHECKING:
    from hetlora.commands.compare.statistics import MethodRow

__all__ = ["Compared", "read_comparison"]

LEAST_SEEDS = 3
"""Seeds below which the page draws no conclusion: a deviation of two figures says next to nothing."""


@dataclass(frozen=True)
class Compared:
    """A comparison as a page shows it.

    Attributes:
        name: Its name.
        lead: Its result in a sentence.
        columns: Heads of its table.
        rows: One row per method, the best mean first.
        notes: Notes below the table.
        reference: Label of the method whose perplexity the others' is compared with; None for another metric.
    """

    name: str
    lead: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]
    reference: str | None

    def ordered(self, groups: Sequence[Group]) -> list[Group]:
        """Return groups in the order of the table, each with the label that it has there."""
        place = {row[0]: at for at, row in enumerate(self.rows)}
        named = [replace(group, label=group.runs[0].label) for group in groups]
        return sorted(named, key=lambda group: place.get(group.label, len(place)))


def read_comparison(folder: Path) -> Compared | None:
    """Return the comparison of a folder; None if it has no table that can be read, as while it runs."""
    try:
        return _compared(json.loads((folder / "results.json").read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _compared(results: Mapping[str, Any]) -> Compared:
    from hetlora.commands.compare.formats import cells, header
    from hetlora.commands.compare.statistics import notes, paired, reference_of, table

    rows, columns, seeds = table(results), header(results), len(results["seeds"])
    if not rows:
        raise ValueError("a comparison of nothing")
    reference, lower = reference_of(rows, results), results["metric"] == "perplexity"
    pairs = paired(results, reference) if reference is not None else {}
    rows.sort(key=lambda row: (row.mean is None, (row.mean or 0.0) * (1 if lower else -1)))
    lines = []
    for row in rows:
        line = dict(zip(columns, cells(row), strict=True))
        line["difference"] = MISSING
        if row.label != reference:
            own_pairs = pairs.get(row.label, [])
            line["difference"] = _difference([own - other for own, other in own_pairs])
            if seeds < LEAST_SEEDS or 0 < len(own_pairs) < LEAST_SEEDS:
                line |= {"p": MISSING, "verdict": "too few seeds"}
        lines.append(line)
    first = ["method", columns[2], *(["difference", "p"] if reference is not None else []), "verdict"]
    shown = first + [
        name for name in columns if name not in (*first, "p") and any(line[name] != MISSING for line in lines)
    ]
    titles = {columns[2]: f"{columns[2]}, mean ± sd", "difference": f"minus {reference}, paired", "p": "p (Holm)"}
    return Compared(
        name=str(results["name"]),
        lead=_lead(rows, lines, columns[2], seeds, "lowest" if lower else "highest"),
        columns=[titles.get(name, name) for name in shown],
        rows=[[line[name] for name in shown] for line in lines],
        notes=[note for note in notes(rows, results) if seeds >= LEAST_SEEDS or not note.startswith("Compared with")],
        reference=reference if lower else None,
    )


def _difference(values: Sequence[float]) -> str:
    if not values:
        return MISSING
    point = mean_and_std(values)
    return (f"{point.mean:+.2f}" + (f" ± {point.std:.2f}" if point.std is not None else "")).replace("-", "−")


def _lead(rows: Sequence[MethodRow], lines: Sequence[Mapping[str, str]], metric: str, seeds: int, best: str) -> str:
    """Name the best mean, and say what the tests tell apart from the reference."""
    # A mean over fewer seeds may be good because hard seeds failed.
    first = min((row for row in rows if row.mean is not None), key=lambda row: -row.seeds, default=None)
    if first is None:
        return "No method has a finite mean."
    lead = f"{first.label} has the {best} mean {metric} over {many(first.seeds, 'seed')}: {first.mean:.2f}."
    if seeds < LEAST_SEEDS:
        return f"{lead} With {many(seeds, 'seed')} nothing can be told: a verdict needs {LEAST_SEEDS} or more."
    apart = [
        f"{line['method']} ({line['verdict']})" for line in lines if line["verdict"].startswith(("better", "worse"))
    ]
    return f"{lead} Told apart from the reference: {several(apart) if apart else 'none'}."
