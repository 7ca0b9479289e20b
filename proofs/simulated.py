"""Small federations that train by a pure function of their task: nothing is loaded, and every number repeats."""

from __future__ import annotations

import zlib

import numpy as np
import torch

from hetlora.core.adapter import LoraPair, ModuleShape, Rank, map_tensors, zeros
from hetlora.core.types import ClientUpdate, ServerState, TrainTask

__all__ = ["SHAPES", "first_state", "trained"]

SHAPES = {"layers.0.q": ModuleShape(3, 5), "layers.1.q": ModuleShape(3, 5), "layers.0.v": ModuleShape(4, 2)}


def first_state(seed: int, rank: Rank, round_number: int = 0) -> ServerState:
    """Return a state with normally distributed factors."""
    rng = np.random.default_rng(seed)
    adapter = map_tensors(
        lambda factor: torch.from_numpy(rng.standard_normal(tuple(factor.shape))).float(), zeros(SHAPES, rank)
    )
    return ServerState(adapter, round=round_number, seed=seed)


def trained(task: TrainTask) -> ClientUpdate:
    """Return what a client comes to: by its name and the round its tails grow or shrink, so that some of them prune."""
    seed = zlib.crc32(f"{task.client} in round {task.round}".encode())
    rng = np.random.default_rng(seed)
    size = 1.5 if seed % 2 else 0.3
    adapter = {
        name: LoraPair(
            *(
                size * factor + 0.2 * torch.from_numpy(rng.standard_normal(tuple(factor.shape))).float()
                if letter in task.trains
                else factor
                for letter, factor in zip("AB", pair, strict=True)
            )
        )
        for name, pair in task.adapter.items()
    }
    return ClientUpdate(task.client, task.round, task.rank, adapter, 1 + seed % 9, 1 + seed % 4, float(seed % 100) / 10)
