"""Which linear modules of a base can be adapted: found by trying, and not by what an architecture is called.

A small text of two clients goes through the base, forward and backward. What it does not meet (a vision tower, the attention to
an encoder), what is not reached through its own forward method, and what has no gradient would be adapted for nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hetlora.core.adapter import LoraPair, batch, zeros
from hetlora.data.tokenization import Example
from hetlora.errors import ModelError
from hetlora.model.outline import is_outline, outline_pass
from hetlora.model.packing import Pack, pack_rows

if TYPE_CHECKING:
    from hetlora.model.full_model import FullModel
    from hetlora.model.lora_model import LoraModel

__all__ = ["NO_TEXT", "check_pass", "check_rows", "check_training", "obstacles", "pad_rows"]

NO_TEXT = "no text passes through it"
READ = "the base reads its weight without calling it, so that factors beside the weight would change nothing"
ORDER = "it does not see each client's tokens side by side (as an expert of a mixture, which sees some of all clients' tokens)"
TUPLE = "it does not map one tensor to one tensor"
NO_GRADIENT = "no gradient reaches it"

SCORED = 32
"""Tokens of a row whose losses are compared: a row may be long, and a vocabulary have 250,000 logits a token."""

ROUNDING = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""By type: how far losses may be from the same ones computed in another order, as a share of their norm."""

FIRST, SECOND, OTHER = (3, 1, 2, 0, 1), (0, 2, 1, 1, 3), (2, 0, 3, 2, 1)
"""Rows of the first client, of the second, and another one of the second."""


def obstacles(model: LoraModel, paths: Sequence[str]) -> dict[str, str]:
    """Return why modules of a model's base cannot be adapted, by path; those that can be are not in it.

    Args:
        model: Its base is not wrapped yet.
        paths: Of linear modules.

    Raises:
        ModelError: The base cannot compute the loss of a text.
    """
    watched = [_Watched(path, model.base.get_submodule(path)) for path in paths]
    try:
        with _without_numbers(model.base), torch.enable_grad(), _watching(watched):
            _backward(model.losses(_pack(SECOND)))
        if not is_outline(model.base):
            with torch.no_grad(), _watching(watched):
                model.losses(_pack(OTHER))
    except Exception as error:
        if not is_outline(model.base):
            raise ModelError(
                f"{type(model.base).__name__} cannot compute the loss of a text: {_said(error)}"
            ) from error
        if not model.packs:  # an operation whose result decides shapes: without numbers nobody knows what is met
            return {}
        pad_rows(model)
        return obstacles(model, paths)
    found = {one.path: one.obstacle() for one in watched}
    return {path: why for path, why in found.items() if why}


def check_pass(model: LoraModel) -> None:
    """Let the text pass through the base once more, with its LoRA layers.

    Raises:
        ModelError: It does not; the base does more with a module than to call it.
    """
    one = zeros(model.shapes, 1)
    model.use(batch([one, one]))
    try:
        with torch.no_grad():
            model.losses(_pack(SECOND))
    except Exception as error:
        names = ", ".join(sorted({path.rpartition(".")[2] for path in model.shapes}))
        raise ModelError(
            f"{type(model.base).__name__} cannot compute with LoRA layers in the place of {names}: {_said(error)}; set "
            "model.target_modules to others"
        ) from error
    finally:
        model.use(None)


def check_recomputation(model: LoraModel) -> None:
    """Compare gradients with those of a pass that keeps everything.

    Raises:
        ModelError: They differ: something in the base is not the same the second time.
    """

    def gradients() -> list[Tensor]:
        adapter = batch(
            [{path: LoraPair(*map(torch.ones_like, pair)) for path, pair in zeros(model.shapes, 1).items()}] * 2
        )
        leaves = [factor.mul_(1e-3).requires_grad_() for pair in adapter.values() for factor in pair]
        model.use(adapter)
        with torch.enable_grad():
            _backward(model.losses(_pack(SECOND)))
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]

    try:
        again = gradients()
        model.live.recompute = False
        kept = gradients()
    except Exception as error:
        raise ModelError(
            f"layers of {type(model.base).__name__} cannot be computed again in the backward pass: {_said(error)}; set "
            "training.recompute = false"
        ) from error
    finally:
        model.live.recompute = True
        model.use(None)
    # On a processor they are equal to the bit; a graphics processor may add in another order.
    if not all(
        float((one - other).abs().max()) <= 1e-2 * float(other.abs().max())  # nor is a NaN
        for one, other in zip(again, kept, strict=True)
    ):
        raise ModelError(
            f"layers of {type(model.base).__name__} give other gradients where they are computed again; set "
            "training.recompute = false"
        )


def check_training(model: FullModel) -> None:
    """Let a text pass through a base forward and backward, with every weight about to change.

    Raises:
        ModelError: It does not.
    """
    adapter = model.initial_adapter()
    for pair in adapter.values():
        pair.B.requires_grad_()
    model.use(adapter)
    try:
        with torch.enable_grad():
            _backward(model.losses(pack_rows([[Example(FIRST, 1)]])))
    except Exception as error:
        raise ModelError(f"{type(model.base).__name__} cannot be trained as a whole: {_said(error)}") from error
    finally:
        model.use(None)


def check_rows(model: LoraModel, rows: Sequence[Sequence[int]]) -> None:
    """Compare the losses of rows that go through a model together with those that its base gives to each row alone.

    Some architectures read a mask from the tokens themselves, choose tokens from the whole width of a pass, or cannot compute
    a long row in 16 bits.

    Args:
        model: Its base is loaded.
        rows: Token ids of each row.

    Raises:
        ModelError: They differ, or cannot be computed.
    """
    longest_first = sorted(rows, key=len, reverse=True)  # as in a pack
    examples = [Example(tuple(row), max(1, len(row) - SCORED)) for row in longest_first]
    name, most = type(model.base).__name__, len(longest_first[0])
    with torch.inference_mode():
        try:
            alone = torch.cat([_own_losses(model, example) for example in examples])
            together = model.losses(pack_rows([examples]))
        except (ModelError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ModelError(
                f"{name} cannot compute the loss of a row of {most} tokens (data.max_length) in {model.base.dtype}: "
                f"{_said(error)}"
            ) from error
    # Losses below one count as one: of a loss close to zero, rounding is a large share.
    apart = float((together - alone).norm() / max(float(alone.norm()), len(alone) ** 0.5))
    if not apart <= ROUNDING.get(model.base.dtype, 0.05):
        raise ModelError(
            f"the loss of a row in {name} depends on the rows beside it or on what fills them up: of rows of up to {most} "
            f"tokens (data.max_length) it is {apart:.1%} off that of each alone; lower data.max_length, or take another base"
        )


def _own_losses(model: LoraModel, row: Example) -> Tensor:
    """Return `-log p` of the scored tokens of a row `[n]` as the base gives them when asked for this row alone."""
    ids = torch.tensor([row.ids], device=model.device)  # [1, length]
    positions = torch.arange(row.scored_from - 1, len(row.ids) - 1, device=model.device)
    with model.head.only(positions):
        logits = model.base(input_ids=ids, use_cache=False).logits[0].float()  # [n, V]
    return nn.functional.cross_entropy(logits, ids[0, row.scored_from :], reduction="none")


class _Watched:
    """What happens to a linear module in passes of a text."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path, self.module = path, module
        self.within = False
        self.calls = self.reads = 0
        self.odd = self.misplaced = False
        self.leaf: Tensor | None = None
        self.seen: list[list[Tensor]] = []
        """Inputs of the first client's tokens, in each call of each pass."""

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.within = True
        self.calls += 1
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            self.odd = True
            return
        flat = args[0].detach().reshape(-1, args[0].shape[-1])
        if flat.shape[0] != len(FIRST) + len(SECOND):
            self.misplaced = True
        else:
            self.seen[-1].append(flat[: len(FIRST)].float())

    def after(self, _: nn.Module, __: Any, ___: Any, out: Any) -> Any:
        self.within = False
        if not isinstance(out, Tensor):
            self.odd = True
            return out
        if not torch.is_grad_enabled():
            return out
        if self.leaf is None:
            self.leaf = torch.zeros(1, dtype=out.dtype, device=out.device, requires_grad=True)
        return out + self.leaf

    def obstacle(self) -> str:
        if self.reads:
            return READ
        if not self.calls:
            return NO_TEXT
        if self.odd:
            return TUPLE
        if self.misplaced or not all(map(_alike, *self.seen) if len(self.seen) == 2 else []):
            return ORDER
        return "" if self.leaf is not None and self.leaf.grad is not None else NO_GRADIENT


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether the first client's tokens came to a module as before, although the second client's are others."""
    return bool((one - other).abs().max() <= 0.05 * one.abs().max())


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which weights an operation takes while their module is not at work."""

    def __init__(self, watched: Sequence[_Watched]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owners: dict[int, list[_Watched]] = {}
        """Weight to its modules: several may share one."""
        for one in watched:
            self.owners.setdefault(id(getattr(one.module, "weight", None)), []).append(one)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        backward = torch._C._current_graph_task_id() >= 0  # noqa: SLF001
        if func is not torch.ops.aten.detach.default and not backward:
            for arg in args:
                owners = self.owners.get(id(arg), []) if isinstance(arg, Tensor) else []
                if not any(owner.within for owner in owners):
                    for owner in owners:
                        owner.reads += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _watching(watched: Sequence[_Watched]) -> Iterator[None]:
    handles = []
    for one in watched:
        one.seen.append([])
        handles.append(one.module.register_forward_pre_hook(one.before, with_kwargs=True))
        handles.append(one.module.register_forward_hook(one.after, with_kwargs=True))
    try:
        with _Reads(watched):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _without_numbers(base: nn.Module) -> contextlib.AbstractContextManager[None]:
    return outline_pass() if is_outline(base) else contextlib.nullcontext()


def _pack(second: tuple[int, ...]) -> Pack:
    return pack_rows([[Example(FIRST, 1)], [Example(second, 1)]])


def _backward(losses: Tensor) -> None:
    if losses.requires_grad:
        losses.sum().backward()  # type: ignore[no-untyped-call]


def pad_rows(model: LoraModel) -> None:
    """Let rows go through a model side by side, padded: it cannot do without masks."""
    model.base.set_attn_implementation("sdpa")
    model.packs = False


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
