"""Interface of trackers, which log a run's figures besides its records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

__all__ = ["TrackedRun", "Tracker"]


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker gets it.

    Attributes:
        name: The name of the run's folder.
        id: 12 hexadecimal digits, drawn when a run begins and kept when it is resumed.
        project: The project, for trackers that group runs.
        config: The whole configuration as plain data, without addresses and passwords.
        folder: The run's folder; a tracker may keep its files in a subfolder of its own name.
        step: The first step that will be logged; steps from there on that an earlier process has logged are void.
    """

    name: str
    id: str
    project: str
    config: Mapping[str, Any]
    folder: Path
    step: int


class Tracker(Protocol):
    """Logs a run. If it raises an error, the run continues without it.

    Attributes:
        where: One line with the place of its figures, or the command that shows them.
    """

    where: str

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log all figures of a step durably; steps come in order, each once per process.

        Args:
            step: 0 before the first round, then the number of the finished round.
            figures: Finite figures by name, see `hetlora.runs.tracking.metrics`.
        """

    def end(self) -> None:
        """Called when the run has ended or was interrupted."""
