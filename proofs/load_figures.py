"""What a part of `proofs.load` finds: figures, problems, and the memory of the processes while it goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hetlora.flower.local_federation import OF, LocalFederation
from proofs.flower import rounds_of

__all__ = ["Found", "Watch", "cpu_seconds", "kibibytes"]

MEGABYTE = 1e6
KIBIBYTE = 1024
EVERY = 1.0
"""Seconds between two looks at the memory."""

PROGRAMS = {
    ("flower-superlink",): "superlink",
    ("hetlora", "flower", "superlink"): "superlink",
    ("flwr-serverapp",): "serverapp",
}
"""Commands behind that of Python."""


@dataclass
class Found:
    """The figures and the problems of a part so far."""

    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def require(self, holds: object, problem: str) -> None:
        """Note a problem, unless something holds."""
        if not holds:
            self.problems.append(problem)

    def admitted(self, run: Path, rounds: int, clients: int) -> None:
        """Require that a run has so many rounds, each with the updates of so many clients and no failure."""
        done = rounds_of(run)
        self.require(len(done) == rounds, f"{run.name}: {len(done)} of {rounds} rounds")
        for number, record in done.items():
            came, failures = len(record["clients"]), list(record["failures"].items())
            said = f"{came} of {clients} admitted; {len(failures)} failed: {failures[:3]}"
            self.require(came == clients and not failures, f"{run.name}, round {number}: {said}")

    def seconds(self, run: Path, name: str = "") -> None:
        """Note the seconds of a run's rounds."""
        each = [round(record["seconds"], 1) for record in rounds_of(run).values()]
        if each:
            key = f"round_seconds_{name}" if name else "round_seconds"
            self.figures[key] = {"each": each, "median": statistics.median(each)}


class Watch:
    """Notes how much memory the processes of a federation take at most, as long as its context lasts; on Linux only.

    Args:
        federation: Its processes are known by their environment.
        found: Gets the figures.
    """

    def __init__(self, federation: LocalFederation, found: Found) -> None:
        self.mark = f"{OF}={federation.folder}".encode()
        self.found = found
        self.most: dict[str, int] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look_again, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.found.figures["most_megabytes"] = {
            name: round(number * KIBIBYTE / MEGABYTE) for name, number in self.most.items()
        }

    @staticmethod
    def reason(code: int) -> str:
        """Explain how a process ended."""
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"it exited with {code}"

    def _look_again(self) -> None:
        while not self._end.wait(EVERY):
            self._look()

    def _look(self) -> None:
        total = processes = 0
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, KeyError):
                if self.mark not in (place / "environ").read_bytes().split(b"\0"):
                    continue
                words = [Path(os.fsdecode(word)).name for word in (place / "cmdline").read_bytes().split(b"\0")[1:4]]
                for command, name in PROGRAMS.items():
                    if tuple(words[: len(command)]) == command:
                        self._note(name, kibibytes(place / "status", "VmHWM"))
                # Its own pages, and its share of those that several processes have.
                total += kibibytes(place / "smaps_rollup", "Pss")
                processes += 1
        self._note("all_processes", total)

    def _note(self, name: str, number: int) -> None:
        self.most[name] = max(self.most.get(name, 0), number)


def kibibytes(path: Path, key: str) -> int:
    """Return a figure of a file of /proc."""
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return int(lines[key].split()[0])


def cpu_seconds(pid: int) -> float:
    """Return the processor's seconds that a process has used, in its own code and in the kernel's."""
    # The name of a process stands in brackets and may hold anything.
    words = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
