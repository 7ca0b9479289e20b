"""A federation of real processes on this machine: a SuperLink with TLS that authenticates its SuperNodes, and some of those."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from hetlora.errors import HetLoraError
from hetlora.flower.local_federation import LocalFederation, free_port, listening, workers

__all__ = ["Federation", "certificates", "free_port", "key", "listening", "steps", "stopped", "workers"]

DEPLOY = Path(__file__).parents[1] / "docs" / "deploy.md"


class Federation(LocalFederation):
    """A federation whose processes are started by the commands of `docs/deploy.md`: what people read is what is run.

    Args:
        folder: For keys, certificates, logs and Flower's own state.
        fault: A text in the commands of the certificates, and what replaces it: a mistake that somebody makes.
    """

    def __init__(self, folder: Path, fault: tuple[str, str] | None = None) -> None:
        self._fault = fault
        super().__init__(folder)
        self.environment["HF_HUB_OFFLINE"] = "1"

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def write_certificates(self) -> None:
        """Write the certificates of step 2."""
        certificates(self.folder, self._fault)

    def write_key(self, name: str) -> None:
        """Write the pair of keys of step 4."""
        key(self.folder / name)

    def superlink_command(self) -> list[str]:
        """Return the command of step 3."""
        return shlex.split(steps(3).replace("0.0.0.0", "127.0.0.1").replace("9500", str(self.port)))

    def node_command(self, name: str, config: str) -> list[str]:
        """Return the command of step 5."""
        words = shlex.split(steps(5).replace("server.example.org:9500", f"127.0.0.1:{self.port}"))
        for option, value in (("--node-config", config), ("--auth-supernode-private-key", name)):
            words[words.index(option) + 1] = value
        return words

    def status(self, run: int) -> str:
        """Return the status of a run, or why Flower's command does not know it: a busy SuperLink answers it late."""
        try:
            return super().status(run)
        except (HetLoraError, subprocess.TimeoutExpired) as error:
            return f"unknown: {type(error).__name__}: {str(error)[-500:]}"

    def complete(self, run: int, folder: Path, seconds: float) -> None:
        """Wait until a run is complete, which its folder says more cheaply than Flower's command does.

        Raises:
            AssertionError: It ended in another way, or the SuperLink did; with the log.
            TimeoutError: It did not end in time.
        """
        looked = time.monotonic()

        def ended() -> bool:
            nonlocal looked
            if (folder / "summary.json").is_file():
                return True
            if (code := self.processes["superlink"].poll()) is not None:
                raise AssertionError(f"the SuperLink ended with {code}:\n{self.log('superlink')[-3000:]}")
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


def steps(number: int) -> str:
    """Return the commands of a step of docs/deploy.md, its first block: what people read is what is run."""
    _, _, section = DEPLOY.read_text("utf8").partition(f"\n## {number}. ")
    return section.split("```")[1].partition("\n")[2].replace("\\\n", " ")


def key(path: Path) -> None:
    """Write a private key for a node, and beside it the public one."""
    [command] = steps(4).strip().splitlines()
    subprocess.run([*shlex.split(command)[:-1], str(path)], check=True, capture_output=True)


def certificates(folder: Path, fault: tuple[str, str] | None = None) -> None:
    """Write a certificate authority, and a server's certificate for 127.0.0.1, into a folder.

    Args:
        folder: Created if necessary.
        fault: A text in the commands, and what replaces it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    commands = steps(2)
    if fault is not None:
        if fault[0] not in commands:
            raise ValueError(f"step 2 of {DEPLOY} has no {fault[0]!r}")
        commands = commands.replace(*fault)
    subprocess.run(["sh", "-e", "-c", commands], cwd=folder, check=True, capture_output=True)


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
