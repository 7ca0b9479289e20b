"""Trackers that a configuration may name."""

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
"""Name to the function that starts a tracker (`hetlora.runs.tracking.Tracker`), or its place, `module:name`.

A program may add its own before it reads a configuration: `docs/tracking.md`.
"""
