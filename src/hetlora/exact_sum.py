"""Sums of tensors that are exact: any order, layout, number of threads, vector width and processor gives the same bits.

Floating-point addition is not associative. If two weights are equal, half of the numbers of a mean lie exactly between two
float32 numbers, and the rounding of a float64 sum on the way decides which of them comes out. Here every product `w x` is
rounded once, to a multiple of a power of two, and whole numbers are added, which is exact:

- The product is rounded to float64, `p = fl(w x)`.
- It is split at two grids of the fixed ladder `u_j = 2^(51 j)`: a multiple of `u_t` and one of `u_(t-1)`, with the smallest t
  such that `max |p| <= 2^50 u_t`. What is left of p, at most `u_(t-1) / 2`, is dropped.
- The multiples are added as 64-bit whole numbers. At the end the two highest grids that any summand reached count; lower ones
  are dropped. Which these are does not depend on the order.

This is the reproducible sum of Demmel and Nguyen (*Fast Reproducible Floating-Point Summation*, ARITH 2013) with two bins for a
whole tensor. Each product is off by at most `2^-51 max |p|` beside its own rounding to float64, with the maximum over all
products of the sum; float32 itself is off by `2^-25` of a number. A number that is at least `2^-26` of the largest therefore
keeps all its digits.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["AT_ONCE", "BLOCK", "ExactSum", "Summand", "grid_of", "largest_of", "one_thread", "tree_sum"]

Whole = NDArray[np.int64]

BITS = 51
"""Bits between two grids: what a float64 holds beside its sign and the leading digits of `MAGIC`."""
MAGIC = 1.5 * 2.0**52
"""Adding this times a power of two, and taking it away again, rounds a smaller float64 to a multiple of this power."""
SETTLE = 2**12
"""Additions after which 64 bits could overflow: each adds at most 2^50 in size."""
AT_ONCE = 64
"""Summands that are added at once at most."""
LOW = 40
"""Bits that stay in a grid's first array when it is settled."""
HALF = 26
"""Bits of a whole number that are turned into float64 at a time, which is exact."""
BLOCK = 2**15
"""Numbers that are split at a time: their float64 copies, 256 KiB each, stay in the cache."""


def largest_of(tensors: Sequence[Tensor]) -> float:
    """Return `max |x|` over all numbers of the tensors.

    Example:
        >>> largest_of([torch.tensor([1.0, -3.0]), torch.zeros(2)])
        3.0
    """
    largest = 0.0
    for tensor in tensors:
        if tensor.numel():
            low, high = torch.aminmax(tensor)
            largest = max(largest, -float(low), float(high))
    return largest


def grid_of(largest: float) -> int:
    """Return the smallest t with `largest <= 2^50 2^(51 t)`, for a number that is not zero.

    Example:
        >>> grid_of(1.0), grid_of(2.0**-2), grid_of(2.0**50 + 1.0)
        (0, -1, 1)

    Raises:
        ValueError: `largest` is not finite and positive.
    """
    if not 0.0 < largest < math.inf:
        raise ValueError(f"a sum of numbers up to {largest} has no grid; give finite numbers")
    mantissa, exponent = math.frexp(largest)
    exponent -= mantissa == 0.5  # so that largest <= 2^exponent
    return -((BITS - 1 - exponent) // BITS)


class Summand(NamedTuple):
    """What is added to a sum.

    Attributes:
        values: float32 or float64, on the CPU.
        weight: At least 0.
        grid: `grid_of` the largest `weight * |x|` of all tensors whose sums have a common grid.
    """

    values: Tensor
    weight: float
    grid: int


class ExactSum:
    """The sum `Σ w_k x_k` of tensors of one shape, or of tensors that fill a part of it; see the module.

    Args:
        shape: Of the sum.

    Example:
        >>> one, other = ExactSum((2,)), ExactSum((2,))
        >>> parts = [torch.tensor([1.0, 2.0**-24]), torch.tensor([2.0**-60, 1.0]), torch.tensor([-1.0, 0.0])]
        >>> for part in parts:
        ...     one.add([Summand(part, 0.1, grid_of(0.1))])
        >>> other.add([Summand(part, 0.1, grid_of(0.1)) for part in reversed(parts)])
        >>> torch.equal(one.total(grid_of(0.1)), other.total(grid_of(0.1)))
        True
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self._low: dict[int, Whole] = {}  # grid to whole numbers [*shape]
        self._high: dict[int, Whole] = {}  # grid to multiples of 2^LOW, where there were so many additions
        self._additions: dict[int, int] = {}
        self._offset: dict[int, int] = {}  # grid to what `_low` has too much, modulo 2^64

    def add(self, summands: Sequence[Summand], part: tuple[slice, ...] = ()) -> None:
        """Add `weight * values` for each summand; several at once cost less than one after the other.

        Args:
            summands: What is added, of the sum's shape, or of that of its part.
            part: Where the values belong; empty for everywhere.
        """
        if len(summands) > AT_ONCE:
            self.add(summands[:AT_ONCE], part)
            self.add(summands[AT_ONCE:], part)
            return
        highest = max([*self._low, *(summand.grid for summand in summands)])
        for index in self._low.keys() - {highest, highest - 1}:
            self._forget(index)
        for index in (highest, highest - 1):
            self._make_room(index, len(summands))
        upper, lower = MAGIC * 2.0 ** (BITS * highest), MAGIC * 2.0 ** (BITS * (highest - 1))
        into_upper, into_lower = self._low[highest][part], self._low[highest - 1][part]
        less_upper, less_lower = _bits(upper), _bits(lower)
        arrays = [
            (values.detach().numpy(), weight, grid == highest)
            for values, weight, grid in summands
            if grid >= highest - 1
        ]
        if not part:  # the bits of the magic numbers are taken away at once, by `_whole_numbers`
            self._offset[highest] = self._offset.get(highest, 0) + less_upper * sum(high for _, _, high in arrays)
            self._offset[highest - 1] = self._offset.get(highest - 1, 0) + less_lower * len(arrays)
            less_upper = less_lower = 0
        rows = max(1, BLOCK // max(1, math.prod(into_upper.shape[1:])))
        rest, near = np.empty((2, *into_upper[:rows].shape))
        rest_bits, near_bits = rest.view(np.int64), near.view(np.int64)
        for begin in range(0, len(into_upper), rows):
            end = begin + rows
            block_upper, block_lower = into_upper[begin:end], into_lower[begin:end]
            if len(block_upper) < rows:
                rest, near = rest[: len(block_upper)], near[: len(block_upper)]
                rest_bits, near_bits = rest.view(np.int64), near.view(np.int64)
            for values, weight, high in arrays:
                np.multiply(values[begin:end], weight, out=rest, dtype=np.float64)
                if high:
                    np.add(rest, upper, out=near)
                    # Behind the bits of the magic number stand those of the multiple.
                    block_upper += near_bits - less_upper if less_upper else near_bits
                    np.subtract(near, upper, out=near)
                    np.subtract(rest, near, out=rest)
                np.add(rest, lower, out=rest)
                block_lower += rest_bits - less_lower if less_lower else rest_bits

    def merge(self, other: ExactSum, part: tuple[slice, ...] = ()) -> None:
        """Add another sum, of this one's shape or of that of its part."""
        for index in other._low:
            self._make_room(index, other._additions[index])
            self._low[index][part] += other._whole_numbers(index)
            if index in other._high:
                self._high_of(index)[part] += other._high[index]

    def unbind(self, shape: Sequence[int]) -> list[ExactSum]:
        """Return the sums of the entries of `shape`'s first dimension; they share the memory of this one, which ends here.

        Args:
            shape: Of as many numbers as this sum has.
        """
        parts = []
        for place in range(shape[0]):
            part = ExactSum(shape[1:])
            part._low = {index: self._whole_numbers(index).reshape(shape)[place] for index in self._low}
            part._high = {index: high.reshape(shape)[place] for index, high in self._high.items()}
            part._additions = dict(self._additions)
            parts.append(part)
        return parts

    def total(self, grid: int) -> Tensor:
        """Return the sum in float64, of the grids `grid` and `grid - 1`.

        Args:
            grid: The largest that was added to any of the sums that have a common grid.
        """
        result = np.zeros(self.shape)
        for index in (grid - 1, grid):
            if index in self._low:
                # The sum is coarse 2^26 + fine with |fine| <= 2^25, and both are the same however often it was settled.
                low, unit = self._whole_numbers(index), 2.0 ** (BITS * index)
                coarse = (low + 2 ** (HALF - 1)) >> HALF
                fine = low - (coarse << HALF)
                if index in self._high:
                    coarse += self._high[index] << (LOW - HALF)
                result += fine.astype(np.float64) * unit
                result += coarse.astype(np.float64) * (unit * 2.0**HALF)
        return torch.from_numpy(result)

    def _make_room(self, index: int, additions: int) -> None:
        """Prepare a grid for so many additions."""
        if index not in self._low:
            self._low[index] = np.zeros(self.shape, dtype=np.int64)
            self._additions[index] = 0
        if self._additions[index] + additions > SETTLE:
            low = self._whole_numbers(index)
            self._high_of(index)[...] += low >> LOW
            low &= 2**LOW - 1
            self._additions[index] = 1
        self._additions[index] += additions

    def _whole_numbers(self, index: int) -> Whole:
        """Return a grid's first array without the bits of the magic numbers."""
        low = self._low[index]
        if offset := self._offset.pop(index, 0) % 2**64:
            low -= np.int64(offset - 2**64 if offset >= 2**63 else offset)
        return low

    def _high_of(self, index: int) -> Whole:
        if index not in self._high:
            self._high[index] = np.zeros(self.shape, dtype=np.int64)
        return self._high[index]

    def _forget(self, index: int) -> None:
        del self._low[index], self._additions[index]
        self._high.pop(index, None)
        self._offset.pop(index, None)


def _bits(number: float) -> int:
    """Return the whole number that has the bits of this positive float64."""
    return int.from_bytes(struct.pack("<d", number), "little")


def tree_sum(values: Tensor) -> Tensor:
    """Return the sum over the last dimension, in a fixed order: the second half is added to the first until one number is left.

    `torch.sum` adds in an order that depends on the processor's vectors and on the number of threads.

    Example:
        >>> tree_sum(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        tensor([ 6., 15.])
    """
    while (count := values.shape[-1]) > 1:
        half = count // 2
        halves = values[..., :half] + values[..., half : 2 * half]
        values = torch.cat([halves, values[..., 2 * half :]], dim=-1) if count % 2 else halves
    return values.squeeze(-1) if values.shape[-1] else values.sum(dim=-1)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in this thread alone, where the bits of what a library computes depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
