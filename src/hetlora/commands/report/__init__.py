"""A report: one self-contained HTML page about a run, or several side by side, from their records alone.

`hetlora.runs.reader` reads folders and `hetlora.commands.report.summary` works out what they come to. Charts of it,
each with a sentence and a table, are made by `hetlora.commands.report.curves` and `hetlora.commands.report.tier_chart`,
of several runs, and by `hetlora.commands.report.client_charts` and `hetlora.commands.report.share_charts`, of one run;
`hetlora.commands.report.page` makes the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hetlora.commands.report.page import render
from hetlora.errors import HetLoraError
from hetlora.runs.folder import atomic_write
from hetlora.runs.reader import read_runs

__all__ = ["write_report"]


def write_report(folders: Sequence[Path], output: Path) -> Path:
    """Write one HTML page about runs, which needs nothing but itself: no network, no other file.

    Args:
        folders: Of runs, complete or not, or of comparisons, which stand for their runs.
        output: The page, ``*.html``; what was there is replaced.

    Returns:
        `output`.

    Raises:
        HetLoraError: A folder is no run, plotly is not installed, or the page cannot be written.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        # A slip of the hand must not write a page over the records of a run.
        raise HetLoraError(f"a report is a page, and {str(output)!r} is no name of one; end it with .html")
    page = render(read_runs(folders)).encode("utf8")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(output) as file:
            file.write(page)
    except OSError as error:
        problem = error.strerror or error
        raise HetLoraError(f"cannot write {str(output)!r}: {problem}; set --output to a file you may write") from error
    return output
