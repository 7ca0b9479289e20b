"""Observers of a run: the order of the calls, what is on disk by then, and that no observer can lose the run."""

from __future__ import annotations

import importlib
import json
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import hetlora
from hetlora.config import parse_config
from hetlora.config.trackers import TRACKERS
from hetlora.errors import HetLoraError
from hetlora.runs.display import QuietDisplay
from hetlora.runs.observer import FORMER, Observer, Observers, check_observer
from hetlora.runs.progress import RoundProgress
from hetlora.runs.records import EvaluationRecord, RoundRecord, RunRecord
from hetlora.runs.result import RunResult
from hetlora.runs.tracking import TrackedRun
from proofs.small_run import document, ended, write_rows

pytestmark = pytest.mark.run

ROUNDS = 3
FOLDER = Path("runs/phones")


@pytest.fixture
def place(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with base, rows and the file of a run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "base")
    write_rows(Path("rows.jsonl"))
    settings = document("runs", federation={"rounds": ROUNDS, "clients_per_round": 2})
    Path("run.toml").write_text(tomli_w.dumps(settings), encoding="utf8")
    return tmp_path


def on_disk() -> str:
    """Return the kinds of records of the run by their first letters, the rounds of its checkpoints, and what else is there."""
    lines = (FOLDER / "records.jsonl").read_text("utf8").splitlines()
    kinds = "".join({"run": "c", "evaluation": "e", "round": "r"}[json.loads(line)["kind"]] for line in lines)
    kept = sorted(int(path.stem.removeprefix("round-")) for path in (FOLDER / "checkpoints").glob("*.safetensors"))
    others = [name for name in ("adapter", "summary.json") if (FOLDER / name).exists()]
    return " ".join([kinds, *map(str, kept), *others])


class Noting(hetlora.Observer):
    """Notes what it is called with, and what is on disk at that moment."""

    def __init__(self, who: str = "", notes: list[Any] | None = None) -> None:
        self.who = who
        self.notes: list[Any] = [] if notes is None else notes
        self.said: list[str] = []
        self.doing: list[str] = []
        self.threads: set[int] = set()

    def note(self, what: str) -> None:
        self.threads.add(threading.get_ident())
        self.notes.append((f"{self.who}{what}", on_disk()))

    def say(self, text: str) -> None:
        self.said.append(text)

    def run_started(self, record: RunRecord) -> None:
        self.note(f"run of {record.clients} clients")

    def evaluated(self, record: EvaluationRecord) -> None:
        self.note(f"evaluated {record.round}")

    def rounds_started(self, total: int, done: int) -> None:
        self.note(f"rounds {done} of {total}")

    def round_changed(self, progress: RoundProgress) -> None:
        self.doing.append(f"{progress.round} {progress.doing}")

    def round_ended(self, record: RoundRecord) -> None:
        self.note(f"round {record.round}")

    def rounds_ended(self) -> None:
        self.note("rounds ended")

    def run_ended(self, result: RunResult | None) -> None:
        self.note(f"run ended {result and result.rounds}")


class Failing(hetlora.Observer):
    """Raises what it is given at one event, in the round whose turn it is."""

    def __init__(self, event: str, error: BaseException, in_round: int = 2) -> None:
        self.error, self.in_round, self.calls = error, in_round, 0
        setattr(self, event, self.fail)

    def fail(self, about: Any = None) -> None:
        self.calls += 1
        if getattr(about, "round", self.in_round) == self.in_round:
            raise self.error


@pytest.mark.usefixtures("place")
def test_everybody_is_called_in_order_with_the_record_on_disk_and_one_who_fails_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
):
    notes: list[Any] = []

    class Tracking:
        where = "the notes"

        def __init__(self, _: TrackedRun) -> None:
            pass

        def log(self, step: int, _: Mapping[str, float]) -> None:
            notes.append((f"tracked {step}", on_disk()))

        def end(self) -> None:
            notes.append(("tracker ended", on_disk()))

    monkeypatch.setitem(TRACKERS, "notes", Tracking)
    display, mine = Noting("display: ", notes), Noting("", notes)
    broken = Failing("round_ended", RuntimeError("a typing error"), in_round=1)
    mute = Failing("say", ValueError("no voice"))
    run = hetlora.run(
        "run.toml", track="notes", changes=["checkpoint_every=2"], display=display, observers=[broken, mute, mine]
    )
    both = ("display: ", "")
    assert notes == [
        *[(f"{who}run of 4 clients", "c") for who in both],
        *[(f"{who}evaluated 0", "ce") for who in both],
        ("tracked 0", "ce"),
        *[(f"{who}rounds 0 of 3", "ce") for who in both],
        ("tracked 1", "cer"),
        *[(f"{who}round 1", "cer") for who in both],
        ("tracked 2", "cerr"),
        *[(f"{who}round 2", "cerr 2") for who in both],
        ("tracked 3", "cerrr 2"),
        *[(f"{who}round 3", "cerrr 2 3") for who in both],
        *[(f"{who}rounds ended", "cerrr 2 3") for who in both],
        *[(f"{who}evaluated 3", "cerrre 2 3 adapter") for who in both],
        ("tracker ended", "cerrre 2 3 adapter summary.json"),
        *[(f"{who}run ended 3", "cerrre 2 3 adapter summary.json") for who in both],
    ]
    assert "1 training" in mine.doing
    assert mine.doing == display.doing
    assert mine.threads == {threading.get_ident()}
    dropped = "no longer observed by Failing, which failed: "
    assert [text for text in mine.said if "failed" in text] == [
        f"{dropped}ValueError: no voice",
        f"{dropped}RuntimeError: a typing error",
    ]
    assert display.said == mine.said, "whoever hears, hears everything"
    assert (broken.calls, mute.calls) == (1, 1)
    unobserved = hetlora.run("run.toml", changes=["checkpoint_every=2"])
    assert ended(run.folder) == ended(unobserved.folder)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("event", "done", "again"),
    [("evaluated", None, 0), ("round_changed", 1, 1), ("round_ended", 2, 2)],
)
def test_ctrl_c_from_an_observer_is_ctrl_c_and_the_run_goes_on_from_there(event: str, done: int | None, again: int):
    stopping = Failing(event, KeyboardInterrupt(), in_round=0 if event == "evaluated" else 2)
    after = Noting()
    with pytest.raises(KeyboardInterrupt):
        hetlora.run("run.toml", observers=[stopping, after])
    ends = [what for what, _ in after.notes if what.startswith("run ended")]
    assert ends == ([] if done is None else [f"run ended {done}"])
    resumed = Noting()
    run = hetlora.resume(FOLDER, observers=resumed)
    assert [what for what, _ in resumed.notes if what.startswith("round")] == [
        f"rounds {again} of 3",
        *[f"round {number}" for number in range(again + 1, ROUNDS + 1)],
        "rounds ended",
    ]
    assert ended(run.folder) == ended(hetlora.run("run.toml", changes=["output=whole"]).folder)
    assert hetlora.resume(run, observers=[Failing("say", RuntimeError("never called"))]) == run, "it is complete"


class Old:
    """A display of before there were observers, which need not be made from any class."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def say(self, text: str) -> None:
        self.seen.append(text)

    def begin_rounds(self, total: int, done: int = 0) -> None:
        self.seen.append(f"{done} of {total}")

    def show(self, under_way: RoundProgress) -> None:
        self.seen.append(under_way.doing)

    def end_round(self, record: RoundRecord) -> None:
        self.seen.append(f"round {record.round}")

    def end_rounds(self) -> None:
        self.seen.append("ended")


@pytest.mark.usefixtures("place")
def test_a_display_of_before_works_for_a_release_and_a_failure_that_nobody_hears_is_a_warning():
    old, now = Old(), Noting()
    with pytest.warns(
        DeprecationWarning, match="begin_rounds, show, end_round, end_rounds has method names of version 0.1"
    ):
        hetlora.run("run.toml", changes=["federation.rounds=1"], display=old, observers=[now])
    assert [text for text in old.seen if text not in now.said and f"1 {text}" not in now.doing] == [
        "0 of 1",
        "round 1",
        "ended",
    ]
    assert {*now.said, "training"} <= {*old.seen}
    assert all(hasattr(hetlora.Observer, name) for name in FORMER)
    shutil.rmtree("runs")
    failing = Failing("round_ended", RuntimeError("a typing error"))
    with pytest.warns(RuntimeWarning, match="no longer observed by Failing, which failed: RuntimeError: a typing"):
        hetlora.run("run.toml", observers=failing)
    assert failing.calls == 2
    assert "summary.json" in on_disk()


@pytest.mark.usefixtures("place")
def test_what_is_no_observer_is_refused_before_the_run():
    for observers, message in [
        ([QuietDisplay(), Noting], r"observers\[1\] is the class 'Noting'; give an object of a class made from"),
        ("notes", r"observers\[0\] is an object of 'str'"),
        (None, r"observers\[0\] is an object of 'NoneType'"),
    ]:
        with pytest.raises(HetLoraError, match=message):
            hetlora.run("run.toml", observers=observers)  # type: ignore[arg-type]
    with pytest.raises(HetLoraError, match="display is an object of 'str'; give an object of a class made from"):
        hetlora.run("run.toml", display="yes")  # type: ignore[arg-type]
    assert not Path("runs").exists()


@pytest.mark.usefixtures("place")
def test_over_flower_observers_are_called_as_in_process():
    pytest.importorskip("flwr", reason="needs hetlora[flower]")
    from fake_grid import FakeGrid, hosting
    from hetlora.flower.launch import start_run
    from hetlora.flower.transport import Transport

    settings = parse_config(document("runs", federation={"rounds": 1, "clients_per_round": 2}))
    there, here = Noting(), Noting()
    grid = FakeGrid({7: hosting({"partition-id": 0, "num-partitions": 1})})
    start_run(
        settings,
        Observers([QuietDisplay()], [Failing("evaluated", RuntimeError("x"), in_round=0), there]),
        Transport(grid),
    )
    shutil.rmtree("runs")
    hetlora.run(settings, observers=[here])
    assert there.notes == here.notes
    assert there.doing == here.doing


@pytest.mark.parametrize(
    ("module", "former", "now"),
    [
        ("hetlora.api", "begin", "hetlora.api.start_run"),
        ("hetlora.api", "go_on", "hetlora.api.resume_run"),
        ("hetlora.runs.progress", "UnderWay", "hetlora.runs.progress.RoundProgress"),
        ("hetlora.runs.runner", "Display", "hetlora.runs.observer.Observer"),
        ("hetlora.runs.runner", "conduct", "hetlora.runs.runner.execute_run"),
        ("hetlora.runs.runner", "conduct_within", "hetlora.runs.runner.execute_run_within"),
        ("hetlora.runs.runner", "writing_to", "hetlora.runs.runner.explain_write_errors"),
    ],
)
def test_a_former_name_works_for_a_release_and_says_what_it_is_now(module: str, former: str, now: str):
    home, _, name = now.rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"{module}.{former} is now {now}"):
        found = getattr(importlib.import_module(module), former)
    assert found is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="nothing"):
        importlib.import_module(module).nothing  # noqa: B018


def test_a_method_that_nothing_calls_is_found_before_the_run():
    class Misspelt(Observer):
        def round_end(self, record: Any) -> None: ...

    with pytest.raises(HetLoraError, match=r"observers\[0\] has a method 'round_end', .* did you mean 'round_ended'"):
        check_observer(Misspelt(), "observers[0]")

    class Helpers(Observer):
        def round_ended(self, record: Any) -> None: ...

        def round_end(self) -> None:
            """A helper of its own beside the right one."""

    assert check_observer(Helpers(), "observers[0]")
