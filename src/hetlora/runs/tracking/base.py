"""What a tracker is: somewhere that a run's figures are logged besides its records, to be looked at while it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

__all__ = ["TrackedRun", "Tracker"]


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker begins with.

    Attributes:
        name: Of the run, as its folder is called.
        id: Of 12 hexadecimal digits: drawn when a run begins, the same when it goes on in another process.
        project: What it belongs to, for trackers that put runs together.
        config: The whole configuration as plain data. It holds no address and no password.
        folder: The run's; a tracker may keep its files in a folder there, called after itself.
        step: The first step that will be logged; whatever an earlier process has logged from there on no longer holds.
    """

    name: str
    id: str
    project: str
    config: Mapping[str, Any]
    folder: Path
    step: int


class Tracker(Protocol):
    """Logs a run that has begun. Whatever it raises, the run goes on without it.

    Attributes:
        where: Where its figures are, or what shows them, in one line.
    """

    where: str

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log all figures of a step, so that they outlast the process; steps come in order, each once in a process.

        Args:
            step: 0 before the first round, then the number of the round that has ended.
            figures: By name, see `hetlora.runs.tracking.metrics`; all finite.
        """

    def end(self) -> None:
        """End, because the run has ended or was interrupted."""
