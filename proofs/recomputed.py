"""Compute a round's sum a second time: dense NumPy in float64, from the methods' formulas alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hetlora.core.adapter import Adapter
from hetlora.core.types import ClientUpdate, ServerState

__all__ = ["difference", "recomputed"]

Array = NDArray[np.float64]
Factors = tuple[Array, Array]


def recomputed(rule: Mapping[str, str], state: ServerState, updates: Sequence[ClientUpdate]) -> dict[str, Factors]:
    """Return the factors after a round.

    Args:
        rule: How is averaged: `sum` is "padded" (A and B apart, zeros where a client has no slot), "owners" (every slot over
            those that have it), "replicated" (missing slots from the clients of the highest rank) or "products"; `weights`
            is "norm", "examples" or "equal"; `unowned` is "keep" or "zero", of the slots that nobody has; `trains` is the
            only factor that changes, or "AB", or "turns" where it is B in even rounds and A in odd ones.
        state: The state before the round.
        updates: That were admitted.
    """
    weights = [_weight(rule["weights"], update) for update in updates]
    trains = rule.get("trains", "AB")
    if trains == "turns":
        trains = "A" if state.round % 2 else "B"
    result = {}
    for name, before in _arrays(state.adapter).items():
        pairs = [_arrays(update.adapter)[name] for update in updates]
        after = _module(rule, before, pairs, weights)
        result[name] = (after[0] if "A" in trains else before[0], after[1] if "B" in trains else before[1])
    return result


def difference(rule: Mapping[str, str], ours: Adapter, theirs: Mapping[str, Factors]) -> float:
    """Return the largest difference between two adapters, relative to the largest number; of products where these count."""
    worst = 0.0
    for name, (A, B) in _arrays(ours).items():
        pairs = [(A, theirs[name][0]), (B, theirs[name][1])]
        if rule["sum"] == "products":  # the formula gives only the product, not the factors
            pairs = [(B @ A, theirs[name][1] @ theirs[name][0])]
        for mine, other in pairs:
            worst = max(worst, float(np.abs(mine - other).max()) / max(float(np.abs(other).max()), 1e-30))
    return worst


def _arrays(adapter: Adapter) -> dict[str, Factors]:
    return {
        name: (A.detach().numpy().astype(np.float64), B.detach().numpy().astype(np.float64))
        for name, (A, B) in adapter.items()
    }


def _weight(rule: str, update: ClientUpdate) -> float:
    if rule == "norm":
        return float(np.sqrt(sum(np.sum((B @ A) ** 2) for A, B in _arrays(update.adapter).values())))
    return float(update.examples) if rule == "examples" else 1.0


def _module(rule: Mapping[str, str], before: Factors, pairs: Sequence[Factors], weights: Sequence[float]) -> Factors:
    A, B = (factor.copy() for factor in before)
    total = sum(weights)
    if total == 0.0:
        return A, B
    if rule["sum"] == "products":
        product = sum(weight * (b @ a) for weight, (a, b) in zip(weights, pairs, strict=True)) / total
        return np.eye(product.shape[1]), product
    ranks = [len(a) for a, _ in pairs]
    widest = max(rank for rank, weight in zip(ranks, weights, strict=True) if weight > 0.0)
    top = [place for place, rank in enumerate(ranks) if rank == max(ranks)]
    for slot in range(len(A)):
        owners = [place for place, rank in enumerate(ranks) if rank > slot]
        own = sum(weights[place] for place in owners)
        if rule["sum"] == "padded" and slot >= widest and rule.get("unowned", "keep") == "keep":
            continue
        if rule["sum"] != "padded" and own == 0.0:
            continue
        for mine, side in ((A, 0), (B.T, 1)):
            rows = [pair[0] if side == 0 else pair[1].T for pair in pairs]
            value = sum((weights[place] * rows[place][slot] for place in owners), np.zeros(mine.shape[1]))
            if rule["sum"] == "replicated":
                value += (
                    (total - own)
                    * sum(weights[place] * rows[place][slot] for place in top)
                    / sum(weights[place] for place in top)
                )
            mine[slot] = value / (own if rule["sum"] == "owners" else total)
    return A, B
