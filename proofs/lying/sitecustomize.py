"""Make a Flower App lie: Python imports this module at the start of a process that has its folder on the `PYTHONPATH`.

A process of a node with `LIE` in its environment answers every message to train as `LIES[LIE]` does. All other messages are
answered honestly, so that the node's client is one of the federation's. Who it is it says when the file `LIE_FROM` is there, so
that the honest nodes are the first.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
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


def late(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Answer as a function does, once the file `LIE_FROM` is there."""

    def answer_late(message: Any, context: Any) -> Any:
        reply = function(message, context)
        while not Path(os.environ["LIE_FROM"]).exists():
            time.sleep(0.2)
        return reply

    return answer_late


def lie() -> None:
    """Register other functions where an app registers its own for messages to train, and for those that ask who it is."""
    from flwr.clientapp import ClientApp

    train, query = ClientApp.train, ClientApp.query
    ClientApp.train = lambda self, *arguments: lambda _: train(self, *arguments)(answer)
    ClientApp.query = lambda self, *arguments: lambda function: query(self, *arguments)(late(function))


if "LIE" in os.environ and any("flwr-clientapp" in word for word in sys.orig_argv):
    lie()
