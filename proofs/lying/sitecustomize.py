"""Make a Flower App lie: Python imports this module at the start of a process that has its folder on the `PYTHONPATH`.

A process of a node with `LIE` in its environment answers every message to train as `LIES[LIE]` does. All other messages are
answered honestly, so that the node's client is one of the federation's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

STYPE = "hetlora.flower.wire.codec"

Content = tuple[Mapping[str, Any], list[bytes]]


def bytes_of(size: int) -> Callable[[list[str]], Content]:
    """Answer with one array of so many bytes."""
    return lambda names: ({"answers": [{"client": name} for name in names]}, [bytes(size)])


def arrays_of(count: int) -> Callable[[list[str]], Content]:
    """Answer with so many small arrays, all different."""
    return lambda names: (
        {"answers": [{"client": name} for name in names]},
        [index.to_bytes(8, "little") for index in range(count)],
    )


def text_of(size: int) -> Callable[[list[str]], Content]:
    """Answer that every client failed, for a reason of so many characters."""
    return lambda names: ({"answers": [{"client": name, "failure": "x" * size} for name in names]}, [])


def silence(_: list[str]) -> Content:
    """Never answer."""
    while True:
        time.sleep(60.0)


LIES: dict[str, Callable[[list[str]], Content]] = {
    "large": bytes_of(300_000_000),
    "arrays": arrays_of(1_000),
    "many-arrays": arrays_of(20_000),
    "text": text_of(7_000_000),
    "silent": silence,
}


def answer(message: Any, _: Any) -> Any:
    """Answer a message to train with a lie."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

    asked = json.loads(message.content["text"]["json"])
    value, blobs = LIES[os.environ["LIE"]](asked["value"]["clients"])
    arrays = {
        f"{index:06d}": Array(dtype="uint8", shape=(len(blob),), stype=STYPE, data=blob)
        for index, blob in enumerate(blobs)
    }
    text = ConfigRecord({"json": json.dumps({"kind": "train", "value": value})})
    return Message(RecordDict({"text": text, "adapters": ArrayRecord(arrays)}), reply_to=message)


def lie() -> None:
    """Register `answer` where an app registers its own function for messages to train."""
    from flwr.clientapp import ClientApp

    honest = ClientApp.train

    def train(self: Any, *arguments: Any, **options: Any) -> Callable[[Any], Any]:
        register = honest(self, *arguments, **options)
        return lambda _: register(answer)

    ClientApp.train = train


if "LIE" in os.environ and any("flwr-clientapp" in word for word in sys.orig_argv):
    lie()
