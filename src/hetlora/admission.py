"""What an update must satisfy before the round's sum sees it; a refused update costs the round only that client."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hetlora.adapter import rank_of
from hetlora.errors import RefusedUpdateError

if TYPE_CHECKING:
    from hetlora.federated import ClientUpdate, TrainTask

__all__ = ["admit"]


def admit(update: ClientUpdate, tasks: Mapping[str, TrainTask], answered: Collection[str]) -> TrainTask:
    """Return the task that `update` answers, or refuse it.

    Checked, in this order: a known client, once a round, the right round, a sane loss and number of examples and steps,
    the very modules that were sent, float32, `1 <= rank <= assigned rank`, the shapes that follow from it, and that
    every number is finite.

    Raises:
        RefusedUpdateError: Names the client, the module and both values.
    """
    task = tasks.get(update.client)
    who = f"client {update.client!r}"
    if task is None:
        raise RefusedUpdateError(f"{who} was not asked in round {update.round}")
    _require(update.client not in answered, f"{who} answered round {task.round} twice")
    _require(update.round == task.round, f"{who} answered round {update.round}, asked was round {task.round}")
    _require(
        update.examples >= 1 and update.steps >= 0, f"{who} reports {update.examples} examples, {update.steps} steps"
    )
    _require(math.isfinite(update.loss), f"{who} reports a training loss of {update.loss}")
    different = sorted(update.adapter.keys() ^ task.adapter.keys())
    _require(not different, f"{who} sent other modules than it received: {', '.join(different)}")
    for module, (sent_a, sent_b) in task.adapter.items():
        rank, assigned = rank_of(update.rank, module), rank_of(task.rank, module)
        _require(
            1 <= rank <= assigned, f"{who}, {module}: rank {rank} is not within 1 ... {assigned}, its assigned rank"
        )
        A, B = update.adapter[module]
        _check(who, f"{module}.A", A, (rank, sent_a.shape[1]))
        _check(who, f"{module}.B", B, (sent_b.shape[0], rank))
    return task


def _check(who: str, what: str, factor: Tensor, shape: tuple[int, int]) -> None:
    _require(factor.dtype == torch.float32, f"{who}, {what}: {factor.dtype} arrived, expected torch.float32")
    _require(tuple(factor.shape) == shape, f"{who}, {what}: shape {tuple(factor.shape)} arrived, expected {shape}")
    _require(bool(torch.isfinite(factor).all()), f"{who}, {what}: holds an infinity or NaN")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RefusedUpdateError(otherwise)
