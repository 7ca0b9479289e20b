"""Carryover: zero-padding of changes instead of values, so that slots with few owners do not decay."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from hetlora.core.aggregation import SlotSum, weigh_by
from hetlora.core.method import Method, truncate_to_rank

__all__ = ["carryover"]


def carryover(*, weights: Literal["norm", "examples", "equal"] = "norm") -> Method[SlotSum]:
    """Average the clients' changes; a slot that a client lacks counts as unchanged, not as zero.

    `A[i] ← A[i] + Σ_{k: r_k > i} p_k (A_k[i] - A[i])`, the same for `B[:, i]`, with `p_k = w_k / Σ_j w_j` over the whole
    cohort. HetLoRA pads values with zeros: a slot that few clients have shrinks in A and in B each round, even if no client
    trains. Here it stays, and moves by the share of its owners. `rbla` instead moves it all the way to the mean of its owners,
    even of a single one. If all ranks are equal, all three are FedAvg. The same tensors travel.

    Args:
        weights: "norm" weighs a client by `‖B_k A_k‖_F` as HetLoRA does, "examples" by its number of training examples
            `n_k`; "equal" by 1.

    Returns:
        The method. It does not give the mean of the products; nothing decays. Under `robustness.aggregation` "median" or
        "trimmed_mean", one robust update replaces all, so that a slot becomes its median over its owners.

    Raises:
        ValueError: `weights` is none of these.

    Example:
        >>> carryover().name
        'carryover'
    """
    return Method(
        name="carryover",
        reference="This project's own; `hetlora reproduce chat` puts it beside the others.",
        distribute=truncate_to_rank,
        weigh=weigh_by(weights),
        start=lambda state: SlotSum.like(state.adapter),
        add=lambda total, update, weight: total.add(update.adapter, weight),
        finish=lambda state, total: replace(state, adapter=total.moved(state.adapter)),
    )
