"""Exact sums of tensors: any order, layout, number of threads, vector width and processor gives the same bits.

Floating-point addition is not associative. If two weights are equal, half of the numbers of a mean lie exactly between two
float32 numbers, and the rounding of the float64 sum decides which of the two is the result. Here every product `w x` is rounded
once, to a multiple of a power of two, and whole numbers are added, which is exact:

- The product is rounded to float64, `p = fl(w x)`.
- It is split at two grids of the fixed ladder `u_j = 2^(51 j)`: a multiple of `u_t` and one of `u_(t-1)`, with the smallest t
  such that `|p| <= 2^50 u_t` for all products of the sum so far. The rest of p, at most `u_(t-1) / 2`, is dropped.
- The multiples are added as 64-bit whole numbers. If a larger product comes, t rises, and the multiples on the grids below
  `u_(t-1)` are dropped. In the end only the two highest grids count, in any order: how a product is split does not depend on t.

This is the reproducible sum of Demmel and Nguyen (*Fast Reproducible Floating-Point Summation*, ARITH 2013) with two bins for a
whole tensor. Each product is off by at most `2^-51 max |p|` beside its own rounding to float64, with the maximum over all
products of the sum; float32 itself is off by `2^-25` of a number. With K equal weights, a number of at least `2^-26` of the
largest thus keeps all its digits. Beside a far larger product, K small ones may lose K times that much.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["AT_ONCE", "BLOCK", "ExactSum", "Summand", "one_thread", "tree_sum"]

Whole = NDArray[np.int64]

BITS = 51
"""Bits between two grids: the bits of a float64 beside its sign and the leading digits of `MAGIC`."""
MAGIC = 1.5 * 2.0**52
"""Adding and then subtracting this times a power of two rounds a smaller float64 to a multiple of this power."""
LOWEST = -19
"""The grid of an empty sum; no product of a weight and a float32 number is below it."""
SETTLE = 2**12
"""Additions after which 64 bits could overflow: each one adds at most 2^50."""
AT_ONCE = 64
"""Largest number of summands that are added together."""
LOW = 40
"""Bits that stay in the first array of a grid when the rest moves to the second."""
HALF = 26
"""Bits of a whole number that are converted to float64 at a time, which is exact."""
BLOCK = 2**15
"""Numbers that are split at a time: their float64 copies (256 KiB each) stay in the cache."""


class Summand(NamedTuple):
    """A weighted tensor to add to a sum.

    Attributes:
        values: float32 or float64 `[M, ...]`, on the CPU.
        weight: At least 0.
    """

    values: Tensor
    weight: float


class ExactSum:
    """The sums `Σ w_k x_k` of M tensors of one shape, each with its own grids; see the module.

    Args:
        shape: `[M, ...]`.

    Example:
        >>> one, other = ExactSum((1, 2)), ExactSum((1, 2))
        >>> parts = [torch.tensor([[1.0, 2.0**-24]]), torch.tensor([[2.0**-60, 1.0]]), torch.tensor([[-1.0, 0.0]])]
        >>> for part in parts:
        ...     one.add([Summand(part, 0.1)])
        >>> other.add([Summand(part, 0.1) for part in reversed(parts)])
        >>> torch.equal(one.total(), other.total())
        True
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self._top = np.full(self.shape[0], LOWEST)  # the index t of each tensor's higher grid [M]
        # For the lower and the higher grid: the whole numbers [2, *shape]; an offset to subtract from them, modulo 2^64 [2, M];
        # and after many additions their multiples of 2^LOW [2, *shape].
        self._low: Whole = np.zeros((2, *self.shape), dtype=np.int64)
        self._offset = np.zeros((2, self.shape[0]), dtype=np.uint64)
        self._high: Whole | None = None
        self._additions = 0

    def add(self, summands: Sequence[Summand], part: tuple[slice, ...] = ()) -> None:
        """Add `weight * values` for each summand; adding several together is faster.

        Args:
            summands: Of the shape of the sum or of its part.
            part: The index of the values in each of the M tensors; empty for all of it.
        """
        if len(summands) > AT_ONCE:
            for first in range(0, len(summands), AT_ONCE):
                self.add(summands[first : first + AT_ONCE], part)
            return
        for values, weight in summands:
            self._raise(_grids(values, weight))
        self._make_room(len(summands))
        arrays = [(values.detach().numpy(), weight) for values, weight in summands]
        if part:
            place = (slice(None), slice(None), *part)
            target = self._low[place]
            magic, near = self._magic().reshape(2, -1, *[1] * (target.ndim - 2)), np.empty((3, *target.shape[1:]))
            for array, weight in arrays:
                _split(array, weight, magic, near)
                target += near[:2].view(np.int64) - magic.view(np.int64)
            return
        # `_whole_numbers` subtracts the bits of all magic numbers together.
        magic = self._magic()
        self._offset += len(arrays) * magic.view(np.uint64)
        flat = [(array.reshape(len(array), -1), weight) for array, weight in arrays]  # [M, n]
        whole, magic = self._low.reshape(2, len(self._top), -1), magic[:, :, None]
        columns = min(BLOCK, whole.shape[2])
        rows = max(1, BLOCK // max(1, columns))
        room = np.empty((3, min(rows, whole.shape[1]), columns))
        for row in range(0, whole.shape[1], rows):
            for column in range(0, whole.shape[2], columns):
                block = slice(row, row + rows), slice(column, column + columns)
                lower, higher = whole[0][block], whole[1][block]
                near = room[:, : lower.shape[0], : lower.shape[1]]
                bits_lower, bits_higher, _ = near.view(np.int64)
                for array, weight in flat:
                    _split(array[block], weight, magic[:, row : row + rows], near)
                    lower += bits_lower
                    higher += bits_higher

    def merge(self, other: ExactSum, part: tuple[slice, ...] = ()) -> None:
        """Add another sum, of the shape of this one or of its part."""
        self._raise(other._top)
        self._make_room(other._additions)
        place = (slice(None), slice(None), *part)
        self._low[place] += _risen(other._whole_numbers(), self._top - other._top)
        if other._high is not None:
            self._multiples()[place] += _risen(other._high, self._top - other._top)

    def unbind(self, shape: Sequence[int]) -> list[ExactSum]:
        """Return the M sums, each `[1, ...]`. They share the memory of this one: do not use it afterwards.

        Args:
            shape: A shape of as many numbers as this sum has, with the same M.
        """
        whole, parts = self._whole_numbers().reshape(2, *shape), []
        for place in range(shape[0]):
            part = ExactSum((0,))
            part.shape, part._top, part._additions = (1, *shape[1:]), self._top[place : place + 1], self._additions
            part._low, part._offset = whole[:, place : place + 1], self._offset[:, place : place + 1]
            if self._high is not None:
                part._high = self._high.reshape(2, *shape)[:, place : place + 1]
            parts.append(part)
        return parts

    def total(self) -> Tensor:
        """Return the sums in float64."""
        # Each is coarse 2^26 + fine with |fine| <= 2^25. Both do not depend on how often multiples were moved.
        whole = self._whole_numbers()
        coarse = (whole + 2 ** (HALF - 1)) >> HALF
        fine = whole - (coarse << HALF)
        if self._high is not None:
            coarse += self._high << (LOW - HALF)
        result = np.zeros(self.shape)
        for side in (0, 1):
            unit = _units(self._top - 1 + side).reshape(-1, *[1] * (len(self.shape) - 1))
            result += fine[side].astype(np.float64) * unit
            result += coarse[side].astype(np.float64) * (unit * 2.0**HALF)
        return torch.from_numpy(result)

    def _magic(self) -> NDArray[np.float64]:
        """Return the magic numbers of the lower and the higher grids `[2, M]`."""
        return MAGIC * np.stack([_units(self._top - 1), _units(self._top)])

    def _raise(self, top: NDArray[np.int64]) -> None:
        """Raise the higher grids to at least these `[M]`."""
        rises = np.maximum(top - self._top, 0)
        if self._additions and rises.any():
            self._low[...] = _risen(self._whole_numbers(), rises)
            if self._high is not None:
                self._high[...] = _risen(self._high, rises)
        self._top = self._top + rises

    def _make_room(self, additions: int) -> None:
        """Prevent an overflow by this many more additions."""
        if self._additions + additions > SETTLE:
            whole = self._whole_numbers()
            self._multiples()[...] += whole >> LOW
            whole &= 2**LOW - 1
            self._additions = 1
        self._additions += additions

    def _whole_numbers(self) -> Whole:
        """Return the whole numbers `[2, *shape]` without the bits of the magic numbers."""
        if self._offset.any():
            self._low -= self._offset.view(np.int64).reshape(2, -1, *[1] * (len(self.shape) - 1))
            self._offset[...] = 0
        return self._low

    def _multiples(self) -> Whole:
        if self._high is None:
            self._high = np.zeros((2, *self.shape), dtype=np.int64)
        return self._high


def _split(values: NDArray[Any], weight: float, magic: NDArray[np.float64], near: NDArray[np.float64]) -> None:
    """Write `magic + weight * values` for both grids: the low bits of the result are those of the multiple.

    Args:
        values: Of any shape.
        weight: Weight of the values.
        magic: Magic numbers of the lower and the higher grid `[2, ...]`.
        near: Output for the lower and the higher grid, and room for temporary values `[3, ...]`.
    """
    lower, higher, room = near
    np.multiply(values, weight, out=lower, dtype=np.float64)
    np.add(lower, magic[1], out=higher)
    np.subtract(higher, magic[1], out=room)
    np.subtract(lower, room, out=lower)
    np.add(lower, magic[0], out=lower)


def _grids(values: Tensor, weight: float) -> NDArray[np.int64]:
    """Return per tensor the smallest t with `weight |x| <= 2^50 2^(51 t)` for all its numbers `[M]`.

    Raises:
        ValueError: A product is not finite.
    """
    flat = values.detach().numpy().reshape(len(values), -1)
    if not flat.shape[1]:
        return np.full(len(values), LOWEST)
    largest = weight * np.maximum(flat.max(axis=1), -flat.min(axis=1)).astype(np.float64)
    if not np.isfinite(largest).all():
        raise ValueError(f"a sum of numbers up to {largest.max()} has no grid; give finite numbers")
    mantissas, exponents = np.frexp(largest)
    exponents = exponents - (mantissas == 0.5)  # so that largest <= 2^exponent
    return np.where(largest > 0.0, np.maximum(-((BITS - 1 - exponents) // BITS), LOWEST), LOWEST).astype(np.int64)


def _units(index: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return `2^(51 j)`."""
    return np.ldexp(1.0, BITS * index)


def _risen(whole: Whole, rises: NDArray[np.int64]) -> Whole:
    """Return the whole numbers `[2, M, ...]` after each tensor's grids have risen by `rises [M]` steps."""
    if not rises.any():
        return whole
    by = rises.reshape(-1, *[1] * (whole.ndim - 2))
    lower, higher = whole
    return np.stack([np.where(by == 0, lower, np.where(by == 1, higher, 0)), np.where(by == 0, higher, 0)])


def tree_sum(values: Tensor) -> Tensor:
    """Return the sum over the last dimension in a fixed order: add the second half to the first until one number is left.

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
    """Run torch in one thread, for library functions whose bits depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
