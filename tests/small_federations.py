"""Small runs for tests of export: one per method and base, once per session."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import tomli_w
import torch

from hetlora.config import parse_config
from hetlora.model.lora_model import LoraModel, load_base
from hetlora.runs.display import QuietDisplay
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.runs.result import RunResult
from proofs.small_run import document, write_rows

__all__ = ["PHONES", "adapted", "logits", "phones", "run_small", "write_gpt2"]

PHONES = ("phone-1", "phone-2", "tablet-1", "tablet-2")


def phones(base: str, **changes: Any) -> str:
    """Return the file of two rounds of HetLoRA on the rows of four clients in `rows.jsonl`, of which nothing is measured.

    Args:
        base: Of `model.base`.
        **changes: Whole sections, instead of those here; None: without it.
    """
    sections = {
        "model": {"base": base, "device": "cpu"},
        "federation": {"rounds": 2, "clients_per_round": 3},
        "training": {"steps": 3, "batch_size": 2, "learning_rate": 1e-2},
        "evaluation": {"every": 0},
        **changes,
    }
    return tomli_w.dumps({name: value for name, value in document("runs", **sections).items() if value is not None})


IDS = torch.arange(2, 42).view(2, 20)


def write_gpt2(folder: Path, tiny: str) -> None:
    """Write a random GPT-2, whose linear layers are Conv1D, with the tokenizer of the tiny Llama."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shutil.copytree(
        tiny, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors", "generation_config.json")
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        settings = {
            "vocab_size": 258,
            "n_positions": 64,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "initializer_range": 0.3,
        }
        GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **settings)).save_pretrained(folder)


def run_small(tiny: str, name: str = "hetlora", *, kind: str = "llama", **changes: Any) -> RunResult:
    """Run a method in the working directory, where a base and rows are made."""
    if not Path(kind).exists():
        if kind == "gpt2":
            write_gpt2(Path(kind), tiny)
        else:
            shutil.copytree(tiny, kind)
        write_rows(Path("rows.jsonl"))
    arguments = {"gamma": 0.5, "penalty": 5.0, "min_rank": 1} if name == "hetlora" else {}
    sections = {
        "name": name,
        "model": {"base": kind, "device": "cpu", "scaling": 1.7} if name != "full" else {"base": kind, "device": "cpu"},
        "method": {"name": name, **arguments},
        "federation": {"rounds": 2, "clients_per_round": 3},
        "training": {"steps": 2, "batch_size": 2, "learning_rate": 5e-2},
        **changes,
    }
    return LocalExperiment(parse_config(document("runs", **sections)), QuietDisplay()).run()


def adapted(result: RunResult, adapter: Any, *, kind: str = "llama") -> torch.Tensor:
    """Return the logits of our own model with these factors and what the run has folded."""
    model = LoraModel(load_base(kind), scaling=1.7)
    model.use(adapter, result.state.folded.delta or None)
    return logits(model.base)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out
