"""Executes a run: measurements, rounds, records and results.

`execute_run` is the same for a simulation and a federation of real machines; they differ in their `Experiment`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from hetlora._version import __version__
from hetlora.config import RunConfig
from hetlora.config.reading import parse_run_config
from hetlora.core.adapter import Adapter, Rank
from hetlora.core.method import Engine, Method, RobustAggregation, keep_rank
from hetlora.core.round import run_rounds
from hetlora.core.types import Client, ServerState
from hetlora.errors import HetLoraError
from hetlora.model.lora_model import pick_device
from hetlora.runs.checkpoint import Checkpoint, checkpoint_path, differences, write_checkpoint
from hetlora.runs.folder import SUMMARY, atomic_write_text, resume_command, run_lock, sync, write_summary
from hetlora.runs.former import former_names
from hetlora.runs.memory import explain_oom, peak_megabytes
from hetlora.runs.observer import Observer, Observers
from hetlora.runs.progress import ObservedEngine
from hetlora.runs.records import Records, RoundRecord, RunRecord
from hetlora.runs.result import Measurement, RunResult, RunTotals, evaluation_record, round_record
from hetlora.runs.text import figure
from hetlora.runs.tracking.trackers import Trackers
from hetlora.training.local import LocalTraining

__all__ = ["RESULTS", "Experiment", "execute_run", "execute_run_within", "explain_write_errors"]


class Experiment(Protocol):
    """Parts of a run, ready to begin: an experiment in one process, or a server of real machines.

    It is complete before the first round and does not change; the `ServerState` does.

    Attributes:
        config: The validated run.
        display: Shows the progress; several observers form an `Observers`.
        method: What the server and the clients do.
        engine: Where the clients train.
        training: Local training of an honest client.
        rounding: Rounding error of transmitted numbers, as in `hetlora.core.round.run_round`.
        robust: Bounds the influence of a client; None for no bound beyond that of `training`.
    """

    config: RunConfig
    display: Observer
    method: Method[Any]
    engine: Engine
    training: LocalTraining
    rounding: float
    robust: RobustAggregation | None

    @property
    def rounds(self) -> int:
        """Return the number of rounds of the whole run."""
        ...

    def first_state(self) -> ServerState:
        """Return the state before the first round."""
        ...

    def cohort(self, round_number: int) -> Sequence[Client]:
        """Return the clients of a round, numbered from 0. They depend only on seed and number, also in a resumed run."""
        ...

    def measure(self, state: ServerState | None, *, generate: bool = True) -> Measurement:
        """Score held-out rows with the adapter of `state`, or with the base if it is None, and `generate` answers."""
        ...

    def write_result(self, state: ServerState, folder: Path) -> Path | None:
        """Write what the run has learned into its folder, without `RESULTS`, and return where; None if nobody trained."""
        ...

    def run_record(self) -> RunRecord:
        """Return the first record."""
        ...

    def ranks(self, state: ServerState) -> Mapping[str, Rank]:
        """Return the ranks that the result lists; empty where the method has none."""
        ...

    def digests(self) -> Mapping[str, str | None]:
        """Return digests of base, tokenizer and data by key, e.g. ``data.path``; a run resumes only if they are unchanged."""
        ...

    def annotate(self, record: RoundRecord) -> RoundRecord:
        """Return the record of a round with the engine's own figures, just before it is written."""
        return record


def execute_run(run: Experiment, folder: Path, resumed: Checkpoint | None = None) -> RunResult:
    """Measure the base, do the rounds, measure the result, write the adapter. Ctrl-C ends the rounds cleanly.

    A run that is resumed from a checkpoint ends with the same adapter, bit for bit, the same records except for seconds, and
    the same figures as one without interruption.

    Args:
        run: The experiment.
        folder: The run's folder, which exists. It receives `config.json`, `records.jsonl`, `checkpoints`, the adapter and, at
            the end, `summary.json`.
        resumed: Where to resume; None begins at round 0, whatever the folder holds.

    Raises:
        HetLoraError: The checkpoint is of another run, version or device; another process holds the folder; a record of a
            round, a checkpoint or the result cannot be written.
        OSError: The files before the first round cannot be written.
        KeyboardInterrupt: Ctrl-C before the first round or after the last one; the run can be resumed.
    """
    with run_lock(folder):
        return execute_run_within(run, folder, resumed)


def execute_run_within(run: Experiment, folder: Path, resumed: Checkpoint | None) -> RunResult:
    """Execute a run as `execute_run` does, for a caller that holds the lock of the folder."""
    try:
        return Runner(run, folder, resumed).result()
    except KeyboardInterrupt:
        if run.config.checkpoint_every:
            run.display.say(f"interrupted: {resume_command(folder)} goes on")
        raise


@contextlib.contextmanager
def explain_write_errors(output: str) -> Iterator[None]:
    """Turn write errors of Python and safetensors, e.g. of a full disk, into one that names the folder.

    Raises:
        HetLoraError: Nothing can be written to `output`.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise HetLoraError(
            f"cannot write to {output!r}: {error}; free some space, or set output to a folder with enough"
        ) from error


RESULTS = ("adapter", "adapters", "model")
"""Folders of results, in which an interrupted run may have left some, see `LocalExperiment.write_result`."""


class Runner(Observer):
    """One execution of a run, new or resumed; it is also the observer that writes checkpoints."""

    def __init__(self, run: Experiment, folder: Path, resumed: Checkpoint | None) -> None:
        self.run, self.folder = run, folder
        self.began = time.monotonic() - (resumed.seconds if resumed else 0.0)
        self.every = run.config.checkpoint_every
        self.config = run.config.model_dump(mode="json")
        self.digests = run.digests() if self.every or resumed else {}
        self.made_by = {"hetlora": __version__, **_versions(), "device": _device(run.config).type}
        self.records = _RunRecords(folder / "records.jsonl", self._explain_write_errors)
        if resumed is not None:
            self._check(resumed)
        (folder / SUMMARY).unlink(missing_ok=True)
        self.records.cut(resumed.records if resumed else 0)
        self.progress = replace(resumed.progress) if resumed else RunTotals(run.first_state())
        self.safe = self.progress.state.round  # the round from which the run can be resumed
        tracking = run.config.tracking
        trackers = Trackers(tracking.to, tracking.project, self.config, folder, self.progress, run.display.say)
        # Records come before all others, and trackers before the checkpoint, after which no round is tracked again.
        self.observers = Observers([self.records, trackers, self, run.display])
        self.watch = ObservedEngine(run.engine, self.observers.round_changed)
        self.base = resumed.base if resumed else self._begin()

    def result(self) -> RunResult:
        """Do the rounds, and measure and write the result."""
        result = None
        try:
            result = self._result()
        finally:
            self.observers.run_ended(result)
        return result

    def _result(self) -> RunResult:
        run, interrupted = self.run, False
        try:
            self.observers.rounds_started(self.run.rounds, self.safe)
            with explain_oom():
                self._do_rounds()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            self.observers.rounds_ended()
        with self._explain_write_errors(self.folder):
            result = self._written(interrupted=interrupted)
        if interrupted:
            run.display.say(f"interrupted: kept the adapter of round {result.rounds}; {self._way_on()}")
        elif run.method.prune is not keep_rank and result.updates and not result.prunes:
            run.display.say("self-pruning never fired: lower min_rank or gamma, raise the penalty, or run longer")
        return result

    def _check(self, resumed: Checkpoint) -> None:
        """Refuse to resume if it would not be the same run."""
        # A key that is younger than the checkpoint has the value by which an older run is read.
        began = parse_run_config(json.dumps(resumed.config), "the checkpoint").model_dump(mode="json")
        changed = differences(replace(resumed, config=began), self.config, self.digests, self.made_by)
        first, state = self.run.first_state(), resumed.progress.state
        if not changed and _shapes(first.adapter) != _shapes(state.adapter):
            changed = ["the base has other modules than when the run began"]
        if changed:
            lines = "".join(f"\n  {line}" for line in changed)
            raise HetLoraError(
                f"{str(self.folder)!r} cannot go on, for it would not be the same run:{lines}\nundo that, or begin another run"
            )

    def _begin(self) -> Measurement:
        """Write the configuration, and measure, record and return the scores of the base."""
        run = self.run
        atomic_write_text(self.folder / "config.json", run.config.model_dump_json(indent=2))
        run.display.say("measuring the base")
        with explain_oom():
            base = run.measure(None)
        self.observers.run_started(run.run_record())
        self.observers.evaluated(evaluation_record(0, base))
        if run.config.model.adapter is not None:
            run.display.say("measuring the adapter that it starts from")
            with explain_oom():
                start = run.measure(self.progress.state, generate=False)
            self.observers.evaluated(evaluation_record(0, start))
            run.display.say(f"held-out perplexity {_change(base, start)} before the first round")
        if not run.rounds:
            self.progress.final = base
        return base

    def _do_rounds(self) -> None:
        """Do and record the rounds; `progress` is consistent whenever an interrupt may come."""
        run, progress, began = self.run, self.progress, time.monotonic()
        every = run.config.evaluation.every
        rounds = run_rounds(
            progress.state,
            run.method,
            self.watch,
            self.watch.drawing(run.cohort),
            run.rounds,
            training=run.training,
            rounding=run.rounding,
            robust=run.robust,
        )
        for state, report in rounds:
            record = round_record(report, state.training_state.adapter, time.monotonic() - began)
            progress.count(state, record)
            try:
                last = state.round == run.rounds
                if last or (every and state.round % every == 0):
                    self.watch.doing("measuring")
                    measured = run.measure(state, generate=last)
                    record = replace(record, perplexity=measured.overall.perplexity)
                    progress.final = measured if last else None
            except BaseException:  # the round counts even if it is not measured
                self.records.round_ended(run.annotate(record))
                raise
            self.observers.round_ended(run.annotate(record))
            began = time.monotonic()

    def round_ended(self, record: RoundRecord) -> None:
        """Write a checkpoint where one is due."""
        if not self.every or (record.round % self.every and record.round != self.run.rounds):
            return
        self.watch.doing("writing a checkpoint")
        with self._explain_write_errors(self.records.path):
            length = self.records.sync()
        checkpoint = Checkpoint(
            progress=self.progress,
            base=self.base,
            records=length,
            records_sha256=self.records.sha256(length),
            seconds=time.monotonic() - self.began,
            config=self.config,
            digests=self.digests,
            threads=torch.get_num_threads(),
            made_by=self.made_by,
        )
        with self._explain_write_errors(checkpoint_path(checkpoint, self.folder)):
            write_checkpoint(checkpoint, self.folder)
        self.safe = self.progress.state.round

    @contextlib.contextmanager
    def _explain_write_errors(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:  # the writer of safetensors has its own errors
            reason = getattr(error, "strerror", None) or error
            raise HetLoraError(
                f"cannot write to {str(path)!r}: {reason}; free some space, or make it writable, and {self._way_on()}"
            ) from error

    def _way_on(self) -> str:
        if not self.every and self.progress.state.round:
            return "begin it again: without checkpoints (checkpoint_every = 0) it cannot go on"
        return f"{resume_command(self.folder)} goes on from round {self.safe}"

    def _written(self, *, interrupted: bool) -> RunResult:
        """Write what the run has learned, and record its measurement."""
        run, progress, state = self.run, self.progress, self.progress.state
        for name in RESULTS:
            if (self.folder / name).exists():
                shutil.rmtree(self.folder / name)
        adapter = run.write_result(state, self.folder)
        final = None if interrupted else progress.final
        if final is not None:
            self.observers.evaluated(evaluation_record(state.round, final))
        result = RunResult(
            name=run.config.name,
            base=self.base,
            final=final,
            state=state,
            rounds=state.round,
            ranks=run.ranks(state),
            prunes=progress.prunes,
            updates=progress.updates,
            failures=progress.failures,
            bytes_up=progress.bytes_up,
            bytes_down=progress.bytes_down,
            seconds=time.monotonic() - self.began,
            peak_megabytes=peak_megabytes(_device(run.config)),
            adapter=adapter,
            records=self.records.path,
            interrupted=interrupted,
        )
        if not interrupted:
            for written in (adapter, self.records.path):
                if written is not None:
                    sync(written)
            write_summary(self.folder, result.summary())
        return result


class _RunRecords(Records):
    """The records of a run; write errors after the first round explain how to resume."""

    def __init__(self, path: Path, explain: Callable[[Path], AbstractContextManager[None]]) -> None:
        super().__init__(path)
        self._explain = explain

    def round_ended(self, record: RoundRecord) -> None:
        with self._explain(self.path):
            super().round_ended(record)


def _change(base: Measurement, start: Measurement) -> str:
    before, after = base.overall.perplexity, start.overall.perplexity
    if before is None or after is None:
        return "not measured"
    return f"{figure(before, '.2f')} (base alone) -> {figure(after, '.2f')}"


def _shapes(adapter: Adapter) -> dict[str, tuple[int, int]]:
    return {module: (B.shape[0], A.shape[1]) for module, (A, B) in adapter.items()}


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}


def _device(config: RunConfig) -> torch.device:
    """Return the device whose memory this process uses; a server on the CPU has not initialised CUDA."""
    return pick_device(config.model.device) if torch.cuda.is_initialized() else torch.device("cpu")  # type: ignore[no-untyped-call]


__getattr__ = former_names(
    __name__,
    Display=Observer,
    conduct=execute_run,
    conduct_within=execute_run_within,
    writing_to=explain_write_errors,
)
