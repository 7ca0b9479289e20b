"""Put the tables of the studies where pages name them: `python tools/fill_results.py` writes docs/results.md and README.md.

A table stands between `<!-- results/STUDY/TABLE.md -->` and `<!-- end -->`; what stands there is replaced by the file, or by the columns of it
that are named: `<!-- results/STUDY/TABLE.md: method, perplexity -->`. `<!-- benchmarks -->` is the table of speed, and with named columns a few
rows of it.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("docs/results.md", "docs/performance.md", "README.md")
PLACE = re.compile(r"<!-- (results/[\w-]+/[\w-]+\.md|benchmarks)(?:: ([^>]+))? -->\n.*?<!-- end -->", flags=re.DOTALL)


FEW = (
    "a cohort of 10 in one pass against one client at a time, one row of <= 32 tokens, 6 M",
    "the engine against a loop with PEFT",
    "Flower's simulation / hetlora, a round: talk-6m",
    "update on the wire, int8",
    "server's part of a round",
)
"""How the names of the rows of speed begin that the README shows."""


def filled(page: str) -> str:
    """Return the text of a page with the tables as they are now."""
    text = (ROOT / page).read_text("utf8")
    return PLACE.sub(_table, text)


def _table(place: re.Match[str]) -> str:
    source, chosen = place[1], place[2]
    table = _speed(FEW if chosen else ("",)) if source == "benchmarks" else (ROOT / source).read_text("utf8")
    if chosen:
        table = _columns(table, [part.strip() for part in chosen.split(",")])
    return f"<!-- {source}{f': {chosen}' if chosen else ''} -->\n{table}<!-- end -->"


def _speed(begins: tuple[str, ...]) -> str:
    """Return the recorded rows of speed whose names begin so."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.table import markdown

    recorded = json.loads((ROOT / "benchmarks/results/latest.json").read_text("utf8"))
    return markdown([row for row in recorded if row["name"].startswith(begins)]) + "\n"


def _columns(text: str, wanted: list[str]) -> str:
    """Return a table with some of its columns, without title and notes."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    places = [lines[0].index(name) for name in wanted]
    return "".join(f"| {' | '.join(line[place] for place in places)} |\n" for line in lines)


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / name).write_text(filled(name), encoding="utf8")
