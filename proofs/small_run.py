"""The smallest real run, for proofs and tests: a random base, a few clients' rows, and a comparison of runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hetlora.config import RunConfig, parse_config
from hetlora.runs.folder import read_summary
from hetlora.runs.records import read_records

__all__ = ["CLIENTS", "Ended", "config_of", "document", "ended", "rows_of", "write_base", "write_rows"]

CLIENTS = ("phone 1", "phone/2", "tablet 1", "tablet 2")


def write_base(folder: Path, *, layers: int = 2) -> None:
    """Write a random Llama with its tokenizer: hidden 32, grouped keys and values, untied output layer, 258 byte tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
        num_hidden_layers=layers,
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


def rows_of(clients: Sequence[str] = CLIENTS, count: int = 6, train: int = 4) -> list[dict[str, str]]:
    """Return so many rows a client, of which so many are for training and the others held out."""
    return [
        {
            "device": client,
            "question": f"what is {index}?",
            "answer": f"the number {index} of {client}",
            "split": "train" if index < train else "test",
        }
        for client in clients
        for index in range(count)
    ]


def write_rows(path: Path, clients: Sequence[str] = CLIENTS, count: int = 6, train: int = 4) -> None:
    """Write the rows of clients."""
    lines = (json.dumps(row) + "\n" for row in rows_of(clients, count, train))
    path.write_text("".join(lines), encoding="utf8")


def document(output: str, **changes: Any) -> dict[str, Any]:
    """Return the configuration of a run in the working directory, where ``base`` and ``rows.jsonl`` are, as plain data.

    HetLoRA that prunes, two tiers of ranks, and clients that drop out; some rounds are measured.

    Args:
        output: Where its folder goes.
        **changes: Whole sections, instead of those here.
    """
    return {
        "name": "phones",
        "output": output,
        "model": {"base": "base", "device": "cpu"},
        "data": {
            "path": "rows.jsonl",
            "client_field": "device",
            "prompt": "{question}",
            "target": " {answer}",
            "max_length": 48,
        },
        "federation": {"rounds": 4, "clients_per_round": 3, "dropout": 0.2},
        "ranks": {"kind": "tiers", "tiers": [{"rank": 2, "share": 0.5}, {"rank": 4, "share": 0.5}]},
        "method": {"name": "hetlora", "gamma": 0.5, "penalty": 5.0, "min_rank": 1},
        "training": {"steps": 2, "batch_size": 2, "learning_rate": 1e-2},
        "evaluation": {"every": 2, "generate": 2, "max_new_tokens": 4},
        **changes,
    }


def config_of(output: str, **changes: Any) -> RunConfig:
    """Return `document`, validated."""
    return parse_config(document(output, **changes), "the configuration of a small run")


class Ended(NamedTuple):
    """The files of a complete run, without times and paths."""

    learned: dict[str, bytes]
    records: list[dict[str, Any]]
    summary: dict[str, Any]
    text: str
    """Records and summary as they are written: in the order of their keys, which dictionaries compare without."""


def ended(folder: Path) -> Ended:
    """Read the files of a complete run."""
    summary = read_summary(folder)
    assert summary is not None, "the run is complete"
    files = [path for name in ("adapter", "adapters", "model") for path in sorted((folder / name).rglob("*"))]
    learned = {str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()}
    records = read_records(folder / "records.jsonl")
    elsewhere = {"seconds", "peak_megabytes", "adapter", "records", "config"}
    timeless = [{key: value for key, value in record.items() if key not in elsewhere} for record in records]
    timeless_summary = {key: value for key, value in summary.items() if key not in elsewhere}
    return Ended(learned, timeless, timeless_summary, json.dumps([timeless, timeless_summary]))
