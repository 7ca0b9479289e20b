"""The output layer of a base: logits for scored positions only, computed in blocks.

With a small model and a large vocabulary, the output layer takes most of the time, and its logits most of the memory.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

from hetlora.errors import ModelError
from hetlora.model.outline import outline_pass

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["OutputHead", "linear_cross_entropy"]

LOGITS_PER_BLOCK = {"cpu": 2**21}
"""Logits that are computed together: few enough for the cache, and enough rows for a matrix product at full speed."""

LOGITS_PER_BLOCK_ELSEWHERE = 2**26


class _Positions(threading.local):
    chosen: Tensor | None = None


class OutputHead:
    """The output layer of a base, and its losses.

    Args:
        base: A causal language model.
        trained: Whether weights of the base are trained; logits then come from the whole base.

    Raises:
        ModelError: The base has no output layer.

    Attributes:
        module: The output layer.
        is_adapted: Whether it carries a LoRA layer.
    """

    def __init__(self, base: PreTrainedModel, *, trained: bool = False) -> None:
        head = base.get_output_embeddings()
        if head is None:
            raise ModelError(f"{type(base).__name__} has no output layer; hetlora adapts causal language models")
        self.base = base
        self._may_be_linear = not trained and _is_linear_head(base, head)
        self.module = head
        self.is_adapted = False
        self._positions = _Positions()
        head.register_forward_pre_hook(self._select)

    @property
    def is_linear(self) -> bool:
        """Whether logits are a frozen linear map of the last hidden state, so that `losses` can be used."""
        return self._may_be_linear and not self.is_adapted and not self.module.weight.requires_grad

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return `-log p(target)` of every position `[n]`, float32, from the last hidden states `[n, d]` of a linear head."""
        return linear_cross_entropy(hidden.to(self.module.weight.dtype), self.module.weight, self.module.bias, targets)

    @contextlib.contextmanager
    def only(self, positions: Tensor) -> Iterator[None]:
        """Compute logits only at `positions [n]` of the `rows * length` positions; the result is one row `[1, n, V]`."""
        self._positions.chosen = positions
        try:
            yield
        finally:
            self._positions.chosen = None

    def _select(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._positions.chosen is None:
            return None
        hidden, *others = inputs  # [rows, length, d]
        chosen = hidden.flatten(0, 1).index_select(0, self._positions.chosen)  # [rows * length, d] -> [n, d]
        return chosen.unsqueeze(0), *others


def _is_linear_head(base: PreTrainedModel, head: nn.Module) -> bool:
    """Whether logits are a linear map of the last hidden state; some architectures scale or bound them."""
    if type(head) is not nn.Linear or base.base_model is base:
        return False
    if isinstance(head.weight, FakeTensor):
        return _is_last(base, head)
    ids = torch.tensor([[0, 2, 1, 3]], device=head.weight.device)
    with torch.inference_mode():
        hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
        # Mamba keeps its hidden states in float32, and gives logits of that type.
        ours, theirs = head(hidden.to(head.weight.dtype)), base(input_ids=ids, use_cache=False).logits
        return torch.equal(ours.to(theirs.dtype), theirs)


def _is_last(base: PreTrainedModel, head: nn.Module) -> bool:
    """Whether an outline hands its last hidden state to the output layer and returns what comes out of it."""
    states: list[Tensor] = []
    handles = [
        base.base_model.register_forward_hook(lambda _, __, out: states.append(out.last_hidden_state)),
        head.register_forward_hook(lambda _, inputs, out: states.extend((inputs[0], out))),
    ]
    try:
        with torch.no_grad(), outline_pass():
            states.append(base(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False).logits)
    except Exception:  # noqa: BLE001  what depends on numbers is not known; the whole of the base computes the logits
        return False
    finally:
        for handle in handles:
            handle.remove()
    same = [state.untyped_storage()._cdata for state in states]  # noqa: SLF001  a part of a tensor has the storage of it
    return len(same) == 4 and same[0] == same[1] and same[2] == same[3]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return `-log softmax(W h + b)[target]` of every position `[n]`, float32.

    Only `hidden` has a gradient, `softmax(W h + b) W - W[target]`. The forward pass computes it, so that nothing of the size of
    the logits is saved for the backward pass.

    Args:
        hidden: `h [n, d]`.
        weight: `W [vocabulary, d]`, frozen.
        bias: `b [vocabulary]`, frozen, or None.
        targets: `[n]`.

    Example:
        >>> h = torch.tensor([[0.0, 0.0]], requires_grad=True)
        >>> loss = linear_cross_entropy(h, torch.eye(2), None, torch.tensor([1]))
        >>> loss.backward()
        >>> round(float(loss.detach()), 4), h.grad.tolist()
        (0.6931, [[0.5, -0.5]])
    """
    values: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
    return values


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        values = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)  # [n]
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # [n, d]
        logits_per_block = LOGITS_PER_BLOCK.get(hidden.device.type, LOGITS_PER_BLOCK_ELSEWHERE)
        rows = max(32, logits_per_block // weight.shape[0])  # m
        for begin in range(0, hidden.shape[0], rows):
            part = slice(begin, begin + rows)
            logits = torch.nn.functional.linear(hidden[part], weight, bias).float()  # [m, d] [d, V] -> [m, V]
            largest = logits.amax(dim=1, keepdim=True)  # [m, 1]
            logits.sub_(largest)
            expected = logits.gather(1, targets[part, None])  # [m, 1]
            exponentials = logits.exp_()  # [m, V], in place of the logits
            total = exponentials.sum(dim=1, keepdim=True)  # [m, 1]
            values[part] = (total.log() - expected).squeeze(1)  # [m]
            if gradient is not None:
                product = exponentials.to(weight.dtype) @ weight  # [m, V] [V, d] -> [m, d]
                gradient[part] = product.div_(total).sub_(weight.index_select(0, targets[part]))
        ctx.save_for_backward(gradient)  # so that the backward pass frees it, even if the losses live on
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (upstream,) = gradients  # [n]
        (gradient,) = ctx.saved_tensors  # [n, d]
        return gradient.mul(upstream[:, None].to(gradient.dtype)), None, None, None
