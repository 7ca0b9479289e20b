"""Does the base of a run load, are its target modules there, and does its tokenizer fit?"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hetlora.commands.doctor.findings import Notes
from hetlora.config import RunConfig
from hetlora.config.build import make_method
from hetlora.config.build_data import make_tokenization
from hetlora.config.preconditions import check_causal, check_length, check_tokenizer
from hetlora.core.adapter import ModuleShape
from hetlora.data import Tokenization
from hetlora.errors import HetLoraError, ModelError
from hetlora.model.full_model import FullModel
from hetlora.model.lora_model import LoraModel, build_base, linear_paths, load_base, load_tokenizer, matching_paths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["adapted_shapes", "load_model", "load_tokenization"]


def adapted_shapes(notes: Notes, config: RunConfig) -> Mapping[str, ModuleShape] | None:
    """Look at the architecture of the base and its target modules; its weights are not read.

    Returns:
        Adapted module to its shape; None where there is no base, or not these modules.
    """
    name = config.model.base
    with FakeTensorMode():
        base = notes.attempt("base", "model.base", lambda: build_base(name))
        if base is None:
            notes.skip("the base cannot be loaded", "causal", "target modules", "sequence length", "memory")
            return None
        notes.judge(
            "sequence length",
            _refusal(lambda: check_length(config, base.config)),
            f"{config.data.max_length} tokens",
            "data.max_length",
            "lower it",
        )
        if make_method(config).trains == "weights":
            notes.ok("target modules", f"none: method {config.method.name} trains every weight", "model.target_modules")
            return FullModel(base).shapes
        if unknown := _unknown_modules(base, config):
            notes.fail("target modules", unknown, "model.target_modules", "take a name that the base has")
            return None
        model = notes.attempt(
            "target modules",
            "model.target_modules",
            lambda: LoraModel(base, target_modules=config.model.target_modules),
        )
    if model is None:
        return None
    notes.ok(
        "target modules", f"{', '.join(model.target_modules)}: {len(model.shapes)} modules", "model.target_modules"
    )
    return model.shapes


def _unknown_modules(base: PreTrainedModel, config: RunConfig) -> str | None:
    """Say which names are no linear module of the base, each with those that may have been meant."""
    linear = linear_paths(base)
    have = sorted({path.rpartition(".")[2] for path in linear})
    told = []
    for name in config.model.target_modules or []:
        if not matching_paths(linear, [name]):
            close = difflib.get_close_matches(name, [*have, *linear], n=3)
            told.append(f"{name!r} is none" + (f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""))
    return f"{'; '.join(told)}; this {type(base).__name__} has {', '.join(have)}" if told else None


def load_tokenization(notes: Notes, config: RunConfig) -> Tokenization | None:
    """Load the tokenizer; None where it does not load."""
    place = "model.tokenizer" if config.model.tokenizer else "model.base"
    tokenizer = notes.attempt("tokenizer", place, lambda: load_tokenizer(config.model.tokenizer or config.model.base))
    return (
        None if tokenizer is None else notes.attempt("tokenizer", place, lambda: make_tokenization(config, tokenizer))
    )


def load_model(
    notes: Notes, config: RunConfig, device: torch.device, tokenization: Tokenization | None
) -> LoraModel | None:
    """Load the base with its weights, and look at what only they show; None where a run could not begin with it."""
    model = config.model
    dtype: torch.dtype = getattr(torch, model.dtype)
    base = notes.attempt(
        "base", "model.base", lambda: load_base(model.base, dtype=dtype, device=device, quantize=model.quantize)
    )
    if base is None:
        notes.skip("the base cannot be loaded", "causal")
        return None
    notes.ok("base", f"{model.base}: {base.num_parameters():,} parameters, {model.dtype}, on {device}", "model.base")
    causal = _refusal(lambda: check_causal(config, base))
    notes.judge("causal", causal, "no token changes what comes before it", "model.base", "take a causal language model")
    fits = True
    if tokenization is not None:
        tokenizer, place = tokenization.tokenizer, "model.tokenizer" if model.tokenizer else "model.base"
        refusal = _refusal(lambda: check_tokenizer(config, base, tokenizer))
        fits = refusal is None
        value, _, way_out = (refusal or "").partition("; ")
        notes.judge("tokenizer", value or None, f"{len(tokenizer)} tokens", place, way_out)
    if causal is not None or not fits:
        return None
    try:
        if make_method(config).trains == "weights":
            return FullModel(base)
        return LoraModel(base, target_modules=model.target_modules, scaling=model.scaling)
    except ModelError as error:
        notes.fail("target modules", str(error), "model.target_modules")
        return None


def _refusal(check: Callable[[], None]) -> str | None:
    """Return why a check refuses; None where it does not."""
    try:
        check()
    except HetLoraError as error:
        return "; ".join(getattr(error, "problems", (str(error),)))
    return None
