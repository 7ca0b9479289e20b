"""A map of clients over rounds: a row a client, a column a round, a colour for the figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hetlora.commands.report.chart import Chart, Table, Trace, axis_of_names, x_of_rounds
from hetlora.runs.reader import Run
from hetlora.runs.text import in_chart

__all__ = [
    "MOST_MARKS",
    "MOST_ROWS",
    "client_map",
    "colour_bar",
    "columns_of",
    "heat",
    "height_of",
    "labels_of",
    "which_clients",
    "which_rounds",
]

MOST_COLUMNS = 500
"""Rounds of a heat map; of more, every so-manyth is shown."""
MOST_MARKS = 3000
MOST_ROWS = 500
"""Of a table that lists what happened one by one."""


def client_map(
    name: str,
    title: str,
    sentence: str,
    traces: Sequence[Trace],
    rounds: Sequence[int],
    clients: Sequence[str],
    table: Table,
) -> Chart:
    """Return the chart of a map, its first trace the map itself and the others marks on it."""
    heat, *others = traces
    heat = (
        {**heat, "text": [[in_chart(client)] * len(rounds) for client in clients]}
        if len(rounds) * len(clients) <= 2000
        else {
            **heat,
            # A name for every cell would be most of the page.
            "hovertemplate": heat["hovertemplate"].replace("%{text}", "%{y}"),
        }
    )
    half = (rounds[-1] - rounds[0]) / (len(rounds) - 1) / 2 if len(rounds) > 1 else 0.5
    whole = [rounds[0] - half, rounds[-1] + half]
    axis = {key: value for key, value in x_of_rounds(rounds).items() if key != "title"}
    # Under a colour bar plotly puts the title of an axis onto its labels; a note at a fixed place stays below them.
    below = {"text": "round", "xref": "paper", "yref": "paper", "x": 0.5, "y": 0, "yanchor": "top", "yshift": -22}
    layout = {
        "xaxis": {**axis, "zeroline": False, "showgrid": False, "range": whole},
        "yaxis": {**axis_of_names(labels_of(clients)), "showgrid": False},
        "annotations": [{**below, "showarrow": False}],
        "margin": {"t": 72},
    }
    return Chart(
        name,
        title,
        sentence,
        [heat, *others],
        layout,
        table,
        height=height_of(clients) + 50,
        labels=labels_of(clients, 10),
    )


def heat(rounds: Sequence[int], rows: Sequence[Sequence[float | None]]) -> Trace:
    """Return what maps have in common, for a row of figures a client."""
    few = len(rounds) <= 60
    return {
        "type": "heatmap",
        "x": list(rounds),
        "y": list(range(len(rows))),
        "z": rows,
        "xgap": 1 if few else 0,
        "ygap": 1,
        "hoverongaps": False,
    }


def colour_bar(title: str, ticks: Sequence[int] | None) -> dict[str, Any]:
    """Return a colour bar that lies above its chart: beside it, a phone would have no room for the chart."""
    bar = {
        "orientation": "h",
        "thickness": 10,
        "len": 0.9,
        "x": 0.5,
        "y": 1.0,
        "yanchor": "bottom",
        "ypad": 6,
        "title": {"text": title, "side": "top"},
    }
    return bar if ticks is None else {**bar, "tickvals": list(ticks)}


def height_of(clients: Sequence[str]) -> int:
    """Return the height of a chart with a row for each client."""
    return 130 + 18 * max(3, len(clients))


def labels_of(clients: Sequence[str], most: int = 22) -> list[str]:
    """Return clients' names as an axis has room for them."""
    return [in_chart(client, most) for client in clients]


def columns_of(run: Run) -> tuple[list[int], list[int]]:
    """Return the rounds that a heat map shows, and where they are in the run."""
    step = max(1, -(-len(run.rounds) // MOST_COLUMNS))
    kept = list(range(len(run.rounds) - 1, -1, -step))[::-1]
    return [run.rounds[at].number for at in kept], kept


def which_clients(clients: Sequence[str], everyone: Sequence[str], rule: str) -> str:
    """Say how many of the clients are shown, and which; nothing where all are."""
    return "" if len(clients) == len(everyone) else f" {len(clients)} of {len(everyone):,} clients are shown: {rule}."


def which_rounds(rounds: Sequence[int], run: Run) -> str:
    """Say how many of the rounds are shown; nothing where all are."""
    if len(rounds) == len(run.rounds):
        return ""
    return f" {len(rounds)} of {len(run.rounds):,} rounds are shown, evenly."
