"""Regressions: bases that do not fit, names, interrupts, rounds without updates, dead slots, left-out rows."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from hetlora.cli import main
from hetlora.config import RunConfig, load_config, parse_config
from hetlora.core.adapter import truncate
from hetlora.core.sampling import sample_cohort
from hetlora.core.types import ClientFailure
from hetlora.errors import HetLoraError, ModelError
from hetlora.model.lora_model import LoraModel, load_base, load_tokenizer
from hetlora.runs.display import QuietDisplay
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.runs.records import Records, RoundRecord, read_records
from hetlora.runs.result import Measurement
from hetlora.training.local import LocalTraining
from hetlora.training.simulation import SimulationEngine
from processes import HANGS
from proofs.inputs import within
from proofs.small_run import rows_of
from small_federations import PHONES, phones
from small_models import losses_of

pytestmark = pytest.mark.run

ROUNDS, COHORT = 2, 3
# One slot of one module of the tiny base, A and B in float32: q_proj is [32, 32], v_proj [16, 32].
BYTES_OF_A_SLOT = {"q_proj": (32 + 32) * 4, "v_proj": (32 + 16) * 4}


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)

    @property
    def records(self) -> list[dict[str, Any]]:
        return read_records(Path(self.json["records"]))

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == "round"]

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        return load_file(Path(self.json["adapter"]) / "adapter_model.safetensors")


Run = Callable[..., Outcome]


def write_rows(rows: Sequence[dict[str, Any]], *, ascii_only: bool = True) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    Path("rows.jsonl").write_text(lines, encoding="utf8")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a small federation and the TOML file of a run."""
    monkeypatch.chdir(tmp_path)
    write_rows(rows_of(PHONES))
    Path("run.toml").write_text(phones(tiny), encoding="utf8")
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process with `--set` for each change."""

    def call(*changes: str, options: Sequence[str] = ("--json",)) -> Outcome:
        capsys.readouterr()
        changed = [part for change in changes for part in ("--set", change)]
        code = main(["run", "run.toml", *options, *changed])
        return Outcome(code, *capsys.readouterr())

    return call


def config_of(*changes: str) -> RunConfig:
    return load_config(Path("run.toml"), changes)


def refused(outcome: Outcome, *said: str) -> str:
    """Check that the run was refused: exit code 2, one message that says these things, nothing written or printed."""
    code, out, err = outcome
    assert code == 2
    assert out == ""
    assert not Path("runs").exists(), "nothing is written"
    assert err.count("hetlora: ") == 1, "one message"
    message = err[err.index("hetlora: ") :]
    for part in said:
        assert part in message
    return message


# Bases that do not fit ----------------------------------------------------------------------------------------------


def copy_without(tiny: str, *parts: str) -> tuple[str, list[str]]:
    """Copy the tiny base without the tensors whose name has one of these parts; return the folder and their names."""
    folder = Path(shutil.copytree(tiny, "damaged"))
    tensors = load_file(folder / "model.safetensors")
    gone = sorted(name for name in tensors if any(part in name for part in parts))
    assert gone
    kept = {name: tensor for name, tensor in tensors.items() if name not in gone}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder), gone


@pytest.mark.parametrize("part", ["layers.1.", "lm_head", "layers.0.self_attn.q_proj", "embed_tokens"])
def test_a_checkpoint_that_lacks_weights_is_refused_with_how_many_and_which(tiny: str, part: str):
    folder, gone = copy_without(tiny, part)
    with pytest.raises(ModelError) as caught:
        load_base(folder)
    message = str(caught.value)
    assert f"{folder!r} lacks {len(gone)} of its weights" in message
    assert all(name in message for name in gone[:3])
    assert ("..." in message) == (len(gone) > 3)


def test_a_run_on_a_checkpoint_that_lacks_weights_is_refused(run: Run, tiny: str):
    folder, _ = copy_without(tiny, "mlp.up_proj")
    refused(run(f"model.base={folder}"), "lacks 2 of its weights", "layers.0.mlp.up_proj", "layers.1.mlp.up_proj")


def test_a_tied_checkpoint_stores_no_output_layer_and_is_accepted(tiny: str):
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(tiny)
    config.tie_word_embeddings = True
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained("tied")
    assert not any("lm_head" in name for name in load_file("tied/model.safetensors"))
    base = load_base("tied")
    assert torch.equal(base.get_output_embeddings().weight, base.get_input_embeddings().weight)


@pytest.fixture
def bert(tiny: str) -> str:
    """A base that loads as a causal language model and sees the future."""
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=258,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=512,
        initializer_range=0.3,
        is_decoder=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertLMHeadModel(config).save_pretrained("bert")
    load_tokenizer(tiny).save_pretrained("bert")
    return "bert"


def test_a_base_that_sees_the_future_is_refused(run: Run, bert: str):
    modules = 'model.target_modules=["query","value"]'
    with pytest.raises(ModelError, match=r"'bert' is not causal"):
        LocalExperiment(config_of(f"model.base={bert}", modules), QuietDisplay())
    refused(run(f"model.base={bert}", modules), "'bert'", "not causal")


def test_the_same_base_as_a_decoder_is_accepted(bert: str):
    """The refusal is for what the base computes, not for its name."""
    file = Path(bert) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf8")), "is_decoder": True}), encoding="utf8")
    config = config_of(f"model.base={bert}", 'model.target_modules=["query","value"]')
    assert len(LocalExperiment(config, QuietDisplay()).model.layers) == 4


def test_sequences_longer_than_the_base_takes_are_refused_with_both_numbers(run: Run):
    refused(run("data.max_length=513"), "data.max_length = 513", "512")
    LocalExperiment(config_of("data.max_length=512"), QuietDisplay())


def test_a_tokenizer_with_more_tokens_than_the_base_knows_is_refused_with_both_numbers(run: Run, tiny: str):
    tokenizer = load_tokenizer(tiny)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained("wide")
    shutil.copy(Path(tiny) / "config.json", "wide")
    refused(run("model.tokenizer=./wide"), "'./wide' has 260 tokens", "knows 258", "model.tokenizer")


# Names --------------------------------------------------------------------------------------------------------------

ODD = "a\u2028b\u0085c\nd"


def test_a_name_with_separators_of_lines_comes_back_from_the_records(tmp_path: Path):
    record = RoundRecord(
        round=1,
        loss=1.0,
        perplexity=None,
        ranks={ODD: 2},
        weights={ODD: 1.0},
        prunes={ODD: {ODD: 1}},
        failures={ODD: f"said {ODD}\r\n"},
        bytes_up=1,
        bytes_down=1,
        live_slots=2,
        seconds=0.0,
        clients={},
    )
    records = Records(tmp_path / "odd.jsonl")
    records.append(record)
    records.append(record)
    assert read_records(records.path) == [vars(record)] * 2


@pytest.mark.parametrize("ascii_only", [True, False], ids=["escaped", "as it is"])
def test_a_run_with_such_a_client_prints_one_line_of_ascii(run: Run, *, ascii_only: bool):
    write_rows(rows_of((ODD, *PHONES[1:])), ascii_only=ascii_only)
    outcome = run("federation.clients_per_round=4", "federation.rounds=1")
    assert outcome.code == 0
    assert outcome.out.isascii()
    assert len(outcome.out.splitlines()) == 1
    assert outcome.json["ranks"].keys() == outcome.rounds[0]["ranks"].keys() == {ODD, *PHONES[1:]}


# Ctrl-C -------------------------------------------------------------------------------------------------------------


def test_ctrl_c_while_a_finished_round_is_measured_keeps_the_round(monkeypatch: pytest.MonkeyPatch):
    measure = LocalExperiment.measure

    def stop_after_round_2(self: LocalExperiment, state: Any, *, generate: bool = True) -> Measurement:
        if state is not None and state.round == 2:
            raise KeyboardInterrupt
        return measure(self, state, generate=generate)

    expected = LocalExperiment(config_of("federation.rounds=2"), QuietDisplay()).run()
    monkeypatch.setattr(LocalExperiment, "measure", stop_after_round_2)
    result = LocalExperiment(config_of("federation.rounds=4", "evaluation.every=1"), QuietDisplay()).run()
    assert (result.interrupted, result.rounds, result.final) == (True, 2, None)
    records = read_records(result.records)
    assert [record["kind"] for record in records] == ["run", "evaluation", "round", "round"]
    assert [record["round"] for record in records[2:]] == [1, 2]
    assert records[2]["perplexity"] is not None
    assert records[3]["perplexity"] is None, "what was interrupted is not there"
    assert result.bytes_down == sum(record["bytes_down"] for record in records[2:])
    assert result.bytes_up == sum(record["bytes_up"] for record in records[2:])
    name = "adapter_model.safetensors"
    assert (result.adapter / name).read_bytes() == (expected.adapter / name).read_bytes(), "the adapter of round 2"


# --set --------------------------------------------------------------------------------------------------------------


def test_set_takes_a_key_away(run: Run):
    config = config_of("training.steps=", "training.epochs=1")
    assert (config.training.steps, config.training.epochs) == (None, 1)
    assert config_of("training.epochs=1", "training.steps= ") == config
    assert config_of("evaluation=").evaluation.every == 1, "a whole section, back to its defaults"
    assert config_of("training.epochs=") == config_of(), "what is not there need not be taken away"
    refused(run("training.no_such_key="), "training.no_such_key is not a key")
    outcome = run("training.steps=", "training.epochs=1", "federation.rounds=1")
    assert outcome.code == 0
    assert outcome.records[0]["config"]["training"]["epochs"] == 1


def test_a_required_key_that_is_taken_away_is_missing(run: Run):
    refused(run("data.target="), "data.target is missing")
    assert config_of("training.steps=").training.steps == 4, "the usual number"


def test_a_quoted_key_names_a_client_with_a_dot(run: Run):
    write_rows(rows_of(("a.b", *PHONES[1:])))
    outcome = run('ranks={kind="explicit",default=2}', 'ranks.of."a.b"=3', "ranks.of.phone-2=4", "method.gamma=1.0")
    assert outcome.code == 0
    assert outcome.json["ranks"] == {"a.b": 3, "phone-2": 4, "tablet-1": 2, "tablet-2": 2}


@pytest.mark.parametrize("change", ["seed=1\nthreads=2", "seed=1\nmodel.base='x'", "seed\n=1", "a=1\nseed=1"])
def test_a_change_of_two_lines_is_refused(run: Run, change: str):
    refused(run(change), "--set has 1 problem", repr(change))


# Zero and empty say "none" ------------------------------------------------------------------------------------------


def test_without_a_split_field_rows_are_held_out_by_their_hash(run: Run):
    rows = [{key: value for key, value in row.items() if key != "split"} for row in rows_of(PHONES, 12)]
    write_rows(rows)
    changes = ("data.split_field=", 'data.split_field=""', "data.test_share=0.5", "federation.rounds=1")
    outcome = run(*changes)
    assert outcome.code == 0, outcome.err
    first = outcome.records[0]
    assert first["clients"] == len(PHONES)
    assert first["train_rows"] + first["test_rows"] == len(rows)
    assert min(first["train_rows"], first["test_rows"]) >= len(PHONES), "no client without either side takes part"
    assert outcome.json["final"]["perplexity"] is not None
    random.Random(0).shuffle(rows)
    write_rows(rows)
    again = run(*changes).records[0]
    assert (again["train_rows"], again["test_rows"]) == (first["train_rows"], first["test_rows"])


def test_a_clip_norm_of_zero_clips_nothing():
    def adapter_of(experiment: LocalExperiment) -> bytes:
        return (experiment.run().adapter / "adapter_model.safetensors").read_bytes()

    zero, small, none = (
        LocalExperiment(config_of(f"training.clip_norm={norm}", "training.optimizer=sgd"), QuietDisplay())
        for norm in (0, 0.01, 0.01)
    )
    unclipped = LocalTraining(learning_rate=1e-2, batch_size=2, steps=3, optimizer="sgd", clip_norm=None)
    none.engine = SimulationEngine(none.model, none.data, unclipped, seed=0)
    none.training = unclipped  # else its updates go further than a clipped client can, and are refused
    without = adapter_of(zero)
    assert without == adapter_of(none)
    assert without != adapter_of(small), "at this size clipping shows"


# Places that cannot be written --------------------------------------------------------------------------------------


def test_links_that_lead_nowhere_are_refused_and_not_tried_for_ever(capsys: pytest.CaptureFixture[str]):
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    Path("taken").mkdir()
    (Path("taken") / "phones").symlink_to("nowhere")
    before = sorted(Path().rglob("*"))
    with within(HANGS):
        for output in ("dangling", "loop", "taken"):
            assert main(["run", "run.toml", "--quiet", "--set", "threads=1", "--set", f"output={output}"]) == 2
    err = capsys.readouterr().err
    assert err.count("hetlora: cannot write to ") == 3
    assert "Traceback" not in err
    assert sorted(Path().rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("rows.jsonl", "rows.jsonl"),
        ("rows.jsonl/below/it", "rows.jsonl"),
        (r'"a\u0000b"', "null byte"),
        ("~no-such-user-here/runs", "no-such-user-here"),
    ],
    ids=["a file", "below a file", "a NUL byte", "the home of nobody"],
)
def test_an_output_that_can_be_no_folder_is_refused(run: Run, output: str, said: str):
    before = sorted(Path().rglob("*"))
    refused(run(f"output={output}"), "cannot write to", said, "set output to a folder you own")
    assert sorted(Path().rglob("*")) == before


def test_a_place_that_may_not_be_written_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch):
    def forbid(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", forbid)  # an administrator may write anywhere, so no mode of a folder would do
    refused(run(), "cannot write to 'runs'", "Permission denied", "set output to a folder you own")
    with pytest.raises(HetLoraError, match="Permission denied"):
        LocalExperiment(config_of(), QuietDisplay()).run()


# Runs in which nobody learns ----------------------------------------------------------------------------------------


def check_that_nobody_learned(outcome: Outcome, model: LoraModel, reason: str) -> None:
    assert outcome.code == 1
    assert "hetlora: no client ever gave an update" in outcome.err
    assert outcome.json["interrupted"] is False
    assert (outcome.json["updates"], outcome.json["failures"]) == (0, ROUNDS * COHORT)
    assert (outcome.json["bytes_up"], outcome.json["prunes"]) == (0, 0)
    assert outcome.json["bytes_down"] > 0
    assert outcome.json["final"]["perplexity"] == pytest.approx(outcome.json["base"]["perplexity"])
    assert len(outcome.rounds) == ROUNDS
    for record in outcome.rounds:
        assert record["loss"] is None
        assert record["weights"] == {}
        assert record["failures"].keys() == record["ranks"].keys()
        assert all(reason in said for said in record["failures"].values())
    fresh = {
        f"base_model.model.{module}.lora_{letter}.weight": factor
        for module, pair in model.initial_adapter(4, seed=0).items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    written = outcome.adapter
    assert written.keys() == fresh.keys()
    assert all(torch.equal(written[name], factor) for name, factor in fresh.items()), "the adapter is as it began"


def test_a_run_whose_every_training_breaks_down_exits_with_1_and_says_so(run: Run, tiny_model: LoraModel):
    outcome = run("training.learning_rate=1e35", "training.optimizer=sgd", "training.clip_norm=0")
    check_that_nobody_learned(outcome, tiny_model, "training broke down: loss ")


def test_a_run_in_which_every_client_fails_exits_with_1_and_says_so(
    run: Run, tiny_model: LoraModel, monkeypatch: pytest.MonkeyPatch
):
    def fail(_: object, tasks: Sequence[Any], __: object) -> Iterator[ClientFailure]:
        return (ClientFailure(task.client, "its battery is flat") for task in tasks)

    monkeypatch.setattr(SimulationEngine, "train", fail)
    check_that_nobody_learned(run(), tiny_model, "its battery is flat")
    result = run(options=[])
    assert result.code == 1
    assert result.out == "", "no scores and no adapter that nobody has trained"
    assert "self-pruning never fired" not in result.err
    assert re.search(
        r"no client ever gave an update; the first failure \(.*\): its battery is flat; all are", result.err
    )
    assert "no update" in result.err, "each round says so, too"
    assert "its battery is flat" in result.err
    quiet = run(options=["--json", "--quiet"])
    assert (quiet.code, quiet.err.count("\n")) == (1, 1)


def test_a_run_in_which_some_clients_fail_counts_them_and_succeeds(run: Run, monkeypatch: pytest.MonkeyPatch):
    train = SimulationEngine.train

    def fail_one(self: SimulationEngine, tasks: Sequence[Any], method: Any) -> Iterator[Any]:
        yield ClientFailure(tasks[0].client, "its battery is flat")
        yield from train(self, tasks[1:], method)

    monkeypatch.setattr(SimulationEngine, "train", fail_one)
    outcome = run()
    assert outcome.code == 0
    assert (outcome.json["updates"], outcome.json["failures"]) == (ROUNDS * (COHORT - 1), ROUNDS)
    assert [list(record["failures"].values()) for record in outcome.rounds] == [["its battery is flat"]] * ROUNDS


# Local training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "either steps or epochs"),
        ({"steps": 1, "epochs": 1}, "either steps or epochs"),
        ({"steps": 1, "optimizer": "adam"}, "optimizer='adam'"),
        ({"steps": 0}, "steps=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"steps": -1}, "steps=-1"),
        ({"steps": 1, "batch_size": 0}, "batch_size=0"),
        ({"steps": 1, "learning_rate": 0.0}, r"learning_rate=0\.0"),
        ({"steps": 1, "learning_rate": -1e-3}, r"learning_rate=-0\.001"),
        ({"steps": 1, "learning_rate": float("nan")}, "learning_rate=nan"),
        ({"steps": 1, "clip_norm": 0.0}, r"clip_norm=0\.0"),
        ({"steps": 1, "clip_norm": -1.0}, r"clip_norm=-1\.0"),
    ],
    ids=str,
)
def test_local_training_refuses_what_it_cannot_do(arguments: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        LocalTraining(**arguments)


def test_local_training_takes_either_steps_or_epochs_and_no_clipping():
    assert LocalTraining(steps=3, clip_norm=None).count(20) == 3
    assert LocalTraining(epochs=2, batch_size=8).count(20) == 6


# A rank for every module --------------------------------------------------------------------------------------------


def bytes_at(rank: int | dict[str, int], modules: Sequence[str]) -> int:
    """Return what an adapter of this rank weighs."""
    ranks = rank if isinstance(rank, dict) else dict.fromkeys(modules, rank)
    return sum(count * BYTES_OF_A_SLOT[module.rpartition(".")[2]] for module, count in ranks.items())


PER_MODULE = ("method.per_module=true", "method.gamma=0.5", "method.penalty=0.5", "federation.rounds=6")


def test_every_module_prunes_on_its_own_and_the_next_round_distributes_what_is_left(run: Run, tiny_model: LoraModel):
    modules = list(tiny_model.shapes)
    outcome = run(*PER_MODULE)
    assert outcome.code == 0, outcome.err
    now: dict[str, int | dict[str, int]] = {}
    cut_in_part, came_back = set(), set()
    absent: set[str] = set()
    for record in outcome.rounds:
        for client, rank in record["ranks"].items():
            assert now.setdefault(client, rank) == rank, "it receives the ranks it had kept, present or absent"
            if client in absent:
                came_back.add(client)
        assert record["bytes_down"] == sum(bytes_at(rank, modules) for rank in record["ranks"].values())
        for client, rank in record["prunes"].items():
            before = now[client] if isinstance(now[client], dict) else dict.fromkeys(modules, now[client])
            assert rank.keys() == set(modules)
            assert all(1 <= rank[module] <= before[module] for module in modules)
            kept = [module for module in modules if rank[module] == before[module]]
            assert len(kept) < len(modules), "whoever pruned cut something"
            if kept:
                cut_in_part.add(client)
        sent = {**record["ranks"], **record["prunes"]}
        assert record["bytes_up"] == sum(bytes_at(rank, modules) for rank in sent.values())
        now |= record["prunes"]
        absent = {client for client, rank in now.items() if isinstance(rank, dict)} - record["ranks"].keys()
    assert cut_in_part, "one module prunes while another does not"
    assert came_back, "a client with ranks of its own stays away for a round and comes back"
    assert outcome.json["ranks"] == now
    assert any(isinstance(rank, dict) for rank in outcome.json["ranks"].values())


def test_what_a_module_cut_is_not_sent_again(run: Run, tiny_model: LoraModel):
    modules = list(tiny_model.shapes)
    outcome = run(*PER_MODULE, "federation.clients_per_round=4")
    assert outcome.json["prunes"] > 0
    for record, following in itertools.pairwise(outcome.rounds):
        cut = sum(
            bytes_at(record["ranks"][client], modules) - bytes_at(rank, modules)
            for client, rank in record["prunes"].items()
        )
        assert (cut > 0) == bool(record["prunes"])
        assert following["bytes_down"] == record["bytes_down"] - cut


def test_clients_with_a_rank_a_module_are_measured_under_what_they_receive(run: Run):
    whole, received = run(*PER_MODULE), run(*PER_MODULE, "evaluation.adapter=received", "evaluation.every=1")
    assert received.code == 0, received.err
    assert received.adapter.keys() == whole.adapter.keys()
    assert all(torch.equal(received.adapter[name], tensor) for name, tensor in whole.adapter.items())
    assert received.json["ranks"] == whole.json["ranks"]
    for client, rank in received.json["ranks"].items():
        full, cut = (outcome.json["final"]["clients"][client]["perplexity"] for outcome in (whole, received))
        assert cut is not None
        if isinstance(rank, dict):
            assert cut != pytest.approx(full, rel=1e-9), client
    result = run(*PER_MODULE, options=[])
    assert result.code == 0
    assert "clients by rank now" in result.out
    assert "mixed" in result.err


# Devices ------------------------------------------------------------------------------------------------------------


def test_factors_move_to_the_device_of_the_base(tiny_model: LoraModel, monkeypatch: pytest.MonkeyPatch):
    adapter = tiny_model.initial_adapter(2, seed=0)
    monkeypatch.setattr(LoraModel, "device", property(lambda _: torch.device("meta")))
    tiny_model.use(adapter)
    for layer in tiny_model.layers.values():
        assert layer.pair is not None
        assert {factor.device.type for factor in layer.pair} == {"meta"}
        assert layer.pair.A.ndim == layer.pair.B.ndim == 3
    assert {factor.device.type for pair in adapter.values() for factor in pair} == {"cpu"}, "the caller's stay"


@pytest.mark.parametrize("groups", [0, 1, 2], ids=["one client", "a batch of one", "a batch of two"])
def test_on_the_same_device_gradients_reach_the_callers_factors(tiny_model: LoraModel, groups: int):
    pairs = truncate(tiny_model.initial_adapter(4, seed=0), 2)
    leaves = {
        name: type(pair)(*(torch.stack([factor] * groups) if groups else factor.clone() for factor in pair))
        for name, pair in pairs.items()
    }
    for pair in leaves.values():
        pair.B.fill_(0.01)
        for factor in pair:
            factor.requires_grad_()
    tiny_model.use(leaves)
    for name, pair in leaves.items():
        used = tiny_model.layers[name].pair
        assert used is not None
        assert used.A.data_ptr() == pair.A.data_ptr(), "no copy is made"
    ids = torch.arange(2, 18).view(2, 8)
    losses_of(tiny_model, ids, max(1, groups)).sum().backward()
    for pair in leaves.values():
        for factor in pair:
            assert factor.is_leaf
            assert factor.grad is not None
            assert float(factor.grad.norm()) > 0.0


# Slots that nobody trains -------------------------------------------------------------------------------------------


def seed_by_cohorts(*wanted: str) -> int:
    """Return a seed by which these clients are drawn, one a round."""
    return next(
        seed
        for seed in range(10_000)
        if all(sample_cohort(PHONES, 1, number, seed) == [client] for number, client in enumerate(wanted))
    )


@pytest.mark.parametrize(
    ("unowned", "live"), [("zero", [2, 2]), ("keep", [4, 4]), (None, [4, 4])], ids=["zero", "keep", "default"]
)
def test_slots_beyond_the_cohort_die_only_where_asked_for_and_then_it_is_said(
    run: Run, unowned: str | None, live: list[int]
):
    changes = [
        'ranks={kind="explicit",default=2,of={tablet-1=4}}',
        f"seed={seed_by_cohorts('phone-1', 'tablet-1')}",
        "federation.clients_per_round=1",
        "method.gamma=1.0",
        *([f"method.unowned={unowned}"] if unowned else []),
    ]
    outcome = run(*changes)
    assert outcome.code == 0, outcome.err
    assert [list(record["ranks"].items()) for record in outcome.rounds] == [[("phone-1", 2)], [("tablet-1", 4)]]
    assert [record["live_slots"] for record in outcome.rounds] == live
    lines = [line for line in outcome.err.splitlines() if line.startswith("round ")]
    assert ["slots live" in line for line in lines] == [False, unowned == "zero"], "said to whoever had more"
    assert ("only 2 slots live" in lines[1]) == (unowned == "zero")


# Values out of range ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["{answer:d}", "{answer!r}", "{answer:>9}", "{answer!s:x}"])
@pytest.mark.parametrize("side", ["prompt", "target"])
def test_a_template_with_a_format_is_refused(run: Run, side: str, field: str):
    refused(run(f'data.{side}="{field}"'), "template", "{answer}", "format", "{{ }}")


@pytest.mark.parametrize("key", ["device", "question", "answer"])
@pytest.mark.parametrize("split_field", ["split", ""], ids=["by field", "by hash"])
def test_half_a_surrogate_pair_is_refused_with_its_line(run: Run, key: str, split_field: str):
    rows = rows_of(PHONES)
    rows[6][key] += "\ud83d"
    write_rows(rows)
    refused(run(f'data.split_field="{split_field}"'), "rows.jsonl, line 7", "lone surrogate")


def test_a_whole_surrogate_pair_is_text(run: Run):
    rows = rows_of(PHONES)
    rows[6]["answer"] += "\U0001f600"
    write_rows(rows)
    assert r"\ud83d\ude00" in Path("rows.jsonl").read_text("utf8")
    assert run("federation.rounds=1").code == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (f"seed={2**63}", f"seed = {2**63}"),
        ('ranks={kind="power-law",min=1,max=4,exponent=1e6}', "ranks.exponent = 1000000.0"),
        ('ranks={kind="power-law",min=1,max=4,exponent=-1e6}', "ranks.exponent = -1000000.0"),
        ('ranks={kind="same",rank=16385}', "ranks.rank = 16385"),
        ('ranks={kind="uniform",min=1,max=16385}', "ranks.max = 16385"),
        ('ranks={kind="tiers",tiers=[{rank=16385,share=1}]}', "= 16385"),
        ('ranks={kind="explicit",default=16385}', "= 16385"),
        ('ranks={kind="explicit",of={phone-1=16385}}', "= 16385"),
    ],
)
def test_a_number_out_of_range_is_refused(run: Run, change: str, said: str):
    refused(run(change), said)


def test_the_ends_of_the_ranges_are_accepted(run: Run):
    assert run(f"seed={2**63 - 1}", "federation.rounds=1").code == 0
    for ranks in (
        {"kind": "same", "rank": 16_384},
        {"kind": "power-law", "min": 1, "max": 4, "exponent": 10.0},
        {"kind": "power-law", "min": 1, "max": 4, "exponent": -10.0},
    ):
        document = {**config_of().model_dump(exclude_none=True, mode="json"), "ranks": ranks}
        assert parse_config(document).ranks.kind == ranks["kind"]


# What is dropped is counted -----------------------------------------------------------------------------------------


def test_clients_and_rows_that_are_left_out_are_counted_and_told(run: Run):
    rows = rows_of(PHONES)
    rows += [row for row in rows_of(("watch",)) if row["answer"][11] in "045"]  # one row to train with, two held out
    rows += [{**row, "split": "validation"} for row in rows_of(("phone-1",), 3)]
    rows += [{**row, "split": "unknown"} for row in rows_of(("phone-2",), 2)]
    write_rows(rows)
    outcome = run("data.min_rows=2", "federation.rounds=1")
    assert outcome.code == 0, outcome.err
    first = outcome.records[0]
    assert (first["clients"], first["left_out_clients"], first["left_out_rows"]) == (4, 1, 5)
    assert (first["train_rows"], first["test_rows"]) == (16, 8)
    summary = outcome.err.splitlines()[0]
    assert summary.startswith("data: 4 clients; 16 training rows, 8 held out; 1 client left out")
    assert "5 rows on neither side of the split" in summary


def test_where_nothing_is_left_out_nothing_is_said(run: Run):
    outcome = run("federation.rounds=1")
    first = outcome.records[0]
    assert (first["left_out_clients"], first["left_out_rows"]) == (0, 0)
    assert "left out" not in outcome.err
    assert "neither side" not in outcome.err


def test_rows_that_lost_tokens_or_have_none_to_score_are_counted(run: Run):
    rows = rows_of(PHONES)
    rows[0]["answer"] = "long " * 20
    rows[7]["answer"] = ""
    write_rows(rows)
    first = run("federation.rounds=1", "data.target={answer}").records[0]
    assert (first["truncated_rows"], first["empty_rows"]) == (1, 1)
