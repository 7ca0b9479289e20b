"""Local training of a batch of clients in one forward and backward pass.

The factors of G clients lie in tensors `A [G, r, in]`, `B [G, out, r]`, padded to the widest rank. Each client keeps its
own loss, gradient norm, optimiser state, number of steps and failures: nothing is summed over clients, so the result is
that of training them one after another.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hetlora.adapter import Adapter, batch, map_tensors, unbatch
from hetlora.data.text import Example, collate
from hetlora.errors import ModelError
from hetlora.federated import ClientFailure, ClientUpdate, Folded, Penalty, TrainTask
from hetlora.lora_model import IGNORED, LoraModel

__all__ = ["LocalTraining", "local_batches", "train_clients"]


@dataclass(frozen=True)
class LocalTraining:
    """What a client does with its data in one round.

    Every round starts a fresh optimiser: its state belongs to a rank that may change, and a device need not keep it.

    Attributes:
        learning_rate: Step size of the optimiser.
        batch_size: Rows a step; a client with fewer takes all it has.
        steps: Optimiser steps a round, the same for every client. Give either this or `epochs`.
        epochs: Passes over the client's own rows a round.
        optimizer: "adamw" (β = 0.9, 0.999, ε = 1e-8) or "sgd" (plain).
        weight_decay: Decoupled decay, of A and B alike.
        clip_norm: Largest norm of a client's gradient over all its factors; None for no clipping.

    Raises:
        ValueError: Neither or both of steps and epochs are given, or a value is out of its range.
    """

    learning_rate: float = 1e-3
    batch_size: int = 8
    steps: int | None = None
    epochs: int | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps={self.steps}, epochs={self.epochs}: give either steps or epochs, and not both")
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer={self.optimizer!r} is not allowed; use adamw or sgd")
        for name in ("learning_rate", "batch_size", "steps", "epochs", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r} is not allowed; use more than 0")

    def count(self, rows: int) -> int:
        """Return the number of steps of a client with so many rows.

        Example:
            >>> LocalTraining(epochs=2, batch_size=8).count(20)
            6
        """
        if self.epochs is None:
            return self.steps or 0
        return self.epochs * math.ceil(rows / self.batch_size)

    def make_optimizer(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Return the optimiser over stacked factors; it works element by element, so clients do not meet in it."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)


def local_batches(examples: Sequence[Example], batch_size: int, steps: int, seed: str) -> Iterator[list[Example]]:
    """Yield `steps` batches: epochs reshuffled by `seed`, the last batch of an epoch as short as it comes.

    Depends on the seed and the client's own rows alone, so that the order is the same on every engine.
    """
    rng, order, start = random.Random(seed), list(range(len(examples))), len(examples)
    for _ in range(steps):
        if start >= len(examples):
            rng.shuffle(order)
            start = 0
        yield [examples[index] for index in order[start : start + batch_size]]
        start += batch_size


def train_clients(
    model: LoraModel,
    tasks: Sequence[TrainTask],
    examples: Sequence[Sequence[Example]],
    settings: LocalTraining,
    penalty: Penalty | None = None,
    *,
    seed: int = 0,
    pad_id: int = 0,
) -> list[ClientUpdate | ClientFailure]:
    """Train G clients together; each one minimises its own mean loss a scored token, plus the penalty.

    A client that has done its steps stands still. A client whose loss or gradient is not finite stops there and is
    returned as a failure; the others go on as if it had not been there.

    Args:
        model: The shared frozen base with its LoRA layers.
        tasks: What each client received.
        examples: Each client's training examples.
        settings: Optimiser, steps and batch size.
        penalty: From the live factors `[G, ...]` to a value a client `[G]`.
        seed: Of the run; with round and client it fixes the order of the rows.
        pad_id: Token id of the padding.

    Raises:
        ValueError: The tasks do not train the same factors over the same base.

    Returns:
        One update or failure a task, in the order of the tasks.
    """
    if not all(task.trains == tasks[0].trains and _same_base(task.folded, tasks[0].folded) for task in tasks):
        raise ValueError("the tasks of a batch train different factors or another base; train them apart")
    factors = map_tensors(lambda factor: factor.to(model.device, copy=True), batch([task.adapter for task in tasks]))
    for pair, letter in itertools.product(factors.values(), tasks[0].trains):
        getattr(pair, letter).requires_grad_()
    steps = [settings.count(len(rows)) if rows else 0 for rows in examples]
    progress = _fit(model, factors, tasks, examples, steps, settings, penalty, seed, pad_id)
    trained = unbatch(map_tensors(lambda factor: factor.detach().cpu(), factors), [task.rank for task in tasks])
    return [
        _answer(task, adapter, len(rows), count, progress.losses[index], progress.failures.get(index))
        for index, (task, adapter, rows, count) in enumerate(zip(tasks, trained, examples, steps, strict=True))
    ]


def _same_base(one: Folded, other: Folded) -> bool:
    """Whether both fold the same into the base. In a simulation it is one object, and nothing is compared."""
    if one.delta is other.delta:
        return True
    return one.delta.keys() == other.delta.keys() and all(
        torch.equal(part, other.delta[module]) for module, part in one.delta.items()
    )


@dataclass
class _Progress:
    """What happened to each client of a batch: its losses, and why it stopped early."""

    losses: list[list[float]]
    failures: dict[int, str]


def _fit(
    model: LoraModel,
    factors: Adapter,
    tasks: Sequence[TrainTask],
    examples: Sequence[Sequence[Example]],
    steps: Sequence[int],
    settings: LocalTraining,
    penalty: Penalty | None,
    seed: int,
    pad_id: int,
) -> _Progress:
    """Train `factors` in place."""
    parameters = [factor for pair in factors.values() for factor in pair if factor.requires_grad]
    optimizer = settings.make_optimizer(parameters)
    streams = [
        local_batches(rows, settings.batch_size, count, f"{seed}:{task.round}:{task.client}")
        for task, rows, count in zip(tasks, examples, steps, strict=True)
    ]
    progress = _Progress([[] for _ in tasks], {})
    for step in range(max(steps)):
        active = [step < count and index not in progress.failures for index, count in enumerate(steps)]
        if not any(active):
            break
        # Idle clients at the end of the batch cost nothing.
        width = 1 + max(index for index, is_active in enumerate(active) if is_active)
        rows = [next(stream) if is_active else [] for stream, is_active in zip(streams, active, strict=True)]
        losses = _losses(model, factors, tasks[0].folded, rows[:width], pad_id)
        objective = losses.sum() if penalty is None else losses.sum() + penalty(factors).sum()
        optimizer.zero_grad()
        objective.backward()  # type: ignore[no-untyped-call]
        norms = _gradient_norms(parameters)
        for index, (loss, norm) in enumerate(zip(losses.tolist(), norms.tolist(), strict=False)):
            if active[index] and math.isfinite(loss) and math.isfinite(norm):
                progress.losses[index].append(loss)
            elif active[index]:
                progress.failures[index] = f"loss {loss}, gradient norm {norm} at local step {step + 1}"
                active[index] = False
        _step(optimizer, parameters, torch.tensor(active, device=model.device), norms, settings.clip_norm)
    return progress


def _losses(
    model: LoraModel, factors: Adapter, folded: Folded, rows: Sequence[Sequence[Example]], pad_id: int
) -> Tensor:
    """Return each client's mean negative log-likelihood a scored token `[G]` on its batch of rows."""
    most = max(len(own) for own in rows)
    nothing = Example((), 0)
    padded = [example for own in rows for example in (*own, *[nothing] * (most - len(own)))]
    input_ids, labels = collate(padded, pad_id)
    model.use(map_tensors(lambda factor: factor[: len(rows)], factors), folded.delta)
    values = model.negative_log_likelihoods(input_ids.to(model.device), labels.to(model.device))
    counts = (labels[:, 1:] != IGNORED).view(len(rows), -1).sum(dim=1).clamp_min(1)
    return values.view(len(rows), -1).sum(dim=1) / counts.to(model.device)


def _gradient_norms(parameters: Sequence[Tensor]) -> Tensor:
    """Return the norm of each client's gradient over all factors `[G]`."""
    norms = [torch.linalg.vector_norm(_gradient(parameter), dim=(1, 2)) for parameter in parameters]
    whole: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return whole


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise ModelError(
            "a target module takes no part in the model's computation; take it out of model.target_modules"
        )
    return parameter.grad


def _step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    active: Tensor,
    norms: Tensor,
    clip_norm: float | None,
) -> None:
    """Clip each client's gradient and take an optimiser step with the active clients only."""
    keep = active[:, None, None]
    # 1e-6 as in torch.nn.utils.clip_grad_norm_, which a client on its own would call.
    scale = torch.ones_like(norms) if clip_norm is None else (clip_norm / (norms + 1e-6)).clamp_max(1.0)
    for parameter in parameters:
        parameter.grad = torch.where(keep, _gradient(parameter) * scale[:, None, None], 0.0)
    if bool(active.all()):
        optimizer.step()
        return
    # Momentum and weight decay would go on moving a client without gradient. One that stopped never starts again in this
    # round, so what its optimiser state becomes does not matter.
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(torch.where(keep, parameter, value))


def _answer(
    task: TrainTask, adapter: Adapter, rows: int, steps: int, losses: Sequence[float], failure: str | None
) -> ClientUpdate | ClientFailure:
    if failure is not None:
        return ClientFailure(task.client, f"training broke down: {failure}")
    if not losses:
        return ClientFailure(task.client, "it has no training rows")
    mean = sum(losses) / len(losses)
    return ClientUpdate(task.client, task.round, task.rank, adapter, rows, steps, mean)
