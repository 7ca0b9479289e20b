"""trackio."""

from __future__ import annotations

from hetlora.tracking.base import TrackedRun, Tracker

__all__ = ["trackio"]


def trackio(run: TrackedRun) -> Tracker:
    """Log."""
    raise NotImplementedError(run)
