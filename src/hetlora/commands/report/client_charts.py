"""Charts of one run, client by client: ranks, prunes and failures, scores."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hetlora.commands.report.chart import (
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
from hetlora.commands.report.heatmap import (
    MOST_MARKS,
    MOST_ROWS,
    client_map,
    colour_bar,
    columns_of,
    heat,
    height_of,
    labels_of,
    which_clients,
    which_rounds,
)
from hetlora.commands.report.summary import (
    begun_with,
    chosen_clients,
    first_ranks,
    perplexities,
    rank_counts,
    ranks_over_rounds,
    tier_names,
    tier_of,
    trains_weights,
)
from hetlora.runs.reader import Run, final_ranks, number
from hetlora.runs.text import change, in_chart, many, percent, several, shortened

__all__ = ["clients_chart", "distribution_chart", "events_chart", "failures_table", "ranks_chart"]

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
    rounds, kept = columns_of(run)
    rows = ranks_over_rounds(run, clients)
    shown = {client: [rows[client][at] for at in kept] for client in clients}
    place = {client: index for index, client in enumerate(clients)}
    ranks = sorted({rank for row in shown.values() for rank in row})
    ranked = {
        **heat(rounds, [shown[client] for client in clients]),
        "name": "rank",
        "colorscale": _steps(SEQUENCE),
        "zmin": min(ranks),
        "zmax": max(ranks) if len(ranks) > 1 else min(ranks) + 1,
        "colorbar": colour_bar("rank", ranks if len(ranks) <= 10 else None),
        "showscale": len(ranks) > 1,
        "hovertemplate": "%{text}<br>rank %{z} after round %{x}<extra></extra>",
    }
    pruned = [
        (item.number, client, rank) for item in run.rounds for client, rank in item.prunes.items() if client in place
    ][:MOST_MARKS]
    traces: list[Trace] = [ranked]
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
    some = which_clients(clients, everyone, "those that changed first, and an even sample by rank") + which_rounds(
        rounds, run
    )
    return client_map(name, "Rank of each client", told + some, traces, rounds, clients, table)


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
    elif (population := int(number(run.head.get("clients")) or 0)) > max(listed, len(began)):
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
    empty = sum(not item.updates for item in run.rounds)
    nothing = f" In {many(empty, 'round')} nobody gave anything." if empty else ""
    summed, updates = sum(len(item.summed) for item in run.rounds), sum(item.updates for item in run.rounds)
    if summed:
        nothing += f" Of {summed:,} of {updates:,} updates no more is known than the sums that they are in."
    of = f", {percent(failures / asked)} of {asked:,} times that a client was asked" if asked and failures else ""
    rows = [[item.number, len(item.ranks), item.updates, len(item.prunes), len(item.failures)] for item in run.rounds]
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
    before, after, alone = (perplexities(scores) for scores in (run.before, run.final, local.final if local else None))
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
    series = [(f"before ({begun_with([run])})", before, "circle-open", 2), ("after", after, "circle", 0)]
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
    scores = (run.before, run.final, local.final if local else None)
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
    layout = {"xaxis": log_axis("perplexity", shown), "yaxis": axis_of_names(labels_of(clients))}
    return Chart(
        name,
        "Perplexity by client",
        _clients_sentence(ordered, before, after, alone)
        + which_clients(clients, ordered, "those that changed most, and an even sample"),
        traces,
        layout,
        Table("Scores by client" + (", the first 2,000" if len(ordered) > 2000 else ""), columns, rows),
        height=height_of(clients),
        labels=labels_of(clients, 10),
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
