"""Charts as one plotly figure for a notebook, in the light colours of the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hetlora.commands.report.chart import Chart

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["SERIES", "make_figure"]

SERIES = ("#0072b2", "#c24e00", "#00805c", "#a8457f", "#8a6400", "#4659a8", "#5f6b76", "#7d2e2e")
"""Colours of the tokens ``"@0"`` to ``"@7"``, equal to those in the page's script."""


def make_figure(charts: Sequence[Chart]) -> Figure:
    """Return line charts as one plotly figure, one below the other."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=len(charts), cols=1, subplot_titles=[chart.title for chart in charts], vertical_spacing=0.16
    )
    for row, chart in enumerate(charts, start=1):
        for trace in chart.traces:
            figure.add_trace(_coloured(trace), row=row, col=1)
        figure.update_xaxes(chart.layout["xaxis"], row=row, col=1)
        figure.update_yaxes(chart.layout["yaxis"], row=row, col=1)
    figure.update_layout(height=sum(chart.height for chart in charts), showlegend=False, template="plotly_white")
    return figure


def _coloured(value: Any, key: str = "") -> Any:
    """Replace the tokens under the keys of colours by colours."""
    if isinstance(value, dict):
        return {name: _coloured(item, name) for name, item in value.items()}
    if not (isinstance(value, str) and key in ("color", "fillcolor")):
        return value
    token = re.fullmatch(r"@([0-7])(?::([\d.]+))?", value)
    if token is None:
        return value
    solid = SERIES[int(token[1])]
    red, green, blue = (int(solid[at : at + 2], 16) for at in (1, 3, 5))
    return solid if token[2] is None else f"rgba({red},{green},{blue},{token[2]})"
