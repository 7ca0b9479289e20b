"""The table of a comparison for a terminal and as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import IO, Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hetlora.commands.compare.statistics import OTHER, MethodRow
from hetlora.runs.text import MISSING, aligned, figure

__all__ = ["cells", "escape_latex", "header", "print_table", "to_csv", "to_latex", "to_markdown"]

METRICS = {"perplexity": "perplexity", "rougeL": "ROUGE-L"}


def header(results: Mapping[str, Any]) -> list[str]:
    """Return the names of the columns."""
    columns = "best round|rounds to target|MB to target|trained|final rank|pruned|MB up|MB down|seconds|p|verdict"
    metric = results["metric"]
    return ["method", "learning rate", METRICS[metric], METRICS[OTHER[metric]], *columns.split("|")]


def cells(row: MethodRow) -> list[str]:
    """Return a row as text, a missing value as an em dash.

    Example:
        >>> cells(MethodRow("a", "fedavg", 0.004, mean=20.0, std=0.5, seeds=2, trained_share=0.0125))[:4]
        ['a', '0.004', '20.00 ± 0.50', '—']
    """
    reached = "" if row.reached in (0, row.seeds) else f" ({row.reached} of {row.seeds})"
    fewer = f" (n = {row.pairs})" if row.pairs is not None and row.pairs < row.seeds + row.failed else ""
    return [
        row.label,
        figure(row.learning_rate, "g"),
        _final(row),
        figure(row.other_mean, ".2f"),
        figure(row.best_round, ".1f").removesuffix(".0"),
        figure(row.rounds_to_target, ".1f") + reached,
        figure(row.megabytes_to_target, ".2f") + reached,
        figure(row.trained_share, ".2%"),
        figure(row.final_rank, ".1f"),
        figure(row.pruned_share, ".0%"),
        figure(row.megabytes_up, ".2f"),
        figure(row.megabytes_down, ".2f"),
        figure(row.seconds, ".0f"),
        figure(row.p_holm, ".3f"),
        (row.verdict or MISSING) + fewer,
    ]


def _lines(rows: Sequence[MethodRow], results: Mapping[str, Any]) -> list[list[str]]:
    """Return the header and the rows without the columns in which no row has a figure."""
    columns = zip(header(results), *map(cells, rows), strict=True)
    shown = [column for column in columns if set(column[1:]) != {MISSING}]
    return [list(line) for line in zip(*shown, strict=True)]


def _final(row: MethodRow) -> str:
    if not row.seeds:
        return "failed" if row.failed else MISSING
    deviation = f" ± {row.std:.2f}" if row.std is not None else ""
    missing = f" ({row.not_finite} not finite)" if row.not_finite else ""
    failed = f" ({row.failed} failed)" if row.failed else ""
    return figure(row.mean, ".2f") + deviation + missing + failed


def to_markdown(rows: Sequence[MethodRow], notes: Sequence[str], results: Mapping[str, Any]) -> str:
    """Return a Markdown table, with notes below."""

    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(re.sub(r"([\\|])", r"\\\1", " ".join(value.split())) for value in values) + " |"

    columns, *body = _lines(rows, results)
    rule = "| " + " | ".join("---:" if _is_number(name) else "---" for name in columns) + " |"
    table = [line(columns), rule, *map(line, body)]
    return "\n".join([*table, "", *(f"- {' '.join(note.split())}" for note in notes)]).rstrip() + "\n"


def _is_number(column: str) -> bool:
    return column not in ("method", "verdict")


def to_csv(rows: Sequence[MethodRow]) -> str:
    """Return all fields of the rows as CSV: unrounded, missing ones empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [field.name for field in dataclasses.fields(MethodRow)]
    writer.writerow(names)
    writer.writerows([getattr(row, name) for name in names] for row in rows)
    return out.getvalue()


def to_latex(rows: Sequence[MethodRow], notes: Sequence[str], results: Mapping[str, Any]) -> str:
    """Return a LaTeX table for the package booktabs, notes as comments."""
    lines = _lines(rows, results)
    columns = lines[0]
    head, *body = [_not_an_argument(" & ".join(map(escape_latex, line))) + r" \\" for line in lines]
    parts = [
        "% needs \\usepackage{booktabs}",
        *(f"% {' '.join(note.split())}" for note in notes),
        rf"\begin{{tabular}}{{{''.join('r' if _is_number(name) else 'l' for name in columns)}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(parts) + "\n"


def _not_an_argument(line: str) -> str:
    r"""Protect a line whose first character a preceding ``\\`` or ``\midrule`` would take for an argument."""
    return re.sub(r"^(\s*)([\[*])", r"\1{\2}", line)


_LATEX = {character: "\\" + character for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "±": r"$\pm$",
    MISSING: "---",
    "–": "--",
    "·": r"$\cdot$",
    "×": r"$\times$",
}
_GREEK_CAPITALS = {"GAMMA", "DELTA", "THETA", "LAMBDA", "XI", "PI", "SIGMA", "UPSILON", "PHI", "PSI", "OMEGA"}


def escape_latex(text: str) -> str:
    r"""Escape text for LaTeX, Greek letters as mathematics.

    Example:
        >>> escape_latex("HetLoRA γ=99 % (A_k)")
        'HetLoRA $\\gamma$=99 \\% (A\\_k)'
    """
    return "".join(_LATEX.get(character) or _greek(character) or character for character in text)


def _greek(character: str) -> str | None:
    name = unicodedata.name(character, "").replace("LAMDA", "LAMBDA")  # Unicode's spelling
    found = re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (\w+)", name)
    if found is None or found[2] == "OMICRON" or (found[1] == "CAPITAL" and found[2] not in _GREEK_CAPITALS):
        return None
    return f"$\\{found[2].lower() if found[1] == 'SMALL' else found[2].capitalize()}$"


def print_table(rows: Sequence[MethodRow], notes: Sequence[str], results: Mapping[str, Any], file: IO[str]) -> None:
    """Print the table: drawn on a terminal, in two parts if it is narrow; as plain lines elsewhere."""
    lines = _lines(rows, results)
    if file.isatty():
        console = Console(file=file, highlight=False, emoji=False)
        fits = sum(_narrowest(lines)) + 2 * len(lines[0]) <= console.width
        for part in [lines] if fits else [_part(lines, cost=False), _part(lines, cost=True)]:
            console.print(_drawn(part, console.width))
    else:
        words = [column for column, name in enumerate(lines[0]) if not _is_number(name)]
        print("\n".join(aligned(lines, left=words)), file=file)
    for note in notes:
        print(note, file=file)


_COST = {"trained", "final rank", "pruned", "MB up", "MB down", "seconds"}


def _part(lines: Sequence[Sequence[str]], *, cost: bool) -> list[list[str]]:
    columns = [at for at, name in enumerate(lines[0]) if at == 0 or (name in _COST) is cost]
    return [[line[column] for column in columns] for line in lines]


def _drawn(lines: Sequence[Sequence[str]], room: int) -> Table:
    widths = _widest(lines)
    if sum(widths) + 2 * len(widths) > room:
        widths = _narrowest(lines)
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name, width in zip(lines[0], widths, strict=True):
        table.add_column(Text(name), justify="right" if _is_number(name) else "left", width=width)
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    return table


def _widest(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(cell_len, column)) for column in zip(*lines, strict=True)]


def _narrowest(lines: Sequence[Sequence[str]]) -> list[int]:
    """Return the minimal width of every column that breaks neither numbers nor words."""

    def width(column: Sequence[str]) -> int:
        numbers = column[1:] if _is_number(column[0]) else ()
        return max(map(cell_len, (*numbers, *(word for cell in column for word in cell.split()))))

    return [width(column) for column in zip(*lines, strict=True)]
