"""Scores of the adapter exported for each tier, on held-out rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hetlora.config import RunConfig
from hetlora.core.adapter import Adapter
from hetlora.errors import HetLoraError
from hetlora.runs.display import QuietDisplay
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.runs.records import plain
from hetlora.runs.result import Measurement, score_figures
from hetlora.runs.text import aligned, figure
from hetlora.runs.trained_run import AdapterSelection, TrainedRun
from hetlora.training.evaluation import Score

__all__ = ["TierScore", "TierScores", "score_tiers"]


@dataclass(frozen=True)
class TierScore:
    """Scores of one tier.

    Attributes:
        tier: Its name in the results.
        rank: Measured slots: those that all devices of the tier afford, as far as they exist.
        everybody: Score on the held-out rows of all measured clients.
        own: Score on the rows of the tier's clients.
    """

    tier: str
    rank: int
    everybody: Score
    own: Score


@dataclass(frozen=True)
class TierScores:
    """Scores of all tiers by rank, of the base alone and of the whole global adapter, on the same rows."""

    base: Score
    tiers: tuple[TierScore, ...]
    whole: Score

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table's header and rows as text, with ROUGE-L if answers were generated."""
        some = self.base.generated > 0
        header = ("tier", "rank", "perplexity", "of its own clients", *(("ROUGE-L",) if some else ()))
        body: list[tuple[str, str, Score, Score | None]] = [("base alone", "—", self.base, None)]
        body += [(tier.tier, str(tier.rank), tier.everybody, tier.own) for tier in self.tiers]
        body += [("whole adapter", "—", self.whole, None)]
        return [header, *(_row(*line, rouge=some) for line in body)]

    def table(self) -> str:
        """Return the table for a terminal."""
        return "\n".join(aligned(self.rows()))

    def summary(self) -> dict[str, Any]:
        """Return the scores as plain data."""
        return plain(  # type: ignore[no-any-return]
            {
                "base": score_figures(self.base),
                "tiers": {
                    tier.tier: {"rank": tier.rank, **score_figures(tier.everybody), "own": score_figures(tier.own)}
                    for tier in self.tiers
                },
                "whole": score_figures(self.whole),
            }
        )


def score_tiers(learned: TrainedRun, display: QuietDisplay) -> TierScores:
    """Measure the adapter of every tier on the same clients, rows and answers as the run.

    A tier's adapter includes slots that all clients have pruned. The whole adapter has only slots that some client still has,
    so it can have a smaller rank.

    Args:
        learned: The run.
        display: Shows the progress.

    Raises:
        HetLoraError: The run has no global adapter or no ranks, or its rows are missing or have changed.
    """
    config = learned.config
    if config.flower.clients == "nodes":
        raise HetLoraError("the held-out rows of this run are its clients' own; they alone can measure what they get")
    if learned.method.trains == "weights" or learned.written_model is not None:
        raise HetLoraError(f"method {config.method.name} left whole weights, which are the same for every tier")
    whole = learned.adapter(AdapterSelection())
    learned.check_unchanged("model.base", "model.tokenizer", "data.path")
    experiment = LocalExperiment(_without_adapter(config), display)
    known: dict[tuple[int, ...], Measurement] = {}

    def measure(adapter: Adapter, description: str) -> Measurement:
        key = tuple(pair.A.shape[0] for pair in adapter.values())
        if key not in known:  # without pruning, the largest tier's adapter is the whole one
            display.say(f"measuring {description}")
            known[key] = experiment.measure_adapter(adapter, learned.folded)
        return known[key]

    measured = []
    for tier in learned.tiers:
        adapter = learned.adapter(AdapterSelection(tier=tier))
        rank = max(pair.A.shape[0] for pair in adapter.values())
        now = measure(adapter, f"rank {rank}, which every device of tier {tier} affords")
        measured.append(TierScore(tier, rank, now.overall, now.tiers.get(tier, Score())))
    everything = measure(whole, "the whole adapter")
    display.say("measuring the base")
    return TierScores(experiment.measure(None).overall, tuple(measured), everything.overall)


def _without_adapter(config: RunConfig) -> RunConfig:
    """Return the run without its initial adapter, which may be gone."""
    return config.model_copy(update={"model": config.model.model_copy(update={"adapter": None})})


def _row(name: str, rank: str, everybody: Score, own: Score | None, *, rouge: bool) -> tuple[str, ...]:
    figures = (everybody.perplexity, None if own is None else own.perplexity, *((everybody.rouge_l,) if rouge else ()))
    return (name, rank, *(figure(value, ".2f") for value in figures))
