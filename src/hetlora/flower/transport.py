"""Messages to nodes and their answers over Flower's grid."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

from hetlora.errors import WireError
from hetlora.flower.clock import Clock
from hetlora.flower.envelope import Envelope, quoted
from hetlora.flower.flwr_messages import from_record_dict, to_record_dict

__all__ = ["DeliveryFailure", "Transport"]

TROUBLES = {
    1: "its Flower App could not be loaded",
    2: "its Flower App failed",
    3: "the message to it was lost",
    4: "its answer was lost",
    5: "the node went away",
    7: "it refused the Flower App's bundle",
    8: "its process died",
}
"""Flower's error codes in words."""

KEPT = 12 * 3600.0
"""Minimal lifetime of a message in seconds, since the clocks of clients and SuperLink may differ by minutes."""

PATIENCE = 10.0
"""Seconds to wait for one answer before the others are polled."""

TYPES = {"hello": "query", "refused": "query", "train": "train", "evaluate": "evaluate"}


@dataclass(frozen=True)
class DeliveryFailure:
    """The printable reason why a message has no readable answer."""

    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", quoted(self.reason))


class Transport:
    """Sends envelopes to nodes, receives their answers, and counts the bytes of both.

    Args:
        grid: Flower's grid.
        stopped: If set, the next operation raises KeyboardInterrupt.
        clock: The server's clock; None for this machine's.

    Attributes:
        sent: Bytes of sent envelopes.
        received: Bytes of readable answers.
    """

    def __init__(self, grid: Grid, stopped: threading.Event | None = None, clock: Clock | None = None) -> None:
        self.grid = grid
        self.stopped = stopped
        self.clock = clock or Clock()
        self.sent = 0
        self.received = 0
        self._pulls: dict[str, _PendingReply] = {}
        self._left: set[str] = set()

    def nodes(self) -> dict[int, bytes]:
        """Return the connected nodes with their public keys; keys are empty without authentication."""
        self._check_stopped()
        return {node.node_id: bytes(getattr(node, "public_key", b"")) for node in self.grid.get_nodes()}

    def send(self, envelope: Envelope, node: int, seconds: float) -> str | DeliveryFailure:
        """Send an envelope; return the message id for `poll`.

        Args:
            envelope: The message.
            node: Flower's number of the node.
            seconds: The longest wait for an answer.
        """
        message = Message(to_record_dict(envelope), node, TYPES[envelope.kind], ttl=max(seconds, KEPT))
        names = [name for name in self.grid.push_messages([message]) if name]
        if len(names) != 1:
            return DeliveryFailure("the message could not be sent: the node is gone, or the message too large")
        self.sent += _size(envelope)
        return str(names[0])

    def poll(self, name: str, patience: float = PATIENCE) -> Envelope | DeliveryFailure | None:
        """Return the answer to a message, or None while there is none.

        Answers are pulled one by one, so that a malformed one does not affect others, and each in a thread, because Flower
        waits minutes for a node that has announced an answer and does not deliver it.
        """
        self._check_stopped()
        pull = self._pulls.get(name)
        if pull is None:
            pull = self._pulls[name] = _PendingReply(self.grid, name, self.clock)
            self.clock.wait(pull.ended, patience)
        if not pull.ended.is_set():
            return None
        del self._pulls[name]
        answer = pull.answer()
        if isinstance(answer, Envelope):
            self.received += _size(answer)
            if answer.kind == "refused":
                return DeliveryFailure(str(answer.value.get("reason")))
        return answer

    def abandon(self, names: Iterable[str]) -> None:
        """Wait no longer for these answers; late ones are pulled and dropped, because the SuperLink would keep them forever."""
        self._left.update(names)

    def discard_late(self) -> None:
        """Drop late answers to abandoned messages."""
        for name in list(self._left):
            if self.poll(name, patience=0.5) is not None:
                self._left.discard(name)

    def _check_stopped(self) -> None:
        if self.stopped is not None and self.stopped.is_set():
            raise KeyboardInterrupt


class _PendingReply:
    """One pull of an answer, in a thread."""

    def __init__(self, grid: Grid, name: str, clock: Clock) -> None:
        self.ended = threading.Event()
        self._found: Any = None
        clock.start(lambda: self._pull(grid, name))

    def answer(self) -> Envelope | DeliveryFailure | None:
        """Return the answer, if there is one.

        Raises:
            httpx.HTTPError: The connection to the SuperLink is lost.
        """
        if isinstance(self._found, httpx.HTTPError):
            raise self._found
        if isinstance(self._found, Exception):
            return DeliveryFailure(f"an answer that cannot be read: {self._found!r}")
        if not self._found:
            return None
        reply = self._found[0]
        if reply.has_error():
            words = TROUBLES.get(reply.error.code, f"Flower's error {reply.error.code}")
            return DeliveryFailure(f"{words}: {reply.error.reason}" if reply.error.reason else words)
        try:
            return from_record_dict(reply.content)
        except WireError as error:
            return DeliveryFailure(str(error))

    def _pull(self, grid: Grid, name: str) -> None:
        try:
            self._found = list(grid.pull_messages([name]))
        except Exception as error:  # noqa: BLE001  untrusted bytes in Flower's parser
            self._found = error
        finally:
            self.ended.set()


def _size(envelope: Envelope) -> int:
    return len(envelope.text()) + sum(map(len, envelope.blobs))
