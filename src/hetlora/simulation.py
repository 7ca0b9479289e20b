"""The in-process engine: a cohort trains in this process, many clients in one batched pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from hetlora.data.text import Example
from hetlora.federated import ClientFailure, ClientUpdate, Method, Penalty, TrainTask, local_round
from hetlora.lora_model import LoraModel
from hetlora.training import LocalTraining, train_clients

__all__ = ["SimulationEngine"]

TOKENS_A_PASS = 1024
"""A group grows until its step holds so many tokens: sharing a pass pays while the matrix products are small, and beyond that
larger activations only leave the cache."""


class TrainingData(Protocol):
    """Where the engine takes a client's rows from."""

    def train(self, client: str) -> Sequence[Example]:
        """Return the training examples of a client."""
        ...


class SimulationEngine:
    """Trains the clients of a cohort in groups, each group in one batched pass.

    Clients of like number of steps and length share a group, so that little is computed for padding and for clients that
    have finished. The grouping does not change what a client learns.

    Args:
        model: The shared base with LoRA layers.
        data: Every client's rows as tokens.
        settings: Local training.
        seed: Of the run.
        pad_id: Token id of the padding.
        group_size: Clients a pass; None chooses it from the tokens of a step.
    """

    def __init__(
        self,
        model: LoraModel,
        data: TrainingData,
        settings: LocalTraining,
        *,
        seed: int,
        pad_id: int,
        group_size: int | None = None,
    ) -> None:
        self.model = model
        self.data = data
        self.settings = settings
        self.seed = seed
        self.pad_id = pad_id
        self.group_size = group_size

    def train(self, tasks: Sequence[TrainTask], method: Method[Any]) -> Iterator[ClientUpdate | ClientFailure]:
        """Yield each client's answer as soon as its group is done."""
        for group in self._groups(tasks):
            yield from local_round(group, method, self._fit)

    def _fit(self, tasks: Sequence[TrainTask], penalty: Penalty | None) -> list[ClientUpdate | ClientFailure]:
        examples = [self.data.train(task.client) for task in tasks]
        return train_clients(self.model, tasks, examples, self.settings, penalty, seed=self.seed, pad_id=self.pad_id)

    def _groups(self, tasks: Sequence[TrainTask]) -> Iterator[list[TrainTask]]:
        """Split the cohort: most steps first, then longest rows first."""
        cost = {task.client: self._cost(task.client) for task in tasks}
        group: list[TrainTask] = []
        for task in sorted(tasks, key=lambda task: cost[task.client], reverse=True):
            widest = max(cost[member.client][1] for member in [*group, task])
            full = len(group) == self.group_size if self.group_size else (len(group) + 1) * widest > TOKENS_A_PASS
            if group and full:
                yield group
                group = []
            group.append(task)
        if group:
            yield group

    def _cost(self, client: str) -> tuple[int, int]:
        """Return a client's number of steps, and the tokens of one of its steps when padded to its longest row."""
        examples = self.data.train(client)
        if not examples:
            return 0, 0
        rows = min(len(examples), self.settings.batch_size)
        return self.settings.count(len(examples)), rows * max(len(example.ids) for example in examples)
