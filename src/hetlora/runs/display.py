"""What a run tells a person while it goes on: two live lines on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from hetlora.errors import printable
from hetlora.runs.observer import Observer
from hetlora.runs.progress import RoundProgress
from hetlora.runs.records import RoundRecord

__all__ = ["LiveDisplay", "PlainDisplay", "QuietDisplay", "choose_display"]

FRAMES_A_SECOND = 4
"""Of the live lines: what answers within a round changes them at most so often."""


class QuietDisplay(Observer):
    """Shows nothing."""


class _Clock:
    """Says when a run is over, from what its rounds have taken so far."""

    def __init__(self) -> None:
        self.begin(0, 0)

    def begin(self, total: int, done: int) -> None:
        """Count from here: `done` rounds were done before, and say nothing of how long one takes."""
        self.total, self._first, self._done = total, done, done
        self._began = self._ended = time.monotonic()

    def round_ended(self, number: int) -> None:
        """Count a round."""
        self._done, self._ended = number, time.monotonic()

    def left(self) -> str:
        """Say how long it will be; the round under way counts as one that takes as long as those before, or longer."""
        if self._done <= self._first:
            return "ETA —"
        a_round = max((self._ended - self._began) / (self._done - self._first), 1e-9)
        of_this_one = min(1.0, (time.monotonic() - self._ended) / a_round)
        seconds = a_round * max(0.0, self.total - self._done - of_this_one)
        return f"ETA {seconds:.0f} s" if seconds < 120 else f"ETA {timedelta(seconds=round(seconds))}"


class PlainDisplay(QuietDisplay):
    """One line a round on standard error."""

    def __init__(self) -> None:
        self._clock = _Clock()

    def say(self, text: str) -> None:
        """Print a line: one, and none that a terminal obeys, whatever the names in it hold."""
        print(printable(text), file=sys.stderr, flush=True)

    def rounds_started(self, total: int, done: int) -> None:
        """Remember how many rounds there are, and from which on they take time."""
        self._clock.begin(total, done)

    def round_ended(self, record: RoundRecord) -> None:
        """Print the round."""
        self._clock.round_ended(record.round)
        self.say(f"round {record.round}/{self._clock.total}  {describe(record)}  {self._clock.left()}")


class LiveDisplay(QuietDisplay):
    """Two lines that stay in place, the rounds and what goes on in this one, with a line for every finished round above."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        self._clock = _Clock()
        self._lines: _LiveLines | None = None

    def say(self, text: str) -> None:
        """Print a line above the live ones."""
        self._console.print(printable(text), markup=False)

    def rounds_started(self, total: int, done: int) -> None:
        """Show the live lines."""
        self._clock.begin(total, done)
        self._lines = _LiveLines(self._console, self._clock)
        self._lines.add_task("rounds", total=total, completed=done)
        self._lines.start()

    def round_changed(self, progress: RoundProgress) -> None:
        """Remember what the next frame shows."""
        if self._lines is not None:
            self._lines.under_way = progress

    def round_ended(self, record: RoundRecord) -> None:
        """Print the round above the live lines."""
        self._clock.round_ended(record.round)
        if self._lines is not None:
            self._lines.update(self._lines.task_ids[0], completed=record.round)
        self.say(f"round {record.round}  {describe(record)}")

    def rounds_ended(self) -> None:
        """Take the live lines away."""
        if self._lines is not None:
            self._lines.stop()
            self._lines = None


class _LiveLines(Progress):
    """The bar of the rounds, and below it the round under way; each one line, on a narrow terminal the beginning of one."""

    def __init__(self, console: Console, clock: _Clock) -> None:
        self.under_way: RoundProgress | None = None
        self._clock = clock
        columns = (
            TextColumn("rounds"),
            BarColumn(),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            _Left(clock),
        )
        super().__init__(*columns, console=console, refresh_per_second=FRAMES_A_SECOND, transient=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield two lines, always two, so that nothing jumps."""
        yield self.make_tasks_table(self.tasks)
        told = describe_progress(self.under_way, self._clock.total) if self.under_way is not None else ""
        yield Text(told, no_wrap=True, overflow="ellipsis")


class _Left(ProgressColumn):
    """How long it will be."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Task) -> Text:  # noqa: ARG002  rich's signature
        """Return it as of now."""
        return Text(self._clock.left())


def choose_display(*, quiet: bool) -> QuietDisplay:
    """Return the display for this terminal."""
    if quiet:
        return QuietDisplay()
    return LiveDisplay() if sys.stderr.isatty() else PlainDisplay()


def describe_progress(under_way: RoundProgress, rounds: int) -> str:
    """Say a round under way in one line, what changes first.

    Example:
        >>> print(describe_progress(RoundProgress(3, "training", ranks=(4, 8, 4), answered=1, failed=1), rounds=20))
        round 3/20: training  1 of 3 answered, 1 FAILED  ranks 4 8 4
    """
    told = f"round {under_way.round}/{rounds}: {under_way.doing}"
    if not under_way.ranks:
        return told
    failed = f", {under_way.failed} FAILED" if under_way.failed else ""
    ranks = _few([str(rank) if isinstance(rank, int) else "mixed" for rank in under_way.ranks])
    return f"{told}  {under_way.answered} of {len(under_way.ranks)} answered{failed}  ranks {ranks}"


def describe(record: RoundRecord) -> str:
    """Say a round in one line."""
    ranks = _few([str(rank) if isinstance(rank, int) else "mixed" for rank in record.ranks.values()])
    parts = [f"loss {record.loss:.3f}" if record.loss is not None else "loss unknown" if record.summed else "no update"]
    if record.summed:
        parts.append(f"{len(record.summed)} of {len(record.ranks)} clients as sums")
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
