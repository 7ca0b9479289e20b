"""Progress of a comparison: a line per run, and a bar on a terminal."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from hetlora.commands.compare.grid import PlannedRun
from hetlora.errors import printable

__all__ = ["CompareDisplay"]


class CompareDisplay:
    """Prints finished runs, running runs, the number of runs left and their estimated time; on standard error.

    Args:
        quiet: Print nothing.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        self._bar: Progress | None = None
        self._lock = threading.Lock()  # workers start runs in several threads
        self._running: dict[str, float] = {}
        self._total = self._done = self._ended = 0
        self._began = time.monotonic()

    def __enter__(self) -> CompareDisplay:
        if not self._quiet and sys.stderr.isatty():
            columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console)
            self._bar.add_task("", total=None)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        """Print a line."""
        if not self._quiet:
            self._console.print(printable(text), markup=False)

    def begin(self, total: int, kept: int, text: str) -> None:
        """Print the number of runs, and how many of the tuning runs an earlier call has finished."""
        self._total, self._began = total, time.monotonic()
        self.say(f"{total} runs: {text}")
        self.go_on(kept, 0)

    def go_on(self, kept: int, skipped: int) -> None:
        """Print the number of runs that are finished already or cannot be done."""
        self._done += kept + skipped
        if kept:
            self.say(f"kept {kept} finished runs of an earlier call")
        if skipped:
            self.say(f"{skipped} runs are not done: no learning rate gave a finite figure")
        self._show()

    def started(self, run: PlannedRun) -> None:
        """Remember what is running."""
        with self._lock:
            self._running[str(run)] = time.monotonic()
        self._show()

    def ended(self, run: PlannedRun, text: str) -> None:
        """Print a run's line."""
        with self._lock:
            seconds = time.monotonic() - self._running.pop(str(run), time.monotonic())
            self._done, self._ended = self._done + 1, self._ended + 1
        self.say(f"[{self._done}/{self._total}] {run}: {text}, {seconds:.1f} s  {self._outlook()}".rstrip())
        self._show()

    def _outlook(self) -> str:
        left = self._total - self._done
        if not left:
            return ""
        eta = (time.monotonic() - self._began) / self._ended * left if self._ended else None
        parts = [f"ETA {eta:.0f} s" if eta is not None else "", f"{left} left"]
        with self._lock:
            parts.append(f"running: {', '.join(self._running)}" if self._running else "")
        return "; ".join(filter(None, parts))

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0], total=self._total, completed=self._done, description=self._outlook()
            )
