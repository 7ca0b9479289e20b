"""Whether an adapter of a model is one that PEFT reads to the same modules: tried before anything is trained."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hetlora.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hetlora.model.lora_model import LoraModel

__all__ = ["check_peft_modules", "usual_names_of_peft"]

SHOWN = 3
"""Modules that a message names."""


def usual_names_of_peft(base: PreTrainedModel) -> list[tuple[str, ...]]:
    """Return the target modules that PEFT takes by default for the base's type; none where it takes a regular expression."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    kinds = (base.config.model_type, base.config.get_text_config().model_type)
    found = [TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind) for kind in kinds]
    return [tuple(names) for names in found if isinstance(names, list)]


def check_peft_modules(model: LoraModel) -> None:
    """Make PEFT's own model from what would be exported, without weights, and compare what it adapts.

    PEFT takes the names of some architectures for those of their experts' weights, and refuses modules of others. An adapter
    that is exported regardless does nothing there, or is not read.

    Raises:
        ModelError: PEFT adapts other modules, or refuses them.
    """
    names, kind = ", ".join(model.target_modules[:SHOWN]), type(model.base).__name__
    way_out = "set model.target_modules to other modules, or train with a method whose result is a whole model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says what it thinks of its own conversions
        try:
            theirs = _adapted_by_peft(model)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"PEFT takes no adapter of {names} in {kind}: {reason}; {way_out}") from error
    ours = set(model.shapes)
    if theirs == ours:
        return
    raise ModelError(
        f"an adapter of {names} in {kind} would be read by PEFT as another one: {_difference(ours, theirs)}; {way_out}"
    )


def _adapted_by_peft(model: LoraModel) -> set[str]:
    """Return the modules into which PEFT loads an adapter of a model."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(model.base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    settings = LoraConfig(
        r=1, target_modules=list(model.target_modules), fan_in_fan_out=model.fan_in_fan_out, task_type="CAUSAL_LM"
    )
    with torch.device("meta"):
        with no_init_weights():
            base = type(model.base)(config)
        base.tie_weights()
        peft: Any = get_peft_model(base, settings)
        state = {
            f"base_model.model.{path}.lora_{letter}.weight": torch.empty((1, width) if letter == "A" else (width, 1))
            for path, (out_features, in_features) in model.shapes.items()
            for letter, width in (("A", in_features), ("B", out_features))
        }
        loaded = set_peft_model_state_dict(peft, state)
    unread = {name.split(".lora_")[0] for name in loaded.unexpected_keys}
    fresh = {name.split(".lora_")[0] for name in loaded.missing_keys if ".lora_" in name}
    adapted = {name for name, module in peft.named_modules() if hasattr(module, "lora_A")}
    return {name.removeprefix("base_model.model.") for name in adapted - unread - fresh}


def _difference(ours: set[str], theirs: set[str]) -> str:
    missing, more = sorted(ours - theirs), sorted(theirs - ours)
    parts = [f"it would leave {_some(missing)} as they are"] if missing else []
    parts += [f"it would adapt {_some(more)}, too"] if more else []
    return " and ".join(parts)


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:SHOWN]) + (f" and {len(paths) - SHOWN} others" if len(paths) > SHOWN else "")
