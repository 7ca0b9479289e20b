"""Flower's grid and a server's time without processes and without waiting: what simulations and tests are built on."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from hetlora.flower.clock import Clock

__all__ = ["LocalGrid", "VirtualClock"]


class LocalGrid(Grid):
    """The part of `Grid` that hetlora does not use, and the names of messages; who makes a grid of it adds the rest."""

    def __init__(self) -> None:
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self._number = itertools.count(1)

    def set_run(self, run: Any) -> None:
        """Flower's; nobody calls it."""
        raise NotImplementedError

    @property
    def run(self) -> Any:
        """Flower's; nobody asks."""
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        """Flower's; out of use there."""
        raise NotImplementedError

    def send_and_receive(self, *_: Any, **__: Any) -> Iterable[Message]:
        """Flower's; a federation must not use it."""
        raise AssertionError("it waits for all, however long they take")

    def named(self, message: Message) -> str:
        """Give a message a name, as the SuperLink does, and return it."""
        name = f"message-{next(self._number)}"
        message.metadata.__dict__["_message_id"] = name
        return name


class VirtualClock(Clock):
    """A clock that advances when somebody waits, and then runs the events due, in order.

    Args:
        latency: Returns the seconds that background work takes; none by default.
        waited: Called before every wait.

    Example:
        >>> clock, done = VirtualClock(), []
        >>> clock.later(3.0, lambda: done.append(clock.now()))
        >>> clock.sleep(2.0), done
        (None, [])
        >>> clock.sleep(2.0), done, clock.now()
        (None, [3.0], 4.0)
    """

    def __init__(self, latency: Callable[[], float] = lambda: 0.0, waited: Callable[[], None] = lambda: None) -> None:
        self.latency, self.waited = latency, waited
        self._time = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def now(self) -> float:
        """Return seconds since the clock was made."""
        return self._time

    def later(self, seconds: float, work: Callable[[], None]) -> None:
        """Let something happen when so much time has passed."""
        heapq.heappush(self._events, (self._time + seconds, next(self._order), work))

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.waited()
        end = self._time + seconds
        while self._events and self._events[0][0] <= end:
            self._next()
        self._time = end

    def start(self, work: Callable[[], None]) -> None:
        """Do something that ends when its latency has passed."""
        seconds = self.latency()
        if seconds:
            self.later(seconds, work)
        else:
            work()

    def wait(self, event: threading.Event, seconds: float) -> None:
        """Let time pass until the event, but not longer."""
        self.waited()
        end = self._time + seconds
        while not event.is_set() and self._events and self._events[0][0] <= end:
            self._next()
        if not event.is_set():
            self._time = end

    def _next(self) -> None:
        self._time, _, work = heapq.heappop(self._events)
        work()
