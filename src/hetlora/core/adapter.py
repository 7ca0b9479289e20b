"""The algebra of LoRA adapters: truncation, padding, stacking, norms and SVD.

An adapter maps a module's name to its factors `A [..., r, in]` and `B [..., out, r]`; the module computes
`W0 x + scaling * B A x`. One index of `r` is a *slot*. Every function takes any leading batch dimensions (``...``), so
that one client and a batch of clients share the code. Inputs are never changed.

A batch of clients of different ranks is padded to one rank. The slots that a client lacks are zero in A and in B, and stay
exactly zero under any gradient step, because the gradient of each factor is a product with the other.

Example:
    >>> import torch
    >>> pair = LoraPair(A=torch.eye(2, 3), B=torch.tensor([[3.0, 4.0]]))  # rank 2, in 3, out 1
    >>> adapter = {"q_proj": pair}
    >>> float(delta_norm(adapter))
    5.0
    >>> truncate(adapter, 1)["q_proj"].B
    tensor([[3.]])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hetlora.core.exact_sum import one_thread, tree_sum
from hetlora.errors import ShapeError

__all__ = [
    "Adapter",
    "Factors",
    "FlatAdapter",
    "LoraPair",
    "ModuleShape",
    "Rank",
    "batch",
    "delta",
    "delta_norm",
    "fill_missing_slots",
    "live_slots",
    "map_tensors",
    "num_bytes",
    "num_parameters",
    "ordered_delta",
    "pad",
    "product_norm",
    "rank_of",
    "stack",
    "stacked",
    "tail",
    "tail_norm",
    "trained",
    "truncate",
    "truncated_svd",
    "unbatch",
    "with_factor",
    "zeros",
]

ACCURACY = 1e-6
"""Guaranteed relative error of `‖BA‖`. QR replaces the Gram form if that cannot reach it."""

NOTHING = 1e-12
"""A singular value below this share of the largest one is a rounded zero, and its vectors are meaningless."""

BLOCK = 2**17
"""Numbers cast to float64 at a time: 1 MiB, which stays in the cache."""


class LoraPair(NamedTuple):
    """The two factors of one module: `A [..., r, in]` and `B [..., out, r]`."""

    A: Tensor
    B: Tensor


class ModuleShape(NamedTuple):
    """The shape of an adapted weight `W0 [out, in]`."""

    out_features: int
    in_features: int


Adapter = Mapping[str, LoraPair]
"""Module name to factors. All modules share their leading batch dimensions."""

Rank = int | Mapping[str, int]
"""One rank for all modules of a client (as in the paper), or one per module."""

Stack = tuple[tuple[str, ...], tuple[int, int, int], tuple[int, int, int]]
"""The names of M modules, and the shapes `[M, r, in]` and `[M, out, r]` of their factors."""

Factors = Literal["", "A", "B", "AB"]
"""Which factors of an adapter are meant."""


class FlatAdapter(dict[str, LoraPair]):
    """An adapter whose modules of equal shapes are stacked in one buffer, so that one operation serves them all.

    Every module's factors are views of the buffer.

    Args:
        numbers: All factors, stack after stack `[n]`: `A [M, r, in]`, then `B [M, out, r]`.
        layout: Per stack the names of its M modules, and the shapes of its A and B.

    Example:
        >>> adapter = FlatAdapter(torch.arange(10.0), [(("q", "v"), (2, 1, 3), (2, 2, 1))])
        >>> adapter["v"]
        LoraPair(A=tensor([[3., 4., 5.]]), B=tensor([[8.],
                [9.]]))

    Attributes:
        numbers: As given.
        layout: As given. The numbers of adapters of equal layout can be added.
        stacks: Per stack its names and its factors, with M as the leading dimension.
    """

    def __init__(self, numbers: Tensor, layout: Sequence[Stack]) -> None:
        self.numbers, self.layout = numbers, tuple(layout)
        sizes = [math.prod(shape) for _, *shapes in self.layout for shape in shapes]
        parts = iter(torch.split(numbers, sizes))
        self.stacks = [
            (names, LoraPair(next(parts).view(shape_a), next(parts).view(shape_b)))
            for names, shape_a, shape_b in self.layout
        ]
        super().__init__()
        for names, (A, B) in self.stacks:
            self.update(zip(names, map(LoraPair, A.unbind(), B.unbind()), strict=True))


def stacked(adapter: Adapter) -> FlatAdapter:
    """Return the same factors as a `FlatAdapter`; a copy, unless `adapter` is one already.

    Example:
        >>> one = LoraPair(torch.ones(1, 3), torch.ones(2, 1))
        >>> stacked({"q": one, "k": one}).layout
        ((('q', 'k'), (2, 1, 3), (2, 2, 1)),)
    """
    if isinstance(adapter, FlatAdapter):
        return adapter
    alike: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for name, (A, B) in adapter.items():
        alike.setdefault((A.shape, B.shape), []).append(name)
    numbers = [adapter[name][side].flatten() for names in alike.values() for side in (0, 1) for name in names]
    layout = [(tuple(names), (len(names), *A), (len(names), *B)) for (A, B), names in alike.items()]
    return FlatAdapter(torch.cat(numbers), layout)


def rank_of(rank: Rank, module: str) -> int:
    """Return the rank of one module.

    Example:
        >>> rank_of(4, "q_proj"), rank_of({"q_proj": 2}, "q_proj")
        (4, 2)
    """
    return rank[module] if isinstance(rank, Mapping) else rank


def map_tensors(function: Callable[[Tensor], Tensor], adapter: Adapter) -> dict[str, LoraPair]:
    """Apply a function to every factor.

    Example:
        >>> map_tensors(torch.neg, {"m": LoraPair(torch.ones(1, 1), torch.ones(1, 1))})["m"].A
        tensor([[-1.]])
    """
    return {name: LoraPair(function(pair.A), function(pair.B)) for name, pair in adapter.items()}


def num_bytes(adapter: Adapter, factors: Factors = "AB") -> int:
    """Return the bytes of an adapter's tensors, of both factors or one.

    Example:
        >>> num_bytes({"m": LoraPair(torch.ones(2, 3), torch.ones(5, 2))})  # (2*3 + 5*2) * 4 bytes
        64
    """
    chosen = [getattr(pair, letter) for pair in adapter.values() for letter in factors]
    return sum(factor.numel() * factor.element_size() for factor in chosen)


def num_parameters(adapter: Adapter, factors: Factors = "AB") -> int:
    """Return the number of parameters of an adapter, in both factors or one.

    Example:
        >>> num_parameters({"m": LoraPair(torch.ones(2, 3), torch.ones(5, 2))}, "B")
        10
    """
    return sum(getattr(pair, letter).numel() for pair in adapter.values() for letter in factors)


def with_factor(adapter: Adapter, letter: Literal["A", "B"], source: Adapter) -> dict[str, LoraPair]:
    """Return `adapter` with one of its factors taken from `source`.

    Example:
        >>> zero, one = LoraPair(torch.zeros(1, 1), torch.zeros(1, 1)), LoraPair(torch.ones(1, 1), torch.ones(1, 1))
        >>> with_factor({"m": zero}, "A", {"m": one})["m"]
        LoraPair(A=tensor([[1.]]), B=tensor([[0.]]))
    """
    return {name: pair._replace(**{letter: getattr(source[name], letter)}) for name, pair in adapter.items()}


def zeros(
    shapes: Mapping[str, ModuleShape], rank: Rank, *, leading: Sequence[int] = (), dtype: torch.dtype = torch.float32
) -> dict[str, LoraPair]:
    """Return an adapter of zeros: the neutral element of a sum.

    Args:
        shapes: Module name to the shape of its weight.
        rank: One rank, or one per module.
        leading: Batch dimensions in front of both factors.
        dtype: Type of both factors.

    Example:
        >>> zeros({"m": ModuleShape(5, 3)}, 2)["m"].B.shape
        torch.Size([5, 2])
    """
    return {
        name: LoraPair(
            torch.zeros(*leading, rank_of(rank, name), shape.in_features, dtype=dtype),
            torch.zeros(*leading, shape.out_features, rank_of(rank, name), dtype=dtype),
        )
        for name, shape in shapes.items()
    }


def truncate(adapter: Adapter, rank: Rank) -> dict[str, LoraPair]:
    """Keep the first `rank` slots by index: `A[..., :r, :]`, `B[..., :, :r]` (the paper's distribution; sure).

    The factors are views.

    Raises:
        ShapeError: A module has fewer slots than asked for.

    Example:
        >>> wide = {"m": LoraPair(torch.ones(4, 3), torch.ones(5, 4))}
        >>> truncate(wide, 2)["m"].A.shape
        torch.Size([2, 3])
    """
    result = {}
    for name, (A, B) in adapter.items():
        kept, have = rank_of(rank, name), A.shape[-2]
        if not 0 <= kept <= have:
            raise ShapeError(f"{name}: cannot truncate {have} slots to rank {kept}; pad() widens an adapter")
        result[name] = LoraPair(A[..., :kept, :], B[..., :, :kept])
    return result


def trained(adapter: Adapter) -> dict[str, LoraPair]:
    """Return the slots up to the last trained one, at least one per module. A slot is trained if its `B` is not zero.

    Example:
        >>> trained({"m": LoraPair(torch.ones(3, 1), torch.tensor([[0.0, 2.0, 0.0]]))})["m"].B
        tensor([[0., 2.]])
    """
    ranks = {}
    for module, (_, B) in adapter.items():
        slots = B.ne(0.0).any(dim=0).nonzero()
        ranks[module] = int(slots[-1]) + 1 if len(slots) else 1
    return truncate(adapter, ranks)


def pad(adapter: Adapter, rank: Rank) -> dict[str, LoraPair]:
    """Append slots of zeros up to `rank`; `B A` and its norm do not change.

    Raises:
        ShapeError: A module has more slots than asked for.

    Example:
        >>> pad({"m": LoraPair(torch.ones(1, 2), torch.ones(2, 1))}, 2)["m"].A
        tensor([[1., 1.],
                [0., 0.]])
    """
    result = {}
    for name, (A, B) in adapter.items():
        missing = rank_of(rank, name) - A.shape[-2]
        if missing < 0:
            wanted = rank_of(rank, name)
            raise ShapeError(f"{name}: cannot pad {A.shape[-2]} slots to rank {wanted}; truncate() narrows an adapter")
        pad_a, pad_b = (0, 0, 0, missing), (0, missing)
        result[name] = LoraPair(torch.nn.functional.pad(A, pad_a), torch.nn.functional.pad(B, pad_b))
    return result


def tail(adapter: Adapter, start: Rank) -> dict[str, LoraPair]:
    """Return the slots `start ...` as an adapter: the complement of `truncate`. The factors are views.

    Example:
        >>> tail({"m": LoraPair(torch.eye(2), torch.eye(2))}, 1)["m"].A
        tensor([[0., 1.]])
    """
    return {
        name: LoraPair(A[..., rank_of(start, name) :, :], B[..., :, rank_of(start, name) :])
        for name, (A, B) in adapter.items()
    }


def stack(adapters: Sequence[Adapter]) -> dict[str, LoraPair]:
    """Concatenate slots, so that the products add up: `ΔW(stack) = Σ_k B_k A_k`, of rank `Σ_k r_k`.

    Raises:
        ShapeError: The adapters name different modules.

    Example:
        >>> one = {"m": LoraPair(torch.ones(1, 2), torch.ones(3, 1))}
        >>> delta(stack([one, one])["m"])[0]
        tensor([2., 2.])
    """
    _same_modules(adapters)
    return {
        name: LoraPair(
            torch.cat([adapter[name].A for adapter in adapters], dim=-2),
            torch.cat([adapter[name].B for adapter in adapters], dim=-1),
        )
        for name in adapters[0]
    }


def batch(adapters: Sequence[Adapter]) -> dict[str, LoraPair]:
    """Join G adapters of any ranks along a new first dimension, padded to the largest rank per module.

    Returns:
        Factors `A [G, ..., r, in]` and `B [G, ..., out, r]`; `unbatch` is the inverse, given the ranks.

    Example:
        >>> thin = {"m": LoraPair(torch.ones(1, 2), torch.ones(3, 1))}
        >>> thick = {"m": LoraPair(torch.ones(2, 2), torch.ones(3, 2))}
        >>> batch([thin, thick])["m"].A.shape
        torch.Size([2, 2, 2])
    """
    _same_modules(adapters)
    widest = {name: max(adapter[name].A.shape[-2] for adapter in adapters) for name in adapters[0]}
    padded = [pad(adapter, widest) for adapter in adapters]
    return {
        name: LoraPair(torch.stack([p[name].A for p in padded]), torch.stack([p[name].B for p in padded]))
        for name in widest
    }


def unbatch(adapter: Adapter, ranks: Sequence[Rank]) -> list[dict[str, LoraPair]]:
    """Split the first dimension into clients, each truncated to its own rank (copies, not views).

    Args:
        adapter: Factors `A [G, ..., r, in]`, `B [G, ..., out, r]`.
        ranks: The G ranks, in order.

    Raises:
        ShapeError: There are not G ranks.

    Example:
        >>> two = {"m": LoraPair(torch.ones(2, 3, 4), torch.ones(2, 5, 3))}
        >>> [client["m"].A.shape[0] for client in unbatch(two, [1, 3])]
        [1, 3]
    """
    if any(pair.A.shape[0] != len(ranks) for pair in adapter.values()):
        raise ShapeError(f"{len(ranks)} ranks do not fit a batch of {next(iter(adapter.values())).A.shape[0]} clients")
    clients = [
        truncate(map_tensors(lambda factor, i=index: factor[i], adapter), rank)  # type: ignore[misc]
        for index, rank in enumerate(ranks)
    ]
    return [map_tensors(torch.clone, client) for client in clients]


def delta(pair: LoraPair) -> Tensor:
    """Return the dense product `B A [..., out, in]`, for tests and merging."""
    return pair.B @ pair.A


def ordered_delta(pair: LoraPair) -> Tensor:
    """Return `B A [out, in]` in float64, summed slot after slot: unlike a matrix product, the same bits on every processor.

    A product of two float32 numbers is exact in float64.

    Example:
        >>> ordered_delta(LoraPair(A=torch.eye(2), B=torch.ones(1, 2)))
        tensor([[1., 1.]], dtype=torch.float64)
    """
    A, B = pair.A.double(), pair.B.double()  # [r, in], [out, r]
    product = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)  # [out, in]
    rows = max(1, BLOCK // max(1, A.shape[1]))
    for part, B_rows in zip(torch.split(product, rows), torch.split(B, rows), strict=True):  # [rows, in] and [rows, r]
        for slot in range(A.shape[0]):
            part += B_rows[:, slot : slot + 1] * A[slot]
    return product


def delta_norm(adapter: Adapter) -> Tensor:
    """Return `‖ΔW‖_F = sqrt(Σ_modules ‖B A‖_F²) [...]`, in float64: the paper's measure of a client's *sparsity*.

    Example:
        >>> float(delta_norm({"m": LoraPair(torch.tensor([[3.0, 4.0]]), torch.ones(1, 1))}))
        5.0
    """
    if isinstance(adapter, FlatAdapter):
        norms = {
            name: norm for names, pair in adapter.stacks for name, norm in zip(names, product_norm(pair), strict=True)
        }
    else:
        norms = {name: product_norm(pair) for name, pair in adapter.items()}
    in_order = torch.stack(
        [norms[name] for name in sorted(norms)]
    )  # [modules, ...], by name: layouts differ in their order
    whole: Tensor = torch.linalg.vector_norm(in_order, dim=0)
    return whole


def product_norm(pair: LoraPair) -> Tensor:
    """Return `‖B A‖_F [...]` of one module, in float64 and to a relative error of 1e-6.

    `‖B A‖_F² = ⟨A Aᵀ, BᵀB⟩` needs two r × r products instead of an out × in matrix. In float64, of unit roundoff
    `u = 2⁻⁵³`, an entry i, j of `A Aᵀ` is off by at most `in u ‖a_i‖ ‖a_j‖`, one of `BᵀB` by `out u ‖b_i‖ ‖b_j‖`, and the
    sum over r² entries rounds r² times; so the square is off by at most `(in + out + r²) u (Σ_i ‖a_i‖ ‖b_i‖)²`. If that
    exceeds 2e-6 of the square itself, because slots cancel (`B = [b, -b]`), the norm comes from the triangular factors of a QR
    decomposition, whose error is relative to `Σ_i ‖a_i‖ ‖b_i‖` and not to its square.

    Example:
        >>> b, d = torch.ones(2, 1), torch.tensor([[1.0, 0.0]])
        >>> A = torch.cat([d, d + torch.tensor([[2.0 ** -20, 0.0]])])
        >>> pair = LoraPair(A, torch.cat([b, -b], dim=1))  # B A = -2**-20 b d: float32 Gram matrices give 0
        >>> round(float(product_norm(pair)) * 2**20, 6) == round(2**0.5, 6)
        True
    """
    A, B = pair
    gram_a, gram_b = _gram(A), _gram(B.mT)  # each [..., r, r]
    square = tree_sum((gram_a * gram_b).flatten(-2)).clamp_min(0.0)  # [...]
    slots = tree_sum((gram_a.diagonal(dim1=-2, dim2=-1) * gram_b.diagonal(dim1=-2, dim2=-1)).sqrt())  # [...]
    terms = A.shape[-1] + B.shape[-2] + A.shape[-2] ** 2
    cancelled = 2.0 * ACCURACY * square < terms * 2.0**-53 * slots.square()
    norm = square.sqrt()
    if not bool(cancelled.any()):
        return norm
    # B A = (Q_B R_B)(Q_A R_A)ᵀ, and orthogonal factors do not change the norm: ‖B A‖ = ‖R_B R_Aᵀ‖.
    with one_thread():
        r_b, r_a = (torch.linalg.qr(factor.double(), mode="r").R for factor in (B[cancelled], A[cancelled].mT))
        return norm.masked_scatter(cancelled, torch.linalg.matrix_norm(r_b @ r_a.mT))


def _gram(factor: Tensor) -> Tensor:
    """Return `F Fᵀ [..., r, r]` of `F [..., r, n]`, in float64, casting a block at a time."""
    if factor.requires_grad or factor.device.type != "cpu":
        whole = factor.double()
        return whole @ whole.mT
    rank, length = factor.shape[-2:]
    each = factor.unsqueeze(0).flatten(0, -3)  # [n_factors, r, n]
    gram = torch.zeros(len(each), rank, rank, dtype=torch.float64)  # [n_factors, r, r]
    many, long = max(1, BLOCK // (rank * length or 1)), max(1, BLOCK // (rank or 1))
    for first in range(0, len(each), many):
        for start in range(0, length, long):
            # NumPy computes only half of a product of a matrix with its own transpose; torch computes all of it.
            part = each[first : first + many, :, start : start + long].double().numpy()
            gram[first : first + many] += torch.from_numpy(part @ part.swapaxes(1, 2))
    return gram.view(*factor.shape[:-2], rank, rank)


def truncated_svd(pair: LoraPair, rank: int) -> LoraPair:
    """Return the best approximation of `B A` of at most `rank` slots, ordered by importance: its truncated SVD.

    With `B = Q_B R_B` and `Aᵀ = Q_A R_A`, the SVD of the small `R_B R_Aᵀ = u S vᵀ` gives that of the product,
    `B A = (Q_B u) S (Q_A v)ᵀ`, without forming it. The result is `B = Q_B u S` and `A = (Q_A v)ᵀ`. The rows of `A` are
    orthonormal, so that a slot of singular value 0 also has a gradient. The largest entry of each row of `A` is positive.

    Args:
        pair: Factors `A [s, in]`, `B [out, s]`, of any number of slots.
        rank: Largest number of slots; fewer come back if `min(s, out, in)` is smaller.

    Returns:
        Factors in float64, `A [k, in]`, `B [out, k]`.

    Example:
        >>> best = truncated_svd(LoraPair(A=torch.tensor([[0.0, 2.0], [1.0, 0.0]]), B=torch.eye(2)), 1)
        >>> best.B @ best.A  # of the singular values 2 and 1, the larger stays
        tensor([[0., 2.],
                [0., 0.]], dtype=torch.float64)
    """
    A, B = pair.A.double(), pair.B.double()
    with one_thread():
        (q_b, r_b), (q_a, r_a) = torch.linalg.qr(B), torch.linalg.qr(A.mT)  # q_b [out, m_b], q_a [in, m_a], r [m, s]
        u, s, v = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)  # of [m_b, m_a]
        rows, columns = v[:rank] @ q_a.mT, q_b @ (u * s)[:, :rank]  # [k, in], [out, k]
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))  # [k, 1]
    signs = torch.where(largest < 0.0, -1.0, 1.0).to(rows)
    return LoraPair(rows * signs, columns * signs.mT)


def fill_missing_slots(before: LoraPair, best: LoraPair) -> LoraPair:
    """Return `best` with the rank of `before`. Missing slots keep the A of `before` and get B = 0, so that they can train."""
    A, B = before.A.double(), before.B.new_zeros(before.B.shape).double()
    values = torch.linalg.vector_norm(best.B, dim=0)  # singular values [k]
    rank = int((values > NOTHING * values[0]).sum())
    A = A.clone()
    A[:rank], B[:, :rank] = best.A[:rank], best.B[:, :rank]
    return LoraPair(A, B)


def tail_norm(adapter: Adapter, start: int | Mapping[str, int | Tensor]) -> Tensor:
    """Return `Σ_modules ‖B[:, start:]‖_F ‖A[start:, :]‖_F [...]`, which self-pruning penalises and compares (likely).

    The gradient at zero is 0, as of `torch.linalg.vector_norm`: LoRA starts at B = 0, where the square root of a sum of squares
    would give NaN.

    Args:
        adapter: Factors `A [..., r, in]`, `B [..., out, r]`.
        start: First slot of the tail: one number, one per module, or for a batch of clients one integer tensor `[...]` per
            module, on the CPU, so that each client has its own tail.

    Example:
        >>> adapter = {"m": LoraPair(torch.tensor([[9.0], [2.0]]), torch.tensor([[9.0, 3.0]]))}
        >>> float(tail_norm(adapter, 1))  # 3 * 2
        6.0
    """
    products = []
    for name in sorted(adapter):  # messages order modules differently, and the order decides how the sum is rounded
        A, B = adapter[name]
        first = start if isinstance(start, int) else start[name]
        if isinstance(first, int):
            tail_a, tail_b = A[..., first:, :], B[..., :, first:]
        else:
            lowest = int(first.min())
            inside = (torch.arange(lowest, A.shape[-2]) >= first.unsqueeze(-1)).to(A.device)  # [..., slots]
            tail_a = torch.where(inside.unsqueeze(-1), A[..., lowest:, :], 0.0)  # [..., slots, in]
            tail_b = torch.where(inside.unsqueeze(-2), B[..., :, lowest:], 0.0)  # [..., out, slots]
        norm_a = torch.linalg.vector_norm(tail_a, dim=(-2, -1))  # [...]
        products.append(norm_a * torch.linalg.vector_norm(tail_b, dim=(-2, -1)))
    return torch.stack(products).sum(dim=0)


def live_slots(adapter: Adapter) -> int:
    """Return the number of live slots of the module that has most of them.

    A slot that is zero in A and in B is dead: it has no gradient, so that no client can train it.

    Example:
        >>> live_slots({"m": LoraPair(torch.tensor([[1.0], [0.0]]), torch.zeros(1, 2))})
        1
    """
    return max(int(((A != 0).any(dim=-1) | (B != 0).any(dim=-2)).sum(dim=-1).max()) for A, B in adapter.values())


def _same_modules(adapters: Sequence[Adapter]) -> None:
    if not adapters:
        raise ShapeError("there is no adapter to join; give at least one")
    first, *others = adapters
    for other in others:
        if other.keys() != first.keys():
            difference = sorted(first.keys() ^ other.keys())
            raise ShapeError(f"adapters name different modules; only one side has {', '.join(difference)}")
