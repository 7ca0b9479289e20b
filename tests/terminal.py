"""A minimal terminal emulator: turns the bytes that a program writes into the lines that a person sees."""

from __future__ import annotations

import re

__all__ = ["Terminal"]

_PART = re.compile(r"\x1b\[(\??)([0-9;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


class Terminal:
    """As much of a terminal as live lines use; anything else is an error.

    Args:
        width: Characters a line; what is longer goes on in the next one, and what is drawn in place then leaves parts behind.

    Attributes:
        lines: What it shows and has shown, the lines scrolled away included.
        cursor_hidden: Whether it is now.
        erased: How often a line was erased.
    """

    def __init__(self, width: int) -> None:
        self.width, self.lines = width, [""]
        self.cursor_hidden, self.erased = False, 0
        self._row = self._column = 0

    def feed(self, text: str) -> None:
        """Take what a program has written."""
        place = 0
        while place < len(text):
            part = _PART.match(text, place)
            assert part is not None, f"not known here: {text[place : place + 20]!r}"
            place = part.end()
            if part[3]:
                self._obey(part[1], part[2], part[3])
            elif part[4] == "\n":
                self._down()
            elif part[4]:
                self._column = 0
            else:
                for sign in part[5]:
                    self._put(sign)

    def _put(self, sign: str) -> None:
        if self._column == self.width:
            self._down()
            self._column = 0
        line = self.lines[self._row].ljust(self._column)
        self.lines[self._row] = line[: self._column] + sign + line[self._column + 1 :]
        self._column += 1

    def _down(self) -> None:
        self._row += 1
        if self._row == len(self.lines):
            self.lines.append("")

    def _obey(self, private: str, number: str, command: str) -> None:
        if private and number == "25" and command in "lh":
            self.cursor_hidden = command == "l"
        elif command == "A":
            self._row -= int(number or 1)
            assert self._row >= 0, "above the first line"
        elif (number, command) == ("2", "K"):
            self.lines[self._row] = ""
            self.erased += 1
        else:
            assert command == "m", f"not known here: {private}{number}{command}"
