"""Observers of a run: the writer of `records.jsonl`, the trackers, the display, and those that a user adds from Python."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from functools import partialmethod
from typing import TYPE_CHECKING, Any

from hetlora.errors import HetLoraError

if TYPE_CHECKING:
    from hetlora.runs.progress import RoundProgress
    from hetlora.runs.records import EvaluationRecord, RoundRecord, RunRecord
    from hetlora.runs.result import RunResult

__all__ = ["Observer", "Observers", "as_display", "check_observer"]


class Observer:
    """Base class of observers of a run. Every method does nothing: override those that you need.

    `hetlora.run` and `hetlora.resume` take objects of such classes as `observers`.

    - **Order.** Every event reaches the writer of `records.jsonl`, the trackers, the writer of checkpoints, the display, and
      the user's observers in their order. A record is therefore on disk before it is shown.
    - **Thread.** Calls come one at a time, from the thread that does the rounds, which waits. In process it is the thread that
      called `hetlora.run`; in Flower's simulation it is another one.
    - **Errors.** A user's observer that raises an `Exception` is dropped, and the run continues. The other observers get one
      text through `say`; if none of them overrides `say`, it is a `RuntimeWarning`.
    - **Stopping.** `KeyboardInterrupt` passes through and ends the run as Ctrl-C does. Raised within the rounds, it leaves the
      adapter of the last finished round, and a run that can be resumed.

    Example:
        >>> class Losses(Observer):
        ...     def __init__(self):
        ...         self.losses = []
        ...
        ...     def round_ended(self, record):
        ...         self.losses.append(record.loss)
    """

    def say(self, text: str) -> None:
        """Called with a message for a person, at any moment, also before `run_started`."""

    def run_started(self, record: RunRecord) -> None:
        """Called when a new run has measured its base. It is not called when a run is resumed from a checkpoint.

        On disk: `config.json`, and `record` as the first line of `records.jsonl`.
        """

    def evaluated(self, record: EvaluationRecord) -> None:
        """Called for the measurement of the base, of the adapter that a run starts from, and of the result.

        The perplexity after a round is in the record of the round.

        On disk: `record`. For the result also the adapter, but not yet `summary.json`.
        """

    def rounds_started(self, total: int, done: int) -> None:
        """Called once before the first round of this process.

        Args:
            total: Rounds of the whole run.
            done: Rounds done before the run was resumed; 0 in a new run.
        """

    def round_changed(self, progress: RoundProgress) -> None:
        """Called when something changes within a round, e.g. for every answer of a client. It must return quickly.

        On disk: nothing of this round until `doing` is "writing a checkpoint"; then its record is there.
        """

    def round_ended(self, record: RoundRecord) -> None:
        """Called when a round is over.

        On disk: `record`, and the checkpoint of this round if it has one (`checkpoint_every`). If the process is killed between
        the two and this call, the resumed run does not call it for that round. A round without a checkpoint is done again when
        the run is resumed, and ends again.
        """

    def rounds_ended(self) -> None:
        """Called once after the last round, also if the rounds were interrupted or failed. The result is not yet written."""

    def run_ended(self, result: RunResult | None) -> None:
        """Called last, once, in every run that reached `rounds_started`.

        On disk: everything, with `summary.json`; of an interrupted run (`result.interrupted`) the adapter and the records.

        Args:
            result: The source of `summary.json`; None if the run failed.
        """


class Observers(Observer):
    """Several observers as one: an event reaches them one after the other.

    Args:
        needed: Observers whose errors end the run.
        others: Observers that are dropped if they raise an `Exception`, see `Observer`.
    """

    def __init__(self, needed: Iterable[Observer], others: Iterable[Observer] = ()) -> None:
        self._needed, self._others = tuple(needed), list(others)

    def _notify(self, event: str, *arguments: Any) -> None:
        for observer in self._needed:
            getattr(observer, event)(*arguments)
        dropped = []
        for observer in tuple(self._others):
            try:
                getattr(observer, event)(*arguments)
            except Exception as error:  # noqa: BLE001  no error of an observer may end the run
                self._others = [other for other in self._others if other is not observer]
                reason = f"{type(observer).__name__}, which failed: {type(error).__name__}: {error}"
                dropped.append(f"no longer observed by {reason}")
        for text in dropped:
            if all(type(observer).say is Observer.say for observer in (*self._needed, *self._others)):
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            self.say(text)


for _event in [name for name in vars(Observer) if not name.startswith("_")]:  # `_notify` passes each on
    setattr(Observers, _event, partialmethod(Observers._notify, _event))  # noqa: SLF001


FORMER = {
    "rounds_started": "begin_rounds",
    "round_changed": "show",
    "round_ended": "end_round",
    "rounds_ended": "end_rounds",
}
"""Methods of an observer to the names that a display had for them in version 0.1."""


class _FormerDisplay(Observer):
    """A display with the former method names, for one release."""

    def __init__(self, display: Any) -> None:
        self._display = display
        for name, former in FORMER.items():
            setattr(self, name, getattr(display, former, getattr(self, name)))

    def say(self, text: str) -> None:
        self._display.say(text)


def as_display(display: Any) -> Observer:
    """Return a user's display as an observer; former method names work for one more release.

    Raises:
        HetLoraError: It is no observer.

    Example:
        >>> as_display(2)
        Traceback (most recent call last):
        hetlora.errors.HetLoraError: display is an object of 'int'; give an object of a class made from hetlora.Observer
    """
    now = isinstance(display, Observer) and any(
        getattr(type(display), name) is not getattr(Observer, name) for name in FORMER
    )
    if not now and (former := [name for name in FORMER.values() if hasattr(display, name)]):
        warnings.warn(
            f"a display with {', '.join(former)} has method names of version 0.1; make its class from hetlora.Observer",
            DeprecationWarning,
            stacklevel=3,
        )
        return _FormerDisplay(display)
    return check_observer(display, "display")


def check_observer(observer: Any, where: str) -> Observer:
    """Return a user's observer.

    Raises:
        HetLoraError: It is no observer, or a method looks like a misspelled event.

    Example:
        >>> check_observer(Observer, "observers[0]")
        Traceback (most recent call last):
        hetlora.errors.HetLoraError: observers[0] is the class 'Observer'; give an object of a class made from hetlora.Observer
    """
    if not isinstance(observer, Observer):
        kind = (
            f"the class {observer.__name__!r}"
            if isinstance(observer, type)
            else f"an object of {type(observer).__name__!r}"
        )
        raise HetLoraError(f"{where} is {kind}; give an object of a class made from hetlora.Observer")
    events = [name for name in vars(Observer) if not name.startswith("_")]
    for name in set(dir(observer)) - set(events):
        meant = difflib.get_close_matches(name, events, n=1, cutoff=0.8)
        if (
            meant
            and callable(getattr(observer, name))
            and getattr(type(observer), meant[0]) is getattr(Observer, meant[0])
        ):
            raise HetLoraError(f"{where} has a method {name!r}, which nothing calls; did you mean {meant[0]!r}?")
    return observer
