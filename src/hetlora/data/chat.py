"""Conversations as tokens, by the tokenizer's own chat template."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hetlora.data.templates import Message
from hetlora.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_chat_template", "conversation_ids", "end_of_turn", "without_first_exchange"]


def check_chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer without a chat template.

    Args:
        tokenizer: The tokenizer.
        name: What the configuration calls it.

    Raises:
        ModelError: It has none.
    """
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        raise ModelError(
            f"the tokenizer of {name!r} has no chat template, which data.chat and data.messages need; set model.base or "
            "model.tokenizer to one that has (of an instruction-tuned model), or write the turns into data.prompt"
        ) from error


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], target: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens of a prompt with the header of the assistant's turn, and those of its answer with the turn's end.

    Together they are the tokens of the template's whole conversation. Where the template sets no token between header and
    answer, a token could reach over the border; then the two are tokenized apart, and together are the same text: the
    model must be trained after the very tokens that it will answer after.

    Raises:
        DataError: The template refuses the conversation, or gives it another beginning than the prompt.
    """
    whole_turns = [*turns, Message("assistant", target)]
    prompt_text = _render(tokenizer, turns, answering=True)
    whole_text = _render(tokenizer, whole_turns, answering=False)
    prompt, whole = _encode(tokenizer, prompt_text), _encode(tokenizer, whole_text)
    if whole[: len(prompt)] == prompt:
        return prompt, whole[len(prompt) :]
    if not whole_text.startswith(prompt_text):
        # The message quotes neither: a client with rows of its own sends it to the server.
        pairs = zip(prompt_text, whole_text, strict=False)
        alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        raise DataError(
            f"the chat template gives a conversation that does not begin with its own prompt: of {len(prompt_text)} characters "
            f"of prompt the first {alike} are alike; write the turns into data.prompt without data.chat, or mend the "
            "tokenizer's template"
        )
    return prompt, _encode(tokenizer, whole_text[len(prompt_text) :])


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that ends the assistant's turn, the last of it; None where the template sets none."""
    _, answer = conversation_ids(tokenizer, [Message("user", "a")], "b")
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    return next((index for index in reversed(answer) if index in special), None)


def without_first_exchange(turns: Sequence[Message]) -> tuple[Message, ...] | None:
    """Return the conversation from its second user turn on, the system turn kept; None where there is no second one.

    Example:
        >>> turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
        >>> without_first_exchange(turns)
        (Message(role='user', content='c'),)
        >>> without_first_exchange([Message("user", "c")]) is None
        True
    """
    users = [index for index, turn in enumerate(turns) if turn.role == "user"]
    if len(users) < 2:
        return None
    return (*(turn for turn in turns[:1] if turn.role == "system"), *turns[users[1] :])


def _render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], *, answering: bool) -> str:
    messages: list[Any] = [turn._asdict() for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering))
    except Exception as error:  # a template is a program: it may divide by zero, or not be one at all
        roles = ", ".join(turn.role for turn in turns)
        reason = str(error)[:200] or type(error).__name__
        raise DataError(
            f"the chat template refuses a conversation of {roles} ({reason}); mend the row or leave it out"
        ) from error


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
