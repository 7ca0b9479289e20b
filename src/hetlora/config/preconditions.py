"""Checks before a run begins, for what would fail in the middle of a round, fail silently, or be slow."""

from __future__ import annotations

from typing import Any

import torch

from hetlora.config import RunConfig
from hetlora.errors import ConfigError, ModelError

__all__ = ["check_causal", "check_cohort", "check_fit", "check_length", "check_tokenizer", "slow_dtype_warning"]

INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
"""Instructions of x86 processors for products of a type; without them every product converts its operands."""


def check_cohort(config: RunConfig, clients: int) -> None:
    """Refuse a cohort that is larger than the federation."""
    asked = config.federation.clients_per_round
    if asked > clients:
        problem = f"federation.clients_per_round = {asked}: the data have {clients} clients; use at most that"
        raise ConfigError("the configuration", [problem])


def check_length(config: RunConfig, base_config: Any) -> None:
    """Refuse rows that are longer than the base accepts."""
    longest = getattr(base_config, "max_position_embeddings", None)
    rope = getattr(base_config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        # Beyond it the frequencies depend on the longest row of a pass, and so would the loss of every other row.
        longest = rope.get("original_max_position_embeddings") or longest
    if longest is not None and config.data.max_length > longest:
        problem = (
            f"data.max_length = {config.data.max_length}: the base {config.model.base} takes {longest} tokens at most"
        )
        raise ConfigError("the configuration", [problem])


def check_fit(config: RunConfig, base: Any, tokenizer: Any) -> None:
    """Run `check_causal`, `check_length` and `check_tokenizer`."""
    check_causal(config, base)
    check_length(config, base.config)
    check_tokenizer(config, base, tokenizer)


def check_causal(config: RunConfig, base: Any) -> None:
    """Refuse a base in which a token changes the output before it."""
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=next(base.parameters()).device)
    with torch.inference_mode():
        first, second = base(input_ids=ids, use_cache=False).logits[:, :3].float()
    if not torch.allclose(first, second, rtol=1e-4, atol=1e-4):
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
        "model.quantize = 'int8' with model.dtype = 'float32' is faster and smaller"
    )
