"""RBLA: every slot is averaged over the clients that own it, so that nothing is diluted.

Chen et al.: *RBLA: Rank-Based-LoRA-Aggregation for Fine-Tuning Heterogeneous Models in FLaaS*, arXiv 2408.08699.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hetlora.adapter import Adapter, LoraPair, map_tensors
from hetlora.federated import ClientUpdate, Method, ServerState, truncate_to_rank

__all__ = ["SlotSum", "rbla"]


def rbla(*, weights: Literal["examples", "equal"] = "examples") -> Method[SlotSum]:
    """Average slot i over its owners: `A[i] = Σ_{k: r_k > i} w_k A_k[i] / Σ_{k: r_k > i} w_k`, the same for `B[:, i]`.

    A slot without an owner in the cohort keeps its value.

    Args:
        weights: "examples" weighs a client by its number of training examples `n_k`; "equal" by 1.

    Returns:
        The method. Where nobody trains nothing decays, unlike zero-padding; it does not give the mean of the products.

    Raises:
        ValueError: `weights` is neither.

    Example:
        >>> rbla().name
        'rbla'
    """
    if weights not in ("examples", "equal"):
        raise ValueError(f"weights={weights!r} is not allowed; use one of examples, equal")
    return Method(
        name="rbla",
        distribute=truncate_to_rank,
        weigh=lambda update: float(update.examples) if weights == "examples" else 1.0,
        start=_start,
        add=_add,
        finish=_finish,
    )


@dataclass(frozen=True)
class SlotSum:
    """The sums of a round, float64.

    Attributes:
        adapter: `Σ w_k A_k [r_max, in]`, `Σ w_k B_k [out, r_max]` over zero-padded factors.
        weight: Module to `Σ_{k: r_k > i} w_k`, one number a slot `[r_max]`.
    """

    adapter: Adapter
    weight: Mapping[str, Tensor]


def _start(state: ServerState) -> SlotSum:
    zeros = map_tensors(lambda factor: torch.zeros_like(factor, dtype=torch.float64), state.adapter)
    slots = {module: torch.zeros(pair.A.shape[-2], dtype=torch.float64) for module, pair in state.adapter.items()}
    return SlotSum(zeros, slots)


def _add(total: SlotSum, update: ClientUpdate, weight: float) -> SlotSum:
    for module, (A, B) in update.adapter.items():
        rank = A.shape[-2]
        total.adapter[module].A[:rank].add_(A, alpha=weight)
        total.adapter[module].B[:, :rank].add_(B, alpha=weight)
        total.weight[module][:rank] += weight
    return total


def _finish(state: ServerState, total: SlotSum) -> ServerState:
    adapter = {}
    for module, (A, B) in state.adapter.items():
        weight, sums = total.weight[module], total.adapter[module]
        owned, divisor = weight > 0.0, weight.clamp_min(torch.finfo(torch.float64).tiny)
        adapter[module] = LoraPair(
            torch.where(owned[:, None], (sums.A / divisor[:, None]).to(A.dtype), A),
            torch.where(owned, (sums.B / divisor).to(B.dtype), B),
        )
    return replace(state, adapter=adapter)
