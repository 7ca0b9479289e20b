"""Runs over Flower: one that begins, and one that goes on."""

from __future__ import annotations

from pathlib import Path

from hetlora.conduct import Display, Undertaking, conduct
from hetlora.config import RunConfig
from hetlora.experiment import fresh_folder
from hetlora.experiment import resume as go_on
from hetlora.flower.deployment import Deployment
from hetlora.flower.hosted import Hosted
from hetlora.flower.post import Post
from hetlora.result import RunResult
from hetlora.tracking import need_trackers

__all__ = ["begin", "resume"]


def begin(config: RunConfig, display: Display, post: Post) -> RunResult:
    """Conduct a run in a folder of its own.

    Args:
        config: The run; `flower.clients` says whose its clients are.
        display: Is told what goes on.
        post: Over which messages go.

    Raises:
        HetLoraError: The run cannot begin, or there are too few clients.
    """
    need_trackers(config.tracking.to)
    return conduct(_made(config, display, post), fresh_folder(Path(config.output), config.name))


def resume(folder: Path, display: Display, post: Post) -> RunResult:
    """Go on with a run from its newest checkpoint, over the nodes that are there now.

    Raises:
        HetLoraError: As `hetlora.experiment.resume`, or there are too few clients.
    """
    return go_on(folder, display, lambda config, display: _made(config, display, post))


def _made(config: RunConfig, display: Display, post: Post) -> Undertaking:
    return (Deployment if config.flower.clients == "nodes" else Hosted)(config, display, post)
