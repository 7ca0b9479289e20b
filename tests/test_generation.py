"""Answers are the argmax of the logits, whatever the base's own files ask for, and do not depend on the prompts beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hetlora.data.templates import Row
from hetlora.data.tokenization import Tokenization
from hetlora.model.lora_model import LoraModel, load_base, load_tokenizer
from hetlora.training.generation import base_ends, end_tokens, generate_texts
from small_models import random_adapter

pytestmark = pytest.mark.run

ROWS = [Row(text, "") for text in ("add", "what is 3 and 4?", "sum of two numbers, please: 12 and 30", "why?", "mul")]
LONGEST = 12


def model_of(folder: Path | str) -> LoraModel:
    model = LoraModel(load_base(str(folder)), target_modules=None, scaling=2.0)
    model.use(random_adapter(model, rank=2))
    return model


def argmax(model: LoraModel, ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Answer without a cache, a batch or a generation configuration."""
    said: list[int] = []
    with torch.inference_mode():
        while len(said) < LONGEST:
            logits = model.base(input_ids=torch.tensor([[*ids, *said]]), use_cache=False).logits[0, -1]
            if (token := int(logits.argmax())) in ends:
                break
            said.append(token)
    return said


def expected(model: LoraModel, tokenization: Tokenization, ends: Sequence[int]) -> list[str]:
    answers = [argmax(model, tokenization.prompt_ids(row, LONGEST), ends) for row in ROWS]
    return [tokenization.tokenizer.decode(said, skip_special_tokens=True).strip() for said in answers]


def with_settings(tiny: str, folder: Path, settings: dict[str, Any]) -> Path:
    shutil.copytree(tiny, folder)
    (folder / "generation_config.json").write_text(json.dumps({"transformers_version": "5.0.0", **settings}))
    return folder


@pytest.fixture
def tokenization(tiny: str) -> Tokenization:
    return Tokenization(load_tokenizer(tiny), max_length=64)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.9},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3, "length_penalty": 2.0},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"suppress_tokens": list(range(60, 120))},
        {"begin_suppress_tokens": list(range(258))[1:200]},
        {"bad_words_ids": [[token] for token in range(100, 140)]},
        {"do_sample": True, "temperature": 3.0, "top_k": 100},
        {"min_new_tokens": 11},
        {"min_length": 60},
        {"forced_bos_token_id": 77, "forced_eos_token_id": 78},
        {"exponential_decay_length_penalty": [1, 3.0]},
        {"sequence_bias": [[[101], 50.0]]},
        {"encoder_repetition_penalty": 2.0},
        {"guidance_scale": 4.0},
        {"max_length": 3},
        {"max_new_tokens": 1},
        {"max_time": 1e-9},
        {"stop_strings": ["e", "a", " "]},
        {"cache_implementation": "static"},
        {"num_return_sequences": 2, "num_beams": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"assistant_early_exit": 1},
        {"prompt_lookup_num_tokens": 3},
        {"watermarking_config": {"bias": 9.0}},
        {"custom_generate": "somebody/strategy"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_whatever_the_base_asks_for_answers_are_the_argmax(
    tiny: str, tmp_path: Path, tokenization: Tokenization, settings: dict[str, Any]
) -> None:
    model = model_of(tiny)
    wanted = expected(model, tokenization, tokenization.ends(ROWS))
    asked = model_of(with_settings(tiny, tmp_path / "base", settings))
    before = asked.base.generation_config.to_dict()
    assert generate_texts(asked, tokenization, ROWS, LONGEST) == wanted
    assert asked.base.generation_config.to_dict() == before, "the base's own settings are its own again"
    assert len(set(wanted)) > 1


@pytest.mark.parametrize("listed", [True, False], ids=["a list", "a number"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_every_end_of_the_base_ends(
    tiny: str, tmp_path: Path, tokenization: Tokenization, file: str, *, listed: bool
) -> None:
    free = model_of(tiny)
    own = tokenization.ends(ROWS)
    said = [argmax(free, tokenization.prompt_ids(row, LONGEST), own) for row in ROWS]
    end = said[1][3]
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    (base / "generation_config.json").unlink(missing_ok=True)
    settings = json.loads((base / file).read_text()) if (base / file).exists() else {"transformers_version": "5.0.0"}
    (base / file).write_text(json.dumps({**settings, "eos_token_id": [end, 255] if listed else end}))
    model = model_of(base)
    ends = end_tokens(tokenization, model.base, ROWS[0])
    assert set(ends) == {*own, end, *([255] if listed else [])}
    texts = generate_texts(model, tokenization, ROWS, LONGEST)
    assert texts == expected(model, tokenization, ends)
    assert texts[1] == tokenization.tokenizer.decode(said[1][: said[1].index(end)]).strip(), "the end itself is no text"


def test_the_ends_of_a_text_part_count_and_what_is_no_token_does_not() -> None:
    from transformers import Gemma3Config, GenerationConfig

    config = Gemma3Config(eos_token_id=5, text_config={"eos_token_id": [1, 106]})
    assert base_ends(config, GenerationConfig(eos_token_id=[9])) >= {1, 5, 9, 106}
    assert base_ends(GenerationConfig(eos_token_id=-1), GenerationConfig()) == set()


def write_random(folder: Path, tiny: str, kind: str) -> None:
    """Write a random model of a kind that ignores attention masks, or of one that heeds them, with the tiny tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(
        tiny, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors", "generation_config.json")
    )
    sizes = {
        "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
        "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "gpt_neox": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
        },
    }
    settings = {"initializer_range": 0.6, "vocab_size": 258, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = AutoConfig.for_model(kind, **sizes[kind], **settings)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder)


@pytest.mark.parametrize(("kind", "target", "padded"), [("rwkv", "key", False), ("gpt_neox", "query_key_value", True)])
def test_an_answer_does_not_depend_on_the_prompts_beside_it(
    tiny: str,
    tmp_path: Path,
    tokenization: Tokenization,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    target: str,
    *,
    padded: bool,
) -> None:
    write_random(tmp_path / "base", tiny, kind)
    model = LoraModel(load_base(str(tmp_path / "base")), target_modules=[target], scaling=1.0)
    ends = end_tokens(tokenization, model.base, ROWS[0])
    sizes: list[int] = []
    run = model.base.generate

    def counting(ids: torch.Tensor, **settings: Any) -> Any:
        sizes.append(len(ids))
        return run(ids, **settings)

    monkeypatch.setattr(model.base, "generate", counting)
    assert generate_texts(model, tokenization, ROWS, LONGEST) == expected(model, tokenization, ends)
    assert sizes == ([1] * 2 + [2, 1, 1, 5] if padded else [1] * 2 + [2, 1, 1] * 2 + [1] * 5), (
        "two of the prompts have one length"
    )
    sizes.clear()
    generate_texts(model, tokenization, ROWS[:3], LONGEST)
    assert sizes == ([3] if padded else [1, 1, 1]), "tried once"
