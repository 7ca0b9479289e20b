"""What TRL makes of rows: reads a JSON object from standard input, and writes token ids and labels as JSON.

It runs in a process of its own, since TRL's imports warn and take seconds.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer


def tokenized(folder: str, rows: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """Return `input_ids` and `labels` of rows, as TRL's trainer would train on them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with tempfile.TemporaryDirectory() as output:
        arguments = SFTConfig(output_dir=output, max_length=None, report_to="none", use_cpu=True, bf16=False, **options)
        trainer = SFTTrainer(
            LlamaForCausalLM(config), arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
    return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in trainer.train_dataset]


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    result = {
        folder: {name: tokenized(folder, rows, **options) for name, (rows, options) in asked["rows"].items()}
        for folder in asked["folders"]
    }
    json.dump(result, sys.stdout)
