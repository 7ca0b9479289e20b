"""RBLA: average every slot over its owners, so that it is not diluted."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from hetlora.core.aggregation import SlotSum
from hetlora.core.method import Method, example_weight, truncate_to_rank

__all__ = ["rbla"]


def rbla(*, weights: Literal["examples", "equal"] = "examples") -> Method[SlotSum]:
    """Average every slot over the clients that own it.

    `A[i] = Σ_{k: r_k > i} w_k A_k[i] / Σ_{k: r_k > i} w_k`, the same for `B[:, i]`. A slot without owner in the cohort keeps
    its value. Unlike with zero-padding, slots of idle clients do not decay. It does not give the mean of the products.

    Args:
        weights: "examples" weighs a client by its number of training examples `n_k`; "equal" by 1.

    Returns:
        The method.

    Raises:
        ValueError: `weights` is neither.

    Example:
        >>> rbla().name
        'rbla'
    """
    return Method(
        name="rbla",
        reference=(
            "Chen et al.: RBLA, Rank-Based-LoRA-Aggregation for Fine-Tuning Heterogeneous Models in FLaaS, "
            "arXiv 2408.08699."
        ),
        distribute=truncate_to_rank,
        weigh=example_weight(weights),
        start=lambda state: SlotSum.like(state.adapter),
        add=lambda total, update, weight: total.add(update.adapter, weight),
        finish=lambda state, total: replace(state, adapter=total.mean(unowned=state.adapter)),
    )
