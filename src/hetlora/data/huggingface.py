"""Records from a Hugging Face data set: a folder, or a name on the hub. No code that comes with the data is run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetlora.data.federation import Source
from hetlora.data.fields import Fields
from hetlora.data.files import FORMATS, PACKED, format_of, plain, read_records
from hetlora.errors import DataError, expand_path

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

__all__ = ["dataset_source", "is_dataset"]

METADATA = ("dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "metadata.json", "package.json")
"""JSON files that are no rows."""

SPLIT = "split"
"""The virtual field that names a record's split, where the records have no such field."""

FILE = "file"
"""The virtual field that is the name of a record's file without its ending, in a folder with a file per client."""


def is_dataset(path: str) -> bool:
    """Return whether a path names a data set: a folder, or an owner/name that is neither a file nor looks like one.

    Example:
        >>> is_dataset("databricks/databricks-dolly-15k"), is_dataset("data/rows.jsonl"), is_dataset("stdlib")
        (True, False, False)
    """
    place = expand_path(path)
    if place.exists():
        return place.is_dir()
    looks_like_a_file = place.suffix in (*FORMATS, *PACKED, ".txt")
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path)) and not looks_like_a_file


def dataset_source(
    path: str, *, subset: str | None = None, revision: str | None = None, fields: Collection[str] = ()
) -> Source:
    """Return the records of a data set, split after split; each has the virtual field `split` unless it has one.

    Args:
        path: A folder of files (`hetlora.data.files.FORMATS`), a folder saved by ``save_to_disk``, or a name on the hub.
        subset: The configuration, of data sets that have several.
        revision: Branch, tag or commit on the hub.
        fields: The fields that will be used; where a split has them all, the others are not decoded.

    Raises:
        DataError: The data set is not there, cannot be read, or needs a subset; says which there are.
    """
    is_folder = expand_path(path).is_dir()
    if is_folder and revision is not None:
        raise DataError(f"data.revision = {revision!r}: {path!r} is a folder and has no revisions; take the key away")
    if is_folder and not _is_saved(expand_path(path)) and (source := _folder_source(path, subset, set(fields))):
        return source
    splits = _load(path, subset, revision, is_folder=is_folder)
    return Source(path, _records(path, splits, set(fields)), none_is_empty=True)


def _load(path: str, subset: str | None, revision: str | None, *, is_folder: bool) -> Mapping[str, Dataset]:
    datasets = _library(path)
    place = str(expand_path(path)) if is_folder else path
    saved = is_folder and _is_saved(Path(place))
    if saved and subset is not None:
        raise DataError(
            f"data.subset = {subset!r}: {path!r} was saved by save_to_disk and has no subsets; take the key away"
        )
    with _explained(path, is_folder=is_folder):
        if saved:
            found: Any = datasets.load_from_disk(place)
        else:
            cache = _cache(Path(place), datasets.config.HF_DATASETS_CACHE) if is_folder else None
            # Cells of CSV stay text; what a date in JSON becomes is refused later, since it is text no more.
            builder = datasets.load_dataset_builder(place, name=subset, revision=revision, cache_dir=cache)
            found = datasets.load_dataset(place, name=subset, revision=revision, cache_dir=cache)
            if _is_csv(builder):
                names = next(iter(found.values())).column_names
                text = datasets.Features({name: datasets.Value("string") for name in names})
                options = {"features": text, "keep_default_na": False}
                found = datasets.load_dataset(place, name=subset, revision=revision, cache_dir=cache, **options)
    return found if isinstance(found, Mapping) else {str(found.split or ""): found}


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _is_csv(builder: DatasetBuilder) -> bool:
    from datasets.packaged_modules.csv.csv import Csv

    return isinstance(builder, Csv)


def _library(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data.path = {path!r} is a Hugging Face data set, and the datasets library that reads it is not installed; "
            "pip install 'hetlora[data]'"
        ) from error
    datasets.disable_progress_bars()  # a bar of its own would break ours
    return datasets


@contextlib.contextmanager
def _explained(path: str, *, is_folder: bool) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # the library lets errors of the network, of Arrow and of parsers through
        raise DataError(
            f"the data set {path!r} cannot be loaded: {_reason(error)}; {_way_out(error, is_folder)}"
        ) from error


def _folder_source(path: str, subset: str | None, needed: set[str]) -> Source | None:
    """Return the records of a folder's files, split after split; None where there are files of other forms than ours.

    The library says which file belongs to which subset and split, and its own readers, which convert what they read, are not
    used.
    """
    datasets, folder = _library(path), expand_path(path)
    with _explained(path, is_folder=True):
        builder = datasets.load_dataset_builder(str(folder), name=subset)
        _refuse_others(folder, builder)
        splits = {
            str(name): [Path(str(file)) for file in files] for name, files in (builder.config.data_files or {}).items()
        }
    files = [file for own in splits.values() for file in own]
    if not all(map(format_of, files)):
        return None
    if builder.config.name == "default":
        _refuse_left_out(path, folder, files)
    if FILE in needed:
        _check_stems(path, splits)
    columnar = all(format_of(file) == ".parquet" for file in files)
    return Source(path, _of_files(path, folder, splits, needed), none_is_empty=columnar)


def _refuse_left_out(path: str, folder: Path, files: Sequence[Path]) -> None:
    read = {file.resolve() for file in files}
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith((".", "_")) for part in file.relative_to(folder).parts) or file.name in METADATA
        if file.is_file() and format_of(file) and not hidden and file.resolve() not in read:
            same = format_of(file) in map(format_of, files)
            reason = "its name says no split, and those of others do" if same else "others are of another form"
            raise DataError(
                f"{path}: {file.name} would be left out, since {reason}; rename it, take it out, or give one file by its path"
            )


def _stem(file: Path) -> str:
    return (file.with_suffix("") if file.suffix.lower() in PACKED else file).stem


def _check_stems(path: str, splits: Mapping[str, Sequence[Path]]) -> None:
    """Refuse two files of one name in one split, which would be one client."""
    for files in splits.values():
        for stem, count in Counter(map(_stem, files)).items():
            if count > 1:
                places = [str(file) for file in files if _stem(file) == stem]
                raise DataError(
                    f"{path}: {count} files are called {stem!r}, so {FILE!r} would make one client of them: "
                    f"{', '.join(places[:3])}; rename them, or set data.client_field to a field of the rows"
                )


def _of_files(
    path: str, folder: Path, splits: Mapping[str, Sequence[Path]], needed: set[str]
) -> Iterator[tuple[str, Fields]]:
    named = not needed or FILE in needed
    own: bool | None = None  # whether the rows have the field themselves: all of them, or none
    for split, files in splits.items():
        for file in files:
            name = f"{path}, {os.path.relpath(file, folder)}"
            virtual = {SPLIT: split, FILE: _stem(file)} if named else {SPLIT: split}
            for where, fields in read_records(name, file, needed or None):
                own = FILE in fields if own is None else own
                if FILE in needed and own != (FILE in fields):
                    state = "has no" if own else "has a"
                    raise DataError(
                        f"{where}: the row {state} field {FILE!r}, unlike those before it, and {FILE!r} is the name of a row's "
                        "file where no row has it; mend the rows, or rename the field"
                    )
                yield where, {**virtual, **fields}


def _refuse_others(folder: Path, builder: DatasetBuilder) -> None:
    """Refuse a folder whose README.md names files beyond it: whoever made it would choose what is read of this machine.

    Raises:
        DataError: Names the file.
    """
    # As a file is named, not where a link leads: links that are in the folder are its owner's.
    roots = {os.path.abspath(folder), os.path.realpath(folder)}  # noqa: PTH100  Path keeps the ..
    for files in (builder.config.data_files or {}).values():
        for file in map(str, files):
            place = os.path.normpath(os.path.join(os.path.abspath(folder), file))  # noqa: PTH100, PTH118
            if "://" in file or not any(os.path.commonpath([root, place]) == root for root in roots):
                raise DataError(
                    f"the data set {str(folder)!r} names a file beyond its folder, {file!r}; take it out of its README.md"
                )


def _cache(folder: Path, caches: str | Path) -> str:
    """Return a cache for what a folder holds now: the library's own knows a file by its time, which a copy may keep."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode(errors="surrogateescape"))
        with file.open("rb") as content:
            while part := content.read(1 << 20):
                digest.update(part)
    return str(Path(caches) / f"hetlora-{digest.hexdigest()[:32]}")


def _reason(error: BaseException) -> str:
    """Return the beginning of an error on one line, and of the one that caused it where the library wraps it."""
    texts = [" ".join(str(part).split())[:300] for part in (error, error.__cause__) if part is not None]
    return ": ".join(text for text in texts if text) or type(error).__name__


def _way_out(error: Exception, is_folder: bool) -> str:
    if "onfig" in str(error) and isinstance(error, ValueError):
        return "set data.subset to one of them"
    if is_folder:
        return "give a folder with parquet, JSON Lines or CSV files of the same columns, or one saved by save_to_disk"
    if isinstance(error, ConnectionError) or "offline" in str(error).lower():
        return (
            "it is no folder here, and the hub cannot be reached; unset HF_HUB_OFFLINE or go online, or download it "
            "elsewhere, save it with save_to_disk, and give that folder"
        )
    return "check the name, data.revision and (for a gated data set) your login with `hf auth login`"


def _records(path: str, splits: Mapping[str, Dataset], needed: set[str]) -> Iterator[tuple[str, Fields]]:
    for name, dataset in splits.items():
        virtual = {SPLIT: name} if name else {}  # the row's own field goes before it, below
        own = needed & set(dataset.column_names)
        missing = needed - own - set(virtual)
        # Of fields that are not used only the names are given, for the message that says which there are.
        unused: Fields = dict.fromkeys(dataset.column_names) if missing else {}
        where = f"{path}, split {name}" if name else path
        for number, fields in enumerate(_decoded(where, dataset, own if needed else set(dataset.column_names))):
            yield f"{where}, row {number}", {**virtual, **unused, **fields}


def _decoded(where: str, dataset: Dataset, columns: Collection[str]) -> Iterator[Fields]:
    if not columns:
        yield from ({} for _ in range(len(dataset)))
        return
    batches = dataset.select_columns(sorted(columns)).with_format(None).iter(batch_size=1000)
    # The library makes dates of text in JSON: of which text nobody knows, so they are refused as what they are.
    kept = (lambda value: value) if dataset.info.builder_name == "json" else plain
    try:
        for batch in batches:
            yield from (
                dict(zip(batch, map(kept, values), strict=True)) for values in zip(*batch.values(), strict=True)
            )
    except Exception as error:  # of whatever library decodes the column
        raise DataError(
            f"{where}: a value of {', '.join(sorted(columns))} cannot be decoded ({_reason(error)}); mend the data set, or "
            "set the keys of [data] to fields of text"
        ) from error
