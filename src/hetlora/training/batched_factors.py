"""The factors that G clients train, laid out in one tensor: a step over all of them is a handful of operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hetlora.core.adapter import Adapter, Factors, LoraPair, batch
from hetlora.errors import ModelError

__all__ = ["BatchedFactors"]


class BatchedFactors:
    """Trained factors of G clients and their gradients.

    Args:
        adapters: What the G clients received, of any ranks; copied.
        trains: The factors they train; the others are frozen.
        device: Where they train.

    Attributes:
        adapter: The factors, padded to the widest rank a module, `A [G, r, in]`, `B [G, out, r]`; those that train are views of
            `values` and collect gradients.
        values: All that train, a client a row `[G, n]`.

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
        padded = batch(adapters)
        # By name: the order decides how a gradient's norm is rounded, and over the wire equal shapes come side by side.
        keys = [(name, letter) for name in sorted(padded) for letter in trains]
        received = [getattr(padded[name], letter).to(device) for name, letter in keys]  # each [G, r, in] or [G, out, r]
        self.values = torch.cat([factor.flatten(1) for factor in received], dim=1).requires_grad_()  # [G, n]
        self.values.grad = torch.zeros_like(self.values)
        parts = torch.split(self.values.detach(), [factor.shape[1:].numel() for factor in received], dim=1)
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
        """Move to `values.grad` what the backward passes of a step have left at the factors.

        Raises:
            ModelError: A factor got no gradient.
        """
        found = [leaf.grad for leaf in self._leaves if leaf.grad is not None]
        if len(found) < len(self._leaves):
            raise ModelError(
                "a target module takes no part in the model's computation; take it out of model.target_modules"
            )
        torch.cat([gradient.flatten(1) for gradient in found], dim=1, out=self.gradients)
        for leaf in self._leaves:
            leaf.grad = None

    def step(
        self, optimizer: torch.optim.Optimizer, active: Sequence[bool], norms: Tensor, clip_norm: float | None
    ) -> None:
        """Clip each client's gradient and take an optimiser step with the active clients only.

        Args:
            optimizer: Over `values`.
            active: Whether each of the G clients takes the step.
            norms: Of each client's gradient `[G]`.
            clip_norm: The largest norm, None for no clipping.
        """
        if clip_norm is not None:
            # 1e-6 as in torch.nn.utils.clip_grad_norm_, which a client on its own would call.
            self.gradients.mul_((clip_norm / (norms + 1e-6)).clamp_max(1.0)[:, None])
        if all(active):
            optimizer.step()
            return
        # Momentum and weight decay would go on moving a client without gradient. One that stopped never starts again in this
        # round, so what its optimiser state becomes does not matter.
        keep = torch.tensor(active, device=norms.device)[:, None]
        self.gradients.masked_fill_(~keep, 0.0)
        before = self.values.detach().clone()
        optimizer.step()
        with torch.no_grad():
            self.values.copy_(torch.where(keep, self.values, before))
