"""Bounds on the influence of one client on the average, and robust aggregations.

All bounds are relative to the round's medians, so that a round's updates are held until the last one has come. The steps are:

1. *norm clipping* of each client's change, per factor. It cuts inflated factors, and also the gauge `(B / 1000, 1000 A)`, whose
   product is unchanged;
2. if configured, a *robust aggregation*, which outvotes or leaves out updates that differ from the others;
3. else the *cap* on weights, as a multiple of the median and as a share of the average.

Clipping applies to the change `F_k - F` of a factor from the received one. The size of a change is its largest
per-slot RMS over all modules. It is therefore independent of the rank, and concentrating a change in one slot gains nothing.

The median of an even number of values is the lower middle one, so that of two answers the larger one does not set its own
limit.
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
        clip: The largest size of a client's change of A, and of B, in medians of the round. None for no clipping.
        weight_cap: The largest weight, in medians of the round's positive weights; None for no cap.
        largest_share: The largest share of one client in the average. If fewer than `1 / largest_share` clients have a weight,
            their weights become equal. None for no bound.
        aggregation: "mean" leaves it to the method. "median" and "trimmed_mean" take each number of A and of B by itself, over
            the owners of its slot, with equal weights (Yin et al., ICML 2018). "krum" takes the one update whose change of the
            product `B A` is nearest to those of the others, "multi_krum" the `n - f` nearest (Blanchard et al., NeurIPS 2017).
        byzantine: The share of the round's n answers that may be hostile, `f = min(⌈byzantine n⌉, ⌊(n - 3) / 2⌋)` answers.
            The trimmed mean trims f values on either side, and Krum sums the distances to the `n - f - 2` nearest others.

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
        """Return the summands that replace a round's updates, and each update with its weight.

        Args:
            answers: The admitted updates with their tasks, in an order that does not depend on their arrival.
            weigh: The method's weight of an update.
        """
        if not answers:
            return RobustResult((), {})
        counted = [WeightedUpdate(update, 0.0) for _, update in answers]
        if self.clip is not None:
            counted = _clip([task for task, _ in answers], counted, self.clip)
        if self.aggregation in OVER_SLOTS:
            each_side = _hostile(self.byzantine, len(answers)) if self.aggregation == "trimmed_mean" else len(answers)
            counted = [replace(weighted, weight=1.0) for weighted in counted]
            summand = _over_slots([weighted.update for weighted in counted], each_side)
            return RobustResult((summand,), _by_client(counted))
        taken = list(range(len(counted)))
        if self.aggregation in OF_PRODUCTS:
            bounded = [(task, weighted.update) for (task, _), weighted in zip(answers, counted, strict=True)]
            hostile = _hostile(self.byzantine, len(answers))
            taken = sorted(krum_order(bounded, hostile)[: 1 if self.aggregation == "krum" else len(answers) - hostile])
        raw = [weigh(counted[index].update) for index in taken]
        weights = cap_weights(raw, self.weight_cap, self.largest_share)
        summands = [_with_weight(counted[index], *both) for index, *both in zip(taken, raw, weights, strict=True)]
        result = [_left_out(weighted) for weighted in counted]
        for index, summand in zip(taken, summands, strict=True):
            result[index] = summand
        return RobustResult(tuple(summands), _by_client(result))


def _by_client(counted: Sequence[WeightedUpdate]) -> dict[str, WeightedUpdate]:
    return {weighted.update.client: weighted for weighted in counted}


def _hostile(byzantine: float, answers: int) -> int:
    """Return f, the number of answers taken to be hostile, at most as many as can be outvoted."""
    return min(math.ceil(byzantine * answers - 1e-9), max(0, (answers - 3) // 2))


# Norm clipping ------------------------------------------------------------------------------------------------------


def _clip(tasks: Sequence[TrainTask], counted: Sequence[WeightedUpdate], multiple: float) -> list[WeightedUpdate]:
    """Scale down the changes of a factor that exceed `multiple` medians of the round."""
    sizes = [_change_sizes(task, weighted.update) for task, weighted in zip(tasks, counted, strict=True)]
    limits = {letter: multiple * median_low(size[letter] for size in sizes) for letter in "AB"}
    result = []
    for task, weighted, size in zip(tasks, counted, sizes, strict=True):
        update = weighted.update
        kept = {letter: limits[letter] / size[letter] for letter in "AB" if size[letter] > limits[letter]}
        adapter = _scaled(task.adapter, update.adapter, kept) if kept else update.adapter
        result.append(replace(weighted, update=replace(update, adapter=adapter), bounded={**weighted.bounded, **kept}))
    return result


def _change_sizes(task: TrainTask, update: ClientUpdate) -> dict[str, float]:
    """Return the largest per-slot RMS change of A and of B, for trained factors that travel."""
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
    """Return the received values of the slots that a client sent."""
    return start[: trained.shape[0], : trained.shape[1]]


def _scaled(received: Adapter, trained: Adapter, kept: Mapping[str, float]) -> Adapter:
    """Return `received + kept (trained - received)` for the factors in `kept`, and the others as trained."""

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

    The m largest weights are lowered to one value `τ = s R / (1 - m s)`, where R is the sum of the others.

    Args:
        weights: At least 0.
        multiple: Multiple of the median; None for no cap.
        largest_share: s in (0, 1]; None for no bound. If fewer than `1 / s` weights are positive, they become equal.

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
    """Return the value to which the largest weights are lowered, so that none exceeds `share` of the sum."""
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


def _with_weight(weighted: WeightedUpdate, before: float, after: float) -> WeightedUpdate:
    bounded = weighted.bounded if after >= before else {**weighted.bounded, "weight": after / before}
    return replace(weighted, weight=after, bounded=bounded)


def _left_out(weighted: WeightedUpdate) -> WeightedUpdate:
    return replace(weighted, weight=0.0, bounded={**weighted.bounded, "weight": 0.0})


# Aggregations over slots --------------------------------------------------------------------------------------------


def trimmed(values: Tensor, each_side: int) -> Tensor:
    """Return the mean over the first dimension without the `each_side` smallest and largest values, at least the median.

    Args:
        values: `[n, ...]`.
        each_side: Number of values to trim on either side; at least one value stays, or two of an even number.

    Example:
        >>> trimmed(torch.tensor([1.0, 2.0, 3.0, 1000.0]), 1)
        tensor(2.5000)
    """
    count = len(values)
    cut = min(each_side, (count - 1) // 2)
    kept = values.sort(dim=0).values[cut : count - cut]
    total = torch.zeros_like(kept[0])
    for value in kept:  # the order of torch.mean depends on the processor
        total = total + value
    return total / len(kept)


def _over_slots(updates: Sequence[ClientUpdate], each_side: int) -> WeightedUpdate:
    """Return one update of the largest rank: each number is the trimmed mean over the owners of its slot."""
    modules = updates[0].adapter
    ranks = {module: [update.adapter[module].A.shape[0] for update in updates] for module in modules}
    adapter = {}
    for module in modules:
        pairs = [update.adapter[module] for update in updates]
        # All slots between two consecutive ranks have the same owners.
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
    """Return the indices of the updates, the one nearest to the others first: Krum in the product space.

    The score of an update is the sum of the squared distances `‖D_k - D_j‖_F²` to its `n - f - 2` nearest others, with
    the change of the product `D_k = B_k A_k - B A` over all modules. Products, unlike factors, do not depend on the gauge;
    changes, unlike values, do not show that a client of a low rank lacks slots.

    `⟨D_k, D_j⟩` comes from the factors, `D_k = [B_k, -B] [A_k; A]`, module after module and without forming a product.

    Args:
        answers: Tasks and updates.
        hostile: f.
    """
    count = len(answers)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for module in answers[0][0].adapter:
        changes = batch([{module: _change(task.adapter[module], update.adapter[module])} for task, update in answers])
        A, B = changes[module]  # [n, 2 r, in], [n, out, 2 r]
        for index in range(count):
            # ⟨B_1 A_1, B_2 A_2⟩ = ⟨B_1ᵀ B_2, A_1 A_2ᵀ⟩
            with one_thread():
                products = (B[index].mT @ B) * (A[index] @ A.mT)  # [n, 2 r, 2 r]
            gram[index] += tree_sum(products.flatten(1))
    own = gram.diagonal()  # [n]
    distances = (own[:, None] + own[None, :] - (gram + gram.mT)).clamp_min(0.0)  # [n, n], symmetric to the last bit
    distances.fill_diagonal_(0.0)
    # The first of each sorted row is the distance to itself.
    scores = tree_sum(distances.sort(dim=1).values[:, 1 : 1 + max(1, count - hostile - 2)])  # [n]
    return sorted(range(count), key=lambda index: (float(scores[index]), index))


def _change(received: LoraPair, trained: LoraPair) -> LoraPair:
    """Return the change of a module's product as factors of twice the rank: `[B_k, -B] [A_k; A]`."""
    start_a, start_b = _own(received.A, trained.A).double(), _own(received.B, trained.B).double()
    return LoraPair(torch.cat([trained.A.double(), start_a]), torch.cat([trained.B.double(), -start_b], dim=1))
