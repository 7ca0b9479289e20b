"""Messages between server and node, and between a node's processes: JSON with binary blobs.

A message is for at most `MOST_CLIENTS` clients. Who asks knows how long an honest answer can be: nothing longer is parsed or
copied.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hetlora.errors import WireError, printable

__all__ = [
    "MOST_CLIENTS",
    "READS",
    "WIRE",
    "Envelope",
    "join_parts",
    "joined_size",
    "most_answer_text",
    "quoted",
    "split_parts",
]

WIRE = "3"
"""Version of the messages: from 3 on all blobs of a message travel in one array of Flower's."""

READS = ("2", WIRE)
"""Versions that a node reads, and answers in."""

MOST_CLIENTS = 1000
"""Maximal number of clients in a message."""

MOST_TEXT = 2**23
"""Maximal size of the JSON in bytes: a configuration, and names of a node's clients."""

TEXT = 2**16
"""Maximal size in bytes of an answer's JSON without what it says of single clients: an announcement, a score, a refusal."""

COUNT = 8

MOST_SAID = 2000
"""Maximal number of quoted characters of a remote text."""

MOST_REASON = 500
"""Maximal number of characters in which a node says why one of its clients gave nothing."""

TEXT_PER_CLIENT = 12 * MOST_REASON + 256
"""What an answer may say of a client beside the name: a reason whose characters all become two escapes."""


def quoted(text: object, most: int = MOST_SAID) -> str:
    r"""Make text of another machine printable: cut, with escaped control characters.

    Example:
        >>> print(quoted("no memory\nround 2: all fine"))
        no memory\nround 2: all fine
    """
    return printable(str(text)[:most])[:most]


def most_answer_text(clients: Iterable[str] = ()) -> int:
    """Return the maximal size in bytes of the JSON of an honest answer that speaks of these clients.

    Example:
        >>> most_answer_text(["ana", "ben"])
        78058
    """
    return TEXT + sum(TEXT_PER_CLIENT + len(json.dumps(name)) for name in clients)


def join_parts(parts: Sequence[bytes]) -> bytes:
    """Return several parts as one: their number, their lengths, and themselves.

    Example:
        >>> split_parts(join_parts([b"ab", b"", b"c"]), 3)
        [b'ab', b'', b'c']
    """
    lengths = [len(parts), *map(len, parts)]
    return b"".join([*(length.to_bytes(COUNT, "little") for length in lengths), *parts])


def joined_size(sizes: Sequence[int]) -> int:
    """Return the size in bytes of joined parts of these sizes.

    Example:
        >>> joined_size([2, 0, 1]) == len(join_parts([b"ab", b"", b"c"]))
        True
    """
    return COUNT * (1 + len(sizes)) + sum(sizes)


def split_parts(data: bytes, most: int) -> list[bytes]:
    """Return the parts that `join_parts` joined, at most `most`.

    Raises:
        WireError: The bytes are something else, or more parts.
    """
    count = int.from_bytes(data[:COUNT], "little")
    begin = COUNT * (1 + count)
    if not 0 <= count <= most or begin > len(data):
        raise WireError(f"{len(data)} bytes are not up to {most} parts of a message")
    lengths = [int.from_bytes(data[at : at + COUNT], "little") for at in range(COUNT, begin, COUNT)]
    if begin + sum(lengths) != len(data):
        raise WireError(f"parts of {begin + sum(lengths)} bytes, and {len(data)} arrived")
    parts = []
    for length in lengths:
        parts.append(data[begin : begin + length])
        begin += length
    return parts


@dataclass(frozen=True)
class Envelope:
    """A message.

    Attributes:
        kind: "hello", "train" or "evaluate"; of an answer the same, or "refused".
        value: Plain JSON data.
        blobs: Adapters in the format of `hetlora.flower.wire.codec`, in the order given by `value`.

    Example:
        >>> Envelope.read(Envelope("train", {"clients": ["ana"]}, [b"..."]).packed())
        Envelope(kind='train', value={'clients': ['ana']}, blobs=[b'...'])
    """

    kind: str
    value: Mapping[str, Any] = field(default_factory=dict)
    blobs: list[bytes] = field(default_factory=list)

    def text(self) -> str:
        """Return kind and value as JSON."""
        return json.dumps({"kind": self.kind, "value": self.value}, allow_nan=False)

    @classmethod
    def of(cls, text: str | bytes, blobs: list[bytes], most_text: int = MOST_TEXT) -> Envelope:
        """Parse the JSON text of an envelope.

        Raises:
            WireError: The text is invalid, or longer than `most_text` bytes.
        """
        size = len(text)
        if isinstance(text, str) and size <= most_text:  # a longer one is not encoded
            size = len(text.encode("utf8", "surrogatepass"))
        if size > most_text:
            raise WireError(f"a text of {size} bytes is over the limit of {most_text}")
        try:
            read = json.loads(text)
            kind, value = read["kind"], read["value"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise WireError(f"no message of hetlora's: {error!r}"[:500]) from error
        if not (isinstance(kind, str) and isinstance(value, dict)):
            raise WireError("no message of hetlora's: a kind and a value are wanted")
        return cls(kind, value, blobs)

    def packed(self) -> bytes:
        """Return the envelope as bytes: the text and the blobs, joined."""
        return join_parts([self.text().encode(), *self.blobs])

    @classmethod
    def read(cls, data: bytes) -> Envelope:
        """Return the envelope that `packed` made.

        Raises:
            WireError: The bytes are no envelope.
        """
        text, *blobs = split_parts(data, 1 + MOST_CLIENTS) or [b""]
        return cls.of(text, blobs)
