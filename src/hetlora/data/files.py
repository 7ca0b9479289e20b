"""Records from files as they stand in them: JSON Lines, a JSON array, CSV, TSV or Parquet, packed or not."""

from __future__ import annotations

import csv
import datetime as dt
import decimal
import gzip
import importlib.resources
import io
import json
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

from hetlora.data.federation import ClientField, Federation, Source, Split, federate
from hetlora.data.fields import Fields
from hetlora.data.templates import RowTemplate
from hetlora.errors import DataError, expand_path

__all__ = ["FORMATS", "STDLIB", "file_source", "format_of", "plain", "read_jsonl", "read_records"]

STDLIB = "stdlib"
"""Name of the bundled federated data set; see its README in `hetlora/data/bundled/stdlib`."""

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PACKED = (".gz", ".zst")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
LONGEST_CELL = 2**31 - 1
"""Characters of one cell of a CSV file; the csv module's own bound is 131,072."""


def read_jsonl(path: str, *, client: str, template: RowTemplate, split: Split) -> Federation:
    """Read a federation from a file, or the bundled one by the name ``"stdlib"``.

    Args:
        path: The file; see `file_source`.
        client: Name of the field that says whose row it is.
        template: How a row's fields become prompt and target.
        split: Which rows are held out.

    Raises:
        DataError: The file is missing or cannot be read, or a row lacks a field; names the row.
    """
    return federate(file_source(path), owner=ClientField(client), template=template, split=split)


def file_source(path: str) -> Source:
    """Return the records of a file, or of the bundled one; they are read when they are asked for.

    The name says what the file is: ``.csv``, ``.tsv`` and ``.parquet``; all else is JSON, one object a line or one array. Text
    may be packed (``.gz``, ``.zst``). Nothing is converted: a cell of a CSV file is its characters, and a date in JSON is text.

    Raises:
        DataError: The file is missing; while reading, that a record is none.
    """
    file = _bundled() if path == STDLIB else expand_path(path)
    if not file.is_file():
        raise DataError(
            f"the data file {path!r} does not exist; give a file of JSON Lines, a JSON array, CSV, TSV or Parquet, a data "
            f"set's folder, its name on the Hugging Face hub (owner/name), or {STDLIB!r} for the bundled one"
        )
    return Source(path, read_records(path, file), none_is_empty=format_of(file) == ".parquet")


def format_of(file: Path) -> str:
    """Return what a file's name says that it holds, one of `FORMATS`, or "" where it says nothing.

    Example:
        >>> format_of(Path("rows.CSV.gz")), format_of(Path("notes.txt"))
        ('.csv', '')
    """
    name = file.with_suffix("") if file.suffix.lower() in PACKED else file
    return name.suffix.lower() if name.suffix.lower() in FORMATS else ""


def read_records(path: str, file: Path, columns: Collection[str] | None = None) -> Iterator[tuple[str, Fields]]:
    """Yield the place and the fields of every record of a file.

    Args:
        path: What messages call the file.
        file: The file.
        columns: Of a Parquet file, the columns that are read; None for all.

    Raises:
        DataError: A record cannot be read; names its place.
    """
    kind = format_of(file)
    if kind == ".parquet":
        yield from _parquet(path, file, columns)
        return
    try:
        with _text(path, file) as text:
            yield from _cells(path, text, DELIMITERS[kind]) if kind in DELIMITERS else _json(path, text)
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        way_out = "give text in UTF-8, packed as its name says (.gz, .zst), or the folder that a data set is in"
        raise DataError(f"{path} cannot be read as text ({error}); {way_out}") from error


def plain(value: object) -> object:
    """Return a value of a column as text where it is a date, a time or a decimal number."""
    return str(value) if isinstance(value, (dt.date, dt.time, decimal.Decimal)) else value


def _text(path: str, file: Path) -> IO[str]:
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    if file.suffix.lower() == ".zst":
        arrow = _pyarrow(path)
        return io.TextIOWrapper(arrow.CompressedInputStream(str(file), "zstd"), encoding="utf-8-sig", newline="")
    return file.open(encoding="utf-8-sig", newline="")


def _pyarrow(path: str) -> Any:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise DataError(
            f"{path!r} is read by the pyarrow library, which is not installed; pip install 'hetlora[data]'"
        ) from error
    return pa


def _json(path: str, text: IO[str]) -> Iterator[tuple[str, Fields]]:
    first = True
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        was_first, first = first, False
        if was_first and line.lstrip().startswith("["):
            yield from _array(path, line + text.read())
            return
        where = f"{path}, line {number}"
        yield where, _object(_parsed(line, where, "every line must be one JSON object"), where)


def _array(path: str, text: str) -> Iterator[tuple[str, Fields]]:
    for number, item in enumerate(_parsed(text, path, "the file must be one JSON array of objects"), start=1):
        where = f"{path}, item {number}"
        yield where, _object(item, where)


def _parsed(text: str, where: str, wanted: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError(f"{where}: its lists and objects are nested too deeply; {wanted}") from error
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise DataError(f"{where}: not JSON ({reason}); {wanted}") from error


def _object(value: object, where: str) -> Fields:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a {type(value).__name__}, not an object; every row must be one JSON object")
    return value


def _cells(path: str, text: IO[str], delimiter: str) -> Iterator[tuple[str, Fields]]:
    before = csv.field_size_limit(LONGEST_CELL)
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        names = next(rows, [])
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise DataError(f"{path}, line 1: two columns are called {double[0]!r}; rename one")
        for cells in rows:
            where = f"{path}, line {rows.line_num}"
            if cells and len(cells) != len(names):
                raise DataError(
                    f"{where}: {len(cells)} cells under {len(names)} column names; mend the row, or its quotes"
                )
            if cells:
                yield where, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: {error}; mend its quotes") from error
    finally:
        csv.field_size_limit(before)


def _parquet(path: str, file: Path, columns: Collection[str] | None) -> Iterator[tuple[str, Fields]]:
    _pyarrow(path)
    from pyarrow import lib, parquet

    try:
        with parquet.ParquetFile(file) as table:
            known = table.schema_arrow.names
            chosen = known if columns is None or not set(columns) <= set(known) else sorted(columns)
            number = 0
            for batch in table.iter_batches(batch_size=1000, columns=chosen):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", {name: plain(value) for name, value in record.items()}
    except (lib.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({' '.join(str(error).split())[:300]}); write the file anew"
        ) from error


def _bundled() -> Path:
    # The package is installed as files (it holds a model, too), so the resource is a path.
    return Path(str(importlib.resources.files("hetlora"))) / "data" / "bundled" / STDLIB / "rows.jsonl.gz"
