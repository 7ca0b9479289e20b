"""Export as a whole model, for changes that no adapter file holds: trained weights, or a change folded into the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from hetlora.core.adapter import Adapter, delta
from hetlora.model.lora_model import LoraModel, load_base, load_tokenizer
from hetlora.model.quantize import quantized_layers, stores_transposed, whole_weight

__all__ = ["write_merged"]


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
    """
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
