"""A preview of the data as a table and bars, for a terminal or a file."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from hetlora.commands.preview.preview import Preview, quantiles
from hetlora.runs.text import aligned

__all__ = ["Bar", "bars_of", "print_preview"]

MANY = 30
"""With more clients than this, the table shows quantiles and the picture every so-manyth client."""
MOST_LABELS = 8
LONGEST = 40
"""Characters of a client's or a label's name in the table."""
# The palette of Okabe and Ito, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
BLOCKS, LETTERS = "█▓▒░▚▞▙▜", "#=+-o*x."


class Bar(NamedTuple):
    """One client's bar.

    Attributes:
        name: The client.
        parts: Rows by label, or training and held-out rows, in the order of the picture's legend.
    """

    name: str
    parts: tuple[int, ...]


def bars_of(shown: Preview, *, every: bool = False) -> tuple[tuple[str, ...], list[Bar]]:
    """Return the legend and one bar a client: all of them, or of many 30 evenly by size, largest first.

    Args:
        shown: What the clients hold.
        every: Show all clients, however many.
    """
    if shown.labels:
        legend, counts = _shown_labels(shown)
    else:
        legend = ("training rows", "held out")
        counts = {client.client: (client.train, client.test) for client in shown.clients}
    bars = [Bar(_printable(name), parts) for name, parts in counts.items()]
    if every or len(bars) <= MANY:
        return legend, bars
    bars.sort(key=lambda bar: -sum(bar.parts))
    return legend, [bars[round(index * (len(bars) - 1) / (MANY - 1))] for index in range(MANY)]


def _shown_labels(shown: Preview) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """Return at most eight labels, the rest as "other", and each client's counts of them."""
    kept = MOST_LABELS - 1 if len(shown.labels) > MOST_LABELS else MOST_LABELS
    own, rest = shown.labels[:kept], shown.labels[kept:]
    counts = {
        client.client: (
            *(client.labels.get(label, 0) for label in own),
            *([sum(client.labels.get(label, 0) for label in rest)] if rest else []),
        )
        for client in shown.clients
    }
    return (*own, *([f"{len(rest)} others"] if rest else [])), counts


def print_preview(shown: Preview, file: TextIO, *, every: bool = False) -> None:
    """Print a table of the clients, or of quantiles where they are many, a line of totals, and bars.

    Args:
        shown: What the clients hold.
        file: A terminal, or anything else, which gets neither colour nor lines.
        every: Show all clients, however many.
    """
    console = Console(file=file, highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(file=file, highlight=False, emoji=False, width=200, color_system=None)
    lines = _clients(shown) if every or len(shown.clients) <= MANY else _quantiles(shown)
    for part in _fitting(lines, console.width if console.is_terminal else None):
        for number, line in enumerate(aligned(part)):
            # soft_wrap leaves the line as it is: a number that is cut would be another number
            console.print(Text(line, style="bold" if number == 0 else ""), soft_wrap=True)
        console.print()
    for line in _totals(shown):
        console.print(line, markup=False)
    console.print()
    legend, bars = bars_of(shown, every=every)
    if len(bars) < len(shown.clients):
        console.print(f"{len(bars)} of {len(shown.clients)} clients, evenly by size:")
    _print_bars(console, legend, bars)


FIGURES = {
    "train": "train rows",
    "test": "held out",
    "train_tokens": "train tokens",
    "truncated": "truncated",
    "empty": "empty",
}


def _clients(shown: Preview) -> list[list[str]]:
    legend, counts = _shown_labels(shown)
    lines = [["client", *FIGURES.values(), *legend]]
    for client in shown.clients:
        figures = [_number(getattr(client, figure)) for figure in FIGURES]
        lines.append([client.client, *figures, *map(str, counts[client.client])])
    return lines


def _quantiles(shown: Preview) -> list[list[str]]:
    legend, counts = _shown_labels(shown)
    known = {figure: name for figure, name in FIGURES.items() if shown.total(figure) is not None}
    columns: list[Mapping[str, int]] = [quantiles([getattr(own, figure) for own in shown.clients]) for figure in known]
    columns += [quantiles([parts[index] for parts in counts.values()]) for index in range(len(legend))]
    header = [f"of {len(shown.clients)} clients", *known.values(), *legend]
    return [header, *([name, *(str(column[name]) for column in columns)] for name in columns[0])]


def _fitting(lines: Sequence[Sequence[str]], room: int | None) -> list[list[list[str]]]:
    """Return a table as several, each with the first column, none wider than `room` characters where that can be."""
    names, *columns = [list(map(_printable, column)) for column in zip(*lines, strict=True)]
    columns = [[_short(name, LONGEST), *cells] for name, *cells in columns]
    widths = [_width(column) + 2 for column in columns]
    longest = LONGEST if room is None else max(4, min(LONGEST, room // 3, room - max(widths)))
    names = [_ends(name, longest) for name in names]
    parts: list[list[list[str]]] = []
    left = 0
    for column, width in zip(columns, widths, strict=True):
        if not parts or (room is not None and width > left):
            parts.append([names])
            left = (room or 0) - _width(names)
        parts[-1].append(column)
        left -= width
    return [[list(line) for line in zip(*part, strict=True)] for part in parts]


def _width(column: Sequence[str]) -> int:
    return max(map(cell_len, column))


def _ends(text: str, most: int) -> str:
    """Shorten a name in its middle: names often differ at their end alone."""
    tail = most // 2
    return text if cell_len(text) <= most else f"{text[: most - tail - 1]}…{text[-tail:]}"


def _number(value: int | None) -> str:
    return "?" if value is None else str(value)


def _totals(shown: Preview) -> list[str]:
    tokens = shown.total("train_tokens")
    parts = [
        f"{shown.path}, {shown.partition}: {len(shown.clients)} clients",
        f"{shown.total('train')} training rows, {shown.total('test')} held out",
        f"{tokens} training tokens" if tokens is not None else "",
        f"{shown.total('truncated')} rows truncated" if shown.total("truncated") else "",
        f"{shown.total('empty')} dropped for an empty target" if shown.total("empty") else "",
    ]
    largest = "the largest client holds" if len(shown.clients) <= 10 else "the largest tenth of the clients hold"
    lines = [
        "; ".join(part for part in parts if part),
        f"{largest} {shown.largest_tenth_share:.0%} of the training rows",
    ]
    if shown.left_out_clients:
        lines.append(f"{shown.left_out_clients} clients left out (not drawn, too few rows, or none held out)")
    if shown.left_out_rows:
        lines.append(f"{shown.left_out_rows} rows on neither side of the split")
    if shown.no_tokens:
        lines.append(f"no tokens: {shown.no_tokens}")
    return [_printable(line) for line in lines]


def _print_bars(console: Console, legend: Sequence[str], bars: Sequence[Bar]) -> None:
    signs = BLOCKS if console.encoding.lower().startswith("utf") else LETTERS
    styles = list(zip(signs, COLOURS, strict=True))[: len(legend)]
    key = Text()
    for label, (sign, colour) in zip(legend, styles, strict=True):
        key.append(sign * 2, style=colour).append(f" {_printable(label)}   ")
    console.print(key)
    names = min(30, max(4, console.width // 3), max(len(bar.name) for bar in bars))
    most = max(1, *(sum(bar.parts) for bar in bars))
    width = max(4, min(console.width, 110) - names - len(str(most)) - 3)
    for bar in bars:
        line = Text(f"{_ends(bar.name, names):<{names}} ")
        for length, (sign, colour) in zip(_lengths(bar.parts, most, width), styles, strict=True):
            line.append(sign * length, style=colour)
        console.print(line.append(f" {sum(bar.parts)}"), no_wrap=True)


def _lengths(parts: Sequence[int], most: int, width: int) -> list[int]:
    """Return the parts' lengths in characters so that the whole bar is as long as its sum, whatever is rounded."""
    ends = [round(sum(parts[: index + 1]) * width / most) for index in range(len(parts))]
    return [end - start for start, end in itertools.pairwise([0, *ends])]


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: max(1, most - 1)] + "…"


def _printable(text: str) -> str:
    """Take out what a terminal would not show but obey."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)
