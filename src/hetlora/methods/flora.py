"""FLoRA: the stacked adapters of a round are folded into the base, and every round begins with fresh ones."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from typing import Literal

import torch

from hetlora.adapter import Adapter, LoraPair
from hetlora.aggregation import ProductSum
from hetlora.federated import Method, ServerState, example_weight, truncate_to_rank

__all__ = ["flora"]


def flora(*, weights: Literal["examples", "equal"] = "examples") -> Method[ProductSum]:
    """Stack the clients' adapters, fold their weighted sum into the base, begin every round with fresh ones.

    `W0 += s Σ_k p_k B_k A_k`, which is the product of the stacks `[p_1 B_1, p_2 B_2, …] [A_1; A_2; …]` and exact for any
    ranks; then `A` is drawn anew (uniform in ±1/√in) and `B = 0`.

    Args:
        weights: "examples" weighs a client by its number of training examples `n_k`; "equal" by 1.

    Returns:
        The method. Every client receives the stacks of all rounds since its last one, `Σ_k r_k` slots a round, or the
        dense sum where that is smaller.

    Raises:
        ValueError: `weights` is neither.

    Reference:
        Wang et al.: FLoRA, Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations,
        NeurIPS 2024, arXiv 2409.05976.

    Example:
        >>> flora().name
        'flora'
    """
    return Method(
        name="flora",
        distribute=lambda state, client: replace(truncate_to_rank(state, client), receives=""),
        weigh=example_weight(weights),
        start=lambda state: ProductSum.like(state.adapter),
        add=lambda total, update, weight: total.add(update.adapter, weight),
        finish=_fold,
        refuses={"server_optimizer": "the adapter begins anew every round, so its slots have no history"},
    )


def _fold(state: ServerState, total: ProductSum) -> ServerState:
    folded = state.folded.plus(total.mean(), state.round, total.size)
    return replace(state, adapter=_fresh(state), folded=folded)


def _fresh(state: ServerState) -> Adapter:
    """Return the next round's adapter; clients can draw it themselves, so that it does not travel."""
    fresh = {}
    for module, (A, B) in state.adapter.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"flora:{state.seed}:{state.round}:{module}".encode()))
        bound = 1 / math.sqrt(A.shape[-1])
        fresh[module] = LoraPair(torch.empty_like(A).uniform_(-bound, bound, generator=generator), torch.zeros_like(B))
    return fresh
