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
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["BLOCK", "ExactSum", "grid_of", "largest_of", "one_thread", "tree_sum"]

BITS = 51
"""Bits between two grids: what a float64 holds beside its sign and the leading digits of `MAGIC`."""
MAGIC = 1.5 * 2.0**52
"""Adding this times a power of two, and taking it away again, rounds a smaller float64 to a multiple of this power."""
SETTLE = 2**12
"""Additions after which 64 bits could overflow: each adds at most 2^50 in size."""
LOW = 40
"""Bits that stay in a grid's first tensor when it is settled."""
HALF = 26
"""Bits of a whole number that are turned into float64 at a time, which is exact."""
BLOCK = 2**17
"""Numbers that are split at a time: their float64 copies, 1 MiB each, are read again from the cache."""


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


class ExactSum:
    """The sum `Σ w_k x_k` of tensors of one shape, or of tensors that fill a part of it; see the module.

    Args:
        shape: Of the sum.

    Example:
        >>> one, other = ExactSum((2,)), ExactSum((2,))
        >>> parts = [torch.tensor([1.0, 2.0**-24]), torch.tensor([2.0**-60, 1.0]), torch.tensor([-1.0, 0.0])]
        >>> for part in parts:
        ...     one.add(part, 0.1, grid_of(0.1))
        >>> for part in reversed(parts):
        ...     other.add(part, 0.1, grid_of(0.1))
        >>> torch.equal(one.total(grid_of(0.1)), other.total(grid_of(0.1)))
        True
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self._low: dict[int, Tensor] = {}  # grid to whole numbers [*shape], int64
        self._high: dict[int, Tensor] = {}  # grid to multiples of 2^LOW, where there were so many additions
        self._additions: dict[int, int] = {}
        self._offset: dict[int, int] = {}  # grid to what `_low` has too much, modulo 2^64

    def add(self, values: Tensor, weight: float, grid: int, part: tuple[slice, ...] = ()) -> None:
        """Add `weight * values`.

        Args:
            values: float32 or float64, of the sum's shape, or of that of its part.
            weight: At least 0.
            grid: `grid_of` the largest `weight * |x|` of all tensors whose sums have a common grid.
            part: Where `values` belong; empty for everywhere.
        """
        highest = max([grid, *self._low])
        for index in self._low.keys() - {highest, highest - 1}:
            self._forget(index)
        indices = [index for index in (grid, grid - 1) if index >= highest - 1]
        targets = []
        for index in indices:
            self._make_room(index)
            targets.append(self._low[index][part])
            if not part:
                self._offset[index] = self._offset.get(index, 0) + _bits_of_magic(index)
        for begin in range(0, len(values), rows := max(1, BLOCK // max(1, values[:1].numel()))):
            rest, near = _buffers(values[begin : begin + rows])
            rest.mul_(weight)
            for index, target in zip(indices, targets, strict=True):
                # The last bits of `near` are the whole number, those in front of it the bits of the magic number.
                magic = MAGIC * 2.0 ** (BITS * index)
                torch.add(rest, magic, out=near)
                whole = near.view(torch.int64)
                target[begin : begin + rows].add_(whole - _bits_of_magic(index) if part else whole)
                if index != indices[-1]:
                    rest.sub_(near.sub_(magic))

    def merge(self, other: ExactSum, part: tuple[slice, ...] = ()) -> None:
        """Add another sum, of this one's shape or of that of its part."""
        for index in other._low:
            self._make_room(index, other._additions[index])
            self._low[index][part].add_(other._whole_numbers(index))
            if index in other._high:
                self._high_of(index)[part].add_(other._high[index])

    def unbind(self, shape: Sequence[int]) -> list[ExactSum]:
        """Return the sums of the entries of `shape`'s first dimension; they share the memory of this one, which ends here.

        Args:
            shape: Of as many numbers as this sum has.
        """
        parts = []
        for place in range(shape[0]):
            part = ExactSum(shape[1:])
            part._low = {index: self._whole_numbers(index).view(*shape)[place] for index in self._low}
            part._high = {index: high.view(*shape)[place] for index, high in self._high.items()}
            part._additions = dict(self._additions)
            parts.append(part)
        return parts

    def total(self, grid: int) -> Tensor:
        """Return the sum in float64, of the grids `grid` and `grid - 1`.

        Args:
            grid: The largest that was added to any of the sums that have a common grid.
        """
        result = torch.zeros(self.shape, dtype=torch.float64)
        for index in (grid - 1, grid):
            if index in self._low:
                # The sum is coarse 2^26 + fine with |fine| <= 2^25, and both are the same however often it was settled.
                low, unit = self._whole_numbers(index), 2.0 ** (BITS * index)
                coarse = (low + 2 ** (HALF - 1)) >> HALF
                fine = low - (coarse << HALF)
                if index in self._high:
                    coarse += self._high[index] << (LOW - HALF)
                result += fine.double() * unit
                result += coarse.double() * (unit * 2.0**HALF)
        return result

    def _make_room(self, index: int, additions: int = 1) -> None:
        """Prepare a grid for so many additions."""
        if index not in self._low:
            self._low[index] = torch.zeros(self.shape, dtype=torch.int64)
            self._additions[index] = 0
        if self._additions[index] + additions > SETTLE:
            low = self._whole_numbers(index)
            self._high_of(index).add_(low >> LOW)
            low.bitwise_and_(2**LOW - 1)
            self._additions[index] = 1
        self._additions[index] += additions

    def _whole_numbers(self, index: int) -> Tensor:
        """Return a grid's first tensor without the bits of the magic numbers."""
        low = self._low[index]
        if offset := self._offset.pop(index, 0) % 2**64:
            low.sub_(offset - 2**64 if offset >= 2**63 else offset)
        return low

    def _high_of(self, index: int) -> Tensor:
        if index not in self._high:
            self._high[index] = torch.zeros(self.shape, dtype=torch.int64)
        return self._high[index]

    def _forget(self, index: int) -> None:
        del self._low[index], self._additions[index]
        self._high.pop(index, None)
        self._offset.pop(index, None)


def _bits_of_magic(index: int) -> int:
    """Return the float64 number `MAGIC 2^(51 index)` as the whole number that has its bits."""
    return int.from_bytes(struct.pack("<d", MAGIC * 2.0 ** (BITS * index)), "little")


_scratch = threading.local()


def _buffers(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return a float64 copy of `values` and as much room, in memory that the next call of the thread uses again."""
    count = values.numel()
    if getattr(_scratch, "room", torch.empty(2, 0)).shape[1] < count:
        _scratch.room = torch.empty(2, count, dtype=torch.float64)
    copy, room = (part[:count].view(values.shape) for part in _scratch.room)
    return copy.copy_(values), room


def tree_sum(values: Tensor) -> Tensor:
    """Return the sum over the last dimension, in a fixed order: the second half is added to the first until one number is left.

    `torch.sum` adds in an order that depends on the processor's vectors and on the number of threads.

    Example:
        >>> tree_sum(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        tensor([ 6., 15.])
    """
    while values.shape[-1] > 1:
        half = (values.shape[-1] + 1) // 2
        first, second = values[..., :half], values[..., half:]
        values = torch.nn.functional.pad(second, (0, half - second.shape[-1])) + first
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
