"""From rows of text to scored token sequences, and from those to padded batches."""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from hetlora.errors import DataError
from hetlora.lora_model import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Example", "Row", "Template", "Tokenization", "collate"]


class Row(NamedTuple):
    """One example as text: the prompt is not scored, the target is."""

    prompt: str
    target: str


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
        """Number of tokens that are scored: those of the target, but never the first of the sequence."""
        return len(self.ids) - max(self.scored_from, 1)


@dataclass(frozen=True)
class Template:
    """How the fields of a row of data become a prompt and a target.

    Args:
        prompt: Text with fields in braces, ``"{instruction}"``; empty where every token is scored.
        target: The same for what the model is to say.

    Raises:
        DataError: A brace holds anything but a plain field name.

    Example:
        >>> Template("Q: {q} A:", " {a}").row({"q": "1 + 1?", "a": "2"}, where="line 1")
        Row(prompt='Q: 1 + 1? A:', target=' 2')
    """

    prompt: str
    target: str

    def __post_init__(self) -> None:
        for text in (self.prompt, self.target):
            for name in _fields(text):
                if not name.isidentifier():
                    raise DataError(
                        f"template {text!r}: {{{name}}} is not a field name; write literal braces as {{{{ }}}}"
                    )

    def row(self, fields: Mapping[str, object], where: str) -> Row:
        """Fill the template with one row of data.

        Raises:
            DataError: The row lacks a field; names the place and the fields it has.
        """
        for name in dict.fromkeys([*_fields(self.prompt), *_fields(self.target)]):
            if not isinstance(fields.get(name), (str, int, float)):
                state = "is not text" if name in fields else "is missing"
                raise DataError(
                    f"{where}: field {name!r} {state}; the row has {', '.join(sorted(fields)) or 'no fields'}. "
                    "Mend the row, or change data.prompt / data.target"
                )
        return Row(self.prompt.format_map(fields), self.target.format_map(fields))


def _fields(template: str) -> list[str]:
    literal = "write literal braces as {{ }}"
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise DataError(f"template {template!r}: {error}; {literal}") from error
    for name, form, conversion in parts:
        if form or conversion:
            raise DataError(
                f"template {template!r}: {{{name}}} takes no format; give the field's name alone, or {literal}"
            )
    return [str(name) for name, _, _ in parts]


@dataclass
class Tokenization:
    """Turns rows into examples of at most `max_length` tokens, and counts what it had to cut or drop.

    A sequence is the tokenizer's begin-of-text token where it has one, the prompt, the target, and the end-of-text token,
    which is scored: the model learns to stop.

    Args:
        tokenizer: A Hugging Face tokenizer with an end-of-text token.
        max_length: Longest sequence, at least 2 tokens.
        long_rows: "truncate" cuts the prompt at its start, then the target at its end. "split" makes several examples of
            a long row that has no prompt, so that no token is lost.

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
        begin = self._begin(row.prompt)
        ids = self._encode(row.prompt)
        return (*begin, *ids[max(0, len(ids) - (self.max_length - len(begin) - room)) :])

    def _examples(self, row: Row) -> Iterator[Example]:
        target = self._encode(row.target)
        if not target:
            self.empty += 1
            return
        target = (*target, int(self.tokenizer.eos_token_id))
        begin = self._begin(row.prompt)
        room = self.max_length - len(begin)
        if not row.prompt and self.long_rows == "split":
            for start in range(0, len(target), room):
                yield Example((*begin, *target[start : start + room]), len(begin))
            return
        prompt = self._encode(row.prompt)
        self.truncated += len(prompt) + len(target) > room
        # With no room for both, the prompt keeps at least a quarter: a target without its question teaches nothing.
        target = target[: room - min(len(prompt), room // 4)]
        kept = prompt[len(prompt) - min(len(prompt), room - len(target)) :]
        yield Example((*begin, *kept, *target), len(begin) + len(kept))

    def _encode(self, text: str) -> tuple[int, ...]:
        # verbose=False: a row longer than the model's context is cut here, so the warning about it would be wrong.
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _begin(self, prompt: str) -> tuple[int, ...]:
        if self.tokenizer.bos_token_id is not None:
            return (int(self.tokenizer.bos_token_id),)
        return () if prompt else (int(self.tokenizer.eos_token_id),)  # the first token of a text needs a predecessor


def collate(examples: Sequence[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad examples on the right to the longest.

    Returns:
        `input_ids [rows, length]` and `labels [rows, length]`, the latter -100 where not scored. An example without
        tokens is a row of padding.

    Example:
        >>> ids, labels = collate([Example((5, 6, 7), 1), Example((8,), 0)], pad_id=0)
        >>> ids.tolist(), labels.tolist()
        ([[5, 6, 7], [8, 0, 0]], [[-100, 6, 7], [8, -100, -100]])
    """
    length = max(1, *(len(example.ids) for example in examples)) if examples else 1
    input_ids = torch.full((len(examples), length), pad_id, dtype=torch.long)
    labels = torch.full((len(examples), length), IGNORED, dtype=torch.long)
    for index, (ids, scored_from) in enumerate(examples):
        row = torch.tensor(ids, dtype=torch.long)
        input_ids[index, : len(ids)] = row
        labels[index, scored_from : len(ids)] = row[scored_from:]
    return input_ids, labels
