"""A federation as tokens: clients are tokenized when they are needed, and so many are kept as memory is meant for."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from hetlora.core.population import MANY
from hetlora.data.client_rows import Side
from hetlora.data.federation import Federation
from hetlora.data.templates import Row
from hetlora.data.tokenization import Example, Tokenization

__all__ = ["TokenCounts", "TokenizedFederation"]

COUNTED = 1_000
"""Clients of a large population that the tokens are counted of."""

KEPT = 2**22
"""Tokens that are kept; each takes about 40 bytes."""

OVERHEAD = 16
"""What an example takes besides its tokens, in tokens."""


class TokenCounts(NamedTuple):
    """What tokenizing has found out.

    Attributes:
        clients: Clients whose rows were counted: all, or some of a large population.
        tokens: Their training tokens.
        truncated: Their rows that lost tokens.
        empty: Their rows dropped for a blank target.
        unclean: Their rows in which a token reaches over the border of prompt and target.
        unended: Their chats whose template ends no answer.
        doubled: Their rows with a space on either side of the border.
    """

    clients: int
    tokens: int
    truncated: int
    empty: int
    unclean: int = 0
    unended: int = 0
    doubled: int = 0


@dataclass(frozen=True)
class TokenizedFederation:
    """A federation as tokens. A client is tokenized when it is needed, and again if it was long ago.

    Attributes:
        federation: The rows.
        tokenization: Turns them into tokens.
        kept: Tokens that are kept, those used last; a client that is used is whole, whatever it has.
    """

    federation: Federation
    tokenization: Tokenization
    kept: int = KEPT

    @cached_property
    def _cache(self) -> _Cache:
        return _Cache(self.kept)

    @cached_property
    def counts(self) -> TokenCounts:
        """Truncated and dropped rows and training tokens, of every client, or of a sample of a large population."""
        names = self.federation.names
        if len(names) > MANY:
            names = [names[place] for place in sorted(random.Random("counted").sample(range(len(names)), COUNTED))]
        before, tokens = self.tokenization.counted, 0
        for name in names:
            rows = self.federation.clients[name]
            self._examples(name, "test", rows.test)
            tokens += sum(len(example.ids) for example in self._examples(name, "train", rows.train))
        counted = (now - was for now, was in zip(self.tokenization.counted, before, strict=True))
        return TokenCounts(len(names), tokens, *counted)

    def train(self, client: str) -> Sequence[Example]:
        """Return the training examples of a client."""
        return self._side(client, "train")

    def test(self, client: str) -> Sequence[Example]:
        """Return the held-out examples of a client."""
        return self._side(client, "test")

    def test_rows(self, client: str) -> Sequence[Row]:
        """Return the held-out rows of a client as text."""
        return self.federation.clients[client].test

    def pooled(self) -> Iterator[Example]:
        """Yield the training examples of all clients, each row once."""
        sampled = self.federation.sampled
        if sampled is not None:
            yield from self.tokenization.examples(sampled.pool.train)
            return
        for client in self.federation.names:
            yield from self.train(client)

    def _side(self, client: str, side: Side) -> Sequence[Example]:
        examples = self._cache.get((client, side))
        if examples is None:
            rows = self.federation.clients[client]
            examples = self._examples(client, side, rows.train if side == "train" else rows.test)
        return examples

    def _examples(self, client: str, side: Side, rows: Sequence[Row]) -> Sequence[Example]:
        examples = self.tokenization.examples(rows)
        self._cache.put((client, side), examples)
        return examples


class _Cache:
    """The examples used last, up to a number of tokens."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: OrderedDict[tuple[str, str], Sequence[Example]] = OrderedDict()
        self._size = 0

    def get(self, key: tuple[str, str]) -> Sequence[Example] | None:
        examples = self._held.get(key)
        if examples is not None:
            self._held.move_to_end(key)
        return examples

    def put(self, key: tuple[str, str], examples: Sequence[Example]) -> None:
        if key in self._held:
            self._size -= self._cost(self._held.pop(key))
        self._held[key] = examples
        self._size += self._cost(examples)
        while self._size > self._most and len(self._held) > 1:
            _, forgotten = self._held.popitem(last=False)
            self._size -= self._cost(forgotten)

    @staticmethod
    def _cost(examples: Sequence[Example]) -> int:
        return OVERHEAD + sum(OVERHEAD + len(example.ids) for example in examples)
