"""The Flower server: reads a run's file and conducts it over Flower's nodes; no strategy of Flower's has a part in it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from hetlora.errors import HetLoraError

__all__ = ["app", "serve"]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Conduct the run that ``--run-config`` names."""
    from hetlora.runs.process import prepare_process, quiet_transformers

    prepare_process()
    quiet_transformers()
    try:
        serve(grid, context.run_config)
    except HetLoraError as error:
        # Flower marks a run as failed by the exception; its reason belongs in the log in words.
        print(f"hetlora: {error}", file=sys.stderr, flush=True)
        raise


def serve(grid: Grid, run_config: Mapping[str, Any]) -> None:
    """Conduct a run, or go on with one.

    Args:
        grid: Flower's.
        run_config: `config`, the run's TOML file, looked for in the app's bundle and then where the server runs; `set`,
            changes to it, ``key=value`` apart by spaces; `resume`, the folder of a run to go on with, instead of both.

    Raises:
        HetLoraError: The run cannot begin, or cannot go on.
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
        result = start_run(
            load_config(_found(str(run_config.get("config") or "run.toml")), changes), display, transport
        )
    print(describe_result(result), flush=True)


def _found(name: str) -> Path:
    """Return where a file of the run is: within the bundle, which Flower puts on the path of modules, or as named."""
    places = [*(Path(entry) / name for entry in sys.path if entry), Path(name)]
    return next((place for place in places if place.is_file()), Path(name))
