"""The trained factors of G clients in one tensor, so that a step over all clients takes few operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hetlora.core.adapter import Adapter, Factors, LoraPair, batch

__all__ = ["BatchedFactors"]


class BatchedFactors:
    """Trained factors of G clients and their gradients.

    Args:
        adapters: The received adapters of the G clients, of any ranks; copied.
        trains: The trained factors; the others are frozen.
        device: Device of the training.

    Attributes:
        adapter: The factors `A [G, r, in]`, `B [G, out, r]`, padded to the largest rank per module. Trained factors are views
            of `values` and collect gradients.
        values: All trained numbers, one row per client `[G, n]`.

    Example:
        >>> ones = {"m": LoraPair(torch.ones(1, 2), torch.ones(3, 1))}
        >>> factors = BatchedFactors([ones, ones], "AB", torch.device("cpu"))
        >>> (factors.adapter["m"].A.sum() * 2 + factors.adapter["m"].B.sum()).backward()
        >>> factors.collect_gradients()
        >>> factors.values.grad
        tensor([[2., 2., 1., 1., 1.],
                [2., 2., 1., 1., 1.]])
    """

    def __init__(self, adapters: Sequence[Adapter], trains: Factors, device: torch.device) -> None:
        padded = batch(adapters)  # A [G, r, in], B [G, out, r]
        # By name: the order decides how a gradient's norm is rounded, and messages order modules by shape.
        keys = [(name, letter) for name in sorted(padded) for letter in trains]
        received = [getattr(padded[name], letter).to(device) for name, letter in keys]  # each [G, r, in] or [G, out, r]
        self.values = torch.cat([factor.flatten(1) for factor in received], dim=1).requires_grad_()  # [G, n]
        self.values.grad = torch.zeros_like(self.values)
        parts = torch.split(
            self.values.detach(), [factor.shape[1:].numel() for factor in received], dim=1
        )  # each [G, r * in]
        self._leaves = [part.view(factor.shape).requires_grad_() for part, factor in zip(parts, received, strict=True)]
        live = dict(zip(keys, self._leaves, strict=True))
        self.adapter: Mapping[str, LoraPair] = {
            name: LoraPair(*(live.get((name, letter), getattr(pair, letter).to(device)) for letter in "AB"))
            for name, pair in padded.items()
        }

    @property
    def gradients(self) -> Tensor:
        """Return the gradients of `values` `[G, n]`."""
        assert self.values.grad is not None
        return self.values.grad

    def collect_gradients(self) -> None:
        """Move the gradients of the factors to `values.grad`: 0 where a factor got none."""
        found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves]
        torch.cat([gradient.flatten(1) for gradient in found], dim=1, out=self.gradients)  # [G, n]
        for leaf in self._leaves:
            leaf.grad = None

    def step(
        self, optimizer: torch.optim.Optimizer, active: Sequence[bool], norms: Tensor, clip_norm: float | None
    ) -> None:
        """Clip each client's gradient and take an optimiser step with the active clients only.

        Args:
            optimizer: Optimiser over `values`.
            active: Whether each of the G clients takes the step.
            norms: Norm of each client's gradient `[G]`.
            clip_norm: The largest norm; None for no clipping.
        """
        if clip_norm is not None:
            # 1e-6 as in torch.nn.utils.clip_grad_norm_, which a single client would call.
            self.gradients.mul_((clip_norm / (norms + 1e-6)).clamp_max(1.0)[:, None])
        if all(active):
            optimizer.step()
            return
        # Momentum and weight decay would still move a client without gradient. Its optimiser state does not matter: a client
        # that stopped does not continue in this round.
        keep = torch.tensor(active, device=norms.device)[:, None]  # [G, 1]
        self.gradients.masked_fill_(~keep, 0.0)
        before = self.values.detach().clone()
        optimizer.step()
        with torch.no_grad():
            self.values.copy_(torch.where(keep, self.values, before))
