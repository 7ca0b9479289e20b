"""Law: a run that is interrupted anywhere and resumed equals an uninterrupted one (also `proofs/resume.py`)."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors import SafetensorError

import hetlora.runs.checkpoint
import hetlora.runs.folder
import hetlora.runs.resume
from hetlora.cli import main
from hetlora.errors import HetLoraError
from hetlora.runs.display import QuietDisplay
from hetlora.runs.fingerprints import FileFingerprints, downloaded
from hetlora.runs.folder import read_summary, run_lock
from hetlora.runs.local_experiment import LocalExperiment, resume
from hetlora.runs.records import Records, RoundRecord
from hetlora.runs.result import Measurement, RunResult
from proofs.small_run import Ended, config_of, document, ended, write_rows

pytestmark = pytest.mark.run

ROUNDS = 4
VERSIONED = ("torch", "transformers", "peft")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with four clients' rows and a base of its own."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    shutil.copytree(tiny, tmp_path / "base")
    return tmp_path


def uninterrupted(**changes: Any) -> Ended:
    result = LocalExperiment(config_of("whole", **changes), QuietDisplay()).run()
    assert not result.interrupted
    whole = ended(Path("whole/phones"))
    assert [record["kind"] for record in whole.records] == ["run", "evaluation", *["round"] * ROUNDS, "evaluation"]
    return whole


class InterruptedIn(QuietDisplay):
    """Presses Ctrl-C when a round ends."""

    def __init__(self, round_number: int) -> None:
        self.round_number = round_number
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def round_ended(self, record: RoundRecord) -> None:
        if record.round == self.round_number:
            raise KeyboardInterrupt


def interrupted(round_number: int, **changes: Any) -> tuple[Path, InterruptedIn]:
    """Begin a run and press Ctrl-C when a round ends; return its folder."""
    display = InterruptedIn(round_number)
    assert LocalExperiment(config_of("cut", **changes), display).run().interrupted
    return Path("cut/phones"), display


def command(*arguments: object, code: int = 0) -> None:
    assert main([str(argument) for argument in arguments]) == code


# Interrupted --------------------------------------------------------------------------------------------------------

ONE_RANK = {"ranks": {"kind": "same", "rank": 4}}
OTHERS: dict[str, dict[str, Any]] = {
    "a personal method": {"method": {"name": "fedsa_lora"}},
    "what is folded": {"method": {"name": "fedex_lora"}},
    "what is folded, and drawn": {"method": {"name": "flora"}},
    "a server optimiser": {"server_optimizer": {"name": "adam", "learning_rate": 0.01}},
    "an average, and a rank that is served": {
        "method": {"name": "steady"},
        "evaluation": {"every": 1, "adapter": "received"},
    },
    "a rank a module": {"method": {"name": "hetlora", "gamma": 0.5, "penalty": 5.0, "min_rank": 1, "per_module": True}},
    "one factor in turn": {"method": {"name": "rolora"}},
    "all rows in one place": {"method": {"name": "central"}, **ONE_RANK},
    "received": {"evaluation": {"every": 1, "adapter": "received"}},
}


@pytest.mark.parametrize("what", OTHERS)
def test_an_interrupted_run_ends_as_if_nothing_had_happened(what: str):
    whole = uninterrupted(**OTHERS[what])
    folder, display = interrupted(2, **OTHERS[what])
    assert (
        display.said[-1] == "interrupted: kept the adapter of round 2; hetlora resume cut/phones goes on from round 2"
    )
    second = InterruptedIn(3)
    assert resume(folder, second).interrupted
    assert "going on from round 2" in second.said
    newest = folder / "checkpoints" / "round-000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    third = InterruptedIn(0)
    result = resume(folder, third)
    assert not result.interrupted
    assert any(str(newest) in line for line in third.said), "the damaged checkpoint is named"
    assert "going on from round 2" in third.said
    assert ended(folder) == whole


def test_an_interrupt_while_a_round_is_measured_costs_that_round(monkeypatch: pytest.MonkeyPatch):
    """Its record lacks the perplexity, so the run goes on from the round before."""
    whole = uninterrupted()
    measure = LocalExperiment.measure

    def stop(self: LocalExperiment, state: Any, *, generate: bool = True) -> Measurement:
        if state is not None and state.round == ROUNDS:
            raise KeyboardInterrupt
        return measure(self, state, generate=generate)

    monkeypatch.setattr(LocalExperiment, "measure", stop)
    display = InterruptedIn(0)
    assert LocalExperiment(config_of("cut"), display).run().rounds == ROUNDS
    assert display.said[-1].endswith("hetlora resume cut/phones goes on from round 3")
    monkeypatch.setattr(LocalExperiment, "measure", measure)
    resume(Path("cut/phones"), QuietDisplay())
    assert ended(Path("cut/phones")) == whole


@pytest.mark.parametrize("moment", ["measure", "write_result"])
def test_an_interrupt_before_or_after_the_rounds_says_how_to_go_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str
):
    whole = uninterrupted()
    before = getattr(LocalExperiment, moment)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (place / "cut.toml").write_text(tomli_w.dumps(document("cut", threads=1)), encoding="utf8")
    monkeypatch.setattr(LocalExperiment, moment, stop)
    command("run", "cut.toml", code=130)
    assert "hetlora resume cut/phones goes on" in capsys.readouterr().err
    monkeypatch.setattr(LocalExperiment, moment, before)
    command("resume", "cut/phones", "--json")
    out, err = capsys.readouterr()
    assert json.loads(out)["rounds"] == ROUNDS
    rounds = [line.split()[1] for line in err.splitlines() if line.startswith("round ")]
    assert rounds == (["1/4", "2/4", "3/4", "4/4"] if moment == "measure" else [])
    assert ended(Path("cut/phones")) == whole


def test_rounds_and_seconds_go_on_where_they_were(monkeypatch: pytest.MonkeyPatch):
    folder, _ = interrupted(3)
    read = hetlora.runs.checkpoint.read_checkpoint(folder / "checkpoints" / "round-000003.safetensors")
    assert 0.0 < read.seconds < 600.0
    monkeypatch.setattr(hetlora.runs.resume, "newest", lambda *_: replace(read, seconds=1000.0))
    assert 1000.0 < resume(folder, QuietDisplay()).seconds < 1600.0


def test_it_goes_on_with_as_many_threads_as_it_began_with(capsys: pytest.CaptureFixture[str]):
    """Threads decide how clients are grouped, and the groups the last bits."""
    whole = uninterrupted()
    folder, _ = interrupted(2)
    torch.set_num_threads(2)
    try:
        command("resume", folder)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
    shown = [line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("round ")]
    assert shown == ["3/4", "4/4"]
    assert ended(folder) == whole


def test_without_a_checkpoint_a_run_begins_anew_in_its_folder():
    whole = uninterrupted()
    folder = Path("cut/phones")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config_of("cut").model_dump_json(), encoding="utf8")
    (folder / "records.jsonl").write_text('{"kind": "run"}\n{"ki', encoding="utf8")
    display = InterruptedIn(0)
    resume(folder, display)
    assert "no checkpoint: beginning at round 0" in display.said
    assert ended(folder) == whole
    assert not Path("cut/phones-2").exists()


@pytest.mark.parametrize(("every", "kept"), [(0, []), (1, [3, 4]), (3, [3, 4])])
def test_how_often_checkpoints_are_written(every: int, kept: list[int]):
    LocalExperiment(config_of("cut", checkpoint_every=every), QuietDisplay()).run()
    names = [f"round-{number:06d}.safetensors" for number in kept]
    assert sorted(path.name for path in Path("cut/phones").glob("checkpoints/*")) == names


def test_without_checkpoints_rounds_that_were_done_are_not_thrown_away(capsys: pytest.CaptureFixture[str]):
    folder, display = interrupted(2, checkpoint_every=0)
    assert display.said[-1].endswith(
        "kept the adapter of round 2; begin it again: without checkpoints (checkpoint_every = 0) it cannot go on"
    )
    refused(capsys, folder, "'cut/phones' has done rounds and keeps no checkpoints", "hetlora run", "move")
    (folder / "records.jsonl").unlink()
    assert resume(folder, QuietDisplay()).rounds == ROUNDS
    assert ended(folder).learned == uninterrupted(checkpoint_every=0).learned


def test_killed_before_its_configuration_was_written_a_run_begins_beside_what_it_left(
    place: Path, capsys: pytest.CaptureFixture[str]
):
    whole = uninterrupted()
    folder = place / "cut/phones"
    folder.mkdir(parents=True)
    (folder / "records.jsonl").touch()
    (folder / "config.json.part").write_text("{", encoding="utf8")
    refused(capsys, folder, "is no run, for it has no config.json")
    LocalExperiment(config_of("cut"), QuietDisplay()).run()
    assert ended(place / "cut/phones-2") == whole


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_a_checkpoint_is_gone_on_from_under_the_folders_lock(monkeypatch: pytest.MonkeyPatch):
    """Else a second process could have gone on from it meanwhile, and its records would be cut."""
    folder, _ = interrupted(2)
    read = hetlora.runs.resume.newest

    def newest(folder: Path, say: Callable[[str], None]) -> Any:
        with pytest.raises(HetLoraError, match="another process is at work"), run_lock(folder):
            pass
        return read(folder, say)

    monkeypatch.setattr(hetlora.runs.resume, "newest", newest)
    assert resume(folder, QuietDisplay()).rounds == ROUNDS


def test_a_summary_of_before_is_gone_before_records_are_cut(monkeypatch: pytest.MonkeyPatch):
    """Else a process that is killed after it has cut them leaves a folder that says it is complete."""
    folder, _ = interrupted(2)
    resume(folder, QuietDisplay())
    there: list[bool] = []
    cut = Records.cut

    def looking(self: Records, length: int) -> None:
        there.append((folder / "summary.json").exists())
        cut(self, length)

    monkeypatch.setattr(Records, "cut", looking)
    resume(folder, QuietDisplay())
    assert there == [False]


def test_all_of_a_result_is_on_the_disk_before_its_summary(monkeypatch: pytest.MonkeyPatch):
    synced: list[int] = []
    fsync = os.fsync

    def note(number: int) -> None:
        synced.append(os.fstat(number).st_ino)
        fsync(number)

    monkeypatch.setattr(hetlora.runs.folder.os, "fsync", note)
    LocalExperiment(config_of("cut", checkpoint_every=0), QuietDisplay()).run()
    folder = Path("cut/phones")
    before = synced[: synced.index((folder / "summary.json").stat().st_ino)]
    result = [folder / "adapter", *(folder / "adapter").iterdir(), folder / "records.jsonl"]
    assert len(result) >= 4
    assert {path.stat().st_ino for path in [*result, folder]} <= set(before)


def test_the_names_of_a_runs_folders_are_on_the_disk_before_it_says_that_it_can_go_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
):
    """Else a power cut takes a synchronised checkpoint with the folder that it is in."""
    synced: set[int] = set()
    before: list[set[int]] = []
    fsync = os.fsync

    class Looking(QuietDisplay):
        def round_ended(self, _: RoundRecord) -> None:
            before.append(set(synced))

    def note(number: int) -> None:
        synced.add(os.fstat(number).st_ino)
        fsync(number)

    monkeypatch.setattr(hetlora.runs.folder.os, "fsync", note)
    LocalExperiment(config_of("far/cut"), Looking()).run()
    folders = [place, place / "far", place / "far/cut", place / "far/cut/phones", place / "far/cut/phones/checkpoints"]
    assert {folder.stat().st_ino for folder in folders} <= before[0]


def test_between_two_checkpoints_the_last_one_is_gone_on_from():
    changes = {"checkpoint_every": 2}
    whole = uninterrupted(**changes)
    folder, display = interrupted(3, **changes)
    assert display.said[-1].endswith("kept the adapter of round 3; hetlora resume cut/phones goes on from round 2")
    resume(folder, QuietDisplay())
    assert ended(folder) == whole


# Complete -----------------------------------------------------------------------------------------------------------


def test_a_complete_run_says_so_and_stays_as_it_is(capsys: pytest.CaptureFixture[str]):
    result = LocalExperiment(config_of("cut"), QuietDisplay()).run()
    folder = Path("cut/phones")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    command("resume", folder, "--json")
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads(json.dumps(result.summary()))
    assert err == "cut/phones is complete\n"
    command("resume", folder)
    out, err = capsys.readouterr()
    assert out.startswith(f"cut/phones is complete: {ROUNDS} rounds")
    assert "held-out perplexity" in out
    assert "cut/phones/adapter" in out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_complete_run_is_told_where_it_lies_now(capsys: pytest.CaptureFixture[str]):
    LocalExperiment(config_of("cut"), QuietDisplay()).run()
    Path("cut/phones").rename("moved")
    command("resume", "moved")
    out = capsys.readouterr().out
    assert "moved/adapter" in out
    assert "moved/records.jsonl" in out
    assert "cut" not in out


@pytest.mark.parametrize(
    "summary",
    [
        {},
        {"base": 7, "final": [], "adapter": 3},
        {"base": {"perplexity": "low"}, "final": {}, "adapter": "elsewhere/odd", "records": None},
        {"base": {"perplexity": 10**400}, "final": {"perplexity": 3}},
    ],
)
def test_an_odd_summary_is_told_as_far_as_it_goes(
    place: Path, capsys: pytest.CaptureFixture[str], summary: dict[str, Any]
):
    (place / "summary.json").write_text(json.dumps(summary), encoding="utf8")
    command("resume", place)
    assert "is complete: None rounds" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"rounds": ' * 100_000, "[]", "\x00", "9" * 5000])
def test_a_summary_that_is_none_does_not_make_a_run_complete(tmp_path: Path, text: str):
    (tmp_path / "summary.json").write_text(text, encoding="utf8")
    assert read_summary(tmp_path) is None


def test_a_complete_run_that_learned_nothing_exits_as_it_did(capsys: pytest.CaptureFixture[str]):
    LocalExperiment(
        config_of("cut", federation={"rounds": 1, "clients_per_round": 1, "dropout": 0.999}), QuietDisplay()
    ).run()
    assert ended(Path("cut/phones")).summary["updates"] == 0
    command("resume", "cut/phones", "--json", code=1)
    assert "no client ever gave an update" in capsys.readouterr().err


def test_a_run_that_trains_nobody_is_complete_too(capsys: pytest.CaptureFixture[str]):
    LocalExperiment(config_of("cut", method={"name": "zeroshot"}), QuietDisplay()).run()
    command("resume", "cut/phones")
    assert "is complete: 0 rounds" in capsys.readouterr().out
    Path("cut/phones/summary.json").write_text("{", encoding="utf8")  # as if it had not come to that
    command("resume", "cut/phones", "--json", "--quiet")
    assert json.loads(capsys.readouterr().out)["rounds"] == 0


# Refused ------------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *said: str) -> None:
    """Check that the run is refused: exit code 2, one message that says these things, nothing changed."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    capsys.readouterr()
    command("resume", folder, "--quiet", code=2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("hetlora: ")
    assert "Traceback" not in err
    for part in said:
        assert part in err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"} == before


def edit_config(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text("utf8"))
    config["federation"]["rounds"] = 9
    config["training"]["learning_rate"] = 0.5
    path.write_text(json.dumps(config), encoding="utf8")


def edit_data(_: Path) -> None:
    text = Path("rows.jsonl").read_text("utf8")
    Path("rows.jsonl").write_text(text.replace("number 0 of phone 1", "number 7 of phone 1"), encoding="utf8")


def edit_base(_: Path) -> None:
    path = Path("base/model.safetensors")
    data = bytearray(path.read_bytes())
    data[-4] ^= 1  # the last bit of a weight
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            edit_config,
            ["federation.rounds = 9, and the run began with 4", "training.learning_rate = 0.5", "began with 0.01"],
        ),
        (edit_data, ["data.path = 'rows.jsonl' does not hold what it held when the run began"]),
        (edit_base, ["model.base = 'base' does not hold what it held when the run began"]),
    ],
    ids=["configuration", "data", "base"],
)
def test_what_is_no_longer_the_same_run_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], edit: Callable[[Path], None], said: Sequence[str]
):
    folder, _ = interrupted(2)
    edit(folder)
    refused(capsys, folder, "'cut/phones' cannot go on", *said)


def test_other_versions_and_another_device_are_refused_by_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """They round differently: the run would end, but not as if nothing had happened."""
    folder, _ = interrupted(2)
    versions = {"torch": "0.1", "transformers": "0.2", "peft": "0.3"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    monkeypatch.setattr("hetlora.runs.runner._device", lambda _: torch.device("cuda", 0))
    said = [f"{name} is 0.{number}, and the run began with " for number, name in enumerate(VERSIONED, 1)]
    refused(capsys, folder, "'cut/phones' cannot go on", "device is cuda, and the run began with cpu", *said)


def test_a_base_of_the_hub_is_the_commit_that_its_name_means(place: Path, monkeypatch: pytest.MonkeyPatch):
    """Without a revision in the configuration, the name alone would not say which it was."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
    config = config_of("cut", model={"base": "owner/tiny", "tokenizer": "base", "device": "cpu"})
    assert downloaded(config) == {"model.base": None}
    for commit in ("ab" * 20, "cd" * 20):
        files = place / "hub/models--owner--tiny/snapshots" / commit
        shutil.copytree("base", files)
        (place / "hub/models--owner--tiny/refs").mkdir(exist_ok=True)
        (place / "hub/models--owner--tiny/refs/main").write_text(commit, encoding="utf8")
        assert downloaded(config) == {"model.base": commit}
        assert LocalExperiment(config, QuietDisplay()).digests()["model.base"] == commit


def test_hidden_files_are_no_data(place: Path):
    (place / "rows").mkdir()
    shutil.copy("rows.jsonl", "rows/rows.jsonl")
    data = dict(config_of("cut").model_dump()["data"], path="rows")
    before = FileFingerprints().digests(config_of("cut", data=data))
    (place / "rows/.ipynb_checkpoints").mkdir()
    for name in (".DS_Store", ".ipynb_checkpoints/rows.jsonl"):
        (place / "rows" / name).write_text("x", encoding="utf8")
    assert FileFingerprints().digests(config_of("cut", data=data)) == before
    (place / "rows/more.jsonl").write_text("{}\n", encoding="utf8")
    assert FileFingerprints().digests(config_of("cut", data=data)) != before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is no run"),
        ("{", "not JSON"),
        ("[]", "config.json has 1 problem"),
        ('{"naem": 1}', "naem is not a key"),
    ],
)
def test_a_folder_that_is_no_runs_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
):
    folder = place / "cut"
    folder.mkdir()
    if content is not None:
        (folder / "config.json").write_text(content, encoding="utf8")
    refused(capsys, folder, "config.json", said)


def test_a_run_over_other_machines_is_not_resumed_here(place: Path, capsys: pytest.CaptureFixture[str]):
    folder = place / "cut"
    folder.mkdir()
    config = config_of("cut", flower={"clients": "nodes"})
    (folder / "config.json").write_text(config.model_dump_json(), encoding="utf8")
    refused(capsys, folder, "machines of their own", "`flwr run` resumes it", "hetlora flower local")


def test_without_a_whole_checkpoint_it_says_so(capsys: pytest.CaptureFixture[str]):
    folder, _ = interrupted(2)
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    refused(capsys, folder, "no checkpoint is left to go on from", "round-000001", "round-000002", "remove")


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_two_processes_are_not_let_into_one_folder(capsys: pytest.CaptureFixture[str]):
    folder, _ = interrupted(2)
    with run_lock(folder):
        refused(capsys, folder, "another process is at work in 'cut/phones'")
    command("resume", folder, "--quiet")


class FullFrom(QuietDisplay):
    """Fills the disk when a round has ended."""

    def __init__(self, round_number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.round_number, self.monkeypatch = round_number, monkeypatch

    def round_ended(self, record: RoundRecord) -> None:
        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        if record.round == self.round_number:
            self.monkeypatch.setattr(hetlora.runs.folder.os, "fsync", fail)


def test_on_a_full_disk_one_error_says_where_and_how_to_go_on(monkeypatch: pytest.MonkeyPatch):
    whole = uninterrupted()
    folder = Path("cut/phones")
    with monkeypatch.context() as context:
        # records.jsonl is synchronised first; here only the checkpoint's own bytes find no room.
        context.setattr("hetlora.runs.records.Records.sync", lambda self: self.path.stat().st_size)
        with pytest.raises(HetLoraError) as caught:
            LocalExperiment(config_of("cut"), FullFrom(2, context)).run()
    message = str(caught.value)
    assert "cannot write to 'cut/phones/checkpoints/round-000003.safetensors': No space left on device" in message
    assert message.endswith("hetlora resume cut/phones goes on from round 2")
    assert len(list((folder / "checkpoints").iterdir())) == 2
    result: RunResult = resume(folder, QuietDisplay())
    assert not result.interrupted
    assert ended(folder) == whole


@pytest.mark.parametrize("error", [SafetensorError("I/O error: No space left on device"), OSError(28, "No space left")])
def test_without_room_for_the_result_the_run_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, error: Exception):
    """safetensors has errors of its own."""
    whole = uninterrupted()

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as context:
        context.setattr("hetlora.model.peft_files.save_file", fail)
        with pytest.raises(HetLoraError) as caught:
            LocalExperiment(config_of("cut"), QuietDisplay()).run()
    assert str(caught.value).startswith("cannot write to 'cut/phones': ")
    assert "No space left" in str(caught.value)
    assert str(caught.value).endswith(f"hetlora resume cut/phones goes on from round {ROUNDS}")
    resume(Path("cut/phones"), QuietDisplay())
    assert ended(Path("cut/phones")) == whole
