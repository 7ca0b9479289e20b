"""A merged model loads with transformers to the same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hetlora.core.adapter import LoraPair
from hetlora.model.full_model import FullModel
from hetlora.model.lora_model import LoraModel, load_base, load_tokenizer
from hetlora.model.merge import write_merged

pytestmark = pytest.mark.run

IDS = torch.arange(2, 22).view(2, 10)


@pytest.fixture(params=["llama", "tied llama", "gpt2"])
def base(request: pytest.FixtureRequest, tiny: str, tmp_path: Path) -> str:
    """Folder of a base: weights stored [out, in] (Llama) or [in, out] (GPT-2's Conv1D), embeddings tied or not."""
    if request.param == "llama":
        return tiny
    from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

    folder = tmp_path / "base"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if request.param == "gpt2":
            config = GPT2Config(vocab_size=258, n_positions=64, n_embd=16, n_layer=2, n_head=2, eos_token_id=0)
            GPT2LMHeadModel(config).save_pretrained(folder)
        else:
            config = AutoConfig.from_pretrained(tiny)
            config.tie_word_embeddings = True
            LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def random_pair(pair: LoraPair, generator: torch.Generator) -> LoraPair:
    return LoraPair(*(0.2 * torch.randn(factor.shape, generator=generator) for factor in pair))


def loaded(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(base: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return base(input_ids=IDS).logits


@pytest.mark.parametrize("with_folded", [False, True], ids=["factors alone", "folded and factors"])
def test_a_merged_adapter_computes_as_the_adapted_model(
    base: str, tiny: str, tmp_path: Path, with_folded: bool
) -> None:
    model = LoraModel(load_base(base), scaling=1.7)
    plain, generator = logits(model.base), torch.Generator().manual_seed(0)
    adapter = {path: random_pair(pair, generator) for path, pair in model.initial_adapter(3, 0).items()}
    shapes = model.shapes.items() if with_folded else ()
    folded = {path: 0.2 * torch.randn(shape, generator=generator) for path, shape in shapes}
    model.use(adapter, folded)
    ours = logits(model.base)
    write_merged(model, adapter, folded, tmp_path / "model", base=base, tokenizer=tiny)
    torch.testing.assert_close(logits(loaded(tmp_path / "model")), ours, rtol=1e-4, atol=1e-4)
    assert float((ours - plain).abs().max()) > 1e-2, "the adapter must matter"
    if with_folded:
        model.use(adapter)
        assert float((ours - logits(model.base)).abs().max()) > 1e-2, "what is folded must matter"
        model.use(None, folded)
        assert float((ours - logits(model.base)).abs().max()) > 1e-2
    assert len(load_tokenizer(str(tmp_path / "model"))) == 258


def test_merged_changes_of_all_weights_compute_as_the_changed_model(base: str, tiny: str, tmp_path: Path) -> None:
    model = FullModel(load_base(base))
    plain, generator = logits(model.base), torch.Generator().manual_seed(0)
    adapter = {
        name: LoraPair(A, 0.02 * torch.randn(B.shape, generator=generator))
        for name, (A, B) in model.initial_adapter().items()
    }
    model.use(adapter)
    ours = logits(model.base)
    write_merged(model, adapter, {}, tmp_path / "model", base=base, tokenizer=tiny)
    torch.testing.assert_close(logits(loaded(tmp_path / "model")), ours, rtol=1e-4, atol=1e-4)
    assert float((ours - plain).abs().max()) > 1e-2
    tied = "lm_head.weight" not in model.shapes
    written = loaded(tmp_path / "model")
    assert torch.equal(written.get_output_embeddings().weight, written.get_input_embeddings().weight) == tied


def test_the_base_on_disk_is_left_alone(base: str, tiny: str, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in Path(base).iterdir() if path.is_file()}
    model = LoraModel(load_base(base))
    write_merged(model, model.initial_adapter(2, 0), {}, tmp_path / "model", base=base, tokenizer=tiny)
    assert {path.name: path.read_bytes() for path in Path(base).iterdir() if path.is_file()} == before
    torch.testing.assert_close(logits(loaded(tmp_path / "model")), logits(loaded(Path(base))), rtol=0.0, atol=0.0)
