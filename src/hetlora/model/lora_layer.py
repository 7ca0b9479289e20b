"""The LoRA layer: a frozen linear module, plus the low-rank products of the G clients whose rows pass through it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hetlora.core.adapter import LoraPair, ModuleShape
from hetlora.errors import ShapeError

__all__ = ["ActiveFactors", "LoraLayer"]


class ActiveFactors(threading.local):
    """The factors of all LoRA layers of a model, per thread, so that threads can train different clients on one base.

    Attributes:
        pairs: Module to factors `A [G, r, in]`, `B [G, out, r]`; None is the base alone.
        ranks: Module to the G clients' ranks, beyond which slots are padding; None without padding.
        folded: Module to `ΔW [out, in]` on top of its base weight, on the base's device.
        folded_from: The mapping that `folded` was copied from.
        counts: Tokens of each client in the pass; None if all clients have equally many.
        recompute: Whether layers that can keep only their inputs do so.
    """

    pairs: Mapping[str, LoraPair] | None = None
    ranks: Mapping[str, Sequence[int]] | None = None
    folded: Mapping[str, Tensor] | None = None
    folded_from: Mapping[str, Tensor] | None = None
    counts: tuple[int, ...] | None = None
    recompute: bool = True


class LoraLayer(nn.Module):
    """A frozen linear layer, plus the low-rank products of G clients.

    The tokens must come in the order of the batch, client after client. A layer that sees another order (an expert of a
    mixture) cannot be adapted.

    Shapes: input `[..., in]`, output `[..., out]`, factors `A [G, r, in]`, `B [G, out, r]`. The factors are plain tensors that
    `LoraModel.use` sets: training owns them, not the model.
    """

    def __init__(self, base: nn.Module, path: str, shape: ModuleShape, scaling: float, live: ActiveFactors) -> None:
        super().__init__()
        self.base = base
        self.path = path
        self.shape = shape
        self.scaling = scaling
        self.live = live

    def __getattr__(self, name: str) -> Any:
        """Return what the layer in whose place this is has: `weight`, `bias`, `in_features`, and the base asks for it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    @property
    def pair(self) -> LoraPair | None:
        """Return the factors of this thread."""
        return None if self.live.pairs is None else self.live.pairs[self.path]

    def forward(self, x: Tensor) -> Tensor:
        """Return `(W0 + scaling * folded) x + scaling * B[g] A[g] x` for every client g.

        Raises:
            ShapeError: The number of tokens is not that of the pass.
        """
        out: Tensor = self.base(x)  # [..., out]
        if self.live.folded:
            folded = self.live.folded[self.path]  # [out, in]
            out = out + nn.functional.linear(x.to(folded.dtype), folded).mul(self.scaling).to(out.dtype)
        pair = self.pair
        if pair is None:
            return out
        A = pair.A  # [G, r, in]
        ranks = None if self.live.ranks is None else self.live.ranks[self.path]
        flat = x.reshape(-1, x.shape[-1]).to(A.dtype)  # [tokens, in]
        counts = self.live.counts or _equal_counts(x, A.shape[0])
        if sum(counts) != flat.shape[0]:
            raise ShapeError(
                f"{self.path} sees {flat.shape[0]} tokens, and not the {sum(counts)} of the pass: whose they are is not known; "
                "take it out of model.target_modules"
            )
        if out.dtype == A.dtype:
            return _add_update(out.view(-1, out.shape[-1]), flat, pair, counts, ranks, self.scaling).view(out.shape)
        update = torch.zeros(flat.shape[0], out.shape[-1], dtype=A.dtype, device=A.device)  # [tokens, out]
        return out + _add_update(update, flat, pair, counts, ranks, self.scaling).view(out.shape).to(out.dtype)


def _equal_counts(x: Tensor, groups: int) -> tuple[int, ...]:
    if x.shape[0] % groups:
        raise ShapeError(f"{x.shape[0]} rows cannot be split among {groups} clients; give every client as many")
    return (x.shape[:-1].numel() // groups,) * groups


def _add_update(
    out: Tensor, x: Tensor, pair: LoraPair, counts: Sequence[int], ranks: Sequence[int] | None, scaling: float
) -> Tensor:
    """Add `scaling * B[g] A[g] x` to the tokens of every client g.

    Args:
        out: `[tokens, out]`, changed in place.
        x: `[tokens, in]`.
        pair: `A [G, r, in]`, `B [G, out, r]`.
        counts: Tokens of each client, in order.
        ranks: Rank of each client; None without padding.
        scaling: `s`.
    """
    updated: Tensor = _GroupedUpdate.apply(out, x, *pair, counts, ranks, scaling)  # type: ignore[no-untyped-call]
    return updated


class _GroupedUpdate(torch.autograd.Function):
    """Add `scaling * B[g] A[g] x` to the tokens of every client g, in place, each client at its own rank.

    Each client has its own matrix products instead of a share of one batched product. So nothing is computed for padded tokens
    or slots, and the last product scales and adds to the base's output in one operation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        counts: Sequence[int],
        ranks: Sequence[int] | None,
        scaling: float,
    ) -> Tensor:
        low = x.new_empty(x.shape[0], A.shape[1])  # [tokens, r]
        for g, rank, tokens in _clients(counts, ranks, A.shape[1]):
            torch.mm(x[tokens], A[g, :rank].mT, out=low[tokens, :rank])  # [n_g, in] [in, r_g] -> [n_g, r_g]
            out[tokens].addmm_(low[tokens, :rank], B[g, :, :rank].mT, alpha=scaling)  # += s [n_g, r_g] [r_g, out]
        ctx.save_for_backward(x, low, A, B)
        ctx.layout = counts, ranks, scaling
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = gradients  # [tokens, out]
        x, low, A, B = ctx.saved_tensors  # [tokens, in], [tokens, r], [G, r, in], [G, out, r]
        counts, ranks, scaling = ctx.layout
        _, need_x, need_a, need_b, *_ = ctx.needs_input_grad
        to_x = torch.zeros_like(x) if need_x and 0 in counts else torch.empty_like(x) if need_x else None
        to_a = torch.zeros_like(A) if need_a else None  # [G, r, in]
        to_b = torch.zeros_like(B) if need_b else None  # [G, out, r]
        for g, rank, tokens in _clients(counts, ranks, A.shape[1]):
            if to_b is not None:
                torch.mm(upstream[tokens].mT, low[tokens, :rank], out=to_b[g, :, :rank])  # [out, n_g] [n_g, r_g]
            to_low = (upstream[tokens] @ B[g, :, :rank]).mul_(scaling)  # [n_g, out] [out, r_g] -> [n_g, r_g]
            if to_a is not None:
                torch.mm(to_low.mT, x[tokens], out=to_a[g, :rank])  # [r_g, n_g] [n_g, in]
            if to_x is not None:
                torch.mm(to_low, A[g, :rank], out=to_x[tokens])  # [n_g, r_g] [r_g, in]
        if to_b is not None:
            to_b.mul_(scaling)
        return upstream, to_x, to_a, to_b, None, None, None


def _clients(counts: Sequence[int], ranks: Sequence[int] | None, widest: int) -> list[tuple[int, int, slice]]:
    """Return index, rank and tokens of every client that has tokens."""
    ends = itertools.accumulate(counts)
    return [
        (g, widest if ranks is None else ranks[g], slice(end - count, end))
        for g, (count, end) in enumerate(zip(counts, ends, strict=True))
        if count
    ]
