"""A template of a Flower App: the run's file and Flower's pyproject.toml."""

from __future__ import annotations

import importlib.resources
import re
import shlex
from pathlib import Path

from hetlora.errors import HetLoraError

__all__ = ["new_app", "next_steps"]

FILES = {"pyproject.toml": "pyproject.toml", "run.toml": "run.toml", "gitignore": ".gitignore"}
"""The template's files, and what they are called in the app: a file called .gitignore would be in no wheel."""


def new_app(folder: Path) -> list[Path]:
    """Write a Flower App into a folder and return its files.

    Args:
        folder: Created if necessary; existing files are not replaced.

    Raises:
        HetLoraError: One of the files exists, or the folder cannot be written.
    """
    template = importlib.resources.files("hetlora.flower") / "template"
    name = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-") or "federation"
    paths = [folder / file for file in FILES.values()]
    if there := [str(path) for path in paths if path.exists()]:
        raise HetLoraError(f"{', '.join(there)}: there already; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, path in zip(FILES, paths, strict=True):
            path.write_text((template / file).read_text("utf8").replace('"NAME"', f'"{name}"'), encoding="utf8")
    except OSError as error:
        raise HetLoraError(f"cannot write {str(folder)!r}: {error.strerror}; give a folder you may write") from error
    return paths


def next_steps(folder: Path) -> str:
    """Return what to do with a new app, command by command."""
    app = shlex.quote(str(folder))
    return (
        "next, in Flower's simulation, three clients on the bundled rows:\n"
        f"  flwr run {app} local --stream --federation-config 'num-supernodes=3 client-resources-num-cpus=1'\n"
        "  (it exits with 0 also where the run failed: read the end of its log)\n"
        "then a rehearsal with real processes, TLS and keys on this machine:\n"
        f"  hetlora flower local {app}\n"
        "then change run.toml, and deploy it: docs/deploy.md has every step"
    )
