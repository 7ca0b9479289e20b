"""Progress display: on a pseudo-terminal byte by byte, and elsewhere line by line."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from hetlora import Client, ClientFailure, ClientUpdate
from hetlora import run as run_it
from hetlora.cli import main
from hetlora.core.adapter import LoraPair
from hetlora.core.round import run_round
from hetlora.core.types import ServerState
from hetlora.methods import fedavg
from hetlora.runs import display
from hetlora.runs.display import LiveDisplay, PlainDisplay, describe_progress
from hetlora.runs.progress import ObservedEngine, RoundProgress
from processes import HANGS, wait_until
from proofs.small_run import document, write_rows
from report_runs import a_round
from terminal import Terminal

pytestmark = pytest.mark.run


@pytest.fixture
def place(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with base, rows and the file of a run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "base")
    write_rows(Path("rows.jsonl"))
    Path("run.toml").write_text(tomli_w.dumps(document("runs")), encoding="utf8")
    return tmp_path


class PseudoTerminal:
    """A pseudo-terminal of some width, and what was written to it."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        self._bytes = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has the other end open any more
            while block := os.read(self.ours, 1 << 16):
                self._bytes += block

    def so_far(self) -> str:
        """Return what has come by now."""
        return self._bytes.decode("utf8", errors="replace")

    def ended(self) -> tuple[str, Terminal]:
        """Return what came, and the terminal after it, once the other end is closed."""
        self._reader.join(timeout=HANGS)
        os.close(self.ours)
        text, terminal = self._bytes.decode("utf8"), Terminal(self.width)
        terminal.feed(text)
        return text, terminal


@contextlib.contextmanager
def standing_for_stderr(width: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[PseudoTerminal]:
    """Let standard error of this process be a pseudo-terminal."""
    terminal = PseudoTerminal(width)
    monkeypatch.setenv("COLUMNS", str(width))  # rich asks the first of its own streams that is one
    monkeypatch.setenv("TERM", "xterm-256color")
    with os.fdopen(terminal.theirs, "w", encoding="utf8") as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        yield terminal


# A terminal ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_a_run_on_a_terminal_leaves_its_rounds_and_nothing_else():
    rounds, width = 20, 44
    terminal = PseudoTerminal(width)
    changes = [f"federation.rounds={rounds}", "training.steps=8", "evaluation.every=5", "evaluation.generate=0"]
    command = [sys.executable, "-m", "hetlora.cli", "run", "run.toml", "--json", *(f"--set={one}" for one in changes)]
    environment = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf8"}
    environment = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    began = time.monotonic()
    done = subprocess.run(
        command, stdin=terminal.theirs, stdout=subprocess.PIPE, stderr=terminal.theirs, env=environment, check=False
    )
    seconds = time.monotonic() - began
    os.close(terminal.theirs)
    written, shown = terminal.ended()
    assert done.returncode == 0, written
    assert json.loads(done.stdout)["rounds"] == rounds
    assert done.stdout.count(b"\n") == 1

    assert re.search(rf"round \d+/{rounds}: (training|drawing|aggregating|measuring|writing)", written), "live"
    assert not shown.cursor_hidden, "the cursor is back"
    assert shown.lines[-1] == "", "the live lines are gone, and what follows begins at a line of its own"
    left = "\n".join(shown.lines)
    assert not re.search(r"answered|training  |━|ETA", left), "nothing of the live lines is left between the rounds"
    text = "".join(line.ljust(width) if len(line) < width else line for line in shown.lines)
    assert [int(number) for number in re.findall(r"(?:^| )round (\d+) +(?:loss|no update)", text)] == [
        *range(1, rounds + 1)
    ]
    # A line that is printed draws both anew, and so does every frame.
    assert shown.erased <= 2 * (display.FRAMES_A_SECOND * seconds + rounds + 10)


def test_the_live_lines_stay_two_and_in_place_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch):
    with standing_for_stderr(30, monkeypatch) as terminal:
        live = LiveDisplay()
        live.say("measuring the base")
        live.rounds_started(20, 2)
        live.round_changed(RoundProgress(3, "training", (4, 8, 16) * 40, answered=7, failed=2))
        wait_until(lambda: "training  7 of 12" in terminal.so_far())
        live.round_ended(a_round(3))
        live.rounds_ended()
        live.say("afterwards")
    written, shown = terminal.ended()
    assert "round 3/20: training  7 of 12…" in written, "cut at the edge"
    assert "2/20" in written
    assert "3/20" in written
    text = "".join(shown.lines)
    assert text.startswith("measuring the baseround 3  loss 2.000")
    assert text.endswith("1.0 safterwards")
    assert "answered" not in text


def test_answers_are_not_drawn_one_by_one(monkeypatch: pytest.MonkeyPatch):
    with standing_for_stderr(100, monkeypatch) as terminal:
        live = LiveDisplay()
        live.rounds_started(1, 0)
        began = time.monotonic()
        for number in range(20_000):
            live.round_changed(RoundProgress(1, "training", (4,) * 10, answered=number))
        seconds = time.monotonic() - began
        live.rounds_ended()
    assert terminal.ended()[1].erased <= 2 * (display.FRAMES_A_SECOND * seconds + 3)


@pytest.mark.parametrize(
    ("under_way", "text"),
    [
        (RoundProgress(1, "drawing the cohort"), "round 1/9: drawing the cohort"),
        (RoundProgress(2, "training", (4, 8)), "round 2/9: training  0 of 2 answered  ranks 4 8"),
        (RoundProgress(2, "measuring", (4, 8), 1, 1), "round 2/9: measuring  1 of 2 answered, 1 FAILED  ranks 4 8"),
        (
            RoundProgress(3, "training", ({"a": 1},) + (4,) * 10),
            "round 3/9: training  0 of 11 answered  ranks 10x4 1xmixed",
        ),
    ],
)
def test_a_round_under_way_in_words(under_way: RoundProgress, text: str):
    assert describe_progress(under_way, 9) == text


# How long it will be ------------------------------------------------------------------------------------------------


def test_the_rest_of_a_run_is_as_long_as_its_rounds_were(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    plain = PlainDisplay()
    plain.rounds_started(12, 2)  # two were done before, by another process
    clock = plain._clock
    assert clock.left() == "ETA —"
    now[0] += 10
    plain.round_ended(a_round(3))
    assert capsys.readouterr().err.endswith("  ETA 90 s\n")
    now[0] += 4
    assert clock.left() == "ETA 86 s", "the round under way is one of them"
    now[0] += 100
    assert clock.left() == "ETA 80 s", "one that takes longer is not over"
    plain.round_ended(a_round(4))
    assert clock.left() == "ETA 0:07:36", "57 s a round by now"
    plain.round_ended(a_round(12))
    assert clock.left() == "ETA 0 s"


# Within a round -----------------------------------------------------------------------------------------------------


class Two:
    """An engine in which one of two clients fails."""

    def train(self, tasks: Sequence[Any], _: Any) -> Iterator[Any]:
        first, second = tasks
        yield ClientFailure(second.client, "battery")
        yield ClientUpdate(first.client, first.round, first.rank, first.adapter, 3, 1, 0.5)


def test_a_round_is_watched_and_not_changed():
    adapter = {"layer": LoraPair(torch.ones(4, 3), torch.ones(2, 4))}
    clients = [Client("ana", 4, 3), Client("ben", 4, 3)]
    seen: list[RoundProgress] = []
    watch = ObservedEngine(Two(), seen.append)
    state, method = ServerState(adapter, round=6), fedavg()
    cohort = watch.drawing(lambda round_number: clients if round_number == 6 else [])
    watched, report = run_round(state, method, watch, cohort(6))
    plain, same = run_round(state, method, Two(), clients)
    assert report == same
    assert torch.equal(watched.adapter["layer"].B, plain.adapter["layer"].B)
    ranks = (4, 4)
    assert seen == [
        RoundProgress(7, "drawing the cohort"),
        RoundProgress(7, "training", ranks),
        RoundProgress(7, "training", ranks, failed=1),
        RoundProgress(7, "training", ranks, answered=1, failed=1),
        RoundProgress(7, "aggregating", ranks, answered=1, failed=1),
    ]


@pytest.mark.usefixtures("place")
def test_a_whole_run_tells_what_it_does():
    class Noting(display.QuietDisplay):
        def __init__(self) -> None:
            self.seen: list[RoundProgress] = []

        def round_changed(self, progress: RoundProgress) -> None:
            self.seen.append(progress)

    noting = Noting()
    folder = run_it("run.toml", display=noting).folder
    rounds = [json.loads(line) for line in (folder / "records.jsonl").read_text("utf8").splitlines()]
    rounds = [record for record in rounds if record["kind"] == "round"]
    assert any(record["failures"] for record in rounds), "somebody drops out"
    for record in rounds:
        of_it = [item for item in noting.seen if item.round == record["round"]]
        did = list(dict.fromkeys(item.doing for item in of_it))
        measured = ["measuring"] if record["perplexity"] is not None else []
        assert did == ["drawing the cohort", "training", "aggregating", *measured, "writing a checkpoint"]
        last = of_it[-1]
        assert (last.answered, last.failed) == (len(record["weights"]), len(record["failures"]))
        assert list(last.ranks) == list(record["ranks"].values())


# Quiet, and for a program -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--quiet"]], ids=["", "quiet"])
def test_for_a_program_there_is_one_object_whatever_the_command(
    place: Path, capsys: pytest.CaptureFixture[str], options: list[str]
):
    def result_of(*command: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*command, "--json", *options]) == 0
        out, err = capsys.readouterr()
        assert out.count("\n") == 1, command
        assert (err == "") == bool(options), command
        return json.loads(out)

    run = result_of("run", "run.toml", "--set", "federation.rounds=1")
    (place / "runs/phones/summary.json").unlink()
    gone_on = result_of("resume", "runs/phones")
    assert gone_on["final"] == run["final"]
    assert result_of("resume", "runs/phones") == gone_on, "result_of again"
    compared = document("compared", federation={"rounds": 1, "clients_per_round": 2})
    del compared["method"]
    (place / "compare.toml").write_text(
        tomli_w.dumps({**compared, "compare": {"methods": [{"name": "zeroshot"}, {"name": "hetlora"}]}}),
        encoding="utf8",
    )
    assert result_of("compare", "compare.toml")["failed"] == 0


def test_quiet_resumes_and_compares_without_a_word_but_the_result(place: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["run", "run.toml", "--quiet", "--set", "federation.rounds=1"]) == 0
    (place / "runs/phones/summary.json").unlink()
    capsys.readouterr()
    assert main(["resume", "runs/phones", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "held-out perplexity" in out
    assert err == ""


def test_a_run_that_goes_on_ends_with_its_page(place: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["run", "run.toml", "--quiet", "--set", "federation.rounds=1"]) == 0
    (place / "runs/phones/summary.json").unlink()
    page = place / "runs/phones/report.html"
    for _ in ("goes on", "is complete"):
        capsys.readouterr()
        assert main(["resume", "runs/phones", "--quiet", "--report"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "report:         runs/phones/report.html"
        assert page.is_file()
        page.unlink()


def test_what_looks_like_the_code_of_an_emoji_stays_as_it_is(capsys: pytest.CaptureFixture[str]):
    LiveDisplay().say("rows.py:100: no :key: of a client")
    assert capsys.readouterr().err == "rows.py:100: no :key: of a client\n"
