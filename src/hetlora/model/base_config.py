"""What the configuration of a base says, under whichever name its architecture has for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["longest_row", "longest_steady_row", "quiet_router"]

LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
    "seq_length",
    "context_length",
    "n_ctx",
)
"""Names of the number of tokens that a base takes, the usual one first."""


def longest_row(config: Any) -> int | None:
    """Return the most tokens of a row that a base takes without that its loss depends on other rows; None if not known."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in LENGTHS)
    most = next((length for length in found if isinstance(length, int) and length > 0), None)
    steady = longest_steady_row(config)
    return most if steady is None else steady if most is None else min(most, steady)


def longest_steady_row(config: Any) -> int | None:
    """Return the length from which on rotary frequencies follow the longest row of a pass; None where they never do."""
    text = config.get_text_config()
    rope: Mapping[str, Any] = getattr(text, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, Mapping)]
    moving = [part for part in kinds if part.get("rope_type") in ("dynamic", "longrope")]
    first = [
        part.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or getattr(text, "max_position_embeddings", None)
        for part in moving
    ]
    return min((length for length in first if length), default=None)


def quiet_router(base: PreTrainedModel) -> list[str]:
    """Make a mixture of experts give no logits of its router, which nothing here is trained with; say so where it would."""
    said = False
    for config in (base.config, base.config.get_text_config()):
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False
            said = True
    return (
        ["the base asks for an auxiliary loss of its router (output_router_logits), which is not trained"]
        if said
        else []
    )
