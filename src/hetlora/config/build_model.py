"""Builds the model and the tokenizer of a run from its configuration, with or without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetlora.config import RunConfig
from hetlora.config.build import make_method, model_dtype
from hetlora.config.preconditions import check_fit, check_result, check_text
from hetlora.errors import ModelError, expand_path
from hetlora.model.full_model import FullModel
from hetlora.model.lora_model import LoraModel, build_base, load_base, load_tokenizer, pick_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["build_model", "build_outline", "build_tokenizer", "load_fitting_model", "load_run_base"]


def load_run_base(config: RunConfig) -> PreTrainedModel:
    """Load the base of a run, in its type, on its device, quantized as `model.quantize` says.

    Raises:
        ModelError: It cannot be loaded, or this machine lacks the device.
    """
    model = config.model
    return load_base(model.base, dtype=model_dtype(config), device=pick_device(model.device), quantize=model.quantize)


def build_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a run, by default that of its base; with the chat template of `data.chat_template`.

    Raises:
        ModelError: There is none, it has no end-of-text token, or the template cannot be read.
    """
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.base)
    if (place := config.data.chat_template) is not None:
        try:
            tokenizer.chat_template = expand_path(place).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(
                f"data.chat_template = {place!r} cannot be read ({error}); give a file with a Jinja template"
            ) from error
    return tokenizer


def build_model(config: RunConfig, base: PreTrainedModel | None = None) -> LoraModel:
    """Return the model that a run trains: its base with LoRA layers, or the whole base if the method trains weights.

    Args:
        config: The run.
        base: The run's base, which becomes part of the model; None loads it.

    Raises:
        ModelError: The base cannot be loaded, lacks a target module, or cannot be trained as a whole.

    Example:
        >>> from hetlora.config import parse_config
        >>> document = {
        ...     "model": {"base": "nano", "target_modules": ["q_proj"], "device": "cpu"},
        ...     "data": {"target": "{target}"},
        ...     "federation": {"rounds": 1, "clients_per_round": 1},
        ...     "ranks": {"kind": "same", "rank": 4},
        ...     "training": {"steps": 1, "learning_rate": 1e-3},
        ... }
        >>> model = build_model(parse_config(document))
        >>> model.target_modules, model.scaling
        (('q_proj',), 2.0)
    """
    whole = make_method(config).trains == "weights"
    if whole and config.training.recompute:
        raise ModelError(
            f"method {config.method.name} changes all weights, for which layers are not recomputed; set "
            "training.recompute = false"
        )
    base = load_run_base(config) if base is None else base
    if whole:
        return FullModel(base)
    return LoraModel(
        base,
        target_modules=config.model.target_modules,
        layers=config.model.layers,
        scaling=config.model.scaling,
        recompute=config.training.recompute,
    )


def build_outline(config: RunConfig) -> LoraModel:
    """Return the model of a run with its modules and without weights, at no cost for any size.

    Raises:
        ModelError: The base has no configuration, or lacks a target module.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return build_model(config, build_base(config.model.base))


def load_fitting_model(config: RunConfig) -> tuple[LoraModel, PreTrainedTokenizerBase]:
    """Return the model of a run and its tokenizer, checked by `hetlora.config.preconditions.check_fit`.

    Raises:
        HetLoraError: One of them cannot be loaded, or the check fails.
    """
    base, tokenizer = load_run_base(config), build_tokenizer(config)
    check_fit(config, base, tokenizer)
    model = build_model(config, base)
    check_result(config, model)
    check_text(config, model, tokenizer)
    return model, tokenizer
