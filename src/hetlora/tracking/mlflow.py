"""mlflow."""

from __future__ import annotations

from hetlora.tracking.base import TrackedRun, Tracker

__all__ = ["mlflow"]


def mlflow(run: TrackedRun) -> Tracker:
    """Log."""
    raise NotImplementedError(run)
