"""Factors in fewer bits for their way between server and client: bfloat16, or int8 with a scale a slot.

Pure arithmetic on stacked factors; the bytes are `hetlora.flower.wire.header`'s, and what is compressed, a value or a
change, is for `hetlora.flower.wire.codec` to say.

Example:
    >>> adapter = StackedAdapter(torch.tensor([0.5, 1.27, 3.0, 0.0]), [(("q",), (1, 1, 2), (1, 2, 1))])
    >>> part = compress(adapter, "int8")
    >>> part.values, part.scales.shape
    (tensor([ 50, 127, 127,   0], dtype=torch.int8), torch.Size([2]))
    >>> torch.allclose(decompress(part), adapter.numbers)
    True
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hetlora.core.adapter import Factors, Stack, StackedAdapter

__all__ = [
    "PRECISIONS",
    "ROUNDING",
    "Compressed",
    "Letter",
    "Precision",
    "compress",
    "decompress",
    "dequantize_slots",
    "places",
    "quantize_slots",
    "slot_shape",
]

Precision = Literal["float32", "bfloat16", "int8"]
"""How a factor travels. As it is; rounded to 16 bits, `|x - x̂| <= 2⁻⁸ |x|`; or in 8 bits with a scale a slot."""

Letter = Literal["A", "B"]
"""One of the factors."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DTYPES: Mapping[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}

ROUNDING: Mapping[Precision, float] = {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 1.0 / 254.0}
"""By how much a number is rounded at most, as a share of the largest of its slot."""

LEVELS = 127
"""The largest int8 of either sign; -128 is not used, so that -x is as exact as x."""

SMALLEST = LEVELS * torch.finfo(torch.float32).tiny
"""Slots of smaller numbers, 1.5e-36, count as zeros: their scale would have lost bits itself."""


def quantize_slots(factor: Tensor, letter: Letter) -> tuple[Tensor, Tensor]:
    """Return a factor in int8 with a symmetric scale a slot.

    Of slot i, a row `x = A[i, :]` or a column `x = B[:, i]`::

        scale = max|x| / 127,    q = round(x / scale),    x̂ = scale q

    rounded to nearest, halves to even. So `|x - x̂| <= scale / 2`, up to float32's own rounding (2⁻¹⁵ of that bound). A slot
    of zeros has the scale 0 and comes back as exact zeros, and so does one whose `max|x|` is below 1.5e-36. What is not
    finite gives a scale that is not.

    Args:
        factor: `A [..., r, in]` or `B [..., out, r]`, float32.
        letter: Which of them it is.

    Returns:
        `q`, int8 in the factor's shape, and the scales `[..., r]`, float32.

    Example:
        >>> quantize_slots(torch.tensor([[0.0, 0.0], [2.54, -1.0]]), "A")
        (tensor([[  0,   0],
                [127, -50]], dtype=torch.int8), tensor([0.0000, 0.0200]))
    """
    dim = -1 if letter == "A" else -2
    largest = factor.abs().amax(dim)
    scale = torch.where(largest < SMALLEST, 0.0, largest / LEVELS)
    steps = factor / torch.where(scale == 0.0, 1.0, scale).unsqueeze(dim)
    return steps.round_().to(torch.int8), scale


def dequantize_slots(values: Tensor, scale: Tensor, letter: Letter, out: Tensor | None = None) -> Tensor:
    """Return `x̂ = scale q` in float32; the inverse of `quantize_slots` but for its rounding.

    Args:
        values: `q`, int8 `[..., r, in]` of A or `[..., out, r]` of B.
        scale: `[..., r]`, float32.
        letter: Which of the factors it is.
        out: Where to write it.

    Example:
        >>> dequantize_slots(torch.tensor([[2, -4]], dtype=torch.int8), torch.tensor([0.5, 0.25]), "B")
        tensor([[ 1., -1.]])
    """
    return torch.mul(values, scale.unsqueeze(-1 if letter == "A" else -2), out=out)


@dataclass(frozen=True, eq=False)
class Compressed:
    """The factors of an adapter that travel, as numbers in a row.

    Attributes:
        precision: Of the values.
        factors: Which factors these are.
        layout: Of the whole adapter.
        values: Every travelling factor, one after the other as `places` lists them `[n]`, in the precision's type.
        scales: Of int8, every factor's scales in the same order `[s]`, float32; empty otherwise.
    """

    precision: Precision
    factors: Factors
    layout: tuple[Stack, ...]
    values: Tensor
    scales: Tensor


def places(layout: tuple[Stack, ...], factors: Factors) -> list[tuple[int, Letter, tuple[int, int, int]]]:
    """Return the factors in the order in which they travel: the index of the stack, which one, and its shape.

    Example:
        >>> places(((("q", "v"), (2, 1, 3), (2, 4, 1)),), "B")
        [(0, 'B', (2, 4, 1))]
    """
    return [
        (index, letter, shape)
        for index, (_, *shapes) in enumerate(layout)
        for letter, shape in zip(get_args(Letter), shapes, strict=True)
        if letter in factors
    ]


def slot_shape(shape: tuple[int, int, int], letter: Letter) -> tuple[int, int]:
    """Return the shape `[M, r]` of the scales of M stacked factors.

    Example:
        >>> slot_shape((2, 1, 3), "A"), slot_shape((2, 3, 1), "B")
        ((2, 1), (2, 1))
    """
    return (shape[0], shape[1] if letter == "A" else shape[2])


def compress(adapter: StackedAdapter, precision: Precision, factors: Factors = "AB") -> Compressed:
    """Return some factors of an adapter in a precision; of float32 and both factors the very numbers."""
    chosen = [(letter, getattr(adapter.stacks[i][1], letter)) for i, letter, _ in places(adapter.layout, factors)]
    scales = torch.empty(0)
    if precision == "int8" and chosen:
        quantized = [quantize_slots(factor, letter) for letter, factor in chosen]
        values, scales = (torch.cat([part.flatten() for part in parts]) for parts in zip(*quantized, strict=True))
    elif factors == "AB":
        values = adapter.numbers.to(DTYPES[precision])
    else:
        values = torch.cat([torch.empty(0), *(factor.flatten() for _, factor in chosen)]).to(DTYPES[precision])
    return Compressed(precision, factors, adapter.layout, values, scales)


def decompress(part: Compressed) -> Tensor:
    """Return the values in float32 `[n]`; of float32 the very ones.

    Example:
        >>> adapter = StackedAdapter(torch.ones(4), [(("q",), (1, 1, 2), (1, 2, 1))])
        >>> decompress(compress(adapter, "bfloat16", "A"))
        tensor([1., 1.])
    """
    if part.precision != "int8":
        return part.values.float()
    numbers = torch.empty(part.values.numel())
    travel = places(part.layout, part.factors)
    sizes = [math.prod(shape) for *_, shape in travel]
    slots = [slot_shape(shape, letter) for _, letter, shape in travel]
    scales = torch.split(part.scales, [math.prod(shape) for shape in slots])
    parts = zip(travel, slots, torch.split(part.values, sizes), scales, torch.split(numbers, sizes), strict=True)
    for (_, letter, shape), many, values, scale, out in parts:
        dequantize_slots(values.view(shape), scale.view(many), letter, out=out.view(shape))
    return numbers
