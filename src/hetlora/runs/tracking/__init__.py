"""Trackers, which log figures besides the records, one small file each; `hetlora.config.trackers.TRACKERS` lists them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import cast

from hetlora.config.trackers import TRACKERS
from hetlora.errors import HetLoraError
from hetlora.runs.tracking.base import TrackedRun, Tracker

__all__ = ["PACKAGES", "TRACKERS", "TrackedRun", "Tracker", "need_trackers", "tracker"]

PACKAGES = {name: name for name, begin in TRACKERS.items() if isinstance(begin, str)}
"""Name to the package of a tracker, which is an extra of the same name."""


def tracker(name: str) -> Callable[[TrackedRun], Tracker]:
    """Return the function that starts a tracker of this name.

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
    """Refuse trackers whose packages are not installed.

    Raises:
        HetLoraError: Explains how to install all of them.

    Example:
        >>> need_trackers([])
    """
    missing = [name for name in names if not _loads(PACKAGES.get(name))]
    if missing:
        names_missing, extras = " and ".join(missing), ",".join(missing)
        raise HetLoraError(
            f"tracking by {names_missing} needs a package that is not here: pip install 'hetlora[{extras}]', or take it out of "
            "tracking.to"
        )


def _loads(package: str | None) -> bool:
    """Return whether a package can be imported."""
    if package is not None:
        try:
            importlib.import_module(package)
        except ImportError:
            return False
    return True
