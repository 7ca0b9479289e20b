"""Running totals of a run, and its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetlora.core.adapter import Adapter, live_slots
from hetlora.core.round import RoundReport
from hetlora.core.types import ServerState
from hetlora.runs.records import EvaluationRecord, RoundRecord, plain
from hetlora.training.evaluation import Answer, Score, total_score

__all__ = ["Measurement", "RunResult", "RunTotals", "evaluation_record", "round_record", "score_figures"]


@dataclass(frozen=True)
class Measurement:
    """Scores on held-out rows by client and tier, and the generated answers."""

    clients: Mapping[str, Score]
    tiers: Mapping[str, Score]
    answers: tuple[Answer, ...]

    @property
    def overall(self) -> Score:
        """Return the score over all rows."""
        return total_score(self.clients.values())

    def summary(self) -> dict[str, Any]:
        """Return `perplexity` and `rougeL` over all, `tiers` and `clients`, as plain data."""
        parts = {"tiers": self.tiers, "clients": self.clients}
        return {
            **score_figures(self.overall),
            **{part: {name: score_figures(score) for name, score in scores.items()} for part, scores in parts.items()},
        }


def score_figures(score: Score) -> dict[str, Any]:
    """Return a score as the results show it."""
    return {"perplexity": score.perplexity, "rougeL": score.rouge_l}


@dataclass(frozen=True)
class RunResult:
    """Result of a run.

    Attributes:
        name: The name of the run.
        base: Measurement of the base model.
        final: Measurement of the last global adapter; None if the run was interrupted before it.
        state: The last server state.
        rounds: Rounds done.
        ranks: Client to its rank at the end; with `evaluation.clients` the measured ones.
        prunes: Number of prunes.
        updates: Number of admitted updates.
        failures: Number of tasks without an admitted update.
        bytes_up: Bytes of the tensors of admitted updates.
        bytes_down: Bytes of the tensors sent to clients.
        seconds: Wall-clock time from loaded to written.
        peak_megabytes: Peak memory of the process, in 10⁶ bytes; None if the system does not report it.
        adapter: Folder of what was learned, see `LocalExperiment.write_result`; None if nobody trained.
        records: The records file.
        interrupted: Whether Ctrl-C ended it.
    """

    name: str
    base: Measurement
    final: Measurement | None
    state: ServerState
    rounds: int
    ranks: Mapping[str, Any]
    prunes: int
    updates: int
    failures: int
    bytes_up: int
    bytes_down: int
    seconds: float
    peak_megabytes: float | None
    adapter: Path | None
    records: Path
    interrupted: bool

    def summary(self) -> dict[str, Any]:
        """Return the result as plain data, the object that ``hetlora run --json`` prints."""
        return plain(  # type: ignore[no-any-return]
            {
                "name": self.name,
                "base": self.base.summary(),
                "final": self.final.summary() if self.final else None,
                "rounds": self.rounds,
                "ranks": self.ranks,
                "prunes": self.prunes,
                "updates": self.updates,
                "failures": self.failures,
                "bytes_up": self.bytes_up,
                "bytes_down": self.bytes_down,
                "seconds": round(self.seconds, 2),
                "peak_megabytes": None if self.peak_megabytes is None else round(self.peak_megabytes, 1),
                "adapter": str(self.adapter) if self.adapter else None,
                "records": str(self.records),
                "interrupted": self.interrupted,
            }
        )


@dataclass
class RunTotals:
    """State of a run and its totals so far."""

    state: ServerState
    final: Measurement | None = None
    prunes: int = 0
    updates: int = 0
    failures: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    def count(self, state: ServerState, record: RoundRecord) -> None:
        """Add a finished round."""
        self.state = state
        self.prunes += len(record.prunes)
        self.updates += len(record.clients) + len(record.summed)
        self.failures += len(record.failures)
        self.bytes_up += record.bytes_up
        self.bytes_down += record.bytes_down


def round_record(report: RoundReport, adapter: Adapter, seconds: float) -> RoundRecord:
    """Return the record of a round before its measurement."""
    clients = report.clients
    return RoundRecord(
        round=report.round + 1,
        loss=sum(client.loss for client in clients) / len(clients) if clients else None,
        perplexity=None,
        ranks=report.ranks,
        weights=report.shares(),
        prunes={client.client: client.new_rank for client in clients if client.pruned}
        | {client: rank for client, rank in report.summed.items() if rank != report.ranks[client]},
        failures={failure.client: failure.reason for failure in report.failures},
        bytes_up=sum(client.bytes_up for client in clients) + report.bytes_summed,
        bytes_down=report.bytes_down,
        live_slots=live_slots(adapter),
        seconds=round(seconds, 3),
        clients={
            client.client: {
                "loss": client.loss,
                "examples": client.examples,
                "steps": client.steps,
                "weight": client.weight,
                **({"bounded": client.bounded} if client.bounded else {}),
            }
            for client in clients
        },
        summed=list(report.summed),
    )


def evaluation_record(round_number: int, measurement: Measurement) -> EvaluationRecord:
    """Return the record of a measurement."""

    def figures(score: Score) -> dict[str, Any]:
        return {**score_figures(score), "tokens": score.tokens, "generated": score.generated}

    return EvaluationRecord(
        round=round_number,
        overall=figures(measurement.overall),
        tiers={name: figures(score) for name, score in measurement.tiers.items()},
        clients={name: figures(score) for name, score in measurement.clients.items()},
    )
