"""Build the wheel, check it, and take it through a newcomer's first minutes: `make release-check`.

An environment that builds and an empty one are made in build/. The empty one gets PyTorch and the wheel, without extras; in an empty folder,
offline, it then runs the demonstration, and a configuration that it wrote for rows of its own. What each step took is printed at the end.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "release"
DIST = ROOT / "build" / "dist"
PINS = ["--constraint", str(ROOT / "constraints.txt")] if sys.version_info[:2] == (3, 11) else []
TORCH = "torch==2.13.0"
OFFLINE = {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}


def main() -> None:
    """Do all of it; the first step that fails ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch-backend", help="as uv's, such as cpu; by default pip's own choice")
    backend = parser.parse_args().torch_backend
    for folder in (PLACE, DIST):
        shutil.rmtree(folder, ignore_errors=True)
    PLACE.mkdir(parents=True)
    steps = Steps()
    tools = _environment(PLACE / "tools")
    steps.do("the tools", [tools, "-m", "pip", "install", "--quiet", "build", "twine", "uv"])
    steps.do("build", [tools, "-m", "build", "--outdir", str(DIST), str(ROOT)])
    files = sorted(map(str, DIST.iterdir()))
    steps.do("twine check", [tools, "-m", "twine", "check", "--strict", *files])
    empty = _environment(PLACE / "empty")
    uv = [tools, "-m", "uv", "pip", "install", "--python", empty, "--torch-backend", str(backend), "--quiet"]
    pip = [empty, "-m", "pip", "install", "--quiet", *PINS]
    steps.do("PyTorch", [*(uv if backend else pip), TORCH], grown=PLACE / "empty")
    [wheel] = [file for file in files if file.endswith(".whl")]
    steps.do("the wheel and what it needs", [*pip, wheel], grown=PLACE / "empty")
    work = PLACE / "work"
    work.mkdir()
    _write_rows(work / "rows.csv")
    hetlora = str(Path(empty).parent / "hetlora")
    steps.do("hetlora demo", [hetlora, "demo"], cwd=work, grown=work)
    steps.do("hetlora new", [hetlora, "new", "mine.toml", "--data", "rows.csv"], cwd=work)
    steps.do("hetlora run", [hetlora, "run", "mine.toml", "--quiet"], cwd=work, grown=work)
    for made in ("runs/demo/report.html", "runs/demo/adapter", "runs/mine/adapter"):
        assert (work / made).exists(), f"{made} is missing"
    print("\n".join(["", *steps.lines, f"wheel: {Path(wheel).stat().st_size / 1e6:.1f} MB"]))
    if "OWNER" in (ROOT / "pyproject.toml").read_text("utf8"):
        print("project.urls still names OWNER: a release fills it in, see RELEASING.md")


class Steps:
    """Runs commands one after the other, and keeps what each took."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def do(self, name: str, command: Sequence[str], cwd: Path | None = None, grown: Path | None = None) -> None:
        """Run a command; a failure ends the program with its exit code."""
        print(f"== {name}", flush=True)
        before, began = _size(grown), time.monotonic()
        done = subprocess.run(command, cwd=cwd, env={**os.environ, **OFFLINE} if cwd else None, check=False)
        if done.returncode:
            sys.exit(done.returncode)
        size = f"{(_size(grown) - before) / 1e6:8.1f} MB" if grown else ""
        self.lines.append(f"{name:<28}{time.monotonic() - began:7.1f} s {size}".rstrip())


def _environment(folder: Path) -> str:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")


def _size(folder: Path | None) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*")) if folder else 0


def _write_rows(path: Path) -> None:
    """Write rows as a person might have them: three people who ask for sums."""
    with path.open("w", encoding="utf8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["user", "question", "answer"])
        for user in ("ana", "ben", "eve"):
            for one in range(30):
                table.writerow([user, f"what is {one} and {one + 2}?", f"it is {2 * one + 2}"])


if __name__ == "__main__":
    main()
