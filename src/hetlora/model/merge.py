"""Export as a whole model, for changes that no adapter file holds: trained weights, or a change folded into the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from hetlora.core.adapter import Adapter, delta
from hetlora.errors import ModelError
from hetlora.model.lora_model import LoraModel, load_base, load_tokenizer
from hetlora.model.quantize import quantized_layers, stores_transposed, whole_weight

__all__ = ["check_mergeable", "write_merged"]


def check_mergeable(model: LoraModel) -> None:
    """Refuse to write a whole model that nobody loads, or where a weight serves several modules that become different ones.

    Args:
        model: With its weights or in outline.

    Raises:
        ModelError: transformers has no class for the model by itself, or an adapted module shares its weight with another.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(model.base.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{type(model.base).__name__} is part of a larger model, and transformers does not load it by itself, so that it "
            "cannot be written as a whole; train and export an adapter"
        )
    adapted = {id(layer.base.weight): path for path, layer in model.layers.items()}
    inner = {id(layer.base) for layer in model.layers.values()}
    users: dict[int, list[str]] = {}
    for path, module in model.base.named_modules(remove_duplicate=False):
        own = module._parameters.get("weight")  # noqa: SLF001  a LoRA layer passes on the weight of the one within it
        if own is not None and id(own) in adapted:
            users.setdefault(id(own), []).append(path.removesuffix(".base") if id(module) in inner else path)
    for paths in users.values():
        if len(paths) > 1:
            raise ModelError(
                f"{paths[0]} and {paths[1]} share one weight, and the adapter of one must not change the other: they cannot "
                "be merged; export the adapter, or leave one of them out of model.target_modules"
            )


def write_merged(
    model: LoraModel,
    adapter: Adapter,
    folded: Mapping[str, Tensor],
    folder: Path,
    *,
    base: str,
    tokenizer: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a Hugging Face model with the weights `W0 + scaling * (folded + B A)`, summed in float32, and its tokenizer.

    `W0` of a quantised layer is its dequantised weight: the written model is the one that was trained and evaluated.

    Args:
        model: Gives the adapted modules and the scaling; the modules of a `FullModel` are the parameters.
        adapter: Factors `A [r, in]`, `B [out, r]`.
        folded: Module to `ΔW [out, in]`; empty for nothing.
        folder: Output folder; `AutoModelForCausalLM.from_pretrained` loads it.
        base: Folder or name of the base model; a fresh copy is loaded and changed.
        tokenizer: Folder or name of the base with the tokenizer.
        dtype: Type of the written weights.

    Raises:
        ModelError: As `check_mergeable`.
    """
    check_mergeable(model)
    fresh = load_base(base)
    weights = dict(fresh.named_parameters())
    adapted = {id(layer.base): path for path, layer in model.layers.items()}
    with torch.no_grad():
        for path, layer in quantized_layers(model.base).items():
            whole = whole_weight(layer)  # [out, in]
            weight = weights[f"{adapted.get(id(layer), path)}.weight"]
            weight.copy_(whole.T if stores_transposed(layer) else whole)
        for name, pair in adapter.items():
            change = model.scaling * (delta(pair) + (folded[name] if folded else 0.0))  # [out, in]
            weight = weights.get(name)
            if weight is None:  # the path of a module, not of a parameter
                module = fresh.get_submodule(name)
                weight = module.weight
                change = change if isinstance(module, nn.Linear) else change.T
            weight += change.view(weight.shape).to(weight)
    fresh.to(dtype).save_pretrained(folder)
    load_tokenizer(tokenizer).save_pretrained(folder)
