"""Activation checkpointing: a layer of the base keeps its input alone, and the backward pass computes the rest of it again."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from hetlora.errors import ModelError
from hetlora.model.lora_layer import ActiveFactors
from hetlora.model.packing import Pack, current

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["recompute_layers"]

HELD = ("pairs", "ranks", "folded", "folded_from", "counts")
"""What a pass computes with, which is set per thread."""


def recompute_layers(base: PreTrainedModel, live: ActiveFactors) -> None:
    """Make each layer of a base keep only its input for the backward pass. Results are the same, bit for bit.

    transformers marks the layers that it can recompute itself; it does so only in training mode, where dropout is on.

    Args:
        base: The base, changed in place.
        live: The factors of its LoRA layers, which a layer needs again in the backward pass.

    Raises:
        ModelError: transformers marks no layers of this architecture.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"transformers recomputes no layers of {type(base).__name__}; set training.recompute = false, and lower "
            "training.batch_size or data.max_length instead"
        )
    for layer in layers:
        layer.forward = functools.partial(_keep_input, layer.forward, live)


def _keep_input(forward: Callable[..., Any], live: ActiveFactors, *args: Any, **kwargs: Any) -> Any:
    if not (live.recompute and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    packed, held = current.pack, {name: getattr(live, name) for name in HELD}
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing is drawn in a pass
        context_fn=lambda: (contextlib.nullcontext(), _as_before(live, packed, held)),
        **kwargs,
    )


@contextlib.contextmanager
def _as_before(live: ActiveFactors, packed: Pack | None, held: Mapping[str, Any]) -> Iterator[None]:
    """Set what the forward pass had: factors, whose tokens these are, and which rows they form.

    A graphics processor's backward pass runs in a thread of its own, and a model may have other factors by then.
    """
    then = current.pack, {name: getattr(live, name) for name in HELD}
    _set(live, packed, held)
    try:
        yield
    finally:
        _set(live, *then)


def _set(live: ActiveFactors, packed: Pack | None, held: Mapping[str, Any]) -> None:
    current.pack = packed
    for name, value in held.items():
        setattr(live, name, value)
