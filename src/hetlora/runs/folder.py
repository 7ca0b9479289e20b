"""A run's folder: files that are whole or not there, one process at a time, and the summary that a complete run has."""

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
    "expand_path",
    "folder_lock",
    "make_folder",
    "read_summary",
    "resume_command",
    "run_lock",
    "sync",
    "write_summary",
]

SUMMARY = "summary.json"
"""Written last: where it stands, the run is complete."""


def expand_path(path: os.PathLike[str] | str) -> Path:
    """Return a path in which ``~`` is the user's home, as a shell would have made it: Python has none in between.

    Example:
        >>> expand_path("~/runs/demo") == Path.home() / "runs/demo"
        True
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111  Path.expanduser raises for an unknown user


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write a file that is on the disk as a whole when this ends, in the place of the one before, or not at all.

    It is written beside its place, as ``NAME.part``, which only a process that was killed leaves behind.

    Raises:
        OSError: It cannot be written; what was there still is.
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
    _sync_names(path.parent)  # the new name is on the disk, too


def make_folder(folder: Path, *, exist_ok: bool = False) -> None:
    """Make a folder and those above it, and fsync their parents, so that the new entries survive a power failure.

    Args:
        folder: Where.
        exist_ok: Whether it may be there already.

    Raises:
        OSError: It cannot be made.
    """
    if exist_ok and folder.is_dir():
        return
    make_folder(folder.parent, exist_ok=True)
    folder.mkdir(exist_ok=exist_ok)
    with contextlib.suppress(PermissionError):  # where folders may be made and not listed
        _sync_names(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk itself.

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
    if sys.platform != "win32":  # where a folder cannot be opened
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder for as long as this one is in it, see `folder_lock`.

    Raises:
        HetLoraError: Another process is in it; or it holds a link, through which a run would write elsewhere.
        OSError: The folder cannot be written.
    """
    _refuse_links(folder)
    with folder_lock(folder, f"another process is at work in {str(folder)!r}; wait for it, or end it"):
        yield


@contextlib.contextmanager
def folder_lock(folder: Path, busy: str) -> Iterator[None]:
    """Hold the lock of a folder.

    The lock is the system's, so that it ends with the process however that ends. Windows has no such locks here.

    Args:
        folder: It exists.
        busy: The text of the error where another process holds the lock.

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
            except OSError:  # some file systems of networks have no locks
                pass
        yield


def _refuse_links(folder: Path) -> None:
    """Refuse a folder in which something that a run writes is neither a file nor a folder.

    It may be somebody else's: a link in it would lead what is written, and what is removed, out of it. Only the folder itself
    may be reached through one.
    """
    for place in (folder, folder / "checkpoints"):
        for entry in sorted(place.iterdir()) if place.is_dir() else ():
            kind = entry.lstat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise HetLoraError(
                    f"{str(entry)!r} is a link, or no file: what the run writes would go elsewhere; put a copy of what it "
                    "leads to in its place"
                )


def resume_command(folder: Path) -> str:
    """Return the command that goes on with a run.

    Example:
        >>> resume_command(Path("runs/my phones"))
        "hetlora resume 'runs/my phones'"
    """
    return f"hetlora resume {shlex.quote(str(folder))}"


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write what a run has come to: from now on it is complete. All else of it is on the disk before."""
    with atomic_write(folder / SUMMARY) as file:
        file.write((json.dumps(summary, ensure_ascii=False, indent=1) + "\n").encode("utf8", "backslashreplace"))


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a complete run; None where it is not complete."""
    try:
        summary = json.loads((folder / SUMMARY).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return summary if isinstance(summary, dict) else None
