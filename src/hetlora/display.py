"""What a run tells a person while it goes on: a live bar on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections import Counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hetlora.errors import printable
from hetlora.records import RoundRecord

__all__ = ["LiveDisplay", "PlainDisplay", "QuietDisplay", "choose_display"]


class QuietDisplay:
    """Tells nothing."""

    def say(self, text: str) -> None:
        """Tell nothing."""

    def begin_rounds(self, total: int, done: int = 0) -> None:
        """Tell nothing."""

    def end_round(self, record: RoundRecord) -> None:
        """Tell nothing."""

    def end_rounds(self) -> None:
        """Tell nothing."""


class PlainDisplay(QuietDisplay):
    """One line a round on standard error."""

    def __init__(self) -> None:
        self._total = self._done = 0
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line: one, and none that a terminal obeys, whatever the names in it hold."""
        print(printable(text), file=sys.stderr, flush=True)

    def begin_rounds(self, total: int, done: int = 0) -> None:
        """Remember how many rounds there are, and from which on they take time."""
        self._total, self._done = total, done
        self._began = time.monotonic()

    def end_round(self, record: RoundRecord) -> None:
        """Print the round."""
        left = (time.monotonic() - self._began) / (record.round - self._done) * (self._total - record.round)
        self.say(f"round {record.round}/{self._total}  {describe(record)}  ETA {left:.0f} s")


class LiveDisplay(QuietDisplay):
    """A progress bar that stays on one line, with a line for every round above it."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(printable(text), markup=False)

    def begin_rounds(self, total: int, done: int = 0) -> None:
        """Show the bar."""
        columns = (TextColumn("rounds"), BarColumn(), MofNCompleteColumn(), TextColumn("ETA"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console)
        self._bar.add_task("rounds", total=total, completed=done)
        self._bar.start()

    def end_round(self, record: RoundRecord) -> None:
        """Print the round above the bar and advance it."""
        self.say(f"round {record.round}  {describe(record)}")
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])

    def end_rounds(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def choose_display(*, quiet: bool) -> QuietDisplay:
    """Return the display for this terminal."""
    if quiet:
        return QuietDisplay()
    return LiveDisplay() if sys.stderr.isatty() else PlainDisplay()


def describe(record: RoundRecord) -> str:
    """Say a round in one line."""
    ranks = _few([str(rank) if isinstance(rank, int) else "mixed" for rank in record.ranks.values()])
    parts = [f"loss {record.loss:.3f}" if record.loss is not None else "no update"]
    if record.perplexity is not None:
        parts.append(f"perplexity {record.perplexity:.2f}")
    parts.append(f"ranks {ranks}")
    if record.prunes:
        parts.append(f"{len(record.prunes)} pruned")
    slots = max((r if isinstance(r, int) else max(r.values()) for r in record.ranks.values()), default=0)
    if record.live_slots < slots:
        parts.append(f"only {record.live_slots} slots live")
    if record.failures:
        shown = [f"{client}: {reason}" for client, reason in list(record.failures.items())[:3]]
        more = len(record.failures) - len(shown)
        parts.append(
            f"{len(record.failures)} FAILED ({'; '.join(shown)}{f'; {more} more, see the records' if more else ''})"
        )
    parts.append(f"{record.bytes_up / 1e6:.2f} MB up, {record.bytes_down / 1e6:.2f} MB down, {record.seconds:.1f} s")
    return "  ".join(parts)


def _few(ranks: list[str]) -> str:
    """List a small cohort's ranks in order, count a large one's."""
    if len(ranks) <= 10:
        return " ".join(ranks)
    return " ".join(
        f"{count}x{rank}" for rank, count in sorted(Counter(ranks).items(), key=lambda item: item[0].zfill(6))
    )
