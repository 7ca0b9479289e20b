"""Messages between server and node, and between a node's processes: JSON with binary blobs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hetlora.errors import WireError, printable

__all__ = ["Envelope", "quoted"]

MOST_TEXT = 2**23
"""Maximal size of the JSON in bytes: a configuration, or names and scores of a node's clients."""

COUNT = 8

MOST_SAID = 2000
"""Maximal number of quoted characters of a remote text."""


def quoted(text: object) -> str:
    r"""Make text of another machine printable: cut, with escaped control characters.

    Example:
        >>> print(quoted("no memory\nround 2: all fine"))
        no memory\nround 2: all fine
    """
    return printable(str(text)[:MOST_SAID])


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
    def of(cls, text: str | bytes, blobs: list[bytes]) -> Envelope:
        """Parse the JSON text of an envelope.

        Raises:
            WireError: The text is invalid.
        """
        size = len(text) if isinstance(text, bytes) else len(text.encode("utf8", "surrogatepass"))
        if size > MOST_TEXT:
            raise WireError(f"a text of {size} bytes is over the limit of {MOST_TEXT}")
        try:
            read = json.loads(text)
            kind, value = read["kind"], read["value"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise WireError(f"no message of hetlora's: {error!r}"[:500]) from error
        if not (isinstance(kind, str) and isinstance(value, dict)):
            raise WireError("no message of hetlora's: a kind and a value are wanted")
        return cls(kind, value, blobs)

    def packed(self) -> bytes:
        """Return the envelope as bytes: the number of parts, their lengths, the text, the blobs."""
        parts = [self.text().encode(), *self.blobs]
        lengths = [len(parts), *map(len, parts)]
        return b"".join([*(length.to_bytes(COUNT, "little") for length in lengths), *parts])

    @classmethod
    def read(cls, data: bytes) -> Envelope:
        """Return the envelope that `packed` made.

        Raises:
            WireError: The bytes are no envelope.
        """
        count = int.from_bytes(data[:COUNT], "little")
        begin = COUNT * (1 + count)
        if not 1 <= count <= len(data) // COUNT or begin > len(data):
            raise WireError(f"{len(data)} bytes are no envelope")
        lengths = [int.from_bytes(data[at : at + COUNT], "little") for at in range(COUNT, begin, COUNT)]
        if begin + sum(lengths) != len(data):
            raise WireError(f"an envelope of {begin + sum(lengths)} bytes, and {len(data)} arrived")
        parts = []
        for length in lengths:
            parts.append(data[begin : begin + length])
            begin += length
        return cls.of(parts[0], parts[1:])
