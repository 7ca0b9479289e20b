"""Codecs of factors for their way between server and client: pure arithmetic.

A codec maps a factor to numbers of one type, with or without a scale per slot, and back. It declares a bound on its rounding,
which admission uses (`hetlora.core.admission`); `hetlora.flower.wire` writes the bytes. To add a codec, put it into `CODECS` on
both sides, under the name that ``flower.precision`` gives.

Example:
    >>> three_bits = by_slots("int3", levels=3)
    >>> values, scales = three_bits.encode(torch.tensor([[1.0, 3.0, -2.2]]), "A")
    >>> values, three_bits.decode(values, scales, "A")
    (tensor([[ 1,  3, -2]], dtype=torch.int8), tensor([[ 1.,  3., -2.]]))
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["CODECS", "STORED", "Codec", "Letter", "by_slots", "cast", "dequantize_slots", "quantize_slots"]

Letter = Literal["A", "B"]
"""Name of a factor."""

STORED: Mapping[torch.dtype, str] = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
"""The types of numbers that a message can hold, with their names in safetensors."""

SMALLEST = torch.finfo(torch.float32).tiny
"""A smaller scale would be imprecise itself: slots of smaller numbers (below 1.5e-36 with 127 levels) count as zeros."""


@dataclass(frozen=True)
class Codec:
    """The format in which a factor travels.

    Attributes:
        name: In a configuration and in a message's header.
        dtype: Of the numbers that travel.
        encode: From a factor `A [..., r, in]` or `B [..., out, r]` in float32 and its letter, returns numbers of the same shape
            and a scale per slot `[..., r]` in float32, or an empty tensor for no scales. `decode` must return numbers that are
            not finite as not finite.
        decode: From these two and the letter, returns the factor in float32.
        rounding_bound: The largest `|x - x̂|` as a share of the largest number of its slot; 0 for an exact codec. Under a codec
            that rounds, changes travel, with error feedback.
        scaled: Whether there are scales.
    """

    name: str
    dtype: torch.dtype
    encode: Callable[[Tensor, Letter], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor, Letter], Tensor]
    rounding_bound: float
    scaled: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in STORED:
            raise ValueError(
                f"codec {self.name!r}: {self.dtype} does not travel; use one of {', '.join(map(str, STORED))}"
            )
        if not 0.0 <= self.rounding_bound < 1.0:
            raise ValueError(
                f"codec {self.name!r}: rounding_bound={self.rounding_bound} is not allowed; use 0 or more, below 1"
            )

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded."""
        return self.rounding_bound == 0.0


def quantize_slots(factor: Tensor, letter: Letter, levels: int = 127) -> tuple[Tensor, Tensor]:
    """Return a factor in int8 with a symmetric scale per slot.

    For the numbers x of slot i, a row `A[i, :]` or a column `B[:, i]`::

        scale = max|x| / levels,    q = round(x / scale),    x̂ = scale q

    rounded to nearest, halves to even. So `|x - x̂| <= scale / 2`, up to float32's own rounding (2⁻¹⁵ of that bound). A slot
    whose `max|x|` is below `levels` times float32's smallest normal number has the scale 0 and comes back as exact zeros. A
    slot with a number that is not finite gets a scale that is not finite.

    Args:
        factor: `A [..., r, in]` or `B [..., out, r]`, float32.
        letter: The factor's name.
        levels: The largest whole number of either sign: 127, not 128, so that -x is as exact as x.

    Returns:
        `q`, int8 in the factor's shape, and the scales `[..., r]`, float32.

    Example:
        >>> quantize_slots(torch.tensor([[0.0, 0.0], [2.54, -1.0]]), "A")
        (tensor([[  0,   0],
                [127, -50]], dtype=torch.int8), tensor([0.0000, 0.0200]))
    """
    dim = -1 if letter == "A" else -2
    largest = factor.abs().amax(dim)  # [..., r]
    scale = torch.where(largest < levels * SMALLEST, 0.0, largest / levels)
    steps = factor / torch.where(scale == 0.0, 1.0, scale).unsqueeze(dim)
    return steps.round_().to(torch.int8), scale


def dequantize_slots(values: Tensor, scale: Tensor, letter: Letter) -> Tensor:
    """Return `x̂ = scale q` in float32; the inverse of `quantize_slots` but for its rounding.

    Args:
        values: `q`, int8 `[..., r, in]` of A or `[..., out, r]` of B.
        scale: `[..., r]`, float32.
        letter: The factor's name.

    Example:
        >>> dequantize_slots(torch.tensor([[2, -4]], dtype=torch.int8), torch.tensor([0.5, 0.25]), "B")
        tensor([[ 1., -1.]])
    """
    return values * scale.unsqueeze(-1 if letter == "A" else -2)


def by_slots(name: str, levels: int) -> Codec:
    """Return a codec of whole numbers up to `levels` (at most 127) with a scale per slot, see `quantize_slots`."""
    if not 1 <= levels <= 127:
        raise ValueError(f"levels={levels} do not fit into int8; use 1 to 127")
    encode = functools.partial(quantize_slots, levels=levels)
    return Codec(name, torch.int8, encode, dequantize_slots, rounding_bound=0.5 / levels, scaled=True)


def cast(name: str, dtype: torch.dtype, rounding_bound: float) -> Codec:
    """Return a codec that rounds each number to another floating-point type."""
    return Codec(
        name,
        dtype,
        lambda factor, _: (factor.to(dtype), torch.empty(0)),
        lambda values, *_: values.float(),
        rounding_bound,
    )


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        cast("float32", torch.float32, 0.0),
        cast("bfloat16", torch.bfloat16, 2.0**-8),
        by_slots("int8", 127),
    )
}
"""Codecs by name. float32 is exact, bfloat16 has `|x - x̂| <= 2⁻⁸ |x|`, int8 has a scale per slot.

A program may add its own: `docs/extending.md`.
"""
