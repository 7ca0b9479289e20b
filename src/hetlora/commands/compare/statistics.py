"""The table of a comparison, computed from its raw results: one row per method, with tests of significance."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["OTHER", "MethodRow", "holm", "notes", "paired", "paired_test", "reference_of", "table"]

SIGNIFICANCE = 0.05
OTHER = {"perplexity": "rougeL", "rougeL": "perplexity"}
"""The metric that stands beside the one by which methods are compared."""

ROUNDING = 1e-12
"""Relative difference of figures that counts as floating-point rounding."""


@dataclass(frozen=True)
class MethodRow:
    """One method of the table. Figures are means over the finished seeds, or None.

    Attributes:
        label: Name in the table.
        method: Name in a configuration.
        learning_rate: Of the final runs; None if none could be chosen.
        mean: Mean of the final metric; None also if a run gave a number that is not finite.
        std: Sample standard deviation over seeds; None below two.
        other_mean: Mean of the other metric; None also if a run did not measure it.
        seeds: Number of finished runs.
        failed: Number of failed runs.
        not_finite: Finished runs without a finite metric.
        best_round: Round with the best metric; 0 is the base.
        reached: Runs that reached the target.
        rounds_to_target: Rounds until the first measurement that reaches the target, over the runs that did.
        megabytes_to_target: Megabytes (10^6 bytes) up and down until then.
        trained_share: Mean number of parameters that a client trains, over those of the base.
        final_rank: Mean rank of the clients at the end.
        pruned_share: Prunes over admitted updates; None for methods that do not prune.
        megabytes_up: Of all admitted updates.
        megabytes_down: Of all tasks.
        seconds: Per run.
        p_value: Of the paired t-test over seeds against the reference.
        p_holm: The same, corrected by Holm for the number of tested methods.
        pairs: Number of seeds that this method and the reference finished with a finite metric.
        verdict: "reference", "better", "worse", "noise", or why there is no test.
    """

    label: str
    method: str
    learning_rate: float | None
    mean: float | None = None
    std: float | None = None
    other_mean: float | None = None
    seeds: int = 0
    failed: int = 0
    not_finite: int = 0
    best_round: float | None = None
    reached: int = 0
    rounds_to_target: float | None = None
    megabytes_to_target: float | None = None
    trained_share: float | None = None
    final_rank: float | None = None
    pruned_share: float | None = None
    megabytes_up: float | None = None
    megabytes_down: float | None = None
    seconds: float | None = None
    p_value: float | None = None
    p_holm: float | None = None
    pairs: int | None = None
    verdict: str = ""


def table(results: Mapping[str, Any]) -> list[MethodRow]:
    """Compute the table from the raw results of a comparison, the object in its `results.json`.

    Args:
        results: `metric`, `target`, `reference`, `methods` (each `label`, `method`, `learning_rate`) and `runs` (each `label`,
            `seed` and `figures`, which are None for a run that failed).

    Returns:
        One row per method, in order.
    """
    runs = {
        entry["label"]: [run for run in results["runs"] if run["label"] == entry["label"]]
        for entry in _methods(results)
    }
    rows = [_row(entry, runs[entry["label"]], results) for entry in _methods(results)]
    reference = reference_of(rows, results)
    if reference is None:
        return rows
    return _tested(rows, reference, paired(results, reference), lower=results["metric"] == "perplexity")


def paired(results: Mapping[str, Any], reference: str) -> dict[str, list[tuple[float, float]]]:
    """Return each method's final metric beside the reference's, one pair per seed that gave both a finite figure."""
    finals: dict[str, dict[int, float | None]] = {entry["label"]: {} for entry in _methods(results)}
    for run in results["runs"]:
        if run["figures"] and run["label"] in finals:
            finals[run["label"]][run["seed"]] = _final(run, results)
    return {label: _pairs(own, finals[reference]) for label, own in finals.items()}


def _methods(results: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return results["methods"]  # type: ignore[no-any-return]


def _final(run: Mapping[str, Any], results: Mapping[str, Any]) -> float | None:
    return run["figures"]["final"][results["metric"]]  # type: ignore[no-any-return]


def _row(entry: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> MethodRow:
    done = [run["figures"] for run in runs if run["figures"]]
    finals = [figures["final"][results["metric"]] for figures in done]
    finite = [value for value in finals if value is not None]
    whole = len(finite) == len(finals)
    reached = [point for figures in done if (point := _to_target(figures, results)) is not None]
    return MethodRow(
        label=entry["label"],
        method=entry["method"],
        learning_rate=entry["learning_rate"],
        mean=_mean(finite) if whole else None,
        std=statistics.stdev(finite) if whole and len(finite) > 1 else None,
        other_mean=_mean([figures["final"][OTHER[results["metric"]]] for figures in done]),
        seeds=len(done),
        failed=len(runs) - len(done),
        not_finite=len(finals) - len(finite),
        best_round=_mean([_best_round(figures, results["metric"]) for figures in done]),
        reached=len(reached),
        rounds_to_target=_mean([rounds for rounds, _ in reached]),
        megabytes_to_target=_mean([megabytes for _, megabytes in reached]),
        trained_share=_mean([_trained_share(figures) for figures in done]),
        final_rank=_mean([_mean([_rank(rank) for rank in figures["ranks"].values()]) for figures in done]),
        pruned_share=_mean([_pruned_share(figures) for figures in done]),
        megabytes_up=_mean([figures["bytes_up"] / 1e6 for figures in done]),
        megabytes_down=_mean([figures["bytes_down"] / 1e6 for figures in done]),
        seconds=_mean([figures["seconds"] for figures in done]),
    )


def _pruned_share(figures: Mapping[str, Any]) -> float | None:
    """Return prunes over admitted updates; None without pruning or updates."""
    return figures["prunes"] / figures["updates"] if figures["self_pruning"] and figures["updates"] else None


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean; None without values, or if a value is missing."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _measured(figures: Mapping[str, Any]) -> list[tuple[int, float, float]]:
    """Return round, perplexity and megabytes sent so far, for the base and every measured round."""
    if not figures["every"]:
        return []  # only the last round is measured
    points, megabytes = [(0, figures["base"]["perplexity"], 0.0)], 0.0
    for record in figures["rounds"]:
        megabytes += (record["bytes_up"] + record["bytes_down"]) / 1e6
        points.append((record["round"], record["perplexity"], megabytes))
    return [point for point in points if point[1] is not None]


def _best_round(figures: Mapping[str, Any], metric: str) -> int | None:
    """Return the first round with the lowest perplexity; None for ROUGE-L, which is not measured after every round."""
    points = _measured(figures) if metric == "perplexity" else []
    return min(points, key=lambda point: point[1])[0] if points else None


def _to_target(figures: Mapping[str, Any], results: Mapping[str, Any]) -> tuple[int, float] | None:
    """Return rounds and megabytes until the first measurement that reaches the target."""
    if results["target"] is None or results["metric"] != "perplexity":
        return None
    reached = (point for point in _measured(figures) if point[1] <= results["target"])
    first = next(reached, None)
    return None if first is None else (first[0], first[2])


def _trained_share(figures: Mapping[str, Any]) -> float | None:
    trained = _mean(list(figures["trainable_parameters"].values()))
    return trained / figures["base_parameters"] if trained is not None and figures["base_parameters"] else None


def _rank(rank: float | Mapping[str, float]) -> float:
    """Return a client's rank, or the mean of its ranks per module."""
    return statistics.fmean(rank.values()) if isinstance(rank, Mapping) else rank


# Which differences are noise ----------------------------------------------------------------------------------------


def reference_of(rows: Sequence[MethodRow], results: Mapping[str, Any]) -> str | None:
    """Return the label of the reference: the configured one, else the best mean.

    A mean over fewer seeds may be good because hard seeds failed, so the methods with the most finished seeds come first.
    """
    if results["reference"] is not None:
        return str(results["reference"])
    sign = 1.0 if results["metric"] == "perplexity" else -1.0
    known = [(-row.seeds, sign * row.mean, row.label) for row in rows if row.mean is not None]
    return min(known, key=lambda entry: entry[:2])[2] if known else None


def _tested(
    rows: Sequence[MethodRow], reference: str, pairs: Mapping[str, Sequence[tuple[float, float]]], *, lower: bool
) -> list[MethodRow]:
    """Add to each row its test against the reference."""
    pairs = {label: own for label, own in pairs.items() if label != reference}
    tests = {label: paired_test(own) for label, own in pairs.items()}
    p_values = {label: test for label, test in tests.items() if isinstance(test, float)}
    corrected = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    finite = next(row.mean for row in rows if row.label == reference) is not None
    judged = []
    for row in rows:
        if row.label in corrected:
            p_holm, whole = corrected[row.label], finite and row.mean is not None
            verdict = _verdict(p_holm, pairs[row.label], lower=lower) if whole else "a run gave no finite number"
            row = replace(row, p_value=p_values[row.label], p_holm=p_holm, pairs=len(pairs[row.label]), verdict=verdict)
        else:
            row = replace(row, verdict=str(tests.get(row.label, "reference")))
        judged.append(row)
    return judged


def _pairs(own: Mapping[int, float | None], other: Mapping[int, float | None]) -> list[tuple[float, float]]:
    """Return the figures of common seeds."""
    return [(a, b) for seed in own if (a := own[seed]) is not None and (b := other.get(seed)) is not None]


def _verdict(p_value: float, pairs: Sequence[tuple[float, float]], *, lower: bool) -> str:
    """Return the direction of a difference over the tested pairs; means over different seeds may disagree."""
    if p_value >= SIGNIFICANCE:
        return "noise"
    return "better" if (statistics.fmean(own - other for own, other in pairs) < 0) == lower else "worse"


def paired_test(pairs: Sequence[tuple[float, float]]) -> float | str:
    """Return the two-sided p-value of the paired t-test, or the reason for no test.

    Args:
        pairs: A method's final metric and the reference's, one pair per common seed.

    Example:
        >>> round(paired_test([(2.0, 1.0), (3.0, 1.0), (4.0, 1.0)]), 4)  # t = 2 / (1 / sqrt(3)), 2 degrees of freedom
        0.0742
        >>> paired_test([(2.0, 1.0)])
        'one seed: no test'
    """
    differences = [own - other for own, other in pairs]
    if len(differences) < 2:
        return "one seed: no test" if differences else "nothing to compare"
    rounding = ROUNDING * max(abs(value) for pair in pairs for value in pair)
    if max(map(abs, differences)) <= rounding:
        return "the same figures"
    if max(differences) - min(differences) <= rounding:
        return "the same difference in every seed: no test"
    from scipy.stats import ttest_rel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nearly equal differences
        p_value = float(ttest_rel(*zip(*pairs, strict=True)).pvalue)
    return p_value if math.isfinite(p_value) else "the same difference in every seed: no test"


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values by Holm's step-down: `p̃_(i) = max_{j ≤ i} min(1, (m - j + 1) p_(j))`.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected


def notes(rows: Sequence[MethodRow], results: Mapping[str, Any]) -> list[str]:
    """Return the notes below the table."""
    said = []
    reference = reference_of(rows, results)
    if reference is not None and len(rows) > 1:
        seeds, fewer = len(results["seeds"]), any(row.failed for row in rows)
        chosen = ", the best mean" + (" of those with the most finished seeds" if fewer else "")
        chosen = "" if results["reference"] is not None else chosen
        over = f"the seeds that both finished, n of {seeds}" if fewer else f"{seeds} seeds"
        test = f"paired t-test over {over}, p corrected by Holm, noise unless p < {SIGNIFICANCE}"
        said.append(f"Compared with {reference}{chosen}: {test if seeds > 1 else 'one seed allows no test'}.")
    rates = {row.learning_rate for row in rows if row.learning_rate is not None}
    if len(rows) > 1 and len(rates) == 1 and not results["tuning"]:
        said.append(
            f"Learning rates were not tuned: one rate for all methods, {rates.pop():g}, and another may order them otherwise. "
            "compare.learning_rates tunes each method."
        )
    done = [run["figures"] for run in results["runs"] if run["figures"]]
    if results["metric"] == "rougeL":
        said.append("No best round: ROUGE-L is measured before and after the rounds only.")
    elif any(not figures["every"] for figures in done):
        said.append("No best round and no target where evaluation.every = 0: only the last round is measured.")
    if results["target"] is not None:
        said.append(f"Target: {results['metric']} {results['target']:g}.")
    said += [
        f"{row.label}: {row.not_finite} of {row.seeds} runs gave no finite number." for row in rows if row.not_finite
    ]
    if edges := [f"{row.label} ({row.learning_rate:g})" for row in rows if _at_the_edge(row, results)]:
        said.append(f"At the edge of the learning rates tried, so that one beyond may be better: {', '.join(edges)}.")
    said += _tuned_for_others(results)
    said += [note for row in rows if (note := _silent(row.label, results)) is not None]
    runs = (*results["runs"], *results["tuning"])
    said += [f"FAILED {run['run']}: {run['failed']}" for run in runs if not run["figures"]]
    return said


def _tuned_for_others(results: Mapping[str, Any]) -> list[str]:
    """Return a note per tuned method whose rate other methods take."""
    takers: dict[str, list[str]] = {}
    for method in results["methods"]:
        if method.get("rate_of"):
            takers.setdefault(method["rate_of"], []).append(method["label"])
    return [f"At the learning rate tuned for {giver}: {', '.join(labels)}." for giver, labels in takers.items()]


def _at_the_edge(row: MethodRow, results: Mapping[str, Any]) -> bool:
    givers = {method["label"]: method.get("rate_of") for method in results["methods"]}
    tried = [run["learning_rate"] for run in results["tuning"] if run["label"] == (givers.get(row.label) or row.label)]
    return len(tried) > 1 and row.learning_rate in (min(tried), max(tried))


def _silent(label: str, results: Mapping[str, Any]) -> str | None:
    """Return a note on unexpected failures of a method's clients, beyond configured dropout; None without any."""
    done = [run["figures"] for run in results["runs"] if run["label"] == label and run["figures"]]
    lost = sum(figures["failures"] - figures["dropped"] for figures in done)
    turns = sum(figures["updates"] + figures["failures"] for figures in done)
    return (
        f"{label}: {lost} of {turns} client turns gave nothing; records.jsonl of its runs says why." if lost else None
    )
