"""Messages to nodes and their answers over Flower's grid.

An overloaded SuperLink answers with HTTP 500 (its database is locked), or that it has not stored an object, and Flower does
not ask again. Here it is asked again, with growing pauses, so that it costs a round the missing answers at most.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard, TypeVar

import httpx
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from hetlora.errors import HetLoraError, WireError
from hetlora.flower.answer_limit import answer_limit_text
from hetlora.flower.clock import Clock
from hetlora.flower.envelope import Envelope, most_answer_text, quoted
from hetlora.flower.flwr_messages import from_record_dict, to_record_dict

__all__ = ["DeliveryFailure", "Transport", "pause_between_looks"]

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

POLL = 0.2
"""Minimal seconds between two looks for answers."""

LONGEST = 10.0
"""Maximal seconds between two looks."""

QUESTION = 0.04
"""Seconds of pause for each answer that is looked for: a SuperLink spends 0.02 seconds on the question (`make prove-load`)."""

GIVES_UP = 60.0
"""Seconds after which Flower's own repetitions of a request end."""

AT_ONCE = 20
"""Late answers that are looked for before a round."""

PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds before a SuperLink that answers with an error of its own is asked again; the last one from then on."""

Found = TypeVar("Found")

Trouble: TypeAlias = httpx.HTTPStatusError | ObjectPushError
"""An error of the SuperLink's own, which may be over soon."""

TYPES = {"hello": "query", "refused": "query", "train": "train", "evaluate": "evaluate"}


@dataclass(frozen=True)
class DeliveryFailure:
    """The printable reason why a message has no readable answer."""

    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", quoted(self.reason))


@dataclass(frozen=True)
class _Expected:
    """The maximal size in bytes of a message's honest answer: of its text, and of its adapters."""

    text: int
    adapters: int


class Transport:
    """Sends envelopes to nodes, receives their answers, and counts the bytes of both.

    Args:
        grid: Flower's grid.
        stopped: If set, the next operation raises KeyboardInterrupt.
        clock: The server's clock; None for this machine's.
        say: Called with a line when the SuperLink begins to answer with errors, and when it is well again.

    Attributes:
        sent: Bytes of sent envelopes.
        received: Bytes of readable answers.
    """

    def __init__(
        self,
        grid: Grid,
        stopped: threading.Event | None = None,
        clock: Clock | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.grid = grid
        self.stopped = stopped
        self.clock = clock or Clock()
        self.say = say
        self.sent = 0
        self.received = 0
        self._pulls: dict[str, _PendingReply] = {}
        self._expected: dict[str, _Expected] = {}
        self._again: dict[str, tuple[int, float]] = {}  # failed pulls of an answer, and when it is pulled again
        self._left: dict[str, None] = {}
        self._trouble: float | None = None  # when the SuperLink began to answer with errors
        if (retries := getattr(grid, "_retry_invoker", None)) is not None:
            # Flower repeats without end where a SuperLink is gone, and where it says that its database is locked.
            retries.max_time = GIVES_UP

    def nodes(self, seconds: float) -> dict[int, bytes]:
        """Return the connected nodes with their public keys; keys are empty without authentication.

        Raises:
            HetLoraError: For so many seconds the SuperLink has answered with errors only.
        """
        found = self._patiently(lambda: list(self.grid.get_nodes()), seconds)
        if _is_trouble(found):
            raise HetLoraError(
                f"for {seconds:g} s the SuperLink has answered {_in_words(found)} only; its log says why"
            )
        return {node.node_id: bytes(getattr(node, "public_key", b"")) for node in found}

    def send(
        self, envelope: Envelope, node: int, seconds: float, *, clients: Iterable[str] = (), adapters: int = 0
    ) -> str | DeliveryFailure:
        """Send an envelope; return the message id for `poll`.

        Args:
            envelope: The message.
            node: Flower's number of the node.
            seconds: The longest wait for an answer.
            clients: Whom the answer speaks of, one by one.
            adapters: Maximal size in bytes of the adapters in an honest answer.
        """
        expected = _Expected(most_answer_text(clients), adapters)
        message = Message(
            to_record_dict(envelope),
            node,
            TYPES[envelope.kind],
            ttl=max(seconds, KEPT),
            group_id=answer_limit_text(envelope.kind, expected.text + expected.adapters),
        )
        # The same message every time: its id is that of its content, so that a SuperLink that has it stores it once.
        pushed = self._patiently(lambda: list(self.grid.push_messages([message])), seconds)
        if _is_trouble(pushed):
            return DeliveryFailure(f"the message could not be sent: the SuperLink answers {_in_words(pushed)}")
        names = [name for name in pushed if name]
        if len(names) != 1:
            return DeliveryFailure("the message could not be sent: the node is gone, or the message too large")
        self.sent += _size(envelope)
        self._expected[names[0]] = expected
        return str(names[0])

    def poll(self, name: str, patience: float = PATIENCE) -> Envelope | DeliveryFailure | None:
        """Return the answer to a message, or None while there is none.

        Answers are pulled one by one, so that a malformed one does not affect others, and each in a thread, because Flower
        waits minutes for a node that has announced an answer and does not deliver it.

        Raises:
            httpx.HTTPError: The connection to the SuperLink is lost.
        """
        self._check_stopped()
        tries, not_before = self._again.get(name, (0, 0.0))
        pull = self._pulls.get(name)
        if pull is None:
            if self.clock.now() < not_before:
                return None
            pull = self._pulls[name] = _PendingReply(self.grid, name, self.clock)
            self.clock.wait(pull.ended, patience)
        if not pull.ended.is_set():
            return None
        del self._pulls[name]
        if _is_trouble(pull.found):
            self._in_trouble(pull.found)
            self._again[name] = tries + 1, self.clock.now() + _pause(tries)
            return None
        self._well_again()
        answer = pull.answer(self._expected[name])
        if answer is None:
            return None
        del self._expected[name]
        self._again.pop(name, None)
        if isinstance(answer, Envelope):
            self.received += _size(answer)
            if answer.kind == "refused":
                return DeliveryFailure(str(answer.value.get("reason")))
        return answer

    def abandon(self, names: Iterable[str]) -> None:
        """Wait no longer for these answers; late ones are pulled and dropped, because the SuperLink would keep them forever."""
        self._left.update(dict.fromkeys(names))

    def discard_late(self) -> None:
        """Drop late answers to abandoned messages."""
        for name in list(self._left)[:AT_ONCE]:
            del self._left[name]
            if self.poll(name, patience=0.5) is None:
                self._left[name] = None  # behind the others

    def _patiently(self, ask: Callable[[], Found], seconds: float) -> Found | Trouble:
        """Ask the SuperLink, for so many seconds as long as it answers with an error of its own; return the last one then."""
        until, tries = self.clock.now() + seconds, 0
        while True:
            self._check_stopped()
            try:
                found = ask()
            except (httpx.HTTPStatusError, ObjectPushError) as error:
                if not _is_trouble(error):
                    raise
                self._in_trouble(error)
                if self.clock.now() >= until:
                    return error
                self.clock.sleep(min(_pause(tries), max(0.0, until - self.clock.now())))
                tries += 1
            else:
                self._well_again()
                return found

    def _in_trouble(self, error: Trouble) -> None:
        if self._trouble is None:
            self._trouble = self.clock.now()
            self.say(f"the SuperLink answers {_in_words(error)}; it is asked again")

    def _well_again(self) -> None:
        if self._trouble is not None:
            self.say(f"the SuperLink answers again, after {self.clock.now() - self._trouble:.0f} s")
            self._trouble = None

    def _check_stopped(self) -> None:
        if self.stopped is not None and self.stopped.is_set():
            raise KeyboardInterrupt


def pause_between_looks(waiting: int) -> float:
    """Return the pause before so many answers are looked for again, so that the questions take a third of a SuperLink at most.

    Example:
        >>> pause_between_looks(3), pause_between_looks(100)
        (0.2, 4.0)
    """
    return min(max(POLL, QUESTION * waiting), LONGEST)


def _pause(tries: int) -> float:
    return PAUSES[min(tries, len(PAUSES) - 1)]


def _is_trouble(found: object) -> TypeGuard[Trouble]:
    return isinstance(found, ObjectPushError) or (
        isinstance(found, httpx.HTTPStatusError) and found.response.is_server_error
    )


def _in_words(error: Trouble) -> str:
    if isinstance(error, ObjectPushError):
        return "that it has not stored an object of the message"
    return f"HTTP {error.response.status_code} to {error.request.url.path}"


class _PendingReply:
    """One pull of an answer, in a thread.

    Attributes:
        ended: Set at its end.
        found: The answers, or the error.
    """

    def __init__(self, grid: Grid, name: str, clock: Clock) -> None:
        self.ended = threading.Event()
        self.found: Any = None
        clock.start(lambda: self._pull(grid, name))

    def answer(self, expected: _Expected) -> Envelope | DeliveryFailure | None:
        """Return the answer, if there is one.

        Raises:
            httpx.HTTPError: The connection to the SuperLink is lost.
        """
        if isinstance(self.found, httpx.HTTPError):
            raise self.found
        if isinstance(self.found, Exception):
            return DeliveryFailure(f"an answer that cannot be read: {self.found!r}")
        if not self.found:
            return None
        reply = self.found[0]
        if reply.has_error():
            words = TROUBLES.get(reply.error.code, f"Flower's error {reply.error.code}")
            return DeliveryFailure(f"{words}: {reply.error.reason}" if reply.error.reason else words)
        try:
            return from_record_dict(reply.content, expected.text, expected.adapters)
        except WireError as error:
            return DeliveryFailure(str(error))

    def _pull(self, grid: Grid, name: str) -> None:
        try:
            self.found = list(grid.pull_messages([name]))
        except Exception as error:  # noqa: BLE001  untrusted bytes in Flower's parser
            self.found = error
        finally:
            self.ended.set()


def _size(envelope: Envelope) -> int:
    return len(envelope.text()) + sum(map(len, envelope.blobs))
