"""Charts as data: traces and layout for plotly, a sentence that describes the chart, and its data as a table.

Colours are tokens, ``"@0"`` to ``"@7"`` and ``"@text"``, or with an opacity ``"@0:0.2"``. The page's script replaces them by
the colours of the current theme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hetlora.commands.report.summary import Point
from hetlora.runs.text import in_chart

__all__ = [
    "DASHES",
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
    "scatter",
    "symbol",
    "x_of_rounds",
]

COLOURS = 8
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "triangle-down", "x")
Cell = str | int | float | None
Trace = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table; its text is not escaped yet."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class View:
    """An alternative horizontal axis of a chart, with the x of each trace."""

    label: str
    x: Sequence[Sequence[float]]
    axis: Mapping[str, Any]


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        name: Id of its element, and name of its files.
        title: Heading.
        sentence: Describes the chart, with figures.
        traces: Plotly's, with tokens for colours.
        layout: Plotly's, without the settings that all charts share.
        table: Its data.
        views: Alternative axes, the initial one first; empty if there is no choice.
        height: In pixels.
        labels: The names of an axis of names, shortened for a narrow screen.
    """

    name: str
    title: str
    sentence: str
    traces: Sequence[Trace]
    layout: Mapping[str, Any]
    table: Table
    views: Sequence[View] = ()
    height: int = 360
    labels: Sequence[str] = ()


def rounded(value: float | None) -> float | None:
    """Round to six significant digits; the records have all sixteen."""
    return None if value is None else float(f"{value:.6g}")


def log_axis(title: str, values: Sequence[float]) -> dict[str, Any]:
    """Return an axis for figures, logarithmic if their range is wide."""
    wide = bool(values) and min(values) > 0 and max(values) > 20 * min(values)
    if not wide:
        return {"title": {"text": title}}
    return {
        "title": {"text": f"{title} (log scale)"},
        "type": "log",
        "dtick": "D2" if max(values) < 1e3 * min(values) else 1,
    }


def x_of_rounds(rounds: Sequence[int]) -> dict[str, Any]:
    """Return the axis of rounds, with integer ticks."""
    return {"title": {"text": "round"}, **_whole(max(rounds) - min(rounds) if rounds else 0)}


def axis_of_counts(title: str, largest: float) -> dict[str, Any]:
    """Return a vertical axis of counts, from zero."""
    return {"title": {"text": title}, "rangemode": "tozero", **_whole(largest)}


def _whole(length: float) -> dict[str, Any]:
    return {"dtick": 1} if length <= 12 else {"tickformat": ",d"}


def axis_of_names(labels: Sequence[str]) -> dict[str, Any]:
    """Return a vertical axis of names, the first on top. Positions are numbers, since shortened names may be equal."""
    return {
        "tickmode": "array",
        "tickvals": list(range(len(labels))),
        "ticktext": list(labels),
        "range": [len(labels) - 0.5, -0.5],
        "zeroline": False,
    }


def offsets(count: int) -> list[float]:
    """Return offsets for marks of one row, so that none hides another."""
    return [round(0.5 * (index / (count - 1) - 0.5), 3) for index in range(count)] if count > 1 else [0.0]


def colour(index: int, opacity: float | None = None) -> str:
    """Return the token of a line's colour, with an opacity if one is given."""
    return f"@{index % COLOURS}" if opacity is None else f"@{index % COLOURS}:{opacity}"


def symbol(index: int) -> str:
    """Return the symbol of a line's or a trace's marks."""
    return SYMBOLS[index % len(SYMBOLS)]


def scatter(name: str, mode: str, x: Sequence[float | None], y: Sequence[float | None], **more: Any) -> Trace:
    """Return a trace of lines or marks."""
    return {"type": "scatter", "mode": mode, "name": name, "x": x, "y": y, **more}


def dots(label: str, index: int, points: Sequence[tuple[float, Point | None]]) -> Trace:
    """Return a trace with a mark per known figure, and its standard deviation as an error bar."""
    known = [(place, point) for place, point in points if point is not None]
    deviations = [rounded(point.std) for _, point in known]
    x, y = [rounded(point.mean) for _, point in known], [place for place, _ in known]
    marker = {"color": colour(index), "size": 11, "symbol": symbol(index)}
    trace = scatter(in_chart(label), "markers", x, y, marker=marker, hovertemplate="%{x:.4f}")
    if any(deviations):
        trace["error_x"] = {"type": "data", "array": [value or 0 for value in deviations], "color": colour(index)}
    return trace
