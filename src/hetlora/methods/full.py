"""Federated full fine-tuning: FedAvg over every weight of the model, the upper reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from hetlora.core.adapter import with_factor
from hetlora.core.aggregation import WeightedSum, weighted_mean
from hetlora.core.method import Method, example_weight, truncate_to_rank
from hetlora.core.types import Client, ServerState, TrainTask

__all__ = ["full"]


def full(*, weights: Literal["examples", "equal"] = "examples") -> Method[WeightedSum]:
    """Fine-tune every weight of the model and average the changes: the upper reference, at full cost.

    `ΔW = Σ_k p_k ΔW_k` for every parameter of the base, biases, norms and embeddings included. Ranks have no effect.

    Args:
        weights: "examples" weighs a client by its number of training examples `n_k`; "equal" by 1.

    Returns:
        The method. A parameter of n numbers travels as n numbers, both ways.

    Raises:
        ValueError: `weights` is neither.

    Example:
        >>> full().trains
        'weights'

    Where we differ: weight decay pulls towards the base's weights, not towards zero.
    """
    return Method(
        name="full",
        reference=(
            "McMahan et al.: Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017, "
            "arXiv 1602.05629."
        ),
        distribute=_change,
        weigh=example_weight(weights),
        start=lambda state: WeightedSum.like(state.adapter),
        add=lambda total, update, weight: total.add(update.adapter, weight),
        finish=_average,
        trains="weights",
        refuses={"adapter": "every weight is trained, and none of an adapter: merge it into the base first"},
    )


def _change(state: ServerState, client: Client) -> TrainTask:
    # A change is `B [n, 1]` beside the constant `A [[1]]`; see Method.trains.
    return replace(truncate_to_rank(state, client), receives="B", trains="B", sends="B")


def _average(state: ServerState, total: WeightedSum) -> ServerState:
    after = weighted_mean(state, total)
    return replace(after, adapter=with_factor(after.adapter, "A", state.adapter))
