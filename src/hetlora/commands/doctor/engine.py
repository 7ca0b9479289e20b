"""Does the engine train what it was sent, all of it, and nothing else?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from hetlora.commands.doctor.findings import Notes
from hetlora.commands.doctor.tiny_run import TinyFederation, TinyRound
from hetlora.core.adapter import Adapter, map_tensors, truncate
from hetlora.core.method import keep_rank
from hetlora.core.types import ClientUpdate, ServerState
from hetlora.model.lora_model import LoraModel
from hetlora.training.local import LocalTraining

__all__ = ["look_at_frozen_factors", "look_at_what_is_trained"]


@dataclass(frozen=True)
class _Still(LocalTraining):
    """Training of one step of length 0: what comes back is what it began from."""

    def make_optimizer(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.0)


class _Used:
    """A model that keeps what it was told to compute with, before any step could change it."""

    def __init__(self, model: LoraModel) -> None:
        self._model = model
        self.used: list[tuple[Adapter, Mapping[str, Tensor]]] = []

    def use(self, adapter: Adapter | None, folded: Mapping[str, Tensor] | None = None, *others: Any) -> None:
        if adapter is not None:
            self.used.append((map_tensors(lambda factor: factor.detach().cpu().clone(), adapter), dict(folded or {})))
        self._model.use(adapter, folded, *others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def look_at_what_is_trained(notes: Notes, tiny: TinyFederation, state: ServerState) -> None:
    """Compare what the server distributes with what reaches the model, and with what a client that stands still returns."""
    sent = {client.name: tiny.method.distribute(state, client) for client in tiny.cohort}
    copies = {name: map_tensors(torch.clone, task.adapter) for name, task in sent.items()}
    still = _Still(batch_size=tiny.settings.batch_size, steps=1)
    watched = _Used(tiny.model)
    engine = tiny.engine(still, model=cast("LoraModel", watched), group_size=1, workers=1)
    method = replace(tiny.method, prune=keep_rank)
    answers = list(engine.train(list(sent.values()), method))
    equal, total, different = 0, 0, []

    def compare(name: str, what: str, expected: Tensor, found: Tensor | None) -> None:
        nonlocal equal, total
        total += 1
        if found is not None and torch.equal(expected, found):
            equal += 1
        else:
            different.append(f"{what} of {name!r}")

    for index, answer in enumerate(answers):
        name = answer.client
        used, folded = watched.used[index] if len(watched.used) == len(answers) else ({}, {})
        back = answer.adapter if isinstance(answer, ClientUpdate) else {}
        for path, pair in copies[name].items():
            for letter, factor in zip("AB", pair, strict=True):
                at_work = getattr(used[path], letter) if path in used else None
                at_work = at_work[0] if at_work is not None and at_work.ndim == 3 else at_work
                returned = getattr(back[path], letter) if path in back else None
                same = (
                    returned
                    if at_work is not None and returned is not None and torch.equal(at_work, returned)
                    else None
                )
                compare(name, f"{path}.{letter}", factor, same)
        for path, delta in sent[name].folded.delta.items():
            compare(name, f"the change folded into {path}", delta, folded.get(path))
    silent = sent.keys() - {answer.client for answer in answers}
    problem = None
    if different or silent:
        problem = f"{equal} of {total} tensors bit-equal; {', '.join([*different[:3], *map(repr, silent)])} is not"
    way_out = "a client must begin from its task alone: look at what the engine does with `task.adapter`"
    notes.judge("sent is trained", problem, f"{equal} of {total} tensors bit-equal", "the engine", way_out)


def look_at_frozen_factors(notes: Notes, rounds: Sequence[TinyRound]) -> None:
    """Compare the factors that a task does not train with those that came back."""
    changed, frozen = [], 0
    for one in rounds:
        for update in (answer for answer in one.answers if isinstance(answer, ClientUpdate)):
            task = one.tasks[update.client]
            received = truncate(task.adapter, update.rank)
            for path, letter in itertools.product(received, sorted({"A", "B"} - set(task.trains))):
                frozen += 1
                if not torch.equal(getattr(received[path], letter), getattr(update.adapter[path], letter)):
                    changed.append(f"{path}.{letter} of {update.client!r}")
    problem = f"{len(changed)} of {frozen} changed: {', '.join(changed[:3])}" if changed else None
    told = f"{frozen} are as they were" if frozen else "the method freezes none"
    notes.judge("frozen factors", problem, told, "the engine", "train what `task.trains` names, and nothing else")
