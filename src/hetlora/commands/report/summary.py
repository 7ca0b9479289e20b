"""What records come to: groups of seeds, curves, ranks over the rounds, shares, tiers and totals. Pure arithmetic."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hetlora.runs.reader import Round, Run, Scores, final_ranks, number, section
from hetlora.runs.text import many

__all__ = [
    "Curve",
    "Group",
    "Point",
    "Totals",
    "averages",
    "begun_with",
    "chosen_clients",
    "curve",
    "first_ranks",
    "grouped",
    "local_run",
    "mean_and_std",
    "perplexities",
    "rank_counts",
    "ranks_over_rounds",
    "tier_names",
    "tier_of",
    "totals",
    "trains_alone",
    "trains_weights",
]

OWN = ("name", "output", "seed", "checkpoint_every", "tracking")
"""Keys and sections of a configuration in which runs of one group may differ: they change no figure but by chance."""


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, whatever their seeds.

    Attributes:
        label: What it is called in charts; no two groups of a report are called alike.
        runs: One or more.
    """

    label: str
    runs: tuple[Run, ...]


class Point(NamedTuple):
    """A figure over the runs of a group; `std` is the sample's, None of a single run."""

    mean: float
    std: float | None
    least: float
    most: float
    runs: int


class Curve(NamedTuple):
    """A figure over the rounds: their numbers, the megabytes sent until then in both directions, and the figures."""

    rounds: list[int]
    megabytes: list[float]
    points: list[Point | None]


class Totals(NamedTuple):
    """What a run adds up to so far.

    Attributes:
        full_up: Bytes that full fine-tuning would have sent up with the same updates, 4 a number of the base; 0 if not known.
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
    """Put runs of the same configuration together, in order of the first of each."""
    groups: dict[str, list[Run]] = {}
    for index, run in enumerate(runs):
        own = {key: value for key, value in run.config.items() if key not in OWN}
        # A run whose configuration is not known is like no other.
        key = json.dumps([own, run.method] if own else index, sort_keys=True)
        groups.setdefault(key, []).append(run)
    labels = _different([_group_label(members) for members in groups.values()])
    return [Group(label, tuple(members)) for label, members in zip(labels, groups.values(), strict=True)]


def _group_label(runs: Sequence[Run]) -> str:
    label = runs[0].label
    if len(runs) == 1:
        return label
    seeds = len({str(run.config.get("seed")) for run in runs})
    # Runs of the same seed are no more evidence than one of them, so that the label does not count them as seeds.
    return f"{label}, {seeds} seeds" if seeds == len(runs) else f"{label}, {len(runs)} runs of {many(seeds, 'seed')}"


def _different(labels: Sequence[str]) -> list[str]:
    """Return labels of which no two are alike, the second of a kind with a 2 behind it."""
    found: dict[str, None] = {}
    for label in labels:
        numbered = (f"{label} ({count})" for count in itertools.count(2))
        found[next(name for name in itertools.chain([label], numbered) if name not in found)] = None
    return list(found)


def mean_and_std(values: Sequence[float]) -> Point:
    """Return mean, standard deviation, extremes and count of one or more figures.

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
        group: Its runs; of one that was cut short, the rounds it has.
        figure: Of a round; None where there is none.
        before: Of a run, before its first round.
        gaps: Whether a round without a figure is a gap, or was just not measured.
    """
    found: dict[int, tuple[list[float], list[float]]] = {}
    for run in group.runs:
        sent = itertools.accumulate((item.bytes_up + item.bytes_down for item in run.rounds), initial=0)
        told = [(0, before(run)), *((item.number, figure(item)) for item in run.rounds)]
        for (at, value), total in zip(told, sent, strict=True):
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
    """Add up a run."""
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
    """Whether a run trains the base's own weights, so that ranks and slots mean nothing in it."""
    base = number(run.head.get("base_parameters")) or 0
    trained = [number(value) or 0 for value in section(run.head, "trainable_parameters").values()]
    return run.declared("trains") == "weights" or (bool(base) and bool(trained) and min(trained) >= base)


def averages(run: Run) -> bool:
    """Whether a run averages what its clients have learned; where not, shares and slots of the average mean nothing."""
    return bool(run.declared("averages") != "nothing")


def trains_alone(run: Run) -> bool:
    """Whether every client of a run trains by itself."""
    return run.declared("clients") == "sampled" and not averages(run)


def begun_with(runs: Iterable[Run]) -> str:
    """Return what was measured before the first round, as a chart calls it."""
    return "the adapter started from" if any(run.starts_from_adapter for run in runs) else "the base"


def first_ranks(run: Run) -> dict[str, int]:
    """Return client to the rank it began with: what it was first sent, or of one never asked what it has at the end."""
    found: dict[str, int] = {}
    for item in run.rounds:
        for client, rank in item.ranks.items():
            found.setdefault(client, rank)
    # Who was never in a cohort cannot have pruned.
    return found | {client: rank for client, rank in final_ranks(run).items() if client not in found}


def ranks_over_rounds(run: Run, clients: Sequence[str]) -> dict[str, list[int]]:
    """Return each client's rank after every round: that of its last task, or what it has pruned to since."""
    now = dict(first_ranks(run))
    rows: dict[str, list[int]] = {client: [] for client in clients}
    for item in run.rounds:
        now |= {**item.ranks, **item.prunes}
        for client in clients:
            rows[client].append(now[client])
    return rows


def chosen_clients(clients: Sequence[str], first: Iterable[str], most: int) -> list[str]:
    """Return at most so many clients, in their order: those of `first` as far as there is room, then an even sample.

    Example:
        >>> chosen_clients(["a", "b", "c", "d", "e"], ["d"], 3)
        ['a', 'd', 'e']
    """
    if len(clients) <= most:
        return list(clients)
    known = set(clients)
    kept = list(dict.fromkeys(client for client in first if client in known))[:most]
    rest, room = [client for client in clients if client not in set(kept)], most - len(kept)
    if room == 1:
        kept.append(rest[0])
    elif room > 1:
        kept += [rest[round(index * (len(rest) - 1) / (room - 1))] for index in range(room)]
    chosen = set(kept)
    return [client for client in clients if client in chosen]


def tier_names(run: Run) -> list[str]:
    """Return the names of a run's tiers, by rank: those of its measurements, or of ranks where there are none."""
    names = list((run.base or run.final or Scores({}, {}, {})).tiers)
    names = [name for name in names if _bounds(name) is not None]
    return names or [str(rank) for rank in sorted(set(first_ranks(run).values()))]


def tier_of(rank: int, names: Sequence[str]) -> str:
    """Return the tier that a rank is in: ``"8"``, or ``"6-10"``; its own where none of the names has it.

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


def rank_counts(ranks: Iterable[int]) -> list[tuple[int, int]]:
    """Return how many clients have which rank, by rank."""
    return sorted(Counter(ranks).items())


def local_run(run: Run, runs: Sequence[Run]) -> Run | None:
    """Return the run in which everyone trains alone that another may be compared with: of the same base and the same rows.

    That of the same seed comes first: seeds draw clients and ranks. Where a partition is made, seeds draw the rows of every
    client, too, and no other one will do.
    """

    def same(other: Run) -> bool:
        parts = all(section(run.config, part) == section(other.config, part) for part in ("model", "data", "partition"))
        most, others_most = (section(one.config, "evaluation").get("rows_per_client") for one in (run, other))
        drawn = section(run.config, "partition").get("kind", "natural") != "natural"
        return parts and most == others_most and not (drawn and run.config.get("seed") != other.config.get("seed"))

    alone = [other for other in runs if other is not run and trains_alone(other) and other.final and same(other)]
    alone.sort(key=lambda other: other.config.get("seed") != run.config.get("seed"))
    return alone[0] if alone else None


def perplexities(scores: Scores | None) -> Mapping[str, float]:
    """Return client to its perplexity, where it is finite."""
    found: dict[str, Any] = {name: told.get("perplexity") for name, told in (scores.clients if scores else {}).items()}
    return {name: value for name, value in found.items() if value is not None}
