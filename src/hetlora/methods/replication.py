"""Replication padding: fill the slots that a client lacks with those of the clients of the highest rank."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from hetlora.core.adapter import LoraPair
from hetlora.core.aggregation import SlotSum, WeightedSum
from hetlora.core.method import Method, example_weight, truncate_to_rank
from hetlora.core.types import ClientUpdate, ServerState

__all__ = ["replication"]


def replication(*, weights: Literal["examples", "equal"] = "examples") -> Method[_Replicated]:
    """Pad a client's missing slots with those of the highest rank's clients instead of zeros, then average.

    `A[i] = Σ_{k: r_k > i} p_k A_k[i] + (Σ_{k: r_k <= i} p_k) A_top[i]`, where `A_top` is the weighted mean over the cohort's
    clients of the highest rank; the same for `B[:, i]`. A slot without owner in the cohort keeps its value.

    Args:
        weights: "examples" weighs a client by its number of training examples `n_k`; "equal" by 1.

    Returns:
        The method. With two ranks it is the mean of every slot over its owners, `rbla`.

    Raises:
        ValueError: `weights` is neither.

    Example:
        >>> replication().name
        'replication'

    Where we differ: the paper has two ranks. The choice of the replicated clients for more ranks is ours (open).
    """
    return Method(
        name="replication",
        reference=(
            "Byun, Lee: Towards Federated Low-Rank Adaptation of Language Models with Rank Heterogeneity, NAACL 2025, "
            "arXiv 2406.17477."
        ),
        distribute=truncate_to_rank,
        weigh=example_weight(weights),
        start=lambda state: _Replicated(SlotSum.like(state.adapter)),
        add=_add,
        finish=_finish,
    )


@dataclass
class _Replicated:
    """The sum of every slot over its owners, and per module the sum over the clients of the highest rank so far."""

    owners: SlotSum
    top: dict[str, WeightedSum] = field(default_factory=dict)
    top_rank: dict[str, int] = field(default_factory=dict)

    def merge(self, other: _Replicated) -> _Replicated:
        self.owners.merge(other.owners)
        for module, rank in other.top_rank.items():
            highest = self.top_rank.get(module, 0)
            if rank > highest:
                self.top[module], self.top_rank[module] = other.top[module], rank
            elif rank == highest:
                self.top[module].merge(other.top[module])
        return self


def _add(total: _Replicated, update: ClientUpdate, weight: float) -> _Replicated:
    total.owners.add(update.adapter, weight)
    for module, pair in update.adapter.items():
        rank, highest = pair.A.shape[-2], total.top_rank.get(module, 0)
        if rank > highest and weight > 0.0:
            total.top[module], total.top_rank[module] = WeightedSum.like({module: pair}), rank
        if rank == total.top_rank.get(module):
            total.top[module].add({module: pair}, weight)
    return total


def _finish(state: ServerState, total: _Replicated) -> ServerState:
    if not total.top:
        return state
    sums, weight = total.owners.factors.totals(), total.owners.owners.weight
    adapter = {}
    for module, before in state.adapter.items():
        rank = total.top_rank[module]
        top = total.top[module].factors.totals()[module]
        owned = total.owners.owners.of_slots(module, rank)  # [rank]
        missing = (weight - owned) / total.top[module].weight
        A, B = before.A.clone(), before.B.clone()
        A[:rank] = ((sums[module].A[:rank] + missing[:, None] * top.A) / weight).float()
        B[:, :rank] = ((sums[module].B[:, :rank] + missing * top.B) / weight).float()
        adapter[module] = LoraPair(A, B)
    return replace(state, adapter=adapter)
