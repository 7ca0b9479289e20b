"""A report: one self-contained HTML page about one or several runs, made from their records.

`hetlora.runs.reader` reads run folders, and `summary` computes figures. `charts` draws them with plotly, `comparison` reads the
table of a comparison, `answers` a run's sample answers. `page` fills `page.html`, a Jinja2 template.

`plotly-basic.min.js` is the package plotly.js-basic-dist-min of npm, in the version that the plotly of constraints.txt has; its
licence is `plotly-LICENSE.txt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hetlora.commands.report.comparison import read_comparison
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
    compared = read_comparison(folders[0]) if len(folders) == 1 else None
    page = render(read_runs(folders), compared).encode("utf8")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(output) as file:
            file.write(page)
    except OSError as error:
        problem = error.strerror or error
        raise HetLoraError(f"cannot write {str(output)!r}: {problem}; set --output to a file you may write") from error
    return output
