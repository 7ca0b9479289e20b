"""Runs over Flower: one that begins, and one that goes on."""

from __future__ import annotations

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


def start_run(config: RunConfig, display: Observer, transport: Transport) -> RunResult:
    """Conduct a run in a folder of its own.

    Args:
        config: The run; `flower.clients` says whose its clients are.
        display: Is told what goes on.
        transport: Over which messages go.

    Raises:
        HetLoraError: The run cannot begin, or there are too few clients.
    """
    need_trackers(config.tracking.to)
    return execute_run(_made(config, display, transport), fresh_folder(Path(config.output), config.name))


def resume_run(folder: Path, display: Observer, transport: Transport) -> RunResult:
    """Go on with a run from its newest checkpoint, over the nodes that are there now.

    Raises:
        HetLoraError: As `hetlora.runs.resume.resume_as`, or there are too few clients.
    """
    return resume_as(lambda config, display: _made(config, display, transport), folder, display)


def _made(config: RunConfig, display: Observer, transport: Transport) -> Experiment:
    return (RemoteExperiment if config.flower.clients == "nodes" else HostedExperiment)(config, display, transport)
