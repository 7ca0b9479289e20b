"""A run's folder: atomic files, a lock for one process at a time, and the summary of a complete run."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from hetlora.errors import HetLoraError

__all__ = [
    "SUMMARY",
    "atomic_write",
    "atomic_write_text",
    "folder_lock",
    "make_folder",
    "read_summary",
    "resume_command",
    "run_lock",
    "sync",
    "write_summary",
]

SUMMARY = "summary.json"
"""Written last: a run with this file is complete."""


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Replace a file as a whole, synced to disk, or not at all.

    The content goes to ``NAME.part`` first, which only a killed process leaves behind.

    Raises:
        OSError: It cannot be written; the former file is still there.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    _sync_names(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file as `atomic_write` does. Lone surrogates become escapes, which JSON reads back.

    Raises:
        OSError: As `atomic_write`.
    """
    with atomic_write(path) as file:
        file.write(text.encode("utf8", "backslashreplace"))


def make_folder(folder: Path, *, exist_ok: bool = False) -> None:
    """Make a folder and its parents, and fsync the parents, so that the new entries survive a power failure.

    Raises:
        OSError: It cannot be made, or exists without `exist_ok`.
    """
    if exist_ok and folder.is_dir():
        return
    make_folder(folder.parent, exist_ok=True)
    folder.mkdir(exist_ok=exist_ok)
    with contextlib.suppress(PermissionError):  # the parent may be writable and not readable
        _sync_names(folder.parent)


def sync(path: Path) -> None:
    """Sync a file, or a folder with its content, to disk.

    Raises:
        OSError: It cannot be written.
    """
    if path.is_dir():
        for item in sorted(path.iterdir()):
            sync(item)
        _sync_names(path)
    else:
        with path.open("r+b") as file:
            os.fsync(file.fileno())


def _sync_names(folder: Path) -> None:
    if sys.platform != "win32":  # which cannot open a folder
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, see `folder_lock`.

    Raises:
        HetLoraError: Another process holds it; or the folder holds a link, through which a run would write elsewhere.
        OSError: The folder cannot be written.
    """
    _refuse_links(folder)
    with folder_lock(folder, f"another process is at work in {str(folder)!r}; wait for it, or end it"):
        yield


@contextlib.contextmanager
def folder_lock(folder: Path, busy: str) -> Iterator[None]:
    """Hold the lock of a folder.

    The operating system frees the lock when the process ends. Windows has no lock.

    Args:
        folder: An existing folder.
        busy: Text of the error if another process holds the lock.

    Raises:
        HetLoraError: Another process holds it.
        OSError: The folder cannot be written.
    """
    with (folder / ".lock").open("w") as lock:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise HetLoraError(busy) from error
            except OSError:  # some network file systems have no locks
                pass
        yield


def _refuse_links(folder: Path) -> None:
    """Refuse a folder that holds links: they would redirect what a run writes or removes. The folder itself may be a link."""
    for place in (folder, folder / "checkpoints"):
        for entry in sorted(place.iterdir()) if place.is_dir() else ():
            kind = entry.lstat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise HetLoraError(
                    f"{str(entry)!r} is a link, or no file: what the run writes would go elsewhere; put a copy of what it "
                    "leads to in its place"
                )


def resume_command(folder: Path) -> str:
    """Return the command that resumes a run.

    Example:
        >>> resume_command(Path("runs/my phones"))
        "hetlora resume 'runs/my phones'"
    """
    return f"hetlora resume {shlex.quote(str(folder))}"


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write the summary, which marks the run as complete. All other files are synced before."""
    atomic_write_text(folder / SUMMARY, json.dumps(summary, ensure_ascii=False, indent=1) + "\n")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a run; None if the run is not complete."""
    try:
        summary = json.loads((folder / SUMMARY).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return summary if isinstance(summary, dict) else None
