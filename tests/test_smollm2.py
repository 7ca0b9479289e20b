"""A model that others have made, from its file to llama.cpp: SmolLM2-135M-Instruct, which `make smollm2` brings."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf", reason="needs hetlora[gguf]")
pytest.importorskip("xllamacpp", reason="needs xllamacpp, llama.cpp as a wheel")

from hetlora.core.adapter import LoraPair
from hetlora.data.tokenization import Example
from hetlora.model.gguf_adapter import names_of, write_gguf_adapter
from hetlora.model.lora_model import LoraModel, load_base, load_tokenizer
from hetlora.model.packing import pack_rows
from llama_cpp import LlamaCpp

ROOT = Path(__file__).resolve().parent.parent
FILE, FOLDER = ROOT / "build/SmolLM2-135M-Instruct.Q4_1.gguf", ROOT / "build/smollm2-135m"
ROWS = ROOT / "src/hetlora/data/bundled/stdlib/rows.jsonl.gz"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="make smollm2 has not brought the model"),
]


@pytest.fixture(scope="module")
def model() -> LoraModel:
    return LoraModel(load_base(str(FOLDER)), target_modules=["q_proj", "k_proj", "v_proj", "gate_proj"])


def texts(count: int) -> list[str]:
    rows = [json.loads(line) for line in gzip.decompress(ROWS.read_bytes()).decode("utf8").splitlines()]
    return [row["prompt"] for row in rows[:: len(rows) // count]][:count]


def test_texts_have_the_tokens_that_llama_cpp_gives_them():
    tokenizer, theirs = load_tokenizer(str(FOLDER)), LlamaCpp(FILE)
    given = [*texts(450), "In 1984 there were 12345 men.", "x = 3.14159  # ≈ π", "Größe 日本語 🙂"]
    differ = [text for text in given if tokenizer(text, add_special_tokens=False).input_ids != theirs.tokens(text)]
    assert differ == []


def test_over_the_file_llama_cpp_finds_the_loss_of_the_run(model: LoraModel, tmp_path: Path):
    """Its weights are the same numbers. llama.cpp rounds what it multiplies them with to eight bits, token by token by 0.12."""
    generator, some = torch.Generator().manual_seed(1), {"q_proj": 4, "k_proj": 16, "v_proj": 3, "gate_proj": 4}
    adapter = {}
    for path, (out, into) in model.shapes.items():
        rank = some[path.rpartition(".")[2]]
        A, B = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
        adapter[path] = LoraPair(A / into**0.5, B * 0.2 / rank**0.5)
    file = tmp_path / "adapter.gguf"
    write_gguf_adapter(adapter, file, names_of(model.base.config), scaling=model.scaling, base="SmolLM2")
    theirs, tokenizer, vocabulary = LlamaCpp(FILE, file), load_tokenizer(str(FOLDER)), model.base.config.vocab_size
    found, ours, base = [], [], []
    for text in texts(20)[3:7]:
        ids = tokenizer(text).input_ids[:24]
        with torch.inference_mode():
            for losses, used in ((ours, adapter), (base, None)):
                model.use(used)
                losses += model.losses(pack_rows([[Example(tuple(ids), 1)]])).tolist()
        found += [-float(theirs.log_probabilities(ids[:at], vocabulary)[ids[at]]) for at in range(1, len(ids))]
    apart = torch.tensor(found) - torch.tensor(ours)
    assert abs(float(apart.mean())) < 0.05
    assert float(apart.std()) < 0.3
    assert float((torch.tensor(base) - torch.tensor(ours)).std()) > 0.5, "the adapter matters"
