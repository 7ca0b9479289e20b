"""The errors hetlora raises on purpose, and what every room needs: printable text, and paths below the home folder.

Each error names the value, the place and the way out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "HetLoraError",
    "ModelError",
    "RefusedUpdateError",
    "ShapeError",
    "WireError",
    "expand_path",
    "printable",
]


_SECRET = re.compile(r"//[^/\s@'\"]+@")
"""A user's name, or name and password, in an address."""


class HetLoraError(Exception):
    r"""Base of every error hetlora raises on purpose; the command line prints it and exits with code 2.

    Its text may quote a file, a name or another library: what a terminal would obey is escaped, and a password that stands in
    an address is taken out, wherever the text goes.

    Example:
        >>> print(HetLoraError("https://ana:secret@host/rows does not exist\x1b[2J"))
        https://***@host/rows does not exist\x1b[2J
    """

    def __str__(self) -> str:
        text = _SECRET.sub("//***@", super().__str__())
        return "\n".join(map(printable, text.split("\n")))


class ConfigError(HetLoraError):
    """A configuration that cannot be run; carries every problem found, not only the first.

    Example:
        >>> print(ConfigError("demo.toml", ["federation.rounds: 0 is not allowed; use 1 or more"]))
        demo.toml has 1 problem:
          federation.rounds: 0 is not allowed; use 1 or more
    """

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
        # A problem is one line, whatever the key or the value that it quotes holds.
        super().__init__(f"{source} has {count}:\n" + "\n".join(f"  {printable(problem)}" for problem in problems))


class CheckpointError(HetLoraError):
    """A checkpoint that is damaged, of another version of the format, or cannot be written."""


class DataError(HetLoraError):
    """A data file that is missing, or a row that cannot be used."""


class ModelError(HetLoraError):
    """A base model that cannot be loaded or adapted."""


class ShapeError(HetLoraError, ValueError):
    """Tensors whose shapes, names or ranks do not fit together."""


class RefusedUpdateError(HetLoraError):
    """A client's update that the sum must not see; costs the round that client and nothing else."""


class WireError(RefusedUpdateError):
    """Bytes that are no message of hetlora's, or a value that its wire format does not carry."""


def printable(text: str) -> str:
    r"""Return `text` with signs that are not printable as escapes, which no terminal obeys and every file holds.

    Example:
        >>> print(printable("layer\x1b[2J \ud800 größer"))
        layer\x1b[2J \ud800 größer
    """
    return text if text.isprintable() else "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def expand_path(path: os.PathLike[str] | str, *, strict: bool = False) -> Path:
    """Return a path in which ``~`` is the user's home, as a shell would have made it.

    Args:
        path: The path.
        strict: Whether the ``~name`` of an unknown user is an error, or stays as it is.

    Raises:
        RuntimeError: The user is unknown, and `strict` is set.

    Example:
        >>> expand_path("~/runs/demo") == Path.home() / "runs/demo"
        True
    """
    return Path(path).expanduser() if strict else Path(os.path.expanduser(path))  # noqa: PTH111  it never raises
