"""The file format of PEFT. No other module knows it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hetlora.core.adapter import Adapter, LoraPair
from hetlora.errors import ModelError, expand_path, printable
from hetlora.model.targets import matching_paths

__all__ = ["PeftAdapter", "export_adapter", "read_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_adapter(
    adapter: Adapter,
    folder: Path | str,
    *,
    base: str,
    target_modules: Sequence[str],
    scaling: float,
    fan_in_fan_out: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained(base_model, folder)` loads to the same logits.

    PEFT scales a module by `lora_alpha / r`; `lora_alpha = scaling * r` per module makes this our scaling.

    Args:
        adapter: Factors `A [r, in]`, `B [out, r]`; modules may differ in rank.
        folder: Output folder for `adapter_config.json` and `adapter_model.safetensors`.
        base: Name of the base model, for information.
        target_modules: The names that match the modules in the base.
        scaling: The federation's factor of `B A`.
        fan_in_fan_out: Whether the base's linear layers store their weight `[in, out]` (GPT-2).
        dtype: Type of the written numbers.

    Raises:
        ModelError: The names do not choose a module of the adapter.
    """
    from peft import LoraConfig

    if other := [module for module in adapter if not matching_paths([module], target_modules)]:
        raise ModelError(
            f"{other[0]} is none of the target modules {', '.join(target_modules)[:200]}: PEFT would not read it"
        )
    ranks = {module: int(pair.A.shape[0]) for module, pair in adapter.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != common}
    config = LoraConfig(
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        r=common,
        lora_alpha=scaling * common,
        rank_pattern=others,
        alpha_pattern={module: scaling * rank for module, rank in others.items()},
        target_modules=sorted(target_modules),
        lora_dropout=0.0,
        fan_in_fan_out=fan_in_fan_out,
        inference_mode=True,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    _sort_names(folder / CONFIG)
    tensors = {
        f"base_model.model.{module}.lora_{letter}.weight": factor.to(dtype).contiguous()
        for module, pair in adapter.items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _sort_names(path: Path) -> None:
    """Sort the target modules: PEFT keeps them in a set, and equal runs should write equal bytes."""
    config = json.loads(path.read_text("utf8"))
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf8")


class PeftAdapter(NamedTuple):
    """An adapter read from PEFT's files.

    Attributes:
        adapter: Factors `A [r, in]`, `B [out, r]` of every module, float32; modules may differ in rank.
        scaling: Module to its factor of `B A`.
    """

    adapter: dict[str, LoraPair]
    scaling: dict[str, float]


OF_NO_MATTER = frozenset(
    {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    | {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "init_lora_weights"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"}
    | {"eva_config", "ensure_weight_tying", "runtime_config"}
)
"""Keys of an adapter's configuration that may have any value: `read_adapter` handles them, or the tensors imply them."""

LARGEST = 1e30
"""Largest alpha: a larger one makes factors overflow float32, and an integer in JSON may exceed any float."""

KEEPS_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
"""Ways to draw the first factors that do not change the base; with the others `B A` belongs to another base."""


def read_adapter(folder: Path | str) -> PeftAdapter:
    """Read an adapter that PEFT has written: only safetensors, and only plain LoRA.

    Raises:
        ModelError: There is no adapter, it is a pickle, or it holds more than factors of linear modules.
    """
    folder = expand_path(folder)
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{str(folder)!r} has no {CONFIG}, so it is no PEFT adapter; give the folder of one")
    if not (folder / WEIGHTS).is_file():
        raise ModelError(
            f"{str(folder)!r} has no {WEIGHTS}; a pickle in its place is not opened: load the adapter with PEFT where you "
            "trust it, and save it again"
        )
    try:
        config = json.loads((folder / CONFIG).read_text("utf8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ModelError(f"the adapter in {str(folder)!r} cannot be read: {error}") from error
    try:
        _check_kind(config)
        adapter = _pairs(tensors)
        return PeftAdapter(adapter, _scaling(config, adapter))
    except ModelError as error:
        raise ModelError(f"the adapter in {str(folder)!r} {error}") from error


def _check_kind(config: Any) -> None:
    """Refuse adapters that compute anything but `W x + s B A x`."""
    from peft import LoraConfig

    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ModelError("is not of PEFT's type LORA, which alone can be taken over")
    usual: dict[str, Any] = LoraConfig().to_dict()
    more = [
        f"{printable(str(key))} = {value!r}"
        for key, value in config.items()
        if key not in OF_NO_MATTER and value and value != usual.get(key)
    ]
    if (how := config.get("init_lora_weights")) not in KEEPS_THE_BASE:
        more.append(f"init_lora_weights = {how!r}")
    if more:
        raise ModelError(
            f"is more than plain LoRA ({', '.join(more[:3])[:300]}); merge it into its base, and begin there"
        )


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, LoraPair]:
    """Return the factors of every module; refuse tensors that are no factors."""
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if not found or tensor.ndim != 2 or not tensor.is_floating_point() or not tensor.isfinite().all():
            kind = f"{tensor.dtype} of shape {list(tensor.shape)}".removeprefix("torch.")
            raise ModelError(
                f"holds {printable(name)!r} ({kind}), which is no factor of finite numbers of a linear module"
            )
        factors.setdefault(found[1], {})[found[2]] = tensor.float()
    if not factors:
        raise ModelError("holds no factors")
    for module, pair in factors.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            shapes = ", ".join(f"{letter} {list(factor.shape)}" for letter, factor in sorted(pair.items()))
            raise ModelError(f"holds for {printable(module)} {shapes}, which are not two factors")
        if not pair["A"].shape[0]:
            raise ModelError(f"holds for {printable(module)} factors of rank 0, which adapt nothing")
    return {module: LoraPair(pair["A"], pair["B"]) for module, pair in factors.items()}


def _scaling(config: Mapping[str, Any], adapter: Adapter) -> dict[str, float]:
    """Return every module's `alpha / r`, or `alpha / sqrt(r)` of rank-stabilised LoRA."""
    alphas = config.get("alpha_pattern") or {}
    for value in (config.get("lora_alpha"), *(alphas.values() if isinstance(alphas, dict) else [alphas])):
        if not isinstance(value, (int, float)) or abs(value) > LARGEST or not math.isfinite(value):
            text = printable(repr(value))[:60]
            raise ModelError(f"has a lora_alpha or alpha_pattern of {text}, which is no number or too large a one")
    # PEFT reads a key as a regular expression. A hostile one could run for ever, so that only names are allowed here.
    for key in alphas:
        if not any(_names(key, module) for module in adapter):
            raise ModelError(
                f"has an alpha_pattern for {printable(str(key))!r}, which names none of its modules; write them out"
            )
    root = bool(config.get("use_rslora"))
    scaling = {}
    for module, (A, _) in adapter.items():
        alpha = next(
            (float(value) for key, value in alphas.items() if _names(key, module)), float(config["lora_alpha"])
        )
        scaling[module] = alpha / (math.sqrt(A.shape[0]) if root else A.shape[0])
    return scaling


def _names(key: str, module: str) -> bool:
    """Whether a key of a pattern is a module's path or the end of one."""
    return module == key.removeprefix("^") or module.endswith(f".{key}")
