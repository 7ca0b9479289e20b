"""Activation checkpointing gives the same bits, for every way a base computes, and is refused where it would not."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hetlora.config import load_config
from hetlora.config.build_model import build_model
from hetlora.core.adapter import map_tensors
from hetlora.core.types import BaseDelta, ClientUpdate, TrainTask
from hetlora.data.tokenization import Example
from hetlora.errors import ModelError
from hetlora.methods.hetlora import tail_penalty
from hetlora.model.lora_model import LoraModel, load_base
from hetlora.model.packing import pack_rows
from hetlora.model.recompute import recompute_layers
from hetlora.training.local import LocalTraining, train_clients
from small_federations import phones, write_gpt2

pytestmark = pytest.mark.run

SETTINGS = LocalTraining(learning_rate=1e-2, steps=3, batch_size=3)
ROWS = [
    [Example(tuple(range(2 + row, 2 + row + 5 + 3 * (row % 4))), 1 + row % 3) for row in range(count)]
    for count in (5, 2, 7)
]


def trained(model: LoraModel, *, folded: bool = False, tokens: int = 24) -> list[Any]:
    """Return the updates of three clients of ranks 2, 4 and 3, trained together in several passes a step."""
    start = model.initial_adapter(4, seed=1)
    delta = {path: 0.01 * torch.ones(shape) for path, shape in model.shapes.items()} if folded else {}
    tasks = [
        TrainTask(
            f"c{rank}", 0, rank, {name: type(pair)(pair.A[:rank], pair.B[:, :rank]) for name, pair in start.items()}
        )
        for rank in (2, 4, 3)
    ]
    tasks = [replace(task, folded=BaseDelta(delta)) for task in tasks]
    penalty = None if folded else tail_penalty(tasks, gamma=0.5, penalty=0.1, min_rank=1)
    return train_clients(model, tasks, ROWS, SETTINGS, penalty, tokens_a_pass=tokens)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(
    "kind",
    ["llama", "padded", pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("bfloat16", marks=pytest.mark.slow)],
)
def test_the_factors_are_the_same_bit_for_bit(kind: str, folded: bool, tiny: str, tmp_path: Path):
    folder = tmp_path / kind
    if kind == "gpt2":
        write_gpt2(folder, tiny)
    else:
        shutil.copytree(tiny, folder)
    found = []
    for recompute in (False, True):
        base = load_base(str(folder), dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
        if kind == "padded":
            base.set_attn_implementation("eager")  # which does not pack
        model = LoraModel(base, recompute=recompute)
        assert model.packs == (kind != "padded")
        found.append(trained(model, folded=folded))
    for kept, again in zip(*found, strict=True):
        assert isinstance(kept, ClientUpdate), kept
        assert kept.loss == again.loss
        assert all(
            torch.equal(kept.adapter[name][at], again.adapter[name][at]) for name in kept.adapter for at in (0, 1)
        )


def test_whole_weights_are_refused(tiny: str, tmp_path: Path):
    text = phones(tiny, method={"name": "full"}, training={"recompute": True, "steps": 1, "learning_rate": 1e-3})
    (tmp_path / "run.toml").write_text(text, encoding="utf8")
    with pytest.raises(ModelError, match="method full changes all weights"):
        build_model(load_config(tmp_path / "run.toml"))


@pytest.mark.parametrize("how", ["in another thread", "after other factors"])
def test_the_backward_pass_computes_with_what_the_forward_pass_had(how: str, tiny: str):
    """A graphics processor's backward pass has a thread of its own, in which no factors were set."""
    found = []
    for recompute in (False, True):
        model = LoraModel(load_base(tiny), recompute=recompute)
        start = trained(model)  # any factors but the first, whose B is zero
        adapter = map_tensors(lambda one: one.clone().requires_grad_(), start[1].adapter)
        model.use(adapter)
        loss = model.losses(pack_rows([ROWS[0]])).sum()
        if how == "in another thread":
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        else:
            model.use(map_tensors(lambda one: one + 1.0, adapter))
            loss.backward()
        found.append([factor.grad for pair in adapter.values() for factor in pair])
    for kept, again in zip(*found, strict=True):
        assert kept is not None
        assert torch.equal(kept, again)


def test_a_layer_keeps_its_input_alone(tiny: str):
    kept = []
    for recompute in (False, True):
        model = LoraModel(load_base(tiny), recompute=recompute)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: (sizes.append(tensor.numel()), tensor)[1], lambda tensor: tensor
        ):
            adapter = {
                name: type(pair)(*(f.requires_grad_() for f in pair))
                for name, pair in model.initial_adapter(2, 0).items()
            }
            model.use(adapter)
            model.losses(pack_rows([ROWS[0]])).sum()
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


def test_what_is_not_the_same_the_second_time_is_refused(tiny: str, monkeypatch: pytest.MonkeyPatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward, calls = LlamaMLP.forward, iter(range(10**6))
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x) * (1 + 0.1 * (next(calls) % 3)))
    with pytest.raises(
        ModelError, match=r"give other gradients where they are computed again; set training\.recompute"
    ):
        LoraModel(load_base(tiny), recompute=True)


def test_a_base_without_marked_layers_is_refused(tiny: str):
    model = LoraModel(load_base(tiny))
    with pytest.raises(
        ModelError, match=r"transformers recomputes no layers of Linear; set training\.recompute = false"
    ):
        recompute_layers(torch.nn.Linear(2, 2), model.live)  # type: ignore[arg-type]
