"""Predicted cost of local training per client: parameters, bytes, FLOPs and peak memory at any rank.

The model runs the steps of `hetlora.training.local` on PyTorch's fake tensors, which have shapes and no data. It counts the
FLOPs of every operation and records the live bytes after it. No formula depends on the architecture, and a base of many
gigabytes is traced from its config.json in seconds.

The size of every tensor is constant or proportional to the rank, so the live bytes after each operation are linear in the rank.
Two traces give these lines for all ranks; the peak at a rank is the highest line there.
"""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from hetlora.core.adapter import Rank, rank_of, zeros
from hetlora.data.tokenization import Example
from hetlora.errors import ModelError
from hetlora.model.lora_model import LoraModel, build_base
from hetlora.model.outline import outline_pass
from hetlora.model.packing import pack_rows
from hetlora.model.quantize import Quantization, fake_quantize
from hetlora.training.batched_factors import BatchedFactors
from hetlora.training.local import TOKENS_A_PASS, LocalTraining, client_losses, micro_batches

__all__ = ["Cost", "CostModel", "LocalWork"]

RANKS_TRACED = (4, 8)
PASSES_TRACED = 2
"""Passes traced per step: from the second on, gradients exist, and every further pass is like it."""
TRACES_KEPT = 64
"""The newest traces, which a process keeps."""


@dataclass(frozen=True)
class LocalWork:
    """The work of a client in one round, as far as its cost depends on it.

    Attributes:
        rows: Rows per step.
        length: Tokens per row, padding included.
        scored: Scored tokens per step, at most `rows * (length - 1)`.
        steps: Optimiser steps.

    Raises:
        ValueError: A number is out of its range.
    """

    rows: int
    length: int
    scored: int
    steps: int = 2

    def __post_init__(self) -> None:
        limit = self.rows * (self.length - 1)
        if min(self.rows, self.length, self.steps) < 1 or not 0 <= self.scored <= limit:
            raise ValueError(f"{self}: rows, length and steps are at least 1, scored is at most {limit}")

    def examples(self) -> list[Example]:
        """Return the rows of a step; the cost does not depend on the values of their tokens.

        Example:
            >>> [row.scored for row in LocalWork(rows=2, length=4, scored=5).examples()]
            [2, 3]
        """
        shares = [self.scored * row // self.rows for row in range(self.rows + 1)]
        counts = [end - begin for begin, end in itertools.pairwise(shares)]
        return [Example((0,) * self.length, self.length - count) for count in counts]

    @classmethod
    def bound(cls, rows: int, length: int, steps: int = 2) -> LocalWork:
        """Return the largest work with rows of at most this length: all at full length, every token scored.

        Example:
            >>> LocalWork.bound(rows=4, length=128).scored
            508
        """
        return cls(rows, length, rows * (length - 1), steps)


@dataclass(frozen=True)
class Cost:
    """Cost of one round for one client.

    Attributes:
        parameters: Trained parameters.
        bytes_down: Bytes of the tensors it receives.
        bytes_up: Bytes of the tensors it sends, before any pruning.
        flops: Floating-point operations, 2 per multiply-add: matrix products and attention of the forward and the backward
            pass; element-wise operations are not counted.
        peak_bytes: Most bytes of live tensors at any time: the base's weights, received and trained factors, gradients,
            optimiser state, activations and intermediate results.
    """

    parameters: int
    bytes_down: int
    bytes_up: int
    flops: int
    peak_bytes: int


class CostModel:
    """Cost of local training on one base, by rank and work.

    It is exact for PyTorch's operations on a CPU. The workspace of kernels and the penalty of a method are not included.
    Dropout is off, as in `LoraModel`.

    Args:
        base: The base model by folder, hub name, or ``"nano"``; only its config.json is read.
        settings: Optimiser and clipping; the work gives the numbers of steps and rows.
        target_modules: As in `LoraModel`.
        layers: As in `LoraModel`.
        dtype: Type of the base's weights; factors are float32.
        quantize: How the base's linear layers are stored; `full` ignores it.
        recompute: As in `LoraModel`.

    Raises:
        ModelError: The base has no configuration, or no such target modules.

    Attributes:
        parameters: Number of parameters of the base.

    Example:
        >>> costs = CostModel("nano", LocalTraining(steps=4))
        >>> work = LocalWork.bound(rows=4, length=128, steps=4)
        >>> thin, full = costs.lora(4, work), costs.full(work)
        >>> thin.parameters, thin.bytes_up, full.bytes_up // thin.bytes_up
        (15360, 61440, 195)
    """

    def __init__(
        self,
        base: str,
        settings: LocalTraining,
        *,
        target_modules: Sequence[str] | None = None,
        layers: str | Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        quantize: Quantization = "none",
        recompute: bool = False,
    ) -> None:
        self.settings = settings
        self._fake = FakeTensorMode()
        with self._fake:
            self.model = LoraModel(
                build_base(base, dtype=dtype), target_modules=target_modules, layers=layers, recompute=recompute
            )
            self.parameters = sum(parameter.numel() for parameter in self.model.base.parameters())
            fake_quantize(self.model.base, quantize)
        whole = (
            CostModel(base, settings, target_modules=target_modules, layers=layers, dtype=dtype, recompute=recompute)
            if quantize != "none"
            else self
        )
        self._whole = whole
        shape = {name: value for name, value in self.model.base.config.to_dict().items() if name != "_name_or_path"}
        modules = tuple(self.model.shapes.items())
        trained = (settings.optimizer, settings.weight_decay, settings.clip_norm)
        self._traced = (json.dumps(shape, sort_keys=True, default=str), modules, trained, dtype, quantize, recompute)

    @property
    def base_bytes(self) -> int:
        """Bytes of the base's weights and buffers."""
        return sum(tensor.nbytes for tensor in (*self.model.base.parameters(), *self.model.base.buffers()))

    def lora(self, rank: Rank, work: LocalWork) -> Cost:
        """Return the cost of training factors of this rank, or of these ranks by module.

        Raises:
            ModelError: The base cannot be traced, e.g. because its shapes depend on its data.
        """
        parameters = sum(rank_of(rank, path) * sum(shape) for path, shape in self.model.shapes.items())
        trace = self._lora_trace(rank, work) if isinstance(rank, Mapping) else self._interpolated(rank, work)
        size = parameters * torch.float32.itemsize
        flops = trace.step_flops * work.rows * work.steps // _rows_traced(work)
        return Cost(parameters, size, size, flops, trace.peak)

    def full(self, work: LocalWork) -> Cost:
        """Return the cost of training every weight of the base, sent in the base's type.

        Raises:
            ModelError: As `lora`.
        """
        if self._whole is not self:
            return self._whole.full(work)
        weights = list(self.model.base.parameters())
        size = sum(weight.numel() * weight.element_size() for weight in weights)
        trace = self._trace(("full", *_key(work)), lambda meter: self._train_weights(meter, work), work)
        return Cost(self.parameters, size, size, trace.step_flops * work.steps, trace.peak)

    def largest_rank(self, budget: int, work: LocalWork, most: int) -> int:
        """Return the largest rank up to `most` whose peak memory is at most `budget` bytes; 0 if rank 1 does not fit."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.lora(middle, work).peak_bytes <= budget
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def _interpolated(self, rank: int, work: LocalWork) -> _Trace:
        low, high = (self._lora_trace(traced, work) for traced in RANKS_TRACED)
        first, second = RANKS_TRACED

        def line(at_first: int, at_second: int) -> int:
            return at_first + (at_second - at_first) * (rank - first) // (second - first)

        live = tuple(line(*points) for points in zip(low.live, high.live, strict=True))
        return _Trace(line(low.step_flops, high.step_flops), live)

    def _lora_trace(self, rank: Rank, work: LocalWork) -> _Trace:
        key = rank if isinstance(rank, int) else tuple(sorted(rank.items()))
        return self._trace((key, *_key(work)), lambda meter: self._train_factors(meter, rank, work), work)

    def _trace(self, key: tuple[object, ...], train: Callable[[_Meter], None], work: LocalWork) -> _Trace:
        key = (*self._traced, *key)
        if (trace := _TRACES.get(key)) is None:
            meter = _Meter([*self.model.base.parameters(), *self.model.base.buffers()])
            try:
                with self._fake, outline_pass():
                    train(meter)
            except RuntimeError as error:  # also the class of PyTorch's errors about missing data
                kind, reason = type(self.model.base).__name__, str(error).strip().split("\n")[0]
                raise ModelError(
                    f"the cost of {kind} cannot be foretold: an operation depends on the data or has no known shape "
                    f"({reason}). Measure a run instead, and give ranks by ranks.kind = 'tiers'"
                ) from error
            trace = _Trace(meter.flops // _steps_traced(work), tuple(meter.live_after))
            if len(_TRACES) >= TRACES_KEPT:
                _TRACES.pop(next(iter(_TRACES)))
            _TRACES[key] = trace
        return trace

    def _train_factors(self, meter: _Meter, rank: Rank, work: LocalWork) -> None:
        """Run the steps of `hetlora.training.local.train_clients` for one client."""
        received = zeros(self.model.shapes, rank)
        factors = BatchedFactors([received], "AB", torch.device("cpu"))
        meter.follow([factors.values, factors.gradients, *(factor for pair in received.values() for factor in pair)])
        optimizer = self.settings.make_optimizer([factors.values])
        with meter:
            for _ in range(_steps_traced(work)):
                self.model.use(factors.adapter)
                for [rows] in itertools.islice(micro_batches([work.examples()], TOKENS_A_PASS), PASSES_TRACED):
                    self._loss(rows, work).backward()  # type: ignore[no-untyped-call]
                factors.collect_gradients()
                norms = torch.linalg.vector_norm(factors.gradients, dim=1)
                factors.step(optimizer, [True], norms, self.settings.clip_norm)
        self.model.use(None)

    def _train_weights(self, meter: _Meter, work: LocalWork) -> None:
        """Run a plain PyTorch loop over every weight."""
        weights = [weight.requires_grad_() for weight in self.model.base.parameters()]
        optimizer = self.settings.make_optimizer(weights)
        self.model.live.recompute = False  # as whole weights are trained
        try:
            with meter:
                for _ in range(_steps_traced(work)):
                    optimizer.zero_grad()
                    self._loss(work.examples(), work).backward()  # type: ignore[no-untyped-call]
                    if self.settings.clip_norm is not None:
                        torch.nn.utils.clip_grad_norm_(weights, self.settings.clip_norm)
                    optimizer.step()
        finally:
            self.model.live.recompute = True
            for weight in weights:
                weight.requires_grad_(False).grad = None

    def _loss(self, rows: Sequence[Example], work: LocalWork) -> Tensor:
        return client_losses(self.model, pack_rows([rows])).sum() / max(work.scored, 1)


@dataclass(frozen=True)
class _Trace:
    """The FLOPs of a step, and the live bytes after each operation."""

    step_flops: int
    live: tuple[int, ...]

    @property
    def peak(self) -> int:
        return max(self.live)


_TRACES: dict[tuple[object, ...], _Trace] = {}
"""Traces by everything they depend on: several runs in one process need the same ones."""


def _steps_traced(work: LocalWork) -> int:
    # From the second step on, gradients and optimiser state exist; every further step is like it.
    return min(work.steps, 2)


def _rows_traced(work: LocalWork) -> int:
    return min(work.rows, PASSES_TRACED * max(1, TOKENS_A_PASS // work.length))


def _key(work: LocalWork) -> tuple[int, ...]:
    return work.rows, work.length, work.scored, _steps_traced(work)


def _attention(*args: Any, **_: Any) -> int:
    query, key, value = (tensor.shape for tensor in args[:3])
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(*args: Any, **_: Any) -> int:
    gradient, query, key, value = (tensor.shape for tensor in args[:4])
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


def _addmm(*args: Any, **_: Any) -> int:
    _, left, right = (tensor.shape for tensor in args[:3])
    return int(2 * left[0] * left[1] * right[1])


_UNCOUNTED: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # noqa: SLF001
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,  # noqa: SLF001
    torch.ops.aten.addmm_: _addmm,
}
"""FLOP counts that PyTorch's table lacks: attention on a CPU, and products added in place."""


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts FLOPs, and the bytes of live storages."""

    def __init__(self, alive: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.live = 0
        self.live_after: list[int] = []
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.follow(alive)

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of these tensors until they are freed."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes()
            if key in self._storages:
                continue

            def freed(_: object, key: int = key, size: int = size) -> None:
                del self._storages[key]
                self.live -= size

            self._storages[key] = weakref.ref(storage, freed)
            self.live += size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:  # fake tensors call it all the time
            return out
        count = _UNCOUNTED.get(func.overloadpacket) or flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        self.follow(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        self.live_after.append(self.live)
        return out
