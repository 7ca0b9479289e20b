"""From rows of text to scored token sequences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from hetlora.data.chat import conversation_ids, end_of_turn, without_first_exchange
from hetlora.data.templates import Message, Row
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

    A sequence is the tokenizer's begin-of-text token where it has one, the prompt, the target, and the end-of-text token,
    which is scored: the model learns to stop. A chat is what the tokenizer's chat template makes of it; its answer and the
    end of its turn are scored.

    Args:
        tokenizer: A Hugging Face tokenizer with an end-of-text token.
        max_length: Longest sequence, at least 2 tokens.
        long_rows: "truncate" cuts the prompt at its start, then the target at its end. "split" makes several examples of
            a long row that has no prompt, so that no token is lost. A chat loses its first exchanges before that.

    Attributes:
        truncated: Rows that lost tokens.
        empty: Rows dropped because nothing of them would be scored.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    long_rows: Literal["truncate", "split"] = "truncate"
    truncated: int = field(default=0, init=False)
    empty: int = field(default=0, init=False)

    def examples(self, rows: Iterable[Row]) -> list[Example]:
        """Tokenize rows; those with an empty target are dropped and counted."""
        return [example for row in rows for example in self._examples(row)]

    def prompt_ids(self, row: Row, room: int) -> tuple[int, ...]:
        """Return the tokens the model sees before it answers, cut at the start to leave `room` tokens."""
        parts = self._parts(row, room)
        prompt = parts.prompt
        return (*parts.begin, *prompt[max(0, len(prompt) - (self.max_length - len(parts.begin) - room)) :])

    def ends(self, *, chat: bool) -> list[int]:
        """Return the tokens that end an answer: of the text, and of a chat's turn where its template sets one."""
        ends = {int(self.tokenizer.eos_token_id), end_of_turn(self.tokenizer) if chat else None}
        return sorted(end for end in ends if end is not None)

    def _examples(self, row: Row) -> Iterator[Example]:
        if row.turns is not None and not row.target.strip():  # there may be nothing that the chat template takes
            self.empty += 1
            return
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

    def _parts(self, row: Row, room: int | None = None) -> _Parts:
        """Return a row's tokens; of a chat, first exchanges are dropped until it fits with `room`, or with its answer."""
        if row.turns is not None:
            try:
                return self._chat_parts(row.turns, row.target, room)
            except DataError as error:
                raise DataError(f"{row.where}: {error}" if row.where else str(error)) from error
        target = self._encode(row.target)
        ended = (*target, int(self.tokenizer.eos_token_id)) if target else ()
        return _Parts(self._begin(row.prompt), self._encode(row.prompt), ended)

    def _chat_parts(self, turns: tuple[Message, ...], answer: str, room: int | None) -> _Parts:
        kept = turns
        while True:
            prompt, target = conversation_ids(self.tokenizer, kept, answer)
            fits = len(prompt) + (len(target) if room is None else room) <= self.max_length
            fewer = None if fits else without_first_exchange(kept)
            if fewer is None:
                break
            kept = fewer
        begins = 1 if prompt and prompt[0] == self.tokenizer.bos_token_id else 0
        return _Parts(prompt[:begins], prompt[begins:], target, kept != turns)

    def _encode(self, text: str) -> tuple[int, ...]:
        # verbose=False: a row longer than the model's context is cut here, so the warning about it would be wrong.
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _begin(self, prompt: str) -> tuple[int, ...]:
        if self.tokenizer.bos_token_id is not None:
            return (int(self.tokenizer.bos_token_id),)
        return () if prompt else (int(self.tokenizer.eos_token_id),)  # the first token of a text needs a predecessor
