"""A federation that starts from a PEFT adapter: the same logits, whole slots, and refusals."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from torch import nn

from hetlora import cli
from hetlora.config import parse_config
from hetlora.core.adapter import LoraPair, delta
from hetlora.errors import ConfigError, HetLoraError, ModelError
from hetlora.methods import METHODS
from hetlora.model.initial_adapter import import_adapter, initial_adapter
from hetlora.model.lora_model import LoraModel, load_base
from hetlora.model.peft_files import export_adapter, read_adapter
from hetlora.runs.display import QuietDisplay
from hetlora.runs.local_experiment import LocalExperiment, resume
from hetlora.runs.records import read_records
from proofs.small_run import document, write_rows
from small_models import gpt2, random_adapter

pytestmark = pytest.mark.run

IDS = torch.arange(2, 22).view(2, 10)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def saved_by_peft(base: nn.Module, folder: Path, **settings: Any) -> nn.Module:
    """An adapter that PEFT itself has made and written, with random factors; returns PEFT's model."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **settings)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model


def written(folder: Path, model: LoraModel, rank: int = 3, scaling: float = 2.0) -> dict[str, LoraPair]:
    """A small random adapter of the model in a folder."""
    adapter = {path: LoraPair(0.1 * A, 0.1 * B) for path, (A, B) in random_adapter(model, rank).items()}
    export_adapter(adapter, folder, base="base", target_modules=model.target_modules, scaling=scaling)
    return adapter


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3, "lora_alpha": 12},
        {"r": 4, "lora_alpha": 7, "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"MODULE": 2}, "alpha_pattern": {"MODULE": 3}},
    ],
    ids=["another scaling", "rank-stabilised", "patterns"],
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_peft_has_written_is_imported_to_the_same_logits(
    kind: str, settings: dict[str, Any], tiny: str, tmp_path: Path
) -> None:
    base = load_base(tiny) if kind == "llama" else gpt2()
    targets, one = (["q_proj", "v_proj"], "v_proj") if kind == "llama" else (["c_attn"], "h.1.attn.c_attn")
    settings = json.loads(json.dumps(settings).replace("MODULE", one))
    if kind == "gpt2":
        settings["fan_in_fan_out"] = True
    theirs = logits(saved_by_peft(copy.deepcopy(base), tmp_path / "adapter", target_modules=targets, **settings))
    plain = logits(base)
    model = LoraModel(base, target_modules=targets, scaling=1.7)
    imported = import_adapter(str(tmp_path / "adapter"), model)
    model.use(imported)
    ours = logits(model.base)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(theirs.abs().max())))
    assert float((ours - plain).abs().max()) > 1e-2, "the adapter must matter"
    widest = max(pair.A.shape[0] for pair in imported.values())
    model.use(initial_adapter(model, widest + 2, 0, imported))
    torch.testing.assert_close(logits(model.base), ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))


def test_imported_slots_come_first_and_the_others_stay_fresh(tiny_model: LoraModel, tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", tiny_model)
    imported = import_adapter(str(tmp_path / "adapter"), tiny_model)
    wide, fresh = initial_adapter(tiny_model, 5, 7, imported), tiny_model.initial_adapter(5, 7)
    narrow = initial_adapter(tiny_model, 2, 7, imported)
    for module, (A, B) in adapter.items():
        assert torch.equal(wide[module].A[:3], A)
        assert torch.equal(wide[module].B[:, :3], B)
        assert torch.equal(wide[module].A[3:], fresh[module].A[3:])
        assert not wide[module].B[:, 3:].any()
        assert torch.equal(narrow[module].A, A[:2])
        assert torch.equal(narrow[module].B, B[:, :2])


def test_another_scaling_is_folded_into_b_alone(tiny_model: LoraModel, tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", tiny_model, scaling=0.5)
    for module, pair in import_adapter(str(tmp_path / "adapter"), tiny_model).items():
        assert torch.equal(pair.A, adapter[module].A)
        torch.testing.assert_close(2.0 * delta(pair), 0.5 * delta(adapter[module]))


# In a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a base, rows and an adapter of rank 3."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "base")
    write_rows(Path("rows.jsonl"))
    written(tmp_path / "before", LoraModel(load_base(tiny)))
    return tmp_path


def small(**changes: Any) -> dict[str, Any]:
    value = document("runs", federation={"rounds": 2, "clients_per_round": 3}, **changes)
    return {**value, "model": {**value["model"], "adapter": "before"}}


class Hearing(QuietDisplay):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def say(self, text: str) -> None:
        self.heard.append(text)


@pytest.mark.usefixtures("place")
def test_a_run_starts_from_the_adapter_and_its_base_is_measured_alone() -> None:
    display = Hearing()
    result = LocalExperiment(parse_config(small()), display).run()
    without = small()
    del without["model"]["adapter"]
    plain = LocalExperiment(parse_config(without), QuietDisplay()).run()
    assert result.base.summary() == plain.base.summary(), "the base alone, with or without an adapter to start from"
    records = read_records(result.records)
    assert [(record["kind"], record.get("round")) for record in records[1:3]] == [("evaluation", 0), ("evaluation", 0)]
    assert records[1]["overall"]["perplexity"] == result.base.overall.perplexity
    model = LoraModel(load_base("base"))
    experiment = LocalExperiment(parse_config(small()), QuietDisplay())
    first = experiment.first_state().adapter
    for module, pair in read_adapter("before").adapter.items():
        assert torch.equal(first[module].A[:3], pair.A)
        assert model.shapes[module] == (first[module].B.shape[0], first[module].A.shape[1])
    start = experiment.measure(experiment.first_state(), generate=False).overall.perplexity
    assert records[2]["overall"]["perplexity"] == start != result.base.overall.perplexity
    assert "starting from the adapter in before, of rank 3" in display.heard
    assert f"{start:.2f} before the first round" in " ".join(display.heard)


@pytest.mark.usefixtures("place")
def test_an_adapter_wider_than_the_federation_is_cut_and_that_is_said() -> None:
    display = Hearing()
    ranks = {"kind": "same", "rank": 2}
    LocalExperiment(parse_config(small(ranks=ranks, method={"name": "fedit"})), display)
    [said] = [line for line in display.heard if line.startswith("starting from")]
    assert said.endswith("of rank 3; its slots beyond 2, the largest rank of the federation, are cut away")


def test_a_run_goes_on_with_the_adapter_it_began_with_alone(place: Path) -> None:
    result = LocalExperiment(parse_config(small()), QuietDisplay()).run()
    folder = result.records.parent
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / "round-000002.safetensors").unlink()
    again = resume(folder, QuietDisplay())
    for module, pair in result.state.adapter.items():
        assert torch.equal(pair.B, again.state.adapter[module].B)
    written(place / "before", LoraModel(load_base("base")), rank=2)
    with pytest.raises(HetLoraError, match=r"model\.adapter = .* does not hold what it held when the run began"):
        resume(folder, QuietDisplay())


def test_machines_of_their_own_start_from_it_too(place: Path) -> None:
    pytest.importorskip("flwr")
    from fake_grid import FakeGrid
    from hetlora.flower.remote_experiment import RemoteExperiment
    from hetlora.flower.transport import Transport

    config = parse_config(small(flower={"clients": "nodes"}))
    deployment = RemoteExperiment(config, QuietDisplay(), Transport(FakeGrid({})))
    first = deployment.first_state().adapter
    for module, pair in read_adapter("before").adapter.items():
        assert torch.equal(first[module].B[:, :3], pair.B)
    before = deployment.digests()["model.adapter"]
    written(place / "before", LoraModel(load_base("base")), rank=2)
    assert before != deployment.digests()["model.adapter"]


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in METHODS if "adapter" in METHODS[name]().refuses])
def test_a_method_that_would_lose_it_refuses_it(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model.adapter with method.name = '{name}'"):
        parse_config(small(method={"name": name}))


def test_these_methods_would_lose_it() -> None:
    assert {name for name in METHODS if "adapter" in METHODS[name]().refuses} == {"flora", "full", "zeroshot"}


@pytest.mark.usefixtures("place")
def test_other_modules_are_one_error_that_names_both(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.toml").write_text(tomli_w.dumps(small()))
    code = cli.main(["run", "run.toml", "--set", 'model.target_modules=["k_proj","v_proj"]', "--quiet"])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("hetlora: ") == 1
    assert "4 modules (q_proj, v_proj)" in error
    assert "4 modules (k_proj, v_proj)" in error
    assert not Path("runs").exists()


def changed(folder: Path, **keys: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"use_dora": True}, "more than plain LoRA .use_dora = True"),
        ({"bias": "all"}, "more than plain LoRA .bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"something_new": 1}, "something_new = 1"),
        ({"peft_type": "IA3"}, "not of PEFT's type LORA"),
        ({"lora_alpha": "much"}, "'much', which is no number"),
        ({"lora_alpha": 10**400}, r"of 10{59}, which is no number or too large a one"),
        ({"alpha_pattern": {"q_proj": -(10**400)}}, r"of -10{58}, which is no number or too large a one"),
        ({"lora_alpha": -1e31}, "of -1e[+]31, which is no number or too large a one"),
        ({"lora_alpha": float("inf")}, "of inf, which is no number"),
        ({"alpha_pattern": {".*q_proj": 3}}, "names none of its modules"),
    ],
)
def test_more_than_plain_lora_is_refused(keys: Mapping[str, Any], said: str, place: Path) -> None:
    changed(place / "before", **keys)
    with pytest.raises(ModelError, match=said):
        read_adapter(place / "before")


@pytest.mark.parametrize("name", ["adapter_model.bin", None])
def test_no_pickle_stands_in_for_its_numbers(name: str | None, place: Path) -> None:
    weights = place / "before" / "adapter_model.safetensors"
    if name:
        weights.rename(weights.with_name(name))
    else:
        weights.unlink()
    with pytest.raises(ModelError, match="a pickle in its place is not opened"):
        read_adapter(place / "before")


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("base_model.model.x.lora_embedding_A", torch.ones(2, 2), "no factor of finite numbers of a linear module"),
        ("base_model.model.x.lora_A.weight", torch.ones(2), "no factor of finite numbers of a linear module"),
        ("base_model.model.x.lora_A.weight", torch.full((2, 2), float("nan")), "no factor of finite numbers"),
        ("base_model.model.x.lora_A.weight", torch.ones(2, 2), r"holds for x A \[2, 2\], which are not two factors"),
    ],
)
def test_a_tensor_without_a_place_is_refused(name: str, tensor: torch.Tensor, said: str, place: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = place / "before" / "adapter_model.safetensors"
    save_file({**load_file(weights), name: tensor}, weights)
    with pytest.raises(ModelError, match=said):
        read_adapter(place / "before")


@pytest.mark.usefixtures("place")
def test_a_base_of_other_shapes_is_refused() -> None:
    model = LoraModel(load_base("base"), target_modules=["q_proj", "k_proj"])
    # k_proj and v_proj are alike: factors of q_proj under the name of k_proj are not.
    swapped = {path: random_adapter(model, 2)[path.replace("k_proj", "q_proj")] for path in model.shapes}
    export_adapter(swapped, "other", base="base", target_modules=model.target_modules, scaling=2.0)
    with pytest.raises(ModelError, match=r"is of shape \(32, 32\) in it and \(16, 32\) in the base"):
        import_adapter("other", model)


@pytest.mark.parametrize("damage", ["{", "[" * 100_000, "[]"])
def test_a_damaged_configuration_is_one_error(damage: str, place: Path) -> None:
    (place / "before" / "adapter_config.json").write_text(damage)
    with pytest.raises(ModelError, match="the adapter in"):
        read_adapter(place / "before")
