"""PEFT's file format, and the only place that knows it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from hetlora.adapter import Adapter

__all__ = ["export_adapter"]


def export_adapter(
    adapter: Adapter,
    folder: Path | str,
    *,
    base: str,
    target_modules: Sequence[str],
    scaling: float,
    fan_in_fan_out: bool = False,
) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained(base_model, folder)` loads to the same logits.

    PEFT scales a module by `lora_alpha / r`; here `lora_alpha = scaling * r`, a module, so that its scaling is ours.

    Args:
        adapter: Factors `A [r, in]`, `B [out, r]`; modules may differ in rank.
        folder: Where `adapter_config.json` and `adapter_model.safetensors` go.
        base: Name of the base model, for the record; PEFT is handed the model itself.
        target_modules: The names that choose the modules in the base.
        scaling: The federation's factor of `B A`.
        fan_in_fan_out: Whether the base's linear layers store their weight `[in, out]` (GPT-2).
    """
    from peft import LoraConfig

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
    _sort_names(folder / "adapter_config.json")
    tensors = {
        f"base_model.model.{module}.lora_{letter}.weight": factor.contiguous()
        for module, pair in adapter.items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _sort_names(path: Path) -> None:
    """Put the target modules in order: PEFT keeps them in a set, and the same run should write the same bytes."""
    config = json.loads(path.read_text("utf8"))
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf8")
