"""One run of a comparison: in this process, or in a worker that stays alive and speaks JSON lines over its pipes."""

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
from hetlora.errors import HetLoraError
from hetlora.runs.display import QuietDisplay
from hetlora.runs.fingerprints import changed_file
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
    "write_atomically",
]

RESULT = "result.json"


def execute_planned(config: RunConfig, stamps: Mapping[str, str | None], threads: int) -> str | None:
    """Do one run; its result is on disk, written last, when this returns None.

    Args:
        config: The run; nothing is yet in its folder.
        stamps: Of the local files that its folder is named after: a run that read others leaves no result.
        threads: Threads of PyTorch where the run does not say.

    Returns:
        None, or the reason it failed; `error.txt` in its folder then has the whole of it.

    Raises:
        KeyboardInterrupt: Ctrl-C, at any time.
    """
    torch.set_num_threads(config.threads or threads)
    folder = Path(config.output).expanduser() / config.name
    try:
        if told := changed_file(config, stamps):
            return told
        result = LocalExperiment(config, QuietDisplay()).run()
        if not result.interrupted and (told := changed_file(config, stamps)):
            return told
        if not result.interrupted and (result.updates or not result.failures):
            write_atomically(folder / RESULT, json.dumps(_figures(result), ensure_ascii=False, indent=1) + "\n")
            return None
    except HetLoraError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  whatever ends one run, the others go on; it is reported and decides the exit code
        return f"{type(error).__name__}: {error}{_kept_trace(folder)}"
    if result.interrupted:
        raise KeyboardInterrupt
    return f"no client ever gave an update; {result.records} says why"


def _kept_trace(folder: Path) -> str:
    """Write the traceback of the error at hand into a run's folder; return where it is, for the reason the run failed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf8")
    except OSError:  # the error may be that the disk is full
        return ""
    return f" ({folder / 'error.txt'})"


def _figures(result: RunResult) -> dict[str, Any]:
    """Return what a table needs of a run, unrounded, as plain data."""
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


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is either whole or not there."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf8")
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


_SCORES = {"perplexity", "rougeL"}
_KEYS = {
    *(
        "base",
        "final",
        "rounds",
        "every",
        "bytes_up",
        "bytes_down",
        "prunes",
        "self_pruning",
        "updates",
        "failures",
        "dropped",
    ),
    *("ranks", "trainable_parameters", "base_parameters", "seconds"),
}
"""What `hetlora.commands.compare.statistics` reads: a result without one of these is no result."""


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return the figures of a finished run, or None where it is not finished."""
    try:
        figures = json.loads((folder / RESULT).read_text("utf8"))
    except (OSError, ValueError):
        return None
    if not isinstance(figures, dict) or not figures.keys() >= _KEYS:
        return None
    scores = (figures["base"], figures["final"])
    return figures if all(isinstance(score, dict) and score.keys() >= _SCORES for score in scores) else None


Outcome = tuple[PlannedRun, str | None]
"""A run that has ended, and the reason it failed, if it did."""

Started = Callable[[PlannedRun], None]
"""Is told of a run when it begins."""


def run_sequentially(runs: Sequence[PlannedRun], started: Started) -> Iterator[Outcome]:
    """Do runs in this process, one after another."""
    threads = torch.get_num_threads()
    try:
        for run in runs:
            started(run)
            yield run, execute_planned(run.config, run.stamps, threads)
    finally:
        torch.set_num_threads(threads)


# Workers: what their owner sees -------------------------------------------------------------------------------------


class WorkerPool:
    """Processes that do runs side by side; each loads PyTorch once. A context manager: on leaving it, all are ended.

    Args:
        jobs: How many.
        logs: Folder for what they write to standard error.
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
        """Do runs, yielded as they end."""

        def one(run: PlannedRun) -> str | None:
            worker = self._idle.get()
            started(run)
            try:
                return worker.execute_planned(run)
            finally:
                self._idle.put(worker)

        futures = {self._threads.submit(one, run): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()


# Ctrl-C goes to the whole terminal: the owner ends its workers. Modules are those its owner would find.
_WORKER = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = {path!r}
from hetlora.runs.process import prepare_process
prepare_process()
from hetlora.commands.compare.workers import serve
serve()
"""


def _bury(process: subprocess.Popen[str]) -> int:
    """Wait for the end of a process and close its pipes; return its exit code."""
    code = process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was still to be written to it
            if pipe is not None:
                pipe.close()
    return code


class _Worker:
    """A process that does one run after another; where it dies, the next run gets a new one."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self._ended = False
        self._lock = threading.Lock()
        log.unlink(missing_ok=True)

    def execute_planned(self, run: PlannedRun) -> str | None:
        """Do a run; return the reason it failed, if it did."""
        process = self._alive()
        if process is None:
            return "not run: the comparison has ended"
        assert process.stdin
        assert process.stdout
        line = ""
        with contextlib.suppress(OSError):  # a broken pipe: it died
            # ASCII whatever the text: the process may read in an encoding of its own.
            request = {"config": run.config.model_dump_json(), "stamps": run.stamps}
            process.stdin.write(json.dumps(request, ensure_ascii=True) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if line:
            reason = json.loads(line)["failed"]
            return None if reason is None else str(reason)
        return self._epitaph(process)

    def end(self) -> None:
        """End the process, whatever it is doing."""
        with self._lock:
            self._ended = True
            process = self._process
        if process is not None:
            process.kill()

    def tidy(self) -> None:
        """Close what is left of an ended process."""
        if self._process is not None:
            _bury(self._process)
        with contextlib.suppress(OSError):
            if not self._log.stat().st_size:
                self._log.unlink()

    def _alive(self) -> subprocess.Popen[str] | None:
        """Return the process, started anew where there is none; None where it is to be none."""
        with self._lock:
            if self._ended:
                return None
            if self._process is None or self._process.poll() is not None:
                with self._log.open("ab") as log:
                    self._process = subprocess.Popen(  # noqa: S603  our own interpreter, our own code
                        [sys.executable, "-c", _WORKER.format(path=sys.path)],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        encoding="utf8",
                    )
            return self._process

    def _epitaph(self, process: subprocess.Popen[str]) -> str:
        code = _bury(process)
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        hint = "; out of memory?" if hasattr(signal, "SIGKILL") and code == -signal.SIGKILL else ""
        lines = self._log.read_text("utf8", errors="replace").splitlines()
        return f"its worker process ended {how}{hint}" + (f" ({lines[-1]}; {self._log})" if lines else "")


# Workers: the process itself ----------------------------------------------------------------------------------------


def serve() -> None:
    """Do the runs that come as JSON lines on standard input; answer each with a line ``{"failed": reason or null}``."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    quiet_transformers()
    requests = _requests()
    while True:
        request = json.loads(requests.get())
        config = RunConfig.model_validate_json(request["config"])
        answers.write(json.dumps({"failed": execute_planned(config, request["stamps"], threads=1)}) + "\n")
        answers.flush()


def _requests() -> queue.SimpleQueue[str]:
    """Read standard input beside the work: where it ends the owner is gone, and nobody wants what is being done."""
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return requests
