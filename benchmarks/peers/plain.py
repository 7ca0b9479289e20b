"""The client that a user of transformers and PEFT would write: padded batches, AdamW, one client at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.peers.work import SCALING, TARGETS, Work
from hetlora.data.tokenization import Example

__all__ = ["PlainClient", "pad"]


class PlainClient:
    """Trains a received adapter; the model is loaded once a process."""

    def __init__(self, work: Work) -> None:
        base = AutoModelForCausalLM.from_pretrained(
            work.base, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
        config = LoraConfig(
            task_type="CAUSAL_LM", r=work.rank, lora_alpha=SCALING * work.rank, target_modules=list(TARGETS)
        )
        self.work = work
        self.model = get_peft_model(base, config)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def fit(
        self, adapter: Mapping[str, Tensor], batches: Iterable[Sequence[Example]]
    ) -> tuple[dict[str, Tensor], float]:
        """Return the trained adapter and the mean loss over the steps."""
        set_peft_model_state_dict(self.model, dict(adapter))
        self.model.train()
        optimizer = torch.optim.AdamW(self.parameters, lr=self.work.learning_rate, weight_decay=0.0)
        losses = []
        for batch in batches:
            loss = self.model(**pad(batch, self.work.pad_id)).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()
            losses.append(loss.item())
        return get_peft_model_state_dict(self.model), sum(losses) / len(losses)


def pad(batch: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Return what the model is called with: rows padded on the right to the longest."""
    length = max(len(example.ids) for example in batch)
    ids = torch.full((len(batch), length), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(batch):
        end = len(example.ids)
        ids[row, :end] = torch.tensor(example.ids)
        mask[row, :end] = 1
        labels[row, example.scored_from : end] = ids[row, example.scored_from : end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
