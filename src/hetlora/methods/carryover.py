"""Carryover: zero-padding of changes instead of values, so that no slot decays for want of owners."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from hetlora.core.aggregation import SlotSum, weigh_by
from hetlora.core.method import Method, truncate_to_rank

__all__ = ["carryover"]


def carryover(*, weights: Literal["norm", "examples", "equal"] = "norm") -> Method[SlotSum]:
    """Average what clients changed; a slot that a client lacks counts as unchanged there, not as zero.

    `A[i] ← A[i] + Σ_{k: r_k > i} p_k (A_k[i] - A[i])`, the same for `B[:, i]`, with `p_k = w_k / Σ_j w_j` over the whole
    cohort, owners or not. HetLoRA pads values with zeros: a slot that few clients have shrinks in A and in B each round,
    even if nobody trains. Here it stays, and moves as far as the share of its owners: between zero-padding and `rbla`,
    which moves it all the way to the mean of its owners, one of them if there is only one. Where all ranks are equal,
    all three are FedAvg. What travels is the same.

    Args:
        weights: "norm" weighs a client by `‖B_k A_k‖_F` as HetLoRA does, "examples" by its number of training examples
            `n_k`; "equal" by 1.

    Returns:
        The method. It does not give the mean of the products; nothing decays. Under `robustness.aggregation` "median" or
        "trimmed_mean" one update of nobody stands for all, and a slot is then its median over its owners.

    Raises:
        ValueError: `weights` is none of these.

    Reference:
        This project's own; `hetlora reproduce chat` puts it beside the others.

    Example:
        >>> carryover().name
        'carryover'
    """
    return Method(
        name="carryover",
        distribute=truncate_to_rank,
        weigh=weigh_by(weights),
        start=lambda state: SlotSum.like(state.adapter),
        add=lambda total, update, weight: total.add(update.adapter, weight),
        finish=lambda state, total: replace(state, adapter=total.moved(state.adapter)),
    )
