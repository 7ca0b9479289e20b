"""TensorBoard: event files in the run's folder (https://www.tensorflow.org/tensorboard)."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping

from hetlora.runs.tracking.base import TrackedRun, Tracker

__all__ = ["tensorboard"]


def tensorboard(run: TrackedRun) -> Tracker:
    """Log to event files in ``RUN/tensorboard``; those of a resumed run void repeated steps (`purge_step`)."""
    return _TensorBoard(run)


class _TensorBoard(Tracker):
    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = str(run.folder / "tensorboard")
        self.where = f"tensorboard --logdir {shlex.quote(folder)}"
        self._writer = SummaryWriter(folder, purge_step=run.step)
        if run.step == 0:
            text = json.dumps(run.config, indent=2, ensure_ascii=False)
            self._writer.add_text("config", f"```json\n{text}\n```", 0)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def end(self) -> None:
        self._writer.close()
