"""A federation of real processes on this machine: a SuperLink with TLS that authenticates its SuperNodes, and some of those."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hetlora.errors import HetLoraError
from hetlora.flower.credentials import write_certificates, write_key

__all__ = ["LocalFederation", "end_leftovers", "free_port", "listening", "workers"]

START = 90.0
"""Seconds that a process may need to start."""

END = 20.0
"""Seconds that a process may need to end; then it is killed."""

OF = "HETLORA_FEDERATION"
"""Variable of the environment by which the processes of a federation are known; a person's shell has none."""

LAST = 12
"""Lines of a log that an error shows."""


class LocalFederation:
    """A SuperLink and its SuperNodes, all ended with the context.

    Args:
        folder: For keys, certificates, logs and Flower's own state.
        place: The working directory of all processes; by default `folder`.

    Attributes:
        folder: The same, as an absolute path.
        port: Port of the SuperLink.
        processes: The running processes by name.
        environment: Environment of all processes: no telemetry, updates or installations, and a `FLWR_HOME` in `folder`.
    """

    def __init__(self, folder: Path, place: Path | None = None) -> None:
        self.folder = folder.absolute()
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._place = place or self.folder
        scripts = str(Path(sys.executable).parent)
        self.environment = {
            **os.environ,
            "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            OF: str(self.folder),
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        (self.folder / "flwr").mkdir(parents=True)
        self.write_certificates()
        (self.folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n'
            f"root-certificates = {json.dumps(str(self.folder / 'ca.crt'))}\n",
            encoding="utf8",
        )

    def __enter__(self) -> LocalFederation:
        try:
            self.start("superlink", *self.superlink_command())
            self.wait_for(lambda: listening(self.port), "the SuperLink to listen")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def write_certificates(self) -> None:
        """Write the certificates into the folder."""
        write_certificates(self.folder)

    def write_key(self, name: str) -> None:
        """Write the pair of keys of a node into the folder."""
        write_key(self.folder / name)

    def superlink_command(self) -> list[str]:
        """Return the command that starts the SuperLink, as in step 3 of docs/deploy.md."""
        files = {"ca-certfile": "ca.crt", "certfile": "server.crt", "keyfile": "server.key"}
        tls = [word for option, file in files.items() for word in (f"--ssl-{option}", str(self.folder / file))]
        return [
            *("hetlora", "flower", "superlink", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--database", str(self.folder / "state.db")),
            *tls,
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        ]

    def node_command(self, name: str, config: str) -> list[str]:
        """Return the command that starts a SuperNode, as in step 5 of docs/deploy.md."""
        return [
            *("flower-supernode", "--superlink", f"127.0.0.1:{self.port}"),
            *("--root-certificates", str(self.folder / "ca.crt")),
            *("--auth-supernode-private-key", str(self.folder / name)),
            *("--node-config", config),
        ]

    def start(self, name: str, *command: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a process of Flower's, its output in a log of its name."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(  # noqa: S603  Flower's own programs, no shell
                [self._program(command[0]), *command[1:]],
                env={**self.environment, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._place,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        """End a process with all that it has started."""
        process = self.processes.pop(name)
        _signal_group(process, how)
        _await_end(process, time.monotonic() + END)

    def stop(self) -> None:
        """End every process of this federation: those in `processes`, what they have started, and the clients' own ones."""
        with _undisturbed():
            for process in self.processes.values():
                _signal_group(process, signal.SIGTERM)
            until = time.monotonic() + END
            for name in list(self.processes):
                _await_end(self.processes.pop(name), until)
            end_leftovers(self.folder)

    def register(self, name: str) -> None:
        """Make a key for a node and register it with the SuperLink."""
        self.write_key(name)
        self.flwr("supernode", "register", str(self.folder / f"{name}.pub"), "here")

    def node(self, name: str, config: str) -> subprocess.Popen[bytes]:
        """Start the SuperNode of a name that is registered."""
        words = [*self.node_command(name, config), "--host", "127.0.0.1", "--port", str(free_port())]
        return self.start(name, *words, environment={"HETLORA_STATE": str(self.state(name))})

    def state(self, name: str) -> Path:
        """Return where the worker of a node has its socket and its log."""
        return self.folder / f"state-{name}"

    def workers(self, name: str) -> list[int]:
        """Return the process of the client of a node, if it runs."""
        return [pid for folder in self.state(name).glob("*") for pid in workers(folder)]

    def flwr(self, *command: str) -> str:
        """Run a command of Flower's and return what it prints.

        Raises:
            HetLoraError: It failed; with what it printed.
        """
        done = subprocess.run(  # noqa: S603  Flower's own program, no shell
            [self._program("flwr"), *command],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            cwd=self._place,
        )
        if done.returncode:
            raise HetLoraError(f"flwr {' '.join(command)} failed: {done.stdout}\n{done.stderr}")
        return done.stdout

    def run(self, app: Path, run_config: str) -> int:
        """Start a run of a Flower App and return its number."""
        reply = json.loads(self.flwr("run", str(app), "here", "--run-config", run_config, "--format", "json"))
        return int(reply["run-id"])

    def status(self, run: int) -> str:
        """Return the status of a run, such as "running" or "finished:completed".

        Raises:
            HetLoraError: Flower's command fails, or does not know the run: a busy SuperLink answers without its runs.
        """
        said = self.flwr("list", "here", "--format", "json")
        try:
            return next(str(entry["status"]) for entry in json.loads(said)["runs"] if int(entry["run-id"]) == run)
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise HetLoraError(f"flwr list does not know run {run}; it says: {said.strip()[-500:]}") from error

    def log(self, name: str) -> str:
        """Return a process's log."""
        return (self.folder / f"{name}.log").read_text("utf8", errors="replace")

    def check(self) -> None:
        """Check that all processes run.

        Raises:
            HetLoraError: One has ended; with the last lines of its log.
        """
        for name, process in self.processes.items():
            if process.poll() is not None:
                lines = [line for line in self.log(name).splitlines() if line.strip()][-LAST:]
                said = "\n".join(lines) or "it wrote nothing"
                raise HetLoraError(f"the process {name!r} ended; {self.folder / name}.log ends with:\n{said}")

    def wait_for(self, holds: Callable[[], object], what: str, seconds: float = START) -> Any:
        """Wait until something holds, and return it.

        Raises:
            TimeoutError: It did not in time; with the ends of all logs.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if found := holds():
                return found
            time.sleep(0.2)
        logs = "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in self.folder.glob("*.log")
        )
        raise TimeoutError(f"waited {seconds:g} s for {what}\n{logs}")

    def _program(self, name: str) -> str:
        found = shutil.which(name, path=self.environment["PATH"])
        if found is None:
            raise HetLoraError(f"{name}, a program of Flower, is not installed; pip install 'hetlora[flower]'")
        return found


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore another Ctrl-C, with which an impatient person would leave processes running."""
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for which in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                stack.callback(signal.signal, which, signal.signal(which, signal.SIG_IGN))
        yield


def end_leftovers(folder: Path) -> None:
    """Kill what still runs of a federation in a folder, such as its clients' own processes; on Linux only."""
    mark = f"{OF}={folder.absolute()}"
    until = time.monotonic() + END
    while (left := _with_environment(mark)) and time.monotonic() < until:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def workers(folder: Path) -> list[int]:
    """Return the processes that serve a folder; on Linux only."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes().split(b"\0")
            if b"hetlora.flower.client_process" in words and str(folder).encode() in words:
                found.append(int(entry.parent.name))
    return found


def listening(port: int) -> bool:
    """Return whether something listens on a port of this machine."""
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as attempt:
        attempt.bind(("127.0.0.1", 0))
        return int(attempt.getsockname()[1])


def _signal_group(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def _await_end(process: subprocess.Popen[bytes], until: float) -> None:
    try:
        process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _with_environment(setting: str) -> list[int]:
    """Return the processes with a variable of the environment; on Linux only. Dead ones that nobody has awaited have none."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if setting.encode() in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
    return found
