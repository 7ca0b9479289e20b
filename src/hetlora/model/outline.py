"""A base in outline: tensors with shapes and no numbers (PyTorch's fake tensors), of which what to compute must not depend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

__all__ = ["is_outline", "outline_pass"]


def is_outline(base: nn.Module) -> bool:
    """Whether a base has no numbers."""
    return isinstance(next(base.parameters()), FakeTensor)


@contextlib.contextmanager
def outline_pass() -> Iterator[None]:
    """Keep transformers from looking at numbers that are not there, for as long.

    It looks at the positions to see whether a row holds several texts, which no run has, and takes it for granted where there
    are none. And of a mixture of experts each token goes through as many as with numbers; which ones changes no shape, no cost.
    """
    from transformers import masking_utils
    from transformers.integrations import moe

    find, grouped = masking_utils.find_packed_sequence_indices, moe._grouped_mm  # noqa: SLF001
    masking_utils.find_packed_sequence_indices = lambda _: None
    moe._grouped_mm = _through_first_expert  # noqa: SLF001
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find
        moe._grouped_mm = grouped  # noqa: SLF001


def _through_first_expert(tokens: Tensor, weight: Tensor, offs: Any) -> Tensor:  # noqa: ARG001  where each expert's tokens end
    """Return `[n, out]` of `[n, in]` and the weights of all experts `[experts, in, out]`, at the cost of theirs."""
    return torch.mm(tokens.to(weight.dtype), weight[0])
