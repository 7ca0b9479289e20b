"""Findings of the doctor's checks: a value, the place to look at, and the way out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from hetlora.errors import ConfigError, HetLoraError, printable

__all__ = ["CHECKS", "DRY_RUN", "Diagnosis", "Finding", "Status"]

Status = Literal["ok", "warning", "failed"]
T = TypeVar("T")

MACHINE = (
    "python", "torch", "transformers", "peft", "safetensors", "flwr", "datasets", "processor", "accelerators",
    "half precision", "free memory", "output folder", "disk", "locks", "fsync", "model cache", "bundled base",
)  # fmt: skip
CONFIGURATION = (
    "configuration", "device", "base", "causal", "target modules", "sequence length", "trackers", "first adapter",
    "tokenizer", "rows", "rows of no side", "clients left out", "rows without a target", "rows too long",
    "empty clients", "oddities", "fields not read", "example", "cohort", "ranks", "tiers", "memory", "local training",
    "self-pruning", "server",
)  # fmt: skip
DRY_RUN = ("updates", "sent is trained", "frozen factors", "weights", "live slots", "resuming")
CHECKS = MACHINE + CONFIGURATION + DRY_RUN
"""The names of all checks, explained in docs/doctor.md. `--laws` adds the laws of `hetlora.testing`."""


@dataclass(frozen=True)
class Finding:
    """The finding of one check.

    Attributes:
        check: Its name in `CHECKS`, or "law: " and the name of a law.
        status: "ok", "warning" (the run works, but may not do what was meant) or "failed" (it does not work, or wrongly).
        value: The value found.
        place: A key of the configuration, a package or a folder.
        way_out: The remedy; empty if the check passed or the value explains it.
    """

    check: str
    status: Status
    value: str
    place: str
    way_out: str = ""

    def __str__(self) -> str:
        """Return a line for a person; a warning or a failure has a second line with place and remedy."""
        width = max(map(len, CHECKS))
        line = f"{self.status:<8} {self.check:<{width}}  {_line(self.value)}"
        if self.status == "ok":
            return line
        way_out = f": {_line(self.way_out)}" if self.way_out else ""
        return f"{line}\n{'':<8} {'':<{width}}  -> {_line(self.place)}{way_out}"


@dataclass
class Diagnosis:
    """All findings so far, in order.

    Attributes:
        show: Called with every new finding.
        skipped: The reason per check that was not made.
    """

    show: Callable[[Finding], object] | None = None
    findings: list[Finding] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def note(
        self, check: str, value: str, place: str, way_out: str = "", *, warn: bool = False, fail: bool = False
    ) -> None:
        """Add a finding: ok, or a warning or a failure."""
        status: Status = "failed" if fail else "warning" if warn else "ok"
        finding = Finding(check, status, value, place, "" if status == "ok" else way_out)
        self.findings.append(finding)
        if self.show is not None:
            self.show(finding)

    def skip(self, why: str, *checks: str) -> None:
        """Note that checks cannot be made."""
        self.skipped |= dict.fromkeys(checks, why)

    def attempt(
        self, check: str, place: str, make: Callable[[], T], fine: Callable[[T], str] | None = None, way_out: str = ""
    ) -> T | None:
        """Return the result of `make` and note `fine` of it; if it raises, note the failure and return None.

        Any exception is a finding, because a method may be third-party code and must not stop the other checks.
        """
        try:
            made = make()
        except HetLoraError as error:
            for problem in error.problems if isinstance(error, ConfigError) else [str(error)]:
                value, _, known = problem.partition("; ")
                self.note(check, value, place, known or way_out, fail=True)
        except Exception as error:  # noqa: BLE001
            broken = "mend it: the check could not go on"
            self.note(check, f"{type(error).__name__}: {error}", place, broken, fail=True)
        else:
            if fine is not None:
                self.note(check, fine(made), place)
            return made
        return None

    @property
    def failed(self) -> bool:
        """Return whether a check failed."""
        return self._counts()["failed"] > 0

    def of(self, check: str) -> list[Finding]:
        """Return the findings of one check."""
        return [finding for finding in self.findings if finding.check == check]

    def summary(self) -> dict[str, Any]:
        """Return the object that ``hetlora doctor --json`` prints."""
        place = {check: number for number, check in enumerate(CHECKS)}
        in_order = sorted(self.findings, key=lambda finding: place.get(finding.check, len(CHECKS)))
        return {
            "failed": self.failed,
            "counts": self._counts(),
            "findings": [asdict(finding) for finding in in_order],
            "skipped": dict(self.skipped),
            "seconds": round(time.monotonic() - self.began, 2),
        }

    def conclusion(self) -> str:
        """Return the last lines of the output: the skipped checks, and the number of findings per status."""
        lines = []
        for why in dict.fromkeys(self.skipped.values()):
            checks = ", ".join(check for check, reason in self.skipped.items() if reason == why)
            lines.append(f"not looked at, for {why}: {checks}")
        counts = ", ".join(f"{count} {status}" for status, count in self._counts().items())
        return "\n".join([*lines, f"{counts}; {time.monotonic() - self.began:.0f} s"])

    def _counts(self) -> dict[str, int]:
        statuses: tuple[Status, ...] = ("ok", "warning", "failed")
        return {status: sum(finding.status == status for finding in self.findings) for status in statuses}


def _line(text: str) -> str:
    return printable(" ".join(text.split("\n")))
