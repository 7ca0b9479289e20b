"""How an export is asked as hetlora asks: lines of Python for the model card, checked against the tokens of the run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from hetlora.config import RunConfig
from hetlora.config.build_data import make_rendering, make_tokenization
from hetlora.config.build_model import build_tokenizer
from hetlora.data.fields import field_names
from hetlora.data.templates import Row
from hetlora.data.tokenization import Tokenization
from hetlora.errors import DataError, HetLoraError
from hetlora.model.lora_model import locate_base
from hetlora.training.generation import end_tokens

__all__ = ["Asking", "how_to_ask"]

EXAMPLE = "What can you do?"
"""What the card's code asks."""


@dataclass(frozen=True)
class Asking:
    """The code that makes a prompt's tokens, and how an answer ends.

    Attributes:
        lines: Python that sets `ids`, with the `tokenizer` at hand.
        ends: The tokens that end an answer.
        pad: The token that stands where there is none.
    """

    lines: str
    ends: tuple[int, ...]
    pad: int


def how_to_ask(config: RunConfig) -> Asking:
    """Return how a run's result is asked: after the very tokens that it has trained after.

    Args:
        config: The run.

    Raises:
        HetLoraError: There is no tokenizer.
    """
    tokenization = make_tokenization(config, build_tokenizer(config))
    unlimited = replace(tokenization, max_length=sys.maxsize)
    row, ids = _examples(config)[0], None
    for example in _examples(config):  # a chat template may want a system turn, which the rows then have
        with contextlib.suppress(DataError):
            row, ids = example, list(unlimited.prompt_ids(example, 0))
            break
    lines = _plain(config, tokenization, row, ids or []) if row.turns is None else _chat(config, tokenization, row, ids)
    ends = end_tokens(tokenization, _settings(config.model.base), row)
    return Asking(lines, tuple(ends), int(tokenization.tokenizer.pad_token_id))


class _Blanks(Mapping[str, Any]):
    """Fields whose values are their own names in braces."""

    def __getitem__(self, name: str) -> str:
        return f"{{{name}}}"

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _examples(config: RunConfig) -> list[Row]:
    """Return rows to ask with, the first that the run's tokenizer takes: its template with fields unfilled, or a question."""
    rendering = make_rendering(config.data)
    if config.data.messages is not None:
        asked = {"role": "user", "content": EXAMPLE}
        told = {"role": "system", "content": "You are a helpful assistant."}
        return [rendering.question({config.data.messages: turns}, "the card") for turns in ([asked], [told, asked])]
    row = rendering.question(_Blanks(), "the card")
    return [row if row.prompt or row.turns is not None else Row("Once", "")]


def _plain(config: RunConfig, tokenization: Tokenization, row: Row, ids: list[int]) -> str:
    own = list(tokenization.tokenizer(row.prompt, add_special_tokens=False)["input_ids"])
    begin = ids[: len(ids) - len(own)]
    if [*begin, *own] != ids:
        return f"ids = {ids}  # of {row.prompt!a}"
    room = max(1, config.data.max_length - len(begin) - config.evaluation.max_new_tokens)
    fill = "".join(f".replace('{{{name}}}', {EXAMPLE!r})" for name in sorted(field_names(config.data.prompt)))
    fill += "  # the template of the training, filled: put your own text" if fill else ""
    names = " ".join(map(ascii, tokenization.tokenizer.convert_ids_to_tokens(begin)))
    return f'prompt = {row.prompt!a}{fill}\ntokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]\n' + (
        f"ids = {begin} + tokens[-{room}:]  # begins with {names}" if begin else f"ids = tokens[-{room}:]"
    )


def _chat(config: RunConfig, tokenization: Tokenization, row: Row, ids: list[int] | None) -> str:
    assert row.turns is not None
    messages: list[Any] = [turn.for_template() for turn in row.turns]
    arguments: dict[str, Any] = dict(config.data.chat_template_kwargs)
    more = f", **{arguments!a}" if arguments else ""
    line = f'tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True{more})["input_ids"]'
    if ids is not None:
        apply = tokenization.tokenizer.apply_chat_template
        own = apply(messages, add_generation_prompt=True, return_dict=True, **arguments)["input_ids"]
        line = line if list(own) == ids else f"{ids}  # of these messages"
    return f"messages = {messages!a}\nids = {line}"


def _settings(base: str) -> SimpleNamespace:
    """Return the configuration of a base, and its generation settings, without its weights."""
    from transformers import AutoConfig, GenerationConfig

    place = locate_base(base)
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise HetLoraError(f"the configuration of the base {base!r} cannot be read: {error}") from error
    try:
        settings = GenerationConfig.from_pretrained(place)
    except OSError:  # there are none, and transformers makes them of the configuration, too
        settings = GenerationConfig()
    return SimpleNamespace(config=config, generation_config=settings)
