"""Middlewares for Flower's SuperLink: limits on what nodes send, and a busy database that ends nothing.

`flower-superlink` takes an answer of any size and of any number of objects, and keeps it, before the server of a run can
refuse it. A middleware in front of Flower's app bounds each request while it is read, and each answer by what its message
allows (`hetlora.flower.answer_limit`). Another one lets Flower's own processes repeat a request that found the database
locked, where Flower would answer with a fatal error.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from logging import WARNING
from typing import Any, NamedTuple

from flwr.app import Array, ArrayRecord, Error
from flwr.app.message import make_message
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from flwr.supercore import log
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_tree,
    get_object_type_from_object_content,
)
from google.protobuf.message import DecodeError
from sqlalchemy.exc import OperationalError

from hetlora.flower.answer_limit import answer_limit

__all__ = ["ANSWERS", "OBJECTS", "TASKS", "AnswerGuard", "BusyDatabase"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

TASKS = "/v1/runtime/push-messages"
ANSWERS = "/v1/fleet/push-messages"
OBJECTS = "/v1/fleet/push-object"

MEBI = 2**20

NOTHING = ArrayRecord({}).object_id
"""Id of the record without arrays, which many messages have."""

OTHERWISE = "was preregistered with different children"
"""In Flower's error of an object that somebody has announced with other parts, until that one has been fetched or dropped."""

BODIES = (
    (TASKS, 4 * MEBI),  # ids, too
    (ANSWERS, 2 * MEBI),  # ids of 30,000 objects; the adapters come as objects
    (OBJECTS, CHUNK + 64 * 1024),
    ("/v1/fleet/", MEBI),
    ("", 64 * MEBI),  # what the run's server and `flwr` send: objects, and a Flower App of at most 10 MB
)
"""Beginnings of paths, the first that fits counts, and the most bytes of a request's body."""

BESIDE = 8
"""Objects of an answer beside arrays: message, records and text are four."""

COUNTED = 100_000
"""Objects of a request after which counting ends."""

REMEMBERED = 100_000
"""Messages whose limits are remembered."""

QUIET = 60.0
"""Seconds in which the same is not logged again."""

PASSING = {5: "is locked", 6: "is locked", 13: "has no room on its disk"}
"""SQLite's primary codes for what may be over soon: somebody else is writing, or the disk is full."""


class _Task(NamedTuple):
    """What is known of a message to a node: bytes of the largest answer, or None and its own number of objects."""

    limit: int | None
    objects: int


class _Session(NamedTuple):
    """What is known of an answer whose objects arrive: the most chunks of all of its arrays, and those of each that came."""

    most: int
    chunks: dict[str, int]


class _TooLargeError(Exception):
    """A body has more bytes than it may have."""


class _Said:
    """Logs a line, and its like only after a while."""

    def __init__(self) -> None:
        self._when: dict[object, float] = {}

    def say(self, about: object, line: str) -> None:
        """Log a line, unless one about the same was logged within QUIET seconds."""
        now = time.monotonic()
        if now - self._when.get(about, -QUIET) < QUIET:
            return
        self._when.pop(about, None)
        self._when[about] = now
        while len(self._when) > REMEMBERED:
            del self._when[next(iter(self._when))]
        log(WARNING, "hetlora: %s", line)


class AnswerGuard:
    """The outermost middleware: bounds bodies, and the objects of answers.

    An answer may have `BESIDE` objects, and one for each chunk of Flower's that its size in bytes needs. Where its message does
    not say, as in version 2, it may have as many more as the message has: an array for each client.

    Args:
        app: Flower's app.
        largest_answer: Bytes that an answer may have where its message does not say.
    """

    def __init__(self, app: App, largest_answer: int) -> None:
        self.app = app
        self.largest_answer = largest_answer
        self._tasks: dict[str, _Task] = {}
        self._sessions: dict[str, _Session] = {}
        self._said = _Said()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on as it came."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        most = next(most for begins, most in BODIES if path.startswith(begins))
        try:
            body = await _body(receive, most)
        except _TooLargeError:
            line = f"a request of more than {most:,} bytes to {path[:80]!r} was refused"
            self._said.say(most, line)
            await _respond(send, 413, line)
            return
        if body is None:
            return  # who sent it has gone
        if path == OBJECTS and (problem := self._repeated(body)):
            await _respond(send, 413, problem)
        elif path == TASKS:
            await self._task(scope, receive, send, body)
        elif path == ANSWERS:
            await self._answer(scope, receive, send, body)
        else:
            await self.app(scope, _replay(body, receive), send)

    async def _task(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """Hand on messages to nodes, and remember what may come back."""
        request = PushAppMessagesRequest()
        with contextlib.suppress(DecodeError):  # Flower refuses it
            request.ParseFromString(body)
        # Before it is stored, because a node could answer before this request has ended. What is known stays, and what Flower
        # refuses is forgotten: anybody may send such a request.
        new = self._new_tasks(request)
        self._tasks.update(new)
        stored = False

        async def watched(event: MutableMapping[str, Any]) -> None:
            nonlocal stored
            stored = stored or event.get("status") == 200
            await send(event)

        try:
            await self.app(scope, _replay(body, receive), watched)
        finally:
            for name in () if stored else new:
                self._tasks.pop(name, None)
            while len(self._tasks) > REMEMBERED:
                del self._tasks[next(iter(self._tasks))]

    def _new_tasks(self, request: PushAppMessagesRequest) -> dict[str, _Task]:
        """Return what is to be remembered of messages; of COUNTED objects in all, since nobody has signed the request yet."""
        new: dict[str, _Task] = {}
        if len(request.messages_list) != len(request.message_object_trees):
            return new  # Flower refuses it
        left = COUNTED
        for message, tree in zip(request.messages_list, request.message_object_trees, strict=True):
            limit, name = answer_limit(message.metadata.group_id), message.metadata.message_id
            objects = 0 if limit is not None else _count(tree, left)
            left -= max(1, objects)
            if left < 0:
                break
            if name not in self._tasks:
                new[name] = _Task(limit, objects)
        return new

    async def _answer(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """Hand on a node's answer, or refuse it."""
        request = PushMessagesRequest()
        try:
            request.ParseFromString(body)
        except DecodeError:
            await self.app(scope, _replay(body, receive), send)  # Flower refuses it
            return
        if not (problem := _not_one_answer(request)):
            task = self._tasks.get(request.messages_list[0].metadata.reply_to_message_id, _Task(None, 0))
            limit = self.largest_answer if task.limit is None else task.limit
            most = BESIDE + task.objects + math.ceil(limit / CHUNK)
            objects = _count(request.message_object_trees[0], COUNTED)
            if objects <= most and not (problem := _impostor(request.message_object_trees[0])):
                await self._accepted(scope, receive, send, body, most)
                return
            more = "more than " if objects >= COUNTED else ""
            problem = problem or f"an answer of {more}{objects:,} objects was refused; this one has at most {most:,}"
            status, headers, said = await self._give_up(scope, receive, request, problem)
            if status != 200:  # of a stranger, of a run that has ended, or with a busy database: Flower says it
                await send({"type": "http.response.start", "status": status, "headers": headers})
                await send({"type": "http.response.body", "body": said})
                return
        self._said.say(request.node.node_id, f"node {request.node.node_id}: {problem}")
        await _respond(send, 413, problem)

    async def _accepted(self, scope: Scope, receive: Receive, send: Send, body: bytes, most: int) -> None:
        """Hand on an answer, and remember how many objects those that it announces may refer to."""
        said: list[bytes] = []
        status = None

        async def watched(event: MutableMapping[str, Any]) -> None:
            nonlocal status
            status = event.get("status", status)
            said.append(event.get("body", b""))
            ended = event["type"] == "http.response.body" and not event.get("more_body", False)
            if ended and status == 200:  # before the node reads it, and sends its objects
                self._sessions[PushMessagesResponse.FromString(b"".join(said)).session_id] = _Session(most, {})
            await send(event)

        await self.app(scope, _replay(body, receive), watched)
        while len(self._sessions) > REMEMBERED:
            del self._sessions[next(iter(self._sessions))]

    def _repeated(self, body: bytes) -> str:
        """Return why an object is refused: with it the arrays of its answer have more chunks than the answer may have.

        Equal chunks are sent once, and arrays name them as often as they have them: a chunk of zeros could become terabytes.
        """
        request = PushObjectRequest()
        with contextlib.suppress(DecodeError, ValueError):  # Flower refuses it
            request.ParseFromString(body)
            if get_object_type_from_object_content(request.object_content) != Array.__qualname__:
                return ""
            try:
                chunks = len(json.loads(get_object_body(request.object_content, Array))["arraychunk_ids"])
            except (ValueError, KeyError, TypeError, RecursionError):
                return "an array without a list of its chunks was refused"
            # Of an answer that nobody has announced here, as after a restart, each array is looked at alone.
            unknown = _Session(BESIDE + math.ceil(self.largest_answer / CHUNK), {})
            session = self._sessions.get(request.session_id, unknown)
            session.chunks[request.object_id] = max(1, chunks)  # by object, which may be sent again
            if (total := sum(session.chunks.values())) > session.most:
                problem = f"arrays of {total:,} chunks were refused; this answer has at most {session.most:,}"
                self._said.say((request.node.node_id, "array"), f"node {request.node.node_id}: {problem}")
                return problem
        return ""

    async def _give_up(
        self, scope: Scope, receive: Receive, request: PushMessagesRequest, problem: str
    ) -> tuple[int, Headers, bytes]:
        """Send an error in a node's place, with its signature, so that the run's server need not wait for the answer."""
        message = make_message(
            metadata_from_proto(request.messages_list[0].metadata),
            error=Error(code=ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason=problem),
        )
        message.metadata.__dict__["_message_id"] = name = message.object_id  # as Flower's own SuperNode does it
        pushed = PushMessagesRequest(
            node=request.node,
            messages_list=[message_to_proto(message)],
            message_object_trees=[get_object_tree(message)],
        )
        status, headers, said = await self._ask(scope, receive, ANSWERS, pushed.SerializeToString())
        if status == 200:
            response = PushMessagesResponse.FromString(said)
            if name in response.objects_to_push:
                content = PushObjectRequest(
                    node=request.node,
                    run_id=message.metadata.run_id,
                    object_id=name,
                    object_content=message.deflate(),
                    session_id=response.session_id,
                )
                await self._ask(scope, receive, OBJECTS, content.SerializeToString())
        return status, headers, said

    async def _ask(self, scope: Scope, receive: Receive, path: str, body: bytes) -> tuple[int, Headers, bytes]:
        """Return the response of Flower's app to another request with a request's headers."""
        headers = [header for header in scope["headers"] if header[0].lower() != b"content-length"]
        asked = {
            **scope,
            "path": path,
            "raw_path": path.encode(),
            "headers": [*headers, (b"content-length", str(len(body)).encode())],
            "state": dict(scope.get("state", {})),  # Flower keeps the parsed request there
        }
        events: list[MutableMapping[str, Any]] = []

        async def kept(event: MutableMapping[str, Any]) -> None:
            events.append(event)

        await self.app(asked, _replay(body, receive), kept)
        start = next(event for event in events if event["type"] == "http.response.start")
        return start["status"], list(start.get("headers", ())), b"".join(event.get("body", b"") for event in events)


class BusyDatabase:
    """A middleware inside of Flower's own that turns errors into responses: what may be over soon is answered with 503.

    That is a database that is locked or full, and an object that another node has announced with other parts.

    Flower's processes repeat a request after 503, and end after the 500 that Flower would send.

    Args:
        app: What lies within.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self._said = _Said()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, and answer it if the database cannot be written now."""
        begun = False

        async def watched(event: MutableMapping[str, Any]) -> None:
            nonlocal begun
            begun = True
            await send(event)

        try:
            await self.app(scope, receive, watched)
        except OperationalError as error:
            if begun or not (why := PASSING.get(getattr(error.orig, "sqlite_errorcode", 0) & 0xFF)):
                raise
            self._said.say((why, scope["path"]), f"the database {why}, at {scope['path']}; who asked is to ask again")
            await _respond(send, 503, f"the database {why}; ask again")
        except ValueError as error:
            if begun or OTHERWISE not in str(error):
                raise
            self._said.say(
                "otherwise", f"an object was announced in two ways, at {scope['path']}; who asked is to ask again"
            )
            await _respond(send, 503, "somebody has announced this object in another way; ask again")


async def _body(receive: Receive, most: int) -> bytes | None:
    """Return a request's body, or None if its sender has gone.

    Raises:
        _TooLargeError: It has more bytes. The rest was read and dropped, so that the sender hears of it: one that is still
            sending while its connection is closed takes it for a broken one, and tries again for ever.
    """
    parts: list[bytes] = []
    size = 0
    more = True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            return None
        size += len(part := event.get("body", b""))
        more = event.get("more_body", False)
        if size <= most:
            parts.append(part)
        else:
            parts.clear()
    if size > most:
        raise _TooLargeError
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body that has been read, and then what comes after it."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> MutableMapping[str, Any]:
        return left.pop() if left else await receive()

    return replayed


async def _respond(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _not_one_answer(request: PushMessagesRequest) -> str:
    """Return what is wrong with a request that is not one answer of the node that sends it.

    Flower checks whose key a request has, but not whose message: a node could send tasks to others in the server's name.
    """
    messages, trees = len(request.messages_list), len(request.message_object_trees)
    if (messages, trees) != (1, 1):
        return f"{messages:,} messages with {trees:,} trees of objects were refused; an answer is one of each"
    metadata = request.messages_list[0].metadata
    if metadata.src_node_id != request.node.node_id:
        return "a message that is no answer of this node was refused"
    return ""


def _impostor(tree: ObjectTree) -> str:
    """Return why a tree of objects is refused that says of Flower's record of nothing that it has parts.

    Flower would keep it so for all, and refuse everybody's messages that have such a record.
    """
    left = [tree]
    while left:
        node = left.pop()
        if node.object_id == NOTHING and node.children:
            return "an answer that says of an empty record what it holds was refused"
        left.extend(node.children)
    return ""


def _count(tree: ObjectTree, most: int) -> int:
    """Return how many objects a tree has, or `most` if more."""
    count, left = 0, [tree]
    while left and count < most:
        count += 1
        left.extend(left.pop().children)
    return count
