"""Naive heterogeneous LoRA: truncation, zero-padding, sample-size weights; no pruning, no norms.

The baseline that HetLoRA is compared with in its own paper and in most later ones: Cho et al., EMNLP 2024,
arXiv 2401.06432, where the usual `n_k / n` is what sparsity weighting replaces.
"""

from __future__ import annotations

from typing import Literal

from hetlora.federated import Method, WeightedSum, truncate_to_rank, weighted_mean

__all__ = ["zeropad"]


def zeropad(*, unowned: Literal["keep", "zero"] = "keep") -> Method[WeightedSum]:
    """Average zero-padded factors, A and B apart, `Σ_k n_k A_k / Σ_k n_k` and the same for B.

    Args:
        unowned: What becomes of the global slots that nobody in the cohort has; as in `hetlora.methods.hetlora`.

    Returns:
        The method. It does not give the mean of the products: `mean(B) mean(A) != mean(B A)`.

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
        distribute=truncate_to_rank,
        weigh=lambda update: float(update.examples),
        start=lambda state: WeightedSum.like(state.adapter),
        add=lambda total, update, weight: total.add(update.adapter, weight),
        finish=lambda state, total: weighted_mean(state, total, unowned),
    )
