"""Shared by all proofs: a seed, a number of trials, progress lines, and a last line of JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Outcome", "arguments"]

SHOWN = 20
"""Failures that are printed; further ones are only counted."""


def arguments(description: str, trials: int) -> argparse.ArgumentParser:
    """Return the parser of the arguments that every proof takes.

    Args:
        description: The module's docstring.
        trials: Default number of trials.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=trials)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    return parser


@dataclass
class Outcome:
    """The results of a proof so far.

    Attributes:
        proof: Its name.
        seed: As given.
        trials: Number of trials so far.
        failures: Errors, each with the command that repeats it.
        figures: Measured values.
    """

    proof: str
    seed: int
    trials: int = 0
    failures: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    _reported: float = field(default_factory=time.monotonic)

    def tried(self, problems: Sequence[str] = (), *, trials: int = 1, of: int | None = None) -> None:
        """Count trials and failures; print the progress every ten seconds."""
        self.trials += trials
        for problem in problems:
            if len(self.failures) < SHOWN:
                print(f"{self.proof}: FAILED: {problem}", file=sys.stderr, flush=True)
            self.failures.append(problem)
        if time.monotonic() - self._reported > 10.0:
            self._reported = time.monotonic()
            whole = "" if of is None else f" of {of}"
            print(
                f"{self.proof}: {self.trials}{whole} trials, {len(self.failures)} failed", file=sys.stderr, flush=True
            )

    def end(self) -> int:
        """Print the last line; return the exit code: 0 if there were trials and none failed."""
        line = {
            "proof": self.proof,
            "trials": self.trials,
            "failures": len(self.failures),
            "seed": self.seed,
            **self.figures,
            "seconds": round(time.monotonic() - self.began, 1),
        }
        print(json.dumps(line), flush=True)
        return 0 if self.trials and not self.failures else 1
