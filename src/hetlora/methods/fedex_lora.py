"""FedEx-LoRA: average A and B apart, and fold the error against the mean product into the base."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hetlora.core.adapter import num_bytes, ordered_delta, truncate
from hetlora.core.aggregation import ProductSum, WeightedSum, weighted_mean
from hetlora.core.method import Method, example_weight, truncate_to_rank
from hetlora.core.types import ClientUpdate, ServerState

__all__ = ["fedex_lora"]


def fedex_lora(*, weights: Literal["examples", "equal"] = "examples") -> Method[_Both]:
    """Average A and B apart and fold the residual into the base, which makes the mean exact.

    `W0 += s (Σ_k p_k B_k A_k - B̄ Ā)` with `Ā = Σ_k p_k [A_k; 0]` and the same for B̄.

    Args:
        weights: "examples" weighs a client by its number of training examples `n_k`; "equal" by 1.

    Returns:
        The method. A client receives A, B and the residuals of all rounds since its last one as stacked factors,
        `max_k r_k + Σ_k r_k` slots per round, or their dense sum if that is smaller.

    Raises:
        ValueError: `weights` is neither.

    Example:
        >>> fedex_lora().name
        'fedex_lora'

    Where we differ: the paper has one rank. With several, factors are truncated and zero-padded, and the mean stays exact for
    clients of the largest rank. Clients of a lower rank lack slots that the residual has subtracted.
    """
    return Method(
        name="fedex_lora",
        reference=(
            "Singhal, Ponkshe, Vepakomma: FedEx-LoRA, Exact Aggregation for Federated and Efficient Fine-Tuning of "
            "Foundation Models, ACL 2025, arXiv 2410.09432."
        ),
        folds=True,
        distribute=truncate_to_rank,
        weigh=example_weight(weights),
        start=lambda state: _Both(WeightedSum.like(state.adapter), ProductSum.like(state.adapter)),
        add=_add,
        finish=_finish,
        refuses={
            "server_optimizer": "the residual makes the mean exact, which a step beyond the mean would undo",
            "average": "what is folded into the base belongs to the factors of one round",
            "over_slots": "the residual is that of a mean, and there is none",
        },
    )


@dataclass(frozen=True)
class _Both:
    """The sums of the factors and of their products."""

    factors: WeightedSum
    products: ProductSum

    def merge(self, other: _Both) -> _Both:
        return _Both(self.factors.merge(other.factors), self.products.merge(other.products))


def _add(total: _Both, update: ClientUpdate, weight: float) -> _Both:
    return _Both(total.factors.add(update.adapter, weight), total.products.add(update.adapter, weight))


def _finish(state: ServerState, total: _Both) -> ServerState:
    after = weighted_mean(state, total.factors)
    if total.products.weight == 0.0:
        return after
    # Slots without owner in the cohort do not change, and are not part of the average.
    own, mean = truncate(after.adapter, total.factors.slots), total.products.mean()
    residual = {module: mean[module] - ordered_delta(pair) for module, pair in own.items()}
    size = total.products.size + num_bytes(own)
    return replace(after, folded=state.folded.plus(residual, state.round, size))
