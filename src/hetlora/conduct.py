"""A run from its first measurement to its last: rounds, records and what is written, wherever its clients are.

What differs between a simulation and a federation of real machines is an `Undertaking`; `conduct` is the same for both.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from hetlora import federated
from hetlora.adapter import Rank
from hetlora.checkpoint import Checkpoint
from hetlora.config import RunConfig
from hetlora.federated import Client, Engine, Method, ServerState, keep_rank
from hetlora.lora_model import pick_device
from hetlora.memory import peak_megabytes, say_what_to_lower
from hetlora.records import Records, RoundRecord, RunRecord
from hetlora.result import Measurement, Progress, RunResult, evaluation_record, round_record

__all__ = ["Display", "Undertaking", "conduct"]


class Display(Protocol):
    """What a run tells while it goes on."""

    def say(self, text: str) -> None:
        """Tell one thing, once."""

    def begin_rounds(self, total: int, done: int = 0) -> None:
        """Rounds begin; of a run that goes on, some are done."""

    def end_round(self, record: RoundRecord) -> None:
        """A round is over."""

    def end_rounds(self) -> None:
        """The rounds are over, or were interrupted."""


class Undertaking(Protocol):
    """What a run is made of, ready to begin: `hetlora.experiment.Experiment` in one process, or a server of real machines.

    All of it is known before the first round, and nothing in it changes with the rounds: what does is in the `ServerState`.

    Attributes:
        config: The validated run.
        display: Is told what goes on.
        method: What the server and the clients do.
        engine: Where the clients train.
    """

    config: RunConfig
    display: Display
    method: Method[Any]
    engine: Engine

    @property
    def rounds(self) -> int:
        """Return the number of rounds of the whole run."""
        ...

    def first_state(self) -> ServerState:
        """Return the state before the first round."""
        ...

    def cohort(self, round_number: int) -> Sequence[Client]:
        """Return the clients of a round, numbered from 0, by seed and number alone: a resumed run draws the same."""
        ...

    def measure(self, state: ServerState | None, *, generate: bool = True) -> Measurement:
        """Score held-out rows: of the base where `state` is None, else of what the federation has learned.

        Args:
            state: Whose adapter.
            generate: Whether answers are generated, too.
        """
        ...

    def write_result(self, state: ServerState, folder: Path) -> Path | None:
        """Write what the run has learned into its folder and return where; None where nobody trained."""
        ...

    def run_record(self) -> RunRecord:
        """Return the first record: what is run, with which versions."""
        ...

    def ranks(self, state: ServerState) -> Mapping[str, Rank]:
        """Return the ranks that the result lists; empty where the method has none."""
        ...

    def digests(self) -> Mapping[str, str | None]:
        """Return digests of base, tokenizer and data by their key, e.g. ``data.path``; None for what is no local file.

        A run goes on only where they are those of its beginning.
        """
        ...

    def annotate(self, record: RoundRecord) -> RoundRecord:
        """Return the record of a round with what the engine knows of it, just before it is written."""
        return record


def conduct(run: Undertaking, folder: Path, resumed: Checkpoint | None = None) -> RunResult:
    """Measure the base, do the rounds, measure the result, write the adapter. Ctrl-C ends the rounds cleanly.

    Args:
        run: What is run.
        folder: Of the run; it exists. `config.json`, `records.jsonl` and the adapter are written into it.
        resumed: Where to go on; None begins at round 0.
    """
    began = time.monotonic() - (resumed.seconds if resumed else 0.0)
    records = Records(folder / "records.jsonl")
    base, progress = _begin(run, folder, records)
    interrupted = False
    run.display.begin_rounds(run.rounds, progress.state.round)
    try:
        with say_what_to_lower():
            _do_rounds(run, progress, records)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        run.display.end_rounds()
    result = _result(run, base, progress, folder, records, began, interrupted=interrupted)
    if interrupted:
        run.display.say(f"interrupted: kept the adapter of round {result.rounds}")
    elif run.method.prune is not keep_rank and not result.prunes:
        run.display.say("self-pruning never fired: lower min_rank or gamma, raise the penalty, or run longer")
    return result


def _begin(run: Undertaking, folder: Path, records: Records) -> tuple[Measurement, Progress]:
    """Write what is known before the first round."""
    (folder / "config.json").write_text(run.config.model_dump_json(indent=2), encoding="utf8")
    run.display.say("measuring the base")
    with say_what_to_lower():
        base = run.measure(None)
    records.append(run.run_record())
    records.append(evaluation_record(0, base))
    progress = Progress(run.first_state())
    if not run.rounds:
        progress.final = base
    return base, progress


def _do_rounds(run: Undertaking, progress: Progress, records: Records) -> None:
    """Do the rounds, each recorded when it is done; `progress` is true at any moment an interrupt may come."""
    every, began = run.config.evaluation.every, time.monotonic()
    for state, report in federated.run(progress.state, run.method, run.engine, run.cohort, run.rounds):
        record = round_record(report, state.adapter, time.monotonic() - began)
        progress.count(state, record)
        try:
            if state.round == run.rounds:
                progress.final = run.measure(state)
                record = replace(record, perplexity=progress.final.overall.perplexity)
            elif every and state.round % every == 0:
                record = replace(record, perplexity=run.measure(state, generate=False).overall.perplexity)
        finally:
            record = run.annotate(record)
            records.append(record)
        run.display.end_round(record)
        began = time.monotonic()


def _result(
    run: Undertaking,
    base: Measurement,
    progress: Progress,
    folder: Path,
    records: Records,
    began: float,
    *,
    interrupted: bool,
) -> RunResult:
    """Write what was learned and record its measurement."""
    state = progress.state
    adapter = run.write_result(state, folder)
    final = None if interrupted else progress.final
    if final is not None:
        records.append(evaluation_record(state.round, final))
    return RunResult(
        name=run.config.name,
        base=base,
        final=final,
        state=state,
        rounds=state.round,
        ranks=run.ranks(state),
        prunes=progress.prunes,
        updates=progress.updates,
        failures=progress.failures,
        bytes_up=progress.bytes_up,
        bytes_down=progress.bytes_down,
        seconds=time.monotonic() - began,
        peak_megabytes=peak_megabytes(_device(run.config)),
        adapter=adapter,
        records=records.path,
        interrupted=interrupted,
    )


def _device(config: RunConfig) -> torch.device:
    """Return whose memory this process has filled: a server that computes on its processor has touched no other."""
    return pick_device(config.model.device) if torch.cuda.is_initialized() else torch.device("cpu")
