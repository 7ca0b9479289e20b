"""How time passes for a server: as it does, or, in a simulation, when somebody waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Clock"]


class Clock:
    """The time of this machine. A simulation gives a `Transport` another one, in which nothing really waits."""

    def now(self) -> float:
        """Return seconds since some moment; they never go back."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)

    def start(self, work: Callable[[], None]) -> None:
        """Do something beside, in a thread that nothing waits for at the end of the process."""
        threading.Thread(target=work, daemon=True).start()

    def wait(self, event: threading.Event, seconds: float) -> None:
        """Wait for an event, but not longer."""
        event.wait(seconds)
