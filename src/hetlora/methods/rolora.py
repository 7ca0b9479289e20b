"""RoLoRA: train B and A in turn, with the other factor frozen, so that every average is exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from hetlora.core.adapter import with_factor
from hetlora.core.aggregation import WeightedSum, weighted_mean
from hetlora.core.method import Method, example_weight, truncate_to_rank
from hetlora.core.types import Client, ServerState, TrainTask

__all__ = ["rolora"]


def rolora(*, weights: Literal["examples", "equal"] = "examples") -> Method[WeightedSum]:
    """Train and average B in even rounds and A in odd ones, the other factor frozen.

    Round 0 begins with B, since the gradient of A is zero while B is zero. All clients share the frozen factor, so that the
    mean of the other one gives the mean of the products.

    Args:
        weights: "examples" weighs a client by its number of training examples `n_k`; "equal" by 1.

    Returns:
        The method. A client that answered in the last round receives one factor, else both. It sends one.

    Raises:
        ValueError: `weights` is neither.

    Example:
        >>> rolora().name
        'rolora'

    Where we differ: the paper has one rank. Here clients of lower rank truncate and zero-pad, which stays exact, and slots
    without owner in a cohort keep their values.
    """
    return Method(
        name="rolora",
        reference=(
            "Chen et al.: Robust Federated Finetuning of Foundation Models via Alternating Minimization of LoRA, "
            "arXiv 2409.02346."
        ),
        distribute=_one_factor,
        weigh=example_weight(weights),
        start=lambda state: WeightedSum.like(state.adapter),
        add=lambda total, update, weight: total.add(update.adapter, weight),
        finish=_average_one,
        refuses={"server_optimizer": "by momentum a factor would go on moving while it is frozen"},
    )


def _trained(round_number: int) -> Literal["A", "B"]:
    return "A" if round_number % 2 else "B"


def _one_factor(state: ServerState, client: Client) -> TrainTask:
    letter, before = _trained(state.round), _trained(state.round - 1)
    up_to_date = state.round > 0 and state.answered.get(client.name) == state.round - 1
    return replace(
        truncate_to_rank(state, client), receives=before if up_to_date else "AB", trains=letter, sends=letter
    )


def _average_one(state: ServerState, total: WeightedSum) -> ServerState:
    after = weighted_mean(state, total)
    return replace(after, adapter=with_factor(after.adapter, _trained(state.round - 1), state.adapter))
