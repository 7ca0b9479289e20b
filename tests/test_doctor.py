"""`hetlora doctor`: the check named after a fault finds the planted fault, and a healthy run has none."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

import hetlora.training.simulation
from hetlora.cli import main
from hetlora.commands.doctor import configuration, diagnose, machine
from hetlora.commands.doctor.diagnose import check_laws, examine
from hetlora.commands.doctor.dry_run import TinyFederation, check_rounds
from hetlora.commands.doctor.findings import CHECKS, DRY_RUN, Diagnosis, Finding
from hetlora.config import parse_config
from hetlora.config.build_data import load_federation
from hetlora.core.adapter import LoraPair, map_tensors
from hetlora.core.aggregation import weighted_mean
from hetlora.core.client_list import ClientList
from hetlora.core.method import Method, example_weight
from hetlora.core.ranks import explicit_ranks
from hetlora.core.types import ServerState
from hetlora.methods import METHODS, ffa_lora, full, zeropad
from hetlora.model.lora_model import LoraModel, load_base, load_tokenizer
from hetlora.model.peft_files import export_adapter
from hetlora.testing import laws
from proofs.small_run import CLIENTS, document, write_rows

pytestmark = pytest.mark.run

ROOT = Path(__file__).resolve().parent.parent
Examine = Callable[..., Diagnosis]


@pytest.fixture
def place(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a base of its own and the rows of four clients."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


@pytest.fixture
def look_at_all(place: Path) -> Examine:
    """Examine a run that is healthy but for these sections."""

    def call(available: int | None = None, **changes: Any) -> Diagnosis:
        (place / "run.toml").write_text(tomli_w.dumps(document("runs", **changes)), encoding="utf8")
        return examine(place / "run.toml", available=available)

    return call


@pytest.fixture
def look(look_at_all: Examine, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """Examine such a run without what takes most of the time: its dry run, and its memory unless `available` is given."""
    monkeypatch.setattr(diagnose, "check_rounds", lambda *_: None)

    def memory(*arguments: Any) -> bool:
        return arguments[-1] is None or configuration.check_memory(*arguments)

    monkeypatch.setattr(diagnose, "check_memory", memory)
    return look_at_all


def only(diagnosis: Diagnosis, check: str, status: str) -> Finding:
    """The one finding of a check, which is not well, and is the only one of its status."""
    bad = [finding for finding in diagnosis.findings if finding.status == status]
    assert [finding.check for finding in bad] == [check], bad
    [finding] = bad
    assert finding.place
    return finding


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf8")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf8").splitlines()]


# Healthy ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokens() -> Iterator[list[int]]:
    """How many tokens went through a base, pass by pass: what an examination takes, on whatever processor and however busy."""
    passed: list[int] = []

    def count(module: torch.nn.Module, given: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Embedding):
            passed.append(given[0].numel())

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    yield passed
    hook.remove()


@pytest.mark.slow
@pytest.mark.large
def test_the_demonstration_is_healthy_and_looked_at_in_little_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tokens: list[int]
):
    demo = str(ROOT / "examples/demo.toml")
    assert main(["doctor", demo, "--json", "--set", f"output={json.dumps(str(tmp_path))}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not [finding for finding in found["findings"] if finding["status"] != "ok"]
    looked_at = {finding["check"] for finding in found["findings"]}
    assert looked_at == set(CHECKS) - {"bundled base"}
    assert found["skipped"] == {}
    steps, rows, length = 4, 4, 224
    assert 0 < sum(tokens) <= 2 * steps * rows * length, "no more than two of its clients train on in a round"
    assert not list(tmp_path.iterdir()), "nothing is left where it tried to write"
    with capsys.disabled():
        print(f" [doctor examples/demo.toml: {found['seconds']} s]", end="")


def test_a_small_run_is_healthy(look_at_all: Examine):
    diagnosis = look_at_all()
    assert {finding.status for finding in diagnosis.findings} == {"ok"}
    found = [finding["check"] for finding in diagnosis.summary()["findings"]]
    assert found == [check for check in CHECKS if check != "bundled base"]
    assert diagnosis.of("sent is trained")[0].value == "32 of 32 tensors bit-equal"


def test_a_method_that_trains_all_weights_is_looked_at_as_such_whatever_it_is_called(
    look_at_all: Examine, monkeypatch: pytest.MonkeyPatch
):
    def looked(name: str) -> list[tuple[str, str, str]]:
        about = ("target modules", "memory", "sent is trained", "ranks")
        found = look_at_all(available=10**10, method={"name": name}, ranks={"kind": "same", "rank": 1}).findings
        return [(one.check, one.status, one.value.replace(name, "it")) for one in found if one.check in about]

    monkeypatch.setitem(METHODS, "mine", lambda: replace(full(), name="mine"))
    mine = looked("mine")
    assert mine == looked("full")
    assert ("target modules", "ok", "none: method it trains every weight") in mine


def test_a_machine_alone_is_looked_at(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    code = main(["doctor"])
    out = capsys.readouterr().out
    assert code == 0, out
    for check in ("python", "torch", "processor", "disk", "locks", "fsync", "bundled base"):
        assert re.search(rf"^ok +{check} ", out, flags=re.MULTILINE), out
    assert "target modules" not in out


# The command --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["nowhere.toml"], ["--set", "seed=1"], ["run.toml", "--set", "seed"], ["--laws"]]
)
def test_a_wrong_command_exits_with_2(place: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]):
    (place / "run.toml").write_text(tomli_w.dumps(document("runs")), encoding="utf8")
    assert main(["doctor", *arguments]) == 2
    assert capsys.readouterr().err.startswith("hetlora: ")


@pytest.mark.parametrize("text", ["not toml", 'seed = "x"'])
def test_a_configuration_that_is_none_fails_with_its_problems(
    place: Path, text: str, capsys: pytest.CaptureFixture[str]
):
    (place / "run.toml").write_text(text, encoding="utf8")
    assert main(["doctor", "run.toml", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] is True
    assert {finding["check"] for finding in found["findings"]} == {"configuration"}
    assert found["skipped"].keys() == set(CHECKS) - {"configuration"}


@pytest.mark.usefixtures("look")
def test_the_file_of_a_comparison_is_looked_at_as_other_commands_look_at_it(place: Path):
    text = tomli_w.dumps(document("runs")) + "\n[compare]\nseeds = [0]\n"
    (place / "run.toml").write_text(text, encoding="utf8")
    assert not examine(place / "run.toml").failed


def test_every_check_is_shown_as_soon_as_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shown: list[Finding] = []

    def last(found: Diagnosis) -> None:
        assert [finding.check for finding in shown] == list(CHECKS[: CHECKS.index("bundled base")])
        found.note("bundled base", "is here", "nano")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diagnose, "check_bundled_base", last)
    assert examine(show=shown.append).findings == shown


@pytest.mark.usefixtures("look")
def test_laws_are_checked_where_they_are_asked_for(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(METHODS, "planted", planted(weigh=lambda _: -1.0))
    (place / "run.toml").write_text(tomli_w.dumps(document("runs", method={"name": "planted"})), encoding="utf8")
    assert main(["doctor", "run.toml"]) == 0
    assert "law:" not in capsys.readouterr().out
    assert main(["doctor", "run.toml", "--laws"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^ok +law: tasks +a client receives a task of its own", out, flags=re.MULTILINE)
    assert re.search(
        r"^failed +law: weights +'client-0' has a weight of -1.0\n +-> method.name: mend", out, re.MULTILINE
    )


def test_laws_are_those_of_the_method_within_its_wrappers():
    section = {"name": "adam", "learning_rate": 0.1}
    found = Diagnosis()
    check_laws(found, parse_config(document("runs", server_optimizer=section)))
    assert [finding.check for finding in found.findings] == [f"law: {name}" for name, _ in laws()]
    assert {finding.status for finding in found.findings} == {"ok"}


def test_a_failure_is_told_with_its_place_and_way_out(place: Path, capsys: pytest.CaptureFixture[str]):
    changed = document("runs", model={"base": "nowhere/at/all"})
    (place / "run.toml").write_text(tomli_w.dumps(changed), encoding="utf8")
    assert main(["doctor", "run.toml"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^failed +base +the base model 'nowhere/at/all' is not a folder$", out, flags=re.MULTILINE), out
    assert re.search(r"^ +-> model.base: give a folder with config.json", out, flags=re.MULTILINE), out
    assert "not looked at, for the base cannot be loaded: causal, target modules" in out
    assert re.search(
        r"^not looked at, for what they need is not there: .*updates, sent is trained", out, flags=re.MULTILINE
    )


# The machine --------------------------------------------------------------------------------------------------------


def test_versions_are_those_of_the_project_and_its_constraints():
    pinned = (ROOT / "constraints.txt").read_text("utf8")
    project = (ROOT / "pyproject.toml").read_text("utf8")
    assert f"on CPython {machine.VERSIONS['python'].tested}" in pinned
    assert f'requires-python = "{machine.VERSIONS["python"].accepted}"' in project
    for name, version in machine.VERSIONS.items():
        if name != "python":
            assert f"\n{name}=={version.tested}\n" in pinned
            assert re.search(rf'"{name}(\[simulation\])?{re.escape(version.accepted)}"', project), name


@pytest.mark.parametrize(("name", "status"), [("torch", "failed"), ("peft", "failed"), ("flwr", "warning")])
def test_a_version_that_does_not_fit_is_found(name: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    version = machine.importlib.metadata.version
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda asked: "0.1" if asked == name else version(asked))
    notes = Diagnosis()
    machine.check_machine(notes, tmp_path)
    finding = only(notes, name, status)
    assert finding.value.startswith("0.1, and hetlora takes ")
    assert "pip install" in finding.way_out


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("output", ["rows.jsonl", "rows.jsonl/runs"])
def test_a_folder_that_cannot_be_written_is_found(output: str):
    notes = Diagnosis()
    machine.check_machine(notes, Path(output))
    finding = only(notes, "output folder", "failed")
    assert "cannot be written" in finding.value
    assert finding.place == "output"
    assert notes.skipped.keys() == {"disk", "locks", "fsync"}


def test_a_disk_without_locks_or_space_or_speed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import fcntl

    def none(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", none)
    usage = shutil.disk_usage(tmp_path)._replace(free=5 * 10**7)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(machine, "SLOW_FSYNC", 0.0)
    notes = Diagnosis()
    machine.check_machine(notes, tmp_path)
    found = {finding.check: finding.status for finding in notes.findings if finding.status != "ok"}
    assert found == {"disk": "failed", "locks": "warning", "fsync": "warning"}


def test_more_threads_than_cores_are_found(tmp_path: Path):
    notes = Diagnosis()
    machine.check_machine(notes, tmp_path, threads=10_000)
    assert only(notes, "processor", "warning").place == "threads"


def test_free_memory_is_the_least_of_what_system_and_container_leave(tmp_path: Path):
    for folder in ("proc/self", "sys/fs/cgroup"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    assert machine.available_memory(tmp_path) == 5000 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("1000\n")
    assert machine.available_memory(tmp_path) == 5000 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("3000\n")
    assert machine.available_memory(tmp_path) == 2000


# The base -----------------------------------------------------------------------------------------------------------


def test_a_wrong_module_name_is_found_with_what_may_be_meant(look: Examine):
    names = ["q_porj", "v_proj", "norm"]
    finding = only(look(model={"base": "base", "target_modules": names}), "target modules", "failed")
    assert "'q_porj' is none (did you mean 'q_proj'" in finding.value
    assert "'norm' is none" in finding.value
    assert "'v_proj' is none" not in finding.value
    assert finding.place == "model.target_modules"


def test_a_base_of_pickles_is_found(place: Path, look: Examine):
    base = load_base(str(place / "base"))
    torch.save(base.state_dict(), place / "base" / "pytorch_model.bin")
    (place / "base" / "model.safetensors").unlink()
    finding = only(look(), "base", "failed")
    assert "model.safetensors" in finding.value
    assert finding.place == "model.base"


def test_a_tokenizer_that_is_not_there_is_found(place: Path, look: Examine):
    for file in (place / "base").glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer that loads" in only(look(), "tokenizer", "failed").value


def test_a_tokenizer_of_too_many_tokens_is_found(place: Path, look: Examine):
    tokenizer = load_tokenizer(str(place / "base"))
    tokenizer.add_tokens([f"<new {number}>" for number in range(9)])
    tokenizer.save_pretrained(place / "base")
    finding = only(look(), "tokenizer", "failed")
    assert "has 267 tokens, the base 'base' knows 258" in finding.value
    assert "model.tokenizer" in finding.way_out


def test_rows_longer_than_the_base_takes_are_found(look: Examine):
    data = document("runs")["data"] | {"max_length": 513}
    assert only(look(data=data), "sequence length", "failed").place == "data.max_length"


def test_a_device_that_is_not_here_is_found(look: Examine):
    assert only(look(model={"base": "base", "device": "cuda:99"}), "device", "failed").place == "model.device"


# The rows -----------------------------------------------------------------------------------------------------------


def test_a_client_whose_rows_all_lack_a_target_is_found(place: Path, look_at_all: Examine):
    data = document("runs")["data"] | {"target": "{answer}"}
    lines = lines_of(place / "rows.jsonl")
    write_lines(
        place / "rows.jsonl", [line | {"answer": ""} if line["device"] == CLIENTS[1] else line for line in lines]
    )
    diagnosis = look_at_all(data=data)
    assert repr(CLIENTS[1]) in only(diagnosis, "empty clients", "failed").value
    [finding] = diagnosis.of("rows without a target")
    assert (finding.status, finding.value) == ("warning", "6 of 24 rows")
    assert diagnosis.of("sent is trained")[0].status == "ok", "the others are looked at"


def test_rows_that_lack_the_field_of_the_target_are_found_by_their_line(place: Path, look: Examine):
    lines = lines_of(place / "rows.jsonl")
    del lines[3]["answer"]
    write_lines(place / "rows.jsonl", lines)
    finding = only(look(), "rows", "failed")
    assert "rows.jsonl, line 4: field 'answer' is missing" in finding.value


def test_clients_without_a_training_row_or_a_held_out_one_are_found(place: Path, look: Examine):
    extra = {"question": "?", "answer": "!"}
    lines = lines_of(place / "rows.jsonl")
    write_lines(
        place / "rows.jsonl",
        [
            *lines,
            extra | {"device": "mute", "split": "test"},
            extra | {"device": "deaf", "split": "train"},
            *(extra | {"device": "odd", "split": "validation"} for _ in lines * 2),
        ],
    )
    found = {(f.check, f.value) for f in look().findings if f.status == "warning"}
    assert found == {
        ("clients left out", "no training row: 'mute', 'odd'"),
        ("clients left out", "no held-out row: 'deaf'"),
        ("rows of no side", "48 of 74 (validation)"),
    }


def test_rows_that_are_cut_are_found(look: Examine):
    data = document("runs")["data"] | {"max_length": 12}
    assert only(look(data=data), "rows too long", "warning").value == "24 of 24 rows are cut"


def test_of_many_rows_those_of_some_clients_speak_for_all(look: Examine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(configuration, "MOST_ROWS", 12)
    assert look().of("rows too long")[0].value == "0 of 12 rows of 2 clients are cut"


# The settings -------------------------------------------------------------------------------------------------------


def test_a_cohort_that_is_too_large_or_of_one_is_found(look: Examine):
    federation = {"rounds": 2, "clients_per_round": 5}
    assert "the data have 4 clients" in only(look(federation=federation), "cohort", "failed").value
    assert (
        only(look(federation=federation | {"clients_per_round": 1}), "cohort", "warning").value == "one client a round"
    )


def test_ranks_above_the_size_of_a_module_are_found(look: Examine):
    finding = only(look(ranks={"kind": "same", "rank": 20}), "ranks", "warning")
    assert finding.value.startswith("rank 20 is above the size of 2 modules")
    assert "v_proj: 16)" in finding.value
    assert finding.value.endswith("lower it to 16")


def test_a_tier_that_nobody_has_is_found(look: Examine):
    tiers = [{"rank": 2, "share": 0.5}, {"rank": 4, "share": 0.495}, {"rank": 8, "share": 0.005}]
    assert only(look(ranks={"kind": "tiers", "tiers": tiers}), "tiers", "warning").value == "rank 8: nobody has it"


def test_a_client_without_a_rank_is_found(place: Path):
    (place / "run.toml").write_text(tomli_w.dumps(document("runs")), encoding="utf8")
    changes = [f'ranks={{ kind = "explicit", of = {{ "{CLIENTS[0]}" = 2 }} }}']
    finding = only(examine(place / "run.toml", changes), "ranks", "failed")
    assert finding.value == "no rank for phone/2, tablet 1, tablet 2"


LONG = document("runs")["data"] | {"max_length": 512}
"""Rows so long that fewer ways to do less at once are traced."""


@pytest.mark.large
def test_too_little_memory_is_found(look: Examine):
    finding = only(look(available=10**5, data=LONG), "memory", "failed")
    assert "one client at a time needs" in finding.value
    assert finding.way_out


def test_memory_that_holds_a_run_only_if_less_is_done_at_once_is_found(look: Examine):
    [fine] = look(available=10**10).of("memory")
    predicted = float(re.match(r"(\d+) MB", fine.value)[1]) * 1e6  # type: ignore[index]
    finding = only(look(available=int(0.8 * predicted)), "memory", "warning")
    assert "set memory_megabytes to at most" in finding.way_out


def test_a_limit_that_holds_no_client_is_found(place: Path):
    (place / "run.toml").write_text(tomli_w.dumps(document("runs", data=LONG)), encoding="utf8")
    diagnosis = examine(place / "run.toml", ["memory_megabytes=0.1"])
    assert "memory_megabytes = 0.1: one client at a time needs" in only(diagnosis, "memory", "failed").value
    not_made = {"base", "causal", "first adapter", "tokenizer", *DRY_RUN}
    assert diagnosis.skipped.keys() == not_made, "the base is not loaded where it does not fit"


@pytest.mark.parametrize(
    ("training", "where"),
    [
        ({"steps": 2, "learning_rate": 3.0}, "training.learning_rate"),
        ({"steps": 2, "learning_rate": 1e-9}, "training.learning_rate"),
        ({"steps": 500, "batch_size": 2}, "training.steps"),
        ({"epochs": 30, "batch_size": 2}, "training.epochs"),
    ],
)
@pytest.mark.usefixtures("place")
def test_training_out_of_measure_is_found(training: dict[str, Any], where: str):
    config = parse_config(document("runs", training=training))
    notes = Diagnosis()
    configuration.check_training(notes, config, load_federation(config))
    assert where in [finding.place for finding in notes.findings if finding.status == "warning"]


@pytest.mark.usefixtures("place")
def test_training_of_all_rows_at_once_is_measured_by_all_rows():
    # Four clients of four rows: 15 steps of a client are 60 of one that has 16 rows, of 6 each.
    pooled = document("runs", training={"steps": 15, "batch_size": 6}, method={"name": "central"})
    notes = Diagnosis()
    configuration.check_training(notes, parse_config(pooled), load_federation(parse_config(pooled)))
    [finding] = notes.findings
    rows = load_federation(parse_config(pooled)).total("train")
    asked = pooled["federation"]["clients_per_round"]
    assert finding.value.startswith(f"{15 * asked} steps of 6 rows on {rows}, {15 * asked * 6 / rows:.1f} times each")


def test_an_adapter_to_start_from_that_is_none_is_found(place: Path, look: Examine):
    finding = only(look(model={"base": "base", "adapter": "nowhere"}), "first adapter", "failed")
    assert "has no adapter_config.json" in finding.value
    assert finding.place == "model.adapter"
    folder = place / "other"
    model = LoraModel(load_base("base"), target_modules=["q_proj"])
    export_adapter(
        model.initial_adapter(2, seed=0),
        folder,
        base="base",
        target_modules=model.target_modules,
        scaling=2.0,
        fan_in_fan_out=False,
    )
    finding = only(look(model={"base": "base", "adapter": str(folder)}), "first adapter", "failed")
    assert "set model.target_modules to the modules of the adapter" in f"{finding.value} {finding.way_out}"


def test_the_tiny_rounds_start_from_the_adapter_of_the_run(
    place: Path, look_at_all: Examine, monkeypatch: pytest.MonkeyPatch
):
    model = LoraModel(load_base("base"))
    started: list[float] = []
    drawn = model.initial_adapter(2, seed=0)
    known = {name: LoraPair(A, torch.full_like(B, 0.25)) for name, (A, B) in drawn.items()}
    export_adapter(
        known, place / "first", base="base", target_modules=model.target_modules, scaling=2.0, fan_in_fan_out=False
    )
    first_state = TinyFederation.first_state

    def seen(tiny: TinyFederation) -> ServerState:
        state = first_state(tiny)
        started.extend(float(B[:, 0].unique().item()) for _, B in state.adapter.values())
        return state

    monkeypatch.setattr(TinyFederation, "first_state", seen)
    diagnosis = look_at_all(model={"base": "base", "adapter": "first"})
    assert {finding.status for finding in diagnosis.findings} == {"ok"}
    assert started
    assert set(started) == {0.25}


def test_a_tracker_that_is_not_installed_is_found(look: Examine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    finding = only(look(tracking={"to": ["trackio"]}), "trackers", "failed")
    assert "pip install 'hetlora[trackio]'" in finding.value


@pytest.mark.parametrize("name", ["local", "central"])
def test_a_cohort_of_one_is_no_concern_where_nothing_is_averaged(name: str, look: Examine):
    federation = {"rounds": 2, "clients_per_round": 1}
    [finding] = look(federation=federation, method={"name": name}).of("cohort")
    assert finding.status == "ok"


def test_pruning_that_can_never_fire_is_found(look: Examine):
    method = {"name": "hetlora", "gamma": 0.5, "min_rank": 4}
    finding = only(look(method=method), "self-pruning", "warning")
    assert finding.value == "can never fire: no client of rank 2, 4 has a tail to cut"
    [can] = look(method=method | {"min_rank": 3}).of("self-pruning")
    assert (can.status, can.value) == ("ok", "a first prune cuts 4 to 3")


def test_a_server_that_does_nothing_is_found(look: Examine):
    finding = only(look(method={"name": "zeroshot"}), "server", "warning")
    assert "trains nobody" in finding.value
    slow = {"name": "adam", "learning_rate": 1e-9}
    assert only(look(server_optimizer=slow), "server", "warning").place == "server_optimizer.learning_rate"


def test_a_weight_that_dominates_is_found(place: Path, look_at_all: Examine):
    more = [
        {"device": CLIENTS[2], "question": f"what is {number}?", "answer": f"{number}", "split": "train"}
        for number in range(40)
    ]
    write_lines(place / "rows.jsonl", [*lines_of(place / "rows.jsonl"), *more])
    finding = only(look_at_all(method={"name": "rbla", "weights": "examples"}), "weights", "warning")
    assert finding.value.startswith("at most 85% of the average, 'tablet 1' in round ")
    bounded = look_at_all(method={"name": "rbla", "weights": "examples"}, robustness={"largest_share": 0.4})
    assert bounded.of("weights")[0].status == "ok"


# The method and the engine, in two tiny rounds ----------------------------------------------------------------------

RANKS = {"a": 4, "b": 2, "c": 2, "d": 4}


@pytest.fixture
def proved(tiny: str, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """Dry-run a method as if its factory were registered under the name of the method that it makes."""
    from hetlora.data import Tokenization
    from hetlora.data.templates import Row

    model = LoraModel(load_base(tiny))
    tokenization = Tokenization(tiny_tokenizer, 32)
    examples = {
        name: tokenization.examples([Row(f"{name} {number}", f"says {number * 7}") for number in range(3)])
        for name in RANKS
    }

    def call(make: Callable[..., Method[Any]], **sections: Any) -> Diagnosis:
        name = make().name
        monkeypatch.setitem(METHODS, name, make)
        config = parse_config(document("runs", method={"name": name}, **sections))
        notes, ranks = Diagnosis(), explicit_ranks(list(RANKS), RANKS, None)
        tiny_federation = TinyFederation.of(config, model, ranks, examples)
        check_rounds(notes, tiny_federation, ClientList(ranks, dict.fromkeys(RANKS, 10)))
        return notes

    return call


def planted(**parts: Any) -> Callable[[], Method[Any]]:
    """The factory of a method that averages as zeropad does, but for these parts; it does not say that it averages factors."""

    def make() -> Method[Any]:
        return replace(zeropad(), **{"name": "planted", "averages": "products", **parts})

    return make


def failed(notes: Diagnosis) -> list[str]:
    return [finding.check for finding in notes.findings if finding.status == "failed"]


def test_the_method_that_faults_are_planted_in_is_well(proved: Examine):
    assert {finding.status for finding in proved(planted()).findings} == {"ok"}


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean", "krum", "multi_krum"])
def test_bounds_on_influence_are_no_fault(proved: Examine, aggregation: str):
    notes = proved(planted(), robustness={"aggregation": aggregation})
    assert {finding.status for finding in notes.findings} == {"ok"}


def test_a_client_that_trains_from_something_else_than_it_was_sent_is_found(
    proved: Examine, monkeypatch: pytest.MonkeyPatch
):
    train = hetlora.training.simulation.train_clients

    def fresh(model, tasks, *others, **options):
        # As where the names of a state do not match, and are loaded without complaint: B begins at zero again.
        forgotten = [
            replace(task, adapter={name: LoraPair(A, 0.0 * B) for name, (A, B) in task.adapter.items()})
            for task in tasks
        ]
        return train(model, forgotten, *others, **options)

    monkeypatch.setattr(hetlora.training.simulation, "train_clients", fresh)
    notes = proved(planted())
    assert "sent is trained" in failed(notes)
    [finding] = [finding for finding in notes.findings if finding.check == "sent is trained"]
    assert finding.value.startswith("16 of 32 tensors bit-equal"), "A is what was sent"


def test_clients_that_are_given_each_others_tasks_are_found(proved: Examine, monkeypatch: pytest.MonkeyPatch):
    train = hetlora.training.simulation.train_clients

    def exchanged(model, tasks, *others, **options):
        turned = [replace(task, adapter=map_tensors(lambda factor: factor.flip(0), task.adapter)) for task in tasks]
        return train(model, turned, *others, **options)

    monkeypatch.setattr(hetlora.training.simulation, "train_clients", exchanged)
    assert "sent is trained" in failed(proved(planted()))


def test_frozen_factors_that_move_are_found(proved: Examine, monkeypatch: pytest.MonkeyPatch):
    train = hetlora.training.simulation.train_clients

    def thawed(*arguments, **options):
        return [
            replace(answer, adapter={name: LoraPair(A + 1e-6, B) for name, (A, B) in answer.adapter.items()})
            for answer in train(*arguments, **options)
        ]

    fine = proved(ffa_lora)
    assert failed(fine) == []
    assert "32 are as they were" in {finding.value for finding in fine.findings}
    monkeypatch.setattr(hetlora.training.simulation, "train_clients", thawed)
    notes = proved(ffa_lora)
    # The admission refuses them, and there is no round to look at; what is found says why.
    assert failed(notes) == ["updates", "sent is trained", "frozen factors"]
    assert "changed, though it is frozen" in notes.findings[0].value


def test_slots_that_die_are_found(proved: Examine):
    def finish(state, total):
        after = weighted_mean(state, total, "keep").adapter
        keep = torch.tensor([1.0, 1.0, 1.0, 0.0])
        return replace(state, adapter={m: LoraPair(A * keep[:, None], B * keep) for m, (A, B) in after.items()})

    notes = proved(planted(finish=finish))
    assert "live slots" in failed(notes)


def test_slots_that_die_where_no_client_owns_them_are_found(proved: Examine):
    notes = proved(lambda: zeropad(unowned="zero"), federation={"rounds": 50, "clients_per_round": 2})
    finding = only(notes, "live slots", "warning")
    assert "leaves 2, for good" in finding.value


def test_a_method_with_a_memory_of_its_own_is_found(proved: Examine):
    seen = []

    def finish(state, total):
        seen.append(total)
        after = weighted_mean(state, total, "keep")
        return replace(after, adapter=map_tensors(lambda factor: factor * (1 + 0.01 * len(seen)), after.adapter))

    assert "resuming" in failed(proved(planted(finish=finish)))


def test_clients_whose_training_breaks_down_are_found(proved: Examine):
    notes = proved(planted(), training={"steps": 2, "learning_rate": 1e38, "optimizer": "sgd"})
    assert "updates" in failed(notes)
    assert "training broke down" in notes.findings[0].value


def test_a_method_that_raises_fails_its_check_and_no_other(proved: Examine):
    def weigh(update):
        if update.examples == 1000:
            raise ZeroDivisionError("so many")
        return example_weight("examples")(update)

    notes = proved(planted(weigh=weigh))
    assert failed(notes) == ["weights"]
    assert "ZeroDivisionError: so many" in next(f.value for f in notes.findings if f.check == "weights")


# What is written of it ----------------------------------------------------------------------------------------------


def test_the_page_of_checks_has_every_check_with_its_cure():
    rows = re.findall(r"^\| (\w[\w -]+) \| .+ \| .+ \|$", (ROOT / "docs/doctor.md").read_text("utf8"), re.MULTILINE)
    assert [name for name in rows if name != "check"] == list(CHECKS)


def test_the_readme_names_the_command():
    assert "hetlora doctor" in (ROOT / "README.md").read_text("utf8")
