"""Charts of one run per client: ranks, prunes and failures, scores."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from hetlora.commands.report.chart import (
    Cell,
    Chart,
    Table,
    Trace,
    axis_of_counts,
    axis_of_names,
    log_axis,
    rounded,
    scatter,
    x_of_rounds,
)
from hetlora.commands.report.heatmap import (
    MOST_ROWS,
    client_map,
    colour_bar,
    columns_of,
    heat,
    height_of,
    labels_of,
    marks,
    which_clients,
    which_rounds,
)
from hetlora.commands.report.summary import (
    begun_with,
    chosen_clients,
    first_ranks,
    perplexities,
    ranks_over_rounds,
    tier_names,
    tier_of,
    trains_weights,
)
from hetlora.runs.reader import Run, final_ranks, number
from hetlora.runs.text import change, in_chart, many, percent, several, shortened

__all__ = ["clients_chart", "distribution_chart", "events_chart", "failures_table", "ranks_chart"]

# Viridis: readable for the colour-blind and in grey.
SEQUENCE = ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725")


def ranks_chart(run: Run, name: str, limit: int) -> Chart | None:
    """Return every client's rank after each round, one row per client, with a mark where it pruned.

    Args:
        run: The run.
        name: The chart's name.
        limit: Number of clients: those whose rank changed, then an even sample of the others.
    """
    began = first_ranks(run)
    if trains_weights(run) or not began or not run.rounds:
        return None
    changed = [client for item in run.rounds for client in item.prunes]
    everyone = sorted(began, key=lambda client: (began[client], client))
    clients = chosen_clients(everyone, changed, limit)
    rounds, kept = columns_of(run)
    rows = ranks_over_rounds(run, clients)
    shown = {client: [rows[client][at] for at in kept] for client in clients}
    ranks = sorted({rank for row in shown.values() for rank in row})
    ranked = {
        **heat(rounds, [shown[client] for client in clients]),
        "name": "rank",
        "colorscale": [[index / (len(SEQUENCE) - 1), colour] for index, colour in enumerate(SEQUENCE)],
        "zmin": min(ranks),
        "zmax": max(ranks) if len(ranks) > 1 else min(ranks) + 1,
        "colorbar": colour_bar("rank", ranks if len(ranks) <= 10 else None),
        "showscale": len(ranks) > 1,
        "hovertemplate": "%{text}<br>rank %{z} after round %{x}<extra></extra>",
    }
    pruned = [
        (item.number, client, f"pruned to rank {rank}") for item in run.rounds for client, rank in item.prunes.items()
    ]
    marker = {"symbol": "triangle-down", "color": "#ffffff", "line": {"color": "#000000", "width": 1}}
    traces = [ranked, *marks("pruned in this round", clients, pruned, marker)]
    names = tier_names(run)
    table = Table(
        "Rank after each round",
        ["client", "tier of rank", "at the start", *(f"round {at}" for at in rounds)],
        [[client, tier_of(began[client], names), began[client], *shown[client]] for client in clients],
    )
    pruners = len({client for client in changed if client in began})
    sentence = (
        f"{pruners:,} of {many(len(began), 'client')} changed their rank, in {many(len(changed), 'prune')}."
        if pruners
        else (f"No rank changed: {many(len(began), 'client')} kept the rank they began with.")
    )
    sentence += which_clients(clients, everyone, "those that changed first, and an even sample by rank")
    sentence += which_rounds(rounds, run)
    return client_map(name, "Rank of each client", sentence, traces, rounds, clients, table)


def distribution_chart(run: Run, name: str) -> Chart | None:
    """Return the number of clients per tier and rank, at the start and at the end."""
    from plotly.colors import sample_colorscale

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
    colours = sample_colorscale(SEQUENCE, [index / max(1, len(every) - 1) for index in range(len(every))])
    traces = [
        {
            "type": "bar",
            "name": f"rank {rank}",
            "x": [[f"tier {in_chart(tier)}" for tier, _ in counts], [when for _, when in counts]],
            "y": [counted.get(rank, 0) for counted in counts.values()],
            "marker": {"color": colour, "line": {"color": "@bg", "width": 1}},
            "hovertemplate": "%{x}: %{y} clients<extra>" + f"rank {rank}</extra>",
        }
        for rank, colour in zip(every, colours, strict=True)
    ]
    rows: list[list[Cell]] = [
        [tier, when, rank, counted[rank]] for (tier, when), counted in counts.items() for rank in sorted(counted)
    ]
    mean = [statistics.fmean(ranks.values()) for ranks in (began, {client: last[client] for client in began})]
    at_end = sorted(Counter(last[client] for client in began).items())
    text = "; ".join(f"{count:,} at {rank}" for rank, count in at_end)
    sentence = f"Clients by rank at the end: {text}. The mean rank went {change(mean[0], mean[1])}."
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
            "x": [at for at, _ in events],
            "y": [len(clients) for _, clients in events],
            "text": [several([in_chart(client, 24) for client in clients], 4) for _, clients in events],
            "textposition": "none",
            "hovertemplate": "%{y} " + label + " in round %{x}<br>%{text}<extra></extra>",
            "marker": {
                "color": f"@{index}",
                "pattern": {"shape": pattern if few else "", "fillmode": "overlay", "fgcolor": "@bg", "size": 6},
            },
        }
        for index, (label, pattern, events) in enumerate(kinds)
        if any(clients for _, clients in events)
    ]
    if not traces:
        return None
    prunes, failures = (sum(len(clients) for _, clients in events) for _, _, events in kinds)
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
    """Return the reasons of failures, most frequent first, and the first failures."""
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


def clients_chart(run: Run, name: str, limit: int, local: Run | None) -> Chart | None:
    """Return each client's perplexity before and after, and, given a local run, of training alone.

    Args:
        run: The run.
        name: The chart's name.
        limit: Number of clients: those that changed most in both directions, then an even sample of the others.
        local: A run on the same data in which every client trained alone.
    """
    before, after, alone = (perplexities(scores) for scores in (run.before, run.final, local.final if local else None))
    both = [client for client in after if client in before]
    if not both:
        return None
    ordered = sorted(both, key=lambda client: after[client] / before[client] if before[client] else 0.0)
    ends = [client for pair in zip(ordered, reversed(ordered), strict=True) for client in pair]
    clients = chosen_clients(ordered, ends[: limit // 2], limit)
    places = range(len(clients))
    series = [(f"before ({begun_with([run])})", before, "circle-open", 2), ("after", after, "circle", 0)]
    if any(client in alone for client in clients):
        series.append(("alone (method local)", alone, "diamond", 1))
    x = [value for client in clients for value in (rounded(before[client]), rounded(after[client]), None)]
    y = [value for at in places for value in (at, at, None)]
    muted = {"color": "@muted", "width": 1}
    traces = [scatter("change", "lines", x, y, showlegend=False, hoverinfo="skip", line=muted)]
    for label, perplexity, symbol, colour in series:
        known = [at for at in places if clients[at] in perplexity]
        marker = {"size": 9, "line": {"width": 2 if "open" in symbol else 0}}
        traces.append(
            scatter(
                label,
                "markers",
                [rounded(perplexity[clients[at]]) for at in known],
                known,
                text=[in_chart(clients[at]) for at in known],
                hovertemplate="%{text}<br>%{x:.4f} " + label + "<extra></extra>",
                marker={**marker, "color": f"@{colour}", "symbol": symbol},
            )
        )
    shown = [value for trace in traces[1:] for value in trace["x"]]
    scores = (run.before, run.final, local.final if local else None)
    rouge = [{client: item.get("rougeL") for client, item in (s.clients if s else {}).items()} for s in scores]
    rows = [
        [client, *(rounded(column.get(client)) for column in (before, after, alone, *rouge))]
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
    sentence = f"{better:,} of {many(len(clients), 'measured client')} got a lower perplexity; "
    if len(clients) == 1:
        sentence += f"{shortened(best, 60)} {change(before[best], after[best])}."
    else:
        sentence += (
            f"{shortened(best, 60)} gained most ({change(before[best], after[best])}), {shortened(worst, 60)} least "
            f"({change(before[worst], after[worst])})."
        )
    if common := [client for client in clients if client in alone]:
        ahead = sum(after[client] < alone[client] for client in common)
        sentence += f" {ahead:,} of {many(len(common), 'client')} got lower than by training alone."
    return sentence
