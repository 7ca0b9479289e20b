"""Weights & Biases: a run in ``RUN/wandb``, offline unless ``WANDB_MODE`` is set (https://docs.wandb.ai)."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping

from hetlora.runs.tracking.base import TrackedRun, Tracker

__all__ = ["wandb"]


def wandb(run: TrackedRun) -> Tracker:
    """Log to a W&B run with the run's id. ``wandb sync`` uploads it later, ``WANDB_MODE=online`` during the run.

    W&B cannot delete steps. A resumed run logs repeated rounds again, with the same figures and new times.
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
