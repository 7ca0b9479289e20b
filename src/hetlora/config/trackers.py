"""The table of trackers, which a configuration may name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["TRACKERS"]

TRACKERS: dict[str, str | Callable[[Any], Any]] = {
    "tensorboard": "hetlora.runs.tracking.tensorboard:tensorboard",
    "trackio": "hetlora.runs.tracking.trackio:trackio",
    "wandb": "hetlora.runs.tracking.wandb:wandb",
    "mlflow": "hetlora.runs.tracking.mlflow:mlflow",
}
"""Name to what begins a tracker of a run (`hetlora.runs.tracking.Tracker`), or where that is, `module:name`.

A program may add its own before it reads a configuration: `docs/tracking.md`.
"""
