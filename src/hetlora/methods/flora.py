"""FLoRA: fold a round's stacked adapters into the base, and begin every round with fresh ones."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from hetlora.core.adapter import LoraPair
from hetlora.core.aggregation import ProductSum
from hetlora.core.method import Method, example_weight, truncate_to_rank
from hetlora.core.types import Client, ServerState, TrainTask

__all__ = ["flora"]


def flora(*, weights: Literal["examples", "equal"] = "examples") -> Method[ProductSum]:
    """Stack the clients' adapters, fold their weighted sum into the base, and begin every round with fresh adapters.

    `W0 += s Σ_k p_k B_k A_k`, which is the product of the stacks `[p_1 B_1, p_2 B_2, …] [A_1; A_2; …]` and exact for any
    ranks. In every round each client draws its own A, uniform in ±1/√in, and begins with `B = 0`.

    Args:
        weights: "examples" weighs a client by its number of training examples `n_k`; "equal" by 1.

    Returns:
        The method. A client receives the stacks of all rounds since its last one, `Σ_k r_k` slots per round, or the dense sum
        if that is smaller.

    Raises:
        ValueError: `weights` is neither.

    Example:
        >>> flora().name
        'flora'
    """
    return Method(
        name="flora",
        reference=(
            "Wang et al.: FLoRA, Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations, "
            "NeurIPS 2024, arXiv 2409.05976."
        ),
        averages="products",
        folds=True,
        distribute=_fresh,
        weigh=example_weight(weights),
        start=lambda state: ProductSum.like(state.adapter),
        add=lambda total, update, weight: total.add(update.adapter, weight),
        finish=_fold,
        refuses={
            "adapter": "every round begins with fresh factors, and it would be lost: merge it into the base first",
            "server_optimizer": "the adapter begins anew every round, so its slots have no history",
            "average": "every round begins with fresh factors, and what was learned is in the base",
            "over_slots": "each client draws an A of its own, so that a slot means another thing at each",
        },
    )


def _fresh(state: ServerState, client: Client) -> TrainTask:
    """Return a task whose A the client draws itself. With one A for all, the stack would have only the rank of one client."""
    task = truncate_to_rank(state, client)
    drawn = {
        module: LoraPair(_draw(pair.A, state, client, module), torch.zeros_like(pair.B))
        for module, pair in task.adapter.items()
    }
    return replace(task, adapter=drawn, receives="")


def _draw(like: Tensor, state: ServerState, client: Client, module: str) -> Tensor:
    key = f"flora:{state.seed}:{state.round}:{client.name}:{module}"
    bound = 1 / math.sqrt(like.shape[-1])
    return torch.empty_like(like).uniform_(
        -bound, bound, generator=torch.Generator().manual_seed(zlib.crc32(key.encode()))
    )


def _fold(state: ServerState, total: ProductSum) -> ServerState:
    folded = state.folded.plus(total.mean(), state.round, total.size)
    nothing = {module: LoraPair(A, torch.zeros_like(B)) for module, (A, B) in state.adapter.items()}
    return replace(state, adapter=nothing, folded=folded)
