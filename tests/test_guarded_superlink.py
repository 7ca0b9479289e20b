"""`hetlora flower superlink`: Flower's own app with the middlewares in it, asked by Flower's own clients, without processes."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import importlib
import itertools
import json
import os
import sqlite3
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs hetlora[flower]")

import httpx
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from fastapi import FastAPI
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from flwr.supercore import sql_mixin
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.version import package_version
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.superlink.main import create_app
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from sqlalchemy.exc import OperationalError

from hetlora.cli import main
from hetlora.errors import HetLoraError
from hetlora.flower import answer_guard, guarded_superlink
from hetlora.flower.answer_limit import answer_limit, answer_limit_text
from hetlora.flower.credentials import check_certificate, write_certificates
from hetlora.flower.envelope import Envelope
from hetlora.flower.guarded_superlink import guard
from hetlora.flower.local_federation import LocalFederation
from hetlora.flower.transport import Transport
from proofs.grid import VirtualClock

MEBI = 2**20
SMALL = 10_000


class Served(httpx.BaseTransport):
    """Asks an app in this process."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app)) as client:
                return await client.post(request.url, headers=request.headers, content=request.read())

        found = asyncio.run(ask())
        return httpx.Response(found.status_code, headers=found.headers, content=found.content, request=request)


class Peer:
    """A node, as Flower's SuperNode speaks for it."""

    def __init__(self, fleet: Any, public: bytes) -> None:
        self.fleet = fleet
        activated = fleet.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=600.0))
        self.node = Node(node_id=activated.node_id)

    def pulled(self) -> Message | None:
        """Return the node's next task, if there is one."""
        messages = self.fleet.PullMessages(PullMessagesRequest(node=self.node)).messages_list
        return message_from_proto(messages[0]) if messages else None

    def pull(self) -> Message:
        """Return the node's next task."""
        message = self.pulled()
        assert message is not None
        return message

    def announce(self, reply: Message, tree: ObjectTree | None = None) -> Any:
        """Send an answer without its objects; `tree` says which they are."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        return self.fleet.PushMessages(
            PushMessagesRequest(
                node=self.node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[tree or get_object_tree(reply)],
            )
        )

    def push(self, run: int, name: str, data: bytes, session: str) -> bool:
        """Send an object of an answer; return whether it is stored."""
        request = PushObjectRequest(node=self.node, run_id=run, object_id=name, object_content=data, session_id=session)
        return bool(self.fleet.PushObject(request).stored)

    def answer(self, reply: Message) -> list[str]:
        """Send an answer; return the objects that were asked for."""
        objects = get_all_nested_objects(reply)
        asked = self.announce(reply)
        for name in asked.objects_to_push:
            assert self.push(reply.metadata.run_id, name, objects[name].deflate(), asked.session_id)
        return list(asked.objects_to_push)


class Federation(Peer):
    """Flower's app with a run and a node, which this is."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.http = httpx.Client(transport=Served(app), base_url="http://superlink")
        self.state = app.state.linkstate_factory.state()
        self.run = self.state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP)
        [info] = self.state.get_run_info(run_ids=[self.run])
        self.task = info.primary_task_id
        token = self.state.claim_task(self.task)
        self.state.activate_task(self.task)
        self.grid = HttpGrid(token=token)
        self.grid.set_run(info)
        versions = RuntimeVersionHttpInterceptor(component_name="test")
        tokens = RuntimeTokenHttpInterceptor(token=token)
        client = RuntimeHttpClient.from_server_address("superlink", True, None, interceptors=[versions, tokens])
        client._client = self.http
        self.grid._client = client
        super().__init__(*self.joining())

    def joining(self) -> tuple[Any, bytes]:
        """Return the client and the public key of another node."""
        keys = generate_key_pairs()
        fleet = fleet_client("superlink", None, keys)
        fleet._client = self.http
        public = public_key_to_bytes(keys[1])
        fleet.RegisterNode(RegisterNodeFleetRequest(public_key=public))
        return fleet, public

    def send(self, group: str, arrays: int = 1, node: Node | None = None) -> str:
        """Send a node a task, as the run's server does, and return its id."""
        message = Message(content(arrays), (node or self.node).node_id, "train", group_id=group)
        [name] = self.grid.push_messages([message])
        return str(name)

    def restart(self) -> None:
        """Forget what the middlewares know."""
        self.app.middleware_stack = None


def fleet_client(address: str, authority: bytes | None, keys: Any) -> Any:
    versions = RuntimeVersionHttpInterceptor(component_name="test")
    signs = NodeAuthHttpInterceptor(*keys)
    return FleetHttpClient.from_server_address(address, authority is None, authority, interceptors=[versions, signs])


def content(arrays: int, size: int = 10) -> RecordDict:
    made = {f"{index:06d}": Array("uint8", (size,), "x", index.to_bytes(size, "little")) for index in range(arrays)}
    return RecordDict({"text": ConfigRecord({"json": "{}"}), "adapters": ArrayRecord(made)})


def many_objects(count: int) -> ObjectTree:
    """Return a tree of an answer's objects, which need not be there."""
    return ObjectTree(
        object_id="f" * 64, children=[ObjectTree(object_id=f"{index:064x}") for index in range(count - 1)]
    )


@pytest.fixture(autouse=True)
def _databases_are_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    engines: list[Any] = []
    create = sql_mixin.create_engine

    def created(*args: Any, **settings: Any) -> Any:
        engines.append(create(*args, **settings))
        return engines[-1]

    monkeypatch.setattr(sql_mixin, "create_engine", created)
    yield
    for engine in engines:
        engine.dispose()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait 20 ms for a locked database. Requests that lock it for each other need the seconds that Flower waits."""
    assert "busy_timeout" in dict(sql_mixin.SQLITE_PRAGMAS)
    quickly = tuple((name, "20" if name == "busy_timeout" else value) for name, value in sql_mixin.SQLITE_PRAGMAS)
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", quickly)


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    monkeypatch.setenv("FLWR_DATABASE", str(tmp_path / "state.db"))
    for place, name in guarded_superlink.HANDLERS:
        module = sys.modules[place]
        monkeypatch.setattr(module, name, guarded_superlink.in_one_transaction(getattr(module, name)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Flower's own, about alembic
        app = create_app()
    guard(app, largest_answer=64 * MEBI)
    made = Federation(app)
    for name, value in (("_run_id", made.run), ("_node_id", SUPERLINK_NODE_ID), ("_task_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)
    return made


def refused(response: pytest.ExceptionInfo[httpx.HTTPStatusError]) -> tuple[int, str]:
    answer = response.value.response
    return answer.status_code, answer.json()["detail"]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the middlewares log."""
    lines: list[str] = []
    monkeypatch.setattr(answer_guard, "log", lambda _, text, *values: lines.append(text % values))
    return lines


def test_the_limit_of_an_answer_is_read_from_the_text_that_says_it():
    assert answer_limit(answer_limit_text("round 3", 5_000_000_000)) == 5_000_000_000
    assert answer_limit(answer_limit_text("hello", 0)) == 0
    for text in ("", "3", "answer <= 5 bytes or so", "answer <= -5 bytes", "answer <= ٣ bytes", "answer <= 5 bytes\n"):
        assert answer_limit(text) is None, text


def test_an_honest_answer_arrives_whole(federation: Federation):
    name = federation.send(answer_limit_text("round 1", SMALL))
    sent = content(1, 2000)
    assert len(federation.answer(Message(sent, reply_to=federation.pull()))) == 5
    [reply] = federation.grid.pull_messages([name])
    assert reply.content["adapters"]["000000"].data == sent["adapters"]["000000"].data


def test_a_server_of_version_2_is_answered_with_an_array_a_client(federation: Federation):
    name = federation.send("", arrays=12)
    assert len(federation.answer(Message(content(12, 20), reply_to=federation.pull()))) == 27
    [reply] = federation.grid.pull_messages([name])
    assert len(reply.content["adapters"]) == 12


def test_an_answer_of_many_objects_is_refused_and_the_runs_server_learns_it_at_once(
    federation: Federation, said: list[str]
):
    name = federation.send(answer_limit_text("round 1", SMALL))
    task = federation.pull()
    for _ in range(2):
        with pytest.raises(httpx.HTTPStatusError) as response:
            federation.announce(Message(content(1, 30), reply_to=task), many_objects(20_005))
        assert refused(response) == (413, "an answer of 20,005 objects was refused; this one has at most 9")
    assert said == [
        f"hetlora: node {federation.node.node_id}: an answer of 20,005 objects was refused; this one has at most 9"
    ]
    assert len(federation.state.object_store) < 20, "nothing of it is stored"
    [reply] = federation.grid.pull_messages([name])
    assert reply.error.reason == "an answer of 20,005 objects was refused; this one has at most 9"
    name = federation.send(answer_limit_text("round 2", SMALL))
    federation.answer(Message(content(1, 40), reply_to=federation.pull()))
    assert next(iter(federation.grid.pull_messages([name]))).has_content()


@pytest.mark.parametrize(
    ("group", "most"),
    [
        (answer_limit_text("round 1", 1), 8 + 1),
        (answer_limit_text("round 1", 5 * MEBI), 8 + 1),
        (answer_limit_text("round 1", 5 * MEBI + 1), 8 + 2),
        (answer_limit_text("round 1", 1000 * MEBI), 8 + 200),
        ("3", 8 + 6 + 13),
    ],
)
def test_an_answer_has_as_many_objects_as_its_size_and_its_message_need(
    group: str, most: int, federation: Federation, said: list[str]
):
    federation.send(group)
    task = federation.pull()
    with pytest.raises(httpx.HTTPStatusError, match="413"):
        federation.announce(Message(content(1, 30), reply_to=task), many_objects(most + 1))
    federation.send(f"again, {group}")
    reply = Message(content(1, 30), reply_to=federation.pull())
    assert len(federation.announce(reply, many_objects(most)).objects_to_push) == most
    assert len(said) == 1


def test_an_array_that_names_a_chunk_more_often_than_it_may_have_chunks_is_refused(
    federation: Federation, said: list[str]
):
    """Equal chunks travel once: 60 MiB of zeros are one of 5 MiB, and would be 60 in the memory of the run's server."""
    federation.send(answer_limit_text("round 1", SMALL))
    task = federation.pull()
    reply = Message(content(1, 12 * 5 * MEBI), reply_to=task)
    with pytest.raises(httpx.HTTPStatusError) as response:
        federation.answer(reply)
    assert refused(response) == (413, "arrays of 12 chunks were refused; this answer has at most 9")
    assert said == [
        f"hetlora: node {federation.node.node_id}: arrays of 12 chunks were refused; this answer has at most 9"
    ]


def test_the_chunks_of_all_arrays_of_an_answer_are_counted_together(federation: Federation):
    federation.send(answer_limit_text("round 1", SMALL))
    task = federation.pull()
    data = {name: name.encode() * (count * 5 * MEBI) for name, count in (("a", 5), ("b", 6))}
    arrays = {name: Array("uint8", (len(each),), "x", each) for name, each in data.items()}
    reply = Message(RecordDict({"adapters": ArrayRecord(arrays)}), reply_to=task)
    with pytest.raises(httpx.HTTPStatusError) as response:
        federation.answer(reply)
    assert refused(response) == (413, "arrays of 11 chunks were refused; this answer has at most 9")


def test_an_object_that_somebody_announced_in_another_way_blocks_nobody_for_good(federation: Federation):
    other = Peer(*federation.joining())
    name = federation.send(answer_limit_text("round 1", SMALL))
    federation.send(answer_limit_text("round 1", SMALL), node=other.node)
    reply = Message(RecordDict({"text": ConfigRecord({"json": "guessed"})}), reply_to=federation.pull())
    lie = ObjectTree(object_id=reply.content["text"].object_id, children=[ObjectTree(object_id=f"{1:064x}")])
    poison = Message(content(1, 40), reply_to=other.pull())
    poison.metadata.__dict__["_message_id"] = poison.object_id
    other.announce(poison, ObjectTree(object_id=poison.object_id, children=[lie]))
    with pytest.raises(httpx.HTTPStatusError) as response:
        federation.answer(reply)
    assert refused(response)[0] == 503, "Flower's SuperNode asks again"
    federation.state.object_store.delete(poison.object_id)  # it was dropped, or its time is over
    federation.answer(reply)
    assert next(iter(federation.grid.pull_messages([name]))).has_content()


def test_nobody_may_say_that_the_empty_record_holds_something(federation: Federation):
    federation.send(answer_limit_text("round 1", SMALL))
    reply = Message(content(1, 30), reply_to=federation.pull())
    nothing = ObjectTree(object_id=ArrayRecord({}).object_id, children=[ObjectTree(object_id=f"{1:064x}")])
    reply.metadata.__dict__["_message_id"] = reply.object_id
    with pytest.raises(httpx.HTTPStatusError) as response:
        federation.announce(reply, ObjectTree(object_id=reply.object_id, children=[nothing]))
    assert refused(response) == (413, "an answer that says of an empty record what it holds was refused")


def test_a_superlink_that_was_started_again_allows_the_largest_answer(federation: Federation):
    federation.send(answer_limit_text("round 1", 1000 * MEBI))
    task = federation.pull()
    federation.restart()
    with pytest.raises(httpx.HTTPStatusError) as response:
        federation.announce(Message(content(1, 30), reply_to=task), many_objects(22))
    assert refused(response) == (413, "an answer of 22 objects was refused; this one has at most 21")


def test_messages_are_remembered_only_if_flower_takes_them_and_the_oldest_are_forgotten(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(answer_guard, "REMEMBERED", 1)
    federation.send(answer_limit_text("round 1", SMALL))
    first = federation.pull()
    federation.send(answer_limit_text("round 1, another", SMALL))
    second = federation.pull()
    stranger = PushAppMessagesRequest(
        messages_list=[message_to_proto(remove_content_from_message(second))], message_object_trees=[ObjectTree()]
    )
    for number in range(3):
        stranger.messages_list[0].metadata.message_id = f"{number:064x}"
        stranger.messages_list[0].metadata.group_id = answer_limit_text("", 10**15)
        sent = {"content": stranger.SerializeToString(), "headers": {"content-type": PROTOBUF_MEDIA_TYPE}}
        assert federation.http.post(answer_guard.TASKS, **sent).status_code == 401
    for task, most in ((first, 21), (second, 9)):
        with pytest.raises(httpx.HTTPStatusError) as response:
            federation.announce(Message(content(1, 30), reply_to=task), many_objects(5000))
        assert refused(response)[1].endswith(f"at most {most}")


def test_a_request_that_nobody_has_signed_is_not_counted_without_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answer_guard, "COUNTED", 100)
    watched = answer_guard.AnswerGuard(FastAPI(), 10**6)
    request = PushAppMessagesRequest()
    for number, limit in enumerate(("", answer_limit_text("train", 5), "", "")):
        message = request.messages_list.add()
        message.metadata.message_id, message.metadata.group_id = str(number), limit
        request.message_object_trees.append(many_objects(60))
    assert watched._new_tasks(request) == {"0": (None, 60), "1": (5, 0), "2": (None, 39)}, "every message has its limit"
    del request.message_object_trees[-1]
    assert watched._new_tasks(request) == {}


def test_a_node_sends_one_answer_of_its_own_at_a_time(federation: Federation, said: list[str]):
    federation.send(answer_limit_text("round 1", SMALL))
    other = Peer(*federation.joining()).node
    federation.send(answer_limit_text("round 1", SMALL), node=other)
    task = federation.pull()
    honest = Message(content(1, 30), reply_to=task)
    honest.metadata.__dict__["_message_id"] = honest.object_id
    proto, tree = message_to_proto(remove_content_from_message(honest)), get_object_tree(honest)
    forged, order = (message_to_proto(remove_content_from_message(honest)) for _ in range(2))
    forged.metadata.src_node_id = other.node_id
    order.metadata.reply_to_message_id = ""
    order.metadata.src_node_id, order.metadata.dst_node_id = SUPERLINK_NODE_ID, other.node_id
    before = federation.state.num_message_ins(), federation.state.num_message_res()
    for messages, trees, why in (
        ([proto, proto], [tree, tree], "2 messages with 2 trees of objects were refused; an answer is one of each"),
        ([proto], [], "1 messages with 0 trees of objects were refused; an answer is one of each"),
        ([], [], "0 messages with 0 trees of objects were refused; an answer is one of each"),
        ([forged], [tree], "a message that is no answer of this node was refused"),
        ([order], [tree], "a message that is no answer of this node was refused"),
    ):
        request = PushMessagesRequest(node=federation.node, messages_list=messages, message_object_trees=trees)
        with pytest.raises(httpx.HTTPStatusError) as response:
            federation.fleet.PushMessages(request)
        assert refused(response) == (413, why)
    assert (federation.state.num_message_ins(), federation.state.num_message_res()) == before
    assert len(said) == 1


def test_who_is_no_node_is_refused_by_flower_and_not_named_in_the_log(federation: Federation, said: list[str]):
    federation.send(answer_limit_text("round 1", SMALL))
    task = federation.pull()
    federation.fleet, _ = federation.joining()  # its signature is not that of the node that it names
    with pytest.raises(httpx.HTTPStatusError) as response:
        federation.announce(Message(content(1, 30), reply_to=task), many_objects(500))
    assert refused(response) == (401, "Invalid SuperNode authentication")
    assert said == []


def test_what_is_no_request_is_refused_by_flower(federation: Federation):
    for path in (answer_guard.ANSWERS, answer_guard.TASKS):
        sent = {"content": b"\xff" * 100, "headers": {"content-type": PROTOBUF_MEDIA_TYPE}}
        response = federation.http.post(path, **sent)
        assert response.status_code == 400, response.text


# Bodies -------------------------------------------------------------------------------------------------------------


def asked(app: Any, path: str, events: Iterator[dict[str, Any]]) -> tuple[int | None, bytes]:
    """Return what an app answers to a request that comes in parts, and the parts that it has not asked for."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return next(events)

    async def send(event: Any) -> None:
        sent.append(event)

    asyncio.run(app({"type": "http", "method": "POST", "path": path, "headers": []}, receive, send))
    return (sent[0]["status"], sent[1]["body"]) if sent else (None, b"")


async def echo(_: Any, receive: Any, send: Any) -> None:
    """Answer a request with the size of its body, as often as it comes."""
    event = await receive()
    assert event["type"] == "http.request"
    assert not event["more_body"]
    assert (await receive())["type"] == "http.disconnect"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(len(event["body"])).encode()})


def parts(size: int, each: int = MEBI) -> Iterator[dict[str, Any]]:
    for begin in range(0, size, each):
        yield {"type": "http.request", "body": b"x" * min(each, size - begin), "more_body": begin + each < size}
    yield {"type": "http.disconnect"}


@pytest.mark.parametrize(
    ("path", "most"),
    [
        ("/v1/fleet/push-object", 5 * MEBI + 64 * 1024),
        ("/v1/fleet/pull-messages", MEBI),
        ("/v1/fleet/what-a-later-flower-has", MEBI),
        ("/v1/control/start-run", 64 * MEBI),
    ],
)
def test_a_body_is_bounded_while_it_is_read(path: str, most: int, said: list[str]):
    guarded = answer_guard.AnswerGuard(echo, MEBI)
    assert asked(guarded, path, parts(most)) == (200, str(most).encode())
    status, body = asked(guarded, path, parts(most + 1))
    assert status == 413
    assert json.loads(body) == {"detail": f"a request of more than {most:,} bytes to '{path}' was refused"}
    assert said == [f"hetlora: a request of more than {most:,} bytes to '{path}' was refused"]


def test_an_answers_own_body_is_bounded_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answer_guard, "PushMessagesRequest", None)
    status, _ = asked(answer_guard.AnswerGuard(echo, MEBI), answer_guard.ANSWERS, parts(2 * MEBI + 1))
    assert status == 413


def test_what_is_too_large_is_not_kept_while_the_rest_of_it_comes():
    def endless() -> Iterator[dict[str, Any]]:
        yield from itertools.islice(parts(10**12), 300)
        yield {"type": "http.request", "body": b"", "more_body": False}

    guarded = answer_guard.AnswerGuard(echo, MEBI)
    tracemalloc.start()
    try:
        assert asked(guarded, answer_guard.OBJECTS, endless())[0] == 413
        assert tracemalloc.get_traced_memory()[1] < 10 * MEBI
    finally:
        tracemalloc.stop()


def test_a_request_whose_sender_goes_is_dropped():
    def gone() -> Iterator[dict[str, Any]]:
        yield {"type": "http.request", "body": b"x", "more_body": True}
        yield {"type": "http.disconnect"}

    assert asked(answer_guard.AnswerGuard(echo, MEBI), answer_guard.OBJECTS, gone()) == (None, b"")


# A busy database ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")  # before the federation's database is opened
def test_a_locked_database_is_a_reason_to_ask_again(tmp_path: Path, federation: Federation, said: list[str]):
    federation.send(answer_limit_text("round 1", SMALL))
    holder = sqlite3.connect(tmp_path / "state.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(httpx.HTTPStatusError) as response:
        federation.pull()
    assert refused(response) == (503, "the database is locked; ask again")
    assert said == ["hetlora: the database is locked, at /v1/fleet/pull-messages; who asked is to ask again"]
    holder.execute("ROLLBACK")
    holder.close()
    assert federation.pull().metadata.message_type == "train"


@pytest.mark.usefixtures("impatient")
def test_an_object_of_a_task_that_finds_the_database_locked_is_to_be_sent_again(tmp_path: Path, federation: Federation):
    """Flower by itself says that it has not stored the object, which ends the run."""
    task = Message(content(1), federation.node.node_id, "train")
    task.metadata.__dict__["_message_id"] = task.object_id
    client = federation.grid._runtime_client
    announced = client.PushMessages(
        PushAppMessagesRequest(
            messages_list=[message_to_proto(remove_content_from_message(task))],
            message_object_trees=[get_object_tree(task)],
        )
    )
    [name, *_] = announced.objects_to_push
    request = PushObjectRequest(
        node=Node(node_id=SUPERLINK_NODE_ID),
        run_id=federation.run,
        object_id=name,
        object_content=get_all_nested_objects(task)[name].deflate(),
        session_id=announced.session_id,
    )
    with contextlib.closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(httpx.HTTPStatusError) as response:
            client.PushObject(request)
    assert refused(response) == (503, "the database is locked; ask again")
    assert client.PushObject(request).stored


def test_a_task_of_which_an_object_was_not_stored_arrives_whole_when_it_is_sent_again(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
):
    """Over `flower-superlink` itself, which says so where its database is locked."""
    store, failed = federation.state.store_object, []

    def fails_once(*args: Any) -> bool:
        if not failed:
            failed.append(args)
            return False
        return bool(store(*args))

    monkeypatch.setattr(federation.state, "store_object", fails_once)
    sent = Envelope("train", {"round": 1}, [b"ab"])
    transport = Transport(federation.grid, clock=VirtualClock())
    assert isinstance(transport.send(sent, federation.node.node_id, 60.0), str)
    assert failed
    task = federation.pull()
    assert federation.pulled() is None, "one task, although it was announced twice"
    objects = federation.state.object_store
    left = [objects.get_object_tree(task.metadata.message_id)]
    while left:
        tree = left.pop()
        assert objects.get(tree.object_id), "stored, and not only announced"
        left.extend(tree.children)


def test_a_full_disk_is_a_reason_to_ask_again_too(said: list[str]):
    async def app(*_: Any) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = 13
        raise OperationalError("insert", {}, error)

    status, body = asked(answer_guard.BusyDatabase(app), "/v1/fleet/push-object", parts(1))
    assert (status, json.loads(body)) == (503, {"detail": "the database has no room on its disk; ask again"})
    assert said == [
        "hetlora: the database has no room on its disk, at /v1/fleet/push-object; who asked is to ask again"
    ]


@pytest.mark.parametrize(
    ("error", "begun"),
    [
        (sqlite3.OperationalError("no such table"), False),
        (sqlite3.OperationalError("database is locked"), True),
    ],
)
def test_any_other_error_stays_what_it_is(error: sqlite3.OperationalError, begun: bool):
    error.sqlite_errorcode = 5 if begun else 1

    async def app(_: Any, __: Any, send: Any) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise OperationalError("select", {}, error)

    with pytest.raises(OperationalError):
        asked(answer_guard.BusyDatabase(app), "/", parts(1))


def test_what_is_asked_again_is_still_there(federation: Federation, monkeypatch: pytest.MonkeyPatch):
    """Flower takes a message, or stores an object, in one transaction, and fails in the next."""

    def fails_once(name: str) -> None:
        method = getattr(federation.state, name)
        error = sqlite3.OperationalError("database is locked")
        error.sqlite_errorcode = 5

        def failing(*_: Any, **__: Any) -> Any:
            monkeypatch.setattr(federation.state, name, method)
            raise OperationalError("update", {}, error)

        monkeypatch.setattr(federation.state, name, failing)

    name = federation.send(answer_limit_text("round 1", SMALL))
    fails_once("store_traffic")
    with pytest.raises(httpx.HTTPStatusError, match="503"):
        federation.pull()
    reply = Message(content(1, 30), reply_to=federation.pull())
    objects = get_all_nested_objects(reply)
    fails_once("store_traffic")
    with pytest.raises(httpx.HTTPStatusError, match="503"):
        federation.announce(reply)
    asked = federation.announce(reply)
    for wanted in asked.objects_to_push:
        pushed = (federation.run, wanted, objects[wanted].deflate(), asked.session_id)
        fails_once("store_traffic")
        with pytest.raises(httpx.HTTPStatusError, match="503"):
            federation.push(*pushed)
        assert federation.push(*pushed)
    fails_once("delete_messages")
    with pytest.raises(httpx.HTTPStatusError, match="503"):
        federation.grid.pull_messages([name])
    [reply] = federation.grid.pull_messages([name])
    assert reply.has_content()


def test_a_refusal_of_flowers_keeps_what_flower_has_tidied_up(federation: Federation):
    federation.send(answer_limit_text("round 1", SMALL))
    federation.state.finish_task(federation.task, "stopped", "")
    assert len(federation.state.object_store) > 0
    with pytest.raises(httpx.HTTPStatusError, match="403"):
        federation.push(federation.run, "a" * 64, b"", "")
    assert len(federation.state.object_store) == 0


# The command --------------------------------------------------------------------------------------------------------

COMMAND, MAIN = (importlib.import_module(name) for name in (guarded_superlink.COMMAND, guarded_superlink.MAIN))


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Return the exit code of `hetlora flower superlink`, whose process would stay as it is left."""
    monkeypatch.setattr(sys, "argv", ["hetlora"])
    monkeypatch.setenv("FLWR_INTERNAL_GRPC_FLEET_API", "1")
    return main(["flower", "superlink", *words])


def test_the_command_gives_flower_its_options_and_serves_its_app_with_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    served: list[Any] = []
    monkeypatch.setattr(COMMAND.uvicorn, "run", lambda **settings: served.append(settings))
    monkeypatch.setattr(COMMAND, "warn_if_flwr_update_available", lambda **_: None)
    monkeypatch.setattr(COMMAND, "event", lambda *_: None)
    before = [getattr(sys.modules[place], name) for place, name in guarded_superlink.HANDLERS]
    words = ["--insecure", "--port", "9511", "--largest-answer", "7", "--isolation=process", "--host", "127.0.0.1"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert command(monkeypatch, *words, "--database", str(tmp_path / "state.db")) == 0
    [settings] = served
    assert (settings["host"], settings["port"]) == ("127.0.0.1", 9511)
    first, *_, last = [one for one in settings["app"].user_middleware if one.cls.__module__.startswith("hetlora")]
    assert (first.cls, first.kwargs) == (answer_guard.AnswerGuard, {"largest_answer": 7_000_000})
    assert last.cls is answer_guard.BusyDatabase
    assert os.environ["FLWR_INTERNAL_GRPC_FLEET_API"] == "0", "another way in, without limits"
    assert MAIN.create_app is create_app
    assert [getattr(sys.modules[place], name) for place, name in guarded_superlink.HANDLERS] == before


@pytest.mark.parametrize(
    ("host", "days", "why"),
    [
        ("0.0.0.0", 0, None),
        ("127.0.0.1", 0, None),
        ("server.example.org", 0, None),
        ("0.0.0.0", 31, r"server\.crt expired on 20..-..-..; make another one"),
        (
            "0.0.0.0",
            -1,
            r"server\.crt is valid from 20..-..-.. ..:.. UTC on, and here it is 20..-..-.. ..:..; set the clock",
        ),
        (
            "10.0.0.5",
            0,
            r"server\.crt holds localhost, 127\.0\.0\.1 and not 10\.0\.0\.5, by which .* add IP:10\.0\.0\.5 to",
        ),
        ("::", 0, r"and not ::1, by which"),
    ],
)
def test_a_certificate_with_which_no_run_would_begin_is_refused(host: str, days: int, why: str | None, tmp_path: Path):
    write_certificates(tmp_path)
    now = dt.datetime.now(dt.UTC) + dt.timedelta(days=days)
    with contextlib.nullcontext() if why is None else pytest.raises(HetLoraError, match=why):
        check_certificate(tmp_path / "server.crt", host, now)


def test_a_superlink_does_not_start_on_a_certificate_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write_certificates(tmp_path)
    monkeypatch.setattr(COMMAND, "warn_if_flwr_update_available", lambda **_: None)
    monkeypatch.setattr(COMMAND, "event", lambda *_: None)
    files = {"ca-certfile": "ca.crt", "certfile": "server.crt", "keyfile": "server.key"}
    words = [word for name, file in files.items() for word in (f"--ssl-{name}", str(tmp_path / file))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert command(monkeypatch, *words, "--host", "10.0.0.5", "--database", str(tmp_path / "state.db")) == 2
    assert "server.crt holds localhost, 127.0.0.1 and not 10.0.0.5" in capsys.readouterr().err


def test_the_end_of_what_starts_the_runs_is_said_unless_the_superlink_ends(monkeypatch: pytest.MonkeyPatch):
    lines: list[str] = []
    monkeypatch.setattr(guarded_superlink, "log", lambda _, text, *values: lines.append(text % values))
    monkeypatch.setattr(guarded_superlink, "ENDING", 0.0)
    ended = SimpleNamespace(wait=lambda: 7)
    lifespan = SimpleNamespace(superexec_process=ended)
    guarded_superlink._watch_superexec(lifespan)
    assert lines == ["hetlora: flower-superexec ended with 7: no run begins until this SuperLink is started again"]
    ended.wait = lambda: setattr(lifespan, "superexec_process", None)
    guarded_superlink._watch_superexec(lifespan)
    assert len(lines) == 1


def test_the_handlers_that_are_served_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []

    def start() -> None:
        seen.extend(getattr(sys.modules[place], name).__qualname__ for place, name in guarded_superlink.HANDLERS)

    monkeypatch.setattr(COMMAND, "flower_superlink", start)
    assert command(monkeypatch) == 0
    assert seen == ["in_one_transaction.<locals>.handled"] * len(guarded_superlink.HANDLERS)


@pytest.mark.parametrize("words", [("--largest-answer", "0"), ("--largest-answer=-1",), ("--largest-answer", "nan")])
def test_a_wrong_size_is_one_line(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert command(monkeypatch, *words) == 2
    given = words[-1].rpartition("=")[2]
    assert capsys.readouterr().err == f"hetlora: --largest-answer {given}: give megabytes, such as 512\n"


def test_help_shows_flowers_options_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, "--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "--largest-answer MB" in shown
    assert "--enable-supernode-auth" in shown


def without_route(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(config: Any = None, superlink_lifespan_class: Any = None) -> Any:  # noqa: ARG001  Flower's names
        return FastAPI()

    monkeypatch.setattr(MAIN, "create_app", create)
    monkeypatch.setattr(COMMAND, "flower_superlink", lambda: MAIN.create_app())


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (lambda patch: patch.delattr(MAIN, "create_app"), "function create_app(config, superlink_lifespan_class)"),
        (lambda patch: patch.setattr(MAIN, "create_app", lambda config: config), "function create_app(config, "),
        (lambda patch: patch.delattr(COMMAND, "_run_superlink_http_api"), "use of flwr.superlink.main.create_app"),
        (
            lambda patch: patch.setattr(COMMAND, "_run_superlink_http_api", lambda: 1),
            "use of flwr.superlink.main.create",
        ),
        (lambda patch: patch.delattr(COMMAND, "flower_superlink"), "function flower_superlink()"),
        (
            lambda patch: patch.setattr(COMMAND, "flower_superlink", lambda options: options),
            "function flower_superlink()",
        ),
        (lambda patch: patch.delattr(fleet_handlers, "push_object"), "function push_object(request, state, "),
        (lambda patch: patch.setitem(sys.modules, "flwr.superlink.main", None), "module flwr.superlink.main"),
        (without_route, "request /v1/runtime/push-messages"),
        (
            lambda patch: patch.delitem(PROTOBUF_REQUEST_TYPES, ("POST", answer_guard.ANSWERS)),
            "request /v1/fleet/push-messages",
        ),
        (lambda patch: patch.setattr(guarded_superlink, "http_error_translator", print), "middleware http_error_"),
    ],
)
def test_a_flower_that_has_changed_is_not_started(
    change: Callable[[pytest.MonkeyPatch], None],
    missing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("FLWR_DATABASE", str(tmp_path / "state.db"))
    monkeypatch.setattr(COMMAND, "flower_superlink", lambda: MAIN.create_app())
    change(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert command(monkeypatch) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"hetlora: Flower {package_version} has no {missing}")
    assert said.endswith("; start flower-superlink, which then has no limits on answers")


@pytest.mark.process
def test_the_superlink_loads_no_torch():
    script = "import sys, hetlora.flower.guarded_superlink; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at /proc")
def test_a_superlink_with_tls_and_keys_outlives_a_node_that_answers_with_20000_objects(tmp_path: Path):
    app = tmp_path / "app"
    app.mkdir()
    for name, text in APP.items():
        (app / name).write_text(text, encoding="utf8")
    with LocalFederation(tmp_path / "local") as local, contextlib.ExitStack() as open_clients:
        peers = []
        for name in ("hostile", "honest"):
            local.register(name)
            private = load_ssh_private_key((local.folder / name).read_bytes(), None)
            keys = (private, private.public_key())
            fleet = fleet_client(f"127.0.0.1:{local.port}", (local.folder / "ca.crt").read_bytes(), keys)
            open_clients.callback(fleet.close)
            peers.append(Peer(fleet, public_key_to_bytes(keys[1])))
        hostile, honest = peers
        superlink = local.processes["superlink"]
        maps = Path(f"/proc/{superlink.pid}/maps").read_text("utf8")
        assert "libtorch" not in maps
        run = local.run(app, f'hostile="{hostile.node.node_id}" honest="{honest.node.node_id}"')
        for number in range(2):
            task = local.wait_for(hostile.pulled, "the hostile node's task")
            with pytest.raises(httpx.HTTPStatusError) as response:
                hostile.announce(Message(content(1), reply_to=task), many_objects(20_000))
            assert refused(response) == (413, "an answer of 20,000 objects was refused; this one has at most 9")
            task = local.wait_for(honest.pulled, "the honest node's task")
            honest.answer(Message(content(1, 20 + number), reply_to=task))
        local.wait_for(lambda: local.status(run).startswith("finished"), "the run to end")
        shown = local.flwr("log", str(run), "here", "--show")
        assert local.status(run) == "finished:completed", shown
        assert superlink.poll() is None
        for number in range(2):
            assert (
                f"round {number}: refused ['an answer of 20,000 objects was refused; this one has at most 9']" in shown
            )
            assert f"round {number}: answers of [{20 + number}] bytes" in shown
        line = f"hetlora: node {hostile.node.node_id}: an answer of 20,000 objects was refused; this one has at most 9"
        assert local.log("superlink").count(line) == 1
        assert "500 Internal Server Error" not in local.log("superlink")


APP = {
    "pyproject.toml": """
[project]
name = "app"
version = "1.0"

[tool.flwr.app]
publisher = "hetlora"

[tool.flwr.app.components]
serverapp = "server:app"
clientapp = "server:app"

[tool.flwr.app.config]
hostile = ""
honest = ""
""",
    "server.py": """
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    nodes = [int(context.run_config[name]) for name in ("hostile", "honest")]
    for number in range(2):
        content = RecordDict({"text": ConfigRecord({"json": str(number)})})
        group = f"round {number}, answer <= 1000 bytes"
        sent = [Message(content, node, "train", group_id=group) for node in nodes]
        replies = list(grid.send_and_receive(sent, timeout=120))
        print(f"round {number}: refused", [one.error.reason for one in replies if one.has_error()], flush=True)
        sizes = [len(one.content["adapters"]["000000"].data) for one in replies if one.has_content()]
        print(f"round {number}: answers of", sizes, "bytes", flush=True)
""",
}
"""A Flower App whose server asks two nodes twice."""
