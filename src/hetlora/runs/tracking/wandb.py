"""Weights & Biases: a run in ``RUN/wandb``, offline unless the user's own environment says otherwise (https://docs.wandb.ai)."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping

from hetlora.runs.tracking.base import TrackedRun, Tracker

__all__ = ["wandb"]


def wandb(run: TrackedRun) -> Tracker:
    """Log to a run of W&B's under the run's id; ``wandb sync`` sends it, or ``WANDB_MODE=online`` while it goes on.

    W&B takes back no steps. A run that goes on logs the same figures for those it does again, and another time for the round.
    """
    return _WandB(run)


class _WandB(Tracker):
    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            config=dict(run.config),
            dir=str(run.folder),
            mode=None if os.environ.get("WANDB_MODE") else "offline",
            resume="allow",
            save_code=False,
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True),
        )
        files = shlex.quote(str(run.folder / "wandb"))
        self.where = f"wandb sync {files}/offline-run-*" if self._run.offline else self._run.url

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def end(self) -> None:
        self._run.finish()
