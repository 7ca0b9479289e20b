"""A run's result in words, for a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hetlora.core.adapter import Rank
from hetlora.errors import printable
from hetlora.runs.result import Measurement, RunResult
from hetlora.training.evaluation import total_score

__all__ = ["describe_finished", "describe_result"]

_KINDS = {"adapter": "adapter (PEFT):", "adapters": "PEFT, by client:", "model": "merged model:"}


def describe_result(result: RunResult) -> str:
    """Say a result for a person: the two measurements, one answer before and after, and where things are."""
    scores = _describe_scores(result.base, result.final) if result.final is not None else []
    ranks = f"; clients by rank now: {_rank_counts(result.ranks.values())}" if result.ranks else ""
    peak = f", {result.peak_megabytes:.0f} MB of memory at most" if result.peak_megabytes else ""
    ending = [
        f"{result.rounds} rounds, {result.prunes} prunes{ranks}",
        f"{result.bytes_up / 1e6:.1f} MB up, {result.bytes_down / 1e6:.1f} MB down, {result.seconds:.0f} s{peak}",
        *([f"{_KINDS[result.adapter.name]:<15} {result.adapter}"] if result.adapter else []),
        f"{'records:':<15} {result.records}",
    ]
    return "\n".join([*scores, *ending])


def describe_finished(folder: Path, summary: Mapping[str, Any]) -> str:
    """Say the result of a run that was complete already, as far as its summary has it."""
    before, after = (_perplexity(summary.get(key)) for key in ("base", "final"))
    # The summary may be any JSON by now, so that what it says is shown as a value.
    lines = [f"{folder} is complete: {summary.get('rounds')!r} rounds, {summary.get('prunes')!r} prunes"]
    lines.append(f"held-out perplexity {_change(before, after)}")
    # Where they are now: the folder may have been moved since.
    lines += [f"{kind:<15} {folder / name}" for name, kind in _KINDS.items() if (folder / name).is_dir()]
    return "\n".join([*lines, f"{'records:':<15} {folder / 'records.jsonl'}"])


def _perplexity(measured: object) -> float | None:
    found = measured.get("perplexity") if isinstance(measured, Mapping) else None
    # JSON can hold a whole number that is no float.
    return float(found) if isinstance(found, (int, float)) and abs(found) < 1e300 else None


def _describe_scores(before: Measurement, after: Measurement) -> list[str]:
    # Of clients on machines of their own, others may have been there at the end than at the beginning.
    common = [name for name in after.clients if name in before.clients]
    was, now = (total_score(measured.clients[name] for name in common) for measured in (before, after))
    all_alike = len(common) == len(after.clients) == len(before.clients)
    of = "" if all_alike else f" of the {len(common)} clients measured before and after"
    lines = [f"held-out perplexity{of} {_change(was.perplexity, now.perplexity)}"]
    if now.rouge_l is not None:
        lines.append(f"ROUGE-L {_change(was.rouge_l, now.rouge_l)}")
    lines += [
        f"  tier of rank {tier}: perplexity {_change(before.tiers[tier].perplexity, score.perplexity)}"
        for tier, score in (after.tiers.items() if all_alike else ())
    ]
    if after.answers:
        first, last = before.answers[0], after.answers[0]
        told = {"expected": first.expected, "before": first.text, "after": last.text}
        lines += ["", f"one prompt ({first.client}):", *(f"  | {line}".rstrip() for line in first.prompt.splitlines())]
        lines += [f"  {name + ':':<9} {' '.join(text.split()) or '(nothing)'}" for name, text in told.items()]
    return [*map(printable, lines), ""]


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "not measured"
    return f"{before:.2f} -> {after:.2f}" + (f" ({after / before - 1:+.1%})" if before else "")


def _rank_counts(ranks: Iterable[Rank]) -> str:
    """Say how many clients have which rank, widest last; a client with a rank a module counts by its largest."""
    counts = Counter(rank if isinstance(rank, int) else max(rank.values()) for rank in ranks)
    return ", ".join(f"{count} at {rank}" for rank, count in sorted(counts.items()))
