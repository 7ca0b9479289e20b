"""The server's clock, which a simulation can replace."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Clock"]


class Clock:
    """The clock of this machine. A simulation passes a `Transport` another clock that does not really wait."""

    def now(self) -> float:
        """Return monotonic seconds."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)

    def start(self, work: Callable[[], None]) -> None:
        """Do some work in a daemon thread."""
        threading.Thread(target=work, daemon=True).start()

    def wait(self, event: threading.Event, seconds: float) -> None:
        """Wait for an event, at most so many seconds."""
        event.wait(seconds)
