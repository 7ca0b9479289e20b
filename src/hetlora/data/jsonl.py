"""Records from a JSON Lines file, and from the bundled one."""

from __future__ import annotations

import gzip
import importlib.resources
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from hetlora.data.federation import ClientField, Federation, Source, Split, federate
from hetlora.data.templates import Fields, RowTemplate
from hetlora.errors import DataError

__all__ = ["STDLIB", "jsonl_source", "read_jsonl"]

STDLIB = "stdlib"
"""Name of the bundled federated data set; see its README in `hetlora/data/bundled/stdlib`."""


def read_jsonl(path: str, *, client: str, template: RowTemplate, split: Split) -> Federation:
    """Read a federation from a JSON Lines file (``.gz`` allowed), or the bundled one by the name ``"stdlib"``.

    Args:
        path: The file.
        client: Name of the field that says whose row it is.
        template: How a row's fields become prompt and target.
        split: Which rows are held out.

    Raises:
        DataError: The file is missing, or a line is not JSON or lacks a field; names the line.
    """
    return federate(jsonl_source(path), owner=ClientField(client), template=template, split=split)


def jsonl_source(path: str) -> Source:
    """Return the records of a JSON Lines file (``.gz`` allowed), or of the bundled one; read when they are asked for.

    Raises:
        DataError: The file is missing; while reading, that a line is not a JSON object.
    """
    file = _bundled() if path == STDLIB else Path(os.path.expanduser(path))  # noqa: PTH111  never raises
    if not file.is_file():
        raise DataError(
            f"the data file {path!r} does not exist; give a JSON Lines file, a data set's folder, its name on the Hugging "
            f"Face hub (owner/name), or {STDLIB!r} for the bundled one"
        )
    return Source(path, _lines(path, file))


def _lines(path: str, file: Path) -> Iterator[tuple[str, Fields]]:
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _object(line, where)
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        way_out = "give a JSON Lines file in UTF-8, packed by gzip if its name ends in .gz, or the folder that a data set is in"
        raise DataError(f"{path} cannot be read as text ({error}); {way_out}") from error


def _object(line: str, where: str) -> Fields:
    try:
        fields = json.loads(line)
    except RecursionError as error:
        raise DataError(
            f"{where}: its lists and objects are nested too deeply; every line must be one flat JSON object"
        ) from error
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise DataError(f"{where}: not JSON ({reason}); every line must be one JSON object") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: a {type(fields).__name__}, not an object; every line must be one JSON object")
    return fields


def _bundled() -> Path:
    # The package is installed as files (it holds a model, too), so the resource is a path.
    return Path(str(importlib.resources.files("hetlora"))) / "data" / "bundled" / STDLIB / "rows.jsonl.gz"
