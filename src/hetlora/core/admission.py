"""What an update must satisfy before the round's sum sees it; a refused update costs the round only that client."""

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
"""More training examples than any device holds; a number beyond it is an attack on a weighted average, or a bug."""
MOST_STEPS = 2**63 - 1
"""The most that a whole number of 64 bits holds, as which readers of the records take it."""
MOST_MESSAGE = 500
"""Characters of an error of Python's that are repeated; it may quote all that arrived."""


SLACK = 1.05
"""Over what local training can do, for the rounding of float32 on the way there."""


@dataclass(frozen=True)
class UpdateBound:
    """How far local training can take factors from where they began; see `hetlora.training.local.LocalTraining.reach`.

    A number x has moved by at most `each + decay max|x|`, the maximum taken over its factor, and all numbers of a client
    together, in the Euclidean norm, by at most `joint + decay ‖x‖`.

    Attributes:
        each: The furthest that a number moves by gradients; infinite where nothing bounds it.
        joint: The furthest that all numbers of a client together move by gradients; infinite where nothing bounds it.
        decay: What weight decay and rounding add, as a share of the number itself.
    """

    each: float
    joint: float
    decay: float


class ExpectedTraining(Protocol):
    """What an honest client does in a round, as far as the server can tell; `hetlora.training.local.LocalTraining`."""

    def count(self, rows: int) -> int:
        """Return the number of local steps of a client with so many rows."""
        ...

    def reach(self, steps: int) -> UpdateBound:
        """Return how far so many steps can take a client's factors."""
        ...


@dataclass(frozen=True)
class AdmissionRule:
    """What an honest update satisfies beyond its task, as far as it is known.

    Attributes:
        training: What the client did; None where its factors may have come from anything.
        lowest_rank: From a rank that was assigned, the lowest one that pruning may have left of it; None for any.
        rounding: By how much a number changes on its way to the server at most, as a share of the largest change of its slot.
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
    """Return the task that `update` answers, or refuse it.

    These are checked, in this order:

    1. the client was asked, and has not answered in this round;
    2. the round is this one;
    3. examples and steps are whole numbers within bounds, and the loss is finite;
    4. the modules are those that were sent;
    5. the rank is at most the assigned one, and at least the lowest that pruning can leave;
    6. each factor is a plain dense float32 tensor without a gradient, of the right shape, finite, and unchanged if frozen;
    7. with `expected.training`: the steps are those of so many examples, and no factor moved further than they can move it.

    Nothing about an update is believed before it is checked, not even its types. Whatever it holds, the outcome is a task or a
    refusal.

    Args:
        update: What arrived.
        tasks: Those of the round, by client.
        answered: Clients whose updates were admitted in this round.
        expected: What an honest update satisfies beyond its task.

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
    who = f"client {update.client!r}"
    task = tasks.get(update.client) if isinstance(update.client, str) else None
    if task is None:
        raise _refusal(f"{who} was not asked in round {update.round}")
    _require(update.client not in answered, f"{who} answered round {task.round} twice")
    same = _whole(update.round) and update.round == task.round
    _require(same, f"{who} answered round {update.round}, asked was round {task.round}")
    examples, steps = update.examples, update.steps
    _require(_whole(examples) and 1 <= examples <= MOST_EXAMPLES, f"{who} reports {examples} examples")
    _require(_whole(steps) and 0 <= steps <= MOST_STEPS, f"{who} reports {steps} steps")
    number = isinstance(update.loss, float) or _whole(update.loss)
    _require(number and math.isfinite(update.loss), f"{who} reports a training loss of {update.loss}")
    different = sorted(update.adapter.keys() ^ task.adapter.keys())
    _require(not different, f"{who} sent other modules than it received: {', '.join(different)}")
    if isinstance(update.rank, Mapping):
        _require(update.rank.keys() == task.adapter.keys(), f"{who} sent ranks of other modules than it received")
    for module, (sent_a, sent_b) in task.adapter.items():
        rank, assigned = rank_of(update.rank, module), rank_of(task.rank, module)
        if not (_whole(rank) and 1 <= rank <= assigned):
            raise _refusal(f"{who}, {module}: rank {rank} is not within 1 ... {assigned}, its assigned rank")
        # By name, as the sums take them; a tuple of two is no pair.
        A, B = update.adapter[module].A, update.adapter[module].B
        _check(who, module, "A", A, (rank, sent_a.shape[1]))
        _check(who, module, "B", B, (sent_b.shape[0], rank))
        _require(
            "A" in task.trains or torch.equal(A, sent_a[:rank]), f"{who}, {module}.A: changed, though it is frozen"
        )
        _require(
            "B" in task.trains or torch.equal(B, sent_b[:, :rank]), f"{who}, {module}.B: changed, though it is frozen"
        )
        if rank < (least := lowest_rank(assigned)):
            raise _refusal(
                f"{who}, {module}: rank {rank} is not within {least} ... {assigned}, what pruning can have left"
            )
    if not (isinstance(update.adapter, FlatAdapter) and _finite(update.adapter.numbers)):
        for module, pair in update.adapter.items():
            for letter, factor in zip("AB", pair, strict=True):
                _require(_finite(factor), f"{who}, {module}.{letter}: holds an infinity or NaN")
    return task


def _check(who: str, module: str, letter: str, factor: Tensor, shape: tuple[int, int]) -> None:
    # Messages are written where they are needed: this runs for every factor of every update.
    # A subclass may say one thing here and do another in the sum, and a gradient would tie the state to the client's graph.
    plain = type(factor) is Tensor and factor.layout == torch.strided and not factor.is_meta
    if not plain or factor.requires_grad:
        raise _refusal(f"{who}, {module}.{letter}: not a plain dense tensor without a gradient")
    if factor.dtype != torch.float32:
        raise _refusal(f"{who}, {module}.{letter}: {factor.dtype} arrived, expected torch.float32")
    if factor.shape != shape:
        raise _refusal(f"{who}, {module}.{letter}: shape {tuple(factor.shape)} arrived, expected {shape}")


def _check_reach(update: ClientUpdate, task: TrainTask, training: ExpectedTraining, rounding: float) -> None:
    """Refuse what no honest client can have come to: no update that is honest is ever refused here.

    A client sends its change c with what the rounding of its earlier rounds has lost, e, where `|e| <= b max|c + e|` of then,
    and b is `rounding`. So no number comes to more than `limit / (1 - b)`.
    """
    who, expected = f"client {update.client!r}", training.count(update.examples)
    _require(
        update.steps == expected, f"{who} reports {update.steps} steps on {update.examples} examples, not {expected}"
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
                    f"{who}, {module}.{letter}: moved by {furthest:.3g}, and {limit:.3g} is as far as training goes"
                )
            if math.isfinite(reach.joint):
                slots = change if letter == "A" else change.mT
                squares["moved"] += float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2
                squares["began"] += float(torch.linalg.vector_norm(own, dtype=torch.float64)) ** 2
                squares["rounded"] += (
                    float((2.0 * rounding * slots.abs().amax(dim=1).double()).square().sum()) * slots.shape[1]
                )
    # A slot with one large number is rounded most: each of its numbers by so much, and by as much in an earlier round.
    moved, began, rounded = (math.sqrt(square) for square in squares.values())
    limit = (reach.joint + reach.decay * began) / (1.0 - rounding)
    if moved > SLACK * limit + rounded:
        raise _refusal(f"{who}: moved by {moved:.3g} in all, and {limit:.3g} is as far as training goes")


def _finite(factor: Tensor) -> bool:
    """Whether all numbers are finite: certainly so where their sum is; a sum that overflows tells nothing."""
    return math.isfinite(factor.sum()) or bool(torch.isfinite(factor).all())


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _refusal(otherwise)


def _refusal(message: str) -> RefusedUpdateError:
    """Return the error of this message, which may quote what arrived."""
    return RefusedUpdateError(printable(message))
