"""Fork processes from one that has already imported the libraries: the imports take longer than most tests."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# The package itself is not imported: each process imports the one that is in its own path. What is frozen is not
# looked through by the collector of garbage, and so stays shared.
SERVER = """
import gc, importlib, json, os, signal, sys, time, traceback
for module in sys.argv[1:]:
    importlib.import_module(module)
import torch
torch.set_num_threads(1)
assert "hetlora" not in sys.modules
gc.collect()
gc.freeze()

def be(job):
    for number in (1, 2):
        os.dup2(os.open(job["outputs"][number - 1], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(job["folder"])
        sys.path[:0] = job["path"]
        exec(compile(job["code"], "<job>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        be(job)
    ends = time.monotonic() + job["seconds"]
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > ends:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    print(os.waitstatus_to_exitcode(ended[1]), flush=True)
"""
LIBRARIES = ("numpy", "peft", "pydantic", "scipy.linalg", "rouge_score.rouge_scorer", "safetensors.torch")
LIBRARIES += ("transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto")
"""What a run imports when it comes to it."""


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
        code: Its exit code; negative: the signal that killed it.
        out: What it said on standard output.
        err: On standard error.
    """

    code: int
    out: str
    err: str


class Forks:
    """A process without the package whose forks run code.

    Args:
        process: The one that forks.
        place: A folder of its own.
    """

    def __init__(self, process: subprocess.Popen[str], place: Path) -> None:
        self._process, self._place = process, place

    def run(self, code: str, folder: Path, path: Sequence[Path], *, seconds: float = 300.0) -> Ended:
        """Run code in a process of its own, and wait for its end.

        Args:
            code: Python.
            folder: It works in.
            path: Where it looks for modules first.
            seconds: After which it is killed.
        """
        outputs = [self._place / name for name in ("out", "err")]
        for output in outputs:
            output.write_bytes(b"")
        job: dict[str, Any] = {"code": code, "folder": str(folder), "seconds": seconds}
        job |= {"path": [str(entry) for entry in path], "outputs": [str(output) for output in outputs]}
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        ended = int(self._process.stdout.readline())
        return Ended(ended, *(output.read_text("utf8", errors="replace") for output in outputs))


@contextlib.contextmanager
def forks(place: Path, libraries: Sequence[str] = LIBRARIES, **environment: str) -> Iterator[Forks]:
    """Start a process that forks.

    Args:
        place: A folder of its own.
        libraries: Modules that its forks find imported.
        **environment: Of it and its forks, beside this process's.
    """
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    values = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with subprocess.Popen([sys.executable, "-c", SERVER, *libraries], env=values, **pipes) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        try:
            yield Forks(process, place)
        finally:
            process.stdin.close()
