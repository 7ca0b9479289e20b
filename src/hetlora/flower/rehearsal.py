"""A rehearsal of docs/deploy.md on this machine: real processes with TLS and keys, and each client with a file of rows."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import tomli_w

from hetlora.config import RunConfig, load_config
from hetlora.config.build import make_method
from hetlora.config.build_data import load_records
from hetlora.config.build_model import build_outline
from hetlora.config.preconditions import check_result
from hetlora.config.reading import read_document
from hetlora.errors import HetLoraError, printable
from hetlora.flower.engine import check_method
from hetlora.flower.local_federation import LocalFederation, end_leftovers
from hetlora.runs.folder import folder_lock, read_summary
from hetlora.runs.reader import RECORDS, read_run
from hetlora.runs.text import many

__all__ = ["Rehearsal", "rehearse"]

LONGEST = 86400.0
"""Seconds after which a rehearsal is given up."""

WAIT = 90
"""Seconds that the rehearsal's server waits for its clients."""

SHOWN = "round |client |node |waiting |data: |loading |measuring |here |self-pruning"
"""What hetlora's lines in the log of a SuperLink begin with, as far as a rehearsal shows them."""

REFUSED = r"node \d+ was refused: "


@dataclass(frozen=True)
class _Client:
    """A client of the rehearsal: its name, the name of the rows' owner in the data, its rows as JSON Lines, and its rank."""

    name: str
    owner: str
    rows: tuple[str, ...]
    rank: int


@dataclass(frozen=True)
class Rehearsal:
    """A finished rehearsal: the folder of its run, and the run's summary."""

    run: Path
    summary: dict[str, Any]


def rehearse(app: Path, clients: int, say: Callable[[str], None]) -> Rehearsal:
    """Run a Flower App with a SuperLink and SuperNodes on this machine; end every process, whatever happens.

    Args:
        app: The folder of the app. Keys, logs and rows go to its folder `local`, the results to `runs`.
        clients: Number of clients; their rows are those that the app's configuration divides.
        say: Called with lines about the progress.

    Raises:
        HetLoraError: The app cannot be run, a process ended, or a client or the run failed; with the last lines of the log.
        KeyboardInterrupt: It was interrupted; its text says after which round, and where the records are.
    """
    config = _read(app, clients)
    taking_part = _clients(config, clients)
    say(f"the rehearsal sets these keys of run.toml: {', '.join(_changes(clients))}")
    with _ended_by_signals(), _fresh(app / "local") as folder, _plain_errors():
        copy, output = folder / "app", app.absolute() / "runs"
        _write_app(app, copy, clients, output)
        for client in taking_part:
            (folder / f"{client.name}.jsonl").write_text("".join(client.rows), encoding="utf8")
            say(f"{client.name}: {len(client.rows)} rows of {client.owner!r}, rank {client.rank}")
        before = set(output.glob("*"))
        with LocalFederation(folder, Path.cwd()) as federation, _said_when_interrupted(federation, app, before, say):
            say(f"the SuperLink listens on port {federation.port}; logs are in {folder}")
            with ThreadPoolExecutor() as pool:
                list(pool.map(federation.register, [client.name for client in taking_part]))
            for client in taking_part:
                federation.node(client.name, _node_config(config, folder, client))
            say(f"{many(clients, 'key')} registered, {many(clients, 'SuperNode')} started")
            return _followed(federation, copy, output, before, say)


def _read(app: Path, clients: int) -> RunConfig:
    """Return the configuration of a rehearsal, with as many clients as it has."""
    run = app / "run.toml"
    for file in (app / "pyproject.toml", run):
        if not file.is_file():
            raise HetLoraError(f"{file} is not there; write an app with hetlora flower new {app}")
    if clients < 1:
        raise HetLoraError(f"--clients {clients}: give 1 or more")
    kind = load_config(run).partition.kind
    if kind == "sampled":
        raise HetLoraError(
            f'{run}: the clients of partition.kind = "sampled" share one pool of rows, and a rehearsal gives each its own '
            'file; set partition.kind = "iid"'
        )
    divided = "data.clients" if kind == "natural" else "partition.clients"
    _check_served(load_config(run, [*_changes(clients), 'flower.clients="nodes"']))
    return load_config(run, [f"{divided}={clients}", *_changes(clients), 'flower.clients="config"'])


def _check_served(config: RunConfig) -> None:
    """Refuse at once what the server would refuse after all processes have started.

    Raises:
        HetLoraError: The method cannot run over Flower, or it and the base do not fit together.
    """
    check_method(make_method(config))
    check_result(config, build_outline(config))


def _changes(clients: int) -> list[str]:
    return [f"federation.clients_per_round={clients}", f"flower.min_clients={clients}", f"flower.wait={WAIT}"]


def _clients(config: RunConfig, count: int) -> list[_Client]:
    """Return the clients, with ranks from the largest downwards."""
    largest = config.ranks.largest
    records = load_records(config)
    lines = {owner: tuple(json.dumps(row, default=str) + "\n" for row in rows) for owner, rows in records.items()}
    return [
        _Client(f"client-{index + 1}", owner, rows, max(1, largest >> index % 3))
        for index, (owner, rows) in enumerate(list(lines.items())[:count])
    ]


def _write_app(app: Path, copy: Path, clients: int, output: Path) -> None:
    """Write a copy of the app with the rehearsal's number of clients and place of the results."""
    copy.mkdir()
    for file in app.glob("*.toml"):
        shutil.copy(file, copy)
    changes = [*_changes(clients), f"output={json.dumps(str(output))}", 'flower.clients="nodes"']
    document = read_document(app / "run.toml", changes)
    (copy / "run.toml").write_text(tomli_w.dumps(document), encoding="utf8")


def _node_config(config: RunConfig, folder: Path, client: _Client) -> str:
    values = {"data": str(folder / f"{client.name}.jsonl"), "name": client.name}
    if Path(config.model.base).is_dir():
        values["base"] = str(Path(config.model.base).absolute())
    module, colon, _ = config.method.name.partition(":")
    if colon:
        values["methods"] = module
    for value in values.values():
        if json.dumps(value, ensure_ascii=False) != f'"{value}"':
            raise HetLoraError(f"{value!r} holds a sign that Flower's --node-config cannot; rename the folder")
    # Short, so that on a system without /proc the client's own process, which cannot be found there, ends soon.
    return " ".join([*(f'{key}="{value}"' for key, value in values.items()), f"rank={client.rank} idle=120.0"])


def _followed(
    federation: LocalFederation, app: Path, output: Path, before: set[Path], say: Callable[[str], None]
) -> Rehearsal:
    """Start the run, show the server's lines until it has ended, and return its folder and summary."""
    # Flower keeps the lines of its ServerApp in its database alone, and prints them here.
    command = ("flwr", "run", str(app), "here", "--run-config", 'config="run.toml"', "--stream")
    stream = federation.start("run", *command, environment={"PYTHONUNBUFFERED": "1"})
    lines = _ServerLines(federation.folder / "run.log", say)

    def ended() -> bool:
        over = stream.poll() is not None
        lines.show()
        if over:
            del federation.processes["run"]
        federation.check()
        return over

    federation.wait_for(ended, "the run to end", LONGEST)
    for run in sorted(set(output.glob("*")) - before):
        if (summary := read_summary(run)) is not None:
            return Rehearsal(run, summary)
    raise HetLoraError(lines.failure or f"the run ended without a result; {lines.path} says why")


@contextlib.contextmanager
def _said_when_interrupted(
    federation: LocalFederation, app: Path, before: set[Path], say: Callable[[str], None]
) -> Iterator[None]:
    """Say at once that the processes are being ended, which takes seconds, and which rounds are recorded."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted: {len(federation.processes)} of Flower's processes are being ended")
        raise KeyboardInterrupt(_recorded(app, before)) from None


def _recorded(app: Path, before: set[Path]) -> str:
    """Return how far the run of an interrupted rehearsal came."""
    for run in sorted({path.absolute() for path in (app / "runs").glob("*")} - before):
        if (run / RECORDS).is_file() and (rounds := read_run(run).rounds):
            return (
                f"interrupted after round {rounds[-1].number}; records: {app / 'runs' / run.name}; a rehearsal does not go "
                "on, start it again"
            )
    return "interrupted before a round had ended; there are no records of one"


class _ServerLines:
    """The lines of hetlora's server in a log, shown as they come.

    Args:
        path: The log.
        say: Called with the lines.

    Attributes:
        path: The same.
        failure: What ended the run, as the server said it, with the indented lines that follow; None without that.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path = path
        self.failure: str | None = None
        self._say, self._read = say, 0
        self._explaining = False

    def show(self) -> None:
        """Show the new lines.

        Raises:
            HetLoraError: A client was refused, which in a rehearsal nobody mends meanwhile.
        """
        with self.path.open("rb") as log:
            log.seek(self._read)
            new = log.read()
        new = new[: new.rfind(b"\n") + 1]
        self._read += len(new)
        for line in new.decode("utf8", "replace").splitlines():
            if self._explaining and line.startswith("  "):
                self.failure = f"{self.failure}\n{line}"
                continue
            self._explaining = line.startswith("hetlora: ")
            if self._explaining:
                self.failure = line.removeprefix("hetlora: ")
            elif re.match(REFUSED, line):
                raise HetLoraError(line)
            elif re.match(SHOWN, line):
                self._say(printable(line))


MARK = ".hetlora-rehearsal"
"""A file by which the folder of a rehearsal is known, so that no other one is emptied."""


@contextlib.contextmanager
def _fresh(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that this user alone may enter, and hold its lock; what a former rehearsal left is removed.

    Raises:
        HetLoraError: It holds other files, or another rehearsal runs there.
    """
    mark = folder / MARK
    if folder.is_symlink() or (folder.exists() and not mark.is_file() and any(folder.iterdir())):
        raise HetLoraError(f"{folder} holds files that are no rehearsal's; move them, or give another app")
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    with folder_lock(folder, f"another rehearsal runs in {folder}; wait for it, or end it"):
        end_leftovers(folder)
        for item in folder.iterdir():
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            elif item.name != ".lock":
                item.unlink()
        mark.touch()
        (folder / ".gitignore").write_text("*\n", encoding="utf8")
        yield folder.absolute()


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Explain what the system or a program of Flower's refuses."""
    try:
        yield
    except OSError as error:  # TimeoutError, too
        raise HetLoraError(f"the rehearsal failed: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise HetLoraError(f"the rehearsal failed: {error.cmd[0]} did not end within {error.timeout:g} s") from error


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the rehearsal as Ctrl-C does, so that its processes are ended, too."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    heard = [
        which for which in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(which) != signal.SIG_IGN
    ]  # not under nohup
    former = {which: signal.signal(which, interrupt) for which in heard}
    try:
        yield
    finally:
        for which, handler in former.items():
            signal.signal(which, handler)
