"""FedAvg on LoRA factors of one rank, also known as FedIT or HomLoRA: the homogeneous baseline."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from hetlora.core.adapter import rank_of
from hetlora.core.aggregation import WeightedSum, weighted_mean
from hetlora.core.method import Method, example_weight, truncate_to_rank
from hetlora.core.types import Client, ServerState, TrainTask
from hetlora.errors import ShapeError

__all__ = ["fedavg", "fedit"]


def fedavg(*, weights: Literal["examples", "equal"] = "examples") -> Method[WeightedSum]:
    """Average A and B apart over clients of one rank.

    `A = Σ_k n_k A_k / Σ_k n_k` and the same for B.

    Args:
        weights: "examples" weighs a client by its number of training examples `n_k`, as the papers do; "equal" by 1.

    Returns:
        The method. Its clients must all have the rank of the global adapter.

    Raises:
        ValueError: `weights` is neither.
        ShapeError: A round meets a client of another rank: FedAvg would mix ranks silently.

    Example:
        >>> fedavg().name
        'fedavg'
    """
    return Method(
        name="fedavg",
        reference=(
            "McMahan et al.: Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017, "
            "arXiv 1602.05629."
        ),
        ranks="equal",
        distribute=_whole,
        weigh=example_weight(weights),
        start=lambda state: WeightedSum.like(state.adapter),
        add=lambda total, update, weight: total.add(update.adapter, weight),
        finish=weighted_mean,
    )


def fedit() -> Method[WeightedSum]:
    """Average A and B apart over clients of one rank, by examples: FedAvg under its name for LoRA.

    Example:
        >>> fedit().name
        'fedit'
    """
    return replace(
        fedavg(),
        name="fedit",
        reference=(
            "Zhang et al.: Towards Building the Federated GPT, Federated Instruction Tuning, ICASSP 2024, "
            "arXiv 2305.05644."
        ),
    )


def _whole(state: ServerState, client: Client) -> TrainTask:
    for module, pair in state.adapter.items():
        rank, slots = rank_of(state.rank(client), module), pair.A.shape[-2]
        if rank != slots:
            raise ShapeError(
                f"FedAvg needs one rank for all: client {client.name!r} has rank {rank}, the global adapter {slots}; "
                "give every client the same rank, or use the method hetlora"
            )
    return truncate_to_rank(state, client)
