"""What a run needs to go on where it was, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hetlora.result import Measurement, Progress

__all__ = ["Checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """Where a run was when a round had ended.

    Attributes:
        progress: The state after the round, and what the run has added up to.
        base: Measurement of the base.
        records: Length of the records file, in bytes.
        seconds: Wall-clock time so far.
        config: The whole configuration, as plain data.
        digests: Of `Undertaking.digests`.
        threads: Of PyTorch: how clients are grouped depends on it, and so do the last bits.
        hetlora: The version that wrote it.
    """

    progress: Progress
    base: Measurement
    records: int
    seconds: float
    config: Mapping[str, Any]
    digests: Mapping[str, str | None]
    threads: int
    hetlora: str
