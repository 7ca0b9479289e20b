"""The in-process engine: a cohort trains in this process, many clients in one batched pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from hetlora.core.method import Method, Penalty
from hetlora.core.round import local_round
from hetlora.core.types import ClientFailure, ClientUpdate, TrainTask
from hetlora.data.tokenization import Example
from hetlora.model.lora_model import LoraModel
from hetlora.training.local import TOKENS_A_PASS, LocalTraining, train_clients
from hetlora.training.parallel import in_parallel

__all__ = ["SimulationEngine", "TrainingData"]


class TrainingData(Protocol):
    """Source of the clients' training rows."""

    def train(self, client: str) -> Sequence[Example]:
        """Return the training examples of a client."""
        ...


class SimulationEngine:
    """Trains the clients of a cohort in groups, each group in one batched pass.

    Clients with similar numbers of steps and row lengths share a group. This keeps padding and the wait for slower clients
    small, and does not change what a client learns.

    Args:
        model: The shared base with LoRA layers.
        data: Every client's rows as tokens.
        settings: Local training.
        seed: Seed of the run.
        group_size: Clients per pass; None chooses it from the tokens per step.
        workers: Groups that train at the same time; None for one per thread.
        tokens_a_pass: Most tokens per forward pass, and most tokens per step of a group of several clients.
        clients_a_group: Most clients per group; None for as many as its tokens allow.
    """

    def __init__(
        self,
        model: LoraModel,
        data: TrainingData,
        settings: LocalTraining,
        *,
        seed: int,
        group_size: int | None = None,
        workers: int | None = None,
        tokens_a_pass: int = TOKENS_A_PASS,
        clients_a_group: int | None = None,
    ) -> None:
        self.model = model
        self.data = data
        self.settings = settings
        self.seed = seed
        self.group_size = 1 if model.one_at_a_time else group_size
        self.workers = 1 if model.one_at_a_time else workers
        self.tokens_a_pass = tokens_a_pass
        self.clients_a_group = clients_a_group

    def train(self, tasks: Sequence[TrainTask], method: Method[Any]) -> Iterator[ClientUpdate | ClientFailure]:
        """Yield the answers group by group, in order."""
        # Read here and not in the workers, because reading may tokenize the rows.
        examples = {task.client: self.data.train(task.client) for task in tasks}

        def work(group: list[TrainTask]) -> list[ClientUpdate | ClientFailure]:
            return list(local_round(group, method, fit))

        def fit(tasks: Sequence[TrainTask], penalty: Penalty | None) -> list[ClientUpdate | ClientFailure]:
            own = [examples[task.client] for task in tasks]
            return train_clients(
                self.model, tasks, own, self.settings, penalty, seed=self.seed, tokens_a_pass=self.tokens_a_pass
            )

        for answers in in_parallel(work, self.groups(tasks, examples), self.model.device, self.workers):
            yield from answers

    def groups(self, tasks: Sequence[TrainTask], examples: Mapping[str, Sequence[Example]]) -> list[list[TrainTask]]:
        """Group the cohort by steps, then by tokens, largest first, so that the members of a group end together."""
        cost = {client: self._cost(rows) for client, rows in examples.items()}
        share = sum(tokens for _, tokens in cost.values()) / (self.workers or torch.get_num_threads())
        limit, members = min(self.tokens_a_pass, share), self.clients_a_group or len(tasks)
        groups: list[list[TrainTask]] = []
        room = 0.0
        for task in sorted(tasks, key=lambda task: cost[task.client], reverse=True):
            tokens = cost[task.client][1]
            full = len(groups[-1]) == self.group_size if groups and self.group_size else tokens > room
            full = full or (bool(groups) and len(groups[-1]) >= members)
            if not groups or full:
                groups.append([])
                room = limit
            groups[-1].append(task)
            room -= tokens
        return groups

    def _cost(self, rows: Sequence[Example]) -> tuple[int, float]:
        """Return a client's number of steps and its mean tokens per step."""
        if not rows:
            return 0, 0.0
        a_step = min(len(rows), self.settings.batch_size)
        return self.settings.count(len(rows)), a_step * sum(len(row.ids) for row in rows) / len(rows)
