"""What a chart is: plain data for plotly, a sentence that says what is seen, and its data as a table.

Colours stand in it as tokens, ``"@0"`` to ``"@7"`` and ``"@text"``, or with a transparency ``"@0:0.2"``: the page has two
themes and puts in those of the one shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hetlora.commands.report.summary import Point
from hetlora.runs.text import in_chart

__all__ = [
    "DASHES",
    "SYMBOLS",
    "Cell",
    "Chart",
    "Table",
    "Trace",
    "View",
    "axis_of_counts",
    "axis_of_names",
    "colour",
    "dots",
    "log_axis",
    "offsets",
    "rounded",
    "x_of_rounds",
]

COLOURS = 8
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "triangle-down", "x")
Cell = str | int | float | None
Trace = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Figures in rows; text in them is as it came, and not escaped."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class View:
    """Another way to look at a chart: other x for each of its traces, and another axis."""

    label: str
    x: Sequence[Sequence[float]]
    axis: Mapping[str, Any]


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        name: Of its element and its files.
        title: Heading.
        sentence: What is seen, with figures.
        traces: Plotly's, with tokens for colours.
        layout: Plotly's, without what all charts share.
        table: Its data.
        views: Ways to look at it, the first shown at the beginning; none where there is one alone.
        height: In pixels.
        labels: Of an axis of names, the names as they are on a narrow screen.
    """

    name: str
    title: str
    sentence: str
    traces: Sequence[Trace]
    layout: Mapping[str, Any]
    table: Table
    views: Sequence[View] = ()
    height: int = 360
    labels: Sequence[str] = field(default_factory=tuple)


def rounded(value: float | None) -> float | None:
    """Return a figure with six digits that count: a page is no place for sixteen, and the records have them."""
    return None if value is None else float(f"{value:.6g}")


def log_axis(title: str, values: Sequence[float]) -> dict[str, Any]:
    """Return an axis for figures, logarithmic where they lie far apart."""
    wide = bool(values) and min(values) > 0 and max(values) > 20 * min(values)
    if not wide:
        return {"title": {"text": title}}
    return {
        "title": {"text": f"{title} (log scale)"},
        "type": "log",
        "dtick": "D2" if max(values) < 1e3 * min(values) else 1,
    }


def x_of_rounds(rounds: Sequence[int]) -> dict[str, Any]:
    """Return the axis of rounds, which has no halves."""
    return {"title": {"text": "round"}, **_whole(max(rounds) - min(rounds) if rounds else 0)}


def axis_of_counts(title: str, most: float) -> dict[str, Any]:
    """Return an upright axis of things counted, from none."""
    return {"title": {"text": title}, "rangemode": "tozero", **_whole(most)}


def _whole(length: float) -> dict[str, Any]:
    return {"dtick": 1} if length <= 12 else {"tickformat": ",d"}


def axis_of_names(labels: Sequence[str]) -> dict[str, Any]:
    """Return an upright axis of names, the first on top; places are numbers, since shortened names may be alike."""
    return {
        "tickmode": "array",
        "tickvals": list(range(len(labels))),
        "ticktext": list(labels),
        "range": [len(labels) - 0.5, -0.5],
        "zeroline": False,
    }


def offsets(count: int) -> list[float]:
    """Return how far marks at one place stand apart, so that none hides another."""
    return [round(0.5 * (index / (count - 1) - 0.5), 3) for index in range(count)] if count > 1 else [0.0]


def colour(index: int, transparency: float | None = None) -> str:
    """Return the token of a line's colour, with a transparency where one is given."""
    return f"@{index % COLOURS}" if transparency is None else f"@{index % COLOURS}:{transparency}"


def dots(label: str, index: int, points: Sequence[tuple[float, Point | None]]) -> Trace:
    """Return a trace with a mark for each place that has a figure, and its standard deviation as a line."""
    known = [(place, point) for place, point in points if point is not None]
    deviations = [rounded(point.std) for _, point in known]
    trace: Trace = {
        "type": "scatter",
        "mode": "markers",
        "name": in_chart(label),
        "x": [rounded(point.mean) for _, point in known],
        "y": [place for place, _ in known],
        "marker": {"color": colour(index), "size": 11, "symbol": SYMBOLS[index % len(SYMBOLS)]},
        "hovertemplate": "%{x:.4f}",
    }
    if any(deviations):
        trace["error_x"] = {"type": "data", "array": [value or 0 for value in deviations], "color": colour(index)}
    return trace
