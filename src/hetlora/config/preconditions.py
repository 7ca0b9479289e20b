"""Checks before a run begins, for what would fail in the middle of a round, fail silently, or be slow."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch

from hetlora.config import RunConfig
from hetlora.config.build import make_method
from hetlora.core.adapter import ModuleShape
from hetlora.errors import ConfigError, ModelError
from hetlora.model.base_config import longest_row, longest_steady_row
from hetlora.model.lora_model import LoraModel
from hetlora.model.merge import check_mergeable
from hetlora.model.peft_check import check_peft_modules
from hetlora.model.text_pass import check_rows

__all__ = [
    "check_causal",
    "check_cohort",
    "check_fit",
    "check_length",
    "check_result",
    "check_text",
    "check_tokenizer",
    "slow_dtype_warning",
    "wide_rank_warning",
]

LONGEST_CHECKED = 2048
"""Tokens of the longest row that is compared before a run: longer ones cost more than they are likely to show."""

INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
"""Instructions of x86 processors for products of a type; without them every product converts its operands."""


def check_cohort(config: RunConfig, clients: int) -> None:
    """Refuse a cohort that is larger than the federation."""
    asked = config.federation.clients_per_round
    if asked > clients:
        problem = f"federation.clients_per_round = {asked}: the data have {clients} clients; use at most that"
        raise ConfigError("the configuration", [problem])


def check_length(config: RunConfig, base_config: Any) -> None:
    """Refuse rows that are longer than the base can take, or longer than it can take without changing what others see."""
    longest = longest_row(base_config)
    if longest is not None and config.data.max_length > longest:
        problem = (
            f"data.max_length = {config.data.max_length}: the base {config.model.base} takes {longest} tokens at most"
        )
        if longest == longest_steady_row(base_config):
            problem += " without that a row's rotary frequencies follow the rows beside it"
        raise ConfigError("the configuration", [problem])


def check_result(config: RunConfig, model: LoraModel) -> None:
    """Refuse a run whose result could not be taken away: as PEFT's files, or as a merged model where its method folds.

    Raises:
        ModelError: PEFT reads such an adapter as another one, or merging would change modules that share a weight.
    """
    method = make_method(config)
    if method.folds or method.trains == "weights":
        check_mergeable(model)
    else:
        check_peft_modules(model)


def check_text(config: RunConfig, model: LoraModel, tokenizer: Any) -> None:
    """Refuse a base that gives a text of up to `data.max_length` tokens another loss beside a short one than alone.

    The text is tokens of printable characters in any order: what a model cannot foretell, so that no loss is close to zero.

    Raises:
        ModelError: It does, or cannot compute such a text.
    """
    known = sorted(set(tokenizer(" ".join(map(chr, range(32, 127))), add_special_tokens=False)["input_ids"]))
    if len(known) > 1:  # a tokenizer of other scripts has no token of it
        most = min(config.data.max_length, LONGEST_CHECKED)
        longest = random.Random(0).choices(known, k=most)
        check_rows(model, [longest, longest[: max(2, most - most // 8)], longest[: max(2, most // 4)]])


def check_fit(config: RunConfig, base: Any, tokenizer: Any) -> None:
    """Run `check_causal`, `check_length` and `check_tokenizer`."""
    check_causal(config, base)
    check_length(config, base.config)
    check_tokenizer(config, base, tokenizer)


def check_causal(config: RunConfig, base: Any) -> None:
    """Refuse a base in which a token changes the output before it."""
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=next(base.parameters()).device)
    try:
        with torch.inference_mode():
            one, other = base(input_ids=ids, use_cache=False).logits[:, :3].float()
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        stored = "" if config.model.quantize == "none" else f" with model.quantize = {config.model.quantize!r}"
        raise ModelError(
            f"the base {config.model.base!r} does not compute a text in model.dtype = {config.model.dtype!r}{stored} ({reason})"
        ) from error
    if not torch.allclose(one, other, rtol=1e-4, atol=1e-4):
        raise ModelError(f"the base {config.model.base!r} is not causal: a token changes what comes before it")


def check_tokenizer(config: RunConfig, base: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer with more tokens than the base."""
    known, tokens = base.get_input_embeddings().num_embeddings, len(tokenizer)
    if tokens > known:
        name = config.model.tokenizer or config.model.base
        raise ModelError(
            f"the tokenizer {name!r} has {tokens} tokens, the base {config.model.base!r} knows {known}; "
            "set model.tokenizer to the one the base was trained with"
        )


def wide_rank_warning(largest: int, shapes: Mapping[str, ModuleShape]) -> str | None:
    """Return a warning if a rank is above `min(out, in)`, the largest that a change of a weight `[out, in]` can have.

    Example:
        >>> wide_rank_warning(20, {"q_proj": ModuleShape(64, 64), "v_proj": ModuleShape(16, 64)})
        'rank 20 is above the size of 1 module (v_proj: 16), where the slots beyond only cost; lower it to 16'
    """
    narrow = {path: min(shape) for path, shape in shapes.items() if min(shape) < largest}
    if not narrow:
        return None
    path, width = min(narrow.items(), key=lambda item: item[1])
    modules = "1 module" if len(narrow) == 1 else f"{len(narrow)} modules"
    above = f"rank {largest} is above the size of {modules} ({path}: {width})"
    return f"{above}, where the slots beyond only cost; lower it to {width}"


def slow_dtype_warning(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return a warning if this processor only emulates a type, which is several times slower than float32.

    It is None for processors other than x86, and with versions of PyTorch that do not report the instructions.
    """
    abilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    known = device.type == "cpu" and abilities.get("architecture") == "x86_64" and dtype in INSTRUCTIONS
    if not known or any(abilities[name] for name in INSTRUCTIONS[dtype]):
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"{name} is emulated on this processor, several times slower than float32; to save memory, "
        "model.quantize = 'bfloat16' or 'int8' with model.dtype = 'float32' is faster"
    )
