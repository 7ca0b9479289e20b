"""Small bases and adapters that tests of the model share."""

from __future__ import annotations

import torch
from torch import nn

from hetlora.core.adapter import LoraPair
from hetlora.data.tokenization import Example
from hetlora.model.lora_model import LoraModel
from hetlora.model.packing import pack_rows


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2))


def random_adapter(model: LoraModel, rank: int, seed: int = 0) -> dict[str, LoraPair]:
    generator = torch.Generator().manual_seed(seed)
    return {
        path: LoraPair(
            torch.randn(rank, shape.in_features, generator=generator),
            torch.randn(shape.out_features, rank, generator=generator),
        )
        for path, shape in model.shapes.items()
    }


def losses_of(model: LoraModel, ids: torch.Tensor, clients: int = 1) -> torch.Tensor:
    """Return the loss of every token but a row's first; each client has the same number of rows, one after the other."""
    rows = [Example(tuple(row), 1) for row in ids.tolist()]
    each = len(rows) // clients
    return model.losses(pack_rows([rows[each * client : each * (client + 1)] for client in range(clients)]))
