"""Execution of a comparison's runs, in this process or in worker processes that exchange JSON lines over pipes."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from hetlora.commands.compare.grid import PlannedRun
from hetlora.config import RunConfig
from hetlora.errors import HetLoraError, expand_path
from hetlora.runs.display import QuietDisplay
from hetlora.runs.fingerprints import changed_file
from hetlora.runs.folder import atomic_write_text
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.runs.process import quiet_transformers
from hetlora.runs.records import plain, read_records
from hetlora.runs.result import RunResult

__all__ = [
    "Outcome",
    "Started",
    "WorkerPool",
    "execute_planned",
    "read_result",
    "run_sequentially",
    "serve",
]

RESULT = "result.json"


def execute_planned(config: RunConfig, stamps: Mapping[str, str | None], threads: int) -> str | None:
    """Execute one run; if this returns None, its result is on disk, written last.

    Args:
        config: The run, whose folder is empty.
        stamps: Stamps of the local files that its folder is named after: a run that read other files leaves no result.
        threads: Default number of PyTorch threads.

    Returns:
        None, or the reason of its failure; the traceback of an unexpected error is in `error.txt` in its folder.

    Raises:
        KeyboardInterrupt: Ctrl-C, at any time.
    """
    torch.set_num_threads(config.threads or threads)
    folder = expand_path(config.output) / config.name
    try:
        if problem := changed_file(config, stamps):
            return problem
        result = LocalExperiment(config, QuietDisplay()).run()
        if not result.interrupted and (problem := changed_file(config, stamps)):
            return problem
        if not result.interrupted and (result.updates or not result.failures):
            atomic_write_text(folder / RESULT, json.dumps(_figures(result), ensure_ascii=False, indent=1) + "\n")
            return None
    except HetLoraError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  the other runs go on; the failure is reported and sets the exit code
        return f"{type(error).__name__}: {error}{_kept_trace(folder)}"
    if result.interrupted:
        raise KeyboardInterrupt
    return f"no client ever gave an update; {result.records} says why"


def _kept_trace(folder: Path) -> str:
    """Write the traceback of the current error into a run's folder; return its path, for the reason of the failure."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf8")
    except OSError:  # the error may be that the disk is full
        return ""
    return f" ({folder / 'error.txt'})"


def _figures(result: RunResult) -> dict[str, Any]:
    """Return the unrounded figures of a run for the table."""
    records = read_records(result.records)
    rounds = [record for record in records if record["kind"] == "round"]
    final = result.final or result.base
    return plain(  # type: ignore[no-any-return]
        {
            "base": {"perplexity": result.base.overall.perplexity, "rougeL": result.base.overall.rouge_l},
            "final": {"perplexity": final.overall.perplexity, "rougeL": final.overall.rouge_l},
            "rounds": [
                {key: record[key] for key in ("round", "perplexity", "bytes_up", "bytes_down")} for record in rounds
            ],
            "every": records[0]["config"]["evaluation"]["every"],
            "bytes_up": result.bytes_up,
            "bytes_down": result.bytes_down,
            "prunes": result.prunes,
            "self_pruning": records[0]["self_pruning"],
            "updates": result.updates,
            "failures": result.failures,
            "dropped": sum(
                reason.startswith("dropped out") for record in rounds for reason in record["failures"].values()
            ),
            "ranks": result.ranks,
            "trainable_parameters": records[0]["trainable_parameters"],
            "base_parameters": records[0]["base_parameters"],
            "seconds": result.seconds,
            "versions": records[0]["versions"],
        }
    )


_SCORES = {"perplexity", "rougeL"}
_KEYS = {
    "base", "final", "rounds", "every", "bytes_up", "bytes_down", "prunes", "self_pruning", "updates", "failures",
    "dropped", "ranks", "trainable_parameters", "base_parameters", "seconds",
}  # fmt: skip
"""Keys that `hetlora.commands.compare.statistics` reads; a result without one of them is invalid."""


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return the figures of a finished run, or None."""
    try:
        figures = json.loads((folder / RESULT).read_text("utf8"))
    except (OSError, ValueError):
        return None
    if not isinstance(figures, dict) or not figures.keys() >= _KEYS:
        return None
    scores = (figures["base"], figures["final"])
    return figures if all(isinstance(score, dict) and score.keys() >= _SCORES for score in scores) else None


Outcome = tuple[PlannedRun, str | None]
"""An ended run and the reason of its failure, or None."""

Started = Callable[[PlannedRun], None]
"""Called when a run starts."""


def run_sequentially(runs: Sequence[PlannedRun], started: Started) -> Iterator[Outcome]:
    """Execute runs in this process, one after another."""
    threads = torch.get_num_threads()
    try:
        for run in runs:
            started(run)
            yield run, execute_planned(run.config, run.stamps, threads)
    finally:
        torch.set_num_threads(threads)


# Workers: the parent's side -----------------------------------------------------------------------------------------


class WorkerPool:
    """Worker processes that execute runs concurrently; each loads PyTorch once. A context manager that kills them on exit.

    Args:
        jobs: Number of processes.
        logs: Folder for their standard error.
    """

    def __init__(self, jobs: int, logs: Path) -> None:
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(logs / f"worker-{number}.log") for number in range(1, jobs + 1)]
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(jobs)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.end()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.tidy()

    def run(self, runs: Sequence[PlannedRun], started: Started) -> Iterator[Outcome]:
        """Execute runs and yield their outcomes as they end."""

        def execute(run: PlannedRun) -> str | None:
            worker = self._idle.get()
            started(run)
            try:
                return worker.execute_planned(run)
            finally:
                self._idle.put(worker)

        futures = {self._threads.submit(execute, run): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()


# Ctrl-C reaches all processes of a terminal; workers ignore it, and the parent kills them. They use the parent's module path.
_WORKER = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = {path!r}
from hetlora.runs.process import prepare_process
prepare_process()
from hetlora.commands.compare.workers import serve
serve()
"""


def _wait_and_close(process: subprocess.Popen[str]) -> int:
    """Wait for a process, close its pipes and return its exit code."""
    code = process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # unwritten data
            if pipe is not None:
                pipe.close()
    return code


class _Worker:
    """A process that executes one run after another; if it dies, the next run starts a new process."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self._ended = False
        self._lock = threading.Lock()
        log.unlink(missing_ok=True)

    def execute_planned(self, run: PlannedRun) -> str | None:
        """Execute a run; return the reason of its failure, or None."""
        process = self._alive()
        if process is None:
            return "not run: the comparison has ended"
        assert process.stdin
        assert process.stdout
        line = ""
        with contextlib.suppress(OSError):  # broken pipe: the process died
            # ASCII, because the encoding of the process may differ.
            request = {"config": run.config.model_dump_json(), "stamps": run.stamps}
            process.stdin.write(json.dumps(request, ensure_ascii=True) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if line:
            reason = json.loads(line)["failed"]
            return None if reason is None else str(reason)
        return self._death_notice(process)

    def end(self) -> None:
        """Kill the process."""
        with self._lock:
            self._ended = True
            process = self._process
        if process is not None:
            process.kill()

    def tidy(self) -> None:
        """Close the pipes of an ended process and remove an empty log."""
        if self._process is not None:
            _wait_and_close(self._process)
        with contextlib.suppress(OSError):
            if not self._log.stat().st_size:
                self._log.unlink()

    def _alive(self) -> subprocess.Popen[str] | None:
        """Return the process, started if necessary; None after `end`."""
        with self._lock:
            if self._ended:
                return None
            if self._process is None or self._process.poll() is not None:
                with self._log.open("ab") as log:
                    self._process = subprocess.Popen(  # noqa: S603  our interpreter and code
                        [sys.executable, "-c", _WORKER.format(path=sys.path)],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        encoding="utf8",
                    )
            return self._process

    def _death_notice(self, process: subprocess.Popen[str]) -> str:
        code = _wait_and_close(process)
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        hint = "; out of memory?" if hasattr(signal, "SIGKILL") and code == -signal.SIGKILL else ""
        lines = self._log.read_text("utf8", errors="replace").splitlines()
        return f"its worker process ended {how}{hint}" + (f" ({lines[-1]}; {self._log})" if lines else "")


# Workers: the child's side ------------------------------------------------------------------------------------------


def serve() -> None:
    """Execute the runs that arrive as JSON lines on standard input; answer each with ``{"failed": reason or null}``."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keeps prints of libraries out of the answers
    quiet_transformers()
    requests = _requests()
    while True:
        request = json.loads(requests.get())
        config = RunConfig.model_validate_json(request["config"])
        answers.write(json.dumps({"failed": execute_planned(config, request["stamps"], threads=1)}) + "\n")
        answers.flush()


def _requests() -> queue.SimpleQueue[str]:
    """Read standard input in a thread; at its end the parent is gone, and the process exits."""
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return requests
