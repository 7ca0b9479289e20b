"""A tiny random base model with its own tokenizer, made once a session: tests need no network and no `../shared`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hetlora.lora_model import LoraModel, load_base, load_tokenizer

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real text and trained models, which is not part of the project."""
    if not SHARED.is_dir():
        pytest.skip("../shared, the folder of real text and trained models, is not here")
    return SHARED


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random Llama: 2 layers, hidden 32, grouped keys and values, untied output layer, 258 byte tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(["<end>", "<pad>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny_model(tiny: str) -> LoraModel:
    """The tiny base with LoRA layers on q_proj and v_proj."""
    return LoraModel(load_base(tiny), scaling=2.0)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny: str):
    """The tiny base's tokenizer."""
    return load_tokenizer(tiny)
