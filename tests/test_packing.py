"""Rows of many clients packed into one pass without padding: each row's output is the one it gets alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from drawn_examples import examples
from hetlora.config import load_config
from hetlora.config.preconditions import check_length
from hetlora.core.adapter import batch, map_tensors
from hetlora.data.tokenization import Example
from hetlora.errors import ConfigError
from hetlora.model.lora_model import LoraModel, load_base
from hetlora.model.packing import pack_rows
from hetlora.training.local import micro_batches
from small_models import gpt2, random_adapter

pytestmark = pytest.mark.run

ROWS = st.lists(st.integers(1, 24), max_size=4)


def sliding() -> nn.Module:
    """Attention that sees the last five tokens only, as Mistral's does."""
    from transformers import MistralConfig, MistralForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(2)
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        return MistralForCausalLM(
            MistralConfig(vocab_size=50, num_key_value_heads=1, sliding_window=5, initializer_range=0.3, **shape)
        )


def scaled() -> nn.Module:
    """Logits that are more than a matrix times the last hidden state."""
    from transformers import GraniteConfig, GraniteForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(3)
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        return GraniteForCausalLM(GraniteConfig(vocab_size=50, num_key_value_heads=1, logits_scaling=2.0, **shape))


def recurrent() -> nn.Module:
    """A model in which a token sees its neighbour outside attention: rows laid end to end would leak."""
    from transformers import MambaConfig, MambaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(4)
        return MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4))


def masked() -> nn.Module:
    """A window of six tokens that the model's masks apply and its attention does not receive."""
    from transformers import PhimoeConfig, PhimoeForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(5)
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        return PhimoeForCausalLM(
            PhimoeConfig(
                vocab_size=50,
                num_key_value_heads=1,
                num_local_experts=2,
                sliding_window=6,
                initializer_range=0.3,
                **shape,
            )
        )


def texts(lengths: list[int], seed: int) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Example(tuple(torch.randint(2, 50, (n,), generator=generator).tolist()), seed % n if n else 0) for n in lengths
    ]


def alone(model: LoraModel, row: Example) -> torch.Tensor:
    """Return the losses of a row's scored tokens by transformers' own logits."""
    logits = model.base(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :-1].float()
    values = nn.functional.cross_entropy(logits, torch.tensor(row.ids[1:], dtype=torch.long), reduction="none")
    return values[max(row.scored_from, 1) - 1 :]


BASES = {"llama": None, "gpt2": gpt2, "sliding": sliding, "scaled": scaled}


@pytest.fixture(scope="module", params=BASES)
def model(request: pytest.FixtureRequest, tiny: str) -> LoraModel:
    make = BASES[request.param]
    targets = ["q_proj", "v_proj"] if request.param in ("sliding", "scaled") else None
    return LoraModel(load_base(tiny) if make is None else make(), target_modules=targets)


@examples(25)
@given(clients=st.lists(ROWS, min_size=1, max_size=4).filter(lambda clients: any(map(sum, clients))))
def test_a_packed_row_gets_the_losses_it_gets_alone(model: LoraModel, clients: list[list[int]]) -> None:
    assert model.packs
    rows = [texts(lengths, seed) for seed, lengths in enumerate(clients)]
    adapters = [random_adapter(model, 1 + index % 3, seed=index) for index in range(len(rows))]
    packed = pack_rows(rows)
    with torch.no_grad():
        model.use(batch(adapters), ranks=[1 + index % 3 for index in range(len(rows))])
        together = model.losses(packed)
        expected = []
        for adapter, own in zip(adapters, rows, strict=True):
            model.use(adapter)
            expected += [alone(model, row) for row in sorted(own, key=lambda row: -len(row.ids))]
    torch.testing.assert_close(together, torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert packed.owners.tolist() == [index for index, own in enumerate(rows) for row in own for _ in range(row.scored)]


def test_gradients_of_a_pack_are_those_of_the_rows_alone(model: LoraModel) -> None:
    rows = [texts([9, 3, 20], 1), texts([1, 1], 2), texts([7, 7], 3)]
    adapters = [random_adapter(model, rank, seed=rank) for rank in (2, 3, 1)]
    live = map_tensors(lambda factor: factor.clone().requires_grad_(), batch(adapters))
    model.use(live, ranks=[2, 3, 1])
    model.losses(pack_rows(rows)).sum().backward()
    for index, (adapter, own) in enumerate(zip(adapters, rows, strict=True)):
        leaves = map_tensors(lambda factor: factor.clone().requires_grad_(), adapter)
        model.use(leaves)
        losses = torch.cat([alone(model, row) for row in own])
        if losses.numel():
            losses.sum().backward()
        for path, pair in leaves.items():
            rank = pair.A.shape[0]
            for ours, theirs in (
                (live[path].A.grad[index, :rank], pair.A),
                (live[path].B.grad[index, :, :rank], pair.B),
            ):
                expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
                torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
            assert not bool(live[path].A.grad[index, rank:].any()), "a slot that a client does not have"
    model.use(None)


def test_what_one_row_holds_never_reaches_another(model: LoraModel) -> None:
    rows = [texts([20, 6], 1), texts([17, 2], 2)]
    model.use(None)
    with torch.no_grad():
        before = model.losses(pack_rows(rows))
        changed = [[Example((49,) * 20, 1), rows[0][1]], rows[1]]
        after = model.losses(pack_rows(changed))
    assert torch.equal(
        before[-(rows[1][0].scored + rows[1][1].scored) :], after[-(rows[1][0].scored + rows[1][1].scored) :]
    )


@pytest.mark.parametrize(("make", "target"), [(recurrent, "in_proj"), (masked, "q_proj")])
def test_a_base_that_cannot_be_packed_is_not_and_computes_the_same(make: Callable[[], nn.Module], target: str) -> None:
    model = LoraModel(make(), target_modules=[target])
    assert not model.packs
    rows = [texts([9, 4], 1), texts([12], 2)]
    adapters = [random_adapter(model, 2, seed=seed) for seed in (0, 1)]
    with torch.no_grad():
        model.use(batch(adapters))
        together = model.losses(pack_rows(rows))
        expected = []
        for adapter, own in zip(adapters, rows, strict=True):
            model.use(adapter)
            expected += [alone(model, row) for row in own]
    torch.testing.assert_close(together, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_a_head_that_scales_its_logits_is_left_to_the_model(tiny: str) -> None:
    assert not LoraModel(scaled(), target_modules=["q_proj"]).head.is_linear
    assert LoraModel(load_base(tiny)).head.is_linear


@given(clients=st.lists(ROWS, min_size=1, max_size=4), tokens=st.integers(1, 60))
def test_passes_hold_every_row_once_and_no_more_tokens_than_allowed(clients: list[list[int]], tokens: int) -> None:
    rows = [texts(lengths, seed) for seed, lengths in enumerate(clients)]
    parts = list(micro_batches(rows, tokens))
    assert [[row for part in parts for row in part[index]] for index in range(len(rows))] == rows
    for part in parts:
        lengths = [len(row.ids) for own in part for row in own]
        assert sum(lengths) <= tokens or len(lengths) == 1


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rows_that_would_change_the_positions_of_their_neighbours_are_refused(tmp_path: Path, kind: str) -> None:
    from transformers import LlamaConfig

    path = tmp_path / "run.toml"
    path.write_text(
        '[data]\npath = "stdlib"\ntarget = "{target}"\nmax_length = 128\n[federation]\nrounds = 1\nclients_per_round = 1\n'
        '[ranks]\nkind = "same"\nrank = 2\n[training]\nsteps = 1\n',
        encoding="utf8",
    )
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    if kind == "longrope":
        rope |= {"long_factor": [1.0] * 16, "short_factor": [1.0] * 16}
    base = LlamaConfig(max_position_embeddings=256, hidden_size=64, num_attention_heads=2, rope_parameters=rope)
    with pytest.raises(ConfigError, match=r"data\.max_length = 128: the base nano takes 64 tokens at most"):
        check_length(load_config(path), base)
    check_length(load_config(path, ["data.max_length=64"]), base)
