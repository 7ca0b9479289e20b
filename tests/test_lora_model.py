"""LoRA layers over one frozen base: their output, their targets, and their refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hetlora.core.adapter import LoraPair, batch, map_tensors
from hetlora.data.tokenization import Example
from hetlora.errors import ModelError, ShapeError
from hetlora.model.lm_head import linear_cross_entropy
from hetlora.model.lora_model import LoraModel, load_base, load_tokenizer, pick_device
from hetlora.model.packing import pack_rows
from small_models import gpt2, losses_of, random_adapter

pytestmark = pytest.mark.run


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tiny: str) -> nn.Module:
    return load_base(tiny) if request.param == "llama" else gpt2()


def logits(model: LoraModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.base(input_ids=ids).logits


def test_the_factors_act_as_if_merged_into_the_weight(base: nn.Module) -> None:
    model = LoraModel(base, scaling=1.5)
    adapter = random_adapter(model, 3)
    ids = torch.randint(2, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    model.use(adapter)
    ours = logits(model, ids)
    model.use(None)
    unadapted = logits(model, ids)
    with torch.no_grad():
        for path, (A, B) in adapter.items():
            weight = model.layers[path].base.weight
            change = 1.5 * B @ A
            weight += change if isinstance(model.layers[path].base, nn.Linear) else change.T
    torch.testing.assert_close(ours, logits(model, ids), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, unadapted, atol=1e-2)


def test_groups_of_clients_compute_as_each_alone(base: nn.Module) -> None:
    model = LoraModel(base)
    clients = [random_adapter(model, rank, seed=rank) for rank in (1, 4, 2)]
    ids = torch.randint(2, 50, (6, 9), generator=torch.Generator().manual_seed(0))
    model.use(batch(clients))
    together = logits(model, ids)
    for index, client in enumerate(clients):
        model.use(client)
        own = slice(2 * index, 2 * index + 2)
        alone = logits(model, ids[own])
        # A logit near 0 is a sum of terms that are not: its rounding is a share (1e-6 to 2e-6 of float32) of the others' size.
        torch.testing.assert_close(together[own], alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))
        assert float(alone.abs().max()) < 10.0, "so it is no more than 1e-4"


def test_only_scored_tokens_cost_logits_and_their_losses_are_those_of_the_whole(
    base: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LoraModel(base)
    model.use(random_adapter(model, 2))
    ids = torch.randint(2, 50, (3, 12), generator=torch.Generator().manual_seed(0))
    rows = [Example(tuple(row), begin) for row, begin in zip(ids.tolist(), (7, 12, 0), strict=True)]
    computed: list[int] = []
    losses = model.head.losses

    def spied(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        computed.append(hidden.shape[0])
        return losses(hidden, targets)

    monkeypatch.setattr(model.head, "losses", spied)
    values = model.losses(pack_rows([rows]))
    assert computed == [sum(row.scored for row in rows)] == [5 + 0 + 11]
    whole = logits(model, ids)
    assert whole.shape[:2] == ids.shape, "the output layer is whole again afterwards"
    expected = nn.functional.cross_entropy(whole[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(values, torch.cat([expected[0, 6:], expected[2]]), rtol=1e-4, atol=1e-5)


def test_losses_keep_nothing_of_the_output_layer_after_the_backward_pass() -> None:
    """The losses of a pass live on while the next one runs, and a gradient `[n, d]` beside them would be in its peak."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, generator=generator, requires_grad=True)
    losses = linear_cross_entropy(hidden, torch.randn(7, 3, generator=generator), None, torch.arange(5))
    losses.sum().backward()
    with pytest.raises(RuntimeError, match="already been freed"):
        losses.sum().backward()


def test_the_base_is_frozen_and_gradients_reach_the_factors_alone(tiny_model: LoraModel) -> None:
    assert not any(parameter.requires_grad for parameter in tiny_model.base.parameters())
    adapter = map_tensors(lambda factor: factor.requires_grad_(), random_adapter(tiny_model, 2))
    tiny_model.use(adapter)
    ids = torch.randint(2, 50, (1, 9), generator=torch.Generator().manual_seed(0))
    losses_of(tiny_model, ids).sum().backward()
    assert all(float(factor.grad.norm()) > 0 for pair in adapter.values() for factor in pair)


def test_a_fresh_adapter_changes_nothing_and_depends_on_its_seed_alone(tiny_model: LoraModel) -> None:
    adapter = tiny_model.initial_adapter(4, seed=5)
    ids = torch.randint(2, 50, (1, 9), generator=torch.Generator().manual_seed(0))
    tiny_model.use(None)
    before = logits(tiny_model, ids)
    tiny_model.use(adapter)
    assert torch.equal(before, logits(tiny_model, ids))
    again, other = tiny_model.initial_adapter(4, seed=5), tiny_model.initial_adapter(4, seed=6)
    path = next(iter(adapter))
    assert torch.equal(adapter[path].A, again[path].A)
    assert not torch.equal(adapter[path].A, other[path].A)
    bound = tiny_model.shapes[path].in_features ** -0.5
    assert 0.9 * bound < float(adapter[path].A.abs().max()) <= bound


def test_target_modules_by_architecture_and_by_name(tiny: str) -> None:
    assert LoraModel(load_base(tiny)).target_modules == ("q_proj", "v_proj")
    assert LoraModel(gpt2()).target_modules == ("c_attn",)
    one = LoraModel(load_base(tiny), target_modules=["model.layers.1.mlp.up_proj"])
    assert list(one.shapes) == ["model.layers.1.mlp.up_proj"]
    assert one.shapes["model.layers.1.mlp.up_proj"] == (48, 32)
    assert LoraModel(gpt2()).shapes["transformer.h.0.attn.c_attn"] == (48, 16)


def test_an_unknown_module_name_is_refused_with_those_there_are(tiny: str) -> None:
    with pytest.raises(ModelError, match=r"'query'.*LlamaForCausalLM has down_proj, gate_proj, k_proj"):
        LoraModel(load_base(tiny), target_modules=["q_proj", "query"])


def test_an_adapter_that_does_not_fit_is_refused_whole(tiny_model: LoraModel) -> None:
    adapter = random_adapter(tiny_model, 2)
    missing = dict(list(adapter.items())[1:])
    with pytest.raises(ShapeError, match=r"differ in model\.layers\.0\.self_attn\.q_proj"):
        tiny_model.use(missing)
    path, (A, B) = next(iter(adapter.items()))
    with pytest.raises(ShapeError, match=rf"{path}: A \(2, 31\)"):
        tiny_model.use({**adapter, path: LoraPair(A[:, 1:], B)})
    tiny_model.use(batch([adapter, adapter]))
    with pytest.raises(ShapeError, match="3 rows cannot be split among 2 clients"):
        logits(tiny_model, torch.zeros(3, 4, dtype=torch.long))


def test_a_layer_that_sees_other_tokens_than_those_of_the_pack_is_refused(tiny_model: LoraModel) -> None:
    """A router sends an expert some of the tokens, in an order of its own: whose they are is not known."""
    adapter = random_adapter(tiny_model, 2)
    tiny_model.use(batch([adapter, adapter]))
    layer = next(iter(tiny_model.layers.values()))
    layer.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :4],))
    with pytest.raises(ShapeError, match=r"q_proj sees 4 tokens, and not the 6 of the pass"):
        tiny_model.losses(pack_rows([[Example((3, 4, 5), 1)], [Example((6, 7, 8), 1)]]))


def test_what_cannot_be_loaded_says_why_and_what_can(tmp_path: Path, tiny: str) -> None:
    with pytest.raises(ModelError, match=r"/no/such/base.*is not a folder; give a folder with config.json"):
        load_base("/no/such/base")
    with pytest.raises(ModelError, match=r"has no config\.json, so it is no base model; give a folder"):
        load_base(str(tmp_path))
    load_base(tiny).save_pretrained(tmp_path / "mute")
    with pytest.raises(ModelError, match="no tokenizer that loads"):
        load_tokenizer(str(tmp_path / "mute"))
    with pytest.raises(ModelError, match="'cuda' is not available"):
        pick_device("cuda")
