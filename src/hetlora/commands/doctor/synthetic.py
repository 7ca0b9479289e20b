"""A server's state and answers that are made up, for what a method promises of any."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from hetlora.core.adapter import Adapter, LoraPair, ModuleShape
from hetlora.core.method import Method
from hetlora.core.types import ClientUpdate, ServerState, TrainTask

__all__ = ["Replay", "fold", "made_up_state", "moved", "update_of"]


def made_up_state(shapes: Mapping[str, ModuleShape], rank: int, seed: int = 0) -> ServerState:
    """Return a state in the midst of a run: factors of the size that training gives, B included."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: int, columns: int, width: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(width)

    adapter = {
        path: LoraPair(drawn(rank, width, width), drawn(height, rank, width))
        for path, (height, width) in shapes.items()
    }
    return ServerState(adapter, seed=seed)


def moved(task: TrainTask, seed: int, size: float = 1e-2) -> Adapter:
    """Return the factors of a task, those that train moved a little."""
    generator = torch.Generator().manual_seed(seed)

    def step(factor: torch.Tensor, letter: str) -> torch.Tensor:
        return factor + size * torch.randn(factor.shape, generator=generator) if letter in task.trains else factor

    return {path: LoraPair(step(A, "A"), step(B, "B")) for path, (A, B) in task.adapter.items()}


def update_of(task: TrainTask, adapter: Adapter) -> ClientUpdate:
    """Return the answer of a client that has come to these factors on two rows."""
    return ClientUpdate(task.client, task.round, task.rank, adapter, examples=2, steps=1, loss=1.0)


def fold(method: Method[Any], state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
    """Return what the method makes of these updates, added in this order."""
    total = method.start(state)
    for update in updates:
        total = method.add(total, update, method.weigh(update))
    return method.finish(state, total)


class Replay:
    """An engine that gives these answers, in this order."""

    def __init__(self, updates: Sequence[ClientUpdate]) -> None:
        self.updates = updates

    def train(self, tasks: Sequence[TrainTask], method: Method[Any]) -> Iterator[ClientUpdate]:  # noqa: ARG002
        """Yield them."""
        yield from self.updates
