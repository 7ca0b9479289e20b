"""The sums of a round, to which methods add one update at a time, in any order.

Every sum works in place and returns itself: a copy per update would double its memory. All sums are exact (see
`hetlora.core.exact_sum`): the same updates give the same bits in any order, and, by `merge`, in any grouping.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from hetlora.core.adapter import (
    Adapter,
    FlatAdapter,
    LoraPair,
    Stack,
    delta_norm,
    num_bytes,
    ordered_delta,
    stack,
    stacked,
    tail,
    truncate,
)
from hetlora.core.exact_sum import AT_ONCE, ExactSum, Summand
from hetlora.core.method import example_weight
from hetlora.core.types import ClientUpdate, ServerState

__all__ = ["ProductSum", "SlotSum", "StackedSum", "WeightedSum", "weigh_by", "weighted_mean"]

LAYOUTS = 4
"""Number of layouts of updates (one per rank) with a sum of their own. Each takes at most the memory of the padded sum."""

WAITING = 2**27
"""Largest number of bytes of updates that wait to be added together."""


@dataclass
class Owners:
    """The sum of the weights per rank, exact: weights are added as fractions.

    Example:
        >>> owners = Owners()
        >>> owners.add({"m": LoraPair(torch.ones(1, 1), torch.ones(1, 1))}, 3.0)
        >>> owners.add({"m": LoraPair(torch.ones(2, 1), torch.ones(1, 2))}, 1.0)
        >>> owners.weight, owners.of_slots("m", 3)
        (4.0, tensor([4., 1., 0.], dtype=torch.float64))

    Attributes:
        by_ranks: The ranks of all modules, by name, to the sum of the weights of the clients with these ranks.
    """

    by_ranks: dict[tuple[tuple[str, int], ...], Fraction] = field(default_factory=dict)

    def add(self, adapter: Adapter, weight: float) -> None:
        """Add the weight of one client."""
        ranks = tuple(sorted((name, pair.A.shape[-2]) for name, pair in adapter.items()))
        self.by_ranks[ranks] = self.by_ranks.get(ranks, Fraction()) + Fraction(weight)

    def merge(self, other: Owners) -> None:
        """Add the weights of another one."""
        for ranks, weight in other.by_ranks.items():
            self.by_ranks[ranks] = self.by_ranks.get(ranks, Fraction()) + weight

    @property
    def weight(self) -> float:
        """The sum of all weights."""
        return float(sum(self.by_ranks.values(), Fraction()))

    @property
    def widest(self) -> dict[str, int]:
        """Module to the largest rank with a positive weight; beyond it there is nothing to average."""
        widest: dict[str, int] = {}
        for ranks, weight in self.by_ranks.items():
            if weight > 0:
                widest.update({name: max(rank, widest.get(name, 0)) for name, rank in ranks})
        return widest

    def of_slots(self, module: str, slots: int) -> Tensor:
        """Return the weight of the owners of each slot i, `Σ_{k: r_k > i} w_k` `[slots]`, float64."""
        owned = [Fraction()] * slots
        for ranks, weight in self.by_ranks.items():
            rank = dict(ranks)[module]
            owned = [total + weight if slot < rank else total for slot, total in enumerate(owned)]
        return torch.tensor([float(total) for total in owned], dtype=torch.float64)  # [slots]


class FactorSum:
    """The exact sums `Σ w_k A_k` and `Σ w_k B_k` over zero-padded factors, in constant memory.

    A few updates wait until they are added together: each number of the sums, which are not in the cache, is then read and
    written once for all of them.

    Args:
        shapes: Module to the shapes of its padded factors.
    """

    def __init__(self, shapes: Mapping[str, tuple[torch.Size, torch.Size]]) -> None:
        self._shapes = shapes
        self._padded: dict[str, list[ExactSum]] = {}
        # Modules of one shape side by side: one operation on contiguous numbers. The slots of a padded B would be strided.
        self._stacked: dict[tuple[Stack, ...], list[list[ExactSum]]] = {}
        self._waiting: dict[tuple[Stack, ...], list[tuple[FlatAdapter, float]]] = {}
        self._bytes_waiting = 0

    def add(self, adapter: Adapter, weight: float) -> None:
        """Add `weight * adapter` into the first slots; the slots that the client lacks receive nothing."""
        flat = stacked(adapter)
        if flat.layout not in self._stacked and len(self._stacked) == LAYOUTS:
            for name, pair in adapter.items():
                for factor, total in zip(pair, self._of(name), strict=True):
                    total.add([Summand(factor[None], weight)], _first(factor.shape))
            return
        if flat.layout not in self._stacked:
            self._stacked[flat.layout] = [[ExactSum(shape) for shape in shapes] for _, *shapes in flat.layout]
        waiting = self._waiting.setdefault(flat.layout, [])
        waiting.append((flat, weight))
        self._bytes_waiting += num_bytes(flat)
        if self._bytes_waiting >= WAITING or len(waiting) == AT_ONCE:
            self.add_waiting()

    def add_waiting(self) -> None:
        """Add the waiting updates."""
        waiting, self._waiting, self._bytes_waiting = self._waiting, {}, 0
        for layout, updates in waiting.items():
            for place, sums in enumerate(self._stacked[layout]):
                for side, total in enumerate(sums):
                    total.add([Summand(update.stacks[place][1][side], weight) for update, weight in updates])

    def merge(self, other: FactorSum) -> None:
        """Add another sum, of no larger shapes. Its memory is reused: do not use it afterwards."""
        self.add_waiting()
        other.add_waiting()
        for layout, sums in other._stacked.items():
            if layout in self._stacked:
                for mine, theirs in zip(self._stacked[layout], sums, strict=True):
                    for total, other_total in zip(mine, theirs, strict=True):
                        total.merge(other_total)
            elif len(self._stacked) < LAYOUTS:
                self._stacked[layout] = sums
            else:
                self._pad(layout, sums)
        for name, both in other._padded.items():
            for total, other_total in zip(self._of(name), both, strict=True):
                total.merge(other_total, _first(other_total.shape[1:]))

    def totals(self) -> dict[str, LoraPair]:
        """Return the padded sums in float64."""
        self.add_waiting()
        while self._stacked:
            self._pad(*self._stacked.popitem())
        return {name: LoraPair(*(total.total()[0] for total in self._of(name))) for name in self._shapes}

    def _pad(self, layout: tuple[Stack, ...], sums: list[list[ExactSum]]) -> None:
        """Add the sums of one layout to the padded ones."""
        for (names, *shapes), both in zip(layout, sums, strict=True):
            for side, (whole, shape) in enumerate(zip(both, shapes, strict=True)):
                for name, part in zip(names, whole.unbind(shape), strict=True):
                    self._of(name)[side].merge(part, _first(shape[1:]))

    def _of(self, module: str) -> list[ExactSum]:
        if module not in self._padded:
            self._padded[module] = [ExactSum((1, *shape)) for shape in self._shapes[module]]
        return self._padded[module]


def _first(shape: Sequence[int]) -> tuple[slice, ...]:
    """Return the index of the part of a padded factor that a factor of this shape fills."""
    return tuple(slice(0, size) for size in shape)


def _shapes(adapter: Adapter) -> dict[str, tuple[torch.Size, torch.Size]]:
    return {name: (A.shape, B.shape) for name, (A, B) in adapter.items()}


@dataclass
class WeightedSum:
    """The streamed sum `Σ w_k A_k, Σ w_k B_k, Σ w_k` over zero-padded factors, exact and in constant memory.

    Example:
        >>> from hetlora.core.adapter import LoraPair
        >>> like = {"m": LoraPair(torch.zeros(2, 1), torch.zeros(1, 2))}
        >>> total = WeightedSum.like(like)
        >>> total = total.add({"m": LoraPair(torch.ones(1, 1), torch.ones(1, 1))}, 3.0)
        >>> total = total.add({"m": LoraPair(torch.ones(2, 1), torch.ones(1, 2))}, 1.0)
        >>> total.mean(like)["m"].B  # slot 0 is in both clients, slot 1 in the second only
        tensor([[1.0000, 0.2500]])

    Attributes:
        factors: The sums of the factors.
        owners: The weights.
    """

    factors: FactorSum
    owners: Owners = field(default_factory=Owners)

    @classmethod
    def like(cls, adapter: Adapter) -> WeightedSum:
        """Return the empty sum for adapters that fit into `adapter`'s shapes."""
        return cls(FactorSum(_shapes(adapter)))

    def add(self, adapter: Adapter, weight: float) -> WeightedSum:
        """Add `weight * adapter` into the first slots; the slots that the client lacks receive zero."""
        self.factors.add(adapter, weight)
        self.owners.add(adapter, weight)
        return self

    def merge(self, other: WeightedSum) -> WeightedSum:
        """Add another sum."""
        self.factors.merge(other.factors)
        self.owners.merge(other.owners)
        return self

    @property
    def weight(self) -> float:
        """The sum of the weights."""
        return self.owners.weight

    @property
    def slots(self) -> dict[str, int]:
        """Return the largest rank with a positive weight, by module; beyond it there is nothing to average."""
        return self.owners.widest

    def mean(self, empty: Adapter) -> Adapter:
        """Return the weighted mean in float32; `empty` if all weights are zero."""
        weight = self.weight
        if weight == 0.0:
            return empty
        totals = self.factors.totals()
        return {name: LoraPair((A / weight).float(), (B / weight).float()) for name, (A, B) in totals.items()}


def weighted_mean(state: ServerState, total: WeightedSum, unowned: Literal["keep", "zero"] = "keep") -> ServerState:
    """Average the zero-padded factors, A and B apart, with the weights of the sum (HetLoRA's step 4; sure).

    Args:
        state: The state the round began from.
        total: The sum over its cohort.
        unowned: "keep" or "zero" the slots beyond the largest rank that came back; see `hetlora.methods.hetlora` (open).
    """
    mean = total.mean(state.adapter)
    if unowned == "zero" or total.weight == 0.0:
        return replace(state, adapter=mean)
    slots = total.slots
    return replace(state, adapter=stack([truncate(mean, slots), tail(state.adapter, slots)]))


@dataclass
class SlotSum:
    """The sums of every slot over its owners, for zero-padded factors, exact and in constant memory.

    Example:
        >>> like = {"m": LoraPair(torch.zeros(2, 1), torch.zeros(1, 2))}
        >>> total = SlotSum.like(like).add({"m": LoraPair(torch.ones(1, 1), torch.ones(1, 1))}, 3.0)
        >>> total.mean(unowned=like)["m"].B  # nobody owns slot 1
        tensor([[1., 0.]])

    Attributes:
        factors: The sums of the factors.
        owners: The weights.
    """

    factors: FactorSum
    owners: Owners = field(default_factory=Owners)

    @classmethod
    def like(cls, adapter: Adapter) -> SlotSum:
        """Return the empty sum for adapters that fit into `adapter`'s shapes."""
        return cls(FactorSum(_shapes(adapter)))

    def add(self, adapter: Adapter, weight: float) -> SlotSum:
        """Add `weight * adapter` into the slots that the client owns."""
        self.factors.add(adapter, weight)
        self.owners.add(adapter, weight)
        return self

    def merge(self, other: SlotSum) -> SlotSum:
        """Add another sum."""
        self.factors.merge(other.factors)
        self.owners.merge(other.owners)
        return self

    def mean(self, unowned: Adapter) -> Adapter:
        """Return every slot's mean over its owners in float32; a slot without owner comes from `unowned`."""
        result, totals = {}, self.factors.totals()
        for name, (A, B) in unowned.items():
            weight, sums = self.owners.of_slots(name, A.shape[-2]), totals[name]
            owned, divisor = weight > 0.0, torch.where(weight > 0.0, weight, 1.0)
            result[name] = LoraPair(
                torch.where(owned[:, None], (sums.A / divisor[:, None]).to(A.dtype), A),
                torch.where(owned, (sums.B / divisor).to(B.dtype), B),
            )
        return result

    def moved(self, before: Adapter) -> Adapter:
        """Return `before` with each slot moved by its owners' mean change times their share of all weights, in float32.

        Nothing moves if all weights are zero.
        """
        whole = self.owners.weight
        if whole == 0.0:
            return before
        result, totals = {}, self.factors.totals()
        for name, (A, B) in before.items():
            weight, sums = self.owners.of_slots(name, A.shape[-2]), totals[name]
            change_a = (sums.A - weight[:, None] * A.double()) / whole
            change_b = (sums.B - weight * B.double()) / whole
            result[name] = LoraPair((A.double() + change_a).to(A.dtype), (B.double() + change_b).to(B.dtype))
        return result


@dataclass
class ProductSum:
    """The dense sum of products `Σ w_k B_k A_k`, exact, for methods that fold it into the base.

    Each product is computed in float64, slot after slot, and then rounded once, like every summand.

    Attributes:
        products: Module to the sum `[1, out, in]`.
        owners: The weights.
        size: Bytes of the added factors.
    """

    products: dict[str, ExactSum]
    owners: Owners = field(default_factory=Owners)
    size: int = 0

    @classmethod
    def like(cls, adapter: Adapter) -> ProductSum:
        """Return the empty sum of the products of adapters that fit into `adapter`'s shapes."""
        return cls({name: ExactSum((1, B.shape[-2], A.shape[-1])) for name, (A, B) in adapter.items()})

    def add(self, adapter: Adapter, weight: float) -> ProductSum:
        """Add `weight * B A`."""
        for name, pair in adapter.items():
            self.products[name].add([Summand(ordered_delta(pair)[None], weight)])
        self.owners.add(adapter, weight)
        self.size += num_bytes(adapter)
        return self

    def merge(self, other: ProductSum) -> ProductSum:
        """Add another sum."""
        for name, product in other.products.items():
            self.products[name].merge(product)
        self.owners.merge(other.owners)
        self.size += other.size
        return self

    @property
    def weight(self) -> float:
        """The sum of the weights."""
        return self.owners.weight

    def mean(self) -> dict[str, Tensor]:
        """Return `Σ w_k B_k A_k / Σ w_k`; zero if all weights are."""
        weight = self.weight or 1.0
        return {name: total.total()[0] / weight for name, total in self.products.items()}


@dataclass
class StackedSum:
    """The sum of products `Σ w_k B_k A_k` as stacked factors, `A = [A_1; A_2; …]` and `B = [w_1 B_1, w_2 B_2, …]`.

    The stacks are ordered by their contents, not by their arrival. If they take more memory than the dense sums of the
    products, the dense sums replace them, so that memory does not grow with the cohort.

    Attributes:
        updates: The added factors with their weights.
        size: Bytes of the added factors.
        dense: The sums of the products, once the stacks are too large.
        owners: The weights.
    """

    updates: list[tuple[float, Adapter]] = field(default_factory=list)
    size: int = 0
    dense: ProductSum | None = None
    owners: Owners = field(default_factory=Owners)

    def add(self, adapter: Adapter, weight: float) -> StackedSum:
        """Add `weight * B A`; the adapter must not change until the round is over."""
        self.owners.add(adapter, weight)
        self.updates.append((weight, adapter))
        self.size += num_bytes(adapter)
        return self._within_bounds()

    def merge(self, other: StackedSum) -> StackedSum:
        """Add another sum."""
        self.owners.merge(other.owners)
        self.updates += other.updates
        self.size += other.size
        if other.dense is not None:
            self.dense = other.dense if self.dense is None else self.dense.merge(other.dense)
        return self._within_bounds()

    def _within_bounds(self) -> StackedSum:
        """Change to dense sums if they take less memory than the stacks; a dense sum has two grids of 8 bytes per number."""
        if (
            self.dense is None
            and self.updates
            and self.size > sum(16 * B.shape[-2] * A.shape[-1] for A, B in self.updates[0][1].values())
        ):
            self.dense = ProductSum.like(self.updates[0][1])
        if self.dense is not None:
            for weight, adapter in self.updates:
                self.dense.add(adapter, weight)
            self.updates.clear()
        return self

    @property
    def weight(self) -> float:
        """The sum of the weights."""
        return self.owners.weight

    def mean(self) -> dict[str, LoraPair]:
        """Return factors of `Σ w_k B_k A_k / Σ w_k` in float64; the weights must not all be zero."""
        if self.dense is not None:
            return {
                name: LoraPair(torch.eye(product.shape[1], dtype=torch.float64), product)
                for name, product in self.dense.mean().items()
            }
        weight = self.weight
        in_order = sorted(self.updates, key=lambda update: (update[0], _digest(update[1])))
        return stack(
            [
                {name: LoraPair(A.double(), B.double() * own_weight / weight) for name, (A, B) in adapter.items()}
                for own_weight, adapter in in_order
            ]
        )


def _digest(adapter: Adapter) -> bytes:
    """Return a digest of an adapter's contents, which does not depend on the order of its modules."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(adapter):
        for factor in adapter[name]:
            digest.update(repr((name, tuple(factor.shape))).encode())
            digest.update(factor.contiguous().numpy().tobytes())
    return digest.digest()


def weigh_by(weights: str) -> Callable[[ClientUpdate], float]:
    """Return the weight of an update: `‖B_k A_k‖_F` for "norm", else that of `hetlora.core.method.example_weight`.

    Raises:
        ValueError: `weights` is none of "norm", "examples", "equal".
    """
    if weights == "norm":
        return lambda update: float(delta_norm(update.adapter))
    if weights not in ("examples", "equal"):
        raise ValueError(f"weights={weights!r} is not allowed; use one of norm, examples, equal")
    return example_weight(weights)
