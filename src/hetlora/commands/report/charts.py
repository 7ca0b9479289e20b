"""The charts of a report, each a plotly figure with a title and a sentence. A chart that would say nothing is None.

A tier has one colour and one symbol in all charts of a page. Lines of runs have other colours. Every colour stands out from a
light and from a dark page by 3 to 1; the page's style sheet colours text and grid.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hetlora.commands.report import summary
from hetlora.commands.report.summary import Curve, Devices, Group, Point, curve, mean_and_std
from hetlora.runs.reader import Run, Scores, number, section
from hetlora.runs.text import change, figure, in_chart, many, several

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["Chart", "curves_chart", "data_rows", "differences_chart", "slots_chart", "tiers_chart"]

TIERS = ("#0077bb", "#d55e00", "#008f6b", "#b8639a", "#8a7000")
LINES = ("#6b7785", "#8067dc", "#c2415f", "#1f8a99", "#9a6a3a", "#6d7f00")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "triangle-down")
MOST_POINTS, MOST_ROWS, MOST_BANDS = 1000, 500, 5
"""Points of a line, rows of a table of data, and bands that are shown before a reader asks for others in the legend."""

_AXIS = {
    "gridcolor": "#e1e5ea",
    "zerolinecolor": "#69727d",
    "zeroline": False,
    "automargin": True,
    "title": {"standoff": 8},
}
TEMPLATE = {
    "layout": {
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#1b1f24"},
        "hoverlabel": {"namelength": -1},
        "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "tracegroupgap": 0},
        "margin": {"l": 50, "r": 12, "t": 24, "b": 44},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
}
LEAST_SPAN = 0.002
"""Least width of an axis of perplexity or loss, as a share of its values."""

Trace = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A chart: the id of its element, its heading, a sentence with its figures, and plotly's figure."""

    name: str
    title: str
    sentence: str
    figure: Figure


def data_rows(chart: Chart) -> list[list[str]]:
    """Return the data of a chart as rows: the name of a line, what a mark is of, x and y."""
    rows, names = [], chart.figure.layout.yaxis.ticktext
    for trace in chart.figure.data:
        texts = trace.text or ("",) * len(trace.x)
        for x, y, text in zip(trace.x, trace.y, texts, strict=True) if trace.hoverinfo != "skip" else ():
            shown = names[int(y)] if names else "" if y is None else f"{y:.6g}"
            rows.append(list(map(html.unescape, (trace.name, text, f"{x:.6g}", shown))))
    return rows


# Parts of charts ----------------------------------------------------------------------------------------------------


def draw(traces: Sequence[Trace], x: Trace, y: Trace, height: int = 340, **layout: Any) -> Figure:
    """Return a figure with these axes in the look of the page."""
    from plotly.graph_objects import Figure

    return Figure(list(traces), {"xaxis": x, "yaxis": y, "height": height, "template": TEMPLATE, **layout})


def rounded(value: float | None) -> float | None:
    """Round to six significant digits; the records have all sixteen."""
    return None if value is None else float(f"{value:.6g}")


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """Keep at most `most` evenly spaced items, with the first and the last.

    Example:
        >>> thinned("abcdefg", 3), thinned("ab", 3)
        (['a', 'd', 'g'], ['a', 'b'])
    """
    if len(items) <= most:
        return list(items)
    return [items[round(at * (len(items) - 1) / (most - 1))] for at in range(most)]


def axis_of(title: str, values: Sequence[float] = (), **more: Any) -> dict[str, Any]:
    """Return an axis for figures, logarithmic if the range of `values` is wide, and never so narrow that noise looks large."""
    wide = bool(values) and min(values) > 0 and max(values) > 20 * min(values)
    middle = (min(values) + max(values)) / 2 if values else 0.0
    if values and middle > 0.0 and max(values) - min(values) < LEAST_SPAN * middle / 2:
        more["range"] = [middle * (1 - LEAST_SPAN / 2), middle * (1 + LEAST_SPAN / 2)]
    return {"title": {"text": f"{title} (log scale)"}, "type": "log"} if wide else {"title": {"text": title}, **more}


def axis_of_rounds(last: int) -> dict[str, Any]:
    """Return the axis of rounds, with whole numbers."""
    return axis_of("round", **({"dtick": 1} if last <= 12 else {"tickformat": ",d"}))


def axis_of_names(names: Sequence[str], length: int) -> dict[str, Any]:
    """Return a vertical axis of names, the first on top. Positions are numbers, since shortened names may be equal."""
    shown = {"tickmode": "array", "tickvals": list(range(len(names)))}
    return {**shown, "ticktext": [in_chart(name, length) for name in names], "range": [len(names) - 0.5, -0.5]}


def marks(
    name: str, x: Sequence[float | None], y: Sequence[float | None], place: int, hover: str, **more: Any
) -> Trace:
    """Return a trace of marks in the colour and symbol of the tier at a place."""
    marker = {"color": TIERS[place % len(TIERS)], "symbol": SYMBOLS[place % len(SYMBOLS)], "size": 9}
    x, y = [rounded(value) for value in x], [rounded(value) for value in y]
    shared = {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y, "hovertemplate": hover}
    return {**shared, **more, "marker": {**marker, **more.get("marker", {})}}


# Lines over the rounds ----------------------------------------------------------------------------------------------


def curves_chart(groups: Sequence[Group], *, bands: bool = True) -> Chart | None:
    """Return held-out perplexity and training loss over the rounds, or over the megabytes sent until then.

    Args:
        groups: Each is one line: the mean over its runs.
        bands: Whether a line has a band of one standard deviation.
    """
    from plotly.subplots import make_subplots

    measured = [
        curve(group, lambda item: item.perplexity, lambda run: _overall(run.before), gaps=False) for group in groups
    ]
    losses = [curve(group, lambda item: item.loss, lambda _: None, gaps=True) for group in groups]
    parts = [("perplexity", measured), ("training loss", losses)]
    parts = [(what, curves) for what, curves in parts if any(any(line.points) for line in curves)]
    if not parts:
        return None
    drawn = make_subplots(rows=len(parts), shared_xaxes=True, vertical_spacing=0.06)
    sent: list[list[float]] = []
    for row, (what, curves) in enumerate(parts, start=1):
        for index, (group, line) in enumerate(zip(groups, curves, strict=True)):
            for trace, megabytes_sent in _lines(line, group.label, index, band=bands):
                legend = len(groups) > 1 and row == 1 and trace["mode"] != "none"
                name = in_chart(group.label) if row == 1 else f"{in_chart(group.label)}: {what}"
                drawn.add_trace({**trace, "name": name, "showlegend": legend}, row=row, col=1)
                sent.append(megabytes_sent)
        values = [value for line in curves for point in line.points if point for value in (point.least, point.most)]
        drawn.update_yaxes(axis_of(what, values), row=row, col=1)
    bottom = "xaxis" if len(parts) == 1 else "xaxis2"
    over = axis_of_rounds(max(at for _, curves in parts for line in curves for at in line.rounds))
    by_round = [list(trace.x) for trace in drawn.data]
    buttons = [
        _button("by round", by_round, {f"{bottom}.title.text": "round", f"{bottom}.dtick": over.get("dtick")}),
        _button("by MB sent", sent, {f"{bottom}.title.text": "MB sent until then", f"{bottom}.dtick": None}),
    ]
    menu: Trace = {"type": "buttons", "direction": "right", "buttons": buttons, "pad": {"t": 38}}
    menu |= {"x": 1, "xanchor": "right", "y": 0, "yanchor": "top"}
    drawn.update_layout({bottom: over}, template=TEMPLATE, height=110 + 140 * len(parts), updatemenus=[menu])
    drawn.update_layout(margin={"b": 76})
    missing = sum(item.loss is None for group in groups for run in group.runs for item in run.rounds)
    said = [_course(what, groups, curves) for what, curves in parts] + _started(groups)
    said += [f"{many(missing, 'round')} had no finite loss."] if missing else []
    return Chart("curves", "Over the rounds", " ".join(said), drawn)


def _button(label: str, x: Sequence[Sequence[float]], axis: Mapping[str, Any]) -> dict[str, Any]:
    """Return a button of plotly's that puts other x under all traces."""
    return {"label": label, "method": "update", "args": [{"x": x}, axis]}


def _overall(scores: Scores | None) -> float | None:
    return scores.overall.get("perplexity") if scores else None


def _started(groups: Sequence[Group]) -> list[str]:
    begun = {group.label: _overall(run.base) for group in groups for run in group.runs if run.starts_from_adapter}
    known = [f"{figure(base)} for {label}" for label, base in begun.items()]
    return [f"Round 0 is the adapter started from; the base alone has {several(known)}."] if known else []


def _lines(line: Curve, label: str, index: int, *, band: bool, signed: bool = False) -> list[tuple[Trace, list[float]]]:
    """Return the traces of a line, its band of one standard deviation first, each with its megabytes."""
    points = thinned(list(zip(*line, strict=True)), MOST_POINTS)
    if not any(point for *_, point in points):
        return []
    shared = {"type": "scatter", "legendgroup": in_chart(label), "name": in_chart(label)}
    colour = LINES[index % len(LINES)]
    runs = max(point.runs for *_, point in points if point)
    lines = []
    known = [(at, sent, point, point.std) for at, sent, point in points if point and point.std is not None]
    if band and known:
        # A log axis has no place for values below zero; the band then ends at the least value of the runs.
        low = [down if (down := point.mean - std) > 0 or signed else point.least for *_, point, std in known]
        outline = [*(point.mean + std for *_, point, std in known), *reversed(low)]
        x, sent = ([item[column] for item in known] for column in (0, 1))
        red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
        filled = {"fill": "toself", "fillcolor": f"rgba({red},{green},{blue},0.18)", "hoverinfo": "skip"}
        trace = {**shared, **filled, "mode": "none", "x": x + x[::-1], "y": list(map(rounded, outline))}
        lines.append(({**trace, "showlegend": False}, sent + sent[::-1]))
    over = "<br>± %{customdata[0]:.3g}, %{customdata[1]} runs" if runs > 1 else ""
    line_of: Trace = {
        "mode": "lines+markers" if len(points) <= 60 else "lines",
        "x": [at for at, *_ in points],
        "y": [rounded(point.mean) if point else None for *_, point in points],
        "customdata": [[rounded(point.std), point.runs] if point else [None, 0] for *_, point in points],
        "hovertemplate": "%{y:.4f}" + over + "<br>at %{x:.4~g}",
        "line": {"color": colour, "width": 2, "dash": DASHES[index % len(DASHES)]},
        "marker": {"color": colour, "size": 6, "symbol": SYMBOLS[index % len(SYMBOLS)]},
    }
    return [*lines, ({**shared, **line_of}, [rounded(sent) or 0.0 for _, sent, _ in points])]


def _course(what: str, groups: Sequence[Group], curves: Sequence[Curve]) -> str:
    """Describe where the lines begin and end, over the rounds that all runs of a line have."""
    ends: list[tuple[str, list[tuple[int, Point]]]] = []
    for group, line in zip(groups, curves, strict=True):
        points = [(at, point) for at, point in zip(line.rounds, line.points, strict=True) if point]
        runs = max((point.runs for _, point in points), default=0)
        some = f" ({runs} of {len(group.runs)} runs)" if runs < len(group.runs) else ""
        if points:
            ends.append((group.label + some, [item for item in points if item[1].runs == runs]))
    if len(ends) == 1:
        ((label, points),) = ends
        (began, first), (last, final) = points[0], points[-1]
        best, lowest = min(points, key=lambda item: item[1].mean)
        if len(points) == 1:
            return f"{what.capitalize()} of {label} is known in round {last} only: {figure(final.mean)}."
        least = f", lowest in round {best} with {figure(lowest.mean)}" if lowest.mean < final.mean else ""
        return f"{what.capitalize()} of {label}, round {began} to {last}: {change(first.mean, final.mean)}{least}."
    low, high = (choose((points[-1][1].mean, label) for label, points in ends) for choose in (min, max))
    end = f"lowest {figure(low[0])} of {low[1]}, highest {figure(high[0])} of {high[1]}"
    return f"{what.capitalize()} of {len(ends)} lines at their end: {end}."


def differences_chart(groups: Sequence[Group], reference: str) -> Chart | None:
    """Return perplexity minus that of the reference over the rounds, paired by seed: mean ± one standard deviation.

    Args:
        groups: Their runs are labelled by their method.
        reference: Label of the method that is subtracted.
    """
    others = {
        run.config.get("seed"): _by_round(run) for group in groups for run in group.runs if run.label == reference
    }
    traces: list[Trace] = []
    for index, group in enumerate(group for group in groups if group.runs[0].label != reference):
        found: dict[int, list[float]] = {}
        for run in group.runs:
            other = others.get(run.config.get("seed"), {})
            for at, value in _by_round(run).items():
                if at in other:
                    found.setdefault(at, []).append(value - other[at])
        rounds = sorted(found)
        line = Curve(rounds, [0.0] * len(rounds), [mean_and_std(found[at]) for at in rounds])
        shown = {"visible": True if index < MOST_BANDS else "legendonly"}
        traces += [
            {**trace, **shown}
            for trace, _ in _lines(line, group.label, index + 1, band=True, signed=True)
            if rounds[-1]
        ]
    if not traces:
        return None
    sentence = (
        f"Above zero is worse than {reference}. A line is the mean over the seeds that both have, its band ± one standard "
        "deviation of the differences seed by seed. The legend shows and hides lines."
    )
    last = max(at for trace in traces for at in trace["x"])
    drawn = draw(traces, axis_of_rounds(last), axis_of("difference in perplexity", zeroline=True), 400)
    return Chart("differences", f"Perplexity minus that of {reference}, paired by seed", sentence, drawn)


def _by_round(run: Run) -> dict[int, float]:
    measured = {0: _overall(run.before), **{item.number: item.perplexity for item in run.rounds}}
    return {at: value for at, value in measured.items() if value is not None}


def slots_chart(groups: Sequence[Group]) -> Chart | None:
    """Return the number of live slots of the global adapter over the rounds; None if none has died."""
    traces, died, last = [], [], 0
    for index, group in enumerate(groups):
        line = curve(group, lambda item: item.live_slots, lambda run: number(run.head.get("max_rank")), gaps=True)
        known = [point for point in line.points if point]
        if any(not summary.averages(run) or summary.trains_weights(run) for run in group.runs) or len(known) < 2:
            continue
        traces += [trace for trace, _ in _lines(line, group.label, index, band=True)]
        last = max(last, line.rounds[-1])
        if known[-1].mean < known[0].mean:
            died.append(
                f"{known[0].mean - known[-1].mean:g} of {known[0].mean:g} slots of {group.label} by round {last}"
            )
    if not died:
        return None
    sentence = f"Dead: {'; '.join(died)}. They are zero in A and in B, and no update can revive them."
    drawn = draw(traces, axis_of_rounds(last), axis_of("live slots", rangemode="tozero"))
    return Chart("slots", "Live slots", sentence, drawn)


# Tiers --------------------------------------------------------------------------------------------------------------


def tiers_chart(groups: Sequence[Group], devices: Devices) -> Chart | None:
    """Return the perplexity of each tier of devices, a row for before the first round and one for each group."""
    runs = [run for group in groups for run in group.runs]
    alike = len({str([section(run.config, part) for part in ("model", "data")]) for run in runs}) == 1
    # If any run has a final measurement, before and after cover the same runs.
    begun = [run for run in runs if run.final] or runs
    before = {f"before ({summary.begun_with(runs)})": [(run, run.before) for run in begun]} if alike else {}
    measured = {**before, **{group.label: [(run, run.final) for run in group.runs] for group in groups}}
    rows = {label: scores for label, found in measured.items() if (scores := _by_tier(found, devices))}
    if not rows.keys() - before.keys():
        return None
    traces = []
    for place, tier in enumerate(devices.names):
        known = [(scores[tier], at) for at, scores in enumerate(rows.values()) if tier in scores]
        spread = [
            f"<br>± {figure(point.std)}, {point.runs} runs" if point.std is not None else "" for point, _ in known
        ]
        x, y = [point.mean for point, _ in known], [at for _, at in known]
        traces.append(marks(f"tier {in_chart(tier)}", x, y, place, "%{x:.4f}%{customdata}", customdata=spread))
    values = [point.mean for scores in rows.values() for point in scores.values()]
    ended = [(group.label, sum(run.final is not None for run in group.runs), len(group.runs)) for group in groups]
    few = [f"{done} of {every} runs of {label}" for label, done, every in ended if 0 < done < every]
    sentence = _tiers_sentence(rows, devices.names, begins=next(iter(rows)) in before)
    sentence += f" Measured at their end: {'; '.join(few)}." if few else ""
    drawn = draw(traces, axis_of("perplexity", values), axis_of_names(list(rows), 22), 110 + 34 * len(rows))
    return Chart("tiers", "Perplexity by tier of devices", sentence, drawn)


def _by_tier(measured: Sequence[tuple[Run, Scores | None]], devices: Devices) -> dict[str, Point]:
    found: dict[str, list[float]] = {}
    for run, scores in measured:
        for tier, value in summary.tier_perplexities(run, scores, devices).items():
            found.setdefault(tier, []).append(value)
    return {tier: mean_and_std(values) for tier, values in found.items()}


def _tiers_sentence(rows: Mapping[str, Mapping[str, Point]], names: Sequence[str], *, begins: bool) -> str:
    first, *others = rows.items() if begins else [("", {}), *rows.items()]
    said = []
    for tier in names:
        ends = [(scores[tier].mean, label) for label, scores in others if tier in scores]
        if len(others) == 1 and ends and tier in first[1]:
            said.append(f"tier {tier} {change(first[1][tier].mean, ends[0][0])}")
        elif ends:
            said.append(f"tier {tier} {figure(min(ends)[0])} of {min(ends)[1]}")
    return f"{'Perplexity' if len(others) == 1 else 'Lowest mean perplexity'}: {'; '.join(said)}."
