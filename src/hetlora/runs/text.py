"""Formats figures and names for people and for charts."""

from __future__ import annotations

import html
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from hetlora.errors import printable

__all__ = [
    "MISSING",
    "aligned",
    "change",
    "clean",
    "figure",
    "in_chart",
    "indented",
    "many",
    "megabytes",
    "method_labels",
    "percent",
    "several",
    "shortened",
    "span",
]

MISSING = "—"


def clean(value: object, limit: int = 500) -> str:
    r"""Return printable text on one line, cut to `limit` characters: a client's name or reason can be anything.

    Example:
        >>> clean("a\u202eb\n" + "c" * 600, 8)
        'a\\u202e…'
    """
    text = printable(" ".join(str(value)[: 2 * limit].split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def shortened(value: object, limit: int = 22) -> str:
    """Return a name for an axis, shortened in its middle: names often differ only at their end.

    Example:
        >>> shortened("hospital-of-the-north-17", 12)
        'hospit…th-17'
    """
    text, tail = clean(value), (limit - 1) // 2
    return text if len(text) <= limit else f"{text[: limit - 1 - tail]}…{text[-tail:]}"


def in_chart(value: object, limit: int = 60) -> str:
    """Return escaped text for a chart: plotly interprets some tags and entities.

    Example:
        >>> in_chart('<a href="x">&')
        '&lt;a href="x"&gt;&amp;'
    """
    return html.escape(shortened(value, limit), quote=False)


def indented(lines: Sequence[tuple[str, str]], width: int = 80) -> list[str]:
    r"""Return pairs of a name and a text in two columns, the texts broken at words.

    Example:
        >>> print("\n".join(indented([("a", "one two three"), ("bcd", "four")], width=14)))
          a    one two
               three
          bcd  four
    """
    room = max(len(name) for name, _ in lines) + 4
    broken = []
    for name, text in lines:
        parts = textwrap.wrap(text, width - room, break_on_hyphens=False) or [""]
        broken += [f"  {name}".ljust(room) + parts[0], *(" " * room + part for part in parts[1:])]
    return broken


def aligned(lines: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    r"""Return lines of cells in aligned columns: those of `left` to the left, the others to the right.

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


def figure(value: float | None, form: str | None = None, *, missing: str = MISSING) -> str:
    """Return a figure for a person.

    Args:
        value: The figure; None where there is none.
        form: A format of Python's, e.g. ``".2f"``; None keeps the digits that matter.
        missing: The text for None.

    Example:
        >>> figure(1234.5), figure(41.654), figure(3.8291), figure(0.01234), figure(None), figure(1e9)
        ('1,234', '41.65', '3.829', '0.0123', '—', '1e+09')
        >>> figure(0.5, ".1%"), figure(None, ".2f", missing="?")
        ('50.0%', '?')
    """
    if value is None:
        return missing
    if form is not None:
        return f"{value:{form}}"
    size = abs(value)
    if size >= 1e7:
        return f"{value:.3g}"
    digits = 0 if size >= 1000 else 2 if size >= 10 else 3
    return f"{value:,.{digits}f}" if size >= 1 or not value else f"{value:.3g}"


def change(before: float | None, after: float | None) -> str:
    """Return a figure before and after, with the change in percent.

    Example:
        >>> change(100.0, 41.65), change(None, 2.0)
        ('100.00 → 41.65 (−58.4 %)', '— → 2.000')
    """
    text = f"{figure(before)} → {figure(after)}"
    return f"{text} ({percent(after / before - 1, signed=True)})" if before and after is not None else text


def percent(share: float, *, signed: bool = False) -> str:
    """Return a share in percent.

    Example:
        >>> percent(0.0123), percent(-0.5, signed=True), percent(0.00021)
        ('1.2 %', '−50.0 %', '0.021 %')
    """
    value = 100 * share
    digits = 1 if abs(value) >= 1 or not value else 3
    return f"{value:{'+' if signed else ''},.{digits}f} %".replace("-", "−")


def megabytes(count: float, form: str | None = None) -> str:
    """Return bytes in megabytes, 10⁶ each, in a form as `figure` takes it.

    Example:
        >>> megabytes(7_800_000), megabytes(13_440), megabytes(0), megabytes(7_800_000, ".1f")
        ('7.800 MB', '0.0134 MB', '0 MB', '7.8 MB')
    """
    return f"{figure(count / 1e6, form)} MB" if count or form else "0 MB"


def many(count: int, noun: str) -> str:
    """Return a count with its noun.

    Example:
        >>> many(1, "client"), many(1200, "prune")
        ('1 client', '1,200 prunes')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def several(names: Sequence[str], limit: int = 5) -> str:
    """Return a few names and the number of the others.

    Example:
        >>> several(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def span(values: Sequence[float]) -> str:
    """Return the range of one or more figures, or the figure if all are equal.

    Example:
        >>> span([2, 16]), span([4.0, 4.0])
        ('2.000 to 16.00', '4.000')
    """
    low, high = figure(min(values)), figure(max(values))
    return low if low == high else f"{low} to {high}"


def method_labels(names: Iterable[str]) -> dict[str, str]:
    """Return short labels of methods: of ``module:factory`` the factory, unless two labels would be equal.

    Example:
        >>> method_labels(["hetlora", "mypkg.fair:fair", "one:same", "two:same"])
        {'hetlora': 'hetlora', 'mypkg.fair:fair': 'fair', 'one:same': 'one:same', 'two:same': 'two:same'}
    """
    short = {name: name.rpartition(":")[2] or name for name in names}
    count = Counter(short.values())
    return {name: label if count[label] == 1 else name for name, label in short.items()}
