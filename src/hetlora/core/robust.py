"""Bounded influence: what one client, honest or not, can do to the average; and aggregations that outvote a few.

A round's updates are held back until all have come, since what is too much is measured against the round's median. Then they
pass, in this order: *norm clipping* of each client's change, per factor, so that inflated factors and the gauge
`(B / 1000, 1000 A)`, whose product is unchanged, are both cut; where asked for, a *robust aggregation*, which outvotes or
leaves out what differs from the others; else the *cap* on weights, as a multiple of the median and as a share of the average.

What is clipped is the change `F_k - F` of a factor against what the client received. The size of a change is its largest
per-slot RMS over all modules. It is therefore independent of the rank, and concentrating a change in one slot gains nothing.

Medians of an even number are the lower one, so that of two answers the larger does not make its own measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median_low
from typing import Literal, get_args

import torch
from torch import Tensor

from hetlora.core.adapter import Adapter, LoraPair, Rank, batch
from hetlora.core.exact_sum import one_thread, tree_sum
from hetlora.core.method import RobustResult, WeightedUpdate
from hetlora.core.types import ClientUpdate, TrainTask

__all__ = ["AGGREGATIONS", "Aggregation", "Robustness", "cap_weights", "krum_order", "trimmed"]

Aggregation = Literal["mean", "median", "trimmed_mean", "krum", "multi_krum"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)
OVER_SLOTS = ("median", "trimmed_mean")
"""Aggregations that take each number of a slot over the clients that own it."""
OF_PRODUCTS = ("krum", "multi_krum")
"""Aggregations that compare the changes of the product B A."""


@dataclass(frozen=True)
class Robustness:
    """The bounds of a round.

    Attributes:
        clip: The most that a client's change of A, and of B, may be, in medians of the round: of the slot that changed most
            the root mean square. None for no clipping.
        weight_cap: The largest weight, in medians of the round's positive ones; None for no cap.
        largest_share: The largest share of the average that one client may have; with fewer than `1 / largest_share` clients
            that have a weight, all of them have the same. None for no bound.
        aggregation: "mean" leaves it to the method. "median" and "trimmed_mean" take each number of A and of B by itself, over
            the clients that own its slot, all with the same weight (Yin et al., ICML 2018). "krum" takes the one update whose
            change of the product `B A` is nearest to those of the others, "multi_krum" the `n - f` nearest (Blanchard et al.,
            NeurIPS 2017).
        byzantine: The share of the round's answers that may be hostile: `f = min(⌈byzantine n⌉, ⌊(n - 3) / 2⌋)` of n. So many
            are trimmed on either side, and Krum measures the distance to the `n - f - 2` nearest others.

    Raises:
        ValueError: A value is out of its range.

    Example:
        >>> Robustness(clip=2.0, largest_share=0.2).aggregation
        'mean'
    """

    clip: float | None = None
    weight_cap: float | None = None
    largest_share: float | None = None
    aggregation: Aggregation = "mean"
    byzantine: float = 0.2

    def __post_init__(self) -> None:
        for name, value in (("clip", self.clip), ("weight_cap", self.weight_cap)):
            if value is not None and not 1.0 <= value < math.inf:
                raise ValueError(f"{name}={value!r} is not allowed; use 1 or more, a multiple of the round's median")
        if self.largest_share is not None and not 0.0 < self.largest_share <= 1.0:
            raise ValueError(f"largest_share={self.largest_share!r} is not allowed; use more than 0 and at most 1")
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation={self.aggregation!r} is not allowed; use one of {', '.join(AGGREGATIONS)}")
        if not 0.0 <= self.byzantine < 0.5:
            raise ValueError(f"byzantine={self.byzantine!r} is not allowed; use 0 or more and less than 0.5")

    def __call__(
        self, answers: Sequence[tuple[TrainTask, ClientUpdate]], weigh: Callable[[ClientUpdate], float]
    ) -> RobustResult:
        """Return what enters the sum in the place of a round's updates, and what became of each of them.

        Args:
            answers: The admitted updates with their tasks, in an order that does not depend on when they came.
            weigh: The method's weight of an update.
        """
        if not answers:
            return RobustResult((), {})
        counted = [WeightedUpdate(update, 0.0) for _, update in answers]
        if self.clip is not None:
            counted = _clip([task for task, _ in answers], counted, self.clip)
        if self.aggregation in OVER_SLOTS:
            most = _outvoted(self.byzantine, len(answers)) if self.aggregation == "trimmed_mean" else len(answers)
            counted = [replace(one, weight=1.0) for one in counted]
            return RobustResult((_over_slots([one.update for one in counted], most),), _by_client(counted))
        taken = list(range(len(counted)))
        if self.aggregation in OF_PRODUCTS:
            bounded = [(task, one.update) for (task, _), one in zip(answers, counted, strict=True)]
            hostile = _outvoted(self.byzantine, len(answers))
            taken = sorted(krum_order(bounded, hostile)[: 1 if self.aggregation == "krum" else len(answers) - hostile])
        raw = [weigh(counted[index].update) for index in taken]
        weights = cap_weights(raw, self.weight_cap, self.largest_share)
        weighed = [_weighed(counted[index], *both) for index, *both in zip(taken, raw, weights, strict=True)]
        result = [_left_out(one) for one in counted]
        for index, one in zip(taken, weighed, strict=True):
            result[index] = one
        return RobustResult(tuple(weighed), _by_client(result))


def _by_client(counted: Sequence[WeightedUpdate]) -> dict[str, WeightedUpdate]:
    return {one.update.client: one for one in counted}


def _outvoted(byzantine: float, answers: int) -> int:
    """Return f, how many of the answers are taken to be hostile: at most as many as can be outvoted."""
    return min(math.ceil(byzantine * answers - 1e-9), max(0, (answers - 3) // 2))


# Norm clipping ------------------------------------------------------------------------------------------------------


def _clip(tasks: Sequence[TrainTask], counted: Sequence[WeightedUpdate], multiple: float) -> list[WeightedUpdate]:
    """Scale down the changes of a factor that are over so many medians of the round."""
    sizes = [_change_sizes(task, one.update) for task, one in zip(tasks, counted, strict=True)]
    limits = {letter: multiple * median_low(size[letter] for size in sizes) for letter in "AB"}
    result = []
    for task, one, size in zip(tasks, counted, sizes, strict=True):
        kept = {letter: limits[letter] / size[letter] for letter in "AB" if size[letter] > limits[letter]}
        adapter = _scaled(task.adapter, one.update.adapter, kept) if kept else one.update.adapter
        result.append(replace(one, update=replace(one.update, adapter=adapter), bounded={**one.bounded, **kept}))
    return result


def _change_sizes(task: TrainTask, update: ClientUpdate) -> dict[str, float]:
    """Return the root mean square change of that slot of A, and of B, that changed most; of factors that travel."""
    largest = dict.fromkeys("AB", 0.0)
    for module, pair in update.adapter.items():
        for letter, start, trained in zip("AB", task.adapter[module], pair, strict=True):
            if letter in task.trains and letter in task.sends:
                change = (trained - _own(start, trained)).double()
                slots = change if letter == "A" else change.mT
                size = (tree_sum(slots.square()).max() / slots.shape[1]).sqrt()
                largest[letter] = max(largest[letter], float(size))
    return largest


def _own(start: Tensor, trained: Tensor) -> Tensor:
    """Return what a client received of the slots that it has sent."""
    return start[: trained.shape[0], : trained.shape[1]]


def _scaled(received: Adapter, trained: Adapter, kept: Mapping[str, float]) -> Adapter:
    """Return `received + kept (trained - received)`, factor by factor; a factor that is not in `kept` as it was trained."""

    def scaled(letter: str, start: Tensor, factor: Tensor) -> Tensor:
        if letter not in kept:
            return factor
        own = _own(start, factor).double()
        return (own + kept[letter] * (factor.double() - own)).float()

    return {
        module: LoraPair(scaled("A", received[module].A, A), scaled("B", received[module].B, B))
        for module, (A, B) in trained.items()
    }


# Weights ------------------------------------------------------------------------------------------------------------


def cap_weights(weights: Sequence[float], multiple: float | None, largest_share: float | None) -> list[float]:
    """Return the weights, none over `multiple` medians of the positive ones, and none over `largest_share` of their sum.

    A share is bounded by lowering the largest weights to one value τ: of m weights that are lowered, and a sum R of the others,
    `τ = s R / (1 - m s)`.

    Args:
        weights: At least 0.
        multiple: Of the median; None for no cap.
        largest_share: s in (0, 1]; None for no bound. Where fewer than `1 / s` are positive, these become equal.

    Example:
        >>> cap_weights([1.0, 2.0, 3.0, 100.0], 2.0, None)
        [1.0, 2.0, 3.0, 4.0]
        >>> cap_weights([1.0, 1.0, 2.0, 60.0], None, 0.5)  # 60 becomes half of the sum
        [1.0, 1.0, 2.0, 4.0]
    """
    positive = [weight for weight in weights if weight > 0.0]
    if not positive:
        return list(weights)
    limit = math.inf if multiple is None else multiple * median_low(positive)
    if largest_share is not None:
        limit = min(limit, _level([min(weight, limit) for weight in positive], largest_share))
    return [min(weight, limit) for weight in weights]


def _level(weights: Sequence[float], share: float) -> float:
    """Return the value to which the largest weights are lowered, so that none is over its share of the sum."""
    falling = sorted(weights, reverse=True)
    rest = math.fsum(falling)
    for lowered, weight in enumerate(falling):
        left = 1.0 - lowered * share
        if left <= 0.0:
            break
        level = share * rest / left
        if weight <= level:
            return level if lowered else weight
        rest = max(0.0, rest - weight)
    return falling[-1]


def _weighed(one: WeightedUpdate, before: float, after: float) -> WeightedUpdate:
    bounded = one.bounded if after >= before else {**one.bounded, "weight": after / before}
    return replace(one, weight=after, bounded=bounded)


def _left_out(one: WeightedUpdate) -> WeightedUpdate:
    return replace(one, weight=0.0, bounded={**one.bounded, "weight": 0.0})


# Aggregations over slots --------------------------------------------------------------------------------------------


def trimmed(values: Tensor, each_side: int) -> Tensor:
    """Return the mean over the first dimension without the `each_side` smallest and largest, at least the median.

    Of n values as many are taken away on either side as leave one, or two of an even number.

    Args:
        values: `[n, ...]`.
        each_side: How many.

    Example:
        >>> trimmed(torch.tensor([1.0, 2.0, 3.0, 1000.0]), 1)
        tensor(2.5000)
    """
    count = len(values)
    cut = min(each_side, (count - 1) // 2)
    kept = values.sort(dim=0).values[cut : count - cut]
    total = torch.zeros_like(kept[0])
    for value in kept:  # one after the other: the order of torch.mean depends on the processor
        total = total + value
    return total / len(kept)


def _over_slots(updates: Sequence[ClientUpdate], each_side: int) -> WeightedUpdate:
    """Return one update of the largest rank: of each number the trimmed mean over the clients that own its slot."""
    modules = updates[0].adapter
    ranks = {module: [update.adapter[module].A.shape[0] for update in updates] for module in modules}
    adapter = {}
    for module in modules:
        pairs = [update.adapter[module] for update in updates]
        # Between two ranks all slots have the same owners.
        ends = sorted(set(ranks[module]))
        parts = []
        for begin, end in zip([0, *ends], ends, strict=False):
            owners = [pair for pair, rank in zip(pairs, ranks[module], strict=True) if rank >= end]
            A = trimmed(torch.stack([pair.A[begin:end] for pair in owners]).double(), each_side)
            B = trimmed(torch.stack([pair.B[:, begin:end] for pair in owners]).double(), each_side)
            parts.append(LoraPair(A.float(), B.float()))
        adapter[module] = LoraPair(torch.cat([A for A, _ in parts]), torch.cat([B for _, B in parts], dim=1))
    largest = {module: max(of) for module, of in ranks.items()}
    rank: Rank = largest if len(set(largest.values())) > 1 else next(iter(largest.values()))
    return WeightedUpdate(replace(updates[0], client="", rank=rank, adapter=adapter), 1.0)


# Krum ---------------------------------------------------------------------------------------------------------------


def krum_order(answers: Sequence[tuple[TrainTask, ClientUpdate]], hostile: int) -> list[int]:
    """Return the indices of updates, the one that is nearest to the others first.

    Krum in the product space: the score of an update is the sum of the squared distances `‖D_k - D_j‖_F²` to its
    `n - f - 2` nearest others, with the change of the product `D_k = B_k A_k - B A` over all modules. Products do not depend on
    the gauge, which a distance of factors does; and changes do not tell that a client of a low rank lacks slots.

    `⟨D_k, D_j⟩` comes from the factors, `D_k = [B_k, -B] [A_k; A]`, module after module and without forming a product.

    Args:
        answers: Tasks and updates.
        hostile: f.
    """
    count = len(answers)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for module in answers[0][0].adapter:
        changes = batch([{module: _change(task.adapter[module], update.adapter[module])} for task, update in answers])
        A, B = changes[module]
        for index in range(count):
            # ⟨B_1 A_1, B_2 A_2⟩ = ⟨B_1ᵀ B_2, A_1 A_2ᵀ⟩
            with one_thread():
                products = (B[index].mT @ B) * (A[index] @ A.mT)  # [count, r, r]
            gram[index] += tree_sum(products.flatten(1))
    own = gram.diagonal()
    distances = (own[:, None] + own[None, :] - (gram + gram.mT)).clamp_min(0.0)  # symmetric to the last bit
    distances.fill_diagonal_(0.0)
    # Its own distance is 0, the smallest of a row.
    scores = tree_sum(distances.sort(dim=1).values[:, 1 : 1 + max(1, count - hostile - 2)])
    return sorted(range(count), key=lambda index: (float(scores[index]), index))


def _change(received: LoraPair, trained: LoraPair) -> LoraPair:
    """Return the change of a module's product, in factors of twice the rank."""
    start_a, start_b = _own(received.A, trained.A).double(), _own(received.B, trained.B).double()
    return LoraPair(torch.cat([trained.A.double(), start_a]), torch.cat([trained.B.double(), -start_b], dim=1))
