"""Trackers, one small file each: where figures are logged besides the records.

`hetlora.config.trackers.TRACKERS` maps a name to what begins one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import cast

from hetlora.config.trackers import TRACKERS
from hetlora.errors import HetLoraError
from hetlora.runs.tracking.base import TrackedRun, Tracker

__all__ = ["PACKAGES", "TRACKERS", "TrackedRun", "Tracker", "need_trackers", "tracker"]

PACKAGES = {name: name for name, begin in TRACKERS.items() if isinstance(begin, str)}
"""Name to the package that a tracker needs, which is an extra of the same name."""


def tracker(name: str) -> Callable[[TrackedRun], Tracker]:
    """Return what begins a tracker of this name.

    Example:
        >>> tracker("trackio").__name__
        'trackio'
    """
    begin = TRACKERS[name]
    if isinstance(begin, str):
        module, _, attribute = begin.partition(":")
        begin = cast("Callable[[TrackedRun], Tracker]", getattr(importlib.import_module(module), attribute))
    return begin


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
