"""HetLoRA: heterogeneous ranks, rank self-pruning, sparsity-weighted aggregation.

Cho, Liu, Xu, Fahrezi, Joshi: *Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models*, EMNLP 2024,
arXiv 2401.06432. The functions below are the paper's steps, in its order. Each docstring states how sure the step is:
*sure* (abstract, captions), *likely* (independent re-implementations agree) or *open* (chosen here).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Literal

import torch

from hetlora.core.adapter import Adapter, Rank, delta_norm, map_tensors, rank_of, tail_norm, truncate
from hetlora.core.aggregation import WeightedSum, weighted_mean
from hetlora.core.method import Method, Penalty, keep_rank, truncate_to_rank
from hetlora.core.types import ClientUpdate, TrainTask

__all__ = ["hetlora", "norm_weight", "prune_by_tail", "tail_penalty", "tail_start"]


def hetlora(
    *,
    gamma: float = 0.99,
    penalty: float = 0.01,
    min_rank: int = 5,
    pruning: bool = True,
    weights: Literal["norm", "examples", "equal"] = "norm",
    unowned: Literal["keep", "zero"] = "keep",
    per_module: bool = False,
) -> Method[WeightedSum]:
    r"""Fine-tune clients of different ranks, with self-pruning and weights by the norm of the update.

    A round: client k receives the first `r_k` slots of the global `Ā, B̄`; minimises
    `F_k(W0 + s B A) + λ Σ_modules ‖B[:, tail]‖_F ‖A[tail, :]‖_F` with the tail `max(r_min, ⌊γ r_k⌋) … r_k - 1`; cuts the tail
    if its product of norms became smaller than in what it received; and the server averages the zero-padded factors, A and B
    apart, with `p_k = ‖B_k A_k‖_F / Σ_j ‖B_j A_j‖_F`.

    Args:
        gamma: The decay factor γ in (0, 1]. 0.99 is the paper's headline (likely): the tail is exactly one slot for every
            rank up to 100. 1 switches self-pruning off, and the penalty with it.
        penalty: The factor λ >= 0 of the tail penalty. The paper's value is not known (open). 0.01 is small beside a
            language model's loss, so that it decides between slots but does not dominate the fine-tuning.
        min_rank: r_min >= 1, the lowest rank after pruning (5 in the paper, likely). A client that starts below it keeps its
            rank. A client at r_min has no tail and pays no penalty (open: the penalty would shrink slots that cannot be cut).
        pruning: False keeps the ranks and the penalty, for ablations.
        weights: "norm" is the paper's; "examples" (`n_k`) and "equal" are for ablations.
        unowned: The global slots beyond the largest rank that came back in a round, after pruning (open): "keep" leaves them
            as they were, since other clients may still have them. "zero" pads to r_max in every round, which kills such slots:
            a slot that is zero in A and in B has no gradient, so that no later client can revive it.
        per_module: Prune each module by its own test, instead of one rank per client over all modules. The paper speaks
            of a client's rank (likely), hence the default.

    Returns:
        The method.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> method = hetlora(gamma=0.99, min_rank=2)
        >>> method.name
        'hetlora'

    Where we differ: the paper's text was not at hand, only its abstract, its captions and what others wrote about it. Open, and
    chosen here: λ, the optimiser and its rates, alpha (one scaling `s` for all), a tail that begins at `max(r_min, ⌊γ r_k⌋)`,
    weights after pruning, `unowned`, and an unchanged adapter if all norms are zero. The clients report their norms; unlike
    the paper, admission and `hetlora.core.robust` bound them.
    """
    _check(
        ("gamma", gamma, 0.0 < gamma <= 1.0, "in (0, 1]; 1 switches self-pruning off"),
        ("penalty", penalty, 0.0 <= penalty < math.inf, "0 or more"),
        ("min_rank", min_rank, isinstance(min_rank, int) and min_rank >= 1, "a whole number, 1 or more"),
        ("unowned", unowned, unowned in ("keep", "zero"), "one of keep, zero"),
        ("weights", weights, weights in ("norm", "examples", "equal"), "one of norm, examples, equal"),
    )

    prunes = pruning and gamma < 1.0

    def prune(task: TrainTask, update: ClientUpdate) -> ClientUpdate:
        return prune_by_tail(task, update, gamma=gamma, min_rank=min_rank, per_module=per_module)

    return Method(
        name="hetlora",
        reference=(
            "Cho et al.: Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, EMNLP 2024, "
            "arXiv 2401.06432."
        ),
        # 1, server: the first r_k slots
        distribute=truncate_to_rank,
        # 2 and 3, client: local training with a penalty on the tail, then self-pruning
        penalty=lambda tasks: tail_penalty(tasks, gamma=gamma, penalty=penalty, min_rank=min_rank),
        prune=prune if prunes else keep_rank,
        lowest_rank=None if not prunes else lambda rank: tail_start(rank, gamma, min_rank),
        # 4, server: sparsity-weighted mean of the zero-padded factors, A and B apart
        weigh=lambda update: norm_weight(update, weights),
        start=lambda state: WeightedSum.like(state.adapter),
        add=lambda total, update, weight: total.add(update.adapter, weight),
        finish=lambda state, total: weighted_mean(state, total, unowned),
    )


# Steps 2 and 3, client: local training with a penalty on the tail, then rank self-pruning ---------------------------


def tail_start(rank: int, gamma: float, min_rank: int) -> int:
    """Return the first slot of the tail, `max(r_min, ⌊γ r⌋)`, at most `rank`: the rank after a prune.

    The product is exact in decimal: `⌊0.29 * 100⌋` is 29, where binary floating point gives 28.

    Example:
        >>> [tail_start(rank, 0.99, 5) for rank in (100, 50, 6, 5, 3)]
        [99, 49, 5, 5, 3]
    """
    return min(rank, max(min_rank, int(Fraction(str(gamma)) * rank)))


def tail_penalty(tasks: Sequence[TrainTask], *, gamma: float, penalty: float, min_rank: int) -> Penalty | None:
    """Return the map from live factors `[G, ...]` to `λ Σ_modules ‖B[:, tail]‖_F ‖A[tail, :]‖_F  [G]` (likely)."""
    if penalty == 0.0 or gamma == 1.0:
        return None
    first = {
        module: torch.tensor([tail_start(rank_of(task.rank, module), gamma, min_rank) for task in tasks])
        for module in tasks[0].adapter
    }

    def tails(adapter: Adapter) -> torch.Tensor:
        return penalty * tail_norm(adapter, first)

    return tails


def prune_by_tail(
    task: TrainTask, update: ClientUpdate, *, gamma: float, min_rank: int, per_module: bool
) -> ClientUpdate:
    """Cut the tail if its product of norms is strictly smaller than that of the received tail (likely).

    A client whose received tail is zero cannot prune. So no client prunes in round 0, where B = 0.
    """
    ranks = {module: rank_of(task.rank, module) for module in task.adapter}
    first = {module: tail_start(rank, gamma, min_rank) for module, rank in ranks.items()}
    tests = [{module: start} for module, start in first.items()] if per_module else [first]
    cut = {
        module: start for test in tests if _shrank(test, task.adapter, update.adapter) for module, start in test.items()
    }
    if not cut:
        return update
    one_rank = isinstance(task.rank, int) and not per_module
    rank: Rank = next(iter(cut.values())) if one_rank else {**ranks, **cut}
    return replace(update, rank=rank, adapter=truncate(update.adapter, rank))


def _shrank(first: Mapping[str, int], received: Adapter, trained: Adapter) -> bool:
    """Whether `Σ ‖B[:, tail]‖ ‖A[tail]‖` over the modules in `first` is strictly smaller after training."""
    before, after = (  # contiguous: equal numbers then have equal norms
        tail_norm(map_tensors(lambda f: f.double().contiguous(), {module: side[module] for module in first}), first)
        for side in (received, trained)
    )
    return bool(after < before)


# Step 4, server: sparsity-weighted aggregation --------------------------------------------------------------------


def norm_weight(update: ClientUpdate, weights: str = "norm") -> float:
    """Return `w_k = ‖B_k A_k‖_F` over all modules, one weight per client (sure; one weight: likely; after pruning: open)."""
    if weights == "norm":
        return float(delta_norm(update.adapter))
    return float(update.examples) if weights == "examples" else 1.0


def _check(*arguments: tuple[str, object, bool, str]) -> None:
    """Raise one error for all arguments that are out of their range."""
    wrong = [
        f"{name}={value!r} is not allowed; use {accepted}" for name, value, holds, accepted in arguments if not holds
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
