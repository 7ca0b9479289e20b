"""Compression of an adapter's travelling factors into one flat tensor, by the codecs in `hetlora.core.codecs`.

Example:
    >>> adapter = FlatAdapter(torch.tensor([0.5, 1.27, 3.0, 0.0]), [(("q",), (1, 1, 2), (1, 2, 1))])
    >>> part = compress(adapter, "int8")
    >>> part.values, part.scales.shape
    (tensor([ 50, 127, 127,   0], dtype=torch.int8), torch.Size([2]))
    >>> torch.allclose(decompress(part), adapter.numbers)
    True
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from hetlora.core.adapter import Factors, FlatAdapter, Stack
from hetlora.core.codecs import CODECS, Letter

__all__ = ["Compressed", "compress", "decompress", "places", "slot_shape"]


@dataclass(frozen=True, eq=False)
class Compressed:
    """The travelling factors of an adapter as flat tensors.

    Attributes:
        precision: The codec of the values, in `hetlora.core.codecs.CODECS`.
        factors: The travelling factors.
        layout: Of the whole adapter.
        values: The factors in the order of `places` `[n]`, in the codec's type.
        scales: Their scales in the same order `[s]`, float32; empty if the codec has none.
    """

    precision: str
    factors: Factors
    layout: tuple[Stack, ...]
    values: Tensor
    scales: Tensor


def places(layout: tuple[Stack, ...], factors: Factors) -> list[tuple[int, Letter, tuple[int, int, int]]]:
    """Return the factors in wire order: index of the stack, letter and shape.

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


def compress(adapter: FlatAdapter, precision: str, factors: Factors = "AB") -> Compressed:
    """Compress factors of an adapter; float32 with both factors returns the numbers without a copy."""
    codec = CODECS[precision]
    if codec.dtype == torch.float32 and factors == "AB" and codec.exact:
        return Compressed(precision, factors, adapter.layout, adapter.numbers, torch.empty(0))
    values, scales = [torch.empty(0, dtype=codec.dtype)], [torch.empty(0)]
    for index, letter, _ in places(adapter.layout, factors):
        value, scale = codec.encode(getattr(adapter.stacks[index][1], letter), letter)
        values.append(value.flatten())
        scales.append(scale.flatten())
    return Compressed(precision, factors, adapter.layout, torch.cat(values), torch.cat(scales))


def decompress(part: Compressed) -> Tensor:
    """Return the values in float32 `[n]`; float32 is not copied.

    Example:
        >>> adapter = FlatAdapter(torch.ones(4), [(("q",), (1, 1, 2), (1, 2, 1))])
        >>> decompress(compress(adapter, "bfloat16", "A"))
        tensor([1., 1.])
    """
    codec = CODECS[part.precision]
    if codec.dtype == torch.float32 and codec.exact:
        return part.values
    numbers = torch.empty(part.values.numel())
    begin = slot = 0
    for _, letter, shape in places(part.layout, part.factors):
        end, many = begin + math.prod(shape), slot_shape(shape, letter)
        scale = part.scales[slot : slot + math.prod(many)].view(many) if codec.scaled else part.scales
        numbers[begin:end].view(shape).copy_(codec.decode(part.values[begin:end].view(shape), scale, letter))
        begin, slot = end, slot + math.prod(many)
    return numbers
