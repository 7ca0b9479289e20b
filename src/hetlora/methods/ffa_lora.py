"""FFA-LoRA: freeze A at its random start, and average B alone, which is exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from hetlora.core.adapter import with_factor
from hetlora.core.aggregation import WeightedSum, weighted_mean
from hetlora.core.method import Method, example_weight, truncate_to_rank
from hetlora.core.types import Client, ServerState, TrainTask

__all__ = ["ffa_lora"]


def ffa_lora(*, weights: Literal["examples", "equal"] = "examples") -> Method[WeightedSum]:
    """Freeze A at its random start; train and average B alone, which is exact.

    `B = Σ_k p_k [B_k, 0]` beside the server's own A: with `A_k = A[:r_k]` for all, `B A = Σ_k p_k B_k A_k`.

    Args:
        weights: "examples" weighs a client by its number of training examples `n_k`; "equal" by 1.

    Returns:
        The method. Half the parameters are trained and half the bytes travel, since A follows from the run's seed.

    Raises:
        ValueError: `weights` is neither.

    Example:
        >>> ffa_lora().name
        'ffa_lora'

    Where we differ: the paper has one rank. Here clients of lower rank truncate and zero-pad B, which stays exact, and slots
    without owner in a cohort keep their B.
    """
    return Method(
        name="ffa_lora",
        reference="Sun et al.: Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024, arXiv 2403.12313.",
        distribute=_frozen_a,
        weigh=example_weight(weights),
        start=lambda state: WeightedSum.like(state.adapter),
        add=lambda total, update, weight: total.add(update.adapter, weight),
        finish=_keep_a,
    )


def _frozen_a(state: ServerState, client: Client) -> TrainTask:
    return replace(truncate_to_rank(state, client), receives="B", trains="B", sends="B")


def _keep_a(state: ServerState, total: WeightedSum) -> ServerState:
    after = weighted_mean(state, total)
    return replace(after, adapter=with_factor(after.adapter, "A", state.adapter))
