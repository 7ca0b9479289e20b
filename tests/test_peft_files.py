"""An exported adapter loads in PEFT to the same logits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hetlora.core.adapter import LoraPair, truncate
from hetlora.errors import ModelError
from hetlora.model.lora_model import LoraModel, load_base
from hetlora.model.peft_files import export_adapter, read_adapter


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2))


@pytest.mark.parametrize("mixed", [False, True], ids=["one rank", "a rank a module"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_loads_the_export_to_the_same_logits(tmp_path: Path, tiny: str, kind: str, mixed: bool) -> None:
    from peft import PeftModel

    base = load_base(tiny) if kind == "llama" else gpt2()
    plain = copy.deepcopy(base)
    model = LoraModel(base, scaling=1.7)
    generator = torch.Generator().manual_seed(0)
    adapter: dict[str, LoraPair] = {
        path: LoraPair(
            torch.randn(6, shape.in_features, generator=generator),
            torch.randn(shape.out_features, 6, generator=generator),
        )
        for path, shape in model.shapes.items()
    }
    if mixed:
        adapter = truncate(adapter, {path: 2 + index for index, path in enumerate(adapter)})
    ids = torch.randint(2, 50, (2, 9), generator=generator)
    model.use(adapter)
    with torch.inference_mode():
        ours = model.base(input_ids=ids).logits

    export_adapter(
        adapter,
        tmp_path,
        base=kind,
        target_modules=model.target_modules,
        scaling=model.scaling,
        fan_in_fan_out=model.fan_in_fan_out,
    )
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    with torch.inference_mode():
        theirs = loaded(input_ids=ids).logits
    # Sums run in another order, so an entry is off by roundings of the largest ones.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(theirs.abs().max())))


@pytest.mark.run
def test_factors_of_rank_0_are_refused(tmp_path: Path) -> None:
    pair = LoraPair(torch.ones(2, 4), torch.ones(3, 2))
    export_adapter({"x.q_proj": pair}, tmp_path, base="base", target_modules=["q_proj"], scaling=1.0)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = {name: tensor[:0] if "_A" in name else tensor[:, :0] for name, tensor in load_file(weights).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights)
    with pytest.raises(ModelError, match=r"holds for x\.q_proj factors of rank 0, which adapt nothing"):
        read_adapter(tmp_path)
