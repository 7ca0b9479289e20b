"""Charts of one run, client by client: ranks, influence, scores."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hetlora.commands.report import summary
from hetlora.commands.report.charts import (
    TIERS,
    Chart,
    Trace,
    axis_of,
    axis_of_names,
    axis_of_rounds,
    draw,
    marks,
    rounded,
    thinned,
)
from hetlora.commands.report.summary import Devices, perplexities
from hetlora.runs.reader import Round, Run
from hetlora.runs.text import change, figure, in_chart, many, percent, shortened

__all__ = ["clients_chart", "ranks_chart", "shares_chart"]

GREY = "#7d7d7d"
MOST_CLIENTS, MOST_MARKS, MOST_POINTS = 60, 3000, 500
"""Of more, an even sample is shown."""


def ranks_chart(run: Run, name: str, devices: Devices) -> Chart | None:
    """Return the mean rank of each tier's clients over the rounds, with a mark for every prune; None without prunes."""
    pruned = [(item.number, client, rank) for item in run.rounds for client, rank in item.prunes.items()]
    if not pruned or summary.trains_weights(run):
        return None
    began, tiers = summary.first_ranks(run), devices.tiers[run.folder]
    after = summary.ranks_over_rounds(run, list(began))
    numbers, traces = [item.number for item in run.rounds], []
    for place, tier in enumerate(devices.names):
        members = [[began[client], *after[client]] for client in began if tiers.get(client) == tier]
        means = [statistics.fmean(ranks) for ranks in zip(*members, strict=True)]
        points = list(zip([0, *numbers], means, strict=True)) if members else []  # [rounds + 1] of round and mean
        x, y = _columns(thinned(points, MOST_POINTS), 2)
        mean = marks(f"tier {in_chart(tier)}", x, y, place, "mean rank %{y:.3~g} after round %{x}")
        line = {"color": TIERS[place % len(TIERS)], "width": 2}
        mine = thinned(
            [(at, rank, in_chart(client)) for at, client, rank in pruned if tiers.get(client) == tier], MOST_MARKS
        )
        x, y, clients = _columns(mine, 3)
        hover = "%{text}: pruned to rank %{y} in round %{x}<extra></extra>"
        prunes = marks(f"tier {in_chart(tier)}, a prune", x, y, place, hover, text=clients, legendgroup=tier)
        traces += [{**mean, "mode": "lines", "line": line, "legendgroup": tier}] if members else []
        traces += [prunes] if mine else []
    last = {client: ranks[-1] for client, ranks in after.items()}
    ends = ", ".join(f"{count:,} at {rank}" for rank, count in sorted(Counter(last.values()).items()))
    mean_change = change(statistics.fmean(began.values()), statistics.fmean(last.values()))
    changed = len({client for _, client, _ in pruned})
    sentence = f"{changed:,} of {many(len(began), 'client')} pruned, in {many(len(pruned), 'prune')}. "
    sentence += f"Mean rank {mean_change}; clients by rank at the end: {ends}."
    drawn = draw(traces, axis_of_rounds(numbers[-1]), axis_of("rank", rangemode="tozero"))
    return Chart(name, "Ranks", sentence, drawn)


def _columns(rows: Sequence[Sequence[Any]], count: int) -> list[list[Any]]:
    return [[row[column] for row in rows] for column in range(count)]


def shares_chart(run: Run, name: str, devices: Devices) -> Chart | None:
    """Return the share of every update in its round's average, as a multiple of the equal share; None if all are equal."""
    updates = [
        (item, client, share * len(item.weights)) for item in run.rounds for client, share in item.weights.items()
    ]
    if not summary.averages(run) or all(abs(times - 1) < 1e-6 for *_, times in updates):
        return None
    tiers, traces = devices.tiers[run.folder], []
    shown = thinned(updates, MOST_MARKS)
    for place, tier in enumerate(devices.names):
        items, clients, times = _columns([update for update in shown if tiers.get(update[1]) == tier], 3)
        edges = [2 if client in item.bounded else 0 for item, client in zip(items, clients, strict=True)]
        traces.append(
            marks(
                f"tier {in_chart(tier)}",
                [item.number for item in items],
                times,
                place,
                "%{text}<br>%{y:.2f} times the equal share, round %{x}<extra></extra>",
                text=[_with_bounds(item, client) for item, client in zip(items, clients, strict=True)],
                marker={"opacity": 0.8, "line": {"width": edges, "color": GREY}},
            )
        )
    item, client, most = max(updates, key=lambda update: update[2])
    sentence = (
        f"The largest share was {percent(item.weights[client])}, of {shortened(client, 60)} in round {item.number}: "
    )
    sentence += f"{figure(most)} times the equal share."
    if bounded := sum(len(item.bounded) for item in run.rounds):
        sentence += (
            f" {many(bounded, 'update')} had {'its' if bounded == 1 else 'their'} influence bounded: a grey edge."
        )
    if len(shown) < len(updates):
        sentence += f" {len(shown):,} of {len(updates):,} updates are shown, evenly."
    equal = {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": 1,
        "y1": 1,
        "line": {"dash": "dot", "color": GREY},
    }
    y = axis_of("times the equal share", rangemode="tozero")
    return Chart(name, "Influence", sentence, draw(traces, axis_of_rounds(run.rounds[-1].number), y, shapes=[equal]))


def _with_bounds(item: Round, client: str) -> str:
    """Return a client's name, with what of its influence was bounded."""
    parts = {"A": "its change of A", "B": "its change of B", "weight": "its weight"}
    lowered = [f"{parts.get(part, part)} to {percent(share)}" for part, share in item.bounded.get(client, {}).items()]
    return in_chart(client) + (f"<br>bounded: {in_chart(', '.join(lowered))}" if lowered else "")


def clients_chart(run: Run, name: str, devices: Devices, local: Run | None) -> Chart | None:
    """Return each client's perplexity before and after, and of training alone if `local` is a run of everyone alone."""
    before, after, alone = (perplexities(scores) for scores in (run.before, run.final, local.final if local else None))
    ordered = sorted((c for c in after if c in before), key=lambda c: after[c] / before[c] if before[c] else 0.0)
    if not ordered:
        return None
    clients = thinned(ordered, MOST_CLIENTS)
    tiers = dict.fromkeys(clients, "unknown") | dict(devices.tiers[run.folder])
    names = [*devices.names, *(["unknown"] if any(tiers[client] == "unknown" for client in clients) else [])]
    x = [value for client in clients for value in (rounded(before[client]), rounded(after[client]), None)]
    y = [value for at in range(len(clients)) for value in (at, at, None)]
    join = {"showlegend": False, "hoverinfo": "skip", "line": {"color": GREY, "width": 1}}
    traces: list[Trace] = [{"type": "scatter", "mode": "lines", "x": x, "y": y, **join}]
    for place, tier in enumerate(names):
        mine = [at for at, client in enumerate(clients) if tiers[client] == tier]
        for when, scores in (("before", before), ("after", after)) if mine else ():
            title = f"tier {in_chart(tier)}, {when}"
            trace = marks(title, [scores[clients[at]] for at in mine], mine, place, "%{x:.4f} " + when)
            trace["marker"]["symbol"] += "-open" if when == "before" else ""
            traces.append({**trace, "legendgroup": tier})
    if known := [at for at, client in enumerate(clients) if client in alone]:
        cross = {"color": GREY, "symbol": "x-thin-open"}
        traces.append(marks("alone", [alone[clients[at]] for at in known], known, 0, "%{x:.4f} alone", marker=cross))
    values = [value for trace in traces[1:] for value in trace["x"]]
    sentence = _clients_sentence(ordered, before, after, alone)
    if len(clients) < len(ordered):
        sentence += f" {len(clients)} of {len(ordered):,} clients are shown, evenly from the largest gain to the least."
    height = 130 + 17 * max(3, len(clients))
    drawn = draw(traces, axis_of("perplexity", values), axis_of_names(clients, 18), height)
    return Chart(name, "Perplexity by client", sentence, drawn)


def _clients_sentence(
    clients: Sequence[str], before: Mapping[str, float], after: Mapping[str, float], alone: Mapping[str, float]
) -> str:
    better = sum(after[client] < before[client] for client in clients)
    ends = [("most", clients[0]), ("least", clients[-1])][: len(clients)]
    gained = ", ".join(
        f"{shortened(client, 60)} {how} ({change(before[client], after[client])})" for how, client in ends
    )
    sentence = f"{better:,} of {many(len(clients), 'measured client')} got a lower perplexity: {gained}."
    if common := [client for client in clients if client in alone]:
        ahead = sum(after[client] < alone[client] for client in common)
        sentence += f" {ahead:,} of {many(len(common), 'client')} got lower than by training alone."
    return sentence
