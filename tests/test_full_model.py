"""Full fine-tuning: parameters as modules, and training against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hetlora.core.adapter import LoraPair, ModuleShape
from hetlora.core.types import Client, ClientUpdate, ServerState, TrainTask
from hetlora.data.tokenization import Example
from hetlora.errors import ShapeError
from hetlora.methods import full
from hetlora.model.full_model import FullModel
from hetlora.model.lora_model import load_base
from hetlora.training.local import LocalTraining, local_batches, train_clients

pytestmark = pytest.mark.run


def make_base(kind: str, tiny: str) -> nn.Module:
    """Build a tiny base: Llama with an output layer of its own or tied to its embeddings, or GPT-2, which is tied too."""
    if kind == "llama":
        return load_base(tiny)
    from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(3)
        if kind == "gpt2":
            return GPT2LMHeadModel(GPT2Config(vocab_size=258, n_positions=64, n_embd=16, n_layer=2, n_head=2)).eval()
        config = AutoConfig.from_pretrained(tiny)
        config.tie_word_embeddings = True
        return LlamaForCausalLM(config).eval()


def rows(count: int = 7) -> list[Example]:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(4, 24, (count,), generator=generator).tolist()
    return [Example(tuple(torch.randint(2, 258, (n,), generator=generator).tolist()), n // 3) for n in lengths]


def plainly(
    base: nn.Module, task: TrainTask, examples: list[Example], settings: LocalTraining
) -> dict[str, torch.Tensor]:
    """The loop a user would write over all parameters; returns their change."""
    parameters = dict(base.requires_grad_(True).named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.SGD
    optimizer = kind(parameters.values(), lr=settings.learning_rate, weight_decay=0.0)
    seed = f"0:{task.round}:{task.client}"
    for batch in local_batches(examples, settings.batch_size, settings.count(len(examples)), seed):
        length = max(len(row.ids) for row in batch)
        ids = torch.tensor([[*row.ids, *[1] * (length - len(row.ids))] for row in batch])
        mask = torch.tensor([[1] * len(row.ids) + [0] * (length - len(row.ids)) for row in batch])
        labels = ids.masked_fill(mask == 0, -100)
        for index, row in enumerate(batch):
            labels[index, : row.scored_from] = -100
        loss = base(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip_norm)
        optimizer.step()
    return {name: (parameter - before[name]).detach() for name, parameter in parameters.items()}


SETTINGS = {
    "adamw, clipped": LocalTraining(learning_rate=1e-3, batch_size=4, steps=4, clip_norm=0.5),
    "sgd": LocalTraining(learning_rate=0.05, batch_size=3, epochs=2, optimizer="sgd", clip_norm=None),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("kind", ["llama", "tied llama", "gpt2"])
def test_training_every_weight_equals_plain_pytorch(tiny: str, kind: str, settings: LocalTraining) -> None:
    model, plain = FullModel(make_base(kind, tiny)), make_base(kind, tiny)
    state = ServerState(model.initial_adapter())
    task = full().distribute(state, Client("a", 1, 7))
    [update] = train_clients(model, [task], [rows()], settings)
    assert isinstance(update, ClientUpdate)
    expected = plainly(plain, task, rows(), settings)
    assert update.adapter.keys() == expected.keys()
    for name, change in expected.items():
        assert torch.equal(update.adapter[name].A, torch.ones(1, 1))
        ours = update.adapter[name].B.view(change.shape)
        # The plain loop rounds the weight itself in every step, where ours rounds its change.
        rounding = 2e-7 * float(plain.get_parameter(name).detach().norm())
        assert float((ours - change).norm()) <= 2e-4 * float(change.norm()) + rounding, name
        assert float(change.norm()) > 0.0, f"{name} did not move"


def test_the_base_is_as_it_was_when_a_client_has_trained(tiny: str) -> None:
    base = make_base("tied llama", tiny)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = FullModel(base)
    task = full().distribute(ServerState(model.initial_adapter()), Client("a", 1, 7))
    [first] = train_clients(model, [task], [rows()], SETTINGS["sgd"])
    assert isinstance(first, ClientUpdate)
    model.use(first.adapter)  # to measure, say
    [again] = train_clients(model, [task], [rows()], SETTINGS["sgd"])
    assert isinstance(again, ClientUpdate)
    assert first.loss == again.loss
    assert all(torch.equal(pair.B, again.adapter[name].B) for name, pair in first.adapter.items())
    model.use(first.adapter)
    assert not torch.equal(base.get_input_embeddings().weight, before["model.embed_tokens.weight"])
    model.use(None)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "tied llama", "gpt2"])
def test_every_parameter_is_one_module_and_a_tied_one_is_counted_once(tiny: str, kind: str) -> None:
    base = make_base(kind, tiny)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    model = FullModel(base)
    assert sum(shape.out_features for shape in model.shapes.values()) == parameters
    assert {shape.in_features for shape in model.shapes.values()} == {1}
    assert ("lm_head.weight" in model.shapes) == (kind == "llama")


def test_changes_act_on_the_weights_themselves(tiny: str) -> None:
    model, plain = FullModel(load_base(tiny)), load_base(tiny)
    adapter = model.initial_adapter()
    name = "model.layers.0.self_attn.q_proj.weight"
    change = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    adapter[name] = LoraPair(adapter[name].A, change.reshape(-1, 1))
    with torch.no_grad():
        plain.get_parameter(name).add_(change)
    ids = torch.arange(2, 12)[None]
    model.use(adapter)
    with torch.inference_mode():
        torch.testing.assert_close(model.base(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0.0, atol=0.0)


def test_what_does_not_fit_is_refused(tiny: str) -> None:
    model = FullModel(load_base(tiny))
    adapter = model.initial_adapter()
    assert model.shapes["model.norm.weight"] == ModuleShape(32, 1)
    with pytest.raises(ShapeError, match="not those of all the model's weights"):
        model.use({name: pair for name, pair in adapter.items() if name != "model.norm.weight"})
    with pytest.raises(ShapeError, match="not those of all the model's weights"):
        model.use(adapter, {"model.norm.weight": torch.ones(32, 1)})
    two = {name: LoraPair(A.expand(2, 1, 1), B.expand(2, *B.shape)) for name, (A, B) in adapter.items()}
    with pytest.raises(ShapeError, match="do not fit one client's weight"):
        model.use(two)
