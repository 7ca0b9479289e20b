"""FedSA-LoRA: share A, keep B on the client."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from hetlora.core.adapter import truncate, with_factor
from hetlora.core.aggregation import SlotSum
from hetlora.core.method import Method, example_weight, truncate_to_rank
from hetlora.core.types import Client, ServerState, TrainTask

__all__ = ["fedsa_lora"]


def fedsa_lora(*, weights: Literal["examples", "equal"] = "examples") -> Method[SlotSum]:
    """Train A and B; share and average A, keep B on the client: a personal method.

    `A[i] = Σ_{k: r_k > i} w_k A_k[i] / Σ_{k: r_k > i} w_k`; client k computes with `B_k A`.

    Args:
        weights: "examples" weighs a client by its number of training examples `n_k`; "equal" by 1.

    Returns:
        The method. Each client is served with its own B. A client that never took part has B = 0, the base.

    Raises:
        ValueError: `weights` is neither.

    Example:
        >>> fedsa_lora().name
        'fedsa_lora'

    Where we differ: the paper has one rank. With several, a slot is averaged over its owners.
    """
    return Method(
        name="fedsa_lora",
        reference=(
            "Guo et al.: Selective Aggregation for Low-Rank Adaptation in Federated Learning, ICLR 2025, "
            "arXiv 2410.01463."
        ),
        distribute=_own_b,
        weigh=example_weight(weights),
        start=lambda state: SlotSum.like(state.adapter),
        add=lambda total, update, weight: total.add(update.adapter, weight),
        finish=_average_a,
        keep=lambda update: update.adapter,
        refuses={
            "product": "the server never sees B, and so no product",
            "average": "each client's B belongs to the A it was trained beside",
        },
    )


def _own_b(state: ServerState, client: Client) -> TrainTask:
    task = replace(truncate_to_rank(state, client), receives="A", sends="A")
    if client.name not in state.kept:
        return task
    return replace(task, adapter=with_factor(task.adapter, "B", truncate(state.kept[client.name], task.rank)))


def _average_a(state: ServerState, total: SlotSum) -> ServerState:
    mean = total.mean(unowned=state.adapter)
    return replace(state, adapter=with_factor(mean, "B", state.adapter))
