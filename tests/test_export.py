"""`hetlora export`: each form loads elsewhere to our logits, the card's code runs, and bad input is refused."""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hetlora
from hetlora.cli import main
from hetlora.commands.export.asking import Asking
from hetlora.commands.export.export import ExportResult, describe_export
from hetlora.config import load_run_config
from hetlora.core.adapter import Adapter, LoraPair, pad, truncate
from hetlora.errors import HetLoraError
from hetlora.model.full_model import FullModel
from hetlora.model.lora_model import load_base
from hetlora.model.peft_files import read_adapter
from hetlora.runs.checkpoint import newest, write_checkpoint
from hetlora.runs.display import QuietDisplay
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.runs.records import read_records
from hetlora.runs.result import RunResult
from hetlora.runs.trained_run import open_run
from proofs.small_run import document
from small_federations import adapted, logits, run_small

pytestmark = pytest.mark.run

Started = Callable[..., RunResult]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory whose runs the tests of this file share."""
    return tmp_path_factory.mktemp("place")


@pytest.fixture
def ran(place: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Started:
    """Run a method once, in the working directory of the tests."""
    monkeypatch.chdir(place)

    def call(name: str = "hetlora", **changes: Any) -> RunResult:
        key = json.dumps([name, changes])
        if key not in _done:
            _done[key] = run_small(tiny, name, **changes)
        return _done[key]

    _done = _RESULTS.setdefault(place, {})
    return call


_RESULTS: dict[Path, dict[str, RunResult]] = {}


def export_run(*given: Any, **options: Any) -> ExportResult:
    """Export unchecked: `test_export_check.py` is about the check, which takes a process each time."""
    return hetlora.export_run(*given, **{"check": False, **options})


def folder_of(result: RunResult) -> Path:
    return result.records.parent


def in_peft(folder: Path, kind: str) -> torch.Tensor:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(load_base(kind), str(folder)).eval())


def in_transformers(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(folder).eval())


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    # Sums run in another order, so an entry is off by roundings of the largest ones.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(theirs.abs().max())))


class Hearing(QuietDisplay):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def say(self, text: str) -> None:
        self.heard.append(text)


def equal(one: Adapter, other: Adapter) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[m].A, other[m].A) and torch.equal(one[m].B, other[m].B) for m in one
    )


# Adapters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_an_adapter_of_a_rank_is_the_global_one_truncated_bit_for_bit(ran: Started, kind: str, rank: int) -> None:
    result = ran(kind=kind)
    done = export_run(folder_of(result), rank=rank)
    assert (done.ranks.keys(), done.round, done.source) == ({rank}, 2, "the checkpoint of round 2")
    wanted = truncate(result.state.adapter, rank)
    assert equal(read_adapter(done.folder).adapter, wanted)
    theirs = in_peft(done.folder, kind)
    same(adapted(result, wanted, kind=kind), theirs)
    assert float((theirs - logits(load_base(kind))).abs().max()) > 1e-3, "the adapter must matter"


def test_a_tier_is_named_as_the_results_name_it(ran: Started) -> None:
    result = ran()
    assert list(result.base.tiers) == ["2", "4"]
    done = export_run(folder_of(result), tier="2")
    assert equal(read_adapter(done.folder).adapter, truncate(result.state.adapter, 2))


def test_a_tier_of_several_ranks_gets_what_all_of_its_devices_afford(ran: Started) -> None:
    many = {"kind": "explicit", "of": {f"phone {i}": i for i in range(1, 9)}}
    from proofs.small_run import write_rows

    ran()
    write_rows(Path("eight.jsonl"), [f"phone {i}" for i in range(1, 9)])
    data = {**document("runs")["data"], "path": "eight.jsonl"}
    result = ran(ranks=many, data=data, method={"name": "zeropad"})
    assert list(result.base.tiers) == ["1-2", "3-4", "5-6", "7-8"]
    done = export_run(folder_of(result), tier="5-6")
    assert equal(read_adapter(done.folder).adapter, truncate(result.state.adapter, 5))


def test_without_a_part_it_is_what_the_run_has_written(ran: Started) -> None:
    result = ran()
    done = export_run(folder_of(result))
    assert equal(read_adapter(done.folder).adapter, read_adapter(folder_of(result) / "adapter").adapter)


@pytest.mark.parametrize("per_module", [False, True], ids=["one rank", "a rank a module"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_client_gets_what_it_would_receive_next(ran: Started, kind: str, per_module: bool) -> None:
    if per_module:
        penalty = 1.0 if kind == "gpt2" else 0.3  # at which some client prunes some of its modules
        arguments = {"gamma": 0.5, "penalty": penalty, "min_rank": 1, "per_module": True}
        result = ran(kind=kind, method={"name": "hetlora", **arguments})
        assert any(isinstance(rank, dict) and len(set(rank.values())) > 1 for rank in result.ranks.values()), "mixed"
    else:
        result = ran(kind=kind)
    experiment = LocalExperiment(load_run_config(folder_of(result) / "config.json"), QuietDisplay())
    for name, rank in result.ranks.items():
        done = export_run(folder_of(result), client=name)
        wanted = experiment.method.distribute(result.state, experiment.clients.named(name)).adapter
        written = read_adapter(done.folder).adapter
        assert equal(written, wanted)
        assert {module: pair.A.shape[0] for module, pair in written.items()} == (
            dict.fromkeys(written, rank) if isinstance(rank, int) else dict(rank)
        )
        same(adapted(result, wanted, kind=kind), in_peft(done.folder, kind))


def test_equal_ranks_are_padded_to_the_same_logits(ran: Started) -> None:
    arguments = {"gamma": 0.5, "penalty": 0.3, "min_rank": 1, "per_module": True}
    result = ran(method={"name": "hetlora", **arguments})
    mixed = next(name for name, rank in result.ranks.items() if isinstance(rank, dict) and len(set(rank.values())) > 1)
    plain, padded = (export_run(folder_of(result), client=mixed, equal_ranks=on) for on in (False, True))
    assert len(plain.ranks) > 1
    assert len(padded.ranks) == 1
    config = json.loads((padded.folder / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert equal(read_adapter(padded.folder).adapter, pad(read_adapter(plain.folder).adapter, max(plain.ranks)))
    same(in_peft(plain.folder, "llama"), in_peft(padded.folder, "llama"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numbers_are_of_the_type_asked_for(ran: Started, dtype: Any) -> None:
    result = ran()
    kind = getattr(torch, dtype)
    done = export_run(folder_of(result), rank=2, dtype=dtype)
    tensors = load_file(done.folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {kind}
    for module, pair in truncate(result.state.adapter, 2).items():
        assert torch.equal(tensors[f"base_model.model.{module}.lora_B.weight"], pair.B.to(kind))
    merged = export_run(folder_of(result), merged=True, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(merged.folder / "model.safetensors").values()} == {kind}


def test_numbers_that_a_type_does_not_hold_are_refused_and_nothing_is_left(ran: Started, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(folder_of(ran()), folder)
    checkpoint = newest(folder, lambda _: None)
    assert checkpoint is not None
    large = {module: LoraPair(A * 1e9, B) for module, (A, B) in checkpoint.progress.state.adapter.items()}
    progress = replace(checkpoint.progress, state=replace(checkpoint.progress.state, adapter=large))
    write_checkpoint(replace(checkpoint, progress=progress), folder)
    before = sorted(folder.iterdir())
    with pytest.raises(HetLoraError, match="has numbers that float16 does not hold; use bfloat16 or float32"):
        export_run(folder, rank=2, dtype="float16", output=folder / "half")
    assert sorted(folder.iterdir()) == before


# Whole models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["hetlora", "fedex_lora", "flora"])
def test_a_merged_model_computes_as_what_was_learned(ran: Started, name: str, kind: str) -> None:
    result = ran(name, kind=kind)
    done = export_run(folder_of(result), merged=True)
    learned = result.state.adapter if name != "hetlora" else read_adapter(folder_of(result) / "adapter").adapter
    ours, theirs = adapted(result, learned, kind=kind), in_transformers(done.folder)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(theirs.abs().max())))
    assert float((theirs - logits(load_base(kind))).abs().max()) > 1e-3


def test_changed_weights_are_a_merged_model(ran: Started) -> None:
    result = ran("full")
    model = FullModel(load_base("llama"))
    model.use(result.state.adapter)
    done = export_run(folder_of(result), merged=True)
    same(logits(model.base), in_transformers(done.folder))


@pytest.mark.parametrize("name", ["full", "flora", "fedex_lora"])
def test_what_no_adapter_holds_is_refused_with_the_way_out(
    ran: Started, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(folder_of(ran(name))), "--rank", "2", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("hetlora: ") == 1
    assert "no adapter holds" in error
    assert "--merged" in error


def test_a_base_that_has_changed_is_not_merged_into(ran: Started, tiny: str, tmp_path: Path) -> None:
    ran()
    shutil.copytree(tiny, "changing")
    result = ran(name="hetlora", model={"base": "changing", "device": "cpu", "scaling": 1.7})
    with Path("changing/config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(HetLoraError, match=r"model\.base = 'changing' does not hold what it held when the run began"):
        export_run(folder_of(result), tmp_path / "out", merged=True)
    assert not any(tmp_path.iterdir())


# Personal methods, and runs without a checkpoint --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["local", "fedsa_lora"])
@pytest.mark.parametrize("kept", [True, False], ids=["from a checkpoint", "from what was written"])
def test_a_client_of_a_personal_method_gets_its_own(ran: Started, name: str, kept: bool) -> None:
    result = ran(name, **({} if kept else {"checkpoint_every": 0}))
    folder = folder_of(result)
    index = json.loads((folder / "adapters/index.json").read_text())
    for client, number in index.items():
        done = export_run(folder, client=client)
        assert equal(read_adapter(done.folder).adapter, read_adapter(folder / "adapters" / number).adapter)
        assert ("checkpoint" in done.source) == kept
    with pytest.raises(HetLoraError, match=f"method {name} keeps an adapter on every client.*'phone 1'"):
        export_run(folder, rank=2)
    with pytest.raises(HetLoraError, match="there is no client 'nobody' in this run; there are 'phone 1'"):
        export_run(folder, client="nobody")


@pytest.mark.parametrize("name", ["hetlora", "flora"])
def test_without_a_checkpoint_what_was_written_counts(ran: Started, name: str) -> None:
    result = ran(name, checkpoint_every=0)
    folder = folder_of(result)
    if name == "flora":
        done = export_run(folder, merged=True)
        assert done.source == f"{folder / 'model'}, as of round 2"
        same(in_transformers(folder / "model"), in_transformers(done.folder))
        with pytest.raises(HetLoraError, match="--merged"):
            export_run(folder, rank=1)
        return
    done = export_run(folder, rank=2)
    assert (done.round, done.source) == (2, f"{folder / 'adapter'}, as of round 2")
    assert equal(read_adapter(done.folder).adapter, truncate(result.state.adapter, 2))
    same(
        adapted(result, read_adapter(folder / "adapter").adapter),
        in_transformers(export_run(folder, merged=True).folder),
    )


def test_a_run_that_was_killed_gives_what_it_had_learned(ran: Started, tmp_path: Path) -> None:
    result = ran()
    folder = tmp_path / "killed"
    shutil.copytree(folder_of(result), folder)
    for left in ("summary.json", "checkpoints/round-000002.safetensors"):
        (folder / left).unlink()
    shutil.rmtree(folder / "adapter")
    with (folder / "records.jsonl").open("a") as file:
        file.write('{"kind": "round", "rou')
    done = export_run(folder, tier="4")
    assert (done.round, done.source) == (1, "the checkpoint of round 1")
    card = (done.folder / "README.md").read_text()
    assert "1 of 2" in card
    assert "The run was not complete" in card
    assert export_run(folder).ranks, "the slots that some client still has, by the data"


def test_a_complete_run_needs_its_data_no_more(ran: Started) -> None:
    result = ran()
    Path("rows.jsonl").rename("away.jsonl")
    try:
        assert equal(
            read_adapter(export_run(folder_of(result)).folder).adapter,
            read_adapter(folder_of(result) / "adapter").adapter,
        )
        assert export_run(folder_of(result), merged=True).folder.is_dir()
    finally:
        Path("away.jsonl").rename("rows.jsonl")


def test_a_run_is_read_from_any_folder(ran: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = ran()
    run = folder_of(result).resolve()
    there = export_run(run, rank=2, scores=True)
    monkeypatch.chdir(tmp_path)
    away = export_run(run, "away", rank=2, scores=True)
    assert away.scores == there.scores
    name = "adapter_config.json"
    assert (away.folder / name).read_bytes() == (there.folder / name).read_bytes(), "no folder of this machine"
    assert export_run(run, merged=True).merged
    assert open_run(run).config.model.base == str(run.parents[1] / "llama")
    shutil.copytree(run, "moved")
    with pytest.raises(
        HetLoraError, match=r"data\.path = 'rows\.jsonl' is not here; call from the folder in which the run"
    ):
        export_run("moved", rank=2, scores=True)


# The card -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "model"])
def test_the_cards_code_runs_and_loads_the_same_logits(
    ran: Started, kind: str, merged: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    result = ran(kind=kind)
    done = export_run(folder_of(result), **({"merged": True} if merged else {"rank": 3}))
    [code] = re.findall(
        r"^```python\n(.*?)^```", (done.folder / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL
    )
    namespace: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), namespace)  # the point is to execute what readers will copy
    assert capsys.readouterr().out.endswith("\n")
    learned = read_adapter(folder_of(result) / "adapter").adapter if merged else truncate(result.state.adapter, 3)
    same(adapted(result, learned, kind=kind), logits(namespace["model"]))


def test_the_card_says_what_the_hub_and_a_reader_ask_for(ran: Started) -> None:
    from huggingface_hub import ModelCard

    result = ran()
    done = export_run(folder_of(result), rank=2, scores=True)
    card = ModelCard.load(done.folder / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("peft", "text-generation")
    assert "federated-learning" in data["tags"]
    assert "license" not in data
    assert "base_model" not in data
    text = (done.folder / "README.md").read_text()
    assert "# license: FILL-IN" in text
    assert "# base_model: OWNER/NAME" in text
    for said in (
        "Cho et al.",
        "arXiv 2401.06432",
        "`rows.jsonl`, 4 clients, 16 training rows",
        "2 of 2",
        "2 (4 modules)",
        "torch ",
    ):
        assert said in text
    assert result.final is not None
    for tier, score in result.final.tiers.items():
        assert f"| {tier} | {result.base.tiers[tier].perplexity:.2f} | {score.perplexity:.2f} |" in text
    for row in done.scores.rows():
        assert f"| {' | '.join(row)} |" in text


def test_a_base_and_data_of_the_hub_are_named_as_it_names_them(ran: Started) -> None:
    from huggingface_hub import ModelCard

    from hetlora.commands.export.model_card import Card, model_card
    from hetlora.runs.trained_run import AdapterSelection

    learned = open_run(folder_of(ran()))
    model = learned.config.model.model_copy(update={"base": "owner/model"})
    data = learned.config.data.model_copy(update={"path": "owner/rows"})
    learned.config = learned.config.model_copy(update={"model": model, "data": data})
    text = model_card(
        learned,
        Card(Path("out"), False, {2: 4}, "float32", AdapterSelection(rank=2), None, Asking("ids = [1]", (0,), 0)),
    )
    metadata = ModelCard(text).data.to_dict()
    assert (metadata["base_model"], metadata["datasets"]) == ("owner/model", ["owner/rows"])
    assert 'from_pretrained("owner/model"' in text.replace("'", '"')


def test_no_name_breaks_the_card(ran: Started, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    result = ran("local")
    done = export_run(folder_of(result), tmp_path / "a `b` | c ''' \" é", client="phone/2")
    text = (done.folder / "README.md").read_text("utf8")
    assert ModelCard(text).data.to_dict()["library_name"] == "peft"
    [code] = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    compile(code, "README.md", "exec")
    assert "own adapter of the client `phone/2`" in text


def test_the_python_of_the_page_runs(ran: Started, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs/export.md").read_text("utf8")
    [code] = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    # The page speaks of the demonstration; here is a smaller run.
    for word, here in (("runs/demo", str(folder_of(ran()))), ('"json"', '"phone 1"'), ('"prompt":', '"question":')):
        assert word in code
        code = code.replace(word, here)
    exec(compile(code, "docs/export.md", "exec"), {})
    assert "whole adapter" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "said", "unsaid"),
    [
        (
            "hetlora",
            {},
            [
                "each at the rank that its hardware affords, and a server aggregated",
                "with the whole global adapter, on rows",
            ],
            ["not of this", "started from"],
        ),
        ("hetlora", {"tier": "2"}, ["not of this cut, which was not measured."], ["its own are below"]),
        ("hetlora", {"rank": 3, "scores": True}, ["not of this cut, which was not measured."], ["its own are below"]),
        ("hetlora", {"rank": 2, "scores": True}, ["not of this cut: its own are below."], ["which was not measured"]),
        ("hetlora", {"client": "phone 1"}, ["of all clients, and not of this client's adapter alone."], ["this cut"]),
        ("central", {}, ["on the rows of all clients of a federation, pooled in one place."], ["server", "affords"]),
        (
            "local",
            {"client": "phone 1"},
            ["has fine-tuned alone", "nothing was sent to a server.", "by the run with each client's own adapter"],
            ["aggregated"],
        ),
        ("fedsa_lora", {"client": "phone 1"}, ["a server aggregated what they sent", "each client's own adapter"], []),
        (
            "full",
            {"merged": True},
            [
                "its clients trained every weight of the model on rows of their own, and a server",
                "run with the whole model",
            ],
            ["affords", "global adapter"],
        ),
        (
            "fedex_lora",
            {"merged": True},
            ["with the whole global adapter on the base as the run has changed it, on rows"],
            [],
        ),
    ],
)
def test_the_card_says_who_trained_and_what_was_measured(
    ran: Started, name: str, options: dict[str, Any], said: Sequence[str], unsaid: Sequence[str]
) -> None:
    text = (export_run(folder_of(ran(name)), **options).folder / "README.md").read_text("utf8")
    assert [words for words in said if words not in text] == []
    assert [words for words in unsaid if words in text] == []


def test_the_card_names_what_the_run_started_from_and_what_that_gave(ran: Started) -> None:
    before = export_run(folder_of(ran()), "before", rank=2).folder
    result = ran(model={"base": "llama", "device": "cpu", "scaling": 1.7, "adapter": str(before)})
    text = (export_run(folder_of(result)).folder / "README.md").read_text("utf8")
    _, start = (
        record for record in read_records(result.records) if record["kind"] == "evaluation" and record.get("round") == 0
    )
    assert "| started from | the adapter `before` |" in text
    assert "on the adapter that it started from, on the data" in text
    assert "| tier of rank | base | start | after |" in text
    assert result.final is not None
    figures = (result.base.overall.perplexity, start["overall"]["perplexity"], result.final.overall.perplexity)
    assert len(set(figures)) == 3
    assert f"| all | {' | '.join(f'{figure:.2f}' for figure in figures)} |" in text
    for tier, scores in start["tiers"].items():
        assert f"| {tier} | {result.base.tiers[tier].perplexity:.2f} | {scores['perplexity']:.2f} |" in text


# Scores -------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_truncated_adapter(ran: Started, capsys: pytest.CaptureFixture[str]) -> None:
    result = ran()
    assert main(["export", str(folder_of(result)), "--tier", "2", "--scores", "--no-check", "--json", "--quiet"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert result.final is not None
    experiment = LocalExperiment(load_run_config(folder_of(result) / "config.json"), QuietDisplay())
    for tier, rank in (("2", 2), ("4", 4)):
        truncated = truncate(result.state.adapter, rank)
        measured = experiment.measure_adapter(truncated)
        assert scores["tiers"][tier]["rank"] == rank
        assert scores["tiers"][tier]["perplexity"] == pytest.approx(measured.overall.perplexity, rel=1e-6)
        assert scores["tiers"][tier]["own"]["perplexity"] == pytest.approx(measured.tiers[tier].perplexity, rel=1e-6)
        assert scores["tiers"][tier]["rougeL"] == pytest.approx(measured.overall.rouge_l)
    assert scores["base"]["perplexity"] == pytest.approx(result.base.overall.perplexity)
    assert scores["whole"]["perplexity"] == pytest.approx(result.final.overall.perplexity)
    assert len({scores[key]["perplexity"] for key in ("base", "whole")} | {scores["tiers"]["2"]["perplexity"]}) == 3


def pruned_by_all(ran: Started) -> RunResult:
    """A run at whose end nobody has the slots of its upper tier any more, though the checkpoint has them."""
    result = ran(
        model={"base": "llama", "device": "cpu"},
        federation={"rounds": 4, "clients_per_round": 3, "dropout": 0.2},
        training={"steps": 2, "batch_size": 2, "learning_rate": 1e-2},
    )
    whole = read_adapter(folder_of(result) / "adapter").adapter
    assert {pair.A.shape[0] for pair in whole.values()} == {2}, "all have pruned"
    assert any(bool(pair.B[:, 2:].any()) for pair in result.state.adapter.values()), "what they left is not zero"
    return result


def test_the_scores_of_a_tier_are_those_of_what_is_written_for_it(ran: Started) -> None:
    result = pruned_by_all(ran)
    experiment = LocalExperiment(load_run_config(folder_of(result) / "config.json"), QuietDisplay())
    for tier, rank in (("2", 2), ("4", 4)):
        done = export_run(folder_of(result), tier=tier, scores=True)
        assert done.ranks.keys() == {rank}
        assert done.scores is not None
        measured = experiment.measure_adapter(read_adapter(done.folder).adapter)
        [score] = [score for score in done.scores.tiers if score.tier == tier]
        assert score.rank == rank
        assert score.everybody.perplexity == pytest.approx(measured.overall.perplexity, rel=1e-6)
        assert score.own.perplexity == pytest.approx(measured.tiers[tier].perplexity, rel=1e-6)
    narrow, wide = (score.everybody.perplexity for score in done.scores.tiers)
    assert wide != pytest.approx(narrow, rel=1e-6), "the slots that nobody has any more matter"
    assert done.scores.whole.perplexity == pytest.approx(narrow)


def test_a_tier_of_a_run_without_a_checkpoint_has_the_slots_that_were_written(ran: Started, tmp_path: Path) -> None:
    result = pruned_by_all(ran)
    shutil.copytree(folder_of(result), tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    done = export_run(tmp_path / "run", tier="4", scores=True)
    assert done.ranks.keys() == {2}
    assert done.scores is not None
    assert [(score.tier, score.rank) for score in done.scores.tiers] == [("2", 2), ("4", 2)]
    assert {score.everybody.perplexity for score in done.scores.tiers} == {done.scores.whole.perplexity}


def test_whether_the_place_is_free_is_known_before_anything_is_measured(ran: Started) -> None:
    Path("taken place").mkdir()
    display = Hearing()
    with pytest.raises(HetLoraError, match="'taken place' exists, and nothing is written over"):
        export_run(folder_of(ran()), "taken place", scores=True, display=display)
    assert display.heard == []


# The command --------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_has_written(ran: Started, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(ran())
    assert main(["export", str(folder), "--rank", "3", "--output", "by-command", "--quiet", "--no-check"]) == 0
    out = capsys.readouterr().out
    assert out == ("adapter (PEFT): by-command\n                rank 3, float32, from the checkpoint of round 2\n")
    assert {path.name for path in Path("by-command").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert (
        main(["export", str(folder), "--merged", "--output", "taken-model", "--scores", "--quiet", "--no-check"]) == 0
    )
    out = capsys.readouterr().out
    assert out.startswith("merged model:   taken-model\n")
    assert "whole adapter" in out


def test_nothing_is_written_over(ran: Started, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(ran())
    Path("mine").mkdir()
    Path("mine/kept").write_text("kept")
    Path("link").symlink_to("nowhere")
    for name in ("mine", "link"):
        assert main(["export", str(folder), "--rank", "2", "--output", name]) == 2
        assert f"'{name}' exists, and nothing is written over" in capsys.readouterr().err
    assert [path.name for path in Path("mine").iterdir()] == ["kept"]
    first, second = (export_run(folder, rank=1, dtype="bfloat16").folder for _ in range(2))
    assert first != second


def test_what_a_killed_export_has_left_is_in_nobodys_way(ran: Started, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(folder_of(ran()), folder, ignore=shutil.ignore_patterns("exports"))
    for left in (folder / "exports/rank-2.part", folder / "exports/mine.part"):
        left.mkdir(parents=True)
        (left / "adapter_config.json").write_text("{")
    assert export_run(folder, rank=2).folder == folder / "exports/rank-2"
    done = export_run(folder, folder / "exports/mine", rank=2)
    assert {path.name for path in (folder / "exports").iterdir()} == {"rank-2", "rank-2.part", "mine", "mine.part"}
    (tmp_path / "plain").mkdir()
    rights = [stat.S_IMODE(place.stat().st_mode) for place in (done.folder, tmp_path / "plain")]
    assert rights[0] == rights[1], "whoever may read other folders may read this one"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rank", "5"], "rank 5 is not of this run: its global adapter has 4 slots; give 1 … 4"),
        (["--rank", "0"], "rank 0 is not of this run"),
        (["--rank", "-1"], "rank -1 is not of this run"),
        (["--tier", "3"], "there is no tier '3'; the results list 2, 4"),
        (
            ["--client", "phone 9"],
            "there is no client 'phone 9' in this run; there are 'phone 1', 'phone/2', 'tablet 1'",
        ),
        (["--output", "rows.jsonl/out"], "cannot write 'rows.jsonl/out'"),
    ],
)
def test_bad_input_is_one_error(
    ran: Started, options: Sequence[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(folder_of(ran())), *options, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_two_parts_are_one_too_many(ran: Started) -> None:
    folder = folder_of(ran())
    with pytest.raises(SystemExit) as ended:
        main(["export", str(folder), "--rank", "2", "--merged"])
    assert ended.value.code == 2
    with pytest.raises(HetLoraError, match="rank and tier are given"):
        export_run(folder, rank=2, tier="2")
    with pytest.raises(HetLoraError, match="a merged model takes the whole adapter"):
        export_run(folder, rank=2, merged=True)


def test_what_python_prints_of_an_export_is_what_the_command_prints() -> None:
    done = ExportResult(Path("out"), False, {2: 4}, "float32", 3, "the whole adapter", None)
    assert str(done) == describe_export(done)


def test_what_is_no_run_or_has_learned_nothing_is_said(
    ran: Started, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path), "--rank", "2"]) == 2
    assert "give the folder of a run" in capsys.readouterr().err
    shutil.copy(folder_of(ran()) / "config.json", tmp_path)
    assert main(["export", str(tmp_path), "--rank", "2"]) == 2
    assert "records.jsonl' cannot be read" in capsys.readouterr().err
    (tmp_path / "records.jsonl").touch()
    assert main(["export", str(tmp_path), "--rank", "2"]) == 2
    assert "has learned nothing that is here" in capsys.readouterr().err
    assert main(["export", str(folder_of(ran("zeroshot"))), "--rank", "2"]) == 2
    assert "method zeroshot trains nobody" in capsys.readouterr().err
