"""Record what a person sees of `hetlora demo`: `python tools/record_terminal.py` writes docs/static/terminal.svg.

The command runs in a terminal of its own, 120 columns wide; what its live lines have written over is not shown. Only on Linux and macOS.
"""

from __future__ import annotations

import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
COMMAND, COLUMNS, ROWS = ["hetlora", "demo"], 120, 50
LEFT_OUT = re.compile(r"round [2-7] ")
"""Lines that say no more than those beside them."""


def main() -> None:
    """Run the command, and write its picture."""
    with tempfile.TemporaryDirectory() as folder:
        lines = shown(recorded(folder))
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(f"[bold]$[/bold] {' '.join(COMMAND)}", highlight=False)
    gap = False
    for line in lines:
        text = Text.from_ansi(line)
        left_out = LEFT_OUT.match(text.plain) is not None
        if not left_out:
            console.print(text)
        elif not gap:
            console.print("...", highlight=False)
        gap = left_out
    console.save_svg(str(ROOT / "docs/static/terminal.svg"), title="hetlora")


def recorded(folder: str) -> str:
    """Run the command in a terminal; return all that it wrote there."""
    terminal, inner = pty.openpty()
    ioctl(inner, TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "HF_HUB_OFFLINE": "1"}
    command = [str(Path(sys.executable).parent / COMMAND[0]), *COMMAND[1:]]
    child = subprocess.Popen(command, cwd=folder, env=environment, stdin=inner, stdout=inner, stderr=inner)
    os.close(inner)
    written = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # it has ended
            break
        if not part:
            break
        written += part
    if child.wait():
        sys.exit(written.decode("utf8"))
    return written.decode("utf8")


def shown(written: str) -> list[str]:
    r"""Return the lines that stay: those that were written over or erased are gone.

    Example:
        >>> shown("kept\r\nbar 1\r\nmore\x1b[2K\x1b[1A\x1b[2K\rlast\r\n")
        ['kept', 'last']
    """
    lines, row, anew = [""], 0, False
    for part in re.split(r"(\x1b\[\d*[AK]|\r\n|\r|\x1b\[\?\d+[hl])", written):
        if part == "\r\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            anew = True
        elif part.startswith("\x1b[") and part.endswith("A"):
            row -= int(part[2:-1] or 1)
        elif part.startswith("\x1b[") and part.endswith("K"):
            lines[row] = ""
        elif part and not part.startswith("\x1b[?"):
            lines[row], anew = part if anew else lines[row] + part, False
    while lines and not lines[-1]:
        lines.pop()
    return lines


if __name__ == "__main__":
    main()
