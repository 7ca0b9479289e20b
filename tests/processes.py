"""Start commands as subprocesses, as from a terminal, and stop them when the test ends."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HANGS = 600.0
"""Seconds after which something is taken to hang. Nobody waits for them but where it does, so a loaded machine may be slow."""


@contextlib.contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start a command that hears Ctrl-C; whatever becomes of the test, it ends and its pipes are closed.

    `nohup` and `&` in a script start a command that ignores Ctrl-C, and all that it starts inherits this: the tests, too. What
    is started while a handler is installed begins with the system's own way instead.

    Args:
        command: With its arguments.
        **options: Of `subprocess.Popen`.
    """
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, **options)
    finally:
        signal.signal(signal.SIGINT, ours)
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[Any] | None = None) -> None:
    """Wait until something holds, for as long as the process that is to bring it about runs."""
    deadline = time.monotonic() + HANGS
    while not holds():
        assert process is None or process.poll() is None, f"it ended with {process.returncode} before"
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.002)


def children(pid: int) -> list[int]:
    """Return the processes that a process has started, from whichever of its threads; on Linux only."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text("utf8").split()]


def has_ended(pid: int) -> bool:
    """Tell whether a process has ended, even where nobody has asked how (a container without an init); on Linux only."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"
