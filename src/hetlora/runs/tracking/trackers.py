"""A run's trackers together: each begins with the first figures, and one that fails is dropped while the run goes on."""

from __future__ import annotations

import contextlib
import io
import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from hetlora.runs.folder import replacing
from hetlora.runs.tracking import tracker
from hetlora.runs.tracking.base import TrackedRun, Tracker

__all__ = ["Trackers"]

IDENTITY = "tracking.json"
"""In the folder of a run that is tracked: who it is to its trackers, whoever goes on with it."""


class Trackers:
    """The trackers of a run. A context manager: on leaving it, all are ended.

    Nothing that they do ends the run, or is printed on standard output: where one raises an error, that is said once, and
    the others are left.

    Args:
        names: In `hetlora.config.trackers.TRACKERS`.
        project: What the run belongs to.
        folder: Of the run.
        say: Is told where figures are, and of a tracker that failed.

    Attributes:
        config: The configuration that they are given, as plain data.
    """

    def __init__(self, names: Sequence[str], project: str, folder: Path, say: Callable[[str], None]) -> None:
        self._waiting, self._project, self._folder, self._say = list(names), project, folder, say
        self._trackers: dict[str, Tracker] = {}
        self.config: Mapping[str, Any] = {}

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, one in self._trackers.items():
            self._attempt(name, one.end)
        self._trackers = {}

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures of a step; with those of the first one the trackers begin."""
        if self._waiting:
            self._begin(step)
        for name, one in list(self._trackers.items()):
            if not self._attempt(name, lambda one=one: one.log(step, figures)):  # type: ignore[misc]
                del self._trackers[name]

    def _begin(self, step: int) -> None:
        waiting, self._waiting = self._waiting, []
        told: list[TrackedRun] = []
        # Without an identity that lasts, a run that goes on would be another one to its trackers.
        if not self._attempt(", ".join(waiting), lambda: told.append(self._tracked(step))):
            return
        for name in waiting:
            begun: list[Tracker] = []
            if self._attempt(name, lambda name=name, begun=begun: begun.append(tracker(name)(told[0]))):  # type: ignore[misc]
                self._trackers[name] = begun[0]
                self._say(f"tracked by {name}: {begun[0].where}")

    def _tracked(self, step: int) -> TrackedRun:
        identity = _identity(self._folder, begins=step == 0)
        return TrackedRun(self._folder.name, identity, self._project, self.config, self._folder, step)

    def _attempt(self, name: str, work: Callable[[], object]) -> bool:
        """Do what may fail; return whether it has not."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                work()
        except Exception as error:  # noqa: BLE001  whatever a tracker raises, the run is worth more
            self._say(f"no longer tracked by {name}, which failed: {type(error).__name__}: {error}")
            return False
        return True


def _identity(folder: Path, *, begins: bool) -> str:
    """Return who a run is to its trackers: drawn for one that begins, read for one that goes on."""
    path = folder / IDENTITY
    if not begins:
        with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
            found = json.loads(path.read_bytes())["id"]
            if re.fullmatch(r"[0-9a-f]{12}", found):
                return str(found)
    identity = uuid.uuid4().hex[:12]
    with replacing(path) as file:
        file.write(json.dumps({"id": identity}).encode())
    return identity
