"""Train ``nano``, the bundled base model: a small Llama on the docstrings and code of installed packages.

The corpus is every documented function and class of the packages in `PACKAGES` (permissive licences, read from the
environment this runs in), one document each, in its natural order: signature, docstring, body. A document that
shares a run of `SHINGLE` words with the bundled federation ``stdlib`` is dropped, so that the base saw none of it.

    python tools/pretrain_nano.py --out src/hetlora/data/bundled/nano --tokens 12000000
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# import name -> (distribution, licence). At most MEGABYTES of each, so that no one library sets the style.
PACKAGES = {
    "accelerate": ("accelerate", "Apache-2.0"),
    "aiohttp": ("aiohttp", "Apache-2.0"),
    "alembic": ("alembic", "MIT"),
    "click": ("click", "BSD-3-Clause"),
    "datasets": ("datasets", "Apache-2.0"),
    "fastapi": ("fastapi", "MIT"),
    "flwr": ("flwr", "Apache-2.0"),
    "fsspec": ("fsspec", "BSD-3-Clause"),
    "httpx": ("httpx", "BSD-3-Clause"),
    "huggingface_hub": ("huggingface_hub", "Apache-2.0"),
    "jinja2": ("Jinja2", "BSD-3-Clause"),
    "joblib": ("joblib", "BSD-3-Clause"),
    "networkx": ("networkx", "BSD-3-Clause"),
    "nltk": ("nltk", "Apache-2.0"),
    "numpy": ("numpy", "BSD-3-Clause"),
    "pandas": ("pandas", "BSD-3-Clause"),
    "peft": ("peft", "Apache-2.0"),
    "pydantic": ("pydantic", "MIT"),
    "pygments": ("Pygments", "BSD-2-Clause"),
    "ray": ("ray", "Apache-2.0"),
    "requests": ("requests", "Apache-2.0"),
    "rich": ("rich", "MIT"),
    "sqlalchemy": ("SQLAlchemy", "MIT"),
    "starlette": ("starlette", "BSD-3-Clause"),
    "sympy": ("sympy", "BSD-3-Clause"),
    "torch": ("torch", "BSD-3-Clause"),
    "transformers": ("transformers", "Apache-2.0"),
    "typer": ("typer", "MIT"),
    "urllib3": ("urllib3", "MIT"),
}
MEGABYTES = 5.0
MAX_DOCUMENT_CHARACTERS = 1_500
HELD_OUT = 100  # one document in so many, by its hash
SHINGLE = 12  # words in a row; shorter runs are shared by chance ("return a list of all the ...")
VOCABULARY, HIDDEN, LAYERS, HEADS, INTERMEDIATE, LENGTH = 4096, 192, 5, 6, 512, 256
END, PAD = "<|end|>", "<|pad|>"
ROOT = Path(__file__).resolve().parent.parent
FEDERATION = ROOT / "src/hetlora/data/bundled/stdlib/rows.jsonl.gz"


def main() -> None:
    """Read the corpus, train the tokenizer and the model, measure it on held-out documents and save all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=12_000_000, help="how many tokens to train on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)

    train, held_out, counts = read_corpus()
    tokenizer = train_tokenizer(train)
    model = LlamaForCausalLM(model_config(tokenizer))
    stream, test = encode(tokenizer, train, options.seed), encode(tokenizer, held_out, options.seed)
    print(f"{model.num_parameters():,} parameters, {len(stream):,} tokens to train on, {len(test):,} held out")

    fit(model, stream, options.tokens, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    perplexity = perplexity_of(model.to(torch.float32), test)  # of the bfloat16 weights that were saved
    (options.out / "README.md").write_text(model_card(options, counts, len(stream), len(test), perplexity, model))
    print(f"held-out perplexity {perplexity:.2f}; saved to {options.out}")


def read_corpus() -> tuple[list[str], list[str], dict[str, tuple[int, float, int]]]:
    """Return the training documents, the held-out ones (1 in 100 by hash) and the counts a package."""
    forbidden = federation_shingles()
    train: list[str] = []
    held_out: list[str] = []
    counts: dict[str, tuple[int, float, int]] = {}
    seen: set[bytes] = set()
    for package in PACKAGES:
        size = kept = dropped = 0
        for document in documents_of(package):
            digest = hashlib.sha256(" ".join(document.split()).encode()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            if forbidden & set(shingles(document)):
                dropped += 1
                continue
            (held_out if int.from_bytes(digest[:4], "big") % HELD_OUT == 0 else train).append(document)
            size, kept = size + len(document), kept + 1
            if size > MEGABYTES * 1e6:
                break
        counts[package] = (kept, size / 1e6, dropped)
        print(f"{package}: {kept} documents, {size / 1e6:.1f} MB, {dropped} dropped for sharing text with stdlib")
    return train, held_out, counts


def documents_of(package: str) -> Iterator[str]:
    """Yield the documented functions and classes of an installed package, files in a hashed, stable order."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed here; install {PACKAGES[package][0]} or take it off the list")
    root = Path(spec.submodule_search_locations[0])
    files = [path for path in root.rglob("*.py") if not is_test(path.relative_to(root))]
    for path in sorted(files, key=lambda path: hashlib.sha256(str(path.relative_to(root)).encode()).digest()):
        source = path.read_text("utf8", errors="ignore")
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        lines = source.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(node):
                text = "\n".join(line[node.col_offset :] for line in lines[node.lineno - 1 : node.end_lineno])
                yield text[:MAX_DOCUMENT_CHARACTERS]


def is_test(path: Path) -> bool:
    """Test files and vendored copies are left out."""
    return any(part in {"tests", "test", "_vendor", "vendored", "thirdparty_files"} for part in path.parts)


def federation_shingles() -> set[int]:
    """Return the hashes of every run of `SHINGLE` words in the prompts and targets of the bundled federation."""
    with gzip.open(FEDERATION, "rt", encoding="utf8") as file:
        rows = [json.loads(line) for line in file]
    return {shingle for row in rows for key in ("prompt", "target") for shingle in shingles(row[key])}


def shingles(text: str) -> Iterator[int]:
    """Yield a hash for every run of `SHINGLE` words; letters and digits only, so that layout does not hide a copy.

    The hash has 32 bits: about one document in a hundred is dropped by chance, on the safe side.
    """
    words = re.findall(r"\w+", text.lower())
    for start in range(len(words) - SHINGLE + 1):
        yield zlib.crc32(" ".join(words[start : start + SHINGLE]).encode())


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: every text has a spelling, no token is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END, PAD], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return the shape of nano; embeddings are tied."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str], seed: int) -> np.ndarray:
    """Return one stream of token ids, documents shuffled, an end token after each."""
    order = np.random.default_rng(seed).permutation(len(documents))
    encoded = tokenizer._tokenizer.encode_batch([documents[index] for index in order])
    end = tokenizer.eos_token_id
    return np.concatenate([np.asarray([*item.ids, end], dtype=np.uint16) for item in encoded])


def fit(model: LlamaForCausalLM, stream: np.ndarray, tokens: int, seed: int, batch: int = 32) -> None:
    """Train with Muon on the matrices and AdamW on the rest; warm-up, then constant, then linear decay to zero."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    steps, micro = tokens // (batch * LENGTH), 8

    def schedule(step: int) -> float:
        return min((step + 1) / 50, 1.0, (steps - step) / (0.35 * steps))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
    rng, began, running = np.random.default_rng(seed), time.monotonic(), math.log(VOCABULARY)
    chunks = np.arange(len(stream) // LENGTH)
    order = np.concatenate([rng.permutation(chunks) for _ in range(math.ceil(steps * batch / len(chunks)))])
    model.train()
    for step in range(steps):
        rows = np.stack([stream[i * LENGTH : (i + 1) * LENGTH] for i in order[step * batch : (step + 1) * batch]])
        for part in torch.from_numpy(rows.astype(np.int64)).split(micro):
            loss = model(input_ids=part, labels=part, use_cache=False).loss * (len(part) / batch)
            loss.backward()
            running += 0.02 * (float(loss.detach()) * batch / len(part) - running)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        if step % 20 == 0:
            done = (step + 1) * batch * LENGTH
            print(
                f"step {step}/{steps} loss {running:.3f} {done / (time.monotonic() - began):.0f} tokens/s", flush=True
            )


@torch.no_grad()
def perplexity_of(model: LlamaForCausalLM, stream: np.ndarray) -> float:
    """Return exp of the mean negative log-likelihood a token over whole windows of the stream."""
    model.eval()
    windows = torch.from_numpy(stream[: len(stream) // LENGTH * LENGTH].astype(np.int64)).view(-1, LENGTH)
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in windows.split(8)]
    return math.exp(sum(losses) / len(windows))


def model_card(
    options: argparse.Namespace,
    counts: dict[str, tuple[int, float, int]],
    train_tokens: int,
    test_tokens: int,
    perplexity: float,
    model: LlamaForCausalLM,
) -> str:
    """Say what the model is, what it was trained on and under which licences, and how good it is."""
    rows = "\n".join(
        f"| {PACKAGES[name][0]} {importlib.metadata.version(PACKAGES[name][0]).split('+')[0]} | {PACKAGES[name][1]} | {kept} | {size:.1f} | {dropped} |"
        for name, (kept, size, dropped) in counts.items()
    )
    return f"""---
license: apache-2.0
language: en
tags: [code, docstrings]
---
# nano

A Llama of {model.num_parameters():,} parameters (hidden {HIDDEN}, {LAYERS} layers, {HEADS} heads, {VOCABULARY} byte-level BPE tokens, tied
embeddings, trained at {LENGTH} tokens), made for hetlora so that a federation runs on a real trained model with nothing
downloaded. It knows what Python and its docstrings look like; it is of no use outside tests and demonstrations.

- Command: `python tools/pretrain_nano.py --out src/hetlora/data/bundled/nano --tokens {options.tokens}`, seed {options.seed}.
- Seen: {options.tokens / 1e6:.1f} M tokens, {options.tokens / train_tokens:.2f} passes over {train_tokens / 1e6:.2f} M tokens of text.
- **Held-out perplexity {perplexity:.2f}** a token, on {test_tokens:,} tokens of held-out documents of the same packages, measured on
  the bfloat16 weights in this folder.
- Not seen: Python's standard library. Every document that shares {SHINGLE} words in a row with a prompt or target of the bundled
  federation `stdlib` was dropped (last column).

## Texts and licences
Documented functions and classes of these packages, as installed; at most {MEGABYTES:.0f} MB of each, test files left out. The licences
permit redistribution with their notices; only trained weights are here, none of the texts.

| package | licence | documents | MB | dropped |
| --- | --- | --- | --- | --- |
{rows}
"""


if __name__ == "__main__":
    main()
