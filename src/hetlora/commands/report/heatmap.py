"""Heat maps with one row per client and one column per round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hetlora.commands.report.chart import Chart, Table, Trace, axis_of_names, scatter, x_of_rounds
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
    "marks",
    "which_clients",
    "which_rounds",
]

MOST_COLUMNS = 500
"""Rounds of a heat map; more are thinned evenly."""
MOST_MARKS = 3000
MOST_ROWS = 500
"""Rows of a table that lists single events."""


def client_map(
    name: str,
    title: str,
    sentence: str,
    traces: Sequence[Trace],
    rounds: Sequence[int],
    clients: Sequence[str],
    table: Table,
) -> Chart:
    """Return the chart of a heat map, the first trace, with marks on it, the other traces."""
    heat, *others = traces
    if len(rounds) * len(clients) <= 2000:
        heat = {**heat, "text": [[in_chart(client)] * len(rounds) for client in clients]}
    else:  # a name for every cell would be most of the page
        heat = {**heat, "hovertemplate": heat["hovertemplate"].replace("%{text}", "%{y}")}
    half = (rounds[-1] - rounds[0]) / (len(rounds) - 1) / 2 if len(rounds) > 1 else 0.5
    whole = [rounds[0] - half, rounds[-1] + half]
    axis = {key: value for key, value in x_of_rounds(rounds).items() if key != "title"}
    # With a colour bar plotly draws the title of an axis over its labels; an annotation at a fixed place stays below them.
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
    """Return the common part of heat maps, for one row of figures per client."""
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


def marks(
    name: str, clients: Sequence[str], events: Iterable[tuple[int, str, str]], marker: Mapping[str, Any]
) -> list[Trace]:
    """Return a trace with a mark per event of a client in the map, a round, the client and a text; none without events."""
    place = {client: index for index, client in enumerate(clients)}
    shown = [event for event in events if event[1] in place][:MOST_MARKS]
    if not shown:
        return []
    return [
        scatter(
            name,
            "markers",
            [number for number, _, _ in shown],
            [place[client] for _, client, _ in shown],
            text=[f"{in_chart(client)}: {in_chart(text)}" for _, client, text in shown],
            hovertemplate="%{text}<br>in round %{x}<extra></extra>",
            marker={"size": 8, **marker},
        )
    ]


def colour_bar(title: str, ticks: Sequence[int] | None) -> dict[str, Any]:
    """Return a colour bar above its chart: beside it, a phone has no room for the chart."""
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


def labels_of(clients: Sequence[str], length: int = 22) -> list[str]:
    """Return clients' names shortened for an axis."""
    return [in_chart(client, length) for client in clients]


def columns_of(run: Run) -> tuple[list[int], list[int]]:
    """Return the rounds of a heat map, and their indices in the run."""
    step = max(1, -(-len(run.rounds) // MOST_COLUMNS))
    kept = list(range(len(run.rounds) - 1, -1, -step))[::-1]
    return [run.rounds[at].number for at in kept], kept


def which_clients(clients: Sequence[str], everyone: Sequence[str], rule: str) -> str:
    """Say how many of the clients are shown, and which; empty if all are."""
    return "" if len(clients) == len(everyone) else f" {len(clients)} of {len(everyone):,} clients are shown: {rule}."


def which_rounds(rounds: Sequence[int], run: Run) -> str:
    """Say how many of the rounds are shown; empty if all are."""
    if len(rounds) == len(run.rounds):
        return ""
    return f" {len(rounds)} of {len(run.rounds):,} rounds are shown, evenly."
