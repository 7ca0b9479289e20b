"""Trackers, one small file each: where figures are logged besides the records. `TRACKERS` maps a name to what begins one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from hetlora.errors import HetLoraError
from hetlora.tracking.base import TrackedRun, Tracker
from hetlora.tracking.mlflow import mlflow
from hetlora.tracking.tensorboard import tensorboard
from hetlora.tracking.trackio import trackio
from hetlora.tracking.wandb import wandb

__all__ = ["PACKAGES", "TRACKERS", "TrackedRun", "Tracker", "need_trackers"]

TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": tensorboard,
    "trackio": trackio,
    "wandb": wandb,
    "mlflow": mlflow,
}
"""Name to what begins a tracker of a run. A program may add its own before it reads a configuration: `docs/tracking.md`."""

PACKAGES = {name: name for name in TRACKERS}
"""Name to the package that a tracker needs, which is an extra of the same name."""


def need_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose packages are not installed, all at once.

    Raises:
        HetLoraError: Says how to install them.

    Example:
        >>> need_trackers([])
    """
    missing = [name for name in names if not _loads(PACKAGES.get(name))]
    if missing:
        told, extras = " and ".join(missing), ",".join(missing)
        raise HetLoraError(
            f"tracking by {told} needs a package that is not here: pip install 'hetlora[{extras}]', or take it out of "
            "tracking.to"
        )


def _loads(package: str | None) -> bool:
    """Return whether a package is there and can be loaded; one that cannot is of no use."""
    if package is not None:
        try:
            importlib.import_module(package)
        except ImportError:
            return False
    return True
