"""Flower's grid without processes: nodes are functions from a message to its answer, and time passes when it is asked."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from hetlora.flower import local
from hetlora.flower.messages import content_of, parcel_of
from hetlora.flower.node import NodeSettings
from hetlora.flower.parcel import Parcel

Handler = Callable[[Message], Any]
"""A node: returns the answer, None for no answer ever, or raises what unpacking its answer would raise."""


class FakeGrid(Grid):
    """The part of `Grid` that an engine uses; every message and answer is kept for a test to look at."""

    def __init__(self, nodes: dict[int, Handler]) -> None:
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self.handlers = nodes
        self.messages: dict[str, Message] = {}
        self.answers: list[Message] = []
        self._number = itertools.count(1)

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *_: Any, **__: Any) -> Iterable[Message]:
        raise AssertionError("it waits for all, however long they take")

    def get_node_ids(self) -> Iterable[int]:
        return list(self.handlers)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = []
        for message in messages:
            name = f"message-{next(self._number)}"
            message.metadata.__dict__["_message_id"] = name
            self.messages[name] = message
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = []
        for name in message_ids:
            message = self.messages[name]
            handler = self.handlers.get(message.metadata.dst_node_id)
            answer = handler(message) if handler else None
            if answer is not None:
                self.answers.append(answer)
                found.append(answer)
        return found

    def sent(self, kind: str) -> list[Parcel]:
        """Return the parcels that were sent, of a kind."""
        parcels = [parcel_of(message.content) for message in self.messages.values()]
        return [parcel for parcel in parcels if parcel.kind == kind]


def hosting(settings: dict[str, Any], *, keeps: bool = True) -> Handler:
    """Return a node that does the work in this process, as a SuperNode's worker does it in its own."""

    def handle(message: Message) -> Message:
        parcel = local.answer(parcel_of(message.content), NodeSettings.read(settings), keeps=keeps)
        return Message(content_of(parcel), reply_to=message)

    return handle


def by_flower(settings: dict[str, Any]) -> Handler:
    """Return a node that answers through the Flower App itself, with a worker process of its own."""
    from hetlora.flower.client_app import app

    def handle(message: Message) -> Message:
        context = Context(run_id=1, node_id=7, node_config=settings, state=RecordDict(), run_config={})
        return app(message=message, context=context)

    return handle


def many_loaded(monkeypatch: Any) -> Any:
    """Let this process be several nodes at once, each with its base and rows; return what forgets them all."""
    monkeypatch.setattr(local, "SESSIONS", 100)
    monkeypatch.setattr(local, "_sessions", {})
    return lambda: local._sessions.clear()
