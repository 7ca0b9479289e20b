"""Charts that compare runs: curves, slots, traffic."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from hetlora.commands.report.chart import (
    DASHES,
    Cell,
    Chart,
    Table,
    Trace,
    View,
    axis_of_counts,
    axis_of_names,
    colour,
    dots,
    log_axis,
    offsets,
    rounded,
    scatter,
    symbol,
    x_of_rounds,
)
from hetlora.commands.report.summary import Curve, Group, Point, averages, curve, mean_and_std, totals, trains_weights
from hetlora.runs.reader import Round, Run, Scores, number, section
from hetlora.runs.text import figure, in_chart, many, megabytes, percent, several, span

__all__ = ["loss_chart", "memory_table", "perplexity_chart", "slots_chart", "traffic_chart"]

MOST_POINTS = 1000
"""Points of a line; a longer line is thinned."""


def loss_chart(groups: Sequence[Group]) -> Chart | None:
    """Return the training loss over the rounds: per group the mean, with a band of one standard deviation."""
    curves = [curve(group, lambda item: item.loss, lambda _: None, gaps=True) for group in groups]
    missing = sum(item.loss is None for group in groups for run in group.runs for item in run.rounds)
    gaps = f" Gaps: {many(missing, 'round')} without a finite loss or an update." if missing else ""
    return _curves("loss", "Training loss", "training loss", groups, curves, gaps)


def perplexity_chart(groups: Sequence[Group]) -> Chart | None:
    """Return the held-out perplexity over the rounds; round 0 is the base, or the adapter that the run started from."""
    curves = [
        curve(group, lambda item: item.perplexity, lambda run: _overall(run.before), gaps=False) for group in groups
    ]
    begun = [(group.label, _overall(run.base)) for group in groups for run in group.runs if run.starts_from_adapter]
    bases = [base for _, base in begun if base is not None]
    names = several(list(dict.fromkeys(label for label, _ in begun)))
    alone = (
        f" Round 0 is with the adapter that {names} started from; the base alone has {span(bases)}." if bases else ""
    )
    return _curves("perplexity", "Held-out perplexity", "perplexity", groups, curves, alone)


def _overall(scores: Scores | None) -> float | None:
    return scores.overall.get("perplexity") if scores else None


def _curves(
    name: str, title: str, what: str, groups: Sequence[Group], curves: Sequence[Curve], more: str
) -> Chart | None:
    traces: list[Trace] = []
    by_round: list[list[float]] = []
    by_megabytes: list[list[float]] = []
    for index, (group, whole) in enumerate(zip(groups, curves, strict=True)):
        line = _thinned(whole)
        if not any(line.points):
            continue
        if band := _band(line):
            by_round.append(band[0])
            by_megabytes.append(band[1])
            traces.append(_band_trace(band[0], band[2], group.label, index))
        by_round.append([float(at) for at in line.rounds])
        by_megabytes.append([rounded(sent) or 0.0 for sent in line.megabytes])
        traces.append(_line_trace(line, group.label, index))
    if not traces:
        return None
    values = [value for line in curves for point in line.points if point for value in (point.least, point.most)]
    rounds = [at for line in curves for at in line.rounds]
    views = (
        View("by round", by_round, x_of_rounds(rounds)),
        View("by megabytes sent", by_megabytes, {"title": {"text": "MB sent up and down until then"}}),
    )
    rows = [
        [group.label, at, rounded(sent), *_cells(point)]
        for group, line in zip(groups, curves, strict=True)
        for at, sent, point in zip(*_thinned(line), strict=True)
    ]
    columns = ["run", "round", "MB sent", f"{what}, mean", "standard deviation", "min", "max", "runs"]
    table = Table(f"{title} by round", columns, rows)
    layout = {"xaxis": x_of_rounds(rounds), "yaxis": log_axis(what, values)}
    return Chart(name, title, _course(what, groups, curves) + more, traces, layout, table, views)


def _thinned(line: Curve) -> Curve:
    """Keep at most about `MOST_POINTS` evenly spaced points, and the last one."""
    step = -(-len(line.rounds) // MOST_POINTS)
    if step <= 1:
        return line
    kept = sorted({*range(0, len(line.rounds), step), len(line.rounds) - 1})
    return Curve(*([column[at] for at in kept] for column in line))


def _cells(point: Point | None) -> list[Cell]:
    if point is None:
        return [None, None, None, None, 0]
    return [*(rounded(value) for value in point[:4]), point.runs]


def _line_trace(line: Curve, label: str, index: int) -> Trace:
    seeds = any(point and point.runs > 1 for point in line.points)
    spread_of = "<br>± %{customdata[2]:.3g}, %{customdata[3]:.4g} to %{customdata[4]:.4g}, %{customdata[5]} runs"
    where = "<br>round %{customdata[0]}, %{customdata[1]:.3f} MB sent"
    return scatter(
        in_chart(label),
        "lines+markers" if len(line.rounds) <= 60 else "lines",
        line.rounds,
        [rounded(point.mean) if point else None for point in line.points],
        legendgroup=str(index),
        customdata=[[at, rounded(mb), *_cells(point)[1:]] for at, mb, point in zip(*line, strict=True)],
        hovertemplate="%{y:.4f}" + (spread_of if seeds else "") + where,
        line={"color": colour(index), "width": 2, "dash": DASHES[index % len(DASHES)]},
        marker={"color": colour(index), "size": 6, "symbol": symbol(index)},
    )


def _band(line: Curve) -> tuple[list[float], list[float], list[float | None]] | None:
    """Return the outline of mean ± standard deviation as rounds, megabytes and values, forth and back."""
    known = [
        (at, sent, point) for at, sent, point in zip(*line, strict=True) if point is not None and point.std is not None
    ]
    if not known:
        return None
    # A log axis has no place for values below zero; the band then ends at the minimum of the runs.
    high = [point.mean + (point.std or 0.0) for _, _, point in known]
    low = [down if (down := point.mean - (point.std or 0.0)) > 0 else point.least for _, _, point in known]
    rounds, megabytes_sent = [float(at) for at, _, _ in known], [rounded(sent) or 0.0 for _, sent, _ in known]
    outline = [rounded(value) for value in (*high, *reversed(low))]
    return rounds + rounds[::-1], megabytes_sent + megabytes_sent[::-1], outline


def _band_trace(rounds: Sequence[float], values: Sequence[float | None], label: str, index: int) -> Trace:
    name, fill = in_chart(f"{label}: ± standard deviation"), colour(index, 0.18)
    hidden = {"legendgroup": str(index), "showlegend": False, "hoverinfo": "skip"}
    line = {"width": 0, "color": fill}
    return scatter(name, "lines", rounds, values, fill="toself", fillcolor=fill, line=line, **hidden)


def _course(what: str, groups: Sequence[Group], curves: Sequence[Curve]) -> str:
    """Describe where the lines begin and end, over the rounds that all runs of a line have."""
    known: list[tuple[str, list[tuple[int, Point]]]] = []
    longer: list[str] = []
    for group, line in zip(groups, curves, strict=True):
        points = [(at, point) for at, point in zip(line.rounds, line.points, strict=True) if point]
        runs = max((point.runs for _, point in points), default=0)
        whole = [(at, point) for at, point in points if point.runs == runs]
        some = f", of {runs} of its {len(group.runs)} runs," if runs < len(group.runs) else ""
        some = ", in all of its runs," if not some and len(whole) == 1 < len(points) else some
        if whole:
            known.append((group.label + some, whole))
            longer += [group.label] if points[-1] != whole[-1] else []
    fewer = f" Later figures of {several(longer)} are of fewer runs." if longer else ""
    return _ends(what, known) + fewer


def _ends(what: str, known: Sequence[tuple[str, Sequence[tuple[int, Point]]]]) -> str:
    if len(known) == 1:
        ((label, points),) = known
        (first_at, first), (last_at, last) = points[0], points[-1]
        began = "before the first round" if first_at == 0 else f"in round {first_at}"
        if len(points) == 1:
            return f"The {what} of {label} is known {began} only: {figure(first.mean)}."
        best_at, best = min(points, key=lambda item: item[1].mean)
        lowest = "" if best.mean >= last.mean else f", and was lowest in round {best_at} with {figure(best.mean)}"
        deviation = f" ± {figure(last.std)}" if last.std is not None else ""
        return (
            f"The {what} of {label} was {figure(first.mean)} {began} and is {figure(last.mean)}{deviation} after round "
            f"{last_at}{lowest}."
        )
    low = min(known, key=lambda item: item[1][-1][1].mean)
    high = max(known, key=lambda item: item[1][-1][1].mean)
    return (
        f"Of {len(known)} lines, {low[0]} ends lowest, at {what} {figure(low[1][-1][1].mean)} after round {low[1][-1][0]}, and "
        f"{high[0]} highest, at {figure(high[1][-1][1].mean)} after round {high[1][-1][0]}."
    )


def slots_chart(groups: Sequence[Group]) -> Chart | None:
    """Return the number of live slots of the global adapter, beside its rank; of a single run also the ranks given back."""
    lines = [
        (index, group, line)
        for index, group in enumerate(groups)
        if all(averages(run) and not trains_weights(run) for run in group.runs)
        and len((line := curve(group, lambda item: item.live_slots, _max_rank, gaps=True)).rounds) > 1
    ]
    if not lines:
        return None
    traces = [_line_trace(_thinned(line), f"live slots: {group.label}", index) for index, group, line in lines]
    for trace in traces:
        trace["hovertemplate"] = "%{y:.4~g} live slots<br>round %{customdata[0]}"
    if len(groups) == 1 and len(groups[0].runs) == 1:
        traces += _carried(groups[0].runs[0])
    widest = sorted({int(rank) for _, group, _ in lines for run in group.runs if (rank := _max_rank(run))})
    last = max(line.rounds[-1] for _, _, line in lines)
    traces += [_level(f"rank of the global adapter, {rank}", rank, last) for rank in widest]
    counted = traces[: len(traces) - len(widest)]
    rows = [[line["name"], x, y] for line in counted for x, y in zip(line["x"], line["y"], strict=True)]
    sentence = _slots_sentence([(group.label, line) for _, group, line in lines])
    layout = {"xaxis": x_of_rounds([0, last]), "yaxis": axis_of_counts("slots", max(widest, default=0))}
    table = Table("Slots by round", ["line", "round", "slots"], rows)
    return Chart("slots", "Live slots", sentence, traces, layout, table)


def _max_rank(run: Run) -> float | None:
    return number(run.head.get("max_rank"))


def _carried(run: Run) -> list[Trace]:
    """Return the largest rank given back per round, and the mean rank weighted by share."""

    def given(item: Round) -> dict[str, int]:
        return {name: item.prunes.get(name, item.ranks[name]) for name in item.weights if name in item.ranks}

    known = [(item.number, ranks, item.weights) for item in run.rounds if (ranks := given(item))]
    lines: list[tuple[str, Callable[[Mapping[str, int], Mapping[str, float]], float]]] = [
        ("widest rank given back", lambda ranks, _: max(ranks.values())),
        ("mean rank given back, by share", lambda ranks, weights: sum(weights[name] * ranks[name] for name in ranks)),
    ]
    return [
        {
            **_line_trace(
                _thinned(
                    Curve([at for at, *_ in known], [0.0] * len(known), [mean_and_std([of(r, w)]) for _, r, w in known])
                ),
                label,
                place,
            ),
            "hovertemplate": "rank %{y:.3~g}<br>round %{customdata[0]}",
        }
        for place, (label, of) in enumerate(lines, start=1)
        if known
    ]


def _level(label: str, value: float, last: int) -> Trace:
    line = {"color": "@text", "width": 1.5, "dash": "dot"}
    return scatter(label, "lines", [0, last], [value, value], hovertemplate="%{y}", line=line)


def _slots_sentence(lines: Sequence[tuple[str, Curve]]) -> str:
    ends = [(label, line.points[0], line.points[-1], line.rounds[-1]) for label, line in lines]
    died = [
        f"{first.mean - last.mean:g} of {first.mean:g} slots of {label} have died by round {at}"
        for label, first, last, at in ends
        if first and last and last.mean < first.mean
    ]
    if not died:
        return f"All slots of {several([label for label, *_ in ends])} are alive to the end."
    others = "" if len(died) == len(ends) else " All of the others are alive."
    return f"{'; '.join(died)}: they are zero in A and in B, and nobody can revive them.{others}"


def traffic_chart(groups: Sequence[Group]) -> Chart | None:
    """Return the megabytes sent, beside those of full fine-tuning with the same clients."""
    names = ["sent up", "sent down", "full fine-tuning, up", "full fine-tuning, down"]
    sent: dict[str, list[Point | None]] = {name: [] for name in names}
    rows: list[list[Cell]] = []
    for group in groups:
        four = [(sums.bytes_up, sums.bytes_down, sums.full_up, sums.full_down) for sums in map(totals, group.runs)]
        points = [mean_and_std([value / 1e6 for value in column]) for column in zip(*four, strict=True)]
        for name, point in zip(names, points, strict=True):
            sent[name].append(point if point.mean else None)
        rows.append([group.label, *(rounded(point.mean) for point in points)])
    apart = offsets(len(sent))
    traces = [
        dots(name, index, [(at + apart[index], point) for at, point in enumerate(points_of)])
        for index, (name, points_of) in enumerate(sent.items())
    ]
    traces = [{**trace, "hovertemplate": "%{x:.4~g} MB"} for trace in traces if trace["x"]]
    if not traces:
        return None
    labels = [group.label for group in groups]
    layout = {
        "xaxis": log_axis("MB", [value for trace in traces for value in trace["x"]]),
        "yaxis": axis_of_names([in_chart(label, 26) for label in labels]),
    }
    table = Table("Megabytes sent", ["run", *(f"{name}, MB" for name in names)], rows)
    return Chart(
        "traffic",
        "Megabytes sent",
        _traffic_sentence(groups),
        traces,
        layout,
        table,
        height=170 + 40 * len(groups),
        labels=[in_chart(label, 12) for label in labels],
    )


def _traffic_sentence(groups: Sequence[Group]) -> str:
    parts = []
    for group in groups[:6]:
        sums = [totals(run) for run in group.runs]
        ours = statistics.fmean(run.bytes_up + run.bytes_down for run in sums)
        full = statistics.fmean(run.full_up + run.full_down for run in sums)
        beside = (
            f", {percent(ours / full)} of the {megabytes(full)} of full fine-tuning" if full and ours < full else ""
        )
        parts.append(f"{group.label} sent {f'{megabytes(ours)} in both directions{beside}' if ours else 'nothing'}")
    more = f"; {len(groups) - 6} more are in the table" if len(groups) > 6 else ""
    return "; ".join(parts) + more + "."


def memory_table(runs: Sequence[Run]) -> Table:
    """Return the trained parameters and the memory per run, beside arithmetic on the base's size."""
    rows: list[list[Cell]] = []
    for run in runs:
        base = int(number(run.head.get("base_parameters")) or 0)
        trained = [int(value) for item in section(run.head, "trainable_parameters").values() if (value := number(item))]
        share = percent(max(trained) / base) if trained and base else None
        travelled = [sum(item.travelled) for item in run.rounds if item.travelled]
        rows.append(
            [
                run.label,
                base or None,
                min(trained, default=None),
                max(trained, default=None),
                share,
                rounded(16 * max(trained) / 1e6) if trained else None,
                rounded(16 * base / 1e6) if base else None,
                rounded(number((run.summary or {}).get("peak_megabytes"))),
                rounded(sum(travelled) / 1e6) if travelled else None,
            ]
        )
    columns = [
        "run",
        "numbers in the base",
        "trained by a client, least",
        "trained by a client, most",
        "most, of the base",
        "16 bytes a trained number, MB",
        "16 bytes a number of the base, MB",
        "peak of the process, MB",
        "travelled over Flower, MB",
    ]
    return Table("Parameters and memory", columns, rows)
