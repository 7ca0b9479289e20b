"""Perplexity per tier of devices, before the first round and after the last, for all runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hetlora.commands.report.chart import Cell, Chart, Table, axis_of_names, dots, log_axis, offsets, rounded
from hetlora.commands.report.summary import Group, Point, begun_with, mean_and_std
from hetlora.runs.reader import Scores, section
from hetlora.runs.text import change, figure, in_chart

__all__ = ["tiers_chart"]

_Tiers = Mapping[str, tuple[Point | None, Point | None]]
"""Per tier, perplexity and ROUGE-L."""


def tiers_chart(groups: Sequence[Group]) -> Chart | None:
    """Return the perplexity of each tier before and after, one mark per group."""
    after = [(group.label, _by_tier([run.final for run in group.runs])) for group in groups]
    runs = [run for group in groups for run in group.runs]
    alike = len({str((section(run.config, "model"), section(run.config, "data"))) for run in runs}) == 1
    # If any run has a final measurement, before and after cover the same runs.
    before = _by_tier([run.before for run in [run for run in runs if run.final] or runs]) if alike else {}
    tiers = sorted({*before, *(tier for _, scores in after for tier in scores)}, key=_lowest)
    series = [(f"before ({begun_with(runs)})", before), *after]
    series = [(label, scores) for label, scores in series if any(perplexity for perplexity, _ in scores.values())]
    if not tiers or not series:
        return None
    apart = offsets(len(series))
    traces = [
        dots(label, index, [(at + apart[index], scores[tier][0]) for at, tier in enumerate(tiers) if tier in scores])
        for index, (label, scores) in enumerate(series)
    ]
    rows: list[list[Cell]] = []
    for label, scores in series:
        for tier in (tier for tier in tiers if tier in scores):
            perplexity, rouge = scores[tier]
            mean, deviation = (perplexity.mean, perplexity.std) if perplexity else (None, None)
            rows.append([label, tier, rounded(mean), rounded(deviation), rounded(rouge.mean if rouge else None)])
    values = [point.mean for _, scores in series for point, _ in scores.values() if point]
    layout = {
        "xaxis": log_axis("perplexity", values),
        "yaxis": axis_of_names([f"rank {in_chart(tier)}" for tier in tiers]),
    }
    columns = ["measured", "tier of rank", "perplexity", "standard deviation", "ROUGE-L"]
    height = 120 + (30 + 8 * len(series)) * len(tiers)
    table = Table("Scores by tier", columns, rows)
    sentence = _tiers_sentence(before, after) + _not_ended(groups)
    return Chart("tiers", "Perplexity by tier", sentence, traces, layout, table, height=height)


def _not_ended(groups: Sequence[Group]) -> str:
    """Name the groups of which only some runs have a final measurement."""
    ended = [(group.label, sum(run.final is not None for run in group.runs), len(group.runs)) for group in groups]
    few = [f"{done} of {every} runs of {label}" for label, done, every in ended if 0 < done < every]
    return f" Measured at their end: {'; '.join(few)}." if few else ""


def _by_tier(measured: Sequence[Scores | None]) -> _Tiers:
    """Return per tier perplexity and ROUGE-L over the runs that have them."""
    names = {tier for scores in measured if scores for tier in scores.tiers}

    def over(tier: str, figure_of: str) -> Point | None:
        found = [scores.tiers.get(tier, {}).get(figure_of) for scores in measured if scores]
        values = [value for value in found if value is not None]
        return mean_and_std(values) if values else None

    return {tier: (over(tier, "perplexity"), over(tier, "rougeL")) for tier in names}


def _lowest(tier: str) -> tuple[int, str]:
    start = tier.split("-")[0]
    return (int(start) if start.isdigit() and len(start) < 10 else 0, tier)


def _tiers_sentence(before: _Tiers, after: Sequence[tuple[str, _Tiers]]) -> str:
    if len(after) == 1:
        ((_, scores),) = after
        both = [
            (tier, was, now)
            for tier in sorted(scores, key=_lowest)
            if tier in before and (was := before[tier][0]) and (now := scores[tier][0])
        ]
        if not both:
            return "The tiers were measured once only: the run has no last measurement."
        return (
            f"Perplexity by tier: {'; '.join(f'rank {tier} {change(was.mean, now.mean)}' for tier, was, now in both)}."
        )
    known = [(label, [point.mean for point, _ in scores.values() if point]) for label, scores in after]
    means = [(label, mean_and_std(values)) for label, values in known if values]
    if not means:
        return "No run has a last measurement; the marks are from before the first round."
    best, lowest = min(means, key=lambda item: item[1].mean)
    gap, closest = min(means, key=lambda item: item[1].most / item[1].least)
    return (
        f"Over its tiers, {best} has the lowest mean perplexity, {figure(lowest.mean)}; the tiers of {gap} lie closest, "
        f"between {figure(closest.least)} and {figure(closest.most)}."
    )
