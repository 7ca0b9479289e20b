"""Plans parallel work within a memory limit, and explains what to lower when memory runs out."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from hetlora.config import RunConfig
from hetlora.core.aggregation import WAITING
from hetlora.errors import ConfigError, HetLoraError
from hetlora.runs.text import megabytes
from hetlora.training.cost_model import CostModel, LocalWork
from hetlora.training.local import TOKENS_A_PASS

__all__ = ["MemoryPlan", "explain_oom", "fit_memory", "peak_megabytes"]

COPIES = 5
"""Copies of a client's factors while it trains: received, values, gradients and the two moments of AdamW."""


@dataclass(frozen=True)
class MemoryPlan:
    """Limits of parallel work.

    Attributes:
        tokens_a_pass: Tokens per forward pass.
        workers: Groups of clients that train at the same time; None for one per thread.
        clients_a_group: Most clients per group; None for as many as its tokens allow.
        predicted: Predicted bytes of base, server state and training; None without a limit.
    """

    tokens_a_pass: int = TOKENS_A_PASS
    workers: int | None = None
    clients_a_group: int | None = None
    predicted: int | None = None


def fit_memory(config: RunConfig, costs: CostModel, largest: int, threads: int) -> MemoryPlan:
    """Return the largest parallel work within `memory_megabytes`.

    It must hold `base + server + workers (pass + 5 clients factors)`. The server holds the global adapter, its sum on two
    grids of 64-bit numbers, the updates that wait to be added, and with `[robustness]` a round's updates twice. The cost model
    traces the memory of a pass. First the tokens per pass are lowered, down to one row of `data.max_length`, then the workers,
    then the clients per group. The plan ignores currently free memory, so that runs are reproducible. Not included are the
    moments of a server optimiser, the second adapter of methods that average over rounds, and the stacks of methods that
    decompose products.

    Args:
        config: The run, with `memory_megabytes`.
        costs: The cost model of its base.
        largest: The largest rank.
        threads: Groups that train at the same time without a limit.

    Raises:
        ConfigError: One client with one row at a time does not fit; states the memory that is needed.
        ModelError: The cost model cannot trace the base.
    """
    assert config.memory_megabytes is not None
    limit, length = config.memory_megabytes * 1e6, config.data.max_length
    factors = costs.lora(largest, LocalWork.bound(1, 8, 1)).parameters * torch.float32.itemsize
    server = 5 * factors + min(WAITING, config.federation.clients_per_round * factors)
    if config.robustness is not None:
        server += 2 * config.federation.clients_per_round * factors  # as received, and as bounded
    fixed = costs.base_bytes + server
    tokens = [max(length, TOKENS_A_PASS >> halved) for halved in range(8) if TOKENS_A_PASS >> halved >= length] or [
        length
    ]

    @functools.cache  # a trace takes a second, and most runs need only the first one
    def a_pass(count: int) -> int:
        return _pass_bytes(costs, largest, count, length, factors)

    a_group = -(-config.federation.clients_per_round // threads)
    for clients in sorted({a_group, max(1, a_group // 2), 1}, reverse=True):
        for workers in range(threads, 0, -1):
            for count in tokens:
                needed = fixed + workers * (a_pass(count) + COPIES * clients * factors)
                if needed <= limit:
                    return MemoryPlan(count, workers, clients, round(needed))
    parts = f"base {costs.base_bytes / 1e6:.1f}, server {server / 1e6:.1f}, its factors of rank {largest} "
    parts += f"{COPIES * factors / 1e6:.1f}, a pass of one row of {length} tokens {a_pass(tokens[-1]) / 1e6:.1f}"
    needed = fixed + a_pass(tokens[-1]) + COPIES * factors
    problem = (
        f"memory_megabytes = {config.memory_megabytes:g}: one client at a time needs {megabytes(needed, '.1f')} ({parts}); "
        "give that much, or lower data.max_length or the largest rank, or set model.dtype or model.quantize to fewer bits"
    )
    raise ConfigError("the configuration", [problem])


def _pass_bytes(costs: CostModel, rank: int, tokens: int, length: int, factors: int) -> int:
    work = LocalWork.bound(max(1, tokens // length), length)
    return max(0, costs.lora(rank, work).peak_bytes - costs.base_bytes - COPIES * factors)


def peak_megabytes(device: torch.device) -> float | None:
    """Return the peak memory of this process, in 10⁶ bytes; None if the system does not report it.

    It is resident memory on a CPU, that of tensors on a GPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if sys.platform.startswith("linux") and status.exists():
        # Not getrusage, whose maximum is inherited from the parent process.
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024 / 1e6
    return None


@contextlib.contextmanager
def explain_oom() -> Iterator[None]:
    """Turn out-of-memory errors into one that says what to do.

    Raises:
        HetLoraError: A tensor could not be allocated.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise HetLoraError(
            f"out of memory ({reason}); set memory_megabytes to what the process may hold, or lower threads, data.max_length "
            "or the ranks, or set model.dtype or model.quantize to fewer bits"
        ) from error
