"""Greedy answers: at every step the token with the largest logit, whatever the base's own files ask for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, takewhile
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hetlora.data.templates import Row
from hetlora.data.tokenization import Tokenization
from hetlora.errors import ModelError
from hetlora.model.lora_model import LoraModel

__all__ = ["base_ends", "cache_agrees", "end_tokens", "generate_texts"]

AT_ONCE = 64
"""Prompts that are answered together."""

TRIED = 8
"""Tokens after which answers alone and in a batch are compared."""

ROUNDING = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""By type: what the largest logit times this may differ by, for the sums run in another order."""

_tried: WeakKeyDictionary[LoraModel, dict[str, int]] = WeakKeyDictionary()
"""Model to the longest prompt that it was tried with, by what was tried; 0 where it gave another answer."""

_Prompt = tuple[int, Sequence[int]]
"""A row's place, and its tokens."""


def generate_texts(model: LoraModel, tokenization: Tokenization, rows: Sequence[Row], max_new_tokens: int) -> list[str]:
    """Return what the model says after each row's prompt, greedily, with the factors that it uses now; targets are not read.

    An answer does not depend on the prompts beside it, and is what whole passes over prompt and answer say. Some architectures
    ignore the mask of padded tokens, or mix up the rows of a batch, or answer otherwise with transformers' cache and positions:
    each model is tried once, and is then asked one length, or one prompt, at a time, or by whole passes.

    Args:
        model: The base with LoRA layers.
        tokenization: Turns prompts into tokens, cut at their start to leave room for the answer.
        rows: Whose prompts.
        max_new_tokens: Longest answer.
    """
    asked: dict[tuple[int, ...], list[_Prompt]] = {}
    for index, row in enumerate(rows):
        ends = tuple(end_tokens(tokenization, model.base, row))
        asked.setdefault(ends, []).append((index, tokenization.prompt_ids(row, max_new_tokens)))
    pad = int(tokenization.tokenizer.pad_token_id)
    texts: dict[int, str] = {}
    with _greedy(model.base):
        for ends, prompts in asked.items():
            for index, answer in _answers(model, prompts, _Way(max_new_tokens, pad, ends)):
                said = list(takewhile(lambda token, ends=ends: token not in ends, answer))  # type: ignore[misc]
                texts[index] = tokenization.tokenizer.decode(said, skip_special_tokens=True).strip()
    return [texts[index] for index in range(len(rows))]


def _answers(model: LoraModel, prompts: Sequence[_Prompt], way: _Way) -> Iterator[tuple[int, list[int]]]:
    """Yield the tokens of each answer, and where its row stands."""
    prompts = sorted(prompts, key=lambda item: len(item[1]))
    trying = way._replace(most=min(way.most, TRIED), ends=())
    if not _caches(model, prompts[0][1], prompts[-1][1], trying):
        yield from ((index, _by_passes(model, ids, way).tokens[0]) for index, ids in prompts)
        return
    for group in _groups(model, prompts, trying):
        answers = _generate(model, [ids for _, ids in group], way).tokens
        yield from zip((index for index, _ in group), answers, strict=True)


def end_tokens(tokenization: Tokenization, base: Any, row: Row) -> list[int]:
    """Return every token that ends an answer: of the tokenizer, of a chat's turn, and of the base's own files.

    Args:
        tokenization: Knows those that the run trains.
        base: The model, which may name more.
        row: The row that is answered.
    """
    return sorted({*tokenization.ends([row]), *base_ends(base.config, base.generation_config)})


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


class _Way(NamedTuple):
    """How prompts are answered: with so many tokens, what stands for none, and what ends an answer."""

    most: int
    pad: int
    ends: tuple[int, ...] = ()


def cache_agrees(model: LoraModel, one: Sequence[int], other: Sequence[int]) -> bool:
    """Return whether the tokens of two prompts are answered by transformers' `generate` as they are by whole passes."""
    with _greedy(model.base):
        return _caches(model, one, other, _Way(TRIED, pad=0))


class _Answered(NamedTuple):
    """The tokens of each answer; and, where nothing ends it, the logits `[prompts, vocabulary]` of each step."""

    tokens: list[list[int]]
    logits: list[Tensor]

    def only(self, place: int) -> _Answered:
        """Return one of the answers."""
        return _Answered([self.tokens[place]], [logits[place : place + 1] for logits in self.logits])


def _caches(model: LoraModel, one: Sequence[int], other: Sequence[int], way: _Way) -> bool:
    """Return whether two prompts are answered with transformers' cache as they are by whole passes."""

    def trial() -> bool:
        return all(_same(model, _by_passes(model, ids, way), _generate(model, [ids], way)) for ids in (one, other))

    return _holds(model, "cache", max(len(one), len(other)), trial)


def _groups(model: LoraModel, prompts: Sequence[_Prompt], way: _Way) -> Iterator[Sequence[_Prompt]]:
    """Divide prompts, sorted by length, into those that are answered together."""
    runs = [list(same) for _, same in groupby(prompts, key=lambda item: len(item[1]))]
    if len(runs) > 1 and _as_alone(model, prompts[0][1], prompts[-1][1], way):
        runs, sizes = [list(prompts)], [AT_ONCE]
    else:
        sizes = [AT_ONCE if _one_length_as_alone(model, run, way) else 1 for run in runs]
    for run, size in zip(runs, sizes, strict=True):
        yield from (run[start : start + size] for start in range(0, len(run), size))


def _one_length_as_alone(model: LoraModel, run: Sequence[_Prompt], way: _Way) -> bool:
    """Return whether prompts of one length are answered together as each is alone: the first, and one that differs from it."""
    other = next((ids for _, ids in run if ids != run[0][1]), None)
    return other is None or _as_alone(model, run[0][1], other, way)


def _as_alone(model: LoraModel, one: Sequence[int], other: Sequence[int], way: _Way) -> bool:
    """Return whether two prompts are answered together as each is alone."""

    def trial() -> bool:
        together = _generate(model, [one, other], way)
        alone = [_generate(model, [ids], way) for ids in (one, other)]
        return all(_same(model, answer, together.only(place)) for place, answer in enumerate(alone))

    return _holds(model, "batch" if len(one) == len(other) else "padding", max(len(one), len(other)), trial)


def _holds(model: LoraModel, what: str, longest: int, trial: Callable[[], bool]) -> bool:
    """Return what a trial came to; each is made once a model, and again for longer prompts."""
    tried = _tried.setdefault(model, {})
    if what not in tried or 0 < tried[what] < longest:
        try:
            tried[what] = longest if trial() else 0
        except Exception:  # noqa: BLE001  architectures that cannot (xlstm) say so in ways of their own
            tried[what] = 0
    return tried[what] > 0


def _same(model: LoraModel, one: _Answered, other: _Answered) -> bool:
    """Return whether two answers to a prompt have the same tokens and logits; in 16 bits two may be too close to call."""
    rounding = ROUNDING.get(next(model.base.parameters()).dtype, 0.1)
    for step, (here, there) in enumerate(zip(one.logits, other.logits, strict=True)):
        if float((here - there).abs().max()) > rounding * float(here.abs().max()):
            return False
        if one.tokens[0][step] != other.tokens[0][step]:
            return rounding > ROUNDING[torch.float32]
    return True


def _by_passes(model: LoraModel, prompt: Sequence[int], way: _Way) -> _Answered:
    """Answer a prompt by a whole pass for every token."""
    ids, logits = list(prompt), []
    try:
        with torch.inference_mode():
            while len(ids) - len(prompt) < way.most and (ids == list(prompt) or ids[-1] not in way.ends):
                tokens = torch.tensor([ids], device=model.device)  # [1, length]
                last = model.base(input_ids=tokens, use_cache=False).logits[:, -1].float()  # [1, V]
                logits.append(last)
                ids.append(int(last.argmax()))
    except Exception as error:
        raise _cannot(model, error) from error
    return _Answered([ids[len(prompt) :]], [] if way.ends else logits)


def _cannot(model: LoraModel, error: Exception) -> ModelError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ModelError(
        f"transformers cannot generate with a {type(model.base).__name__} ({reason}); set evaluation.generate = 0"
    )


def _generate(model: LoraModel, prompts: Sequence[Sequence[int]], way: _Way) -> _Answered:
    """Answer prompts in one batch."""
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    input_ids = torch.tensor([[way.pad] * (longest - len(ids)) + list(ids) for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    config = GenerationConfig(
        max_new_tokens=way.most,
        do_sample=False,
        num_beams=1,
        pad_token_id=way.pad,
        eos_token_id=list(way.ends) or None,
        output_logits=not way.ends,
        return_dict_in_generate=True,
    )
    base: Any = model.base
    try:
        with torch.inference_mode():
            out = base.generate(input_ids, attention_mask=mask, generation_config=config)
    except Exception as error:
        raise _cannot(model, error) from error
    return _Answered(out.sequences[:, longest:].tolist(), [step.float() for step in out.logits or ()])
