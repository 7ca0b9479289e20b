"""Envelopes as the content of Flower's messages: a text, and one array with all adapters.

Flower stores and fetches every array by itself, so that its work grows with their number: a round of 1,000 clients in two
messages took 145 s with an array a client.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from hetlora.errors import WireError
from hetlora.flower.envelope import MOST_CLIENTS, MOST_TEXT, WIRE, Envelope, join_parts, split_parts

__all__ = ["from_record_dict", "to_record_dict"]

STYPE = "hetlora.flower.envelope"
"""Label of the array: adapters in the bytes of `hetlora.flower.wire.codec`, which contain names, shapes and types, joined."""

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
        blobs, stype = [join_parts(blobs)], STYPE
    arrays = {
        f"{index:06d}": Array(dtype="uint8", shape=(len(blob),), stype=stype, data=blob)
        for index, blob in enumerate(blobs)
    }
    return RecordDict({"text": ConfigRecord({"json": envelope.text()}), "adapters": ArrayRecord(arrays)})


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
        blobs = split_parts(found[0].data, MOST_CLIENTS)
    else:
        raise WireError(f"no message of hetlora's: its arrays are not {STYPE!r}")
    return Envelope.of(text, blobs, most_text)
