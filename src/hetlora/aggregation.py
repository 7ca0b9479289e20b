"""The sums a round is streamed into, one update at a time and in any order: what methods are made of.

Every sum takes an update over, works in place and returns itself, because it is the round's own and a copy an update
would double its memory. All accumulate in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from hetlora.adapter import (
    Adapter,
    LoraPair,
    Stack,
    StackedAdapter,
    best_rank,
    delta_norm,
    map_tensors,
    num_bytes,
    stack,
    tail,
    truncate,
)
from hetlora.federated import ClientUpdate, ServerState, example_weight

__all__ = ["ProductSum", "SlotSum", "StackedSum", "WeightedSum", "weigh_by", "weighted_mean"]

LAYOUTS = 4
"""How many layouts of updates, so how many ranks, have a sum of their own: each takes at most the memory of the padded one."""

BLOCK = 2**17
"""Numbers that are added at a time: their float64 cast, 1 MiB, is read again from the cache."""


@dataclass
class WeightedSum:
    """The streamed sum `Σ w_k A_k, Σ w_k B_k, Σ w_k` over zero-padded factors, in float64 and constant memory.

    Example:
        >>> from hetlora.adapter import LoraPair
        >>> like = {"m": LoraPair(torch.zeros(2, 1), torch.zeros(1, 2))}
        >>> total = WeightedSum.like(like)
        >>> total = total.add({"m": LoraPair(torch.ones(1, 1), torch.ones(1, 1))}, 3.0)
        >>> total = total.add({"m": LoraPair(torch.ones(2, 1), torch.ones(1, 2))}, 1.0)
        >>> total.mean(like)["m"].B  # slot 0 is in both clients, slot 1 in the second only
        tensor([[1.0000, 0.2500]])

    Attributes:
        adapter: The sums, in the shape of the global adapter.
        weight: The sum of the weights.
        slots: Module to the largest rank that was added with a weight: beyond it nobody gave anything to average.
        stacked: The sums of stacked updates a layout, which `mean` adds to the others: one operation on contiguous numbers
            an update, where slots of B in a padded sum would be strided.
    """

    adapter: Adapter
    weight: float = 0.0
    slots: dict[str, int] = field(default_factory=dict)
    stacked: dict[tuple[Stack, ...], Tensor] = field(default_factory=dict)

    @classmethod
    def like(cls, adapter: Adapter) -> WeightedSum:
        """Return the empty sum for adapters that fit into `adapter`'s shapes."""
        return cls(map_tensors(lambda factor: torch.zeros_like(factor, dtype=torch.float64), adapter))

    def add(self, adapter: Adapter, weight: float) -> WeightedSum:
        """Add `weight * adapter` into the first slots; the slots a client does not have receive zero."""
        if isinstance(adapter, StackedAdapter) and (adapter.layout in self.stacked or len(self.stacked) < LAYOUTS):
            if adapter.layout not in self.stacked:
                self.stacked[adapter.layout] = torch.zeros_like(adapter.numbers, dtype=torch.float64)
            sums = self.stacked[adapter.layout]
            for total, part in zip(torch.split(sums, BLOCK), torch.split(adapter.numbers, BLOCK), strict=True):
                total.add_(part, alpha=weight)
        else:
            self._add(adapter, weight)
        if weight > 0.0:
            for name, pair in adapter.items():
                self.slots[name] = max(self.slots.get(name, 0), pair.A.shape[-2])
        self.weight += weight
        return self

    def _add(self, adapter: Adapter, weight: float) -> None:
        for name, (A, B) in adapter.items():
            self.adapter[name].A[..., : A.shape[-2], :].add_(A, alpha=weight)
            self.adapter[name].B[..., :, : B.shape[-1]].add_(B, alpha=weight)

    def mean(self, empty: Adapter) -> Adapter:
        """Return the weighted mean in float32; `empty` where all weights were zero and there is nothing to average."""
        if self.weight == 0.0:
            return empty
        while self.stacked:
            layout, numbers = self.stacked.popitem()
            self._add(StackedAdapter(numbers, layout), 1.0)
        return map_tensors(lambda factor: (factor / self.weight).to(torch.float32), self.adapter)


def weighted_mean(state: ServerState, total: WeightedSum, unowned: Literal["keep", "zero"] = "keep") -> ServerState:
    """Average the zero-padded factors, A and B apart, with the weights of the sum (HetLoRA's step 4; sure).

    Args:
        state: The state the round began from.
        total: The sum over its cohort.
        unowned: What becomes of the slots beyond the largest rank that came back; see `hetlora.methods.hetlora` (open).
    """
    mean = total.mean(state.adapter)
    if unowned == "zero" or not total.slots:
        return replace(state, adapter=mean)
    kept = tail(state.adapter, total.slots)
    return replace(state, adapter=stack([truncate(mean, total.slots), kept]))


@dataclass(frozen=True)
class SlotSum:
    """The sums of every slot over its owners, for zero-padded factors.

    Example:
        >>> total = SlotSum.like({"m": LoraPair(torch.zeros(2, 1), torch.zeros(1, 2))})
        >>> total = total.add({"m": LoraPair(torch.ones(1, 1), torch.ones(1, 1))}, 3.0)
        >>> total.weight["m"]
        tensor([3., 0.], dtype=torch.float64)

    Attributes:
        adapter: `Σ w_k A_k [r_max, in]`, `Σ w_k B_k [out, r_max]`.
        weight: Module to `Σ_{k: r_k > i} w_k`, one number a slot `[r_max]`.
    """

    adapter: Adapter
    weight: Mapping[str, Tensor]

    @classmethod
    def like(cls, adapter: Adapter) -> SlotSum:
        """Return the empty sum for adapters that fit into `adapter`'s shapes."""
        zeros = map_tensors(lambda factor: torch.zeros_like(factor, dtype=torch.float64), adapter)
        return cls(zeros, {name: torch.zeros(A.shape[-2], dtype=torch.float64) for name, (A, _) in adapter.items()})

    def add(self, adapter: Adapter, weight: float) -> SlotSum:
        """Add `weight * adapter` into the slots that the client owns."""
        for name, (A, B) in adapter.items():
            rank = A.shape[-2]
            self.adapter[name].A[:rank].add_(A, alpha=weight)
            self.adapter[name].B[:, :rank].add_(B, alpha=weight)
            self.weight[name][:rank] += weight
        return self

    def mean(self, unowned: Adapter) -> Adapter:
        """Return every slot's mean over its owners in float32; the slot of `unowned` where it has none."""
        result = {}
        for name, (A, B) in unowned.items():
            weight, sums = self.weight[name], self.adapter[name]
            owned, divisor = weight > 0.0, weight.clamp_min(torch.finfo(torch.float64).tiny)
            result[name] = LoraPair(
                torch.where(owned[:, None], (sums.A / divisor[:, None]).to(A.dtype), A),
                torch.where(owned, (sums.B / divisor).to(B.dtype), B),
            )
        return result

    def moved(self, before: Adapter) -> Adapter:
        """Return `before` with every slot moved by its owners' mean change times their share of all weights, in float32.

        Every client has slot 0, so that its weight is that of all. Where all weights were zero, nothing moves.
        """
        result = {}
        for name, (A, B) in before.items():
            weight, sums = self.weight[name], self.adapter[name]
            whole = weight[0].clamp_min(torch.finfo(torch.float64).tiny)
            change_a = (sums.A - weight[:, None] * A.double()) / whole
            change_b = (sums.B - weight * B.double()) / whole
            result[name] = LoraPair((A.double() + change_a).to(A.dtype), (B.double() + change_b).to(B.dtype))
        return result


@dataclass
class StackedSum:
    """The sum of products `Σ w_k B_k A_k` as stacked factors, `A = [A_1; A_2; …]` and `B = [w_1 B_1, w_2 B_2, …]`.

    Exact, and never wider than `3 min(out, in)` slots: beyond twice as many as the product can have rank, the stack is
    written anew by its own SVD.

    Attributes:
        adapter: The stacks, float64; empty before the first update.
        weight: The sum of the weights.
    """

    adapter: Adapter = field(default_factory=dict)
    weight: float = 0.0

    def add(self, adapter: Adapter, weight: float) -> StackedSum:
        """Stack `weight * B A` on top."""
        piece = {name: LoraPair(A.double(), weight * B.double()) for name, (A, B) in adapter.items()}
        joined = stack([self.adapter, piece]) if self.adapter else piece
        self.adapter = {name: _within_rank(pair) for name, pair in joined.items()}
        self.weight += weight
        return self


def _within_rank(pair: LoraPair) -> LoraPair:
    full = min(pair.A.shape[-1], pair.B.shape[-2])
    return best_rank(pair, full) if pair.A.shape[-2] > 2 * full else pair


@dataclass
class ProductSum:
    """The dense sum of products `Σ w_k B_k A_k`, for methods that fold it into the base.

    Attributes:
        delta: Module to the sum `[out, in]`, float64.
        weight: The sum of the weights.
        size: Bytes of the stacked factors that it is made of.
    """

    delta: dict[str, Tensor]
    weight: float = 0.0
    size: int = 0

    @classmethod
    def like(cls, adapter: Adapter) -> ProductSum:
        """Return the empty sum of the products of adapters that fit into `adapter`'s shapes."""
        shapes = {name: (B.shape[-2], A.shape[-1]) for name, (A, B) in adapter.items()}
        return cls({name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()})

    def add(self, adapter: Adapter, weight: float) -> ProductSum:
        """Add `weight * B A`."""
        for name, (A, B) in adapter.items():
            self.delta[name].addmm_(B.double(), A.double(), alpha=weight)
        self.weight += weight
        self.size += num_bytes(adapter)
        return self

    def mean(self) -> dict[str, Tensor]:
        """Return `Σ w_k B_k A_k / Σ w_k`; zero where all weights were."""
        return {name: total / (self.weight or 1.0) for name, total in self.delta.items()}


def weigh_by(weights: str) -> Callable[[ClientUpdate], float]:
    """Return the weight of an update: `‖B_k A_k‖_F` for "norm", else that of `hetlora.federated.example_weight`.

    Raises:
        ValueError: `weights` is none of "norm", "examples", "equal".
    """
    if weights == "norm":
        return lambda update: float(delta_norm(update.adapter))
    if weights not in ("examples", "equal"):
        raise ValueError(f"weights={weights!r} is not allowed; use one of norm, examples, equal")
    return example_weight(weights)
