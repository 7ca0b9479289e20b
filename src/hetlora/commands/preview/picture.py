"""A preview of the data as a table and bars, on a terminal or in a file."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from hetlora.commands.preview.preview import Preview, quantiles
from hetlora.data.inspection import ShownExample
from hetlora.runs.text import aligned, figure, many

__all__ = ["Bar", "bars_of", "print_preview"]

MANY = 30
"""With more clients, the table shows quantiles and the picture an even sample of clients."""
MOST_LABELS = 8
NAMED = 8
"""Clients that are named among those left out."""
LONGEST = 40
"""Maximal length of a client's or a label's name in the table."""
# The colour-blind safe palette of Okabe and Ito.
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
    """Return the legend and one bar per client; of many clients 30, evenly by size, largest first.

    Args:
        shown: The preview.
        every: Show all clients.
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
    """Return at most eight labels, the others combined, and each client's counts of them."""
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
    """Print a table of the clients, or of quantiles if they are many, then totals and bars.

    Args:
        shown: The preview.
        file: A terminal, or another file, which gets neither colours nor lines.
        every: Show all clients.
    """
    console = Console(file=file, highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(file=file, highlight=False, emoji=False, width=200, color_system=None)
    lines = _clients(shown) if every or len(shown.clients) <= MANY else _quantiles(shown)
    for part in _fitting(lines, console.width if console.is_terminal else None):
        for number, line in enumerate(aligned(part)):
            # soft_wrap does not break lines: a cut number would be another number
            console.print(Text(line, style="bold" if number == 0 else ""), soft_wrap=True)
        console.print()
    for line in _totals(shown):
        console.print(line, markup=False)
    console.print()
    legend, bars = bars_of(shown, every=every)
    if len(bars) < len(shown.clients):
        console.print(f"{len(bars)} of {len(shown.clients)} clients, evenly by size:")
    _print_bars(console, legend, bars)
    for example in shown.examples:
        _print_example(console, example)


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
        figures = [figure(getattr(client, name), "d", missing="?") for name in FIGURES]
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
    """Split a table into several, each with the first column and if possible at most `room` characters wide."""
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


def _ends(text: str, length: int) -> str:
    """Shorten a name in its middle, because names often differ only at their end."""
    tail = length // 2
    return text if cell_len(text) <= length else f"{text[: length - tail - 1]}…{text[-tail:]}"


def _totals(shown: Preview) -> list[str]:
    tokens, cut, empty = map(shown.total, ("train_tokens", "truncated", "empty"))
    such_as = f", such as {shown.empty_at}" if shown.empty_at else ""
    parts = [
        f"{shown.path}, {shown.partition}: {len(shown.clients)} clients",
        f"{shown.total('train')} training rows, {shown.total('test')} held out",
        f"{tokens} training tokens" if tokens is not None else "",
        f"{many(cut, 'row')} truncated" if cut else "",
        f"{many(empty, 'row')} dropped for an empty target{such_as}" if empty else "",
    ]
    largest = "the largest client holds" if len(shown.clients) <= 10 else "the largest tenth of the clients hold"
    lines = [
        "; ".join(part for part in parts if part),
        f"{largest} {shown.largest_tenth_share:.0%} of the training rows",
    ]
    for reason, names in shown.left_out.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        lines.append(f"{many(len(names), 'client')} left out, {reason}: {', '.join(names[:NAMED])}{more}")
    if shown.left_out_rows:
        lines.append(f"{many(shown.left_out_rows, 'row')} on neither side of the split")
    if shown.no_tokens:
        lines.append(f"no tokens: {shown.no_tokens}")
    lines += [f"note: {note}" for note in shown.notes]
    return [_printable(line) for line in lines]


def _print_example(console: Console, example: ShownExample) -> None:
    """Print an example: what it is conditioned on, and below it each scored token between bars."""
    console.print()
    title = (
        f"{_printable(example.client)}: {len(example.ids)} tokens, of which the last {len(example.scored)} are scored"
    )
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(Text(f"  given   {example.context!r}"), soft_wrap=True)
    console.print(Text(f"  scored  |{'|'.join(map(_printable, example.scored))}|", style=COLOURS[2]), soft_wrap=True)


def _print_bars(console: Console, legend: Sequence[str], bars: Sequence[Bar]) -> None:
    signs = BLOCKS if console.encoding.lower().startswith("utf") else LETTERS
    styles = list(zip(signs, COLOURS, strict=True))[: len(legend)]
    key = Text()
    for label, (sign, colour) in zip(legend, styles, strict=True):
        key.append(sign * 2, style=colour).append(f" {_printable(label)}   ")
    console.print(key)
    names = min(30, max(4, console.width // 3), max(len(bar.name) for bar in bars))
    longest = max(1, *(sum(bar.parts) for bar in bars))
    width = max(4, min(console.width, 110) - names - len(str(longest)) - 3)
    for bar in bars:
        line = Text(f"{_ends(bar.name, names):<{names}} ")
        for length, (sign, colour) in zip(_lengths(bar.parts, longest, width), styles, strict=True):
            line.append(sign * length, style=colour)
        console.print(line.append(f" {sum(bar.parts)}"), no_wrap=True)


def _lengths(parts: Sequence[int], longest: int, width: int) -> list[int]:
    """Return the parts' lengths in characters; their sum is the rounded length of the whole bar."""
    ends = [round(sum(parts[: index + 1]) * width / longest) for index in range(len(parts))]
    return [end - start for start, end in itertools.pairwise([0, *ends])]


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(1, length - 1)] + "…"


def _printable(text: str) -> str:
    """Replace control characters, which a terminal would obey."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)
