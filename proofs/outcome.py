"""What every proof has in common: a seed, a number of trials, a line on how far it is, and a last line of JSON."""

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
"""Failures that are told; the others are counted."""


def arguments(description: str, trials: int) -> argparse.ArgumentParser:
    """Return the parser of the arguments that every proof takes.

    Args:
        description: The module's docstring.
        trials: By default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=trials)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    return parser


@dataclass
class Outcome:
    """What a proof has come to so far.

    Attributes:
        proof: Its name.
        seed: As given.
        trials: How many there were.
        failures: What went wrong, each with what repeats it.
        figures: What it measured.
    """

    proof: str
    seed: int
    trials: int = 0
    failures: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    _told: float = field(default_factory=time.monotonic)

    def tried(self, problems: Sequence[str] = (), *, trials: int = 1, of: int | None = None) -> None:
        """Count trials and what went wrong in them, and tell every ten seconds how far it is."""
        self.trials += trials
        for problem in problems:
            if len(self.failures) < SHOWN:
                print(f"{self.proof}: FAILED: {problem}", file=sys.stderr, flush=True)
            self.failures.append(problem)
        if time.monotonic() - self._told > 10.0:
            self._told = time.monotonic()
            whole = "" if of is None else f" of {of}"
            print(
                f"{self.proof}: {self.trials}{whole} trials, {len(self.failures)} failed", file=sys.stderr, flush=True
            )

    def end(self) -> int:
        """Print the last line, and return the exit code: 0 where there were trials and none failed."""
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
