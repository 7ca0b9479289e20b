"""Malformed answers as Flower messages: one lying and one honest node, through the federation's engine."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.error import Error

from hetlora.core.round import run_round
from hetlora.core.types import Client
from hetlora.flower.engine import FlowerEngine
from hetlora.flower.envelope import Envelope
from hetlora.flower.flwr_messages import to_record_dict
from hetlora.flower.membership import Node
from hetlora.flower.transport import Transport
from proofs.forgery import BYTES
from proofs.grid import LocalGrid, VirtualClock
from proofs.rounds import same

if TYPE_CHECKING:
    from proofs.admission import Scene

__all__ = ["parcel_problem"]

HONEST, LIAR = Node(1, keeps=False), Node(2, keeps=False)


class _Grid(LocalGrid):
    """Two nodes: an honest one and one with given answers."""

    def __init__(self, answers: Callable[[Message], Message | Exception]) -> None:
        super().__init__()
        self.answers = answers
        self.messages: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return [HONEST.number, LIAR.number]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        sent = {self.named(message): message for message in messages}
        self.messages |= sent
        return list(sent)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = [self.answers(self.messages[name]) for name in message_ids]
        for answer in found:
            if isinstance(answer, Exception):
                raise answer
        return found  # type: ignore[return-value]


def parcel_problem(seed: int, place: Scene) -> tuple[str, str | None]:
    """Run the round of a trial; return the kind of lie and the problem, if any."""
    from proofs.admission import HONEST as CLIENTS

    rng = random.Random(f"admission:{seed}")
    kind = rng.choice(sorted(LIES))
    task = place.liar.task
    precision: Any = place.precision

    def answers(message: Message) -> Message | Exception:
        if message.metadata.dst_node_id == LIAR.number:
            return LIES[kind](rng, place, message)
        entries = [{"client": update.client} for update in place.honest]
        return Message(to_record_dict(Envelope("train", {"answers": entries}, list(place.bytes))), reply_to=message)

    def node_of(client: str) -> Node:
        return LIAR if client == task.client else HONEST

    engine = FlowerEngine(Transport(_Grid(answers), clock=VirtualClock()), {"wire": "2"}, node_of, precision)
    liar = Client(task.client, task.rank, 9)
    try:
        after, report = run_round(place.state, place.method, engine, [*CLIENTS, liar])
    except Exception as error:  # noqa: BLE001  that is what must not happen
        return kind, f"the round ended with {error!r}"
    if [client.client for client in report.clients] != [client.name for client in CLIENTS]:
        return kind, f"admitted were {[client.client for client in report.clients]}: {report.failures}"
    if [failure.client for failure in report.failures] != [task.client]:
        return kind, f"{report.failures} should be one of the client that lied"
    if not same(after, place.alone):
        return kind, "the state is not that of the honest clients alone"
    return kind, None


Lie = Callable[[random.Random, "Scene", Message], "Message | Exception"]


def _replied(message: Message, value: Any, blobs: list[bytes]) -> Message:
    return Message(to_record_dict(Envelope("train", value, blobs)), reply_to=message)


def _own(place: Scene, **fields: Any) -> dict[str, Any]:
    return {"answers": [{"client": place.liar.task.client, **fields}]}


def _bad(rng: random.Random, place: Scene) -> bytes:
    return BYTES[rng.choice(sorted(BYTES))](rng, place.liar)


def _text(text: str, message: Message, blobs: ArrayRecord | None = None) -> Message:
    content = RecordDict({"text": ConfigRecord({"json": text}), "adapters": blobs or ArrayRecord({})})
    return Message(content, reply_to=message)


def _array(blob: bytes, name: str, stype: str) -> ArrayRecord:
    return ArrayRecord({name: Array(dtype="uint8", shape=(len(blob),), stype=stype, data=blob)})


LIES: dict[str, Lie] = {
    "malformed bytes": lambda rng, place, message: _replied(message, _own(place), [_bad(rng, place)]),
    "malformed bytes first": lambda rng, place, message: _replied(
        message,
        {"answers": _own(place)["answers"] * 2},
        [_bad(rng, place), place.liar.data],  # a second answer counts no more than the first
    ),
    "no bytes": lambda _, place, message: _replied(message, _own(place), []),
    "too many bytes": lambda _, place, message: _replied(message, _own(place), [place.liar.data + bytes(2**20)]),
    "in another's name": lambda rng, place, message: _replied(
        message, {"answers": [{"client": rng.choice(place.liar.others)}]}, [place.liar.data]
    ),
    "another's update": lambda _, place, message: _replied(
        message,
        _own(place),
        [place.liar.data.replace(b"mallory", b"ana", 1)],
    ),
    "answers that are none": lambda rng, place, message: _replied(
        message,
        rng.choice([{}, {"answers": 1}, {"answers": [None, 1, [], {}]}, {"answers": {"client": "x"}}]),
        [place.liar.data],
    ),
    "a name that is none": lambda rng, place, message: _replied(
        message, {"answers": [{"client": rng.choice([None, 1, [], {}, "\ud800", "mallory "])}]}, [place.liar.data]
    ),
    "a failure": lambda rng, place, message: _replied(
        message, _own(place, failure=rng.choice([None, 1, "\x1b[2J", "x" * 10**5, {"a": []}])), [place.liar.data]
    ),
    "what it lacks": lambda _, place, message: _replied(message, _own(place, lacks="A"), [place.liar.data]),
    "a refusal": lambda rng, _, message: Message(
        to_record_dict(Envelope("refused", {"reason": rng.choice([None, 1, "no memory", "\ud800"])})), reply_to=message
    ),
    "a text that is none": lambda rng, _, message: _text(
        rng.choice(["", "{", "[]", "null", "[" * 10_000, '{"kind": 1, "value": {}}', '{"kind": "train"}']), message
    ),
    "a long text": lambda _, __, message: _text('{"kind": "train", "value": {"a": "' + "x" * 2**23 + '"}}', message),
    "arrays of another kind": lambda rng, place, message: _text(
        Envelope("train", _own(place)).text(),
        message,
        _array(place.liar.data, rng.choice(["000000", "0", "000001", ""]), "numpy.ndarray"),
    ),
    "arrays of other names": lambda rng, place, message: _text(
        Envelope("train", _own(place)).text(),
        message,
        _array(place.liar.data, rng.choice(["0", "000001", ""]), "hetlora.flower.wire.codec"),
    ),
    "no content": lambda _, __, message: Message(RecordDict(), reply_to=message),
    "an error of Flower's": lambda rng, _, message: Message(
        Error(rng.choice([0, 1, 2, 5, 8, 999]), rng.choice(["", "gone", "\x1b"])), reply_to=message
    ),
    "what cannot be unpacked": lambda rng, _, __: rng.choice(
        [
            ValueError("bad object"),
            KeyError(3),
            RecursionError(),
            MemoryError(),
            UnicodeDecodeError("utf8", b"", 0, 1, "x"),
        ]
    ),
}
