"""Naive heterogeneous LoRA: truncation, zero-padding, sample-size weights; no pruning, no norms."""

from __future__ import annotations

from typing import Literal

from hetlora.core.aggregation import WeightedSum, weighted_mean
from hetlora.core.method import Method, example_weight, truncate_to_rank

__all__ = ["zeropad"]


def zeropad(*, unowned: Literal["keep", "zero"] = "keep") -> Method[WeightedSum]:
    """Average zero-padded factors, A and B apart, weighted by examples.

    `A = Σ_k n_k [A_k; 0] / Σ_k n_k` and the same for B: the naive baseline of HetLoRA's paper and of most later ones.
    HetLoRA replaces the usual `n_k / n` by sparsity weighting.

    Args:
        unowned: See `hetlora.methods.hetlora`.

    Returns:
        The method. It does not give the mean of the products, `mean(B) mean(A) != mean(B A)`.

    Raises:
        ValueError: `unowned` is neither.

    Example:
        >>> zeropad().name
        'zeropad'
    """
    if unowned not in ("keep", "zero"):
        raise ValueError(f"unowned={unowned!r} is not allowed; use one of keep, zero")
    return Method(
        name="zeropad",
        reference=(
            "Cho et al.: Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, EMNLP 2024, "
            "arXiv 2401.06432."
        ),
        distribute=truncate_to_rank,
        weigh=example_weight("examples"),
        start=lambda state: WeightedSum.like(state.adapter),
        add=lambda total, update, weight: total.add(update.adapter, weight),
        finish=lambda state, total: weighted_mean(state, total, unowned),
    )
