"""The output layer of a base: logits for scored positions only, and a few of those at a time.

With a small model and a large vocabulary the output layer is most of the work, and its logits most of the memory.
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

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["OutputHead", "linear_cross_entropy"]

LOGITS_AT_ONCE = {"cpu": 2**21}
"""Logits that are computed together: few enough to stay in the cache, enough rows for a matrix product at full speed."""

LOGITS_AT_ONCE_ELSEWHERE = 2**26


class _Positions(threading.local):
    chosen: Tensor | None = None


class OutputHead:
    """The output layer of a base, and how losses come from it.

    Args:
        base: A causal language model.
        trained: Whether weights of the base change, so that the logits must come from the base as a whole.

    Raises:
        ModelError: The base has no output layer.
    """

    def __init__(self, base: PreTrainedModel, *, trained: bool = False) -> None:
        head = base.get_output_embeddings()
        if head is None:
            raise ModelError(f"{type(base).__name__} has no output layer; hetlora adapts causal language models")
        self.base = base
        self._may_be_linear = not trained and _is_linear_head(base, head)
        self._head = head
        self._positions = _Positions()
        head.register_forward_pre_hook(self._select)

    @property
    def is_linear(self) -> bool:
        """Whether logits are a frozen linear map of the last hidden state, so that `losses` can be used."""
        return self._may_be_linear and not self._head.weight.requires_grad

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return `-log p(target)` of every position `[n]`, float32, from its last hidden state; of a linear head only."""
        return linear_cross_entropy(hidden, self._head.weight, self._head.bias, targets)

    @contextlib.contextmanager
    def only(self, positions: Tensor) -> Iterator[None]:
        """Compute logits at these of the `rows * length` positions only; they come out as one row, in order."""
        self._positions.chosen = positions
        try:
            yield
        finally:
            self._positions.chosen = None

    def _select(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._positions.chosen is None:
            return None
        hidden, *others = inputs
        return hidden.flatten(0, 1).index_select(0, self._positions.chosen).unsqueeze(0), *others


def _is_linear_head(base: PreTrainedModel, head: nn.Module) -> bool:
    """Whether logits are a linear map of the last hidden state: some architectures scale or bound them."""
    if type(head) is not nn.Linear or base.base_model is base:
        return False
    if isinstance(head.weight, FakeTensor):
        return True
    ids = torch.tensor([[0, 2, 1, 3]], device=head.weight.device)
    with torch.inference_mode():
        hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return torch.equal(head(hidden), base(input_ids=ids, use_cache=False).logits)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return `-log softmax(W h + b)[target]` of every position `[n]`, float32.

    The gradient reaches `hidden` alone and is computed on the way, `softmax(W h + b) W - W[target]`, so that nothing of the
    size of the logits is kept for later.

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
        values = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        at_once = LOGITS_AT_ONCE.get(hidden.device.type, LOGITS_AT_ONCE_ELSEWHERE)
        rows = max(32, at_once // weight.shape[0])
        for begin in range(0, hidden.shape[0], rows):
            part = slice(begin, begin + rows)
            logits = torch.nn.functional.linear(hidden[part], weight, bias).float()  # [m, d] [d, V] -> [m, V]
            largest = logits.amax(dim=1, keepdim=True)  # [m, 1]
            logits.sub_(largest)
            expected = logits.gather(1, targets[part, None])  # [m, 1]
            exponentials = logits.exp_()  # [m, V], in place of the logits
            total = exponentials.sum(dim=1, keepdim=True)  # [m, 1]
            values[part] = (total.log() - expected).squeeze(1)
            if gradient is not None:
                product = exponentials.to(weight.dtype) @ weight  # [m, V] [V, d] -> [m, d]
                gradient[part] = product.div_(total).sub_(weight.index_select(0, targets[part]))
        ctx.save_for_backward(gradient)  # and so given up in the backward pass, however long the losses live
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (upstream,) = gradients
        (gradient,) = ctx.saved_tensors
        return gradient.mul(upstream[:, None].to(gradient.dtype)), None, None, None
