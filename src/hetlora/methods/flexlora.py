"""FlexLoRA and Recon+SVD: the mean of the products, redistributed by its singular value decomposition."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from hetlora.core.adapter import fill_missing_slots, map_tensors, truncated_svd
from hetlora.core.aggregation import StackedSum
from hetlora.core.method import Method, example_weight, truncate_to_rank
from hetlora.core.types import ServerState

__all__ = ["flexlora", "recon_svd"]


def flexlora(*, weights: Literal["examples", "equal"] = "examples") -> Method[StackedSum]:
    """Average the products of the factors, and give each client their best approximation of its rank, by SVD.

    `ΔW = Σ_k p_k B_k A_k = U S Vᵀ`; the global factors are `B = U S` and `A = Vᵀ`, so that their first r_k slots are the
    best approximation of rank r_k. Computed on the stacked factors by QR and a small SVD, never forming `[out, in]`.

    Args:
        weights: "examples" weighs a client by its number of training examples `n_k`; "equal" by 1.

    Returns:
        The method. Exact up to the rank of the global adapter; singular values beyond it are lost.

    Raises:
        ValueError: `weights` is neither.

    Example:
        >>> flexlora().name
        'flexlora'

    Where we differ: all of S goes into B, so that the rows of A are orthonormal and a slot of singular value zero still has a
    gradient. Slots beyond the rank of the mean keep their A, with B = 0.
    """
    return Method(
        name="flexlora",
        reference=(
            "Bai et al.: Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources, "
            "NeurIPS 2024, arXiv 2402.11505."
        ),
        averages="products",
        distribute=truncate_to_rank,
        weigh=example_weight(weights),
        start=lambda _: StackedSum(),
        add=lambda total, update, weight: total.add(update.adapter, weight),
        finish=_redistribute,
        refuses={
            "server_optimizer": "the SVD turns the slots every round, so that the momentum of one means nothing",
            "average": "the SVD turns the slots every round, so that a slot is another one in each",
        },
    )


def recon_svd(*, weights: Literal["examples", "equal"] = "equal") -> Method[StackedSum]:
    """Reconstruct the products, average them and redistribute by SVD: the baseline of HetLoRA's paper.

    Like `flexlora`. The weights of the paper's baseline are not known (open) and are equal here.

    Example:
        >>> recon_svd().name
        'recon_svd'
    """
    return replace(
        flexlora(weights=weights),
        name="recon_svd",
        reference=(
            "Cho et al.: Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, EMNLP 2024, "
            "arXiv 2401.06432."
        ),
    )


def _redistribute(state: ServerState, total: StackedSum) -> ServerState:
    if total.weight == 0.0:
        return state
    adapter, mean = {}, total.mean()
    for module, before in state.adapter.items():
        adapter[module] = fill_missing_slots(before, truncated_svd(mean[module], before.A.shape[-2]))
    return replace(state, adapter=map_tensors(lambda factor: factor.float(), adapter))
