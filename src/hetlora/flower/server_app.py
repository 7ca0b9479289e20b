"""The Flower server app: reads a run's file and executes the run over Flower's nodes, without Flower's strategies."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

    display, transport = PlainDisplay(), Transport(grid)
    if folder := str(run_config.get("resume") or ""):
        if (summary := read_summary(Path(folder))) is not None:
            print(describe_finished(Path(folder), summary), flush=True)
            return
        result = resume_run(Path(folder), display, transport)
    else:
        changes = shlex.split(str(run_config.get("set") or ""))
        if simulated(grid):
            changes.append("flower.clients=config")
            display.say(SIMULATED)
        config = load_config(_found(str(run_config.get("config") or "run.toml")), changes)
        result = start_run(config, display, transport)
    print(describe_result(_located(result)), flush=True)


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
