"""The same federated training for both sides of a comparison, and the check that their results are equal."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from hetlora.config import load_config
from hetlora.config.build_data import load_federation, make_tokenization
from hetlora.core.round import run_round
from hetlora.core.sampling import sample_cohort
from hetlora.core.types import Client, ServerState
from hetlora.data.tokenization import Example
from hetlora.methods import METHODS
from hetlora.model.lora_model import LoraModel, load_base, load_tokenizer
from hetlora.training.local import LocalTraining, local_batches
from hetlora.training.simulation import SimulationEngine

__all__ = [
    "LOSS_TOLERANCE",
    "TARGETS",
    "UPDATE_TOLERANCE",
    "Answer",
    "Ours",
    "Work",
    "check_same",
    "random_llama",
    "tokenized",
]

TARGETS = ("q_proj", "v_proj")
SCALING = 2.0
LOSS_TOLERANCE = 1e-4
"""Largest difference of a client's mean loss, in nats a token."""
UPDATE_TOLERANCE = 1e-3
"""Largest `‖x - y‖ / ‖x - x_0‖` of the global adapters x and y that the sides reached from the same x_0: float32 rounds
otherwise in a batched pass, and AdamW divides by small numbers."""

SIZES = {0.3: (48, 128, 4), 1: (112, 296, 4), 6: (256, 688, 6), 20: (512, 1376, 6), 50: (512, 1376, 15)}
"""Millions of parameters of random Llamas over the bundled tokenizer's 4,096 tokens, to their hidden and intermediate sizes and
numbers of layers."""

Answer = tuple[dict[str, Tensor], dict[str, float]]
"""After a round: the global adapter under PEFT's names, and every client's mean training loss."""


@dataclass(frozen=True)
class Work:
    """A federated training: FedAvg by examples on LoRA factors of one rank, every client with a fresh AdamW.

    Attributes:
        name: Its name in the table.
        base: Folder of the base model; it computes in float32.
        rows: Client to its rows.
        pad_id: Token id of the padding.
        cohort_size: Clients per round.
        steps: Steps per client and round.
        batch_size: Rows per step.
        rank: Rank of every client.
        learning_rate: Of AdamW; gradients are clipped to norm 1.
        seed: Of cohorts, batches and the first adapter.
    """

    name: str
    base: str
    rows: Mapping[str, Sequence[Example]]
    pad_id: int
    cohort_size: int = 10
    steps: int = 5
    batch_size: int = 8
    rank: int = 8
    learning_rate: float = 1e-3
    seed: int = 0

    def cohort(self, round_number: int) -> list[str]:
        """Return the clients of a round."""
        return sample_cohort(sorted(self.rows), self.cohort_size, round_number, self.seed)

    def batches(self, round_number: int, client: str) -> Iterator[list[Example]]:
        """Yield a client's batches in a round."""
        return local_batches(self.rows[client], self.batch_size, self.steps, f"{self.seed}:{round_number}:{client}")

    def train(self, client: str) -> Sequence[Example]:
        """Return the rows of a client, as hetlora's engine asks for them."""
        return self.rows[client]

    def write(self, path: Path) -> None:
        """Write it as JSON, for a peer in another process."""
        path.write_text(json.dumps(asdict(self)), encoding="utf8")

    @classmethod
    def read(cls, path: Path | str) -> Work:
        """Read what `write` wrote."""
        fields = json.loads(Path(path).read_text("utf8"))
        rows = {name: [Example(tuple(ids), first) for ids, first in own] for name, own in fields.pop("rows").items()}
        return cls(rows=rows, **fields)


@functools.cache
def tokenized(example: str, *changes: str) -> tuple[dict[str, list[Example]], int]:
    """Return the training rows of an example configuration as tokens, by client, and the padding's id."""
    config = load_config(
        Path(__file__).parents[2] / "examples" / f"{example}.toml", ["evaluation.generate=0", *changes]
    )
    tokenizer = load_tokenizer(config.model.base)
    tokenization = make_tokenization(config, tokenizer)
    clients = load_federation(config).clients
    return {name: tokenization.examples(own.train) for name, own in clients.items()}, int(tokenizer.pad_token_id)


def random_llama(millions: float, folder: Path) -> str:
    """Write a Llama of random weights and return its folder: for time, which weights it has does not matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers = SIZES[millions]
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=max(4, hidden // 64),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    place = folder / f"llama-{millions}"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(place)
    return str(place)


class Ours:
    """Does the work with hetlora's engine, a round at a call."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.model = LoraModel(load_base(work.base), target_modules=TARGETS, scaling=SCALING)
        settings = LocalTraining(learning_rate=work.learning_rate, batch_size=work.batch_size, steps=work.steps)
        self.engine = SimulationEngine(self.model, work, settings, seed=work.seed)
        self.method = METHODS["fedavg"]()
        self.state = ServerState(self.model.initial_adapter(work.rank, work.seed))

    def adapter(self) -> dict[str, Tensor]:
        """Return the global adapter under PEFT's names."""
        return {
            f"base_model.model.{module}.lora_{letter}.weight": factor
            for module, pair in self.state.adapter.items()
            for letter, factor in zip("AB", pair, strict=True)
        }

    def round(self) -> Answer:
        """Do the next round."""
        names = self.work.cohort(self.state.round)
        cohort = [Client(name, self.work.rank, len(self.work.rows[name])) for name in names]
        self.state, report = run_round(self.state, self.method, self.engine, cohort)
        return self.adapter(), {client.client: client.loss for client in report.clients}


def check_same(first: Mapping[str, Tensor], theirs: Answer, ours: Answer) -> None:
    """Raise unless both sides reached the same losses and the same adapter from the first one.

    Raises:
        AssertionError: They did not.
    """
    (adapter, losses), (our_adapter, our_losses) = theirs, ours
    if losses.keys() != our_losses.keys() or adapter.keys() != our_adapter.keys():
        raise AssertionError("the sides trained other clients or other modules")
    worst = max(abs(losses[client] - our_losses[client]) for client in losses)
    apart = _distance(adapter, our_adapter) / _distance(our_adapter, first)
    if not (worst <= LOSS_TOLERANCE and apart <= UPDATE_TOLERANCE):  # a NaN fails too
        raise AssertionError(f"the sides differ: losses by {worst:.2e} nats, adapters by {apart:.2e} of their change")


def _distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(torch.sum((one[name] - other[name]).double() ** 2)) for name in one))
