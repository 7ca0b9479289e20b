"""What a check has found: its value, the place to look at and the way out; and all of them together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from hetlora.errors import ConfigError, HetLoraError, printable

__all__ = ["CHECKS", "Diagnosis", "Finding", "Notes", "Status"]

Status = Literal["ok", "warning", "failed"]
T = TypeVar("T")

CHECKS: dict[str, str] = {
    # The machine
    "python": "its version is one that hetlora runs on",
    "torch": "installed, and within the versions that hetlora takes",
    "transformers": "the same",
    "peft": "the same",
    "safetensors": "the same",
    "flwr": "the same, where it is installed",
    "datasets": "the same, where it is installed",
    "processor": "its cores, and the threads that would work on them",
    "accelerators": "graphics processors and their free memory",
    "half precision": "whether this processor multiplies bfloat16 (or `model.dtype`) itself",
    "free memory": "what a process may still take, by the system, its container and its limits",
    "output folder": "it can be written, or made",
    "disk": "space where the output goes",
    "locks": "a second process is kept out of a run's folder",
    "fsync": "a file is on the disk when it is said to be",
    "model cache": "where models of the Hugging Face hub are kept, and whether it can be written",
    "bundled base": "`nano` loads",
    # The configuration
    "configuration": "every key is known and every value allowed",
    "device": "`model.device` is on this machine",
    "base": "it loads: whole, from safetensors, without code of others",
    "causal": "no token of the base changes what comes before it",
    "target modules": "every name of `model.target_modules` is a linear module of the base",
    "sequence length": "the base takes `data.max_length` tokens",
    "trackers": "what `tracking.to` names is installed",
    "first adapter": "`model.adapter` is one of plain LoRA, and of the base's modules",
    "tokenizer": "it loads, has a chat template where one is asked for, and spells no token that the base does not know",
    "rows": "every row can be read, and has a client, a side of the split and its fields",
    "rows of no side": "rows that neither train nor are held out",
    "clients left out": "clients without a training row or a held-out one, or with fewer rows than `data.min_rows`",
    "rows without a target": "rows that are dropped because nothing of them would be scored",
    "rows too long": "rows that are cut to `data.max_length`",
    "empty clients": "clients of the run of whose training rows nothing is left",
    "cohort": "there are as many clients as a round asks for, and more than one",
    "ranks": "every client has one, and none is larger than a module is wide",
    "tiers": "every tier has a client",
    "memory": "what is predicted fits what there is, and `memory_megabytes`",
    "local training": "steps, epochs and learning rate are of a usual size for the rows",
    "self-pruning": "where the method prunes, some client can",
    "server": "it averages, and moves by what it averages",
    # Two tiny rounds
    "updates": "every client asked gives an update, and it is admitted",
    "sent is trained": "every tensor that a client trains from is, bit for bit, what the server sent it",
    "frozen factors": "what a task does not train comes back as it was",
    "clients apart": "a task is for its own client, and a name alone changes no sum",
    "aggregate": "the updates change what the server has, in every module",
    "equal clients": "clients of one rank are averaged as by FedAvg, and clients that send the same get it back",
    "client order": "the same updates in another order give the same state",
    "weights": "no client of three or more has over half of the average",
    "live slots": "no slot that came back is dead, in A and in B",
    "resuming": "a run that goes on from its checkpoint ends as the one that was not stopped, bit for bit",
}
"""Every check by its name, in its order, and what is well where it says ok."""


@dataclass(frozen=True)
class Finding:
    """What one check has found.

    Attributes:
        check: Its name in `CHECKS`.
        status: "ok", "warning" (the run works, and may not do what was meant) or "failed" (it does not, or not rightly).
        value: What was found.
        place: Where: a key of the configuration, a package, a folder.
        way_out: What to do; empty where all is well, or where the value says it.
    """

    check: str
    status: Status
    value: str
    place: str
    way_out: str = ""


@dataclass
class Notes:
    """What the checks have found so far, and which ones could not be made."""

    findings: list[Finding] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def ok(self, check: str, value: str, place: str) -> None:
        """Note that all is well."""
        self._add(Finding(check, "ok", value, place))

    def warn(self, check: str, value: str, place: str, way_out: str) -> None:
        """Note what may not be meant so."""
        self._add(Finding(check, "warning", value, place, way_out))

    def fail(self, check: str, value: str, place: str, way_out: str = "") -> None:
        """Note what does not work."""
        self._add(Finding(check, "failed", value, place, way_out))

    def judge(self, check: str, problem: str | None, fine: str, place: str, way_out: str) -> None:
        """Note a failure where there is a problem, else that all is well."""
        if problem is None:
            self.ok(check, fine, place)
        else:
            self.fail(check, problem, place, way_out)

    def skip(self, why: str, *checks: str) -> None:
        """Note checks that cannot be made."""
        for check in checks:
            assert check in CHECKS, check
            self.skipped[check] = why

    def attempt(self, check: str, place: str, make: Callable[[], T]) -> T | None:
        """Return what `make` gives; where it refuses, note its reason as a failure of the check and return None."""
        try:
            return make()
        except HetLoraError as error:
            self._refused(check, error, place)
            return None

    @contextlib.contextmanager
    def guarding(self, check: str, place: str) -> Iterator[None]:
        """Note whatever goes wrong meanwhile as a failure of the check: a method may be anybody's code."""
        try:
            yield
        except HetLoraError as error:
            self._refused(check, error, place)
        except Exception as error:  # noqa: BLE001  one check that breaks must not take the others with it
            self.fail(check, f"{type(error).__name__}: {error}", place, "mend it: the check could not go on")

    def _refused(self, check: str, error: HetLoraError, place: str) -> None:
        for problem in error.problems if isinstance(error, ConfigError) else [str(error)]:
            value, _, way_out = problem.partition("; ")
            self.fail(check, value, place, way_out)

    def _add(self, finding: Finding) -> None:
        assert finding.check in CHECKS, finding.check
        self.findings.append(finding)


@dataclass(frozen=True)
class Diagnosis:
    """All that was found.

    Attributes:
        findings: In the order of the checks.
        skipped: Check to why it could not be made.
        seconds: That all of it took.
    """

    findings: tuple[Finding, ...]
    skipped: dict[str, str]
    seconds: float

    @property
    def failed(self) -> bool:
        """Return whether a check failed."""
        return any(finding.status == "failed" for finding in self.findings)

    def of(self, check: str) -> list[Finding]:
        """Return what a check has found; one check may find several things."""
        return [finding for finding in self.findings if finding.check == check]

    def summary(self) -> dict[str, Any]:
        """Return all of it as plain data, the object that ``hetlora doctor --json`` prints."""
        return {
            "failed": self.failed,
            "counts": self._counts(),
            "findings": [asdict(finding) for finding in self.findings],
            "skipped": dict(self.skipped),
            "seconds": round(self.seconds, 2),
        }

    def table(self) -> str:
        """Return it for a person to read: a line a finding, and below it where to look and what to do."""
        width = max(len(finding.check) for finding in self.findings)
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.status:<8} {finding.check:<{width}}  {_line(finding.value)}")
            if finding.status != "ok":
                way_out = f": {_line(finding.way_out)}" if finding.way_out else ""
                lines.append(f"{'':<8} {'':<{width}}  -> {_line(finding.place)}{way_out}")
        for why in dict.fromkeys(self.skipped.values()):
            checks = ", ".join(check for check, reason in self.skipped.items() if reason == why)
            lines.append(f"not looked at, for {why}: {checks}")
        counts = ", ".join(f"{count} {status}" for status, count in self._counts().items())
        return "\n".join([*lines, f"{counts}; {self.seconds:.0f} s"])

    def _counts(self) -> dict[str, int]:
        statuses: tuple[Status, ...] = ("ok", "warning", "failed")
        return {status: sum(finding.status == status for finding in self.findings) for status in statuses}


def _line(text: str) -> str:
    return printable(" ".join(text.split("\n")))
