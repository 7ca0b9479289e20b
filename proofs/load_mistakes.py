"""Two parts of `proofs.load`: the mistakes that people make, and a full disk under the SuperLink's database."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hetlora
from hetlora.errors import HetLoraError
from hetlora.flower.envelope import WIRE
from proofs.federation import Federation, free_port, key
from proofs.flower import app, node_config, records, rounds_of, start
from proofs.load_figures import Found

__all__ = ["disk", "refused"]

SAYS = 60.0
"""Seconds within which a mistake must be answered."""

TRACEBACK = "Traceback (most recent call last)"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
SHOWN = 300
"""Characters of a side's text that are printed."""

BORDER = re.compile(r"[│╭╮╰╯─]+")
"""Of the boxes in which Flower's command puts errors."""


class Mistakes:
    """Notes what each side shows of a mistake, and what is wrong with it.

    Args:
        found: Gets both.
    """

    def __init__(self, found: Found) -> None:
        self.found = found
        self.shown: dict[str, dict[str, str]] = {}
        found.figures["shown"] = self.shown

    def note(self, mistake: str, side: str, text: Callable[[], str], reason: str = "") -> None:
        """Wait until a side says a reason, note its line, and require that it says something, and no traceback.

        Args:
            mistake: What somebody did wrong.
            side: Who shows it: "flwr", "node" or "server".
            text: Returns all that this side has said since.
            reason: Pattern of the line with the reason; without one, any line will do, and a silent side, too.
        """
        until = time.monotonic() + SAYS
        while not (said := _plain(text())) or (reason and not re.search(reason, said)):
            if time.monotonic() > until or not reason:
                break
            time.sleep(0.5)
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        named = [line for line in lines if reason and re.search(reason, line)]
        self.shown.setdefault(mistake, {})[side] = named[0][-SHOWN:] if named else " | ".join(lines[-4:])[-SHOWN:]
        self.found.require(not reason or named, f"{mistake}: {side} does not name the reason within {SAYS:g} s")
        self.found.require(TRACEBACK not in said, f"{mistake}: {side} shows a traceback, which ends: {_ends(lines)}")


def refused(folder: Path, found: Found, *, short: bool) -> None:
    """Make eight mistakes, and note what each side shows of them."""
    del short  # each is made once in any case
    mistakes = Mistakes(found)
    _certificate(folder / "expired", mistakes, "an expired certificate", ("-days 825", "-days -1"), "expired")
    other = ("DNS:server.example.org,IP:127.0.0.1", "DNS:other.example.org")
    _certificate(folder / "host", mistakes, "a certificate for another host", other, "match|not valid for")
    _of_a_run(folder / "run", mistakes)
    _between_rounds(folder / "between", mistakes)


class WithoutLimits(Federation):
    """A federation over `flower-superlink` itself, which starts on any certificate, or is still running when one expires."""

    def superlink_command(self) -> list[str]:
        """Return the command of step 3, without what hetlora adds."""
        return ["flower-superlink", *super().superlink_command()[3:]]


def _certificate(folder: Path, mistakes: Mistakes, mistake: str, fault: tuple[str, str], reason: str) -> None:
    (folder / "refused").mkdir(parents=True)
    refused = Federation(folder / "refused", fault)
    ours = refused.start("superlink", *refused.superlink_command())
    mistakes.note(mistake, "server", lambda: refused.log("superlink"), "hetlora: .*server.crt (expired|holds)")
    mistakes.found.require(ours.wait(SAYS) == 2, f"{mistake}: hetlora flower superlink ends with {ours.returncode}")
    (folder / "started").mkdir()
    with WithoutLimits(folder / "started", fault) as federation:
        key(federation.folder / "ana")
        federation.node("ana", 'data="rows.jsonl" name="ana" rank=8')
        mistakes.note(mistake, "node", lambda: federation.log("ana"), reason)
        said = _said(federation, "list", "here")
        mistakes.note(mistake, "flwr", lambda: said, "SuperLink is unavailable|certificate")


def _of_a_run(folder: Path, mistakes: Mistakes) -> None:
    """Make the mistakes for which everything else is right."""
    from proofs.small_run import write_base

    folder.mkdir()
    place = app(folder, 2, ("ana", "ben"), **{"federation.clients_per_round": 2, "flower.wait": 300})
    write_base(folder / "another")
    run = folder / "runs" / "federation"
    with Federation(folder) as federation:
        key(folder / "stranger")
        federation.node("stranger", node_config(folder, "ana"))
        mistake = "a node whose key is not registered"
        mistakes.note(mistake, "node", lambda: federation.log("stranger"), "Failed to activate SuperNode")
        mistakes.note(
            mistake, "server", lambda: federation.log("superlink"), "No SuperNode found with the given public key"
        )
        federation.kill("stranger")
        configs = {name: node_config(folder, name) for name in ("ana", "ben")}
        start(federation, {**configs, "ben": f'{configs["ben"]} base="{folder / "another"}"'})
        number = federation.run(place, 'config="run.toml"')
        mistake, reason = "a node whose base differs", "refused: .*(base|model)"
        mistakes.note(mistake, "node", lambda: federation.log("ben"), reason)
        mistakes.note(mistake, "server", lambda: _said(federation, "log", str(number), "here", "--show"), reason)
        federation.wait_for(lambda: (run / "config.json").is_file(), "the run's folder")
        for mistake, resumed, reason in (
            ("a run folder that another run uses", run, "another process is at work"),
            ("a resume of a folder that is not there", folder / "runs" / "nowhere", "is no run|has no|not there"),
        ):
            before = len(federation.log("superlink"))
            words = ("run", str(place), "here", "--stream", "--run-config", f'resume="{resumed}"')
            said = _said(federation, *words)
            mistakes.note(mistake, "flwr", lambda said=said: said, reason)  # type: ignore[misc]
            mistakes.note(mistake, "server", lambda before=before: federation.log("superlink")[before:])  # type: ignore[misc]


def _between_rounds(folder: Path, mistakes: Mistakes) -> None:
    """Give a client another key while a run goes on, and let one join it that has another version of the package."""
    folder.mkdir()
    changes = {"federation.clients_per_round": 3, "flower.min_clients": 1}
    place, run = app(folder, 500, ("ana", "ben", "cleo"), **changes), folder / "runs" / "federation"
    with Federation(folder) as federation:
        start(federation, {name: node_config(folder, name) for name in ("ana", "ben")})
        number = federation.run(place, 'config="run.toml"')
        federation.wait_for(lambda: records(run), "a round", 240)
        federation.kill("ana")
        (folder / "ana").unlink()
        federation.register("ana")
        before = len(federation.log("ana"))
        federation.node("ana", node_config(folder, "ana"))
        federation.register("cleo")
        _start_another_version(federation, folder, "cleo")
        # Who comes is asked between two rounds; the one in which the first key's node was killed lasts until its deadline.
        rounds = len(records(run))
        federation.wait_for(lambda: len(records(run)) > rounds + 1, "the round that lacks a client to end", 300)
        for name, mistake, reason in (
            ("ana", "a client whose key was exchanged between two rounds", "'ana' has another key"),
            ("cleo", "a client with another version of the package", "wire format"),
        ):
            mistakes.note(mistake, "node", lambda name=name: federation.log(name)[name == "ana" and before :], reason)  # type: ignore[misc]
            mistakes.note(mistake, "server", lambda: _said(federation, "log", str(number), "here", "--show"), reason)
        rounds = len(records(run))
        federation.wait_for(lambda: len(records(run)) > rounds, "a round of the others")
        federation.check()


def _start_another_version(federation: Federation, folder: Path, name: str) -> None:
    """Start a node with a copy of the package that speaks another version of the wire format."""
    copy = _another_version(folder / "another")
    words = federation.node_command(name, node_config(folder, name))
    environment = {"HETLORA_STATE": str(federation.state(name)), "PYTHONPATH": str(copy)}
    federation.start(name, *words, "--host", "127.0.0.1", "--port", str(free_port()), environment=environment)


def _another_version(folder: Path) -> Path:
    shutil.copytree(Path(hetlora.__file__).parent, folder / "hetlora")
    envelope = folder / "hetlora" / "flower" / "envelope.py"
    text = envelope.read_text("utf8")
    if f'WIRE = "{WIRE}"' not in text:
        raise ValueError(f"{envelope} says the version of the wire format in another way")
    envelope.write_text(text.replace(f'WIRE = "{WIRE}"', 'WIRE = "9"'), "utf8")
    return folder


def _said(federation: Federation, *command: str) -> str:
    """Return what a command of Flower's prints, whether or not it fails."""
    try:
        return federation.flwr(*command)
    except (HetLoraError, subprocess.TimeoutExpired) as error:
        return str(error)


def _plain(text: str) -> str:
    return BORDER.sub("", COLOUR.sub("", text))


def _ends(lines: list[str]) -> str:
    """Return the last line of the first traceback: the exception."""
    begin = next((index for index, line in enumerate(lines) if TRACEBACK in line), 0)
    named = (line for line in lines[begin:] if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line))
    return next(named, lines[-1] if lines else "")[:SHOWN]


# A full disk --------------------------------------------------------------------------------------------------------

MEGABYTES = 30
"""Size of the disk that becomes full."""

NAMESPACE = ("unshare", "--map-root-user", "--mount", "sh", "-c")
MOUNT = f'mount -t tmpfs -o size={MEGABYTES}m tmpfs "$0" && exec "$@"'

FULL = "has no room on its disk|disk is full|No space left|disk I/O error|File too large"

STILL = 60.0
"""Seconds for which the disk stays full."""


class SmallDisk(Federation):
    """A federation whose SuperLink has its database on a small disk.

    The disk is a tmpfs in a namespace of its own, which needs no root. Where the system has no such namespaces, a limit of
    the size of the SuperLink's files stands in for it.
    """

    def __init__(self, folder: Path) -> None:
        self.disk = folder / "disk"
        self.disk.mkdir()
        tried = [*NAMESPACE, MOUNT, str(self.disk), "true"]
        self.possible = shutil.which("unshare") is not None and _succeeds(tried)
        self.means = f"a tmpfs of {MEGABYTES} MB" if self.possible else "a limit of the size of files (RLIMIT_FSIZE)"
        super().__init__(folder)

    def superlink_command(self) -> list[str]:
        """Return the command of step 3, with the database on the disk."""
        words = super().superlink_command()
        words[words.index("--database") + 1] = str(self.disk / "state.db")
        return [*NAMESPACE, MOUNT, str(self.disk), *words] if self.possible else words

    @property
    def _ballast(self) -> Path:
        return Path(f"/proc/{self.processes['superlink'].pid}/root{self.disk}/ballast")

    def fill(self) -> None:
        """Let the disk become full."""
        if not self.possible:
            largest = max(file.stat().st_size for file in self.disk.iterdir())
            self._limit(largest)
            return
        with self._ballast.open("wb", buffering=0) as file:
            for size in (2**20, 2**12):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        """Let the disk have room again."""
        if self.possible:
            self._ballast.unlink()
        else:
            self._limit(resource.RLIM_INFINITY)

    def _limit(self, size: int) -> None:
        pid = self.processes["superlink"].pid
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def disk(folder: Path, found: Found, *, short: bool) -> None:
    """Fill the disk of the SuperLink's database in a run, make room again, and see whether the run can be completed."""
    names, rounds = ("ana", "ben", "cleo"), 4 if short else 6
    place = app(folder, rounds, names, **{"federation.clients_per_round": 3, "flower.deadline": 40})
    run = folder / "runs" / "federation"
    with SmallDisk(folder) as federation:
        found.figures["means"] = federation.means
        start(federation, {name: node_config(folder, name) for name in names})
        number = federation.run(place, 'config="run.toml"')
        # Before the first round: a database that has held a round's messages has free pages for those of the next.
        federation.wait_for(lambda: (run / "config.json").is_file(), "the run's folder", 120)
        logs = {path: path.stat().st_size for path in folder.glob("*.log")}
        federation.fill()
        found.figures["rounds_before"] = len(rounds_of(run))
        time.sleep(STILL)
        ended = federation.processes["superlink"].poll()
        found.figures |= {"rounds_while_full": len(rounds_of(run)), "superlink_ended_while_full": ended}
        found.figures["status_while_full"] = federation.status(number)
        said = {path.stem: _plain(path.read_text(errors="replace")[size:]) for path, size in logs.items()}
        found.figures["said_while_full"] = {name: _about_the_disk(text) for name, text in said.items()}
        found.require(any(re.search(FULL, text) for text in said.values()), "nobody says that the disk is full")
        if ended is not None:
            found.problems.append(f"the SuperLink ended with {ended}")
            return
        federation.free()
        found.figures |= _completed(federation, place, run, number)
    found.seconds(run)
    found.require(len(rounds_of(run)) == rounds, f"{len(rounds_of(run))} of {rounds} rounds")
    found.figures["failures"] = {number: record["failures"] for number, record in rounds_of(run).items()}


def _completed(federation: Federation, place: Path, run: Path, number: int) -> dict[str, Any]:
    """Let a run go on after the disk has room again; resume it where it has failed."""
    federation.wait_for(lambda: federation.status(number).startswith("finished"), "the run to end", 300)
    status = federation.status(number)
    if not (run / "summary.json").is_file():
        federation.complete(federation.run(place, f'resume="{run}"'), run, 400)
    return {"status_with_room_again": status, "resumed": status != "finished:completed"}


def _about_the_disk(text: str) -> dict[str, Any]:
    """Return the first line about a full disk, how many there are, and the number of tracebacks."""
    lines = [line.strip() for line in text.splitlines() if re.search(FULL, line)]
    first = lines[0][:SHOWN] if lines else ""
    return {"first": first, "lines": len(lines), "tracebacks": text.count(TRACEBACK)}
