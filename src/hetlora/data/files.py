"""Records from files as they stand in them: JSON Lines, a JSON array, CSV, TSV or Parquet, packed or not."""

from __future__ import annotations

import csv
import datetime as dt
import decimal
import gzip
import importlib.resources
import io
import itertools
import json
import math
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

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
        # Not which one: over Flower the reason goes to the server.
        looked = "" if file.is_absolute() else " in the working directory"
        raise DataError(
            f"the data file {path!r} does not exist{looked}; give a file of JSON Lines, a JSON array, CSV, TSV or Parquet, a "
            f"data set's folder, its name on the Hugging Face hub (owner/name), or {STDLIB!r} for the bundled one"
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
            yield from _cells(path, text, DELIMITERS[kind]) if kind in DELIMITERS else _json(path, text, _unknown(file))
    except UnicodeDecodeError as error:
        raise DataError(f"{_undecoded(path, file, error)}; save it as UTF-8{_unknown(file)}") from error
    except (EOFError, OSError, zlib.error) as error:
        way_out = "give text in UTF-8, packed as its name says (.gz, .zst), or the folder that a data set is in"
        raise DataError(f"{path} cannot be read as text ({error}); {way_out}") from error


def _unknown(file: Path) -> str:
    """Return what to know of a file whose name says no form: it may be a spreadsheet or a text."""
    return "" if format_of(file) else f". Its name ends in none of {', '.join(FORMATS)}, so it is read as JSON"


def _undecoded(path: str, file: Path, error: UnicodeDecodeError) -> str:
    """Return where a file is not UTF-8: the line, where its bytes are lines."""
    if file.suffix.lower() != ".zst":
        with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    line.decode()
                except UnicodeDecodeError as found:
                    return f"{path}, line {number}: the byte 0x{line[found.start]:02x} is not UTF-8 (Latin-1 or UTF-16 perhaps)"
    return f"{path} is not UTF-8 ({error.reason})"


def plain(value: object) -> object:
    """Return a value of a column with dates, times and decimal numbers as text, nested ones, too."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, (dt.date, dt.time, dt.timedelta, decimal.Decimal)) else value


class _Written(float):
    """A number of a JSON file that is written as it stands there: 1.10 is not 1.1."""

    def __new__(cls, text: str) -> _Written:
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text if math.isfinite(self) else super().__repr__()


def _short(value: Any) -> object:
    """Return a number of 32 bits as the shortest text that means it: 0.1, and not 0.10000000149011612."""
    return value if value is None else _Written(str(np.float32(value)))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice in an object")
    return found


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


def _json(path: str, text: IO[str], unknown: str = "") -> Iterator[tuple[str, Fields]]:
    first = True
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        was_first, first = first, False
        if was_first and line.lstrip().startswith("["):
            yield from _array(path, line + text.read())
            return
        if was_first:
            _refuse_wrapped(path, line, text)
        where = f"{path}, line {number}"
        yield where, _object(_parsed(line, where, f"every line must be one JSON object{unknown}"), where)


def _refuse_wrapped(path: str, line: str, text: IO[str]) -> None:
    """Refuse a file that is one object around its rows, such as `{"data": [...]}`."""
    whole = line + text.read() if line.strip() in ("{", "{\r") else line
    try:
        found = json.loads(whole)
    except (ValueError, RecursionError):
        return  # the line's own error says what it is
    lists = {name: value for name, value in found.items() if _are_rows(value)} if isinstance(found, dict) else {}
    if whole is not line or (lists and len(found) == 1):
        rows = f", with rows in {', '.join(map(repr, lists))}" if lists else ""
        raise DataError(
            f"{path}: the file is one JSON object{rows}; save the rows by themselves, as one JSON array or one object a line"
        )


TURN = {"role", "from", "speaker"}
"""Keys of which a turn of a conversation has one."""


def _are_rows(value: object) -> bool:
    """Whether a value is a list of objects that are not the turns of a conversation."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and not item.keys() & TURN for item in value)
    )


def _array(path: str, text: str) -> Iterator[tuple[str, Fields]]:
    for number, item in enumerate(_parsed(text, path, "the file must be one JSON array of objects"), start=1):
        where = f"{path}, item {number}"
        yield where, _object(item, where)


def _parsed(text: str, where: str, wanted: str) -> Any:
    try:
        return json.loads(text, parse_float=_Written, object_pairs_hook=_unique)
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
    begin = list(_until_some(text))
    head = re.sub(r'"[^"]*"', "", begin[-1]) if begin else ""
    if delimiter == "," and "," not in head and ";" in head:
        delimiter = ";"  # as spreadsheets write where the comma is in numbers
    rows = csv.reader(itertools.chain(begin, text), delimiter=delimiter, strict=True)
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        names = next((cells for cells in rows if any(cells)), [])
        _check_names(path, [name for name in names if name])
        for cells in rows:
            where = f"{path}, line {rows.line_num}"
            nameless = [cell for name, cell in zip(names, cells, strict=False) if not name and cell]
            if cells and (len(cells) != len(names) or nameless):
                raise DataError(
                    f"{where}: {len(cells)} cells under {len(names)} columns, {len(list(filter(None, names)))} of them with a "
                    "name; mend the row, or its quotes"
                )
            if cells:  # a spreadsheet may leave empty columns without a name
                yield where, {name: cell for name, cell in zip(names, cells, strict=True) if name}
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: {error}; mend its quotes") from error
    finally:
        csv.field_size_limit(before)


def _until_some(text: IO[str]) -> Iterator[str]:
    """Yield lines up to the first one that is not blank."""
    for line in text:
        yield line
        if line.strip():
            return


def _check_names(path: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{path}: two columns are called {name!r}; rename one")


def _parquet(path: str, file: Path, columns: Collection[str] | None) -> Iterator[tuple[str, Fields]]:
    _pyarrow(path)
    from pyarrow import lib, parquet

    try:
        with parquet.ParquetFile(file) as table:
            known = table.schema_arrow.names
            _check_names(path, known)
            # Where a field is missing, all are read, for the message that lists them; `split` and `file` may be of a folder.
            missing = columns is None or set(columns) - {"split", "file"} - set(known)
            chosen = known if missing else sorted(set(columns or ()) & set(known))
            narrow = {field.name for field in table.schema_arrow if str(field.type) in ("float", "halffloat")}
            number = 0
            for batch in table.iter_batches(batch_size=1000, columns=chosen):
                for record in batch.to_pylist():
                    number += 1
                    fields = {name: plain(value) for name, value in record.items()}
                    fields |= {name: _short(fields[name]) for name in narrow & fields.keys()}
                    yield f"{path}, row {number}", fields
    except (lib.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({' '.join(str(error).split())[:300]}); write the file anew"
        ) from error


def _bundled() -> Path:
    # The package is installed as files (it holds a model, too), so the resource is a path.
    return Path(str(importlib.resources.files("hetlora"))) / "data" / "bundled" / STDLIB / "rows.jsonl.gz"
