"""Draw a study's figures from its outcome with matplotlib, as reproducible SVG files."""

from __future__ import annotations

import importlib.util
import io
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hetlora.core.ranks import tiers_of
from hetlora.errors import HetLoraError
from studies.outcome import Outcome
from studies.study import FigureEntry

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw", "need_matplotlib", "paired", "tier_means"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")
"""Okabe and Ito's, which people who see fewer colours tell apart."""

DASHES = ("-", "--", ":", "-.")

HIGHEST_RATIO = 1.4
"""A figure of rates ends at so many times its lowest perplexity: beside a rate that diverged nothing else could be seen."""

METRICS = {"perplexity": "held-out perplexity", "rougeL": "ROUGE-L"}
Figures = Mapping[str, Any]
Values = Sequence[float | None]


def need_matplotlib() -> None:
    """Raise where figures cannot be drawn.

    Raises:
        HetLoraError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise HetLoraError("the figures of a study need matplotlib: in the clone, pip install -e '.[reproduce]'")


def draw(outcome: Outcome, entry: FigureEntry) -> str:
    """Return a figure as the text of an SVG file.

    Args:
        outcome: The study's outcome.
        entry: The figure and its methods.

    Raises:
        HetLoraError: matplotlib is not installed.
    """
    need_matplotlib()
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": "hetlora", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_title(entry.title, loc="left", fontsize=10)
        _DRAWN[entry.kind](axes, outcome, entry.methods)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    # Lines that end in a blank are noise in a repository.
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _runs(outcome: Outcome, label: str) -> list[Figures]:
    return [run["figures"] for run in outcome["runs"] if run["label"] == label and run["figures"]]


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        "linewidth": 1.4,
    }


def _band(axes: Axes, label: str, index: int, curves: Sequence[tuple[Sequence[float], Values]]) -> None:
    """Draw the mean of the seeds' curves and the range between the lowest and the highest."""
    points: dict[int, tuple[list[float], list[float]]] = {}
    for x, y in curves:
        for place, (at, value) in enumerate(zip(x, y, strict=True)):
            if value is not None:
                across, up = points.setdefault(place, ([], []))
                across.append(at)
                up.append(value)
    whole = [point for _, point in sorted(points.items()) if len(point[1]) == len(curves)]
    x_mean = [statistics.fmean(across) for across, _ in whole]
    axes.plot(x_mean, [statistics.fmean(up) for _, up in whole], label=label, **_style(index))
    low, high = ([pick(up) for _, up in whole] for pick in (min, max))
    axes.fill_between(x_mean, low, high, color=_style(index)["color"], alpha=0.12, linewidth=0)


def _measured(figures: Figures) -> list[float | None]:
    """Return the held-out perplexity before the first round and after each; None where it was not measured."""
    return [figures["base"]["perplexity"], *(record["perplexity"] for record in figures["rounds"])]


def paired(outcome: Outcome, labels: Sequence[str]) -> dict[str, list[list[float | None]]]:
    """Return of every method the runs' held-out perplexity by round, without what a seed does to all methods alike.

    A seed's clients are easier or harder for everybody: in each round the mean over the methods is made the same for all
    seeds, which leaves every method's own mean over the seeds as it is. Where a method lacks a seed nothing is taken out.
    """
    measured = {label: [_measured(figures) for figures in _runs(outcome, label)] for label in labels}
    seeds = [{run["seed"] for run in outcome["runs"] if run["label"] == label and run["figures"]} for label in labels]
    if any(own != seeds[0] for own in seeds):
        return measured
    together: dict[str, list[list[float | None]]] = {label: [[] for _ in runs] for label, runs in measured.items()}
    for values in zip(
        *(zip(*runs, strict=True) for runs in measured.values()), strict=True
    ):  # of a round, by method, by seed
        means = [_mean(of_seed) for of_seed in zip(*values, strict=True)]
        whole = _mean(means)
        for runs, of_method in zip(together.values(), values, strict=True):
            for run, value, mean in zip(runs, of_method, means, strict=True):
                known = value is not None and mean is not None and whole is not None
                run.append(value - mean + whole if known else value)
    return together


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _rounds(axes: Axes, outcome: Outcome, labels: Sequence[str]) -> None:
    curves = paired(outcome, labels)
    for index, label in enumerate(labels):
        _band(axes, label, index, [([float(x) for x in range(len(y))], y) for y in curves[label]])
    axes.set(xlabel="round", ylabel=METRICS["perplexity"])
    _without_the_base(axes, outcome, curves)


def _megabytes(axes: Axes, outcome: Outcome, labels: Sequence[str]) -> None:
    curves = paired(outcome, labels)
    for index, label in enumerate(labels):
        sent = [
            list(itertools.accumulate((r["bytes_up"] + r["bytes_down"] for r in run["rounds"]), initial=0))
            for run in _runs(outcome, label)
        ]
        across = [[total / 1e6 for total in totals] for totals in sent]
        _band(axes, label, index, list(zip(across, curves[label], strict=True)))
    axes.set(xlabel="megabytes up and down", ylabel=METRICS["perplexity"], xscale="symlog")
    _without_the_base(axes, outcome, curves)


def _without_the_base(axes: Axes, outcome: Outcome, curves: Mapping[str, Sequence[Values]]) -> None:
    """Set the axis limits from the measurements after rounds: with the base included, the curves would look equal."""
    after = [value for runs in curves.values() for run in runs for value in run[1:] if value is not None]
    base = [run["figures"]["base"]["perplexity"] for run in outcome["runs"] if run["figures"]]
    if after and None not in base:
        room = 0.05 * (max(after) - min(after)) or 1.0
        axes.set_ylim(min(after) - room, max(after) + room)
        axes.set_title(f"{axes.get_title(loc='left')} (base: {statistics.fmean(base):.1f})", loc="left", fontsize=10)


def _rates(axes: Axes, outcome: Outcome, labels: Sequence[str]) -> None:
    """Draw the first seed's tuning runs; a triangle at the top is a rate beyond the axis, or not finite."""
    metric = outcome["metric"]
    tuned = {label: _by_rate(outcome, label) for label in labels}
    finite = [value for known in tuned.values() for value in known.values() if value is not None]
    top = HIGHEST_RATIO * min(finite, default=1.0) if metric == "perplexity" else math.inf
    for index, (label, known) in enumerate(tuned.items()):
        points = [(rate, value) for rate, value in known.items() if value is not None]
        beyond = [rate for rate, value in known.items() if value is None or value > top]
        axes.plot(
            [x for x, _ in points], [y for _, y in points], label=label, marker="o", markersize=3, **_style(index)
        )
        if beyond and metric == "perplexity":
            one_below_the_other = [top * (1 - 0.012 * (index + 1))] * len(beyond)
            axes.plot(beyond, one_below_the_other, "^", markersize=5, color=_style(index)["color"])
            axes.set_ylim(0.98 * min(finite, default=1.0), top)
    axes.set(xlabel="learning rate (first seed)", ylabel=f"{METRICS[metric]}, rows held out of training", xscale="log")
    tried = sorted({rate for known in tuned.values() for rate in known})
    axes.set_xticks(tried, [f"{rate:g}" for rate in tried])
    axes.set_xticks([], minor=True)


def _by_rate(outcome: Outcome, label: str) -> dict[float, float | None]:
    """Return a method's tuning score per learning rate; None if not finite or failed."""
    runs = [run for run in outcome["tuning"] if run["label"] == label]
    judged = {run["learning_rate"]: run["figures"] and run["figures"]["final"][outcome["metric"]] for run in runs}
    return dict(sorted(judged.items()))


def _by_round(key: str, ylabel: str) -> Callable[[Any, Outcome, Sequence[str]], None]:
    """Return the drawing function of a figure over rounds."""

    def drawn(axes: Axes, outcome: Outcome, labels: Sequence[str]) -> None:
        for index, label in enumerate(labels):
            runs = _runs(outcome, label)
            _band(axes, label, index, [([float(r["round"]) for r in run["rounds"]], run[key]) for run in runs])
        axes.set(xlabel="round", ylabel=ylabel)

    return drawn


def _weights(axes: Axes, outcome: Outcome, labels: Sequence[str]) -> None:
    for index, label in enumerate(labels):
        by_rank: dict[int, list[float]] = {}
        for figures in _runs(outcome, label):
            for rank, share in figures["shares"]:
                by_rank.setdefault(rank, []).append(share)
        ranks = sorted(by_rank)
        axes.plot(
            ranks, [statistics.fmean(by_rank[rank]) for rank in ranks], ".", label=label, color=_style(index)["color"]
        )
    axes.axhline(1.0, color="#888888", linewidth=0.8)
    axes.set(xlabel="rank of the client", ylabel="share of the average, times the equal share")


def _tiers(axes: Axes, outcome: Outcome, labels: Sequence[str]) -> None:
    """Draw the clients' mean perplexity by the tiers of the first method: a seed gives all methods the same clients."""
    width = 0.8 / len(labels)
    for index, label in enumerate(labels):
        means = tier_means(outcome, label, labels[0])
        places = [place + index * width for place in range(len(means))]
        axes.bar(places, list(means.values()), width, label=label, color=COLOURS[index % len(COLOURS)])
        axes.set_xticks([place + 0.4 - width / 2 for place in range(len(means))], list(means))
    lowest = min(min(tier_means(outcome, label, labels[0]).values()) for label in labels)
    axes.set_ylim(bottom=0.9 * lowest)
    axes.set(xlabel=f"rank of the client with {labels[0]}", ylabel=METRICS["perplexity"])


def tier_means(outcome: Outcome, label: str, ranks_of: str) -> dict[str, float]:
    """Return the geometric mean of the perplexities of each tier's clients over all seeds.

    Seeds draw other ranks, so that tiers are those of the ranks of all seeds together.

    Args:
        outcome: The study's outcome.
        label: The method whose results are averaged.
        ranks_of: The method whose first ranks put a client into a tier; runs of one seed have the same clients.
    """
    logs: dict[str, list[float]] = {}
    own = {run["seed"]: run["figures"] for run in outcome["runs"] if run["label"] == label and run["figures"]}
    ranked = [run for run in outcome["runs"] if run["label"] == ranks_of and run["figures"] and run["seed"] in own]
    tiers = tiers_of([rank for run in ranked for rank in run["figures"]["first_ranks"].values()])
    for run in ranked:
        for client, perplexity in own[run["seed"]]["clients"].items():
            logs.setdefault(tiers[run["figures"]["first_ranks"][client]], []).append(math.log(perplexity))
    in_order = sorted(logs, key=lambda tier: int(tier.partition("-")[0]))
    return {tier: math.exp(statistics.fmean(logs[tier])) for tier in in_order}


def _slots(axes: Axes, outcome: Outcome, labels: Sequence[str]) -> None:
    for index, label in enumerate(labels):
        curves = [figures["slots"] for figures in _runs(outcome, label) if figures["slots"]]
        if curves:
            slots = [float(slot) for slot in range(max(map(len, curves)))]
            padded = [[*curve, *[None] * (len(slots) - len(curve))] for curve in curves]
            _band(axes, label, index, [(slots, curve) for curve in padded])
    axes.set(xlabel="slot of the global adapter", ylabel="size, ‖B[:, i]‖ ‖A[i]‖ over all modules")


_DRAWN: Mapping[str, Callable[[Any, Outcome, Sequence[str]], None]] = {
    "rounds": _rounds,
    "megabytes": _megabytes,
    "train": _by_round("loss", "training loss of the cohort"),
    "rates": _rates,
    "ranks": _by_round("mean_rank", "mean rank of the clients"),
    "weights": _weights,
    "tiers": _tiers,
    "slots": _slots,
}
