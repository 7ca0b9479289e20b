"""A federation of real processes on this machine: a SuperLink with TLS that authenticates its SuperNodes, and some of those."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
DEPLOY = Path(__file__).parents[1] / "docs" / "deploy.md"
START = 90.0


class Federation:
    """A SuperLink and its SuperNodes, started by the commands of `docs/deploy.md`; ended with the context.

    Args:
        folder: For keys, certificates, logs, Flower's own state.

    Attributes:
        port: Of the SuperLink.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        (folder / "flwr").mkdir(parents=True)
        certificates(folder)
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{folder / "ca.crt"}"\n'
        )

    def __enter__(self) -> Federation:
        self.start("superlink", *shlex.split(steps(3).replace("0.0.0.0", "127.0.0.1").replace("9500", str(self.port))))
        self.wait_for(lambda: listening(self.port), "the SuperLink to listen")
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.kill(name, signal.SIGTERM)
        for folder in self.folder.glob("state-*/*/settings.json"):
            with contextlib.suppress(ProcessLookupError):
                for pid in workers(folder.parent):
                    os.kill(pid, signal.SIGKILL)

    def start(self, name: str, *command: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a process of Flower's, its output in a log of its name."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                env={**self.environment, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        """End a process with all that it has started."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def register(self, name: str) -> None:
        """Make a key for a node and register it with the SuperLink."""
        key(self.folder / name)
        self.flwr("supernode", "register", str(self.folder / f"{name}.pub"), "here")

    def node(self, name: str, config: str) -> subprocess.Popen[bytes]:
        """Start the SuperNode of a name that is registered."""
        words = shlex.split(steps(5).replace("server.example.org:9500", f"127.0.0.1:{self.port}"))
        for option, value in (("--node-config", config), ("--auth-supernode-private-key", name)):
            words[words.index(option) + 1] = value
        words += ["--host", "127.0.0.1", "--port", str(free_port())]
        return self.start(name, *words, environment={"HETLORA_STATE": str(self.state(name))})

    def state(self, name: str) -> Path:
        """Return where the worker of a node has its socket and its log; short, as names of sockets must be."""
        return self.folder / f"state-{name}"

    def workers(self, name: str) -> list[int]:
        """Return the process of the client of a node, if it runs."""
        return [pid for folder in self.state(name).glob("*") for pid in workers(folder)]

    def flwr(self, *command: str) -> str:
        """Run a command of Flower's and return what it prints."""
        done = subprocess.run(
            [str(BIN / "flwr"), *command],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        if done.returncode:
            raise RuntimeError(f"flwr {' '.join(command)}: {done.stdout}\n{done.stderr}")
        return done.stdout

    def run(self, app: Path, run_config: str) -> int:
        """Start a run of a Flower App and return its number."""
        reply = json.loads(self.flwr("run", str(app), "here", "--run-config", run_config, "--format", "json"))
        return int(reply["run-id"])

    def status(self, run: int) -> str:
        """Return the status of a run, such as "running" or "finished:completed"."""
        reply = json.loads(self.flwr("list", "here", "--format", "json"))
        return next(str(entry["status"]) for entry in reply["runs"] if int(entry["run-id"]) == run)

    def complete(self, run: int, folder: Path, seconds: float) -> None:
        """Wait until a run is complete, which its folder says more cheaply than Flower's command does.

        Raises:
            AssertionError: It ended in another way; with its log.
            TimeoutError: It did not end in time.
        """
        looked = time.monotonic()

        def ended() -> bool:
            nonlocal looked
            if (folder / "summary.json").is_file():
                return True
            if time.monotonic() < looked + 15:
                return False
            looked = time.monotonic()
            return self.status(run).startswith("finished")

        self.wait_for(ended, f"run {folder.name} to end", seconds)
        status = self.wait_for(
            lambda: self.status(run) if self.status(run).startswith("finished") else "", "its status"
        )
        if status != "finished:completed":
            raise AssertionError(f"{status}\n{self.flwr('log', str(run), 'here', '--show')}")

    def log(self, name: str) -> str:
        """Return a process's log."""
        return (self.folder / f"{name}.log").read_text("utf8", errors="replace")

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


def workers(folder: Path) -> list[int]:
    """Return the processes that serve a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes().split(b"\0")
            if b"hetlora.flower.client_process" in words and str(folder).encode() in words:
                found.append(int(entry.parent.name))
    return found


def listening(port: int) -> bool:
    """Whether something listens on a port of this machine."""
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as attempt:
        attempt.bind(("127.0.0.1", 0))
        return int(attempt.getsockname()[1])


def steps(number: int) -> str:
    """Return the commands of a step of docs/deploy.md, its first block: what people read is what is run."""
    _, _, section = DEPLOY.read_text("utf8").partition(f"\n## {number}. ")
    return section.split("```")[1].partition("\n")[2].replace("\\\n", " ")


def key(path: Path) -> None:
    """Write a private key for a node, and beside it the public one."""
    [command] = steps(4).strip().splitlines()
    subprocess.run([*shlex.split(command)[:-1], str(path)], check=True, capture_output=True)


def certificates(folder: Path) -> None:
    """Write a certificate authority, and a server's certificate for 127.0.0.1, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["sh", "-e", "-c", steps(2)], cwd=folder, check=True, capture_output=True)


@contextlib.contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """Suspend processes for a while."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
