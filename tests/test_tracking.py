"""Trackers: the figures per record, that no tracker ends a run, and the files of each library."""

from __future__ import annotations

import importlib
import json
import shutil
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import hetlora
from hetlora.cli import main
from hetlora.config import load_config, parse_config
from hetlora.errors import ConfigError, HetLoraError
from hetlora.runs.display import QuietDisplay
from hetlora.runs.records import RoundRecord, read_records
from hetlora.runs.tracking import PACKAGES, TRACKERS, TrackedRun, need_trackers
from hetlora.runs.tracking.metrics import evaluation_figures, round_figures
from proofs.small_run import document, ended, write_rows
from report_runs import a_round, measured

pytestmark = pytest.mark.run

ROUNDS = 4


@pytest.fixture
def place(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with base, rows and the file of a run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "base")
    write_rows(Path("rows.jsonl"))
    Path("run.toml").write_text(tomli_w.dumps(document("runs")), encoding="utf8")
    return tmp_path


class Book:
    """A tracker that remembers, across the processes that a run may have."""

    def __init__(self) -> None:
        self.runs: list[TrackedRun] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ends = 0

    def __call__(self, run: TrackedRun) -> _Page:
        self.runs.append(run)
        return _Page(self)


class _Page:
    where = "the book"

    def __init__(self, book: Book) -> None:
        self.book = book

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        print("a tracker may say what it likes on standard output")
        self.book.logged.append((step, dict(figures)))

    def end(self) -> None:
        self.book.ends += 1


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> Book:
    book = Book()
    monkeypatch.setitem(TRACKERS, "book", book)
    return book


# Figures ------------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_round_by_hand():
    record = a_round(
        2,
        perplexity=30.5,
        ranks={"a": 4, "b": 8, "c": {"q": 2, "v": 6}},
        prunes={"a": 3},
        failures={"c": "battery"},
        clients={"a": {"bounded": {"weight": 0.5}}, "b": {}},
        network={"bytes_up": 1100, "bytes_down": 2200, "nodes": 3, "last_seen": {"a": "now"}},
    )
    assert round_figures(record, bytes_up=5000, bytes_down=9000) == {
        "train/loss": 2.0,
        "eval/perplexity": 30.5,
        "comm/bytes_up": 1000,
        "comm/bytes_down": 2000,
        "comm/total_bytes_up": 5000,
        "comm/total_bytes_down": 9000,
        "clients/asked": 3,
        "clients/admitted": 2,
        "clients/failures": 1,
        "clients/prunes": 1,
        "clients/bounded": 1,
        "clients/largest_share": 0.75,
        "rank/mean": 6.0,
        "rank/min": 4,
        "rank/max": 8,
        "rank/live_slots": 8,
        "time/seconds": 1.0,
        "network/bytes_up": 1100,
        "network/bytes_down": 2200,
        "network/nodes": 3,
    }


def test_what_there_is_not_is_no_figure():
    silent = a_round(1, loss=None, ranks={}, weights={}, clients={})
    figures = round_figures(silent, bytes_up=0, bytes_down=0)
    absent = {"train/loss", "eval/perplexity", "clients/largest_share", "rank/mean", "rank/min", "rank/max"}
    assert not absent & figures.keys()
    assert not [name for name in figures if name.startswith("network")]
    assert "train/loss" not in round_figures(replace(silent, loss=float("inf")), bytes_up=0, bytes_down=0)


def test_the_figures_of_a_measurement_by_hand():
    figures = evaluation_figures(measured(3, 20.0), "base")
    assert figures == {
        f"base{tier}/{name}": value
        for tier in ("", "/tier-4", "/tier-8")
        for name, value in (("perplexity", 20.0), ("rougeL", 10.0))
    }


# A run --------------------------------------------------------------------------------------------------------------


def expected(folder: Path) -> dict[int, dict[str, float]]:
    """Return what a run should have logged, from its records as they are on disk."""
    steps: dict[int, dict[str, float]] = {}
    up = down = 0
    for record in read_records(folder / "records.jsonl"):
        if record["kind"] == "round":
            up, down = up + record["bytes_up"], down + record["bytes_down"]
            steps[record["round"]] = round_figures(RoundRecord(**record), bytes_up=up, bytes_down=down)
        elif record["kind"] == "evaluation":
            scores = {"eval": record["overall"], **{f"eval/tier-{t}": s for t, s in record["tiers"].items()}}
            figures = {f"{part}/{name}": scores[part][name] for part in scores for name in ("perplexity", "rougeL")}
            of_it = steps.setdefault(record["round"], {})
            of_it |= {name: value for name, value in figures.items() if value is not None}
    assert list(steps) == list(range(ROUNDS + 1))
    return steps


def test_a_run_logs_every_round_once_and_what_it_measures(place: Path, book: Book, capsys: pytest.CaptureFixture[str]):
    assert main(["run", "run.toml", "--json", "--track", "book", "--track", "book", "--set", "tracking.project=p"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["rounds"] == ROUNDS
    assert out.count("\n") == 1
    assert "tracked by book: the book" in err
    [tracked] = book.runs
    assert (tracked.name, tracked.project, tracked.step) == ("phones", "p", 0)
    assert tracked.config["tracking"] == {"to": ["book"], "project": "p"}
    assert tracked.config == json.loads((place / "runs/phones/config.json").read_text("utf8"))
    assert [step for step, _ in book.logged] == list(range(ROUNDS + 1))
    assert dict(book.logged) == expected(place / "runs/phones")
    assert book.ends == 1


@pytest.mark.usefixtures("place", "book")
def test_the_run_itself_is_the_same_and_an_untracked_one_writes_nothing_more():
    plain = hetlora.run("run.toml")
    tracked = hetlora.run("run.toml", track="book")
    assert ended(plain.folder) == ended(tracked.folder)
    assert {path.name for path in tracked.folder.iterdir()} - {path.name for path in plain.folder.iterdir()} == {
        "tracking.json"
    }


@pytest.mark.usefixtures("place")
def test_a_run_that_starts_from_an_adapter_has_a_curve_from_there_on(book: Book):
    first = hetlora.run("run.toml")
    changes = [f"model.adapter={first.folder / 'adapter'}", "federation.rounds=1"]
    hetlora.run("run.toml", changes=changes, track=["book"])
    start = dict(book.logged)[0]
    base, with_adapter = [
        record for record in read_records(Path("runs/phones-2/records.jsonl")) if record["kind"] == "evaluation"
    ][:2]
    assert start["base/perplexity"] == base["overall"]["perplexity"]
    assert start["eval/perplexity"] == with_adapter["overall"]["perplexity"] != start["base/perplexity"]


class Stopped(QuietDisplay):
    """Ctrl-C when a round ends."""

    def __init__(self, round_number: int) -> None:
        self.round_number = round_number

    def round_ended(self, record: RoundRecord) -> None:
        if record.round == self.round_number:
            raise KeyboardInterrupt


def test_a_run_that_goes_on_is_the_same_to_its_tracker_and_says_from_which_step_on(place: Path, book: Book):
    with pytest.raises(KeyboardInterrupt):
        hetlora.run("run.toml", track=["book"], changes=["checkpoint_every=2"], display=Stopped(3))
    hetlora.resume("runs/phones")
    before, after = book.runs
    assert (before.step, after.step) == (0, 3)
    assert before.id == after.id
    assert [step for step, _ in book.logged] == [0, 1, 2, 3, 3, 4], "after round 2 there was a checkpoint"
    assert dict(book.logged) == expected(place / "runs/phones")
    assert book.ends == 2, "an interrupted run ends, too"


@pytest.mark.usefixtures("place")
def test_a_run_that_begins_anew_is_another_one(book: Book):
    with pytest.raises(KeyboardInterrupt):
        hetlora.run("run.toml", track=["book"], display=Stopped(1))
    shutil.rmtree("runs/phones/checkpoints")
    hetlora.resume("runs/phones")
    before, after = book.runs
    assert (before.step, after.step) == (0, 0)
    assert before.id != after.id


def test_where_a_run_is_tracked_is_no_part_of_what_it_is(place: Path, book: Book):
    whole = ended(hetlora.run("run.toml", changes=["output=whole"]).folder)
    with pytest.raises(KeyboardInterrupt):
        hetlora.run("run.toml", display=Stopped(2))
    path = place / "runs/phones/config.json"
    config = json.loads(path.read_text("utf8"))
    config["tracking"]["to"] = ["book"]
    path.write_text(json.dumps(config), encoding="utf8")
    hetlora.resume("runs/phones")
    assert [step for step, _ in book.logged] == [3, 4]
    assert ended(path.parent) == whole
    path.write_text(json.dumps({**config, "seed": 1}), encoding="utf8")
    (path.parent / "summary.json").unlink()
    with pytest.raises(HetLoraError, match="seed = 1, and the run began with 0"):
        hetlora.resume("runs/phones")


def test_over_flower_a_run_is_tracked_as_in_process(place: Path, book: Book):
    pytest.importorskip("flwr", reason="needs hetlora[flower]")
    from fake_grid import FakeGrid, hosting
    from hetlora.flower.launch import start_run
    from hetlora.flower.transport import Transport

    hetlora.run("run.toml", track="book", changes=["output=here"])
    here, book.logged = dict(book.logged), []
    config = load_config(place / "run.toml", ["output=there"], ["book"])
    start_run(config, QuietDisplay(), Transport(FakeGrid({7: hosting({"partition-id": 0, "num-partitions": 1})})))
    there = dict(book.logged)
    assert there == expected(place / "there/phones")
    for step, figures in there.items():
        same_names = figures.keys() - {name for name in figures if name.startswith("network/")}
        assert same_names == here[step].keys()
        measured_here = here[step].get("eval/perplexity", 0.0)
        assert figures.get("eval/perplexity", 0.0) == pytest.approx(measured_here, rel=1e-5)
    assert there[1]["network/nodes"] == 1


# What goes wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["begins", "logs", "ends"])
def test_a_tracker_that_fails_is_dropped_and_the_run_and_the_others_go_on(
    place: Path, book: Book, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str
):
    calls: list[str] = []

    class Broken(_Page):
        def __init__(self, _: TrackedRun) -> None:
            if moment == "begins":
                raise RuntimeError("no such server\x1b[2J")

        def log(self, step: int, _: Mapping[str, float]) -> None:
            calls.append("log")
            if moment == "logs" and step == 2:
                raise RuntimeError("no such server\x1b[2J")

        def end(self) -> None:
            calls.append("end")
            if moment == "ends":
                raise RuntimeError("no such server\x1b[2J")

    monkeypatch.setitem(TRACKERS, "broken", Broken)
    assert main(["run", "run.toml", "--json", "--track", "broken", "--track", "book"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["interrupted"] is False
    lines = [line for line in err.splitlines() if "broken, which failed" in line]
    assert lines == [r"no longer tracked by broken, which failed: RuntimeError: no such server\x1b[2J"], "said once"
    assert dict(book.logged) == expected(place / "runs/phones")
    assert calls == {"begins": [], "logs": ["log"] * 3, "ends": ["log"] * 5 + ["end"]}[moment]


@pytest.mark.usefixtures("place", "book")
def test_ctrl_c_within_a_tracker_is_ctrl_c(monkeypatch: pytest.MonkeyPatch):
    def stop(_self: _Page, step: int, _: Mapping[str, float]) -> None:
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Page, "log", stop)
    assert main(["run", "run.toml", "--quiet", "--track", "book"]) == 130
    assert main(["resume", "runs/phones", "--quiet"]) == 130, "round 2 had no checkpoint yet"


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_not_here_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
):
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["run", "run.toml", "--track", name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(f"pip install 'hetlora[{name}]', or take it out of tracking.to\n")
    assert not Path("runs").exists()


def test_all_that_is_missing_is_named_at_once(monkeypatch: pytest.MonkeyPatch):
    for name in ("tensorboard", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(HetLoraError, match=r"tensorboard and trackio.*hetlora\[tensorboard,trackio\]"):
        need_trackers(["tensorboard", "trackio"])


def test_a_resume_and_a_comparison_are_refused_as_well(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(KeyboardInterrupt):
        hetlora.run("run.toml", display=Stopped(1))
    path = place / "runs/phones/config.json"
    path.write_text(path.read_text("utf8").replace('"to": []', '"to": ["trackio"]'), encoding="utf8")
    with pytest.raises(HetLoraError, match=r"hetlora\[trackio\]"):
        hetlora.resume("runs/phones")
    compared = document("compared", tracking={"to": ["trackio"]}, compare={"methods": [{"name": "zeroshot"}]})
    del compared["method"]
    Path("compare.toml").write_text(tomli_w.dumps(compared), encoding="utf8")
    assert main(["compare", "compare.toml", "--quiet"]) == 2
    assert not Path("compared/phones/runs").exists() or not list(Path("compared/phones/runs").iterdir())


@pytest.mark.parametrize(
    ("tracking", "said"),
    [
        ({"to": ["tensorbord"]}, "'tensorbord' is not a tracker; did you mean 'tensorboard'?"),
        ({"to": "trackio"}, "tracking.to = 'trackio'"),
        ({"to": [], "project": "https://ana:secret@host"}, "tracking.project"),
        ({"into": []}, "tracking.into is not a key"),
    ],
)
def test_a_wrong_section_is_refused(tracking: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        parse_config(document("runs", tracking=tracking))


def test_a_registry_and_extras_name_the_same():
    import tomllib

    project = tomllib.loads(Path(__file__).parent.parent.joinpath("pyproject.toml").read_text("utf8"))["project"]
    for name in PACKAGES:
        [requirement] = project["optional-dependencies"][name]
        assert requirement.startswith(name)


# The libraries ------------------------------------------------------------------------------------------------------


def gone_on(name: str) -> Path:
    """Run with a tracker until a round whose checkpoint is older, and go on in the same folder; return the folder."""
    with pytest.raises(KeyboardInterrupt):
        hetlora.run("run.toml", track=name, changes=["checkpoint_every=2"], display=Stopped(3))
    return hetlora.resume("runs/phones").folder


def same(read: dict[int, dict[str, float]], folder: Path) -> None:
    """Check that what a tracker's own reader reads is what the records say."""
    right = expected(folder)
    assert read.keys() == right.keys()
    for step, figures in right.items():
        assert read[step] == pytest.approx(figures, rel=1e-6), step


@pytest.mark.usefixtures("place")
def test_tensorboard_has_every_step_once_though_the_run_was_interrupted():
    pytest.importorskip("tensorboard", reason="needs hetlora[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = gone_on("tensorboard")
    assert len(list((folder / "tensorboard").iterdir())) == 2, "one file a process"
    reader = EventAccumulator(str(folder / "tensorboard")).Reload()
    read: dict[int, dict[str, float]] = {}
    for tag in reader.Tags()["scalars"]:
        steps = [event.step for event in reader.Scalars(tag)]
        assert steps == sorted(set(steps)), f"{tag}: once each"
        for event in reader.Scalars(tag):
            read.setdefault(event.step, {})[tag] = event.value
    same(read, folder)
    [config] = reader.Tensors("config/text_summary")
    assert b'"name": "phones"' in config.tensor_proto.string_val[0]


@pytest.mark.usefixtures("place")
def test_trackio_has_every_step_once_though_the_run_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads when it is first imported
    pytest.importorskip("trackio", reason="needs hetlora[trackio]")
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    folder = gone_on("trackio")
    [known] = Api().runs("hetlora")
    assert known.name == f"phones-{json.loads((folder / 'tracking.json').read_text('utf8'))['id'][:6]}"
    assert known.config["federation"]["rounds"] == ROUNDS
    read: dict[int, dict[str, float]] = {}
    for entry in SQLiteStorage.get_logs("hetlora", known.name):
        step = entry.pop("step")
        assert step not in read, "once each"
        read[step] = {name: value for name, value in entry.items() if name != "timestamp"}
    same(read, folder)
    assert capsys.readouterr().out == ""


def log_records(file: bytes) -> Iterator[bytes]:
    """Yield the records of W&B's file, for which it has no reader in Python: 7 bytes of its own, then LevelDB's log format."""
    at, parts = 7, b""
    while at + 7 <= len(file):
        left = 2**15 - at % 2**15
        if left < 7:  # the rest of a block that no header fits into
            at += left
            continue
        length, kind = struct.unpack_from("<HB", file, at + 4)
        parts += file[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


@pytest.mark.usefixtures("place")
def test_wandb_has_every_step_in_a_file_a_process_and_nothing_leaves_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("wandb", reason="needs hetlora[wandb]")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = gone_on("wandb")
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    identity = json.loads((folder / "tracking.json").read_text("utf8"))["id"]
    assert [path.name for path in files] == [f"run-{identity}.wandb"] * 2, "one file a process, of the same run"
    read: dict[int, dict[str, float]] = {}
    for path in files:
        for data in log_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                figures = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                step = figures.pop("_step")
                read[step] = {name: value for name, value in figures.items() if not name.startswith("_")}
    same(read, folder)
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow 3.17 on SQLAlchemy 2.1
@pytest.mark.usefixtures("place")
def test_mlflow_has_every_step_in_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("mlflow", reason="needs hetlora[mlflow]")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    folder = gone_on("mlflow")
    client = MlflowClient()
    [known] = client.search_runs([client.get_experiment_by_name("hetlora").experiment_id])
    assert (known.info.status, known.info.run_name) == ("FINISHED", "phones")
    assert json.loads(known.data.params["federation"])["rounds"] == ROUNDS
    read: dict[int, dict[str, float]] = {}
    for name in known.data.metrics:
        for metric in client.get_metric_history(known.info.run_id, name):
            read.setdefault(metric.step, {})[name] = metric.value
    same(read, folder)
    assert capsys.readouterr().out == ""


def test_a_tracker_that_is_added_before_the_trackers_are_loaded_needs_no_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(TRACKERS, "own", object)
    importlib.reload(sys.modules["hetlora.runs.tracking"])
    need_trackers(["own"])
