"""Server optimisers around any method: FedAvgM, FedAdam, FedYogi."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from hetlora.core.adapter import Adapter, LoraPair, map_tensors
from hetlora.core.method import Method
from hetlora.core.types import ServerState

__all__ = ["fedopt"]

REFERENCE = (
    "Reddi et al.: Adaptive Federated Optimization, ICLR 2021, arXiv 2003.00295; FedAvgM: Hsu, Qi, Brown: "
    "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification, "
    "arXiv 1909.06335."
)


def fedopt(
    method: Method[Any],
    *,
    optimizer: Literal["momentum", "adam", "yogi"],
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> Method[Any]:
    """Let the server take an optimiser's step along the round's change instead of adopting it.

    With `Δ = x_method - x`, the change that the method alone would make to the global factors, element by element:
    momentum (FedAvgM) `m = β₁ m + Δ`, `x += η m`; adam (FedAdam) `m = β₁ m + (1 - β₁) Δ`, `v = β₂ v + (1 - β₂) Δ²`,
    `x += η m / (√v + τ)`; yogi (FedYogi) the same with `v -= (1 - β₂) Δ² sign(v - Δ²)`. A slot that the method does not change,
    because no client of the cohort has it, keeps its values and its moments.

    Args:
        method: A method whose slots keep their meaning from round to round.
        optimizer: The optimiser.
        learning_rate: η > 0.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1); adam and yogi.
        tau: Degree of adaptivity τ > 0, `v` begins at τ²; adam and yogi.

    Returns:
        The method with another `finish`; the clients' part does not change.

    Raises:
        ValueError: An argument is out of its range, or the method refuses a server optimiser.

    Example:
        >>> from hetlora.methods import hetlora
        >>> fedopt(hetlora(), optimizer="momentum", learning_rate=1.0).name
        'hetlora'
    """
    if optimizer not in ("momentum", "adam", "yogi"):
        raise ValueError(f"optimizer={optimizer!r} is not allowed; use one of momentum, adam, yogi")
    if not learning_rate > 0.0 or not tau > 0.0 or not 0.0 <= beta1 < 1.0 or not 0.0 <= beta2 < 1.0:
        values = f"learning_rate={learning_rate}, tau={tau}, beta1={beta1}, beta2={beta2}"
        raise ValueError(f"{values}: learning_rate and tau must be more than 0, beta1 and beta2 in [0, 1)")
    if "server_optimizer" in method.refuses:
        raise ValueError(f"{method.name} takes no server optimiser: {method.refuses['server_optimizer']}")

    starts = {"first": 0.0} if optimizer == "momentum" else {"first": 0.0, "second": tau * tau}

    def finish(state: ServerState, total: Any) -> ServerState:
        after = method.finish(state, total)
        change = _zip(torch.sub, after.adapter, state.adapter)
        before = {name: _moment(state, name, start) for name, start in starts.items()}
        if optimizer == "momentum":
            step = _zip(lambda m, d: beta1 * m + d, before["first"], change)
            moments = {"first": step}
        else:
            first = _zip(lambda m, d: beta1 * m + (1 - beta1) * d, before["first"], change)
            grow = _adam if optimizer == "adam" else _yogi
            second = _zip(lambda v, d: grow(v, d * d, beta2), before["second"], change)
            step = _zip(lambda m, v: m / (v.sqrt() + tau), first, second)
            moments = {"first": first, "second": second}
        moved = _zip(lambda x, s: x + learning_rate * s, state.adapter, step)
        resting = {name: ~((A != 0).any(dim=1) | (B != 0).any(dim=0)) for name, (A, B) in change.items()}  # [r]
        held = {name: _held(resting, before[name], new) for name, new in moments.items()}
        return replace(after, adapter=_held(resting, state.adapter, moved), moments=held)

    return replace(method, finish=finish, reference=f"{method.reference} {REFERENCE}".lstrip())


def _held(resting: Mapping[str, Tensor], before: Adapter, after: Adapter) -> Adapter:
    """Return `after`, with the resting slots `[r]` of `before`."""
    return {
        name: LoraPair(
            torch.where(rest[:, None], before[name].A, after[name].A), torch.where(rest, before[name].B, after[name].B)
        )
        for name, rest in resting.items()
    }


def _adam(v: Tensor, squared: Tensor, beta2: float) -> Tensor:
    return beta2 * v + (1 - beta2) * squared


def _yogi(v: Tensor, squared: Tensor, beta2: float) -> Tensor:
    return v - (1 - beta2) * squared * torch.sign(v - squared)


def _moment(state: ServerState, name: str, start: float) -> Adapter:
    if name in state.moments:
        return state.moments[name]
    return map_tensors(lambda factor: torch.full_like(factor, start), state.adapter)


def _zip(function: Callable[[Tensor, Tensor], Tensor], left: Adapter, right: Adapter) -> Adapter:
    return {
        name: LoraPair(function(pair.A, right[name].A), function(pair.B, right[name].B)) for name, pair in left.items()
    }
