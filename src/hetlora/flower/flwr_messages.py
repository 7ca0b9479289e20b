"""Envelopes as the content of Flower's messages: a text and one byte array per adapter."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from hetlora.errors import WireError
from hetlora.flower.envelope import Envelope

__all__ = ["from_record_dict", "to_record_dict"]

STYPE = "hetlora.flower.wire.codec"
"""Label of Flower's arrays: bytes of `hetlora.flower.wire.codec`, which contain tensor names, shapes and dtypes."""


def to_record_dict(envelope: Envelope) -> RecordDict:
    """Return the content of a message.

    Example:
        >>> from_record_dict(to_record_dict(Envelope("train", {"round": 3}, [b"ab"])))
        Envelope(kind='train', value={'round': 3}, blobs=[b'ab'])
    """
    arrays = {
        f"{index:06d}": Array(dtype="uint8", shape=(len(blob),), stype=STYPE, data=blob)
        for index, blob in enumerate(envelope.blobs)
    }
    return RecordDict({"text": ConfigRecord({"json": envelope.text()}), "adapters": ArrayRecord(arrays)})


def from_record_dict(content: RecordDict) -> Envelope:
    """Return the envelope in a message's content.

    Raises:
        WireError: The content is no envelope.
    """
    try:
        text, arrays = content["text"]["json"], content["adapters"]
        names = sorted(arrays)
        if names != [f"{index:06d}" for index in range(len(names))] or not isinstance(text, str):
            raise WireError("no message of hetlora's: its parts have other names")
        blobs = [arrays[name].data for name in names]
        if not all(arrays[name].stype == STYPE and isinstance(arrays[name].data, bytes) for name in names):
            raise WireError(f"no message of hetlora's: its arrays are not {STYPE!r}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise WireError(f"no message of hetlora's: {error!r}"[:500]) from error
    return Envelope.of(text, blobs)
