"""Replication padding: the slots a client lacks are filled with those of the clients of the highest rank."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from hetlora.adapter import Adapter, LoraPair
from hetlora.aggregation import SlotSum
from hetlora.federated import ClientUpdate, Method, ServerState, example_weight, truncate_to_rank

__all__ = ["replication"]


def replication(*, weights: Literal["examples", "equal"] = "examples") -> Method[_Replicated]:
    """Pad a client's missing slots with those of the highest rank's clients instead of zeros, then average.

    `A[i] = Σ_{k: r_k > i} p_k A_k[i] + (Σ_{k: r_k <= i} p_k) A_top[i]`, where `A_top` is the weighted mean over the cohort's
    clients of the highest rank; the same for `B[:, i]`. A slot that nobody in the cohort has keeps its value.

    Args:
        weights: "examples" weighs a client by its number of training examples `n_k`; "equal" by 1.

    Returns:
        The method. With two ranks it is the mean of every slot over its owners, `rbla`.

    Raises:
        ValueError: `weights` is neither.

    Reference:
        Byun, Lee: Towards Federated Low-Rank Adaptation of Language Models with Rank Heterogeneity, NAACL 2025,
        arXiv 2406.17477.

    Example:
        >>> replication().name
        'replication'

    Where we differ: the paper has two ranks; which clients are replicated where there are more is chosen here (open).
    """
    return Method(
        name="replication",
        distribute=truncate_to_rank,
        weigh=example_weight(weights),
        start=lambda state: _Replicated(SlotSum.like(state.adapter)),
        add=_add,
        finish=_finish,
    )


@dataclass
class _Replicated:
    """The sum of every slot over its owners, and for every module that over the clients of the highest rank yet."""

    owners: SlotSum
    top: dict[str, LoraPair] = field(default_factory=dict)
    top_weight: dict[str, float] = field(default_factory=dict)
    weight: float = 0.0


def _add(total: _Replicated, update: ClientUpdate, weight: float) -> _Replicated:
    total.owners.add(update.adapter, weight)
    total.weight += weight
    for module, (A, B) in update.adapter.items():
        scaled, have = LoraPair(weight * A.double(), weight * B.double()), total.top.get(module)
        if have is None or A.shape[-2] > have.A.shape[-2]:
            total.top[module], total.top_weight[module] = scaled, weight
        elif A.shape[-2] == have.A.shape[-2]:
            total.top[module] = LoraPair(have.A + scaled.A, have.B + scaled.B)
            total.top_weight[module] += weight
    return total


def _finish(state: ServerState, total: _Replicated) -> ServerState:
    adapter: Adapter = {module: _fill(total, module, before) for module, before in state.adapter.items()}
    return replace(state, adapter=adapter)


def _fill(total: _Replicated, module: str, before: LoraPair) -> LoraPair:
    top, rank = total.top[module], total.top[module].A.shape[-2]
    sums, owned = total.owners.adapter[module], total.owners.weight[module][:rank]
    missing: Tensor = (total.weight - owned) / total.top_weight[module]
    A, B = before.A.clone(), before.B.clone()
    A[:rank] = ((sums.A[:rank] + missing[:, None] * top.A) / total.weight).float()
    B[:, :rank] = ((sums.B[:, :rank] + missing * top.B) / total.weight).float()
    return LoraPair(A, B)
