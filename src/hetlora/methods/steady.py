"""Steady HetLoRA: the rounds of HetLoRA, with an adapter averaged over them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from hetlora.core.adapter import LoraPair
from hetlora.core.aggregation import WeightedSum
from hetlora.core.method import Method
from hetlora.core.types import Client, ServerState, TrainTask
from hetlora.methods.hetlora import hetlora

__all__ = ["averaged", "steady"]

REFERENCE = "Shamir, Zhang: Stochastic Gradient Descent for Non-smooth Optimization, ICML 2013, arXiv 1212.1824."


def steady(
    *,
    power: float = 3.0,
    gamma: float = 0.99,
    penalty: float = 0.01,
    min_rank: int = 5,
    weights: Literal["norm", "examples", "equal"] = "norm",
) -> Method[WeightedSum]:
    """Do HetLoRA's rounds, and serve an average over the rounds instead of the last round's adapter; see `averaged`.

    A round's adapter is the mean of a few clients that have fitted their own rows, and the next round has other clients. The
    clients train, prune and send the same bytes as in `hetlora`. Only the adapter that the server evaluates and serves differs.

    Args:
        power: See `averaged`.
        gamma: See `hetlora`, also for the following ones.
        penalty: See `hetlora`.
        min_rank: See `hetlora`.
        weights: See `hetlora`.

    Returns:
        The method.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> steady(gamma=1.0).name
        'steady'
    """
    inner = hetlora(gamma=gamma, penalty=penalty, min_rank=min_rank, weights=weights)
    return replace(
        averaged(inner, power=power),
        name="steady",
        reference=(
            "This project's own; `hetlora reproduce chat` puts it beside the others. The average is the polynomial-decay "
            f"averaging of {REFERENCE}"
        ),
    )


def averaged(method: Method[Any], *, power: float) -> Method[Any]:
    """Let the server serve an average of a method's adapters over the rounds; clients train on the last one.

    Polynomial-decay averaging: with `x_t` the method's factors after round t = 1, 2, … and p the power,
    `x̄_t = (1 - w_t) x̄_{t-1} + w_t x_t`, `w_t = (p + 1) / (t + p)`, A and B apart: a mean over all rounds with weights that
    grow as the power p of the round. Its mean age is about `t / (p + 2)` rounds, and it needs neither a window nor the total
    number of rounds. A round without answers, and the adapter before the first answer, do not count.

    Args:
        method: A method that averages factors, and whose slots keep their meaning from round to round.
        power: p >= 0; 0 weighs all rounds alike.

    Returns:
        The method. Its state holds two adapters, the average as `adapter` and the last round's as the moment "iterate".

    Raises:
        ValueError: `power` is out of its range, or an average of the method's adapters is meaningless.

    Example:
        >>> from hetlora.methods import fedavg
        >>> averaged(fedavg(), power=3.0).name
        'fedavg'
    """
    if not 0.0 <= power < math.inf:
        raise ValueError(f"power={power!r} is not allowed; use 0 or more")
    if "average" in method.refuses:
        raise ValueError(f"{method.name} cannot be averaged over rounds: {method.refuses['average']}")

    def distribute(state: ServerState, client: Client) -> TrainTask:
        return method.distribute(state.training_state, client)

    def finish(state: ServerState, total: Any) -> ServerState:
        after = method.finish(state.training_state, total)
        first = "iterate" not in state.moments
        share = 1.0 if first else (power + 1.0) / (state.round + 1 + power)
        mean = {
            name: LoraPair(*(_between(old, new, share) for old, new in zip(state.adapter[name], pair, strict=True)))
            for name, pair in after.adapter.items()
        }
        return replace(after, adapter=mean, moments={**after.moments, "iterate": after.adapter})

    return replace(
        method,
        reference=f"{method.reference} {REFERENCE}".lstrip(),
        distribute=distribute,
        finish=finish,
        refuses={
            **method.refuses,
            "server_optimizer": "it would step along the average; clients go on from the last round",
        },
    )


def _between(old: Tensor, new: Tensor, share: float) -> Tensor:
    """Return `(1 - share) old + share new`, exact if both are equal and at either end.

    Not `torch.lerp`, which fuses operations on some processors.
    """
    return old + share * (new - old) if share < 0.5 else new - (1.0 - share) * (new - old)
