"""A node's lasting worker process, which loads the base model once instead of once per message.

Flower starts a new process for every message to a node. That process passes the message to the node's worker over a Unix socket
in a private folder, and starts the worker if there is none.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from hetlora._version import __version__
from hetlora.errors import HetLoraError
from hetlora.flower.envelope import Envelope, quoted
from hetlora.flower.node_config import NodeConfig

__all__ = ["ask", "main"]

START = 120.0
"""Seconds until a new worker must listen; it loads the model later."""

LENGTH = 8


def ask(envelope: Envelope, settings: NodeConfig, node: int) -> Envelope:
    """Let the node's worker answer a message; start the worker if there is none.

    Args:
        envelope: The server's message.
        settings: The node's settings.
        node: Flower's number of the node.

    Raises:
        HetLoraError: The worker cannot be started, or died; with the last line of its log.
    """
    folder = _folder(settings, node)
    with _connected(folder, settings) as connection:
        try:
            _send(connection, envelope.packed())
            return Envelope.read(_receive(connection))
        except (EOFError, OSError) as error:
            raise HetLoraError(f"the client's process died: {_last_words(folder)}") from error


def serve(folder: Path, settings: NodeConfig) -> None:
    """Answer messages one after another until none has come for `settings.idle` seconds."""
    from hetlora.flower.client_runtime import answer

    place, new = folder / "socket", folder / "socket.new"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        # Bound under another name first, so that a visible socket accepts connections.
        new.unlink(missing_ok=True)
        with _short(new) as name:
            listener.bind(name)
        listener.listen(16)
        own = new.stat().st_ino
        new.replace(place)
        while (connection := _next(listener, folder, own, settings.idle)) is not None:
            # A killed process of Flower's must not end the worker.
            with connection, contextlib.suppress(EOFError, OSError, HetLoraError):
                connection.settimeout(None)
                envelope = Envelope.read(_receive(connection))
                print(f"{time.strftime('%F %T')} {quoted(envelope.kind)}", flush=True)
                result = answer(envelope, settings, keeps=True)
                if result.kind == "refused":
                    print(f"{time.strftime('%F %T')} refused: {result.value['reason']}", flush=True)
                _send(connection, result.packed())


def _next(listener: socket.socket, folder: Path, own: int, idle: float) -> socket.socket | None:
    """Return the next connection; after `idle` seconds without one, remove the socket and return None."""
    listener.settimeout(idle)
    with contextlib.suppress(TimeoutError):
        return listener.accept()[0]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # clients connect under this lock, so none can connect from here on
        listener.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            return listener.accept()[0]
        place = folder / "socket"
        if place.exists() and place.stat().st_ino == own:
            place.unlink()
        listener.close()
    return None


@contextlib.contextmanager
def _connected(folder: Path, settings: NodeConfig) -> Iterator[socket.socket]:
    with (folder / "lock").open("w") as lock, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two messages at once start one worker
        with _short(folder / "socket") as name:
            try:
                connection.connect(name)
            except OSError:
                _start(folder, settings)
                connection.connect(name)
        fcntl.flock(lock, fcntl.LOCK_UN)
        yield connection


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """Yield a name of a socket within the system's limit of about 100 characters."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        by_number = Path(f"/proc/self/fd/{folder}")
        yield str(by_number / path.name if by_number.exists() else path)
    finally:
        os.close(folder)


def _start(folder: Path, settings: NodeConfig) -> None:
    (folder / "socket").unlink(missing_ok=True)
    (folder / "settings.json").write_text(json.dumps(asdict(settings)), encoding="utf8")
    with (folder / "log").open("ab") as log, Path(os.devnull).open("rb") as nothing:
        # Not by subprocess, which warns of a surviving child. In a new session, because Flower kills the process group.
        worker = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "hetlora.flower.client_process", str(folder)],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, file.fileno(), to) for file, to in ((nothing, 0), (log, 1), (log, 2))],
            setsid=True,
        )
    until = time.monotonic() + START
    while not (folder / "socket").exists():
        if os.waitpid(worker, os.WNOHANG)[0] or time.monotonic() > until:
            raise HetLoraError(f"the client's process did not start: {_last_words(folder)}")
        time.sleep(0.05)


def _folder(settings: NodeConfig, node: int) -> Path:
    """Return the private folder of a node's worker."""
    key = json.dumps([__version__, node, os.getcwd(), asdict(settings)], sort_keys=True)  # noqa: PTH109  its text
    root = Path(os.environ.get("HETLORA_STATE") or Path(tempfile.gettempdir()) / f"hetlora-{os.getuid()}")
    folder = root / hashlib.sha256(key.encode()).hexdigest()[:16]
    for each in (root, folder):
        try:
            each.parent.mkdir(parents=True, exist_ok=True)
            each.mkdir(mode=0o700, exist_ok=True)
            state = each.lstat()
        except OSError as error:
            raise HetLoraError(f"{each}: {error.strerror}; set HETLORA_STATE to a folder of your own") from error
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o077:
            raise HetLoraError(f"{each} is open to others; remove it, or set HETLORA_STATE to a folder of your own")
    return folder


def _last_words(folder: Path) -> str:
    try:
        lines = (folder / "log").read_text("utf8", errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return f"{lines[-1] if lines else 'it wrote nothing'} (see {folder / 'log'})"


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(len(data).to_bytes(LENGTH, "little"))
    connection.sendall(data)


def _receive(connection: socket.socket) -> bytes:
    return bytes(_exactly(connection, int.from_bytes(_exactly(connection, LENGTH), "little")))


def _exactly(connection: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    view, got = memoryview(data), 0
    while got < length:
        count = connection.recv_into(view[got:])
        if not count:
            raise EOFError
        got += count
    return data


def main() -> None:
    """Run the worker of a folder, started by `ask`."""
    from hetlora.runs.process import prepare_process, quiet_transformers

    folder = Path(sys.argv[1])
    settings = NodeConfig(**json.loads((folder / "settings.json").read_text("utf8")))
    prepare_process()
    quiet_transformers()
    serve(folder, settings)


if __name__ == "__main__":
    main()
