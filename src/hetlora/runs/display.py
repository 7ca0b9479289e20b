"""Displays of a running experiment: two live lines on a terminal, plain lines elsewhere, nothing when quiet."""

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
from hetlora.runs.text import figure, megabytes

__all__ = ["LiveDisplay", "PlainDisplay", "QuietDisplay", "choose_display", "coloured"]

FRAMES_A_SECOND = 4
"""Refresh rate of the live lines."""


class QuietDisplay(Observer):
    """Shows nothing."""


class _Clock:
    """Estimates the remaining time of a run from its finished rounds."""

    def __init__(self) -> None:
        self.begin(0, 0)

    def begin(self, total: int, done: int) -> None:
        """Start the clock; the `done` rounds of before do not count as time."""
        self.total, self._first, self._done = total, done, done
        self._began = self._ended = time.monotonic()

    def round_ended(self, number: int) -> None:
        """Count a round."""
        self._done, self._ended = number, time.monotonic()

    def left(self) -> str:
        """Return the remaining time; the current round is taken to last at least as long as the mean."""
        if self._done <= self._first:
            return "ETA —"
        a_round = max((self._ended - self._began) / (self._done - self._first), 1e-9)
        of_this_one = min(1.0, (time.monotonic() - self._ended) / a_round)
        seconds = a_round * max(0.0, self.total - self._done - of_this_one)
        return f"ETA {seconds:.0f} s" if seconds < 120 else f"ETA {timedelta(seconds=round(seconds))}"


class PlainDisplay(QuietDisplay):
    """One line per round on standard error."""

    def __init__(self) -> None:
        self._clock = _Clock()

    def say(self, text: str) -> None:
        """Print a line, with escapes for characters that are not printable."""
        print(printable(text), file=sys.stderr, flush=True)

    def rounds_started(self, total: int, done: int) -> None:
        """Start the clock."""
        self._clock.begin(total, done)

    def round_ended(self, record: RoundRecord) -> None:
        """Print the round."""
        self._clock.round_ended(record.round)
        self.say(f"round {record.round}/{self._clock.total}  {describe(record)}  {self._clock.left()}")


class LiveDisplay(QuietDisplay):
    """Two live lines, of all rounds and of the current one, with a line for every finished round above."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, emoji=False)
        self._clock = _Clock()
        self._lines: _LiveLines | None = None

    def say(self, text: str) -> None:
        """Print a line above the live ones, broken at words."""
        self._console.print(coloured(text))

    def rounds_started(self, total: int, done: int) -> None:
        """Show the live lines."""
        self._clock.begin(total, done)
        self._lines = _LiveLines(self._console, self._clock)
        self._lines.add_task("rounds", total=total, completed=done)
        self._lines.start()

    def round_changed(self, progress: RoundProgress) -> None:
        """Update the second live line."""
        if self._lines is not None:
            self._lines.under_way = progress

    def round_ended(self, record: RoundRecord) -> None:
        """Print the round above the live lines."""
        self._clock.round_ended(record.round)
        if self._lines is not None:
            self._lines.update(self._lines.task_ids[0], completed=record.round)
        self.say(f"round {record.round}  {describe(record)}")

    def rounds_ended(self) -> None:
        """Remove the live lines."""
        if self._lines is not None:
            self._lines.stop()
            self._lines = None


COLOURS = {
    r"^round \d+(/\d+)?": "bold",
    r"loss [\d.]+": "cyan",
    r"perplexity [\d.]+( -> [\d.]+ \([^)]*\))?": "green",
    r"\d+ pruned": "yellow",
    r"\d+ FAILED.*|only \d+ slots live|no update": "bold red",
}
"""What a person looks for in a line, and its colour."""


def coloured(line: str) -> Text:
    """Return a line for a terminal, with escapes for characters that are not printable.

    Example:
        >>> [str(span.style) for span in coloured("round 2  loss 3.1  1 pruned").spans]
        ['bold', 'cyan', 'yellow']
    """
    text = Text(printable(line))
    for pattern, style in COLOURS.items():
        text.highlight_regex(pattern, style)
    return text


class _LiveLines(Progress):
    """The bar of the rounds, and below it the current round; a narrow terminal cuts the lines."""

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
        """Yield always two lines, so that nothing jumps."""
        yield self.make_tasks_table(self.tasks)
        line = describe_progress(self.under_way, self._clock.total) if self.under_way is not None else ""
        yield Text(line, no_wrap=True, overflow="ellipsis")


class _Left(ProgressColumn):
    """The remaining time."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Task) -> Text:  # noqa: ARG002  rich's signature
        """Return the current estimate."""
        return Text(self._clock.left())


def choose_display(*, quiet: bool) -> QuietDisplay:
    """Return the display for this terminal."""
    if quiet:
        return QuietDisplay()
    return LiveDisplay() if sys.stderr.isatty() else PlainDisplay()


def describe_progress(under_way: RoundProgress, rounds: int) -> str:
    """Return the progress of a round in one line.

    Example:
        >>> print(describe_progress(RoundProgress(3, "training", ranks=(4, 8, 4), answered=1, failed=1), rounds=20))
        round 3/20: training  1 of 3 answered, 1 FAILED  ranks 4 8 4
    """
    line = f"round {under_way.round}/{rounds}: {under_way.doing}"
    if not under_way.ranks:
        return line
    failed = f", {under_way.failed} FAILED" if under_way.failed else ""
    ranks = _few([str(rank) if isinstance(rank, int) else "mixed" for rank in under_way.ranks])
    return f"{line}  {under_way.answered} of {len(under_way.ranks)} answered{failed}  ranks {ranks}"


def describe(record: RoundRecord) -> str:
    """Return a finished round in one line."""
    ranks = _few([str(rank) if isinstance(rank, int) else "mixed" for rank in record.ranks.values()])
    loss = f"loss {figure(record.loss, '.3f', missing='unknown')}"
    parts = ["no update" if record.loss is None and not record.summed else loss]
    if record.summed:
        parts.append(f"{len(record.summed)} of {len(record.ranks)} clients as sums")
    if record.perplexity is not None:
        parts.append(f"perplexity {figure(record.perplexity, '.2f')}")
    parts.append(f"ranks {ranks}")
    if record.prunes:
        parts.append(f"{len(record.prunes)} pruned")
    slots = max((r if isinstance(r, int) else max(r.values()) for r in record.ranks.values()), default=0)
    if record.live_slots < slots:
        parts.append(f"only {record.live_slots} slots live")
    if record.failures:
        failures = [f"{client}: {reason}" for client, reason in list(record.failures.items())[:3]]
        if (more := len(record.failures) - len(failures)) > 0:
            failures.append(f"{more} more, see the records")
        parts.append(f"{len(record.failures)} FAILED ({'; '.join(failures)})")
    sent = f"{megabytes(record.bytes_up, '.2f')} up, {megabytes(record.bytes_down, '.2f')} down"
    parts.append(f"{sent}, {figure(record.seconds, '.1f')} s")
    return "  ".join(parts)


def _few(ranks: list[str]) -> str:
    """List the ranks of a small cohort in order; count those of a large one."""
    if len(ranks) <= 10:
        return " ".join(ranks)
    return " ".join(
        f"{count}x{rank}" for rank, count in sorted(Counter(ranks).items(), key=lambda item: item[0].zfill(6))
    )
