"""FedAvg on LoRA factors of one rank, known as FedIT or HomLoRA: the homogeneous baseline.

McMahan et al.: *Communication-Efficient Learning of Deep Networks from Decentralized Data*, AISTATS 2017,
arXiv 1602.05629; on LoRA: Zhang et al., *Towards Building the Federated GPT*, arXiv 2305.05644.
"""

from __future__ import annotations

from typing import Literal

from hetlora.adapter import rank_of
from hetlora.errors import ShapeError
from hetlora.federated import Client, Method, ServerState, TrainTask, WeightedSum, truncate_to_rank, weighted_mean

__all__ = ["fedavg"]


def fedavg(*, weights: Literal["examples", "equal"] = "examples") -> Method[WeightedSum]:
    """Average A and B apart, `Σ_k n_k A_k / Σ_k n_k` and the same for B, over clients of one rank.

    Args:
        weights: "examples" weighs a client by its number of training examples `n_k`, as the papers do; "equal" by 1.

    Returns:
        The method. Its clients must all have the rank of the global adapter.

    Raises:
        ValueError: `weights` is neither.
        ShapeError: When a round meets a client of another rank: FedAvg would mix ranks silently.

    Example:
        >>> fedavg().name
        'fedavg'
    """
    if weights not in ("examples", "equal"):
        raise ValueError(f"weights={weights!r} is not allowed; use one of examples, equal")
    return Method(
        name="fedavg",
        distribute=_whole,
        weigh=lambda update: float(update.examples) if weights == "examples" else 1.0,
        start=lambda state: WeightedSum.like(state.adapter),
        add=lambda total, update, weight: total.add(update.adapter, weight),
        finish=weighted_mean,
    )


def _whole(state: ServerState, client: Client) -> TrainTask:
    for module, pair in state.adapter.items():
        rank, slots = rank_of(state.rank(client), module), pair.A.shape[-2]
        if rank != slots:
            raise ShapeError(
                f"fedavg needs one rank for all: client {client.name!r} has rank {rank}, the global adapter {slots}; "
                "give every client the same rank, or use the method hetlora"
            )
    return truncate_to_rank(state, client)
