"""Count the file operations of a process, and let it die or fail at any of them.

A primitive is what the system is asked for once: to open a file for writing, write, fsync, rename, unlink, truncate, make or
remove a folder; and of a writer in another language, all that it does in one call. They are counted from 1. At one of them the
process dies, or from it on the disk is full or can only be read. `Durable` adds up what a power cut would leave.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

__all__ = ["Death", "Durable", "Files", "Primitive"]

How = Literal["b", "m", "a", "f", "r", "s", "i"]
ONE_PATH = ("unlink", "remove", "truncate", "mkdir", "rmdir")
TWO_PATHS = ("rename", "replace")
ROOM = ("open", "create", "write", "fsync", "rename", "replace", "mkdir", "save")
"""Primitives that a full disk refuses."""


@dataclass(frozen=True)
class Death:
    """The death of a process.

    Attributes:
        at: The number of a primitive; a time in seconds for "s" and "i".
        how: Dies just "b"efore the primitive, in the "m"iddle of it or just "a"fter it; finds the disk "f"ull or for "r"eading
            only from it on. Or, at a time, is killed by "s"IGKILL, or "i"nterrupted.

    Example:
        >>> Death.read("12m"), str(Death(0.25, "s"))
        (Death(at=12, how='m'), '0.25s')
    """

    at: float
    how: How

    @classmethod
    def read(cls, text: str) -> Death:
        """Return what `str` wrote."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([bmafrsi])", text)
        if not found:
            raise ValueError(f"{text!r} is no death; give such as 12b, 12m, 12a, 12f, 12r, 0.5s, 0.5i")
        timed: bool = found[2] in "si"
        return cls(float(found[1]) if timed else int(found[1]), found[2])  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.at:g}{self.how}"

    @property
    def timed(self) -> bool:
        """Whether it comes from outside, at a time."""
        return self.how in "si"


class Primitive(NamedTuple):
    """What was done, to which path, and of a rename, where it went."""

    kind: str
    path: str
    to: str = ""


class Files:
    """Count the primitives on a folder's files, and die at the given one.

    Args:
        folder: Absolute; itself included.
        death: This process's death, if any.
        note: Called before every primitive, with its number and the primitive.
        after: Called when it is done.

    Attributes:
        done: Number of primitives begun.
        refused: Number of those that the disk refused.
    """

    def __init__(
        self,
        folder: Path,
        death: Death | None = None,
        note: Callable[[int, Primitive], None] = lambda *_: None,
        after: Callable[[Primitive], None] = lambda _: None,
    ) -> None:
        self.folder = str(folder)
        self.death = None if death is not None and death.timed else death
        self.note, self.after = note, after
        self.done = 0
        self.refused = 0

    @contextmanager
    def watched(self) -> Iterator[Files]:
        """Count in this process for as long as the context lasts."""
        import safetensors.torch

        real = {name: getattr(os, name) for name in (*ONE_PATH, *TWO_PATHS, "fsync", "open")}
        patches = [mock.patch.object(os, name, self._one_path(name, real[name])) for name in ONE_PATH]
        patches += [mock.patch.object(os, name, self._two_paths(name, real[name])) for name in TWO_PATHS]
        patches += [
            mock.patch.object(os, "fsync", self._fsync(real["fsync"])),
            mock.patch.object(os, "open", self._low_open(real["open"])),
            mock.patch.object(io, "open", self._open(io.open)),
            mock.patch.object(builtins, "open", self._open(io.open)),
            mock.patch.object(safetensors.torch, "serialize_file", self._save(safetensors.torch.serialize_file)),
        ]
        for patch in patches:
            patch.start()
        try:
            yield self
        finally:
            for patch in patches:
                patch.stop()

    def at(self, primitive: Primitive, do: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Perform a primitive, or die at it."""
        self.done += 1
        self.note(self.done, primitive)
        death = self.death
        if death is not None and death.how in "fr" and self.done >= death.at:
            self._refuse(primitive, half)
        if death is not None and self.done == death.at:
            if death.how == "m" and half is not None:
                half()
            if death.how in "bm":
                os.kill(os.getpid(), signal.SIGKILL)
        result = do()
        if death is not None and self.done == death.at and death.how == "a":
            os.kill(os.getpid(), signal.SIGKILL)
        self.after(primitive)
        return result

    def _refuse(self, primitive: Primitive, half: Callable[[], Any] | None) -> None:
        assert self.death is not None
        if self.death.how == "f" and primitive.kind not in ROOM:
            return
        self.refused += 1
        if self.death.how == "f" and half is not None and self.refused == 1:
            half()  # what there was room for
        number = errno.ENOSPC if self.death.how == "f" else errno.EROFS
        if primitive.kind == "save":
            from safetensors import SafetensorError

            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
        raise OSError(number, os.strerror(number), primitive.path)

    def _inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        """Return the absolute path if it is in the folder, else None."""
        if isinstance(path, int):
            whole = str(Path(f"/proc/self/fd/{path}").readlink())
        elif dir_fd is not None:
            whole = str(Path(f"/proc/self/fd/{dir_fd}").readlink() / os.fsdecode(path))
        else:
            whole = os.path.abspath(os.fsdecode(path))  # noqa: PTH100  which resolves no link, as the system's call does not
        return whole if whole == self.folder or whole.startswith(self.folder + os.sep) else None

    def _one_path(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            inside = self._inside(path, options.get("dir_fd"))
            if inside is None:
                return real(path, *arguments, **options)
            return self.at(Primitive(name, inside), lambda: real(path, *arguments, **options))

        return call

    def _two_paths(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, to: Any, **options: Any) -> Any:
            inside, there = self._inside(path), self._inside(to)
            if inside is None or there is None:
                return real(path, to, **options)
            return self.at(Primitive(name, inside, there), lambda: real(path, to, **options))

        return call

    def _fsync(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any) -> Any:
            inside = self._inside(file if isinstance(file, int) else file.fileno())
            return real(file) if inside is None else self.at(Primitive("fsync", inside), lambda: real(file))

        return call

    def _low_open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> Any:
            inside = self._inside(path, dir_fd) if flags & os.O_CREAT else None
            if inside is None:
                return real(path, flags, mode, dir_fd=dir_fd)
            return self.at(Primitive("create", inside), lambda: real(path, flags, mode, dir_fd=dir_fd))

        return call

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        files = self

        class WeightedUpdate(io.FileIO):
            """A file whose writes are primitives."""

            def write(self, data: Any) -> int:
                view = memoryview(data).cast("B")
                return int(
                    files.at(
                        Primitive("write", os.path.abspath(os.fsdecode(self.name))),  # noqa: PTH100
                        lambda: super(WeightedUpdate, self).write(view),
                        lambda: super(WeightedUpdate, self).write(view[: len(view) // 2]),
                    )
                )

        def call(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            inside = None if isinstance(file, int) or not set(mode) & set("wax+") else self._inside(file)
            if inside is None:
                return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw = self.at(
                Primitive("open", inside), lambda: WeightedUpdate(file, mode.replace("b", "").replace("t", ""))
            )
            buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        return call

    def _save(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensors: Any, path: Any, **options: Any) -> Any:
            inside = self._inside(path)
            if inside is None:
                return real(tensors, path, **options)

            def half() -> None:
                real(tensors, path, **options)
                with io.FileIO(inside, "r+") as file:
                    file.truncate(Path(inside).stat().st_size // 2)

            return self.at(Primitive("save", inside), lambda: real(tensors, path, **options), half)

        return call


class Durable:
    """The part of a folder that is on the disk itself, by POSIX's minimal guarantees.

    A file's bytes are those of its last fsync, a folder's names those of its own. What was never synchronised is not there:
    a disk may keep more of it, never less.

    Args:
        folder: Absolute; it is on the disk, and empty.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder.stat().st_ino
        self.bytes: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        self.folders: set[int] = set()
        self._open: list[int] = []

    def after(self, primitive: Primitive) -> None:
        """Record a primitive."""
        path = Path(primitive.path)
        if primitive.kind in ("create", "open", "save", "mkdir"):
            # Held open, so that no later file gets the number of one that is gone.
            self._open.append(os.open(path, os.O_RDONLY))
        if primitive.kind == "mkdir":
            self.folders.add(path.stat().st_ino)
        if primitive.kind == "fsync" and path.is_dir():
            self.names[path.stat().st_ino] = {item.name: item.stat().st_ino for item in path.iterdir()}
        elif primitive.kind == "fsync":
            self.bytes[path.stat().st_ino] = path.read_bytes()

    def left(self, now: Path | None = None) -> dict[str, bytes | None]:
        """Return what a power cut would leave: each path in the folder with its bytes, None for a folder.

        Args:
            now: The folder; where it is given, all names in it have reached the disk though nothing asked them to, and only
                bytes have not: what file systems do that write names early and bytes late.
        """
        return dict(self._below(self.root, now, ""))

    def _below(self, number: int, now: Path | None, place: str) -> Iterator[tuple[str, bytes | None]]:
        names = self.names.get(number, {}) if now is None else {item.name: item.stat().st_ino for item in now.iterdir()}
        for name, inner in sorted(names.items()):
            if inner in self.folders:
                yield place + name, None
                yield from self._below(inner, None if now is None else now / name, f"{place}{name}/")
            else:
                yield place + name, self.bytes.get(inner, b"")
