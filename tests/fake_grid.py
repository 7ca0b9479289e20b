"""Flower's grid without processes: a node is a function from message to answer, and time is virtual."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Message, RecordDict

from hetlora.flower import client_runtime as local
from hetlora.flower.envelope import Envelope
from hetlora.flower.flwr_messages import from_record_dict, to_record_dict
from hetlora.flower.node_config import NodeConfig
from proofs.grid import LocalGrid

Handler = Callable[[Message], Any]
"""A node: returns the answer, None for no answer ever, or raises what unpacking its answer would raise."""


class FakeGrid(LocalGrid):
    """The part of `Grid` that an engine uses; every message and answer is kept for a test to look at."""

    def __init__(self, nodes: dict[int, Handler]) -> None:
        super().__init__()
        self.handlers = nodes
        self.messages: dict[str, Message] = {}
        self.answers: list[Message] = []

    def get_node_ids(self) -> Iterable[int]:
        return list(self.handlers)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = []
        for message in messages:
            names.append(self.named(message))
            self.messages[names[-1]] = message
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

    def sent(self, kind: str) -> list[Envelope]:
        """Return the envelopes that were sent, of a kind."""
        envelopes = [from_record_dict(message.content) for message in self.messages.values()]
        return [envelope for envelope in envelopes if envelope.kind == kind]


def hosting(settings: dict[str, Any], *, keeps: bool = True) -> Handler:
    """Return a node that does the work in this process, as a SuperNode's worker does it in its own."""

    def handle(message: Message) -> Message:
        envelope = local.answer(from_record_dict(message.content), NodeConfig.read(settings), keeps=keeps)
        return Message(to_record_dict(envelope), reply_to=message)

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
    monkeypatch.setattr(local, "_memories", {})
    return lambda: (local._sessions.clear(), local._memories.clear())
