"""wandb."""

from __future__ import annotations

from hetlora.tracking.base import TrackedRun, Tracker

__all__ = ["wandb"]


def wandb(run: TrackedRun) -> Tracker:
    """Log."""
    raise NotImplementedError(run)
