"""Figures computed from the records: groups of seeds, curves, ranks over rounds, shares, tiers and totals."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hetlora.runs.reader import Round, Run, Scores, final_ranks, number, section
from hetlora.runs.text import change, clean, figure, many, megabytes, method_labels

__all__ = [
    "Curve",
    "Devices",
    "Group",
    "Point",
    "Totals",
    "averages",
    "base_alone",
    "begun_with",
    "curve",
    "devices",
    "first_ranks",
    "grouped",
    "local_run",
    "mean_and_std",
    "perplexities",
    "ranks_over_rounds",
    "run_name",
    "scores_of",
    "sentence",
    "tier_names",
    "tier_of",
    "tier_perplexities",
    "totals",
    "trains_alone",
    "trains_weights",
]

OWN = ("name", "output", "seed", "checkpoint_every", "tracking")
"""Keys and sections in which runs of one group may differ: they change no figure except by chance."""


@dataclass(frozen=True)
class Group:
    """One or more runs of one configuration, with any seeds. Labels are unique within a report."""

    label: str
    runs: tuple[Run, ...]


class Point(NamedTuple):
    """Statistics of a figure over the runs of a group; `std` is the sample's, None for a single run."""

    mean: float
    std: float | None
    least: float
    most: float
    runs: int


class Curve(NamedTuple):
    """A figure over the rounds, with the megabytes sent in both directions until then."""

    rounds: list[int]
    megabytes: list[float]
    points: list[Point | None]


class Totals(NamedTuple):
    """Totals of a run so far.

    Attributes:
        full_up: Bytes that full fine-tuning would have sent up with the same updates, 4 per number of the base; 0 if unknown.
        full_down: The same, down.
    """

    bytes_up: int
    bytes_down: int
    prunes: int
    failures: int
    updates: int
    full_up: int
    full_down: int


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Group runs of the same configuration, in order of first appearance."""
    groups: dict[str, list[Run]] = {}
    for index, run in enumerate(runs):
        own = {key: value for key, value in run.config.items() if key not in OWN}
        # A run of unknown configuration is a group by itself.
        key = json.dumps([own, run.method] if own else index, sort_keys=True)
        groups.setdefault(key, []).append(run)
    labels = _made_unique([_group_label(members) for members in groups.values()])
    return [Group(label, tuple(members)) for label, members in zip(labels, groups.values(), strict=True)]


def _group_label(runs: Sequence[Run]) -> str:
    label = runs[0].label
    if len(runs) == 1:
        return label
    seeds = len({str(run.config.get("seed")) for run in runs})
    # Repeated runs of one seed are no more evidence than one run, so the label does not count them as seeds.
    return f"{label}, {seeds} seeds" if seeds == len(runs) else f"{label}, {len(runs)} runs of {many(seeds, 'seed')}"


def _made_unique(labels: Sequence[str]) -> list[str]:
    """Append (2), (3) and so on to repeated labels."""
    found: dict[str, None] = {}
    for label in labels:
        numbered = (f"{label} ({count})" for count in itertools.count(2))
        found[next(name for name in itertools.chain([label], numbered) if name not in found)] = None
    return list(found)


def mean_and_std(values: Sequence[float]) -> Point:
    """Return mean, standard deviation, extremes and count of at least one figure.

    Example:
        >>> mean_and_std([1.0, 3.0]).mean, mean_and_std([2.0]).std
        (2.0, None)
    """
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Point(statistics.fmean(values), deviation, min(values), max(values), len(values))


def curve(
    group: Group, figure: Callable[[Round], float | None], before: Callable[[Run], float | None], *, gaps: bool
) -> Curve:
    """Return a figure over the rounds of a group.

    Args:
        group: The group; an unfinished run contributes the rounds it has.
        figure: Returns the figure of a round, or None.
        before: Returns the figure of a run before its first round, or None.
        gaps: Whether a round without a figure is a gap in the curve, or was just not measured.
    """
    found: dict[int, tuple[list[float], list[float]]] = {}
    for run in group.runs:
        sent = itertools.accumulate((item.bytes_up + item.bytes_down for item in run.rounds), initial=0)
        figures = [(0, before(run)), *((item.number, figure(item)) for item in run.rounds)]
        for (at, value), total in zip(figures, sent, strict=True):
            if value is None and (at == 0 or not gaps):
                continue
            values, megabytes = found.setdefault(at, ([], []))
            megabytes.append(total / 1e6)
            if value is not None:
                values.append(value)
    rounds = sorted(found)
    return Curve(
        rounds,
        [statistics.fmean(found[at][1]) for at in rounds],
        [mean_and_std(found[at][0]) if found[at][0] else None for at in rounds],
    )


def totals(run: Run) -> Totals:
    """Return the totals of a run."""
    base = int(number(run.head.get("base_parameters")) or 0)
    updates, asked = sum(item.updates for item in run.rounds), sum(len(item.ranks) for item in run.rounds)
    return Totals(
        bytes_up=sum(item.bytes_up for item in run.rounds),
        bytes_down=sum(item.bytes_down for item in run.rounds),
        prunes=sum(len(item.prunes) for item in run.rounds),
        failures=sum(len(item.failures) for item in run.rounds),
        updates=updates,
        full_up=4 * base * updates,
        full_down=4 * base * asked,
    )


def trains_weights(run: Run) -> bool:
    """Whether a run trains the base's own weights; ranks and slots then mean nothing."""
    base = number(run.head.get("base_parameters")) or 0
    trained = [number(value) or 0 for value in section(run.head, "trainable_parameters").values()]
    return run.declared("trains") == "weights" or (bool(base) and bool(trained) and min(trained) >= base)


def averages(run: Run) -> bool:
    """Whether a run averages its clients' updates; if not, shares and slots mean nothing."""
    return bool(run.declared("averages") != "nothing")


def trains_alone(run: Run) -> bool:
    """Whether every client of a run trains alone."""
    return run.declared("clients") == "sampled" and not averages(run)


def begun_with(runs: Iterable[Run]) -> str:
    """Return the name in charts of what was measured before the first round."""
    return "the adapter started from" if any(run.starts_from_adapter for run in runs) else "the base"


def first_ranks(run: Run) -> dict[str, int]:
    """Return each client's initial rank: the first rank it was sent, or its final rank if it was never asked."""
    found: dict[str, int] = {}
    for item in run.rounds:
        for client, rank in item.ranks.items():
            found.setdefault(client, rank)
    # A client that was never in a cohort cannot have pruned.
    return found | {client: rank for client, rank in final_ranks(run).items() if client not in found}


def ranks_over_rounds(run: Run, clients: Sequence[str]) -> dict[str, list[int]]:
    """Return each client's rank after every round: that of its last task, or the rank it has pruned to since."""
    now = dict(first_ranks(run))
    rows: dict[str, list[int]] = {client: [] for client in clients}
    for item in run.rounds:
        now |= {**item.ranks, **item.prunes}
        for client in clients:
            rows[client].append(now[client])
    return rows


def tier_names(run: Run) -> list[str]:
    """Return the names of a run's tiers by rank: those of its measurements, or else its ranks."""
    names = list((run.base or run.final or Scores({}, {}, {})).tiers)
    names = [name for name in names if _bounds(name) is not None]
    return names or [str(rank) for rank in sorted(set(first_ranks(run).values()))]


def tier_of(rank: int, names: Sequence[str]) -> str:
    """Return the tier of a rank, ``"8"`` or ``"6-10"``; the rank itself if it is in none of the tiers.

    Example:
        >>> tier_of(7, ["2-5", "6-10"]), tier_of(12, ["2-5", "6-10"])
        ('6-10', '12')
    """
    for name in names:
        bounds = _bounds(name)
        if bounds is not None and bounds[0] <= rank <= bounds[1]:
            return name
    return str(rank)


def _bounds(name: str) -> tuple[int, int] | None:
    least, _, most = name.partition("-")
    try:
        return int(least), int(most or least)
    except ValueError:
        return None


@dataclass(frozen=True)
class Devices:
    """The tiers of devices in all runs of a page.

    Attributes:
        names: The tiers, from the smallest rank to the largest; a tier's place is that of its colour.
        tiers: Folder of a run to each client's tier.
    """

    names: Sequence[str]
    tiers: Mapping[Path, Mapping[str, str]]


def devices(runs: Sequence[Run]) -> Devices:
    """Return the tiers of the devices.

    A method may give every device the same rank. The tiers then are those of another run with the same seed, data and clients,
    the one that tells most tiers apart.
    """
    own = {}
    for run in runs:
        names = tier_names(run)
        own[run.folder] = {client: tier_of(rank, names) for client, rank in first_ranks(run).items()}
    count = {folder: len(set(found.values())) for folder, found in own.items()}

    def same(run: Run, other: Run) -> bool:
        alike = all(run.config.get(part) == other.config.get(part) for part in ("seed", "data", "partition"))
        return alike and own[other.folder].keys() >= own[run.folder].keys()

    tiers = {}
    for run in runs:
        widest = max([run, *(other for other in runs if same(run, other))], key=lambda other: count[other.folder])
        tiers[run.folder] = own[widest.folder]
    found = {tier for run in runs for tier in tiers[run.folder].values()} or {
        tier for run in runs for scores in (run.before, run.final) if scores for tier in scores.tiers
    }
    return Devices(sorted(found, key=_by_rank), tiers)


def _by_rank(tier: str) -> tuple[int, str]:
    bounds = _bounds(tier)
    return (bounds[0] if bounds else 0, tier)


def tier_perplexities(run: Run, scores: Scores | None, devices: Devices) -> dict[str, float]:
    """Return the perplexity of each tier of devices, `exp(sum of tokens * log perplexity / sum of tokens)` over its clients."""
    tiers = devices.tiers[run.folder]
    if scores is None or not tiers or set(scores.tiers) == set(tiers.values()):
        recorded = scores.tiers if scores else {}
        return {tier: value for tier, item in recorded.items() if (value := item.get("perplexity")) is not None}
    logs: dict[str, list[tuple[float, float]]] = {}
    for client, item in scores.clients.items():
        perplexity, tokens = item.get("perplexity"), item.get("tokens")
        if perplexity and tokens and client in tiers:
            logs.setdefault(tiers[client], []).append((tokens, tokens * math.log(perplexity)))
    return {
        tier: math.exp(sum(log for _, log in found) / sum(tokens for tokens, _ in found))
        for tier, found in logs.items()
    }


def local_run(run: Run, runs: Sequence[Run]) -> Run | None:
    """Return the run with the same base and rows in which every client trains alone, for comparison.

    The run of the same seed is preferred, because seeds draw clients and ranks. If the configuration partitions the rows, the
    seed also draws each client's rows and must be the same.
    """

    def same(other: Run) -> bool:
        parts = all(section(run.config, part) == section(other.config, part) for part in ("model", "data", "partition"))
        limit, other_limit = (section(item.config, "evaluation").get("rows_per_client") for item in (run, other))
        drawn = section(run.config, "partition").get("kind", "natural") != "natural"
        return parts and limit == other_limit and not (drawn and run.config.get("seed") != other.config.get("seed"))

    alone = [other for other in runs if other is not run and trains_alone(other) and other.final and same(other)]
    alone.sort(key=lambda other: other.config.get("seed") != run.config.get("seed"))
    return alone[0] if alone else None


def perplexities(scores: Scores | None) -> Mapping[str, float]:
    """Return each client's perplexity, if it is finite."""
    figures = scores.clients if scores else {}
    return {name: value for name, item in figures.items() if (value := item.get("perplexity")) is not None}


# A run's result in words --------------------------------------------------------------------------------------------


def run_name(run: Run) -> str:
    """Return a run's label with its seed."""
    seed = run.config.get("seed")
    return clean(run.label, 80) + (f", seed {seed}" if isinstance(seed, int) else "")


def scores_of(run: Run, name: str) -> tuple[float | None, float | None]:
    """Return `perplexity` or `rougeL` before the first round, and at the end; of an unfinished run, as last measured."""
    before = run.before.overall.get(name) if run.before else None
    if run.final:
        return before, run.final.overall.get(name)
    measured = [item.perplexity for item in run.rounds if item.perplexity is not None]
    return before, measured[-1] if measured and name == "perplexity" else None


def base_alone(run: Run, name: str) -> float | None:
    """Return a figure of the base alone, for a run that started from an adapter."""
    return run.base.overall.get(name) if run.base and run.starts_from_adapter else None


def sentence(run: Run, among: Sequence[Run] = ()) -> str:
    """Describe a run's result in one sentence, beside those of other runs."""
    method = method_labels(other.method for other in (run, *among))[run.method]
    (before, after), (rouge, rouge_after) = scores_of(run, "perplexity"), scores_of(run, "rougeL")
    sums = totals(run)
    scores = [
        f"held-out perplexity {change(before, after)}" if before or after else "no held-out perplexity was measured"
    ]
    if run.starts_from_adapter and (before or after):
        scores[0] += f" from the adapter it started from (the base alone: {figure(base_alone(run, 'perplexity'))})"
    if rouge is not None and rouge_after is not None:
        scores.append(f"ROUGE-L {change(rouge, rouge_after)}")
    elif rouge_after is not None and (rouge_base := base_alone(run, "rougeL")) is not None:
        scores.append(f"ROUGE-L {figure(rouge_after)} (the base alone: {figure(rouge_base)})")
    clients = int(number(run.head.get("clients")) or 0)
    of = f"{len(run.rounds)} of {run.planned}" if len(run.rounds) < run.planned else f"{len(run.rounds)}"
    return (
        f"{run_name(run)} ({method}): {', '.join(scores)}, in {of} round{'s' if len(run.rounds) != 1 else ''} with "
        f"{many(clients, 'client')}; {megabytes(sums.bytes_up)} up, {megabytes(sums.bytes_down)} down, "
        f"{many(sums.prunes, 'prune')}, {many(sums.failures, 'failure')}."
    )
