"""`hetlora run` as a command: its output and files, repeatability, and refusal of bad input."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pydantic_core import SchemaError
from safetensors.torch import load_file

import hetlora
from hetlora import cli
from hetlora.cli import main
from hetlora.config import load_config
from hetlora.methods import METHODS
from hetlora.methods.listing import GROUPS
from hetlora.runs.display import PlainDisplay, QuietDisplay
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.runs.records import RoundRecord, read_records
from hetlora.runs.result import Measurement
from processes import HANGS, started
from proofs.small_run import write_rows
from small_federations import PHONES, phones

pytestmark = pytest.mark.run

ROUNDS, COHORT = 3, 3
# Per slot and layer: q_proj [32, 32] has 32 + 32 numbers and v_proj [16, 32] has 32 + 16; two layers, float32.
BYTES_A_SLOT = 2 * ((32 + 32) + (32 + 16)) * 4
BY_MODULES = 'model.target_modules=["v_proj","q_proj","o_proj","k_proj","up_proj","gate_proj","down_proj"]'


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture
def place(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a small federation and the TOML file of a run."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", PHONES)
    text = phones(
        tiny,
        federation={"rounds": ROUNDS, "clients_per_round": COHORT},
        evaluation={"every": 1, "generate": 5, "max_new_tokens": 6},
    )
    (tmp_path / "run.toml").write_text(text, encoding="utf8")
    return tmp_path


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process with `--set` for each change."""

    def call(*changes: str, options: Sequence[str] = ("--json",)) -> Outcome:
        capsys.readouterr()
        changed = [part for change in changes for part in ("--set", change)]
        code = main(["run", str(place / "run.toml"), *options, *changed])
        return Outcome(code, *capsys.readouterr())

    return call


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# A run --------------------------------------------------------------------------------------------------------------


def test_json_is_one_object_with_the_result_and_nothing_else(run: Run):
    code, out, err = outcome = run()
    assert code == 0
    assert out.count("\n") == 1, "one line on standard output"
    result = outcome.json
    expected = "name base final rounds ranks prunes updates failures bytes_up bytes_down seconds peak_megabytes adapter"
    expected += " records interrupted"
    assert set(result) == set(expected.split())
    for measurement in (result["base"], result["final"]):
        assert measurement["perplexity"] > 1.0
        assert 0.0 <= measurement["rougeL"] <= 100.0
        assert set(measurement["tiers"]) == {"2", "4"}
        assert set(measurement["clients"]) == set(PHONES)
    assert result["final"]["perplexity"] < result["base"]["perplexity"], "it learns"
    assert result["rounds"] == ROUNDS
    assert result["interrupted"] is False
    assert result["ranks"].keys() == set(PHONES)
    assert result["seconds"] >= 0.0
    assert sorted(path.name for path in Path(result["adapter"]).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert "round 3/3" in err


def test_the_records_tell_the_run_each_round_and_both_measurements(run: Run):
    result = run().json
    records = read_records(Path(result["records"]))
    assert [record["kind"] for record in records] == ["run", "evaluation", *["round"] * ROUNDS, "evaluation"]
    first, base, *rounds, final = records
    assert (first["clients"], first["train_rows"], first["test_rows"]) == (4, 16, 8)
    assert (first["modules"], first["max_rank"]) == (4, 4)
    federation = {"rounds": 3, "clients_per_round": 3, "dropout": 0.0, "dropout_when": "before", "same_weights": True}
    assert first["config"]["federation"] == federation
    assert [record["round"] for record in rounds] == [1, 2, 3]
    for record in rounds:
        assert len(record["ranks"]) == COHORT
        assert sum(record["weights"].values()) == pytest.approx(1.0)
        assert record["failures"] == {}
    for record, measurement in ((base, result["base"]), (final, result["final"])):
        assert record["overall"]["perplexity"] == measurement["perplexity"]
        assert record["overall"]["rougeL"] == measurement["rougeL"]
        assert record["overall"]["generated"] == 5
        assert record["overall"]["tokens"] == sum(client["tokens"] for client in record["clients"].values())
    assert (base["round"], final["round"]) == (0, 3)
    assert rounds[-1]["perplexity"] == pytest.approx(result["final"]["perplexity"])


def test_bytes_are_those_of_the_factors_at_the_ranks_that_travelled(run: Run):
    result = run().json
    assert result["prunes"] > 0, "the run must prune, or both directions are alike"
    up = down = prunes = 0
    for record in read_records(Path(result["records"])):
        if record["kind"] == "round":
            received = record["ranks"]
            sent = {**received, **record["prunes"]}
            assert record["bytes_down"] == BYTES_A_SLOT * sum(received.values())
            assert record["bytes_up"] == BYTES_A_SLOT * sum(sent.values())
            up, down = up + record["bytes_up"], down + record["bytes_down"]
            prunes += len(record["prunes"])
    assert (result["bytes_up"], result["bytes_down"], result["prunes"]) == (up, down, prunes)
    assert up < down


def test_ranks_shares_and_prunes_fit_together(run: Run):
    """Two clients of four start at each rank; a rank changes by the prunes on record, and lasts."""
    result = run().json
    ranks: dict[str, int] = {}
    for record in read_records(Path(result["records"])):
        if record["kind"] == "round":
            for client, rank in record["ranks"].items():
                assert ranks.setdefault(client, rank) == rank
            assert record["prunes"].keys() <= record["ranks"].keys()
            ranks |= record["prunes"]
    assert ranks.items() <= result["ranks"].items()


def test_the_adapter_is_written_whole_in_float32(run: Run):
    tensors = load_file(Path(run().json["adapter"]) / "adapter_model.safetensors")
    assert len(tensors) == 8
    assert {tuple(tensor.shape) for name, tensor in tensors.items() if "q_proj.lora_A" in name} == {(4, 32)}
    assert {tuple(tensor.shape) for name, tensor in tensors.items() if "v_proj.lora_B" in name} == {(16, 4)}
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float32"}


def test_for_a_person_the_result_is_told_in_words(run: Run):
    code, out, err = run(options=[])
    assert code == 0
    assert "held-out perplexity" in out
    assert "tier of rank 4" in out
    assert "ROUGE-L" in out
    assert "expected:" in out
    assert "runs/phones/adapter" in out
    assert [line.split()[1] for line in err.splitlines() if line.startswith("round ")] == ["1/3", "2/3", "3/3"]


def test_quiet_shows_no_progress(run: Run):
    code, out, err = run(options=["--json", "--quiet"])
    assert code == 0
    assert err == ""
    assert json.loads(out)["rounds"] == ROUNDS


def test_without_generation_and_without_measurements_between_the_run_is_the_same(run: Run):
    whole = run().json
    lean = run("evaluation.generate=0", "evaluation.every=0").json
    assert files_of(Path(lean["adapter"])) == files_of(Path(whole["adapter"]))
    assert lean["final"]["rougeL"] is None
    assert lean["final"]["perplexity"] == whole["final"]["perplexity"]
    rounds = [record for record in read_records(Path(lean["records"])) if record["kind"] == "round"]
    *between, last = [record["perplexity"] for record in rounds]
    assert between == [None] * (ROUNDS - 1)
    assert last is not None, "the last round is measured as the result"


def test_clients_can_be_measured_under_what_they_receive(run: Run):
    keep_ranks = "method.gamma=1"  # so that the slots of the larger rank stay in use
    whole, received = run(keep_ranks).json, run(keep_ranks, "evaluation.adapter=received").json
    assert files_of(Path(received["adapter"])) == files_of(Path(whole["adapter"]))
    assert received["base"] == whole["base"]
    assert sorted(received["ranks"].values()) == [2, 2, 4, 4]
    for client, rank in received["ranks"].items():
        full, cut = (result["final"]["clients"][client]["perplexity"] for result in (whole, received))
        assert (cut == pytest.approx(full, rel=1e-6)) == (rank == 4), client


def test_fedavg_runs_with_one_rank_for_all(run: Run):
    result = run('method={name="fedavg"}', 'ranks={kind="same",rank=3}').json
    assert result["bytes_up"] == result["bytes_down"] == ROUNDS * COHORT * 3 * BYTES_A_SLOT
    assert set(result["ranks"].values()) == {3}


# What repeats -------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_adapter_bit_for_bit_and_another_does_not(run: Run):
    first, again, other = (files_of(Path(run(f"seed={seed}").json["adapter"])) for seed in (5, 5, 6))
    assert first == again
    assert first["adapter_model.safetensors"] != other["adapter_model.safetensors"]


def test_the_written_configuration_does_not_depend_on_the_process(run: Run):
    """A set written in the order of its hashes would differ from process to process; seven names show it."""
    written = json.loads((Path(run(BY_MODULES).json["adapter"]) / "adapter_config.json").read_text("utf8"))
    assert written["target_modules"] == sorted(written["target_modules"])
    assert len(written["target_modules"]) == 7


def test_a_second_run_of_the_same_name_writes_beside_the_first(run: Run, place: Path):
    first = run().json
    before = files_of(place / "runs" / "phones")
    second, third = run("seed=1").json, run("seed=2").json
    assert [Path(result["adapter"]).parent.name for result in (first, second, third)] == [
        "phones",
        "phones-2",
        "phones-3",
    ]
    assert files_of(place / "runs" / "phones") == before


def test_the_output_folder_and_the_name_say_where(run: Run, place: Path):
    result = run("output=elsewhere/deep", "name=mine").json
    assert (place / result["records"]).resolve() == (place / "elsewhere" / "deep" / "mine" / "records.jsonl").resolve()
    assert not (place / "runs").exists()


# Ctrl-C -------------------------------------------------------------------------------------------------------------


class InterruptedIn(QuietDisplay):
    """Presses Ctrl-C when a round ends."""

    def __init__(self, round_number: int) -> None:
        self.round_number = round_number
        self.ended = False
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def round_ended(self, record: RoundRecord) -> None:
        if record.round == self.round_number:
            raise KeyboardInterrupt

    def rounds_ended(self) -> None:
        self.ended = True


def test_ctrl_c_keeps_the_adapter_and_the_records_of_the_last_round(place: Path):
    display = InterruptedIn(2)
    config = load_config(place / "run.toml")
    result = LocalExperiment(config, display).run()
    assert result.interrupted
    assert result.rounds == 2
    assert result.final is None
    assert display.ended, "the bar is taken away"
    assert "interrupted" in display.said[-1]
    records = read_records(result.records)
    assert [record["kind"] for record in records] == ["run", "evaluation", "round", "round"]
    whole = LocalExperiment(load_config(place / "run.toml", ["federation.rounds=2"]), QuietDisplay()).run()
    assert files_of(result.adapter) == files_of(whole.adapter), "the adapter is that of a run of two rounds"
    assert result.summary()["final"] is None
    assert result.bytes_down == sum(record["bytes_down"] for record in records[2:])


def test_after_ctrl_c_the_command_prints_the_result_and_exits_with_130(run: Run, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PlainDisplay, "round_ended", stop)
    outcome = run()
    assert outcome.code == 130
    assert outcome.json["interrupted"] is True
    assert (outcome.json["rounds"], outcome.json["final"]) == (1, None)
    assert (Path(outcome.json["adapter"]) / "adapter_model.safetensors").is_file()
    result = run(options=[])
    assert result.code == 130
    assert "runs/phones-2/adapter" in result.out


def test_ctrl_c_while_the_result_is_measured_does_not_deny_the_adapter(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
):
    measure = LocalExperiment.measure

    def stop_at_the_end(self: LocalExperiment, state: Any, *, generate: bool = True) -> Measurement:
        if state is not None and generate:
            raise KeyboardInterrupt
        return measure(self, state, generate=generate)

    monkeypatch.setattr(LocalExperiment, "measure", stop_at_the_end)
    code, out, err = run()
    assert code == 130
    assert (place / "runs" / "phones" / "adapter" / "adapter_model.safetensors").is_file()
    assert "nothing to keep" not in err
    assert "runs/phones/adapter" in out + err


def test_ctrl_c_before_the_first_round_says_so(run: Run, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalExperiment, "measure", stop)
    code, out, err = run()
    assert code == 130
    assert out == ""
    assert "interrupted before there was a result" in err


def test_ctrl_c_in_a_commands_first_moment_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    assert main(["run", "run.toml"]) == 130
    assert "interrupted before there was a result" in capsys.readouterr().err


def test_a_real_interrupt_of_the_process_keeps_the_adapter(place: Path):
    command = [sys.executable, "-m", "hetlora.cli", "run", "run.toml", "--json", "--set", "federation.rounds=100000"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with started(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("round 1/"):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 130, "".join(lines) + err
    assert "Traceback" not in err
    result = json.loads(out)
    assert result["interrupted"] is True
    assert 1 <= result["rounds"] < 100000
    assert (place / result["adapter"] / "adapter_model.safetensors").is_file()
    kinds = [record["kind"] for record in read_records(place / result["records"])]
    assert kinds == ["run", "evaluation", *["round"] * result["rounds"]]


def test_without_the_repository_there_are_no_studies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "lib" / "hetlora" / "cli.py"))
    assert main(["reproduce"]) == 2
    assert "needs the studies, which are in the project's repository" in capsys.readouterr().err


# Bad input ----------------------------------------------------------------------------------------------------------


def refused(outcome: Outcome, place: Path, *said: str) -> str:
    """Check that the run was refused: exit code 2, one message that says these things, nothing written or printed."""
    code, out, err = outcome
    assert code == 2
    assert out == ""
    assert not (place / "runs").exists(), "nothing is written"
    assert "Traceback" not in err
    assert err.count("hetlora: ") == 1, "one message"
    message = err[err.index("hetlora: ") :]
    for part in said:
        assert part in message
    return message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["data.path=nowhere.jsonl"], ["'nowhere.jsonl'", "does not exist", "'stdlib'"]),
        (["data.target={text}"], ["rows.jsonl, line 1", "'text' is missing", "answer, device", "data.target"]),
        (["data.client_field=user"], ["rows.jsonl, line 1", "'user'", "device", "data.client_field"]),
        (["data.split_field=fold"], ["rows.jsonl, line 1", "'fold' is missing", "data.split_field"]),
        (["data.prompt={question"], ["'{question'", "{{ }}"]),
        (["data.clients=9"], ["9 clients", "4 of 4", "lower data.clients"]),
        (["federation.round=2"], ["federation.round is not a key", "did you mean 'rounds'"]),
        (["federation.rounds"], ["--set", "'federation.rounds'", "key.key=value"]),
        (["federation.clients_per_round=9"], ["clients_per_round = 9", "4 clients"]),
        (['ranks={kind="same",rank=0}'], ["ranks.rank = 0", "greater than 0"]),
        (['ranks={kind="uniform",min=8,max=2}'], ["min = 8", "max = 2", "exchange"]),
        (['ranks={kind="explicit",of={tv=3}}'], ["tv", "take them out"]),
        (['ranks={kind="explicit",of={phone-1=3}}'], ["phone-2", "ranks.default"]),
        (["method.min_rank=5"], ["min_rank = 5", "largest rank, 4"]),
        (['model.target_modules=["nope"]'], ["'nope'", "down_proj", "k_proj", "q_proj", "v_proj"]),
        (['model.target_modules=["norm"]'], ["'norm'", "q_proj"]),
        (["model.base=/no/such/folder"], ["'/no/such/folder'", "not a folder", "config.json", "'nano'"]),
        (["model.device=banana"], ["'banana'", "cpu"]),
        (["seed=-1", "name=a/b", "training.epochs=1"], ["3 problems", "seed = -1", "name = 'a/b'", "steps or epochs"]),
        # Longer than a sequence may be: no room is left for a prompt.
        (["evaluation.max_new_tokens=60"], ["max_new_tokens", "60", "max_length", "48"]),
        (['data.test=["train"]'], ["data.train", "data.test", "train"]),
    ],
    ids=lambda value: value[0] if "=" in value[0] else None,
)
def test_bad_input_is_refused_with_the_value_and_the_way_out(
    run: Run, place: Path, changes: list[str], said: list[str]
):
    refused(run(*changes), place, *said)


def test_a_missing_configuration_is_refused(run: Run, place: Path):
    (place / "run.toml").unlink()
    refused(run(), place, "run.toml", "no such file", "hetlora examples demo")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"device": "phone-1", "question": "x", "split": "train"}', ["'answer' is missing", "Mend the row"]),
        ('{"device": "phone-1", "quest', ["not JSON"]),
        ("[]", ["a list, not an object"]),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_with_file_and_line(run: Run, place: Path, line: str, said: list[str]):
    with (place / "rows.jsonl").open("a", encoding="utf8") as file:
        file.write(line + "\n")
    refused(run(), place, "rows.jsonl, line 25", *said)


@pytest.mark.parametrize("content", ['{"device": "é"}'.encode("latin-1"), b"\xff\xfe\x00"], ids=["Latin-1", "UTF-16"])
def test_a_data_file_that_is_not_text_is_refused(run: Run, place: Path, content: bytes):
    (place / "rows.jsonl").write_bytes(content)
    refused(run(), place, "rows.jsonl")


@pytest.fixture
def broken(tiny: str, place: Path) -> Path:
    """A copy of the tiny base, to be damaged."""
    return Path(shutil.copytree(tiny, place / "broken"))


def test_a_base_without_a_tokenizer_is_refused_and_can_borrow_one(run: Run, place: Path, broken: Path, tiny: str):
    for path in broken.glob("*token*"):
        path.unlink()
    refused(run(f"model.base={broken}"), place, str(broken), "no tokenizer", "save_pretrained", "model.tokenizer")
    assert run(f"model.base={broken}", f"model.tokenizer={tiny}", "federation.rounds=1").code == 0


def test_an_empty_folder_is_refused_as_a_base_and_not_only_for_its_tokenizer(run: Run, place: Path):
    """Whoever saved a tokenizer there, as the way out for a base that lacks one, would be refused again."""
    (place / "empty").mkdir()
    message = refused(run("model.base=./empty"), place, "'./empty'", "config.json", "model.safetensors")
    assert "has no tokenizer" not in message


def test_a_base_that_is_no_causal_language_model_is_refused(run: Run, place: Path, broken: Path):
    (broken / "config.json").write_text('{"model_type": "clip_vision_model"}', encoding="utf8")
    refused(run(f"model.base={broken}"), place, str(broken))


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 64], ids=["empty", "short", "long"])
def test_a_base_whose_weights_cannot_be_read_is_refused(run: Run, place: Path, broken: Path, content: bytes):
    (broken / "model.safetensors").write_bytes(content)
    refused(run(f"model.base={broken}"), place, str(broken))


def test_an_output_that_cannot_be_a_folder_is_refused(run: Run, place: Path):
    refused(run("output=rows.jsonl"), place, "output", "rows.jsonl")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["rnu"], "'rnu' is none of demo, .*methods; did you mean 'run'\\?\nhetlora --help"),
        (["flower", "nwe"], "hetlora flower: 'nwe' is none of .*did you mean 'new'"),
        (["run"], "hetlora run: the following arguments are required: CONFIG\nhetlora run --help says what there is"),
        (["run", "run.toml", "--no-such-option"], "hetlora run: .*--no-such-option\nhetlora run --help"),
        (["methods", "hetlora"], "hetlora methods: unrecognized arguments: hetlora\nhetlora methods --help"),
        (["demo", "--rounds", "2"], r"did you mean --set federation\.rounds=2\?"),
        (["run", "x.toml", "--learning-rate=2"], r"did you mean --set training\.learning_rate=2\?"),
        (["new", "mine.toml", "rows.csv"], r"give rows as --data rows\.csv"),
        (
            ["export", "runs/x", "--dtype", "float8"],
            "hetlora export: --dtype: 'float8' is none of float32, bfloat16, float16",
        ),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_the_way_out(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert re.search(reason, shown)
    assert len(shown.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["help", "run"], "usage: hetlora run"),
        (["help"], "usage: hetlora "),
        (["version"], "hetlora "),
        (["-V"], "hetlora "),
    ],
)
def test_help_and_version_are_found_by_other_names(
    arguments: list[str], shown: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(shown)


def test_changes_of_the_demonstration_are_refused_without_the_path_of_its_file(capsys: pytest.CaptureFixture[str]):
    assert main(["demo", "--set", "federation.rounds=0"]) == 2
    assert capsys.readouterr().err.startswith(
        "hetlora: the demonstration with --set has 1 problem:\n  federation.rounds"
    )


def test_rows_are_not_the_file_that_new_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = tmp_path / "rows.csv"
    rows.write_text("a,b\n")
    assert main(["new", str(rows)]) == 2
    assert f"hetlora new mine.toml --data {rows}" in capsys.readouterr().err


def test_a_command_on_a_folder_of_runs_names_the_runs(place: Path, capsys: pytest.CaptureFixture[str]):
    run = place.relative_to(Path.cwd()) / "cmp/runs/a"
    run.mkdir(parents=True)
    (run / "records.jsonl").touch()
    for command in (["resume"], ["export"], ["generate", "--prompt", "x"]):
        assert main([*command, "cmp"]) == 2
        said = (
            "'cmp' is no run, for it has no config.json; give the folder of a run, which is where its records.jsonl is"
        )
        assert capsys.readouterr().err == f"hetlora: {said}; runs within are {run}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
@pytest.mark.process
def test_standard_output_that_takes_nothing_more_is_said():
    command = [sys.executable, "-m", "hetlora", "methods"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "hetlora: standard output cannot be written: No space left on device\n",
    )


@pytest.mark.process
def test_a_shell_completes_commands_and_options(place: Path):
    """As argcomplete's shell function asks."""
    code = "import os, sys; sys.argv = ['hetlora']; import hetlora.cli; hetlora.cli.main()"
    for line, wanted in (("hetlora me", "methods"), ("hetlora plan --ti", "--time")):
        asked = {
            "_ARGCOMPLETE": "1",
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
            "_ARGCOMPLETE_STDOUT_FILENAME": "said",
        }
        subprocess.run([sys.executable, "-c", code], cwd=place, env={**os.environ, **asked}, check=True)
        assert wanted in (place / "said").read_text("utf8")


def test_methods_stand_in_groups_and_each_in_one(capsys: pytest.CaptureFixture[str]):
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert sorted(re.findall(r"^  ([a-z_]+) ", shown, flags=re.MULTILINE)) == sorted(METHODS)
    assert "HomLoRA" in shown.partition("\n")[0]
    assert max(map(len, shown.splitlines())) <= 80
    assert re.findall(r"^  ([a-z_]+) ", shown, flags=re.MULTILINE) == [name for own in GROUPS.values() for name in own]


# What is loaded -----------------------------------------------------------------------------------------------------


def loaded_by(statement: str) -> set[str]:
    """Return the heavy packages that a fresh process has loaded after a statement."""
    heavy = ("torch", "transformers", "peft", "flwr", "numpy", "pydantic")
    code = f"import sys\n{statement}\nprint('loaded', *(name for name in {heavy!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANGS)
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_help_loads_neither_torch_nor_transformers():
    for arguments in (["--help"], ["run", "--help"]):
        statement = (
            f"from hetlora.cli import main\ntry: main({arguments!r})\nexcept SystemExit as end: assert not end.code"
        )
        assert loaded_by(statement) == set()


def test_importing_the_package_loads_nothing_heavy():
    assert not loaded_by("import hetlora") & {"transformers", "peft", "flwr"}


def test_checking_a_configuration_loads_neither_transformers_nor_peft():
    assert not loaded_by("import hetlora.config") & {"transformers", "peft", "flwr"}


def test_the_installed_command_shows_its_help():
    command = shutil.which("hetlora", path=str(Path(sys.executable).parent))
    assert command, "the package is installed with its command"
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True, timeout=HANGS)
    assert done.stdout.startswith("usage: hetlora")
    assert "run" in done.stdout
    assert done.stderr == ""


def test_a_reader_that_has_had_enough_is_no_traceback():
    command = [sys.executable, "-m", "hetlora.cli", "methods", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(HANGS) == 141


@pytest.mark.parametrize("shell", ["{} methods >&-", "{} --version >&-", "{} methods >&- 2>&-", "{} run --help | true"])
def test_a_closed_output_is_no_traceback(shell: str):
    command = shell.format(f"{sys.executable} -m hetlora")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=HANGS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["output", "locale"],
)
def test_an_output_of_ascii_is_readable(tmp_path: Path, environment: dict[str, str]):
    place = tmp_path / "wörter … ‖"
    program = f"import sys; from hetlora.cli import main; sys.exit(main(['run', {str(place)!a}]))"
    other = {name: value for name, value in os.environ.items() if name not in ("LC_ALL", "LANG", "LC_CTYPE")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, timeout=HANGS, env={**other, **environment}
    )
    assert done.returncode == 2
    assert rb"w\xf6rter ... ||" in done.stderr
    told = f"import sys; from hetlora.cli import _make_writable; _make_writable(); print({'Σ ‖ΔW‖ — 3 ≤ 4 … 本'!a})"
    done = subprocess.run(
        [sys.executable, "-c", told], capture_output=True, timeout=HANGS, env={**other, **environment}
    )
    assert (done.stdout.strip(), done.stderr) == (rb"Sum ||DeltaW|| - 3 <= 4 ... \u672c", b"")


def test_the_package_is_its_command():
    done = subprocess.run([sys.executable, "-m", "hetlora", "--version"], capture_output=True, text=True, timeout=HANGS)
    assert (done.returncode, done.stdout) == (0, f"hetlora {hetlora.__version__}\n")


def test_ctrl_c_while_the_configuration_is_imported_is_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pydantic's core makes it an error of its own there; `make prove-resume` came upon it."""

    def interrupted(*_: Any) -> Any:
        raise SchemaError('Error building "tagged-union" validator:\n  KeyboardInterrupt: ')

    monkeypatch.setattr("hetlora.cli._methods", interrupted)
    assert main(["methods"]) == 130
    assert capsys.readouterr().err == "hetlora: interrupted before there was a result\n"
