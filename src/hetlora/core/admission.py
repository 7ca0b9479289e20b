"""The checks of an update before it enters the round's sum. A refused update costs the round only that client."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hetlora.core.adapter import FlatAdapter, rank_of
from hetlora.core.types import ClientUpdate, TrainTask
from hetlora.errors import RefusedUpdateError, printable

__all__ = ["AdmissionRule", "ExpectedTraining", "UpdateBound", "admit"]


MOST_EXAMPLES = 10**12
"""Largest number of training examples; a larger one is an attack on a weighted average, or a bug."""
MOST_STEPS = 2**63 - 1
"""The largest 64-bit integer, the type that readers of the records use."""
MOST_MESSAGE = 500
"""Characters of a Python error that a refusal quotes; such an error may quote all that arrived."""

SLACK = 1.05
"""Factor on the bound of local training, for the rounding of float32."""


@dataclass(frozen=True)
class UpdateBound:
    """The largest distance that local training can move factors; see `hetlora.training.local.LocalTraining.reach`.

    A number x moves by at most `each + decay max|x|`, with the maximum over its factor. All numbers of a client together move
    by at most `joint + decay ‖x‖`, in the Euclidean norm.

    Attributes:
        each: The largest distance that gradients move a number; infinite if unbounded.
        joint: The largest distance that gradients move all numbers of a client together; infinite if unbounded.
        decay: The share of the number itself that weight decay and rounding add.
    """

    each: float
    joint: float
    decay: float


class ExpectedTraining(Protocol):
    """The training of an honest client, as far as the server knows it; `hetlora.training.local.LocalTraining`."""

    def count(self, rows: int) -> int:
        """Return the number of local steps of a client with `rows` rows."""
        ...

    def reach(self, steps: int) -> UpdateBound:
        """Return how far `steps` steps can move a client's factors."""
        ...


@dataclass(frozen=True)
class AdmissionRule:
    """Properties of an honest update beyond its task, as far as they are known.

    Attributes:
        training: The client's training; None admits any factors.
        lowest_rank: From an assigned rank, returns the lowest rank that pruning can leave; None admits any.
        rounding: The largest change of a number on its way to the server, as a share of the largest change of its slot.
    """

    training: ExpectedTraining | None = None
    lowest_rank: Callable[[int], int] | None = None
    rounding: float = 0.0


NOTHING_KNOWN = AdmissionRule()


def admit(
    update: ClientUpdate,
    tasks: Mapping[str, TrainTask],
    answered: Collection[str],
    expected: AdmissionRule = NOTHING_KNOWN,
) -> TrainTask:
    """Return the task that `update` answers, or refuse the update.

    The checks, in this order:

    1. the client was asked, and has not answered in this round;
    2. the round is this one;
    3. examples and steps are whole numbers within bounds, and the loss is finite;
    4. the modules are those of the task;
    5. the rank is at most the assigned one, and at least the lowest that pruning can leave;
    6. each factor is a plain dense float32 tensor without a gradient, of the right shape, finite, and unchanged if frozen;
    7. with `expected.training`: the examples determine the steps, and no factor moved further than the steps can move it.

    No type is trusted before its check: for any object the result is a task or a refusal.

    Args:
        update: The object that arrived.
        tasks: The round's tasks, by client.
        answered: Clients whose updates were admitted in this round.
        expected: Properties of an honest update beyond its task.

    Raises:
        RefusedUpdateError: Names the client, the module and both values.
    """
    try:
        task = _admit(update, tasks, answered, expected.lowest_rank or (lambda _: 1))
        if expected.training is not None:
            _check_reach(update, task, expected.training, expected.rounding)
    except RefusedUpdateError:
        raise
    except Exception as error:
        sender = repr(getattr(update, "client", None))
        raise _refusal(f"client {sender} sent a malformed update: {error!r}"[:MOST_MESSAGE]) from error
    return task


def _admit(
    update: ClientUpdate,
    tasks: Mapping[str, TrainTask],
    answered: Collection[str],
    lowest_rank: Callable[[int], int],
) -> TrainTask:
    sender = f"client {update.client!r}"
    task = tasks.get(update.client) if isinstance(update.client, str) else None
    if task is None:
        raise _refusal(f"{sender} was not asked in round {update.round}")
    _require(update.client not in answered, f"{sender} answered round {task.round} twice")
    same = _whole(update.round) and update.round == task.round
    _require(same, f"{sender} answered round {update.round}, asked was round {task.round}")
    examples, steps = update.examples, update.steps
    _require(_whole(examples) and 1 <= examples <= MOST_EXAMPLES, f"{sender} reports {examples} examples")
    _require(_whole(steps) and 0 <= steps <= MOST_STEPS, f"{sender} reports {steps} steps")
    number = isinstance(update.loss, float) or _whole(update.loss)
    _require(number and math.isfinite(update.loss), f"{sender} reports a training loss of {update.loss}")
    different = sorted(update.adapter.keys() ^ task.adapter.keys())
    _require(not different, f"{sender} sent other modules than it received: {', '.join(different)}")
    if isinstance(update.rank, Mapping):
        _require(update.rank.keys() == task.adapter.keys(), f"{sender} sent ranks of other modules than it received")
    for module, (sent_a, sent_b) in task.adapter.items():
        rank, assigned = rank_of(update.rank, module), rank_of(task.rank, module)
        if not (_whole(rank) and 1 <= rank <= assigned):
            raise _refusal(f"{sender}, {module}: rank {rank} is not within 1 ... {assigned}, its assigned rank")
        # By attribute, as the sums do: a plain tuple is no pair.
        A, B = update.adapter[module].A, update.adapter[module].B
        _check(sender, module, "A", A, (rank, sent_a.shape[1]))
        _check(sender, module, "B", B, (sent_b.shape[0], rank))
        _require(
            "A" in task.trains or torch.equal(A, sent_a[:rank]), f"{sender}, {module}.A: changed, though it is frozen"
        )
        _require(
            "B" in task.trains or torch.equal(B, sent_b[:, :rank]),
            f"{sender}, {module}.B: changed, though it is frozen",
        )
        if rank < (least := lowest_rank(assigned)):
            raise _refusal(
                f"{sender}, {module}: rank {rank} is not within {least} ... {assigned}, what pruning can have left"
            )
    if not (isinstance(update.adapter, FlatAdapter) and _finite(update.adapter.numbers)):
        for module, pair in update.adapter.items():
            for letter, factor in zip("AB", pair, strict=True):
                _require(_finite(factor), f"{sender}, {module}.{letter}: holds an infinity or NaN")
    return task


def _check(sender: str, module: str, letter: str, factor: Tensor, shape: tuple[int, int]) -> None:
    # Messages are formatted only on failure: this runs for every factor of every update.
    # A subclass of Tensor could behave differently in the sum, and a gradient would tie the state to the client's graph.
    plain = type(factor) is Tensor and factor.layout == torch.strided and not factor.is_meta
    if not plain or factor.requires_grad:
        raise _refusal(f"{sender}, {module}.{letter}: not a plain dense tensor without a gradient")
    if factor.dtype != torch.float32:
        raise _refusal(f"{sender}, {module}.{letter}: {factor.dtype} arrived, expected torch.float32")
    if factor.shape != shape:
        raise _refusal(f"{sender}, {module}.{letter}: shape {tuple(factor.shape)} arrived, expected {shape}")


def _check_reach(update: ClientUpdate, task: TrainTask, training: ExpectedTraining, rounding: float) -> None:
    """Refuse factors that no honest client can reach. An honest update always passes.

    A client sends its change c plus the rounding error e of its earlier rounds, with `|e| <= b max|c + e|` and b = `rounding`.
    So no number exceeds `limit / (1 - b)`.
    """
    sender, expected = f"client {update.client!r}", training.count(update.examples)
    _require(
        update.steps == expected, f"{sender} reports {update.steps} steps on {update.examples} examples, not {expected}"
    )
    reach = training.reach(expected)
    squares = dict.fromkeys(("moved", "began", "rounded"), 0.0)
    for module, sent in task.adapter.items():
        for letter, start, trained in zip("AB", sent, update.adapter[module], strict=True):
            if letter not in task.trains:
                continue
            own = start[: trained.shape[0], : trained.shape[1]]
            change = trained - own
            furthest = float(change.abs().max())
            limit = (reach.each + reach.decay * float(own.abs().max())) / (1.0 - rounding)
            if furthest > SLACK * limit:
                raise _refusal(
                    f"{sender}, {module}.{letter}: moved by {furthest:.3g}, and {limit:.3g} is as far as training goes"
                )
            if math.isfinite(reach.joint):
                slots = change if letter == "A" else change.mT
                squares["moved"] += float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2
                squares["began"] += float(torch.linalg.vector_norm(own, dtype=torch.float64)) ** 2
                squares["rounded"] += (
                    float((2.0 * rounding * slots.abs().amax(dim=1).double()).square().sum()) * slots.shape[1]
                )
    # The largest number of a slot bounds the rounding of all its numbers, once for this round and once for earlier ones.
    moved, began, rounded = (math.sqrt(square) for square in squares.values())
    limit = (reach.joint + reach.decay * began) / (1.0 - rounding)
    if moved > SLACK * limit + rounded:
        raise _refusal(f"{sender}: moved by {moved:.3g} in all, and {limit:.3g} is as far as training goes")


def _finite(factor: Tensor) -> bool:
    """Whether all numbers are finite. A finite sum proves it; a sum may also overflow, so that each number is looked at."""
    return math.isfinite(factor.sum()) or bool(torch.isfinite(factor).all())


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _refusal(otherwise)


def _refusal(message: str) -> RefusedUpdateError:
    """Return the error with this message, which may quote what arrived."""
    return RefusedUpdateError(printable(message))
