"""A study's tables: some methods of its comparison, each tested against one of them, as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hetlora.commands.compare.formats import cells, header
from hetlora.commands.compare.statistics import MethodRow, notes, table
from studies.outcome import Outcome
from studies.study import TableEntry

__all__ = ["chosen", "markdown_table"]

COLUMNS = (
    "method",
    "learning rate",
    "rounds to target",
    "MB to target",
    "trained",
    "final rank",
    "pruned",
    "MB up",
    "MB down",
)
"""Shown beside the metric, its difference and the test."""

OF_THE_LAST_ROUND = {"final rank", "pruned"}
"""Columns of the whole run, which an earlier round's table leaves out."""


def chosen(outcome: Outcome, labels: Sequence[str], reference: str | None = None) -> dict[str, Any]:
    """Return the outcome of these methods alone; corrections of the tests are for as many as are left.

    Args:
        outcome: The outcome of the whole study.
        labels: Of the methods, in the order they are shown in.
        reference: The one the others are tested against; None for the best mean.
    """
    methods = {entry["label"]: entry for entry in outcome["methods"]}
    own = [run for label in labels for run in outcome["runs"] if run["label"] == label]
    judges = {methods[label].get("rate_of") or label for label in labels}
    tuning = [run for run in outcome["tuning"] if run["label"] in judges]
    picked = {"methods": [methods[label] for label in labels], "runs": own, "tuning": tuning}
    return {**outcome, **picked, "reference": reference}


def markdown_table(outcome: Outcome, entry: TableEntry) -> str:
    """Return the table with its title and notes."""
    own = chosen(outcome, entry.methods, entry.reference)
    if entry.round is not None or entry.mean != "tokens":
        own |= {
            "runs": [_judged(run, entry) for run in own["runs"]],
            "target": None,
        }  # which is of the usual perplexity
    rows = table(own)
    names = header(own)
    answers = any(run["figures"] and run["figures"]["final"]["rougeL"] is not None for run in own["runs"])
    metric = names[2]
    left_out = OF_THE_LAST_ROUND if entry.round is not None else set()
    shown = [name for name in COLUMNS[2:] if name not in left_out and _some(rows, names, name)]
    rouge = ["ROUGE-L"] if answers and metric != "ROUGE-L" else []
    head = ["method", "learning rate", metric, "difference", "p", *rouge, *shown]
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for row in rows:
        cell = dict(zip(names, cells(row), strict=True))
        verdict = "reference" if row.verdict == "reference" else cell["p"]
        values = [cell["method"], cell["learning rate"], cell[metric], _difference(own, row, rows), verdict]
        values += [_rouge(own, row.label)] if rouge else []
        lines.append(_line([*values, *(cell[name] for name in shown)]))
    beside = [f"- {' '.join(note.split())}" for note in (*_kind_of_mean(entry), *notes(rows, own))]
    return "\n".join([f"**{entry.title}**", "", *lines, "", *beside]).rstrip() + "\n"


def _judged(run: Mapping[str, Any], entry: TableEntry) -> Mapping[str, Any]:
    """Return a run cut at the table's round, with the perplexity of the table's mean."""
    figures = run["figures"]
    if figures is None:
        return run
    if entry.mean == "clients":
        return {**run, "figures": {**figures, "final": {"perplexity": _mean_of_clients(figures), "rougeL": None}}}
    rounds = [record for record in figures["rounds"] if record["round"] <= (entry.round or 0)]
    if not rounds:  # nobody trains: what holds at the end held then
        return {**run, "figures": {**figures, "final": {**figures["final"], "rougeL": None}}}
    sent = {key: sum(record[key] for record in rounds) for key in ("bytes_up", "bytes_down")}
    final = {"perplexity": rounds[-1]["perplexity"], "rougeL": None}
    return {**run, "figures": {**figures, **sent, "rounds": rounds, "final": final}}


def _mean_of_clients(figures: Mapping[str, Any]) -> float | None:
    """Return the geometric mean over the clients; None where one is not finite, which `clients` leaves out."""
    logs = [math.log(value) for value in figures["clients"].values()]
    return math.exp(statistics.fmean(logs)) if logs and figures["final"]["perplexity"] is not None else None


def _kind_of_mean(entry: TableEntry) -> list[str]:
    """Explain a table's perplexity if it is not that over all scored tokens after the last round."""
    said = [] if entry.mean == "tokens" else ["Perplexity: the geometric mean over the clients, which all count alike."]
    return said if entry.round is None else [*said, f"Perplexity, and bytes until then, after round {entry.round}."]


def _some(rows: Sequence[MethodRow], names: Sequence[str], name: str) -> bool:
    """Whether a column has any value."""
    return any(cells(row)[names.index(name)] != "—" for row in rows)


def _line(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", r"\|") for value in values) + " |"


def _difference(own: Mapping[str, Any], row: MethodRow, rows: Sequence[MethodRow]) -> str:
    """Return the mean difference from the reference over the seeds that both finished, in percent of the reference."""
    reference = next((other for other in rows if other.verdict == "reference"), None)
    if reference is None or row is reference:
        return "—"
    finals = {
        label: {
            run["seed"]: run["figures"]["final"][own["metric"]]
            for run in own["runs"]
            if run["label"] == label and run["figures"]
        }
        for label in (row.label, reference.label)
    }
    both = [
        seed for seed, value in finals[row.label].items() if value is not None and finals[reference.label].get(seed)
    ]
    if not both:
        return "—"
    shares = [finals[row.label][seed] / finals[reference.label][seed] - 1.0 for seed in both]
    return f"{sum(shares) / len(shares):+.2%}"


def _rouge(own: Mapping[str, Any], label: str) -> str:
    found = [run["figures"]["final"]["rougeL"] for run in own["runs"] if run["label"] == label and run["figures"]]
    known = [value for value in found if value is not None]
    return f"{sum(known) / len(known):.2f}" if known else "—"
