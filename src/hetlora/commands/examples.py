"""The example configurations that come with the package: `hetlora examples` and `hetlora demo`."""

from __future__ import annotations

import importlib.resources
import itertools
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from hetlora.errors import HetLoraError

__all__ = ["copy_examples", "example", "example_names", "first_sentence"]


def example_names() -> list[str]:
    """Return the names of the examples, "demo" first."""
    names = sorted(path.stem for path in _folder().glob("*.toml"))
    return sorted(names, key=lambda name: name != "demo")


def example(name: str) -> Path:
    """Return the file of an example.

    Raises:
        HetLoraError: There is none of this name; lists the names.
    """
    file = _folder() / f"{name.removesuffix('.toml')}.toml"
    if not file.is_file():
        raise HetLoraError(f"there is no example {name!r}; there are {', '.join(example_names())}")
    return file


def first_sentence(name: str) -> str:
    """Return what an example is, the first sentence of its file."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), example(name).read_text("utf8").splitlines())
    return re.split(r"(?<=\.) ", " ".join(line.lstrip("# ") for line in lines))[0]


def copy_examples(names: Sequence[str], folder: Path) -> list[Path]:
    """Copy examples into a folder, which is made if needed, and return the new files.

    Raises:
        HetLoraError: There is no such example, or a file of the name exists; nothing is copied then.
    """
    files = [example(name) for name in names]
    for file in files:
        if (folder / file.name).exists():
            raise HetLoraError(f"{str(folder / file.name)!r} exists already; give another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(file, folder / file.name)) for file in files]


def _folder() -> Path:
    # A wheel holds the examples beside the bundled data; a checkout holds them beside src.
    package = Path(str(importlib.resources.files("hetlora")))
    bundled = package / "data" / "bundled" / "examples"
    return bundled if bundled.is_dir() else package.parents[1] / "examples"
