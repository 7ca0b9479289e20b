"""What a device of each tier gets: what is exported for the tier, measured on held-out rows."""

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
from hetlora.runs.text import aligned
from hetlora.runs.trained_run import AdapterSelection, TrainedRun
from hetlora.training.evaluation import Score

__all__ = ["TierScore", "TierScores", "score_tiers"]


@dataclass(frozen=True)
class TierScore:
    """One tier.

    Attributes:
        tier: Its name in the results.
        rank: The slots that were measured: those that every device of it affords, as many as there are.
        everybody: Score on the held-out rows of all measured clients.
        own: Score on those of the tier's clients.
    """

    tier: str
    rank: int
    everybody: Score
    own: Score


@dataclass(frozen=True)
class TierScores:
    """What a device of each tier gets, beside the base and the whole adapter.

    Attributes:
        base: The base alone, on the rows of all measured clients.
        tiers: By rank.
        whole: The whole global adapter, on the same rows.
    """

    base: Score
    tiers: tuple[TierScore, ...]
    whole: Score

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table's header and rows as text; ROUGE-L where answers were generated."""
        some = self.base.generated > 0
        header = ("tier", "rank", "perplexity", "of its own clients", *(("ROUGE-L",) if some else ()))
        body: list[tuple[str, str, Score, Score | None]] = [("base alone", "—", self.base, None)]
        body += [(tier.tier, str(tier.rank), tier.everybody, tier.own) for tier in self.tiers]
        body += [("whole adapter", "—", self.whole, None)]
        return [header, *(_row(*line, rouge=some) for line in body)]

    def table(self) -> str:
        """Return the table in columns, for a terminal."""
        return "\n".join(aligned(self.rows()))

    def summary(self) -> dict[str, Any]:
        """Return it as plain data."""
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
    """Measure what is exported for every tier, as the run measures: the same clients, rows and answers.

    A tier gets the slots that its devices afford, those that every client has pruned away by now among them. The whole
    adapter has those alone that some client still has, so that it can be the narrower one.

    Args:
        learned: The run.
        display: Is told what goes on.

    Raises:
        HetLoraError: The run has no global adapter or no ranks, or its rows are not here, or no longer those it began with.
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

    def measure(adapter: Adapter, said: str) -> Measurement:
        key = tuple(pair.A.shape[0] for pair in adapter.values())
        if key not in known:  # where nothing was pruned away, the widest tier's is the whole adapter
            display.say(f"measuring {said}")
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
    """Return the run without what it started from, which need not be here any more."""
    return config.model_copy(update={"model": config.model.model_copy(update={"adapter": None})})


def _row(name: str, rank: str, everybody: Score, own: Score | None, *, rouge: bool) -> tuple[str, ...]:
    figures = (everybody.perplexity, None if own is None else own.perplexity, *((everybody.rouge_l,) if rouge else ()))
    return (name, rank, *map(_figure, figures))


def _figure(value: float | None) -> str:
    return "—" if value is None else f"{value:.2f}"
