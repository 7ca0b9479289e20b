"""Start and resume runs over Flower."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hetlora.config import RunConfig
from hetlora.flower.hosted_experiment import HostedExperiment
from hetlora.flower.remote_experiment import RemoteExperiment
from hetlora.flower.transport import Transport
from hetlora.runs.local_experiment import fresh_folder
from hetlora.runs.observer import Observer
from hetlora.runs.result import RunResult
from hetlora.runs.resume import resume_as
from hetlora.runs.runner import Experiment, execute_run
from hetlora.runs.tracking import need_trackers

__all__ = ["resume_run", "start_run"]


def start_run(
    config: RunConfig, display: Observer, transport: Transport, begun: Callable[[Path], None] = lambda _: None
) -> RunResult:
    """Start a run in a new folder.

    Args:
        config: The run.
        display: Shows the progress.
        transport: Sends messages and receives answers.
        begun: Called with the folder before the first round.

    Raises:
        HetLoraError: The run cannot start, or there are too few clients.
    """
    need_trackers(config.tracking.to)
    experiment, folder = _experiment(config, display, transport), fresh_folder(Path(config.output), config.name)
    begun(folder)
    return execute_run(experiment, folder)


def resume_run(folder: Path, display: Observer, transport: Transport) -> RunResult:
    """Resume a run from its newest checkpoint, over the nodes that are connected now.

    Raises:
        HetLoraError: As `hetlora.runs.resume.resume_as`, or there are too few clients.
    """
    return resume_as(lambda config, display: _experiment(config, display, transport), folder, display)


def _experiment(config: RunConfig, display: Observer, transport: Transport) -> Experiment:
    return (RemoteExperiment if config.flower.clients == "nodes" else HostedExperiment)(config, display, transport)
