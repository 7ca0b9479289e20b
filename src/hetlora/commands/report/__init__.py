"""A report: one self-contained HTML page about one or several runs, made from their records.

`hetlora.runs.reader` reads run folders, and `summary` computes figures. `curves` and `tier_chart` draw charts that compare
runs, `client_charts` and `share_charts` those of one run, each with a sentence and a table. `page` makes the page.
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
    """Write one self-contained HTML page about runs.

    Args:
        folders: Folders of runs, complete or not, or of comparisons, which stand for their runs.
        output: The page, ``*.html``; an existing file is replaced.

    Returns:
        `output`.

    Raises:
        HetLoraError: A folder is no run, or the page cannot be written.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        # A typing error must not replace the records of a run.
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
