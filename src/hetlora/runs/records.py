"""Records of a run: JSON lines on disk, one record per line, standard library only.

A file begins with one `RunRecord`. A `RoundRecord` follows each round, an `EvaluationRecord` each measurement of the base and
the result. A run that starts from an adapter has a second one of round 0, of the base with that adapter. Numbers that are not
finite are written as null, so every line is plain JSON.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hetlora.runs.observer import Observer

__all__ = ["EvaluationRecord", "Records", "RoundRecord", "RunRecord", "holds_rounds", "plain", "read_records"]

BLOCK = 1 << 20
"""Bytes per read."""


@dataclass(frozen=True)
class RunRecord:
    """Configuration, versions and sizes of a run.

    Attributes:
        base_parameters: Parameters of the base, which full fine-tuning would train.
        counted_clients: Clients over which `truncated_rows` and `empty_rows` were counted: a sample of a large population.
        trainable_parameters: Client to its trained parameters at its first rank; with `evaluation.clients` the measured ones.
        self_pruning: Whether clients prune their rank.
        method: The method's declarations `trains`, `folds`, `averages`, `ranks`, `clients`; see `hetlora.core.method.Method`.
    """

    hetlora: str
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    clients: int
    train_rows: int
    test_rows: int
    left_out_clients: int
    left_out_rows: int
    truncated_rows: int
    empty_rows: int
    counted_clients: int
    modules: int
    max_rank: int
    base_parameters: int = 0
    trainable_parameters: Mapping[str, int] = field(default_factory=dict)
    self_pruning: bool = False
    method: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "run"


@dataclass(frozen=True)
class RoundRecord:
    """One round.

    Attributes:
        round: Number of the round, from 1.
        loss: Mean training loss of the cohort's clients, equally weighted.
        perplexity: On held-out rows after the round; None if it was not measured.
        ranks: Client of the cohort to the rank it was sent.
        weights: Client to its share of the average.
        prunes: Client to its new rank, for those that pruned.
        failures: Client to the reason why it gave no update.
        bytes_up: Bytes of the tensors of the admitted updates.
        bytes_down: Bytes of the tensors that were sent to the cohort.
        live_slots: Slots of the global adapter in which A or B is not zero; any other slot can never change again.
        seconds: Wall-clock time of the round without its measurement.
        clients: Client to its `loss`, `examples`, `steps` and raw `weight` (for HetLoRA `‖B A‖_F`); if its influence was
            bounded, also `bounded`: the factor by which its change of `A`, of `B`, or its `weight` was lowered.
        network: Over Flower, `bytes_up` and `bytes_down` as sent over the network, the number of `nodes`, and the time each
            announced client was `last_seen`; None in-process. `bases` are those that differ from the server's in how they are
            stored (`quantize`) or in their digest (`weights`), by client.
        summed: Clients of which the server knows only the sum that includes their updates. If there are any, no share is
            known, and `weights` is empty.
    """

    round: int
    loss: float | None
    perplexity: float | None
    ranks: Mapping[str, Any]
    weights: Mapping[str, float]
    prunes: Mapping[str, Any]
    failures: Mapping[str, str]
    bytes_up: int
    bytes_down: int
    live_slots: int
    seconds: float
    clients: Mapping[str, Mapping[str, Any]]
    network: Mapping[str, Any] | None = None
    summed: Sequence[str] = field(default_factory=list)
    kind: str = "round"


@dataclass(frozen=True)
class EvaluationRecord:
    """A measurement on held-out rows: over all, per tier, per client (each `perplexity`, `rougeL`, `tokens`)."""

    round: int
    overall: Mapping[str, Any]
    tiers: Mapping[str, Mapping[str, Any]]
    clients: Mapping[str, Mapping[str, Any]]
    kind: str = "evaluation"


AnyRecord = RunRecord | RoundRecord | EvaluationRecord


class Records(Observer):
    """Appends records to a file.

    It is the first observer of a run, so each record is written before another observer sees it.

    Args:
        path: The file, which is created.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._digest, self._digested = hashlib.sha256(), 0

    def append(self, record: AnyRecord) -> None:
        """Write one line."""
        line = json.dumps(plain(dataclasses.asdict(record)), ensure_ascii=False)
        with self.path.open("a", encoding="utf8", errors="backslashreplace") as file:
            file.write(line + "\n")

    def run_started(self, record: RunRecord) -> None:
        """Write the first line."""
        self.append(record)

    def evaluated(self, record: EvaluationRecord) -> None:
        """Write a measurement."""
        self.append(record)

    def round_ended(self, record: RoundRecord) -> None:
        """Write a round."""
        self.append(record)

    def sync(self) -> int:
        """Sync the records to disk, and return the length of the file in bytes."""
        with self.path.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def sha256(self, length: int) -> str:
        """Return the SHA-256 of the first `length` bytes of the file, in hexadecimal digits; it reads only the new bytes."""
        if length < self._digested:
            self._digest, self._digested = hashlib.sha256(), 0
        with self.path.open("rb") as file:
            file.seek(self._digested)
            while block := file.read(min(length - self._digested, BLOCK)):
                self._digest.update(block)
                self._digested += len(block)
        return self._digest.hexdigest()

    def cut(self, length: int) -> None:
        """Keep only the first `length` bytes of the file: a run is resumed from there."""
        os.truncate(self.path, length)
        self._digest, self._digested = hashlib.sha256(), 0


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a run, in order."""
    return [json.loads(line) for line in path.read_text("utf8").split("\n") if line]


def holds_rounds(path: Path) -> bool:
    """Return whether a file of records holds a complete record of a round."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return False
    return any(b'"kind": "round"' in line for line in lines)


def plain(value: Any) -> Any:
    """Return `value` as plain JSON data: numbers that are not finite become None, tuples become lists.

    Example:
        >>> plain({"loss": float("nan"), "pair": (1, 2.5)})
        {'loss': None, 'pair': [1, 2.5]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
