"""The trackers of a run: they start with the first figures, and one that fails is dropped."""

from __future__ import annotations

import contextlib
import io
import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hetlora.runs.folder import atomic_write_text
from hetlora.runs.observer import Observer
from hetlora.runs.records import EvaluationRecord, RoundRecord
from hetlora.runs.result import RunResult, RunTotals, evaluation_record
from hetlora.runs.tracking import tracker
from hetlora.runs.tracking.base import TrackedRun, Tracker
from hetlora.runs.tracking.metrics import evaluation_figures, round_figures

__all__ = ["Trackers"]

IDENTITY = "tracking.json"
"""File in the folder of a tracked run that holds its id for the trackers."""


class Trackers(Observer):
    """The trackers of a run as one observer.

    They cannot end the run or print to standard output. A tracker that raises an error is dropped with a message.

    Args:
        names: Names in `hetlora.config.trackers.TRACKERS`.
        project: The project of the run.
        config: The configuration, as plain data.
        folder: The run's folder.
        progress: The totals of the run.
        say: Gets the places of the figures, and messages about failed trackers.
    """

    def __init__(
        self,
        names: Sequence[str],
        project: str,
        config: Mapping[str, Any],
        folder: Path,
        progress: RunTotals,
        say: Callable[[str], None],
    ) -> None:
        self._waiting, self._project, self._config, self._folder = list(names), project, config, folder
        self._progress, self._say = progress, say
        self._trackers: dict[str, Tracker] = {}
        self._first: list[EvaluationRecord] = []

    def evaluated(self, record: EvaluationRecord) -> None:
        """Keep the measurements before the first round, because all figures of a step are logged together."""
        self._first.append(record)

    def rounds_started(self, total: int, done: int) -> None:  # noqa: ARG002  `Observer`'s signature
        """Log step 0 of a new run: the base, and the adapter that the run starts from."""
        if self._first:
            *base, start = self._first
            self._log(0, (evaluation_figures(base[0], "base") if base else {}) | evaluation_figures(start))

    def round_ended(self, record: RoundRecord) -> None:
        """Log a round; the last one with the measurement of the result."""
        progress = self._progress
        figures = round_figures(record, bytes_up=progress.bytes_up, bytes_down=progress.bytes_down)
        if progress.final is not None:
            figures |= evaluation_figures(evaluation_record(record.round, progress.final))
        self._log(record.round, figures)

    def run_ended(self, result: RunResult | None) -> None:  # noqa: ARG002  `Observer`'s signature
        """End all trackers."""
        for name, started in self._trackers.items():
            self._attempt(name, started.end)

    def _log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures of a step; the first one starts the trackers."""
        if self._waiting:
            self._begin(step)
        for name, started in list(self._trackers.items()):
            if not self._attempt(name, lambda started=started: started.log(step, figures)):  # type: ignore[misc]
                del self._trackers[name]

    def _begin(self, step: int) -> None:
        waiting, self._waiting = self._waiting, []
        runs: list[TrackedRun] = []
        # Without a stored id, a resumed run would be another one to its trackers.
        if not self._attempt(", ".join(waiting), lambda: runs.append(self._tracked(step))):
            return
        for name in waiting:
            begun: list[Tracker] = []
            if self._attempt(name, lambda name=name, begun=begun: begun.append(tracker(name)(runs[0]))):  # type: ignore[misc]
                self._trackers[name] = begun[0]
                self._say(f"tracked by {name}: {begun[0].where}")

    def _tracked(self, step: int) -> TrackedRun:
        identity = _identity(self._folder, begins=step == 0)
        return TrackedRun(self._folder.name, identity, self._project, self._config, self._folder, step)

    def _attempt(self, name: str, work: Callable[[], object]) -> bool:
        """Do what may fail; return whether it succeeded."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                work()
        except Exception as error:  # noqa: BLE001  no error of a tracker may end the run
            self._say(f"no longer tracked by {name}, which failed: {type(error).__name__}: {error}")
            return False
        return True


def _identity(folder: Path, *, begins: bool) -> str:
    """Return the id of a run for its trackers: drawn for a new run, read for a resumed one."""
    path = folder / IDENTITY
    if not begins:
        with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
            found = json.loads(path.read_bytes())["id"]
            if re.fullmatch(r"[0-9a-f]{12}", found):
                return str(found)
    identity = uuid.uuid4().hex[:12]
    atomic_write_text(path, json.dumps({"id": identity}))
    return identity
