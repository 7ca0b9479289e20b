"""Conversations as tokens, by the tokenizer's own chat template, which is checked with every row."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hetlora.data.conversations import Message
from hetlora.data.seam import SplitIds, encode, split_ids
from hetlora.data.templates import Row
from hetlora.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Chat", "check_chat_template", "without_first_exchange"]


PROBE = "Zyxwvutsrq"
"""An answer that is in no template."""


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template, and what it is called with.

    Attributes:
        tokenizer: The tokenizer.
        arguments: Further arguments of the template, such as ``{"enable_thinking": False}``.
    """

    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, Any] = field(default_factory=dict)
    _ends: dict[tuple[str, ...], int | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def prompt_ids(self, row: Row, turns: Sequence[Message]) -> tuple[int, ...]:
        """Return the tokens that an answer of `row` comes after, with `turns` before it.

        Raises:
            DataError: The template refuses the conversation, or leaves a turn's text out.
        """
        return encode(self.tokenizer, self._prompt(row, turns))

    def answer_ids(self, row: Row, turns: Sequence[Message]) -> SplitIds:
        """Return the tokens of `turns` with the header of the answer's turn, and those of the answer with the end of its turn.

        Together they are the tokens of the template's conversation.

        Raises:
            DataError: The template refuses the conversation, leaves something of it out, or gives it another beginning than
                the prompt.
        """
        answer = Message("assistant", row.target, row.answer)
        prompt, whole = self._prompt(row, turns), self._render(row, [*turns, answer], answering=False)
        if not whole.startswith(prompt):
            raise DataError(_other_beginning(prompt, whole, turns))
        _check_texts(whole, [*turns, answer])
        self._check_extra(row, turns, whole)
        return split_ids(self.tokenizer, prompt, whole)

    def end(self, row: Row) -> int | None:
        """Return the token by which the template ends the answer of `row`: a special one, or at least an added one.

        It is the first such token behind the answer; None where the template ends an answer by text, or by nothing.

        Raises:
            DataError: The template refuses the conversation, or leaves out the answer.
        """
        turns = row.turns or ()
        kind = (*(turn.role for turn in turns), str(bool(row.tools)), str(bool(row.answer)))
        if kind not in self._ends:
            whole = self._render(row, [*turns, Message("assistant", PROBE, row.answer)], answering=False)
            if PROBE not in whole:
                raise DataError("the chat template leaves out the text of the assistant's turn; mend the template")
            tail = encode(self.tokenizer, whole.rpartition(PROBE)[2])
            added = {
                index: token.special
                for index, token in self.tokenizer.added_tokens_decoder.items()
                if token.content.strip()
            }
            added |= dict.fromkeys(self.tokenizer.all_special_ids, True)
            found = [index for index in tail if added.get(index)] or [index for index in tail if index in added]
            # Tool calls have tokens of their own before the end.
            self._ends[kind] = found[-1 if row.answer else 0] if found else None
        return self._ends[kind]

    def unread_arguments(self) -> list[str]:
        """Return the arguments that the template never names."""
        template = str(self.tokenizer.get_chat_template())
        return [name for name in self.arguments if not re.search(rf"\b{re.escape(name)}\b", template)]

    @property
    def dated(self) -> bool:
        """Whether the template writes the day's date, so that a row has other tokens tomorrow."""
        template = str(self.tokenizer.get_chat_template())
        return "strftime_now" in template and not any("date" in name for name in self.arguments)

    def _prompt(self, row: Row, turns: Sequence[Message]) -> str:
        text = self._render(row, turns, answering=True)
        _check_texts(text, turns)
        if row.tools and text == self._render(row, turns, answering=True, tools=False):
            raise DataError(
                "the chat template ignores the row's tools; take the field out, or set data.chat_template to one that reads it"
            )
        return text

    def _render(self, row: Row, turns: Sequence[Message], *, answering: bool, tools: bool = True) -> str:
        given = {"tools": json.loads(row.tools)} if row.tools and tools else {}
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [turn.for_template() for turn in turns],
                    tokenize=False,
                    add_generation_prompt=answering,
                    **given,
                    **self.arguments,
                )
            )
        except Exception as error:  # a template is a program: it may divide by zero, or not be one at all
            raise DataError(_refusal(turns, error)) from error

    def _check_extra(self, row: Row, turns: Sequence[Message], whole: str) -> None:
        """Refuse tool calls and other keys that the template does not read: of the answer, and tool calls before it."""
        turns = [*turns, Message("assistant", row.target, row.answer)]
        for place, turn in enumerate(turns):
            extra = json.loads(turn.extra) if turn.extra else {}
            for key in extra:
                if key != "tool_calls" and place < len(turns) - 1:
                    continue  # earlier thoughts are left out by design, and names say nothing that is scored
                kept = {name: value for name, value in extra.items() if name != key}
                without = [*turns]
                without[place] = turn._replace(extra=json.dumps(kept) if kept else "")
                if self._ignores(row, without, whole):
                    raise DataError(
                        f"the chat template ignores {key} of turn {place + 1}; take the key out of the rows, or set "
                        "data.chat_template to one that reads it"
                    )

    def _ignores(self, row: Row, without: Sequence[Message], whole: str) -> bool:
        try:
            return self._render(row, without, answering=False) == whole
        except DataError:  # what the template refuses without the key, it reads
            return False


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
            f"the tokenizer of {name!r} has no chat template, which data.chat and data.messages need; set data.chat_template "
            "to a file with one, set model.base or model.tokenizer to one that has (of an instruction-tuned model), or write "
            "the turns into data.prompt"
        ) from error


def without_first_exchange(turns: Sequence[Message]) -> tuple[Message, ...] | None:
    """Return the conversation from its second user turn on, the system turn kept; None where there is no second one.

    Example:
        >>> turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
        >>> [turn.content for turn in without_first_exchange(turns)]
        ['c']
        >>> without_first_exchange([Message("user", "c")]) is None
        True
    """
    users = [index for index, turn in enumerate(turns) if turn.role == "user"]
    if len(users) < 2:
        return None
    return (*(turn for turn in turns[:1] if turn.role in ("system", "developer")), *turns[users[1] :])


def _said(content: str) -> str:
    """Return what a template must keep of a turn's text: it may trim it, and leave out a thought before it."""
    return content.rpartition("</think>")[2].strip()


def _check_texts(text: str, turns: Sequence[Message]) -> None:
    """Refuse a text in which a turn is not, or not as often as it was said; white space may differ."""
    given, said = _collapsed(text), [_collapsed(_said(turn.content)) for turn in turns]
    for number, (turn, own) in enumerate(zip(turns, said, strict=True), start=1):
        wanted = sum(other.count(own) for other in said) if own else 0
        forms = {own, json.dumps(own)[1:-1], json.dumps(own, ensure_ascii=False)[1:-1]}
        if max(map(given.count, forms)) < wanted:
            # The message quotes no text: a client with rows of its own sends it to the server.
            folded = "data.fold_system puts it into the user's turn"
            way_out = folded if turn.role in ("system", "developer") else "mend the row, or the template"
            raise DataError(f"the chat template leaves out the text of turn {number} ({turn.role}); {way_out}")


def _collapsed(text: str) -> str:
    return " ".join(text.split())


def _refusal(turns: Sequence[Message], error: Exception) -> str:
    roles = ", ".join(turn.role for turn in turns)
    reason = str(error)[:200] or type(error).__name__
    way_out = "mend the row or leave it out"
    if turns and turns[0].role in ("system", "developer"):
        way_out += ", or put the system's text into the user's turn with data.fold_system = true"
    return f"the chat template refuses a conversation of {roles} ({reason}); {way_out}"


def _other_beginning(prompt: str, whole: str, turns: Sequence[Message]) -> str:
    pairs = zip(prompt, whole, strict=False)
    alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    hints = []
    if "<think>" in prompt[max(0, alike - 40) :]:
        hints.append(
            "its generation prompt opens a thought that the answers do not have: set data.chat_template_kwargs = "
            "{enable_thinking = false} if the template reads it; "
        )
    if turns and turns[0].role in ("system", "developer"):
        hints.append("put the system's text into the user's turn with data.fold_system = true; ")
    return (
        f"the chat template gives a conversation that does not begin with its own prompt: of {len(prompt)} characters of "
        f"prompt the first {alike} are alike; {''.join(hints)}write the turns into data.prompt without data.chat, or set "
        "data.chat_template to a template that is mended"
    )
