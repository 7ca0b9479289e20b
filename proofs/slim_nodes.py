"""Many SuperNodes in one process: Flower's own client of the Fleet API and hetlora's own answers, without a process for each.

A real SuperNode takes about 190 MB when idle, so that one machine cannot hold a thousand. To the SuperLink these look the same:
each has a key, a connection with TLS, a heartbeat every 30 seconds, and asks for a message three seconds after the last answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from heapq import heappop, heappush
from types import TracebackType
from typing import Any

import httpx
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects, push_objects
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

__all__ = ["SlimNodes"]

IDLE = 3.0
"""Seconds that an idle SuperNode waits before it asks again."""

THREADS = 8


@dataclass
class SlimNodes:
    """Nodes that are connected as long as the context lasts.

    Args:
        address: Of the SuperLink.
        certificate: Of the CA, in PEM.
        count: How many.
        answer: Returns the content of a node's answer, given its index and the message; called by one thread at a time.

    Attributes:
        errors: What went wrong, in words.
        slow: The longest time in seconds between two questions of a node beyond `IDLE`.
    """

    address: str
    certificate: bytes
    count: int
    answer: Callable[[int, Message], Any]
    errors: list[str] = field(default_factory=list)
    slow: float = 0.0
    _due: list[tuple[float, int]] = field(default_factory=list)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _working: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> SlimNodes:
        with ThreadPoolExecutor(THREADS) as pool:
            self._nodes = list(pool.map(self._connected, range(self.count)))
        self._due = [(time.monotonic() + IDLE * index / self.count, index) for index in range(self.count)]
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(30.0)

    def _connected(self, _: int) -> _SlimNode:
        private, public = generate_key_pairs()
        client = FleetHttpClient.from_server_address(
            self.address,
            False,
            self.certificate,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(private, public),
            ],
        )
        retry, key = make_simple_http_retry_invoker(), public_key_to_bytes(public)
        retry.invoke(client.RegisterNode, RegisterNodeFleetRequest(public_key=key))
        activate = ActivateNodeRequest(public_key=key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        return _SlimNode(client, retry, Node(node_id=retry.invoke(client.ActivateNode, activate).node_id))

    def _serve(self) -> None:
        """Take the node that is due next, again and again."""
        while not self._stopped.is_set():
            with self._lock:
                when, index = heappop(self._due) if self._due else (time.monotonic() + 0.1, -1)
            if (wait := when - time.monotonic()) > 0 and self._stopped.wait(wait):
                return
            if index < 0:
                continue
            self.slow = max(self.slow, time.monotonic() - when)
            try:
                busy = self._nodes[index].ask(lambda message, index=index: self._answered(index, message))  # type: ignore[misc]
            except (httpx.HTTPError, RuntimeError, ValueError) as error:
                self.errors.append(f"node {index}: {error!r}"[:300])
                busy = False
            with self._lock:
                heappush(self._due, (time.monotonic() + (0.0 if busy else IDLE), index))

    def _answered(self, index: int, message: Message) -> Message:
        with self._working:
            return Message(self.answer(index, message), reply_to=message)


@dataclass
class _SlimNode:
    client: FleetHttpClient
    retry: Any
    node: Node
    heartbeat: float = 0.0

    def ask(self, answered: Callable[[Message], Message]) -> bool:
        """Ask for a message and answer it; return whether there was one."""
        call, client = self.retry.invoke, self.client
        if time.monotonic() - self.heartbeat > HEARTBEAT_DEFAULT_INTERVAL:
            request = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
            call(client.SendNodeHeartbeat, request)
            self.heartbeat = time.monotonic()
        found = call(client.PullMessages, PullMessagesRequest(node=self.node))
        if not found.messages_list:
            return False
        message_id, run = found.messages_list[0].metadata.message_id, found.messages_list[0].metadata.run_id
        pull = make_pull_object_fn_protobuf(lambda request: call(client.PullObject, request), self.node, run)
        names = [tree.object_id for tree in iterate_object_tree(found.message_object_trees[0])]
        message = inflate_object_from_contents(message_id, pull_objects(names, pull))
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = message_id
        confirmed = ConfirmMessageReceivedRequest(node=self.node, run_id=run, message_object_id=message_id)
        call(client.ConfirmMessageReceived, confirmed)
        with no_object_id_recompute():
            reply = answered(message)
            reply.metadata.__dict__["_src_node_id"] = self.node.node_id
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
            sent = call(
                client.PushMessages,
                PushMessagesRequest(
                    node=self.node,
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[tree],
                    clientapp_runtime_list=[0.1],
                ),
            )
            push = make_push_object_fn_protobuf(
                lambda request: call(client.PushObject, request), self.node, run, sent.session_id
            )
            push_objects(objects, push, object_ids_to_push=set(sent.objects_to_push))
        return True
