"""Charts of one run, client by client: ranks, shares of the average, prunes and failures, scores."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hetlora.report.facts import (
    chosen_clients,
    first_ranks,
    perplexities,
    rank_counts,
    ranks_over_rounds,
    tier_names,
    tier_of,
    trains_weights,
)
from hetlora.report.figures import (
    Cell,
    Chart,
    Table,
    Trace,
    axis_of_counts,
    axis_of_names,
    log_axis,
    rounded,
    x_of_rounds,
)
from hetlora.report.read import Round, Run, final_ranks
from hetlora.report.words import change, figure, in_chart, many, percent, several, shortened

__all__ = [
    "bounded_table",
    "clients_chart",
    "distribution_chart",
    "events_chart",
    "failures_table",
    "ranks_chart",
    "shares_chart",
    "spread_chart",
]

MOST_COLUMNS = 500
"""Rounds of a heat map; of more, every so-manyth is shown."""
MOST_MARKS = 3000
MOST_ROWS = 500
# Of Viridis, which reads the same to the colour-blind and in grey.
SEQUENCE = ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725")


def ranks_chart(run: Run, name: str, most: int) -> Chart | None:
    """Return every client's rank after each round, a row a client, with a mark where it pruned.

    Args:
        run: The run.
        name: Of the chart.
        most: Clients shown: those whose rank changed, and an even sample of the others.
    """
    began = first_ranks(run)
    if trains_weights(run) or not began or not run.rounds:
        return None
    changed = [client for item in run.rounds for client in item.prunes]
    everyone = sorted(began, key=lambda client: (began[client], client))
    clients = chosen_clients(everyone, changed, most)
    rounds, kept = _columns(run)
    rows = ranks_over_rounds(run, clients)
    shown = {client: [rows[client][at] for at in kept] for client in clients}
    place = {client: index for index, client in enumerate(clients)}
    ranks = sorted({rank for row in shown.values() for rank in row})
    heat = {
        **_heat(rounds, [shown[client] for client in clients]),
        "name": "rank",
        "colorscale": _steps(SEQUENCE),
        "zmin": min(ranks),
        "zmax": max(ranks) if len(ranks) > 1 else min(ranks) + 1,
        "colorbar": _bar("rank", ranks if len(ranks) <= 10 else None),
        "showscale": len(ranks) > 1,
        "hovertemplate": "%{text}<br>rank %{z} after round %{x}<extra></extra>",
    }
    pruned = [
        (item.number, client, rank) for item in run.rounds for client, rank in item.prunes.items() if client in place
    ][:MOST_MARKS]
    traces: list[Trace] = [heat]
    if pruned:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "pruned in this round",
                "x": [at for at, _, _ in pruned],
                "y": [place[client] for _, client, _ in pruned],
                "text": [in_chart(client) for _, client, _ in pruned],
                "customdata": [rank for _, _, rank in pruned],
                "hovertemplate": "%{text}<br>pruned to rank %{customdata} in round %{x}<extra></extra>",
                "marker": {
                    "symbol": "triangle-down",
                    "size": 8,
                    "color": "#ffffff",
                    "line": {"color": "#000000", "width": 1},
                },
            }
        )
    names = tier_names(run)
    table = Table(
        "Rank after each round",
        ["client", "tier of rank", "at the start", *(f"round {at}" for at in rounds)],
        [[client, tier_of(began[client], names), began[client], *shown[client]] for client in clients],
    )
    who = len({client for client in changed if client in began})
    prunes = sum(len(item.prunes) for item in run.rounds)
    told = (
        f"{who:,} of {many(len(began), 'client')} changed their rank, in {many(prunes, 'prune')}."
        if who
        else (f"No rank changed: {many(len(began), 'client')} kept the rank they began with.")
    )
    some = _which(clients, everyone, "those that changed first, and an even sample by rank") + _which_rounds(
        rounds, run
    )
    return _of_clients(name, "Rank of each client", told + some, traces, rounds, clients, table)


def distribution_chart(run: Run, name: str) -> Chart | None:
    """Return how many clients of each tier have which rank, at the start and at the end."""
    began = first_ranks(run)
    if trains_weights(run) or not began:
        return None
    last = dict(began)
    for item in run.rounds:
        last |= {**item.ranks, **item.prunes}
    last |= final_ranks(run)
    tiers = tier_names(run)
    own = {client: tier_of(rank, tiers) for client, rank in began.items()}
    tiers = [*(tier for tier in tiers if tier in set(own.values())), *sorted(set(own.values()) - set(tiers), key=int)]
    counts = {
        (tier, when): Counter(ranks[client] for client in own if own[client] == tier)
        for tier in tiers
        for when, ranks in (("start", began), ("end", last))
    }
    every = sorted({rank for counted in counts.values() for rank in counted})
    traces = [
        {
            "type": "bar",
            "name": f"rank {rank}",
            "x": [[f"tier {in_chart(tier)}" for tier, _ in counts], [when for _, when in counts]],
            "y": [counted.get(rank, 0) for counted in counts.values()],
            "marker": {
                "color": _between(SEQUENCE, index / max(1, len(every) - 1)),
                "line": {"color": "@bg", "width": 1},
            },
            "hovertemplate": "%{x}: %{y} clients<extra>" + f"rank {rank}</extra>",
        }
        for index, rank in enumerate(every)
    ]
    rows: list[list[Cell]] = [
        [tier, when, rank, counted[rank]] for (tier, when), counted in counts.items() for rank in sorted(counted)
    ]
    mean = [statistics.fmean(ranks.values()) for ranks in (began, {client: last[client] for client in began})]
    told = "; ".join(f"{count:,} at {rank}" for rank, count in rank_counts(last[client] for client in began))
    sentence = f"Clients by rank at the end: {told}. The mean rank went {change(mean[0], mean[1])}."
    listed = len(final_ranks(run))
    if run.summary is None and run.rounds:
        sentence += " Only clients that were in some cohort are counted, for the run is not complete."
    elif (population := int(run.head.get("clients") or 0)) > max(listed, len(began)):
        sentence += (
            f" Of {population:,} clients, {len(began):,} are known: those in a cohort, and those that were measured."
        )
    tallest = max(sum(counted.values()) for counted in counts.values())
    layout = {"barmode": "stack", "xaxis": {"type": "multicategory"}, "yaxis": axis_of_counts("clients", tallest)}
    return Chart(
        name,
        "Ranks by tier, at the start and at the end",
        sentence,
        traces,
        layout,
        Table("Clients by tier and rank", ["tier of rank", "when", "rank", "clients"], rows),
    )


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
    rounds, kept = _columns(run)
    items = [run.rounds[at] for at in kept]
    share = {client: [rounded(item.weights.get(client)) for item in items] for client in clients}
    times = {client: [_times(item, client) for item in items] for client in clients}
    heat = {
        **_heat(rounds, [times[client] for client in clients]),
        "name": "share",
        "customdata": [share[client] for client in clients],
        "colorscale": [[0, "#2166ac"], [0.5, "@mid"], [1, "#b35806"]],
        "zmin": -2,
        "zmax": 2,
        "colorbar": {
            **_bar("times the equal share", None),
            "tickvals": [-2, -1, 0, 1, 2],
            "ticktext": ["¼", "½", "1", "2", "4"],
        },
        "hovertemplate": "%{text}<br>share %{customdata:.4f} in round %{x}<extra></extra>",
    }
    traces: list[Trace] = [heat]
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
    some = _which(clients, everyone, "those that were bounded or had most, and an even sample by rank")
    return _of_clients(
        name,
        "Share of each client",
        _influence(weighted) + some + _which_rounds(rounds, run),
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


def events_chart(run: Run, name: str) -> Chart | None:
    """Return prunes and failures by round."""
    few = len(run.rounds) <= 60  # narrower bars have no room for stripes
    kinds: list[tuple[str, str, list[tuple[int, list[str]]]]] = [
        ("prunes", "", [(item.number, list(item.prunes)) for item in run.rounds]),
        ("failures", "/", [(item.number, list(item.failures)) for item in run.rounds]),
    ]
    traces: list[Trace] = [
        {
            "type": "bar",
            "name": label,
            "x": [at for at, _ in told],
            "y": [len(clients) for _, clients in told],
            # Some names will do: a name each of a thousand clients fits no tooltip.
            "text": [several([in_chart(client, 24) for client in clients], 4) for _, clients in told],
            "textposition": "none",
            "hovertemplate": "%{y} " + label + " in round %{x}<br>%{text}<extra></extra>",
            "marker": {
                "color": f"@{index}",
                "pattern": {"shape": pattern if few else "", "fillmode": "overlay", "fgcolor": "@bg", "size": 6},
            },
        }
        for index, (label, pattern, told) in enumerate(kinds)
        if any(clients for _, clients in told)
    ]
    if not traces:
        return None
    prunes, failures = (sum(len(clients) for _, clients in told) for _, _, told in kinds)
    asked = sum(len(item.ranks) for item in run.rounds)
    empty = sum(not item.weights for item in run.rounds)
    nothing = f" In {many(empty, 'round')} nobody gave anything." if empty else ""
    of = f", {percent(failures / asked)} of {asked:,} times that a client was asked" if asked and failures else ""
    rows = [
        [item.number, len(item.ranks), len(item.weights), len(item.prunes), len(item.failures)] for item in run.rounds
    ]
    table = Table("Prunes and failures by round", ["round", "asked", "gave an update", "pruned", "failed"], rows)
    layout = {
        "barmode": "stack",
        "xaxis": x_of_rounds([item.number for item in run.rounds]),
        "yaxis": axis_of_counts("clients", max(len(item.prunes) + len(item.failures) for item in run.rounds)),
    }
    sentence = f"{many(prunes, 'prune')}, {many(failures, 'failure')}{of}.{nothing}"
    return Chart(name, "Prunes and failures by round", sentence, traces, layout, table, height=300)


def failures_table(run: Run) -> tuple[Table, Table] | None:
    """Return the reasons, most frequent first, and the first failures one by one."""
    found = [(item.number, client, reason) for item in run.rounds for client, reason in item.failures.items()]
    if not found:
        return None
    counts = Counter(reason for _, _, reason in found)
    clients: dict[str, set[str]] = {}
    for _, client, reason in found:
        clients.setdefault(reason, set()).add(client)
    reasons: list[list[Cell]] = [[reason, count, len(clients[reason])] for reason, count in counts.most_common(50)]
    some = f", the 50 most frequent of {len(counts):,}" if len(counts) > 50 else ""
    first = f", the first {MOST_ROWS} of {len(found):,}" if len(found) > MOST_ROWS else ""
    return (
        Table(f"Reasons of failures{some}", ["reason", "times", "clients"], reasons),
        Table(f"Failures{first}", ["round", "client", "reason"], found[:MOST_ROWS]),
    )


def clients_chart(run: Run, name: str, most: int, local: Run | None) -> Chart | None:
    """Return each client's perplexity before and after, and alone where a run of that is given.

    Args:
        run: The run.
        name: Of the chart.
        most: Clients shown: those that changed most to either side, and an even sample of the others.
        local: Of the same data, in which everyone trained alone.
    """
    before, after, alone = perplexities(run.base), perplexities(run.final), perplexities(local.final if local else None)
    both = [client for client in after if client in before]
    if not both:
        return None
    ordered = sorted(both, key=lambda client: after[client] / before[client] if before[client] else 0.0)
    ends = [client for pair in zip(ordered, reversed(ordered), strict=True) for client in pair]
    clients = chosen_clients(ordered, ends[: most // 2], most)
    places = range(len(clients))
    lines: tuple[list[Any], list[Any]] = ([], [])
    for at, client in enumerate(clients):
        lines[0].extend([rounded(before[client]), rounded(after[client]), None])
        lines[1].extend([at, at, None])
    series = [("before (the base)", before, "circle-open", 2), ("after", after, "circle", 0)]
    if any(client in alone for client in clients):
        series.append(("alone (method local)", alone, "diamond", 1))
    traces: list[Trace] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "change",
            "showlegend": False,
            "x": lines[0],
            "y": lines[1],
            "hoverinfo": "skip",
            "line": {"color": "@muted", "width": 1},
        }
    ]
    for label, told, symbol, colour in series:
        known = [at for at in places if clients[at] in told]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label,
                "x": [rounded(told[clients[at]]) for at in known],
                "y": known,
                "text": [in_chart(clients[at]) for at in known],
                "hovertemplate": "%{text}<br>%{x:.4f} " + label + "<extra></extra>",
                "marker": {
                    "color": f"@{colour}",
                    "size": 9,
                    "symbol": symbol,
                    "line": {"width": 2 if "open" in symbol else 0},
                },
            }
        )
    shown = [value for trace in traces[1:] for value in trace["x"]]
    scores = (run.base, run.final, local.final if local else None)
    rouge = [{client: told.get("rougeL") for client, told in (s.clients if s else {}).items()} for s in scores]
    rows = [
        [
            client,
            *(rounded(told.get(client)) for told in (before, after, alone)),
            *(rounded(told.get(client)) for told in rouge),
        ]
        for client in ordered[:2000]
    ]
    columns = ["client", "perplexity before", "after", "alone", "ROUGE-L before", "after", "alone"]
    layout = {"xaxis": log_axis("perplexity", shown), "yaxis": axis_of_names(_labels(clients))}
    return Chart(
        name,
        "Perplexity by client",
        _clients_sentence(ordered, before, after, alone)
        + _which(clients, ordered, "those that changed most, and an even sample"),
        traces,
        layout,
        Table("Scores by client" + (", the first 2,000" if len(ordered) > 2000 else ""), columns, rows),
        height=_height(clients),
        labels=_labels(clients, 10),
    )


def _clients_sentence(
    clients: Sequence[str], before: Mapping[str, float], after: Mapping[str, float], alone: Mapping[str, float]
) -> str:
    better = sum(after[client] < before[client] for client in clients)
    best, worst = clients[0], clients[-1]
    told = f"{better:,} of {many(len(clients), 'measured client')} got a lower perplexity; "
    if len(clients) == 1:
        told += f"{shortened(best, 60)} {change(before[best], after[best])}."
    else:
        told += (
            f"{shortened(best, 60)} gained most ({change(before[best], after[best])}), {shortened(worst, 60)} least "
            f"({change(before[worst], after[worst])})."
        )
    common = [client for client in clients if client in alone]
    if common:
        ahead = sum(after[client] < alone[client] for client in common)
        told += f" {ahead:,} of {many(len(common), 'client')} got lower than by training alone."
    return told


def _of_clients(
    name: str,
    title: str,
    sentence: str,
    traces: Sequence[Trace],
    rounds: Sequence[int],
    clients: Sequence[str],
    table: Table,
) -> Chart:
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
        "yaxis": {**axis_of_names(_labels(clients)), "showgrid": False},
        "annotations": [{**below, "showarrow": False}],
        "margin": {"t": 72},
    }
    return Chart(
        name, title, sentence, [heat, *others], layout, table, height=_height(clients) + 50, labels=_labels(clients, 10)
    )


def _heat(rounds: Sequence[int], rows: Sequence[Sequence[float | None]]) -> Trace:
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


def _bar(title: str, ticks: Sequence[int] | None) -> dict[str, Any]:
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


def _height(clients: Sequence[str]) -> int:
    return 130 + 18 * max(3, len(clients))


def _labels(clients: Sequence[str], most: int = 22) -> list[str]:
    return [in_chart(client, most) for client in clients]


def _columns(run: Run) -> tuple[list[int], list[int]]:
    """Return the rounds that a heat map shows, and where they are in the run."""
    step = max(1, -(-len(run.rounds) // MOST_COLUMNS))
    kept = list(range(len(run.rounds) - 1, -1, -step))[::-1]
    return [run.rounds[at].number for at in kept], kept


def _which(clients: Sequence[str], everyone: Sequence[str], rule: str) -> str:
    return "" if len(clients) == len(everyone) else f" {len(clients)} of {len(everyone):,} clients are shown: {rule}."


def _which_rounds(rounds: Sequence[int], run: Run) -> str:
    if len(rounds) == len(run.rounds):
        return ""
    return f" {len(rounds)} of {len(run.rounds):,} rounds are shown, evenly."


def _steps(colours: Sequence[str]) -> list[list[Any]]:
    return [[index / (len(colours) - 1), colour] for index, colour in enumerate(colours)]


def _between(colours: Sequence[str], share: float) -> str:
    """Return the colour at a share of the way through a sequence of them."""
    at = share * (len(colours) - 1)
    low = min(int(at), len(colours) - 2)
    pairs = zip(_rgb(colours[low]), _rgb(colours[low + 1]), strict=True)
    return "#" + "".join(f"{round(one + (other - one) * (at - low)):02x}" for one, other in pairs)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
