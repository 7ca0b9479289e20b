"""A run's result as text for a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hetlora.core.adapter import Rank
from hetlora.errors import printable
from hetlora.runs.reader import number
from hetlora.runs.result import Measurement, RunResult
from hetlora.runs.text import figure, megabytes
from hetlora.training.evaluation import total_score

__all__ = ["describe_finished", "describe_result"]

_KINDS = {"adapter": "adapter (PEFT):", "adapters": "PEFT, by client:", "model": "merged model:"}


def describe_result(result: RunResult) -> str:
    """Return the two measurements, one answer before and after, the totals, and the places of the files."""
    scores = _describe_scores(result.base, result.final) if result.final is not None else []
    ranks = f"; clients by rank now: {_rank_counts(result.ranks.values())}" if result.ranks else ""
    peak = f", {figure(result.peak_megabytes, '.0f')} MB of memory at most" if result.peak_megabytes else ""
    sent = f"{megabytes(result.bytes_up, '.1f')} up, {megabytes(result.bytes_down, '.1f')} down"
    ending = [
        f"{result.rounds} rounds, {result.prunes} prunes{ranks}",
        f"{sent}, {figure(result.seconds, '.0f')} s{peak}",
        *([f"{_KINDS[result.adapter.name]:<15} {result.adapter}"] if result.adapter else []),
        f"{'records:':<15} {result.records}",
    ]
    return "\n".join([*scores, *ending])


def describe_finished(folder: Path, summary: Mapping[str, Any]) -> str:
    """Return the result of a run that was already complete, as far as its summary holds it."""
    before, after = (_perplexity(summary.get(key)) for key in ("base", "final"))
    # The summary may be any JSON by now, so its values are printed as such.
    lines = [f"{folder} is complete: {summary.get('rounds')!r} rounds, {summary.get('prunes')!r} prunes"]
    lines.append(f"held-out perplexity {_change(before, after)}")
    # The folder may have been moved since, so the summary's paths do not count.
    lines += [f"{kind:<15} {folder / name}" for name, kind in _KINDS.items() if (folder / name).is_dir()]
    return "\n".join([*lines, f"{'records:':<15} {folder / 'records.jsonl'}"])


def _perplexity(measured: object) -> float | None:
    return number(measured.get("perplexity")) if isinstance(measured, Mapping) else None


def _describe_scores(before: Measurement, after: Measurement) -> list[str]:
    # Over Flower, other clients may be there at the end than at the beginning.
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
        texts = {"expected": first.expected, "before": first.text, "after": last.text}
        lines += ["", f"one prompt ({first.client}):", *(f"  | {line}".rstrip() for line in first.prompt.splitlines())]
        lines += [f"  {name + ':':<9} {' '.join(text.split()) or '(nothing)'}" for name, text in texts.items()]
    return [*map(printable, lines), ""]


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "not measured"
    relative = f" ({figure(after / before - 1, '+.1%')})" if before else ""
    return f"{figure(before, '.2f')} -> {figure(after, '.2f')}{relative}"


def _rank_counts(ranks: Iterable[Rank]) -> str:
    """Return the number of clients per rank, ascending; a client with one rank per module counts by its largest."""
    counts = Counter(rank if isinstance(rank, int) else max(rank.values()) for rank in ranks)
    return ", ".join(f"{count} at {rank}" for rank, count in sorted(counts.items()))
