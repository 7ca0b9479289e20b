"""A quantised base: its output, its gradients, its memory, and its refusals."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
import transformers
from torch import nn

from hetlora.cli import main
from hetlora.config import parse_config
from hetlora.core.adapter import LoraPair, batch, map_tensors
from hetlora.errors import ConfigError, ModelError
from hetlora.flower.node_config import QUANTIZED
from hetlora.model.full_model import FullModel
from hetlora.model.lora_model import LoraModel, load_base
from hetlora.model.merge import write_merged
from hetlora.model.quantize import Quantization, is_quantized, quantized_layers, stores_transposed, whole_weight
from hetlora.training.cost_model import CostModel, LocalWork
from hetlora.training.local import LocalTraining
from proofs.small_bases import write_base_of
from proofs.small_run import document
from small_models import losses_of

pytestmark = pytest.mark.large

ROOT = Path(__file__).resolve().parent.parent
measured_costs = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "costs.py")))
Shape = measured_costs.Shape

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
installed = pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed: pip install 'hetlora[quantize]'")
kinds = pytest.mark.parametrize(
    "kind", ["bfloat16", pytest.param("int8", marks=installed), pytest.param("nf4", marks=installed)]
)
ROUNDING = {"bfloat16": 0.003, "int8": 0.01, "nf4": 0.12}
"""The most that a weight changes, relative in the Frobenius norm: 0.2 %, 0.4 % and 9 % for normally distributed ones."""
IDS = torch.randint(2, 258, (4, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["llama", "tied llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a base: weights stored [out, in] or [in, out], with biases or without, embeddings tied or not."""
    from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

    if request.param == "llama":
        return tiny
    path = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if request.param == "gpt2":
            GPT2LMHeadModel(
                GPT2Config(vocab_size=258, n_positions=64, n_embd=32, n_layer=2, n_head=2, eos_token_id=0)
            ).save_pretrained(path)
        else:
            config = AutoConfig.from_pretrained(tiny)
            config.tie_word_embeddings = True
            LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def random_adapter(model: LoraModel, seed: int = 0) -> dict[str, LoraPair]:
    generator = torch.Generator().manual_seed(seed)
    return {
        path: LoraPair(*(0.2 * torch.randn(factor.shape, generator=generator) for factor in pair))
        for path, pair in model.initial_adapter(3, 0).items()
    }


def logits(base: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return base(input_ids=IDS).logits


def as_stored(folder: str, kind: str) -> nn.Module:
    """A plain base that holds, in full, the numbers that the quantised one stands for."""
    plain = load_base(folder)
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for path, layer in quantized_layers(load_base(folder, quantize=kind)).items():
            weight = weights[f"{path}.weight"]
            weight.copy_(whole_weight(layer).T if stores_transposed(layer) else whole_weight(layer))
    return plain


@kinds
def test_every_linear_layer_of_the_body_is_stored_in_few_bits_and_nothing_else(folder: str, kind: str) -> None:
    plain, base = load_base(folder), load_base(folder, quantize=kind)
    body = {
        path
        for path, module in plain.named_modules()
        if (isinstance(module, nn.Linear) and path != "lm_head") or type(module).__name__ == "Conv1D"
    }
    assert quantized_layers(base).keys() == body
    assert base.num_parameters() == plain.num_parameters()
    assert torch.equal(base.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    assert torch.equal(base.get_output_embeddings().weight, plain.get_output_embeddings().weight)
    for path, layer in quantized_layers(base).items():
        exact = plain.get_submodule(path).weight
        exact = exact if isinstance(plain.get_submodule(path), nn.Linear) else exact.T
        exact = exact.detach()
        assert 0 < float((whole_weight(layer) - exact).norm() / exact.norm()) < ROUNDING[kind]


@kinds
def test_losses_and_gradients_are_those_of_the_numbers_stored(folder: str, kind: str) -> None:
    ours, theirs = LoraModel(load_base(folder, quantize=kind)), LoraModel(as_stored(folder, kind))
    assert (ours.target_modules, ours.shapes, ours.fan_in_fan_out) == (
        theirs.target_modules,
        theirs.shapes,
        theirs.fan_in_fan_out,
    )
    results = []
    for model in (ours, theirs):
        adapter = map_tensors(lambda factor: factor.requires_grad_(), random_adapter(model))
        model.use(adapter)
        losses = losses_of(model, IDS)
        losses.sum().backward()
        gradients = [factor.grad for pair in adapter.values() for factor in pair]
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        results.append((losses.detach(), *gradients))
    for one, other in zip(*results, strict=True):
        # What is near 0 is a sum of terms that are not: its rounding is a share of the others' size.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))


@kinds
def test_a_client_does_not_feel_who_shares_its_pass(tiny: str, kind: str) -> None:
    """Outliers of a whole batch, or a scale taken over it, would mix the clients."""
    model = LoraModel(load_base(tiny, quantize=kind))
    clients = [random_adapter(model, seed) for seed in range(2)]
    clients[1] = map_tensors(lambda factor: 30 * factor, clients[1])  # a loud neighbour
    model.use(batch(clients))
    together = logits(model.base)[:2]
    model.use(clients[0])
    with torch.inference_mode():
        alone = model.base(input_ids=IDS[:2]).logits
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@kinds
def test_training_keeps_no_weight_in_full(tiny: str, kind: str) -> None:
    """A layer that kept its whole weight for the backward pass would need more memory than one that is not quantised."""
    model = LoraModel(load_base(tiny, quantize=kind))
    model.use(map_tensors(lambda factor: factor.requires_grad_(), random_adapter(model)))
    weights = {
        tuple(module.weight.shape) for module in load_base(tiny).model.layers.modules() if hasattr(module, "weight")
    }
    kept: list[torch.Size] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses_of(model, IDS[:3]).sum().backward()  # of no weight's size
    assert kept
    assert not {tuple(shape) for shape in kept if len(shape) == 2} & {shape for shape in weights if len(shape) == 2}


@installed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "most"), [("int8", 1.1), ("nf4", 0.65)])
def test_the_layers_take_the_bytes_they_should(tiny: str, kind: str, most: float, dtype: torch.dtype) -> None:
    base = load_base(tiny, quantize=kind, dtype=dtype)
    weights = sum(layer.in_features * layer.out_features for layer in quantized_layers(base).values())
    stored = 0
    for layer in quantized_layers(base).values():
        scales = layer.weight.SCB if kind == "int8" else layer.weight.quant_state.absmax
        stored += layer.weight.untyped_storage().nbytes() + scales.untyped_storage().nbytes()
        assert getattr(layer.weight, "CB", None) is None or layer.weight.CB.data_ptr() == layer.weight.data_ptr()
    assert stored / weights <= most + 0.1  # rows of 32 carry more scale than rows of thousands
    assert logits(base).dtype == dtype


@pytest.mark.parametrize("folded", [False, True], ids=["factors", "folded and factors"])
@kinds
def test_the_merged_model_computes_as_the_one_that_was_trained(
    folder: str, tiny: str, kind: str, folded: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = LoraModel(load_base(folder, quantize=kind), scaling=1.5)
    adapter = random_adapter(model)
    change = {path: pair.B @ pair.A for path, pair in random_adapter(model, 1).items()} if folded else {}
    model.use(adapter, change)
    write_merged(model, adapter, change, tmp_path / "model", base=folder, tokenizer=tiny)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert not is_quantized(merged)
    torch.testing.assert_close(logits(merged), logits(model.base), rtol=1e-4, atol=1e-4)


@kinds
def test_predicted_memory_and_flops_are_those_of_a_real_run(folder: str, kind: str) -> None:
    shape = Shape(folder, 4, rows=2, length=48, quantize=kind)
    said, was = measured_costs.predict(shape), measured_costs.measure(shape)
    assert said.flops == was.flops
    before = was.before_bytes
    assert said.peak_bytes - before == pytest.approx(was.peak_bytes - before, rel=0.05)


@kinds
def test_full_fine_tuning_is_refused(tiny: str, kind: str) -> None:
    with pytest.raises(ModelError, match="quantised ones cannot be; load the base with quantize='none'"):
        FullModel(load_base(tiny, quantize=kind))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma2", "gemma3_text", "falcon", "phimoe", "xglm"])
def test_a_checkpoint_of_sixteen_bits_is_loaded_in_them_and_computes_as_in_float32(
    kind: str, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_base_of(kind, "", Path(tiny), tmp_path / "whole")
    load_base(str(tmp_path / "whole"), dtype=torch.bfloat16).save_pretrained(tmp_path / "halved")
    place = str(tmp_path / "halved")
    exact = load_base(place)
    loaded: list[object] = []
    from_pretrained = transformers.AutoModelForCausalLM.from_pretrained

    def noted(*args: object, dtype: torch.dtype, **options: object) -> object:
        loaded.append(dtype)
        return from_pretrained(*args, dtype=dtype, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", noted)
    stored = load_base(place, quantize="bfloat16")
    assert loaded == [torch.bfloat16]
    assert stored.dtype == torch.float32
    assert torch.equal(logits(stored), logits(exact))
    for (path, one), (_, other) in zip(stored.named_buffers(), exact.named_buffers(), strict=True):
        assert one.dtype == other.dtype, path
        assert torch.equal(one, other), path
    for one, other in zip(gradients(LoraModel(stored)), gradients(LoraModel(exact)), strict=True):
        assert torch.equal(one, other)


def gradients(model: LoraModel) -> list[torch.Tensor]:
    adapter = map_tensors(lambda factor: factor.requires_grad_(), random_adapter(model))
    model.use(adapter)
    losses_of(model, IDS).sum().backward()
    return [factor.grad for pair in adapter.values() for factor in pair]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_not_stored_to_compute_in_sixteen(dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"model.dtype = '{dtype}' has 16 bits already"):
        parse_config(document("runs", model={"quantize": "bfloat16", "dtype": dtype}))


def test_a_nodes_kinds_are_the_models() -> None:
    assert get_args(Quantization) == QUANTIZED


@pytest.mark.parametrize("method", [[], ["name=flora", "gamma=", "penalty=", "min_rank="]], ids=["hetlora", "flora"])
@kinds
def test_a_run_trains_and_writes(
    kind: str, method: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [f"--set=model.quantize={kind}", *(f"--set=method.{change}" for change in method)]
    assert main(["run", *arguments(tmp_path), *changes]) == 0
    assert "held-out perplexity" in capsys.readouterr().out
    assert list((tmp_path / "runs").rglob("*.safetensors"))


def test_the_command_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "bitsandbytes" else find(name))
    assert main(["run", *arguments(tmp_path), "--set=model.quantize=nf4"]) == 2
    said = capsys.readouterr().err
    assert "model.quantize = 'nf4' needs bitsandbytes" in said
    assert "pip install 'hetlora[quantize]'" in said


@kinds
def test_a_plan_needs_no_library_and_knows_the_smaller_base(tiny: str, kind: str) -> None:
    work, settings = LocalWork.bound(rows=2, length=16), LocalTraining(steps=2)
    plain, few = CostModel(tiny, settings), CostModel(tiny, settings, quantize=kind)
    assert few.parameters == plain.parameters
    assert few.full(work) == plain.full(work)
    ours, theirs = few.lora(4, work), plain.lora(4, work)
    assert (ours.parameters, ours.bytes_up, ours.flops) == (theirs.parameters, theirs.bytes_up, theirs.flops)
    assert ours.peak_bytes < theirs.peak_bytes


def arguments(folder: Path) -> list[str]:
    changes = ["federation.rounds=1", "federation.clients_per_round=2", "training.steps=1", "data.clients=3"]
    changes += [
        "data.max_length=48",
        "evaluation.generate=1",
        "evaluation.max_new_tokens=4",
        f"output={folder / 'runs'}",
    ]
    return [str(ROOT / "examples" / "demo.toml"), *(f"--set={change}" for change in changes)]
