"""Local training of a batch of clients in one forward and backward pass.

The factors of G clients are tensors `A [G, r, in]`, `B [G, out, r]`, padded to the widest rank. Each client has its own loss,
gradient norm, optimiser state, number of steps and failures. Nothing is summed over clients, so the result equals that of
training them one after another.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hetlora.core.adapter import Adapter, map_tensors, unbatch
from hetlora.core.admission import UpdateBound
from hetlora.core.method import Penalty
from hetlora.core.types import BaseDelta, ClientFailure, ClientUpdate, TrainTask
from hetlora.data.tokenization import Example
from hetlora.model.lora_model import LoraModel
from hetlora.model.packing import Pack, pack_rows
from hetlora.training.batched_factors import BatchedFactors

__all__ = ["TOKENS_A_PASS", "LocalTraining", "local_batches", "train_clients"]

TOKENS_A_PASS = 1024
"""Tokens per forward pass, enough to hide the overhead of a pass and few enough to keep its activations in the cache."""

BETA_1, BETA_2 = 0.9, 0.999
"""AdamW's β₁ and β₂."""
LONG = 20_000
"""After so many steps the bound of an AdamW step equals its limit, to nine digits."""


@dataclass(frozen=True)
class LocalTraining:
    """Settings of a client's training in one round.

    Every round starts a fresh optimiser: the rank may change, and a device need not keep the state.

    Attributes:
        learning_rate: Step size of the optimiser.
        batch_size: Rows per step; a client with fewer rows uses all of them.
        steps: Optimiser steps per round, the same for every client. Give either this or `epochs`.
        epochs: Passes over the client's rows per round.
        optimizer: "adamw" (β = 0.9, 0.999, ε = 1e-8) or "sgd" (plain).
        weight_decay: Decoupled decay of A and B.
        clip_norm: Largest norm of a client's gradient over all its factors; None for no clipping.

    Raises:
        ValueError: Not exactly one of steps and epochs is given, or a value is out of its range.
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
        """Return the number of steps of a client with this number of rows.

        Example:
            >>> LocalTraining(epochs=2, batch_size=8).count(20)
            6
        """
        if self.epochs is None:
            return self.steps or 0
        return self.epochs * math.ceil(rows / self.batch_size)

    def reach(self, steps: int) -> UpdateBound:
        """Return how far this number of steps can move a client's factors, for any data.

        Step t of AdamW moves a number by `η |m̂_t| / (√v̂_t + ε)`. By the Cauchy-Schwarz inequality, with `q = β₁² / β₂`,

            `|m̂_t| / √v̂_t <= ρ_t = (1 - β₁) / (1 - β₁ᵗ) · √((1 - β₂ᵗ) / (1 - β₂) · (1 - qᵗ) / (1 - q))`,

        which is 1 at t = 1 and 7.3 for large t, so a number moves by at most `η Σ_t ρ_t`. A clipped SGD step moves all numbers
        of a client together by at most `η c`; without clipping there is no bound. Weight decay multiplies by `1 - η w`.
        Rounding to float32 adds `2⁻²³` of a number per step.

        Example:
            >>> reach = LocalTraining(learning_rate=1e-3, steps=5).reach(5)
            >>> round(reach.each / 1e-3, 3)  # five learning rates, and hardly more
            5.022
        """
        rate = self.learning_rate
        if self.optimizer == "adamw":
            each, joint = rate * _steps_of_adamw(steps), math.inf
        else:
            each = joint = math.inf if self.clip_norm is None else rate * steps * self.clip_norm
        if rate * self.weight_decay > 2.0:  # a step overshoots by more than the value
            return UpdateBound(math.inf, math.inf, math.inf)
        decay = steps * rate * self.weight_decay
        # Decay also acts on what gradients have moved.
        return UpdateBound((1 + decay) * each, (1 + decay) * joint, decay + steps * 2.0**-23)

    def make_optimizer(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Return the optimiser of the stacked factors; it works element by element, so it keeps clients apart."""
        rate, decay = self.learning_rate, self.weight_decay
        if self.optimizer == "adamw":
            # Unfused, AdamW takes a dozen passes over values, gradients and moments.
            return torch.optim.AdamW(parameters, rate, betas=(BETA_1, BETA_2), weight_decay=decay, fused=True)
        return torch.optim.SGD(parameters, rate, weight_decay=decay)


@functools.lru_cache(maxsize=1024)  # bounded, because with epochs the client reports its steps
def _steps_of_adamw(steps: int) -> float:
    """Return `Σ_t ρ_t`: how far AdamW can move a number, in learning rates."""
    q = BETA_1**2 / BETA_2
    first = sum(
        (1 - BETA_1) / (1 - BETA_1**t) * math.sqrt((1 - BETA_2**t) / (1 - BETA_2) * (1 - q**t) / (1 - q))
        for t in range(1, min(steps, LONG) + 1)
    )
    return first + max(0, steps - LONG) * (1 - BETA_1) / math.sqrt((1 - BETA_2) * (1 - q))


def local_batches(examples: Sequence[Example], batch_size: int, steps: int, seed: str) -> Iterator[list[Example]]:
    """Yield `steps` batches. Every epoch is reshuffled by `seed`; its last batch may be short.

    The order depends on the seed and the client's rows only, so it is the same on every engine.
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
    tokens_a_pass: int = TOKENS_A_PASS,
) -> list[ClientUpdate | ClientFailure]:
    """Train G clients together; each minimises its own mean loss per scored token, plus the penalty.

    A client that has done its steps no longer changes. A client whose loss or gradient is not finite stops and is returned as a
    failure; this does not affect the others.

    Args:
        model: The shared frozen base with its LoRA layers.
        tasks: One task per client.
        examples: Each client's training examples.
        settings: Optimiser, steps and batch size.
        penalty: Maps the live factors `[G, ...]` to one value per client `[G]`.
        seed: Seed of the run; with round and client it fixes the order of the rows.
        tokens_a_pass: Most tokens per forward pass, unless a row is longer.

    Raises:
        ValueError: The tasks do not train the same factors over the same base.

    Returns:
        One update or failure per task, in the order of the tasks.
    """
    if not all(task.trains == tasks[0].trains and _same_base(task.folded, tasks[0].folded) for task in tasks):
        raise ValueError("the tasks of a batch train different factors or another base; train them apart")
    factors = BatchedFactors([task.adapter for task in tasks], tasks[0].trains, model.device)
    steps = [settings.count(len(rows)) if rows else 0 for rows in examples]
    progress = _fit(model, factors, tasks, examples, steps, settings, penalty, seed, tokens_a_pass)
    trained = unbatch(map_tensors(lambda factor: factor.detach().cpu(), factors.adapter), [task.rank for task in tasks])
    return [
        _answer(task, adapter, len(rows), count, progress.losses[index], progress.failures.get(index))
        for index, (task, adapter, rows, count) in enumerate(zip(tasks, trained, examples, steps, strict=True))
    ]


def _same_base(first: BaseDelta, second: BaseDelta) -> bool:
    """Return whether both fold the same change into the base. In a simulation both are one object."""
    if first.delta is second.delta:
        return True
    return first.delta.keys() == second.delta.keys() and all(
        torch.equal(part, second.delta[module]) for module, part in first.delta.items()
    )


@dataclass
class _Progress:
    """Losses of each client of a batch, and the reason where a client failed."""

    losses: list[list[float]]
    failures: dict[int, str]


def _fit(
    model: LoraModel,
    factors: BatchedFactors,
    tasks: Sequence[TrainTask],
    examples: Sequence[Sequence[Example]],
    steps: Sequence[int],
    settings: LocalTraining,
    penalty: Penalty | None,
    seed: int,
    tokens_a_pass: int,
) -> _Progress:
    """Train `factors` in place."""
    optimizer = settings.make_optimizer([factors.values])
    streams = [
        local_batches(rows, settings.batch_size, count, f"{seed}:{task.round}:{task.client}")
        for task, rows, count in zip(tasks, examples, steps, strict=True)
    ]
    progress = _Progress([[] for _ in tasks], {})
    ranks = [task.rank for task in tasks]
    for step in range(max(steps)):
        active = [step < count and index not in progress.failures for index, count in enumerate(steps)]
        if not any(active):
            break
        rows = [next(stream) if is_active else [] for stream, is_active in zip(streams, active, strict=True)]
        model.use(factors.adapter, tasks[0].folded.delta, ranks)
        losses = torch.zeros(len(tasks), device=model.device)
        scored = torch.tensor([max(1, sum(row.scored for row in own)) for own in rows], device=model.device)
        for part in micro_batches(rows, tokens_a_pass):
            sums = client_losses(model, pack_rows(part)) / scored
            sums.sum().backward()  # type: ignore[no-untyped-call]
            losses += sums.detach()
        if penalty is not None:
            penalty(factors.adapter).sum().backward()  # type: ignore[no-untyped-call]
        factors.collect_gradients()
        norms = torch.linalg.vector_norm(factors.gradients, dim=1)
        for index, (loss, norm) in enumerate(zip(losses.tolist(), norms.tolist(), strict=True)):
            if active[index] and math.isfinite(loss) and math.isfinite(norm):
                progress.losses[index].append(loss)
            elif active[index]:
                progress.failures[index] = f"loss {loss}, gradient norm {norm} at local step {step + 1}"
                active[index] = False
        factors.step(optimizer, active, norms, settings.clip_norm)
    return progress


def micro_batches(rows: Sequence[Sequence[Example]], tokens: int) -> Iterator[list[list[Example]]]:
    """Divide the rows of a step of G clients into passes of at most `tokens` tokens, unless a row is longer.

    Their gradients add up, so the memory of activations does not grow with the batch.

    Example:
        >>> five, three = Example((1,) * 5, 1), Example((2,) * 3, 1)
        >>> [[len(own) for own in part] for part in micro_batches([[five, three], [three]], tokens=8)]
        [[2, 0], [0, 1]]
    """
    part: list[list[Example]] = [[] for _ in rows]
    room = tokens
    for client, own in enumerate(rows):
        for row in own:
            if len(row.ids) > room and any(part):
                yield part
                part, room = [[] for _ in rows], tokens
            part[client].append(row)
            room -= len(row.ids)
    if any(part):
        yield part


def client_losses(model: LoraModel, packed: Pack) -> Tensor:
    """Return the sum of the negative log-likelihoods of the scored tokens, per client `[G]`."""
    values = model.losses(packed)
    return torch.zeros(len(packed.counts), device=values.device).index_add(0, packed.owners.to(values.device), values)


def _answer(
    task: TrainTask, adapter: Adapter, rows: int, steps: int, losses: Sequence[float], failure: str | None
) -> ClientUpdate | ClientFailure:
    if failure is not None:
        return ClientFailure(task.client, f"training broke down: {failure}")
    if not losses:
        return ClientFailure(task.client, "it has no training rows")
    mean = sum(losses) / len(losses)
    return ClientUpdate(task.client, task.round, task.rank, adapter, rows, steps, mean)
