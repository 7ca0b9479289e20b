"""Charts of one run's shares: what each client counted for in the average of each round, and what was bounded."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from hetlora.commands.report.chart import Chart, Table, Trace, rounded, x_of_rounds
from hetlora.commands.report.heatmap import (
    MOST_MARKS,
    MOST_ROWS,
    client_map,
    colour_bar,
    columns_of,
    heat,
    which_clients,
    which_rounds,
)
from hetlora.commands.report.summary import chosen_clients, first_ranks, tier_names, tier_of, trains_weights
from hetlora.runs.reader import Round, Run
from hetlora.runs.text import figure, in_chart, many, percent, shortened

__all__ = ["bounded_table", "shares_chart", "spread_chart"]


def shares_chart(run: Run, name: str, most: int) -> Chart | None:
    """Return each client's share of every round's average, as a multiple of the equal share, a row a client."""
    began = first_ranks(run)
    weighted = [item for item in run.rounds if item.weights]
    if not weighted:
        return None
    total: Counter[str] = Counter()
    for item in weighted:
        total.update(item.weights)
    bounded = [client for item in run.rounds for client in item.bounded]
    everyone = sorted(total, key=lambda client: (began.get(client, 0), client))
    loudest = [client for client, _ in total.most_common(most // 2)]
    clients = chosen_clients(everyone, [*dict.fromkeys(bounded), *loudest], most)
    rounds, kept = columns_of(run)
    items = [run.rounds[at] for at in kept]
    share = {client: [rounded(item.weights.get(client)) for item in items] for client in clients}
    times = {client: [_times(item, client) for item in items] for client in clients}
    shared = {
        **heat(rounds, [times[client] for client in clients]),
        "name": "share",
        "customdata": [share[client] for client in clients],
        "colorscale": [[0, "#2166ac"], [0.5, "@mid"], [1, "#b35806"]],
        "zmin": -2,
        "zmax": 2,
        "colorbar": {
            **colour_bar("times the equal share", None),
            "tickvals": [-2, -1, 0, 1, 2],
            "ticktext": ["¼", "½", "1", "2", "4"],
        },
        "hovertemplate": "%{text}<br>share %{customdata:.4f} in round %{x}<extra></extra>",
    }
    traces: list[Trace] = [shared]
    place = {client: index for index, client in enumerate(clients)}
    marks = [
        (item.number, client, item.bounded[client]) for item in run.rounds for client in item.bounded if client in place
    ][:MOST_MARKS]
    if marks:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "bounded",
                "x": [at for at, _, _ in marks],
                "y": [place[client] for _, client, _ in marks],
                "text": [f"{in_chart(client)}: {in_chart(_lowered(told))}" for _, client, told in marks],
                "hovertemplate": "%{text}<br>in round %{x}<extra></extra>",
                "marker": {"symbol": "circle-open", "size": 8, "color": "@text", "line": {"width": 1.5}},
            }
        )
    table = Table(
        "Share of the average in each round",
        ["client", *(f"round {at}" for at in rounds)],
        [
            ["equal share", *(rounded(1 / len(item.weights)) if item.weights else None for item in items)],
            *([client, *share[client]] for client in clients),
        ],
    )
    some = which_clients(clients, everyone, "those that were bounded or had most, and an even sample by rank")
    return client_map(
        name,
        "Share of each client",
        _influence(weighted) + some + which_rounds(rounds, run),
        traces,
        rounds,
        clients,
        table,
    )


def _times(item: Round, client: str) -> float | None:
    """Return how many times the equal share a client had, as a power of two; None where it gave nothing."""
    share = item.weights.get(client)
    if share is None:
        return None
    times = share * len(item.weights)
    return round(math.log2(times), 3) if times > 2**-6 else -6.0


def _influence(rounds: Sequence[Round]) -> str:
    largest = max(
        ((share, client, item) for item in rounds for client, share in item.weights.items()), key=lambda found: found[0]
    )
    share, client, item = largest
    times = share * len(item.weights)
    equal = all(abs(value * len(item.weights) - 1) < 1e-6 for item in rounds for value in item.weights.values())
    if equal:
        return "Everyone had the equal share in every round."
    bounded = sum(len(item.bounded) for item in rounds)
    after = (
        f" {many(bounded, 'update')} had its influence bounded."
        if bounded == 1
        else (f" {many(bounded, 'update')} had their influence bounded." if bounded else " Nothing was bounded.")
    )
    return (
        f"The largest share was {percent(share)}, of {shortened(client, 60)} in round {item.number}: {figure(times)} times the "
        f"equal share of {percent(1 / len(item.weights))}.{after}"
    )


def spread_chart(run: Run, name: str) -> Chart | None:
    """Return the shares of every round against the equal one: a mark an update, or of many the largest, middle and least."""
    rounds = [item for item in run.rounds if item.weights]
    if not rounds:
        return None
    updates = sum(len(item.weights) for item in rounds)
    traces = _marks(run, rounds) if updates <= MOST_MARKS else _quantiles(rounds)
    equal = [rounded(1 / len(item.weights)) for item in rounds]
    traces.append(
        {
            "type": "scatter",
            "mode": "lines+markers" if len(rounds) == 1 else "lines",
            "name": "equal share",
            "x": [item.number for item in rounds],
            "y": equal,
            "line": {"color": "@text", "width": 1.5, "dash": "dot"},
            "hovertemplate": "equal share %{y:.4f}<br>round %{x}<extra></extra>",
        }
    )
    rows = [
        [item.number, len(item.weights), even, *(rounded(value) for value in _summary(item))]
        for item, even in zip(rounds, equal, strict=True)
    ]
    middle = statistics.fmean(max(item.weights.values()) * len(item.weights) for item in rounds)
    sentence = f"In the mean over the rounds, the largest share is {figure(middle)} times the equal one."
    columns = ["round", "updates", "equal share", "least", "median", "largest"]
    layout = {
        "xaxis": x_of_rounds([item.number for item in rounds]),
        "yaxis": {"title": {"text": "share"}, "rangemode": "tozero"},
    }
    return Chart(
        name, "Shares beside the equal share", sentence, traces, layout, Table("Shares by round", columns, rows)
    )


def _summary(item: Round) -> tuple[float, float, float]:
    shares = sorted(item.weights.values())
    return shares[0], statistics.median(shares), shares[-1]


def _marks(run: Run, rounds: Sequence[Round]) -> list[Trace]:
    began, names = first_ranks(run), tier_names(run)
    by_tier: dict[str, list[tuple[int, float, str]]] = {}
    for item in rounds:
        for client, share in item.weights.items():
            tier = tier_of(began.get(client, 0), names)
            by_tier.setdefault(tier, []).append((item.number, share, client))
    order = sorted(by_tier, key=lambda tier: (names.index(tier) if tier in names else len(names), tier))
    symbols = ("circle", "square", "diamond", "triangle-up", "cross", "star", "triangle-down", "x")
    weights = trains_weights(run)
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "an update" if weights else f"an update of rank {in_chart(tier)} at the start",
            "x": [at for at, _, _ in by_tier[tier]],
            "y": [rounded(share) for _, share, _ in by_tier[tier]],
            "text": [in_chart(client) for _, _, client in by_tier[tier]],
            "hovertemplate": "%{text}: %{y:.4f}<br>round %{x}<extra></extra>",
            "marker": {"color": f"@{index % 8}", "size": 8, "symbol": symbols[index % len(symbols)], "opacity": 0.85},
        }
        for index, tier in enumerate(order)
    ]


def _quantiles(rounds: Sequence[Round]) -> list[Trace]:
    figures = [_summary(item) for item in rounds]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": label,
            "x": [item.number for item in rounds],
            "y": [rounded(values[place]) for values in figures],
            "hovertemplate": "%{y:.4f}<br>round %{x}",
            "line": {"color": f"@{index}", "width": 2, "dash": dash},
        }
        for index, (label, place, dash) in enumerate(
            [("largest share", 2, "solid"), ("median share", 1, "dash"), ("least share", 0, "longdash")]
        )
    ]


def bounded_table(run: Run) -> Table | None:
    """Return what was bounded: the first updates of it, and to which share each part was lowered."""
    found = [
        [item.number, client, _part(part), rounded(share)]
        for item in run.rounds
        for client, told in item.bounded.items()
        for part, share in told.items()
    ]
    if not found:
        return None
    some = f", the first {MOST_ROWS} of {len(found):,}" if len(found) > MOST_ROWS else ""
    return Table(f"What was bounded{some}", ["round", "client", "of it", "lowered to this share"], found[:MOST_ROWS])


def _part(name: str) -> str:
    return {"A": "its change of A", "B": "its change of B", "weight": "its weight"}.get(name, name)


def _lowered(told: Mapping[str, float]) -> str:
    return ", ".join(f"{_part(part)} to {percent(share)}" for part, share in told.items())
