"""A run over Flower's simulation: Ray on this machine or a cluster, each process a node with some of the clients."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

__all__ = ["resume", "start"]

# No telemetry or updates; set before the first import of Flower or Ray.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
PATIENCE = 60.0
"""Seconds after Ctrl-C for the server to write its state."""

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402
from flwr.app import Context  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402

from hetlora.config import RunConfig  # noqa: E402
from hetlora.errors import ConfigError, HetLoraError  # noqa: E402
from hetlora.flower import launch as runs  # noqa: E402
from hetlora.flower.client_app import app as client_app  # noqa: E402
from hetlora.flower.launch import start_run  # noqa: E402
from hetlora.flower.transport import Transport  # noqa: E402
from hetlora.runs.observer import Observer  # noqa: E402
from hetlora.runs.reader import read_config  # noqa: E402
from hetlora.runs.result import RunResult  # noqa: E402


def start(config: RunConfig, display: Observer) -> RunResult:
    """Run over Flower's simulation and return the result.

    Each of the `flower.supernodes` nodes (by default one per core) is a process of one core that hosts a share of the clients.

    Raises:
        HetLoraError: As in-process, or ``flower.clients`` is not "config".
    """
    if config.flower.clients != "config":
        raise ConfigError(
            "the configuration", ["flower.clients = 'nodes' is for clients on machines of their own; use 'config' here"]
        )
    return _over_ray(lambda transport: start_run(config, display, transport), config.flower.supernodes)


def resume(folder: Path, display: Observer) -> RunResult:
    """Resume a run over Flower's simulation.

    Raises:
        HetLoraError: As `hetlora.runs.resume.resume_as`.
    """
    supernodes = read_config(folder).flower.supernodes
    return _over_ray(lambda transport: runs.resume_run(folder, display, transport), supernodes)


def _over_ray(serve: Callable[[Transport], RunResult], supernodes: int | None) -> RunResult:
    """Run `serve` as the server of a simulation."""
    from flwr.simulation import run_simulation  # loads Ray

    nodes = supernodes or os.cpu_count() or 1
    results: list[RunResult] = []
    errors: list[BaseException] = []
    server = ServerApp()
    stopped, ended = threading.Event(), threading.Event()

    @server.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001  Flower's signature
        try:
            results.append(serve(Transport(grid, stopped)))
        except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
            errors.append(error)
        finally:
            ended.set()

    gpus = torch.cuda.device_count()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    try:
        run_simulation(
            server_app=server,
            client_app=client_app,
            num_supernodes=nodes,
            backend_config={
                "init_args": {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR},
                "client_resources": {"num_cpus": 1, "num_gpus": min(1.0, gpus / nodes)},
            },
        )
    except KeyboardInterrupt:
        stopped.set()  # the server's thread ends its round and writes its state
        ended.wait(PATIENCE)
    except Exception as error:
        stopped.set()
        ended.wait(PATIENCE)
        if not errors and not results:
            raise HetLoraError(f"Flower's simulation failed: {error}") from error
    if errors:
        raise errors[0]
    if not results:
        raise HetLoraError("Flower's simulation ended without a result; its log says why")
    return results[0]
