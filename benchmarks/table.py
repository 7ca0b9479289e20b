"""The rows of the benchmark table: ratios of two ways to do the same work, measured side by side."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Row", "markdown", "paired", "row"]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: The comparison.
        ratio: The median of the pairs.
        min: The lowest.
        max: The highest.
        target: What the ratio must reach: ``">= 2.5"``, ``"<= 1.05"``, or "" where it is only shown.
        holds: Whether the median reaches it; None where it is not judged (no target, or a small run).
        note: Sizes, the bound, or why it is not judged.
    """

    name: str
    ratio: float
    min: float
    max: float
    target: str = ""
    holds: bool | None = None
    note: str = ""


def paired(slow: Callable[[], Any], fast: Callable[[], Any], pairs: int = 5) -> list[float]:
    """Run A, B, A, B … after a warm-up of each, and return every pair's seconds of A over those of B."""
    slow(), fast()
    return [_seconds(slow) / _seconds(fast) for _ in range(pairs)]


def _seconds(work: Callable[[], Any]) -> float:
    gc.collect()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def row(name: str, ratios: Sequence[float], target: str = "", *, judge: bool = True, note: str = "") -> Row:
    """Return the row of these ratios.

    Example:
        >>> row("twice as fast", [1.9, 2.1, 2.0], ">= 1.5").holds
        True
    """
    ratio = statistics.median(ratios)
    return Row(name, ratio, min(ratios), max(ratios), target, _reaches(ratio, target) if judge else None, note)


def markdown(lines: Iterable[Mapping[str, Any]]) -> str:
    """Return recorded rows as the table of the README.

    Example:
        >>> print(markdown([{"name": "x", "ratio": 2.0, "min": 1.5, "max": 2.5, "target": ">= 1", "holds": True}]))
        | what | ratio | lowest to highest | target | holds |
        | --- | --- | --- | --- | --- |
        | x | 2 | 1.5 to 2.5 | ≥ 1 | yes |
    """
    head = ["| what | ratio | lowest to highest | target | holds |", "| --- | --- | --- | --- | --- |"]
    verdicts = {True: "yes", False: "no", None: "not judged"}
    return "\n".join(
        head
        + [
            f"| {line['name']} | {line['ratio']:.3g} | {line['min']:.3g} to {line['max']:.3g} | "
            f"{line['target'].replace('>=', '≥').replace('<=', '≤') or '—'} | "
            f"{verdicts[line['holds']] if line['target'] else '—'} |"
            for line in lines
        ]
    )


def _reaches(ratio: float, target: str) -> bool | None:
    if not target:
        return None
    sign, bound = target.split()
    return ratio >= float(bound) if sign == ">=" else ratio <= float(bound)
