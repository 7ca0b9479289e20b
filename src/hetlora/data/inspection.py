"""What a person should know about the rows of a run before it trains: `hetlora data` and `hetlora doctor` print it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hetlora.data.federation import Federation
from hetlora.data.templates import Row
from hetlora.data.tokenization import Example, Tokenization
from hetlora.errors import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ShownExample", "both_sides", "describe_borders", "notes_on", "shown_examples", "unread_fields"]


@dataclass(frozen=True)
class ShownExample:
    """A training example as its tokens.

    Attributes:
        client: Whose it is.
        context: Tokens that are not scored, as text.
        scored: Tokens that are scored, one by one.
        ids: All token ids.
        scored_from: Index of the first scored token.
    """

    client: str
    context: str
    scored: tuple[str, ...]
    ids: tuple[int, ...]
    scored_from: int


def shown_examples(federation: Federation, tokenization: Tokenization, count: int) -> tuple[ShownExample, ...]:
    """Return the first examples of the clients, one per client in turn."""
    shown: list[ShownExample] = []
    queues = [(name, iter(federation.clients[name].train)) for name in federation.names[:count]]
    while queues and len(shown) < count:
        for name, rows in list(queues):
            row = next(rows, None)
            if row is None:
                queues.remove((name, rows))
                continue
            shown += [_shown(tokenization, name, example) for example in tokenization.examples([row])]
    return tuple(shown[:count])


def notes_on(federation: Federation, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Return what is odd about the rows: on both sides of the split, control tokens spelled in text.

    Args:
        federation: The rows.
        tokenizer: Its special tokens are looked for; None looks for none.
    """
    notes = both_sides(federation)
    notes += [
        f"{count} rows spell the control token {token!r} in their text, which the tokenizer reads as the token itself"
        for token, count in _spelled(federation, tokenizer).items()
    ]
    return notes


def both_sides(federation: Federation) -> list[str]:
    """Return a note where held-out rows are training rows, too; empty where none is."""
    train = {row for own in federation.holdings() for row in own.train}
    both = sum(row in train for own in federation.holdings() for row in own.test)
    return [f"{both} held-out rows are training rows, too: their scores say little"] if both else []


def unread_fields(federation: Federation, read: Collection[str]) -> str:
    """Return the names of the fields that the configuration does not read, for people; empty where it reads all."""
    unread = sorted(set(federation.fields) - set(read) - {"split"})  # a folder gives every record its split
    more = f" and {len(unread) - 8} more" if len(unread) > 8 else ""
    return f"{', '.join(map(printable, unread[:8]))}{more}"


def describe_borders(unclean: int, unended: int, doubled: int, *, dated: bool) -> list[str]:
    """Return what a person should know of where answers begin and end, and of a template that depends on the day."""
    notes = []
    if unclean:
        notes.append(
            f"in {unclean} rows a token reaches over the border of prompt and target, so that answers are generated after "
            "other tokens than trained (if the prompt ends in a space, begin the target with it instead)"
        )
    if doubled:
        notes.append(f"in {doubled} rows the prompt ends in a space and the answer begins with another; take one away")
    if unended:
        notes.append(
            f"the chat template ends {unended} answers by no token of its own: the end-of-text token is scored after them"
        )
    if dated:
        notes.append(
            "the chat template writes today's date, so that rows have other tokens tomorrow, and a resumed run, too; set "
            'data.chat_template_kwargs = { date_string = "1 Jan 2026" } if it reads that'
        )
    return notes


def _shown(tokenization: Tokenization, client: str, example: Example) -> ShownExample:
    tokenizer, border = tokenization.tokenizer, max(example.scored_from, 1)
    scored = tuple(map(str, tokenizer.convert_ids_to_tokens(list(example.ids[border:]))))
    return ShownExample(client, str(tokenizer.decode(example.ids[:border])), scored, example.ids, example.scored_from)


def _rows(federation: Federation) -> Iterator[Row]:
    for own in federation.holdings():
        yield from own.train
        yield from own.test


def _spelled(federation: Federation, tokenizer: PreTrainedTokenizerBase | None) -> Counter[str]:
    """Count the rows that spell a special token; one of one or two signs, such as a newline or "!", stands in every text."""
    tokens = [] if tokenizer is None else [token for token in map(str, tokenizer.all_special_tokens) if len(token) > 2]
    found: Counter[str] = Counter()
    if tokens:
        pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
        for row in _rows(federation):
            found.update({token for text in _texts(row) for token in pattern.findall(text)})
    return found


def _texts(row: Row) -> Iterator[str]:
    yield row.target
    if row.turns is None:
        yield row.prompt
    else:
        yield from (turn.content for turn in row.turns)
