"""FedProx around any method: a penalty on the distance from the received adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hetlora.core.adapter import Adapter, batch, map_tensors
from hetlora.core.method import Method, Penalty
from hetlora.core.types import TrainTask

__all__ = ["fedprox"]

REFERENCE = "Li et al.: Federated Optimization in Heterogeneous Networks, MLSys 2020, arXiv 1812.06127."


def fedprox(method: Method[Any], *, mu: float) -> Method[Any]:
    """Add `μ/2 Σ_modules (‖A - A_received‖_F² + ‖B - B_received‖_F²)` to every client's local loss.

    Args:
        method: A method in which clients receive an adapter; its own penalty stays.
        mu: μ > 0.

    Returns:
        The method with another `penalty`.

    Raises:
        ValueError: `mu` is out of its range, or the method refuses a proximal term.

    Example:
        >>> from hetlora.methods import hetlora
        >>> fedprox(hetlora(), mu=0.01).name
        'hetlora'
    """
    if not 0.0 < mu < math.inf:
        raise ValueError(f"mu={mu!r} is not allowed; use more than 0")
    if "proximal" in method.refuses:
        raise ValueError(f"{method.name} takes no proximal term: {method.refuses['proximal']}")

    def penalty(tasks: Sequence[TrainTask]) -> Penalty:
        received, own = batch([task.adapter for task in tasks]), method.penalty(tasks)

        def total(adapter: Adapter) -> Tensor:
            here = map_tensors(lambda factor: factor.to(next(iter(adapter.values())).A.device), received)
            squares = [
                (factor - start).square().sum(dim=(-2, -1))  # [G]
                for name, pair in adapter.items()
                for factor, start in zip(pair, here[name], strict=True)
            ]
            moved: Tensor = 0.5 * mu * torch.stack(squares).sum(dim=0)
            return moved if own is None else moved + own(adapter)

        return total

    return replace(method, penalty=penalty, reference=f"{method.reference} {REFERENCE}".lstrip())
