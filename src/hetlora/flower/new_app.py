"""A template of a Flower App: the run's file and Flower's pyproject.toml."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path

from hetlora.errors import HetLoraError

__all__ = ["new_app"]

FILES = ("pyproject.toml", "run.toml")


def new_app(folder: Path) -> list[Path]:
    """Write a Flower App into a folder and return its files.

    Args:
        folder: Created if necessary; existing files are not replaced.

    Raises:
        HetLoraError: One of the files exists, or the folder cannot be written.
    """
    template = importlib.resources.files("hetlora.flower") / "template"
    name = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-") or "federation"
    paths = [folder / file for file in FILES]
    if there := [str(path) for path in paths if path.exists()]:
        raise HetLoraError(f"{', '.join(there)}: there already; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            path.write_text((template / path.name).read_text("utf8").replace('"NAME"', f'"{name}"'), encoding="utf8")
    except OSError as error:
        raise HetLoraError(f"cannot write {str(folder)!r}: {error.strerror}; give a folder you may write") from error
    return paths
