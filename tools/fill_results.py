"""Put the tables of the studies where pages name them: `python tools/fill_results.py` writes docs/results.md and README.md.

A table stands between `<!-- results/STUDY/TABLE.md -->` and `<!-- end -->`; what stands there is replaced by the file.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("docs/results.md", "README.md")
PLACE = re.compile(r"<!-- (results/[\w-]+/[\w-]+\.md) -->\n.*?<!-- end -->", flags=re.DOTALL)


def filled(page: str) -> str:
    """Return the text of a page with the tables as they are now."""
    text = (ROOT / page).read_text("utf8")
    return PLACE.sub(lambda place: f"<!-- {place[1]} -->\n{(ROOT / place[1]).read_text('utf8')}<!-- end -->", text)


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / name).write_text(filled(name), encoding="utf8")
