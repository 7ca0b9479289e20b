"""Where the tokens of a prompt end and those of its answer begin."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SplitIds", "encode", "split_ids"]


class SplitIds(NamedTuple):
    """The tokens of a text, divided.

    Attributes:
        prompt: Tokens before the border.
        target: Tokens from the border on.
        clean: Whether those before it are the tokens of the prompt alone, which is what a model answers after.
        doubled: Whether the prompt ends in a space and the target begins with one.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    clean: bool
    doubled: bool = False


def split_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> SplitIds:
    """Tokenize a text as a whole, and divide it where its prompt ends.

    The tokens are those of the text, never of two texts: a tokenizer may put a space before every text, or make one token of
    two neighbours. Where the prompt's own tokens are not the beginning, the target begins with the first token that reaches
    beyond the prompt, so that all of the target is scored.

    Args:
        tokenizer: The tokenizer; special tokens are not added.
        prompt: The beginning of `text`.
        text: Prompt and target.
    """
    own, whole = encode(tokenizer, prompt), encode(tokenizer, text)
    clean = whole[: len(own)] == own
    border = len(own) if clean else _border(tokenizer, prompt, text, own, whole)
    doubled = prompt.endswith(" ") and text[len(prompt) :].startswith(" ")
    return SplitIds(whole[:border], whole[border:], clean, doubled)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Return the tokens of a text without special ones."""
    # verbose=False: a row longer than the model's context is cut later, so the warning about it would be wrong.
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _border(
    tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, own: tuple[int, ...], whole: tuple[int, ...]
) -> int:
    if tokenizer.is_fast:
        offsets = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        return next((index for index, (_, end) in enumerate(offsets) if end > len(prompt)), len(whole))
    # A tokenizer without offsets: what the two have in common is the prompt's for certain.
    return next(
        (index for index, (a, b) in enumerate(zip(own, whole, strict=False)) if a != b), min(len(own), len(whole))
    )
