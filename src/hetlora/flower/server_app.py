"""The Flower server app: reads a run's file and executes the run over Flower's nodes, without Flower's strategies."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from hetlora.errors import HetLoraError

if TYPE_CHECKING:
    from hetlora.runs.result import RunResult

__all__ = ["app", "serve", "simulated"]

SIMULATED = "Flower's simulation: the clients are those of [data] and [partition], hosted by its nodes"

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Execute the run in ``--run-config``."""
    from hetlora.runs.process import prepare_process, quiet_transformers

    prepare_process()
    quiet_transformers()
    logging.getLogger("flwr").addFilter(_without_traceback)
    try:
        serve(grid, context.run_config)
    except HetLoraError as error:
        # The exception marks the run as failed; the log gets the reason.
        print(f"hetlora: {error}", file=sys.stderr, flush=True)
        raise


def _without_traceback(record: logging.LogRecord) -> bool:
    """Return whether Flower logs a record: not the traceback of an error that `main` has explained in one line."""
    return not record.exc_info or not isinstance(record.exc_info[1], HetLoraError)


def serve(grid: Grid, run_config: Mapping[str, Any]) -> None:
    """Start or resume a run.

    Args:
        grid: Flower's grid.
        run_config: `config`, the run's TOML file in the app's bundle or the working directory; `set`, changes to it,
            ``key=value`` separated by spaces; `resume`, the folder of a run to resume instead.

    Raises:
        HetLoraError: The run cannot start or resume.
    """
    from hetlora.config import load_config
    from hetlora.flower.launch import resume_run, start_run
    from hetlora.flower.transport import Transport
    from hetlora.runs.display import PlainDisplay
    from hetlora.runs.folder import read_summary
    from hetlora.runs.summary_text import describe_finished, describe_result

    display = PlainDisplay()
    transport = Transport(grid, say=display.say)
    begun: list[Path] = []

    def say_way_on(folder: Path) -> None:
        begun.append(folder)
        if config.checkpoint_every:  # said at once: `flwr stop` leaves no time for it
            display.say(f"records are in {folder.absolute()}; if the run ends early, {_way_on(folder)}")

    try:
        if resumed := str(run_config.get("resume") or ""):
            if (summary := read_summary(Path(resumed))) is not None:
                print(describe_finished(Path(resumed), summary), flush=True)
                return
            begun.append(Path(resumed))
            result = resume_run(Path(resumed), display, transport)
        else:
            changes = shlex.split(str(run_config.get("set") or ""))
            if simulated(grid):
                changes.append("flower.clients=config")
                display.say(SIMULATED)
            config = load_config(_found(str(run_config.get("config") or "run.toml")), changes)
            result = start_run(config, display, transport, say_way_on)
    except (HetLoraError, httpx.HTTPError) as error:
        lost = "the connection to the SuperLink is lost: " if isinstance(error, httpx.TransportError) else ""
        way_on = next((f"; {_way_on(folder)}" for folder in begun if any(folder.glob("checkpoints/*"))), "")
        if isinstance(error, httpx.HTTPError) or way_on:
            raise HetLoraError(f"{lost}{error}{way_on}") from error
        raise
    print(describe_result(_located(result)), flush=True)


def _way_on(folder: Path) -> str:
    """Return how an interrupted run is resumed."""
    resume = json.dumps(str(folder.absolute()), ensure_ascii=False)
    return f"start it again with --run-config {shlex.quote(f'resume={resume}')}"


def simulated(grid: Grid) -> bool:
    """Return whether the nodes of a grid are processes of Flower's simulation, which have no rows of their own."""
    from flwr.superlink.grid import InMemoryGrid

    return isinstance(grid, InMemoryGrid)


def _located(result: RunResult) -> RunResult:
    """Return a result with whole paths: a SuperLink may have been started in another folder than `flwr run`."""
    adapter = None if result.adapter is None else result.adapter.absolute()
    return replace(result, adapter=adapter, records=result.records.absolute())


def _found(name: str) -> Path:
    """Find a file in the bundle, which Flower puts on the module path, or in the working directory."""
    places = [*(Path(entry) / name for entry in sys.path if entry), Path(name)]
    return next((place for place in places if place.is_file()), Path(name))
