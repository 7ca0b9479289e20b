"""Resumes a run from its newest checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from hetlora.config import RunConfig
from hetlora.errors import HetLoraError
from hetlora.runs.checkpoint import newest
from hetlora.runs.folder import run_lock
from hetlora.runs.observer import Observer
from hetlora.runs.reader import read_config
from hetlora.runs.records import holds_rounds
from hetlora.runs.result import RunResult
from hetlora.runs.runner import Experiment, execute_run_within
from hetlora.runs.tracking import need_trackers

__all__ = ["resume_as"]


def resume_as(make: Callable[[RunConfig, Observer], Experiment], folder: Path, display: Observer) -> RunResult:
    """Resume a run from its newest checkpoint, or from round 0 if there is none.

    Args:
        make: Makes the experiment from its configuration.
        folder: The run's folder.
        display: Shows the progress.

    Raises:
        HetLoraError: There is no run; its configuration, base, tokenizer, data, versions or device have changed; it has rounds
            and keeps no checkpoints; or as `hetlora.runs.runner.execute_run`.
    """
    config = read_config(folder)
    need_trackers(config.tracking.to)
    with run_lock(folder):  # from here on, so that no other process resumes from the same checkpoint
        resumed = newest(folder, display.say)
        if resumed is None and not config.checkpoint_every and holds_rounds(folder / "records.jsonl"):
            raise HetLoraError(
                f"{str(folder)!r} has done rounds and keeps no checkpoints (checkpoint_every = 0), so that it cannot go on; "
                "begin it again by hetlora run, or move its records.jsonl away to begin it anew in its folder"
            )
        if resumed is None:
            display.say("no checkpoint: beginning at round 0")
        else:
            display.say(f"going on from round {resumed.progress.state.round}")
            torch.set_num_threads(resumed.threads)
        return execute_run_within(make(config, display), folder, resumed)
