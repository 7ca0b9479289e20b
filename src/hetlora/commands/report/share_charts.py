"""Charts of each client's share in the average of each round, and of bounded updates."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

from hetlora.commands.report.chart import Chart, Table, Trace, colour, rounded, scatter, symbol, x_of_rounds
from hetlora.commands.report.heatmap import (
    MOST_MARKS,
    MOST_ROWS,
    client_map,
    colour_bar,
    columns_of,
    heat,
    marks,
    which_clients,
    which_rounds,
)
from hetlora.commands.report.summary import chosen_clients, first_ranks, tier_names, tier_of, trains_weights
from hetlora.runs.reader import Round, Run
from hetlora.runs.text import figure, in_chart, many, percent, shortened

__all__ = ["bounded_table", "shares_chart", "spread_chart"]


def shares_chart(run: Run, name: str, limit: int) -> Chart | None:
    """Return each client's share of every round's average as a multiple of the equal share, one row per client."""
    began = first_ranks(run)
    weighted = [item for item in run.rounds if item.weights]
    if not weighted:
        return None
    total: Counter[str] = Counter()
    for item in weighted:
        total.update(item.weights)
    bounded = [client for item in run.rounds for client in item.bounded]
    everyone = sorted(total, key=lambda client: (began.get(client, 0), client))
    loudest = [client for client, _ in total.most_common(limit // 2)]
    clients = chosen_clients(everyone, [*dict.fromkeys(bounded), *loudest], limit)
    rounds, kept = columns_of(run)
    items = [run.rounds[at] for at in kept]
    share = {client: [rounded(item.weights.get(client)) for item in items] for client in clients}
    shared = {
        **heat(rounds, [[_times(item, client) for item in items] for client in clients]),
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
    events = [
        (item.number, client, ", ".join(f"{_part(part)} to {percent(share)}" for part, share in parts.items()))
        for item in run.rounds
        for client, parts in item.bounded.items()
    ]
    marker = {"symbol": "circle-open", "color": "@text", "line": {"width": 1.5}}
    traces = [shared, *marks("bounded", clients, events, marker)]
    table = Table(
        "Share of the average in each round",
        ["client", *(f"round {at}" for at in rounds)],
        [
            ["equal share", *(rounded(1 / len(item.weights)) if item.weights else None for item in items)],
            *([client, *share[client]] for client in clients),
        ],
    )
    sentence = _influence(weighted)
    sentence += which_clients(clients, everyone, "those that were bounded or had most, and an even sample by rank")
    sentence += which_rounds(rounds, run)
    return client_map(name, "Share of each client", sentence, traces, rounds, clients, table)


def _times(item: Round, client: str) -> float | None:
    """Return log2 of a client's share over the equal share; None if it gave nothing."""
    share = item.weights.get(client)
    if share is None:
        return None
    times = share * len(item.weights)
    return round(math.log2(times), 3) if times > 2**-6 else -6.0


def _influence(rounds: Sequence[Round]) -> str:
    share, client, item = max(
        ((share, client, item) for item in rounds for client, share in item.weights.items()), key=lambda found: found[0]
    )
    times = share * len(item.weights)
    if all(abs(value * len(item.weights) - 1) < 1e-6 for item in rounds for value in item.weights.values()):
        return "Everyone had the equal share in every round."
    bounded = sum(len(item.bounded) for item in rounds)
    whose = "its" if bounded == 1 else "their"
    after = f" {many(bounded, 'update')} had {whose} influence bounded." if bounded else " Nothing was bounded."
    return (
        f"The largest share was {percent(share)}, of {shortened(client, 60)} in round {item.number}: {figure(times)} times the "
        f"equal share of {percent(1 / len(item.weights))}.{after}"
    )


def spread_chart(run: Run, name: str) -> Chart | None:
    """Return the shares of every round beside the equal share: a mark per update, or quantiles if there are many."""
    rounds = [item for item in run.rounds if item.weights]
    if not rounds:
        return None
    updates = sum(len(item.weights) for item in rounds)
    traces = _marks(run, rounds) if updates <= MOST_MARKS else _quantiles(rounds)
    equal = [rounded(1 / len(item.weights)) for item in rounds]
    mode, line = "lines+markers" if len(rounds) == 1 else "lines", {"color": "@text", "width": 1.5, "dash": "dot"}
    hover = "equal share %{y:.4f}<br>round %{x}<extra></extra>"
    numbers = [item.number for item in rounds]
    traces.append(scatter("equal share", mode, numbers, equal, line=line, hovertemplate=hover))
    rows = [
        [item.number, len(item.weights), even, *(rounded(value) for value in _summary(item))]
        for item, even in zip(rounds, equal, strict=True)
    ]
    middle = statistics.fmean(max(item.weights.values()) * len(item.weights) for item in rounds)
    sentence = f"In the mean over the rounds, the largest share is {figure(middle)} times the equal one."
    columns = ["round", "updates", "equal share", "least", "median", "largest"]
    layout = {
        "xaxis": x_of_rounds(numbers),
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
    weights = trains_weights(run)
    return [
        scatter(
            "an update" if weights else f"an update of rank {in_chart(tier)} at the start",
            "markers",
            [at for at, _, _ in by_tier[tier]],
            [rounded(share) for _, share, _ in by_tier[tier]],
            text=[in_chart(client) for _, _, client in by_tier[tier]],
            hovertemplate="%{text}: %{y:.4f}<br>round %{x}<extra></extra>",
            marker={"color": colour(index), "size": 8, "symbol": symbol(index), "opacity": 0.85},
        )
        for index, tier in enumerate(order)
    ]


def _quantiles(rounds: Sequence[Round]) -> list[Trace]:
    figures = [_summary(item) for item in rounds]
    return [
        scatter(
            label,
            "lines",
            [item.number for item in rounds],
            [rounded(values[place]) for values in figures],
            hovertemplate="%{y:.4f}<br>round %{x}",
            line={"color": colour(index), "width": 2, "dash": dash},
        )
        for index, (label, place, dash) in enumerate(
            [("largest share", 2, "solid"), ("median share", 1, "dash"), ("least share", 0, "longdash")]
        )
    ]


def bounded_table(run: Run) -> Table | None:
    """Return the first bounded updates, with the share that each part was lowered to."""
    found = [
        [item.number, client, _part(part), rounded(share)]
        for item in run.rounds
        for client, parts in item.bounded.items()
        for part, share in parts.items()
    ]
    if not found:
        return None
    some = f", the first {MOST_ROWS} of {len(found):,}" if len(found) > MOST_ROWS else ""
    return Table(f"What was bounded{some}", ["round", "client", "of it", "lowered to this share"], found[:MOST_ROWS])


def _part(name: str) -> str:
    return {"A": "its change of A", "B": "its change of B", "weight": "its weight"}.get(name, name)
