"""A run's result as text for a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hetlora.core.adapter import Rank
from hetlora.errors import printable
from hetlora.runs.display import coloured
from hetlora.runs.reader import number
from hetlora.runs.result import Measurement, RunResult
from hetlora.runs.text import figure, many, megabytes
from hetlora.training.evaluation import total_score

__all__ = ["describe_finished", "describe_result", "describe_scores", "print_result"]

_KINDS = {"adapter": "adapter (PEFT):", "adapters": "PEFT, by client:", "model": "merged model:"}


def print_result(result: RunResult, file: IO[str]) -> None:
    """Print a result: its scores as a table on a terminal, as `describe_result` elsewhere."""
    if not file.isatty() or result.final is None:
        print(describe_result(result), file=file)
        return
    table = Table("", "before", "after", "change", box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, before, after in _scores(result.base, result.final):
        table.add_row(name, figure(before, ".2f"), figure(after, ".2f"), _relative(before, after))
    console = Console(file=file, highlight=False, emoji=False)
    console.print(table)
    for line in [*_answer(result.base, result.final), *_totals(result)]:
        console.print(coloured(line), soft_wrap=True)  # a path can be copied


def describe_result(result: RunResult) -> str:
    """Return the two measurements, one answer before and after, the totals, and the places of the files."""
    measured = []
    if result.final is not None:
        answer = _answer(result.base, result.final)
        measured = [*describe_scores(result.base, result.final), "", *answer]
    return "\n".join([*measured, *_totals(result)])


def _totals(result: RunResult) -> list[str]:
    ranks = f"; clients by rank now: {_rank_counts(result.ranks.values())}" if result.ranks else ""
    peak = f", {figure(result.peak_megabytes, '.0f')} MB of memory at most" if result.peak_megabytes else ""
    sent = f"{megabytes(result.bytes_up, '.1f')} up, {megabytes(result.bytes_down, '.1f')} down"
    return [
        f"{many(result.rounds, 'round')}, {many(result.prunes, 'prune')}{ranks}",
        f"{sent}, {figure(result.seconds, '.0f')} s{peak}",
        *([f"{_KINDS[result.adapter.name]:<15} {result.adapter}"] if result.adapter else []),
        f"{'records:':<15} {result.records}",
    ]


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


def describe_scores(before: Measurement, after: Measurement) -> list[str]:
    """Return a line per score, of all clients that both measurements have and of each tier."""
    return [printable(f"{name} {_change(was, now)}") for name, was, now in _scores(before, after)]


def _scores(before: Measurement, after: Measurement) -> list[tuple[str, float | None, float | None]]:
    """Return the scores, and what they were before: of all clients that both measurements have, and of each tier."""
    # Over Flower, other clients may be there at the end than at the beginning.
    common = [name for name in after.clients if name in before.clients]
    was, now = (total_score(measured.clients[name] for name in common) for measured in (before, after))
    all_alike = len(common) == len(after.clients) == len(before.clients)
    of = "" if all_alike else f" of the {many(len(common), 'client')} measured before and after"
    scores = [(f"held-out perplexity{of}", was.perplexity, now.perplexity)]
    if now.rouge_l is not None:
        scores.append(("ROUGE-L", was.rouge_l, now.rouge_l))
    tiers = after.tiers.items() if all_alike else ()
    return scores + [
        (f"  tier of rank {tier}: perplexity", before.tiers[tier].perplexity, score.perplexity) for tier, score in tiers
    ]


def _answer(before: Measurement, after: Measurement) -> list[str]:
    """Return one prompt with its answers, and a blank line; nothing where none was asked."""
    if not after.answers:
        return []
    first, last = before.answers[0], after.answers[0]
    texts = {"expected": first.expected, "before": first.text, "after": last.text}
    lines = [f"one prompt ({first.client}):", *(f"  | {line}".rstrip() for line in first.prompt.splitlines())]
    lines += [f"  {name + ':':<9} {' '.join(text.split()) or '(nothing)'}" for name, text in texts.items()]
    return [*map(printable, lines), ""]


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "not measured"
    relative = f" ({change})" if (change := _relative(before, after)) else ""
    return f"{figure(before, '.2f')} -> {figure(after, '.2f')}{relative}"


def _relative(before: float | None, after: float | None) -> str:
    return figure(after / before - 1, "+.1%") if before and after is not None else ""


def _rank_counts(ranks: Iterable[Rank]) -> str:
    """Return the number of clients per rank, ascending; a client with one rank per module counts by its largest."""
    counts = Counter(rank if isinstance(rank, int) else max(rank.values()) for rank in ranks)
    return ", ".join(f"{count} at {rank}" for rank, count in sorted(counts.items()))
