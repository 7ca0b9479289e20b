"""From rows of text to scored token sequences."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hetlora.data.chat import Chat, without_first_exchange
from hetlora.data.conversations import Message
from hetlora.data.seam import SplitIds, encode, split_ids
from hetlora.data.templates import Row
from hetlora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Example", "Tokenization"]


class Example(NamedTuple):
    """One example as tokens.

    Attributes:
        ids: Token ids of prompt and target together.
        scored_from: Index of the first token of the target.
    """

    ids: tuple[int, ...]
    scored_from: int

    @property
    def scored(self) -> int:
        """Number of tokens that are scored, those of the target, but never the first of the sequence."""
        return len(self.ids) - max(self.scored_from, 1)


class _Parts(NamedTuple):
    """A row's tokens: what stays at the start, what may be cut at its start, what is scored; and whether turns were dropped."""

    begin: tuple[int, ...]
    prompt: tuple[int, ...]
    target: tuple[int, ...]
    shortened: bool = False


@dataclass
class Tokenization:
    """Turns rows into examples of at most `max_length` tokens, and counts what it had to cut or drop.

    A sequence is the begin-of-text token, the prompt, the target, and the end-of-text token, which is scored: the model learns
    to stop. Prompt and target are tokenized as one text, see `hetlora.data.seam.split_ids`. A chat is what the tokenizer's chat
    template makes of it; its answer and the end of its turn are scored, and where the template ends no answer by a token of its
    own, the end-of-text token follows it.

    Args:
        tokenizer: A Hugging Face tokenizer with an end-of-text token.
        max_length: Longest sequence, at least 2 tokens.
        long_rows: "truncate" cuts the prompt at its start, then the target at its end. "split" makes several examples of
            a long row that has no prompt, so that no token is lost. A chat loses its first exchanges before that.
        begin: "tokenizer" begins a text with what the tokenizer itself puts there. A text without a prompt then begins with the
            begin-of-text token in any case, or with the end-of-text token of a tokenizer without one, since the first token of
            a text needs a predecessor. "always" and "never" hold for all texts. A chat template sets its own.
        end: Whether the end-of-text token ends a text that is no chat.
        template_arguments: Further arguments of the chat template.

    Attributes:
        truncated: Rows that lost tokens.
        empty: Rows dropped because nothing of them would be scored.
        unclean: Rows in which a token reaches over the border of prompt and target: such a model answers after other tokens
            than it is trained after.
        unended: Chats whose template ends the answer by no token of its own.
        doubled: Rows with a space on either side of the border of prompt and target.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    long_rows: Literal["truncate", "split"] = "truncate"
    begin: Literal["tokenizer", "always", "never"] = "tokenizer"
    end: bool = True
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    truncated: int = field(default=0, init=False)
    empty: int = field(default=0, init=False)
    unclean: int = field(default=0, init=False)
    unended: int = field(default=0, init=False)
    doubled: int = field(default=0, init=False)
    _chats: bool = field(default=False, init=False)

    @property
    def counted(self) -> tuple[int, int, int, int, int]:
        """Return the numbers of truncated, empty, unclean, unended and doubled rows so far."""
        return self.truncated, self.empty, self.unclean, self.unended, self.doubled

    @property
    def dated(self) -> bool:
        """Whether chats were tokenized by a template that writes the day's date."""
        return self._chats and self.chat.dated

    def examples(self, rows: Iterable[Row]) -> list[Example]:
        """Tokenize rows; those with a blank target are dropped and counted."""
        return [example for row in rows for example in self._examples(row)]

    def prompt_ids(self, row: Row, room: int) -> tuple[int, ...]:
        """Return the tokens the model sees before it answers, cut at the start to leave `room` tokens."""
        with _at(row):
            if row.turns is None:
                begin, prompt = self._begin(row.prompt), encode(self.tokenizer, row.prompt)
            else:
                prompt = self._fitting(row, room).prompt
                begin, prompt = self._divided(prompt)
        return (*begin, *prompt[max(0, len(prompt) - (self.max_length - len(begin) - room)) :])

    def expected(self, row: Row) -> str:
        """Return the text that a row's answer is scored against: of a chat what its template makes of it."""
        if row.turns is None or row.blank:
            return row.target
        with _at(row):
            return str(self.tokenizer.decode(self.chat.answer_ids(row, row.turns).target, skip_special_tokens=True))

    def ends(self, rows: Iterable[Row]) -> list[int]:
        """Return the tokens that end an answer: of the text, and those of the turns of chats where the template sets one."""
        ends = {int(self.tokenizer.eos_token_id)}
        for row in rows:
            if row.turns is not None:
                with _at(row):
                    end = self.chat.end(row)
                ends |= set() if end is None else {end}
        return sorted(ends)

    @cached_property
    def chat(self) -> Chat:
        """The tokenizer's chat template."""
        return Chat(self.tokenizer, self.template_arguments)

    def _examples(self, row: Row) -> Iterator[Example]:
        if row.blank:  # of a chat, there may be nothing that the template takes
            self.empty += 1
            return
        with _at(row):
            begin, prompt, target, shortened = self._parts(row)
        if not target:
            self.empty += 1
            return
        room = self.max_length - len(begin)
        if not row.prompt and row.turns is None and self.long_rows == "split":
            for start in range(0, len(target), room):
                yield Example((*begin, *target[start : start + room]), len(begin))
            return
        self.truncated += shortened or len(prompt) + len(target) > room
        # With no room for both, the prompt keeps at least a quarter: a target without its question teaches nothing.
        target = target[: room - min(len(prompt), room // 4)]
        kept = prompt[len(prompt) - min(len(prompt), room - len(target)) :]
        yield Example((*begin, *kept, *target), len(begin) + len(kept))

    def _parts(self, row: Row) -> _Parts:
        """Return a row's tokens; of a chat, first exchanges are dropped until it fits with its answer."""
        if row.turns is None:
            ids = split_ids(self.tokenizer, row.prompt, row.prompt + row.target)
            self.unclean += not ids.clean
            self.doubled += ids.doubled
            end = (int(self.tokenizer.eos_token_id),) if ids.target and self.end else ()
            return _Parts(self._begin(row.prompt), ids.prompt, (*ids.target, *end))
        parts = self._fitting(row)
        begin, prompt = self._divided(parts.prompt)
        return parts._replace(begin=begin, prompt=prompt)

    def _fitting(self, row: Row, room: int | None = None) -> _Parts:
        """Return the tokens of a chat without the first exchanges that do not fit: with `room`, or with the answer."""
        assert row.turns is not None
        self._chats = True
        kept: Sequence[Message] = row.turns
        while True:
            ids = self._chat_ids(row, kept, answered=room is None)
            fits = len(ids.prompt) + (len(ids.target) if room is None else room) <= self.max_length
            fewer = None if fits else without_first_exchange(kept)
            if fewer is None:
                break
            kept = fewer
        self.unclean += not ids.clean
        self.doubled += ids.doubled
        self.unended += room is None and self.chat.end(row) is None
        return _Parts((), ids.prompt, ids.target, len(kept) < len(row.turns))

    def _chat_ids(self, row: Row, turns: Sequence[Message], *, answered: bool) -> SplitIds:
        if not answered:
            return SplitIds(self.chat.prompt_ids(row, turns), (), clean=True)
        ids = self.chat.answer_ids(row, turns)
        if self.chat.end(row) is None:
            return ids._replace(target=(*ids.target, int(self.tokenizer.eos_token_id)))
        return ids

    def _divided(self, prompt: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Divide a chat's prompt into the begin-of-text token, where its template sets it, and the rest."""
        begins = 1 if prompt and prompt[0] == self.tokenizer.bos_token_id else 0
        return prompt[:begins], prompt[begins:]

    def _begin(self, prompt: str) -> tuple[int, ...]:
        set_by_tokenizer = self._set_by_tokenizer if self.begin == "tokenizer" else ()
        if self.begin == "never" or set_by_tokenizer or (prompt and self.begin == "tokenizer"):
            return set_by_tokenizer
        begin = self.tokenizer.bos_token_id
        if begin is not None:
            return (int(begin),)
        return () if prompt else (int(self.tokenizer.eos_token_id),)

    @cached_property
    def _set_by_tokenizer(self) -> tuple[int, ...]:
        """Return the tokens that the tokenizer itself puts before a text."""
        text = encode(self.tokenizer, "a")
        whole = tuple(self.tokenizer("a", verbose=False)["input_ids"])
        place = next((start for start in range(len(whole)) if whole[start : start + len(text)] == text), 0)
        return whole[:place]


@contextlib.contextmanager
def _at(row: Row) -> Iterator[None]:
    """Say where the row stands in what is wrong with it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{row.where}: {error}" if row.where else str(error)) from error
