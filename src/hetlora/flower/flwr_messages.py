"""Envelopes as the content of Flower's messages: a text, and one array with all adapters.

Flower stores and fetches every array by itself, so that its work would grow with the number of clients.

Flower keeps objects by their hash, all nodes' together, and refuses one that somebody has announced before as another. So that
no node can guess and block the objects of others, the text and the beginning of the array are random.
"""

from __future__ import annotations

import json
import os

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from hetlora.errors import WireError
from hetlora.flower.envelope import MOST_CLIENTS, MOST_TEXT, WIRE, Envelope, join_parts, joined_size, split_parts

__all__ = ["adapters_size", "from_record_dict", "to_record_dict"]

STYPE = "hetlora.flower.envelope"
"""Label of the array: adapters in the bytes of `hetlora.flower.wire.codec`, which contain names, shapes and types, joined."""

SALT = 16
"""Random bytes."""

STYPE_2 = "hetlora.flower.wire.codec"
"""Label of an array with one adapter, as in version 2."""


def to_record_dict(envelope: Envelope, wire: object = WIRE) -> RecordDict:
    """Return the content of a message.

    Args:
        envelope: The message.
        wire: The version in which it is written.

    Example:
        >>> from_record_dict(to_record_dict(Envelope("train", {"round": 3}, [b"ab", b"c"])))
        Envelope(kind='train', value={'round': 3}, blobs=[b'ab', b'c'])
    """
    blobs, stype = envelope.blobs, STYPE_2
    if blobs and wire != "2":
        blobs, stype = [join_parts([os.urandom(SALT), *blobs])], STYPE
    arrays = {
        f"{index:06d}": Array(dtype="uint8", shape=(len(blob),), stype=stype, data=blob)
        for index, blob in enumerate(blobs)
    }
    text = json.dumps({**json.loads(envelope.text()), "salt": os.urandom(SALT).hex()})
    return RecordDict({"text": ConfigRecord({"json": text}), "adapters": ArrayRecord(arrays)})


def adapters_size(sizes: list[int]) -> int:
    """Return the size in bytes of the array of adapters of these sizes."""
    return joined_size([SALT, *sizes])


def from_record_dict(content: RecordDict, most_text: int = MOST_TEXT, most_bytes: int | None = None) -> Envelope:
    """Return the envelope in a message's content, of version 2 or 3.

    Args:
        content: The content.
        most_text: Maximal size of its text in bytes.
        most_bytes: Maximal size of its arrays in bytes; None for any.

    Raises:
        WireError: The content is no envelope, or is too long.
    """
    try:
        text, arrays = content["text"]["json"], content["adapters"]
        names = sorted(arrays) if len(arrays) <= MOST_CLIENTS else []
        if names != [f"{index:06d}" for index in range(len(arrays))] or not isinstance(text, str):
            raise WireError("no message of hetlora's: its parts have other names, or are too many")
        found = [arrays[name] for name in names]
        if not all(isinstance(array.data, bytes) for array in found):
            raise WireError("no message of hetlora's: its arrays are not bytes")
        size, stypes = sum(len(array.data) for array in found), {array.stype for array in found}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise WireError(f"no message of hetlora's: {error!r}"[:500]) from error
    if most_bytes is not None and size > most_bytes:
        raise WireError(f"adapters of {size} bytes, where {most_bytes} is the most")
    if stypes <= {STYPE_2}:
        blobs = [array.data for array in found]
    elif stypes == {STYPE} and len(found) == 1:
        _, *blobs = split_parts(found[0].data, 1 + MOST_CLIENTS) or [b""]
    else:
        raise WireError(f"no message of hetlora's: its arrays are not {STYPE!r}")
    return Envelope.of(text, blobs, most_text)
