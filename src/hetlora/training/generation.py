"""Greedy answers: at every step the token with the largest logit, whatever the base's own files ask for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hetlora.data.templates import Row
from hetlora.data.tokenization import Tokenization
from hetlora.model.lora_model import LoraModel

__all__ = ["base_ends", "end_tokens", "generate_texts"]

AT_ONCE = 64
"""Prompts that are answered together."""

TRIED = 8
"""Tokens after which answers alone and in a batch are compared."""

ROUNDING = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""By type: what the largest logit times this may differ by, for the sums run in another order."""

_alike: WeakKeyDictionary[LoraModel, dict[bool, int]] = WeakKeyDictionary()
"""Model to the longest prompt that was answered in a batch as it is alone, with padding and without; 0 where one was not."""

_Prompt = tuple[int, Sequence[int]]
"""A row's place, and its tokens."""


def generate_texts(model: LoraModel, tokenization: Tokenization, rows: Sequence[Row], max_new_tokens: int) -> list[str]:
    """Return what the model says after each row's prompt, greedily, with the factors that it uses now; targets are not read.

    An answer does not depend on the prompts beside it. Some architectures ignore the mask of padded tokens, or mix up the rows
    of a batch: each model is tried once, and is then asked one length, or one prompt, at a time.

    Args:
        model: The base with LoRA layers.
        tokenization: Turns prompts into tokens, cut at their start to leave room for the answer.
        rows: Whose prompts.
        max_new_tokens: Longest answer.
    """
    prompts = [(index, tokenization.prompt_ids(row, max_new_tokens)) for index, row in enumerate(rows)]
    prompts.sort(key=lambda item: len(item[1]))
    ends = end_tokens(tokenization, model.base, chat=any(row.turns is not None for row in rows))
    pad = int(tokenization.tokenizer.pad_token_id)
    texts: dict[int, str] = {}
    with _greedy(model.base):
        for group in _groups(model, prompts, max_new_tokens, pad):
            answers, _ = _generate(model, [ids for _, ids in group], pad, max_new_tokens, ends)
            for (index, _), answer in zip(group, answers, strict=True):
                said = list(takewhile(lambda token: token not in ends, answer))
                texts[index] = tokenization.tokenizer.decode(said, skip_special_tokens=True).strip()
    return [texts[index] for index in range(len(rows))]


def end_tokens(tokenization: Tokenization, base: Any, *, chat: bool) -> list[int]:
    """Return every token that ends an answer: of the tokenizer, of a chat's turn, and of the base's own files.

    Args:
        tokenization: Knows those that the run trains.
        base: The model, which may name more.
        chat: Whether the answer is a chat's turn.
    """
    return sorted({*tokenization.ends(chat=chat), *base_ends(base.config, base.generation_config)})


def base_ends(*configs: Any) -> set[int]:
    """Return the end tokens that configurations of a base name, each as a number or a list.

    Example:
        >>> from types import SimpleNamespace
        >>> base_ends(SimpleNamespace(eos_token_id=[2, 7]), SimpleNamespace(eos_token_id=3), SimpleNamespace())
        {2, 3, 7}
    """
    texts = [config.get_text_config() for config in configs if hasattr(config, "get_text_config")]
    named = [getattr(config, "eos_token_id", None) for config in (*configs, *texts)]
    listed = [end for ends in named for end in (ends if isinstance(ends, (list, tuple)) else [ends])]
    return {end for end in listed if isinstance(end, int) and not isinstance(end, bool) and end >= 0}


@contextlib.contextmanager
def _greedy(base: Any) -> Iterator[None]:
    """Take the base's generation settings away: transformers fills every key that is not given from them."""
    from transformers import GenerationConfig

    theirs, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = theirs


def _groups(model: LoraModel, prompts: Sequence[_Prompt], most: int, pad: int) -> Iterator[Sequence[_Prompt]]:
    """Divide prompts, sorted by length, into those that are answered together."""
    runs = [list(same) for _, same in groupby(prompts, key=lambda item: len(item[1]))]
    if len(runs) > 1 and _as_alone(model, prompts[0][1], prompts[-1][1], most, pad):
        runs, sizes = [list(prompts)], [AT_ONCE]
    else:
        sizes = [AT_ONCE if _one_length_as_alone(model, run, most, pad) else 1 for run in runs]
    for run, size in zip(runs, sizes, strict=True):
        yield from (run[start : start + size] for start in range(0, len(run), size))


def _one_length_as_alone(model: LoraModel, run: Sequence[_Prompt], most: int, pad: int) -> bool:
    """Return whether prompts of one length are answered together as each is alone: the first, and one that differs from it."""
    other = next((ids for _, ids in run if ids != run[0][1]), None)
    return other is None or _as_alone(model, run[0][1], other, most, pad)


def _as_alone(model: LoraModel, one: Sequence[int], other: Sequence[int], most: int, pad: int) -> bool:
    """Return whether two prompts are answered together as each is alone; tried once a model, and again for longer ones."""
    tried, padded = _alike.setdefault(model, {}), len(one) != len(other)
    longest = max(len(one), len(other))
    if padded not in tried or 0 < tried[padded] < longest:
        both, most = [one, other], min(most, TRIED)
        together = _generate(model, both, pad, most, [])
        alone = [_generate(model, [prompt], pad, most, []) for prompt in both]
        same = all(_same(model, together, place, answer) for place, answer in enumerate(alone))
        tried[padded] = longest if same else 0
    return tried[padded] > 0


def _same(
    model: LoraModel,
    together: tuple[list[list[int]], list[Tensor]],
    place: int,
    alone: tuple[list[list[int]], list[Tensor]],
) -> bool:
    if together[0][place] != alone[0][0]:
        return False
    pairs = zip((logits[place] for logits in together[1]), (logits[0] for logits in alone[1]), strict=True)
    rounding = ROUNDING.get(next(model.base.parameters()).dtype, 0.1)
    return all(float((one - other).abs().max()) <= rounding * float(other.abs().max()) for one, other in pairs)


def _generate(
    model: LoraModel, prompts: Sequence[Sequence[int]], pad: int, max_new_tokens: int, ends: Sequence[int]
) -> tuple[list[list[int]], list[Tensor]]:
    """Return the tokens of each answer, and the logits `[prompts, vocabulary]` of each step."""
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    input_ids = torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        eos_token_id=list(ends) or None,
        output_logits=not ends,
        return_dict_in_generate=True,
    )
    base: Any = model.base
    with torch.inference_mode():
        out = base.generate(input_ids, attention_mask=mask, generation_config=config)
    return out.sequences[:, longest:].tolist(), [step.float() for step in out.logits or ()]
