"""Principal slots: the mean change of the products, as an adapter whose first slots are its best approximation."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from hetlora.core.adapter import LoraPair, fill_missing_slots, map_tensors, stack, truncated_svd
from hetlora.core.aggregation import StackedSum, weigh_by
from hetlora.core.method import Method, truncate_to_rank
from hetlora.core.types import ServerState

__all__ = ["principal"]


def principal(*, weights: Literal["norm", "examples", "equal"] = "norm") -> Method[StackedSum]:
    """Average the clients' changes of the product `B A`, and put the largest singular values into the first slots.

    `ΔW ← ΔW + Σ_k p_k (B_k A_k - B[:, :r_k] A[:r_k])`, with `p_k = w_k / Σ_j w_j`; then `ΔW = U S Vᵀ`, `B = U S`, `A = Vᵀ`, as
    in `flexlora`. A client thus receives the best approximation of its rank, and slots that it lacks do not change. HetLoRA
    instead averages A and B apart, sends the first slots whatever they hold, and pads missing slots with zeros. The same
    tensors travel. If all ranks are that of the global adapter, this is `flexlora` with the same weights.

    Args:
        weights: "norm" weighs a client by `‖B_k A_k‖_F` as HetLoRA does, "examples" by its number of training examples
            `n_k`; "equal" by 1.

    Returns:
        The method. Exact in the changes up to the rank of the global adapter; singular values beyond it are lost. Under
        `robustness.aggregation` "median" or "trimmed_mean", one robust update replaces all, and owns every slot.

    Raises:
        ValueError: `weights` is none of these.

    Example:
        >>> principal().name
        'principal'
    """
    return Method(
        name="principal",
        reference="This project's own; `hetlora reproduce chat` puts it beside the others.",
        averages="products",
        distribute=truncate_to_rank,
        weigh=weigh_by(weights),
        start=lambda _: StackedSum(),
        add=lambda total, update, weight: total.add(update.adapter, weight),
        finish=_finish,
        refuses={
            "server_optimizer": "the SVD turns the slots every round, so that the momentum of one means nothing",
            "average": "the SVD turns the slots every round, so that a slot is another one in each",
        },
    )


def _finish(state: ServerState, total: StackedSum) -> ServerState:
    """Return `Σ_i (1 - q_i) b_i a_iᵀ + Σ_k p_k B_k A_k` by its SVD, with `q_i` the share of slot i's owners."""
    if total.weight == 0.0:
        return state
    adapter, mean = {}, total.mean()
    for module, before in state.adapter.items():
        rank = before.A.shape[-2]
        share = total.owners.of_slots(module, rank) / total.weight
        stays = LoraPair(before.A.double(), before.B.double() * (1.0 - share))
        sum_of = stack([{module: stays}, {module: mean[module]}])[module]
        adapter[module] = fill_missing_slots(before, truncated_svd(sum_of, rank))
    return replace(state, adapter=map_tensors(lambda factor: factor.float(), adapter))
