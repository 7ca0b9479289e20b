"""Figures and names as a person reads them, and names as a chart may show them."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from hetlora.errors import printable

__all__ = [
    "aligned",
    "change",
    "clean",
    "figure",
    "in_chart",
    "many",
    "megabytes",
    "method_labels",
    "percent",
    "several",
    "shortened",
    "span",
]


def clean(value: object, most: int = 500) -> str:
    r"""Return text on one line that holds nothing invisible, not too long: a client's name or reason can be anything.

    Example:
        >>> clean("a\u202eb\n" + "c" * 600, 8)
        'a\\u202e…'
    """
    text = printable(" ".join(str(value)[: 2 * most].split()))
    return text if len(text) <= most else text[: most - 1] + "…"


def shortened(value: object, most: int = 22) -> str:
    """Return a name for an axis, shortened in its middle: names often differ at their end alone.

    Example:
        >>> shortened("hospital-of-the-north-17", 12)
        'hospit…th-17'
    """
    text, tail = clean(value), (most - 1) // 2
    return text if len(text) <= most else f"{text[: most - 1 - tail]}…{text[-tail:]}"


def in_chart(value: object, most: int = 60) -> str:
    """Return text that a chart shows as it is: plotly reads some tags and entities in what it draws.

    Example:
        >>> in_chart('<a href="x">&')
        '&lt;a href="x"&gt;&amp;'
    """
    return html.escape(shortened(value, most), quote=False)


def aligned(lines: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    r"""Return lines of cells in columns: those of `left` begin in one place, the others end in one. Nothing is cut.

    Example:
        >>> print("\n".join(aligned([["client", "rows"], ["ann", "120"], ["本", "7"]])))
        client  rows
        ann      120
        本         7
    """
    from rich.cells import cell_len

    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]

    def padded(column: int, cell: str) -> str:
        gap = " " * (widths[column] - cell_len(cell))
        return cell + gap if column in left else gap + cell

    return ["  ".join(padded(column, cell) for column, cell in enumerate(line)).rstrip() for line in lines]


def figure(value: float | None) -> str:
    """Return a figure with the digits that matter.

    Example:
        >>> figure(1234.5), figure(41.654), figure(3.8291), figure(0.01234), figure(None), figure(1e9)
        ('1,234', '41.65', '3.829', '0.0123', '—', '1e+09')
    """
    if value is None:
        return "—"
    size = abs(value)
    if size >= 1e7:
        return f"{value:.3g}"
    digits = 0 if size >= 1000 else 2 if size >= 10 else 3
    return f"{value:,.{digits}f}" if size >= 1 or not value else f"{value:.3g}"


def change(before: float | None, after: float | None) -> str:
    """Say how a figure changed.

    Example:
        >>> change(100.0, 41.65), change(None, 2.0)
        ('100.00 → 41.65 (−58.4 %)', '— → 2.000')
    """
    told = f"{figure(before)} → {figure(after)}"
    return f"{told} ({percent(after / before - 1, signed=True)})" if before and after is not None else told


def percent(share: float, *, signed: bool = False) -> str:
    """Return a share in percent.

    Example:
        >>> percent(0.0123), percent(-0.5, signed=True), percent(0.00021)
        ('1.2 %', '−50.0 %', '0.021 %')
    """
    value = 100 * share
    digits = 1 if abs(value) >= 1 or not value else 3
    return f"{value:{'+' if signed else ''},.{digits}f} %".replace("-", "−")


def megabytes(count: float) -> str:
    """Return bytes in megabytes, 10⁶ each.

    Example:
        >>> megabytes(7_800_000), megabytes(13_440), megabytes(0)
        ('7.800 MB', '0.0134 MB', '0 MB')
    """
    return f"{figure(count / 1e6)} MB" if count else "0 MB"


def many(count: int, what: str) -> str:
    """Return a count of things.

    Example:
        >>> many(1, "client"), many(1200, "prune")
        ('1 client', '1,200 prunes')
    """
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def several(names: Sequence[str], most: int = 5) -> str:
    """Return a few names, and how many more there are.

    Example:
        >>> several(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def span(values: Sequence[float]) -> str:
    """Return the least and the most of one or more figures, once where they are the same.

    Example:
        >>> span([2, 16]), span([4.0, 4.0])
        ('2.000 to 16.00', '4.000')
    """
    least, most = figure(min(values)), figure(max(values))
    return least if least == most else f"{least} to {most}"


def method_labels(names: Iterable[str]) -> dict[str, str]:
    """Return what methods are called beside each other: one of a package by its factory, where no other is called so.

    Example:
        >>> method_labels(["hetlora", "mypkg.fair:fair", "one:same", "two:same"])
        {'hetlora': 'hetlora', 'mypkg.fair:fair': 'fair', 'one:same': 'one:same', 'two:same': 'two:same'}
    """
    short = {name: name.rpartition(":")[2] or name for name in names}
    count = Counter(short.values())
    return {name: label if count[label] == 1 else name for name, label in short.items()}
