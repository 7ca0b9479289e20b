"""Clients that train by a pure function of their task, so that every number of a round is known."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hetlora.core.adapter import Adapter, LoraPair, ModuleShape, Rank, map_tensors, zeros
from hetlora.core.method import Method
from hetlora.core.round import local_round
from hetlora.core.types import Client, ClientFailure, ClientUpdate, ServerState, TrainTask

SHAPES = {"q_proj": ModuleShape(3, 5), "v_proj": ModuleShape(4, 2)}
WEIGHTS = {"weight": ModuleShape(6, 1), "bias": ModuleShape(2, 1)}
"""What `FullModel` calls the modules of a weight of 6 and one of 2 numbers."""
FULL = 8
"""Rank of the global adapter in the table of laws."""


class FakeEngine:
    """Trains by a pure function, client after client, in any order; keeps what it was asked."""

    def __init__(
        self,
        change: Callable[[TrainTask], ClientUpdate | ClientFailure],
        order: Callable[[Sequence[TrainTask]], Sequence[TrainTask]] = list,
    ) -> None:
        self.change, self.order = change, order
        self.asked: list[dict[str, TrainTask]] = []

    def train(self, tasks, method) -> Iterator[ClientUpdate | ClientFailure]:
        self.asked.append({task.client: task for task in tasks})
        for task in self.order(tasks):
            yield from local_round([task], method, lambda one, _penalty: [self.change(one[0])])


def answer(task, adapter=None, *, examples=1, loss=1.0):
    """The update of a client that trained its factors to `adapter`; by default it returns what it received."""
    return ClientUpdate(
        task.client, task.round, task.rank, task.adapter if adapter is None else adapter, examples, 1, loss
    )


def only_trained(task, adapter: Adapter) -> Adapter:
    """`adapter` where the task trains a factor, what was received where it froze it."""
    return {
        name: LoraPair(*(getattr(pair, f) if f in task.trains else getattr(task.adapter[name], f) for f in ("A", "B")))
        for name, pair in adapter.items()
    }


def trained(task):
    """Factors far from those received; by name, so that tails grow for some clients and shrink for others."""
    seed = zlib.crc32(f"{task.client} in round {task.round}".encode())
    rng = np.random.default_rng(seed)
    size = 4.0 if seed % 2 else 0.2
    after = map_tensors(
        lambda factor: factor + size * torch.from_numpy(rng.standard_normal(tuple(factor.shape))).float(),
        map_tensors(lambda factor: factor * size, task.adapter),
    )
    return answer(task, only_trained(task, after), examples=1 + seed % 7)


def grown(task):
    """Ten times the factors received: every tail grows, so nobody prunes."""
    return answer(task, only_trained(task, map_tensors(lambda factor: 10.0 * factor, task.adapter)), examples=3)


def drawn_alike(task):
    """The same factors for all clients of a round, drawn anew in the next."""
    rng = np.random.default_rng(task.round)
    drawn = map_tensors(lambda f: torch.from_numpy(rng.standard_normal(tuple(f.shape))).float(), task.adapter)
    return answer(task, only_trained(task, drawn), examples=3)


def random_state(seed=0, *, rank: Rank = FULL, shapes: Mapping[str, ModuleShape] = SHAPES):
    rng = np.random.default_rng(seed)
    empty = zeros(shapes, rank)
    return ServerState(
        map_tensors(lambda factor: torch.from_numpy(rng.standard_normal(tuple(factor.shape))).float(), empty)
    )


def start_of(method: Method, seed=0) -> ServerState:
    """A random state that the method could have come to: where whole weights are trained, A is the constant 1."""
    if method.trains == "adapter":
        return replace(random_state(seed), seed=seed)
    state = random_state(seed, rank=1, shapes=WEIGHTS)
    return replace(
        state, adapter={name: LoraPair(torch.ones_like(A), B) for name, (A, B) in state.adapter.items()}, seed=seed
    )


def products(method: Method, state: ServerState, client: Client) -> dict[str, Tensor]:
    """What the client computes with on top of the base: `folded + B A` of what it is served, float64."""
    task = method.distribute(state.serving_state, client)
    return {
        name: pair.B.double() @ pair.A.double() + (task.folded.delta[name].double() if task.folded.delta else 0.0)
        for name, pair in task.adapter.items()
    }


def literal(A, B):
    return LoraPair(torch.tensor(A, dtype=torch.float32), torch.tensor(B, dtype=torch.float32))


def sends(**pairs):
    """Each client answers with the pair of its name, on one module `m`; they have 1, 3 and 4 examples."""
    return lambda task: answer(task, {"m": pairs[task.client]}, examples={"a": 1, "b": 3, "c": 4}[task.client])


def assert_same(one, other):
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name].A, other[name].A), name
        assert torch.equal(one[name].B, other[name].B), name


def assert_same_state(one: ServerState, other: ServerState) -> None:
    """Bit for bit in all that is learned; rounds and who answered are not compared."""
    assert_same(one.adapter, other.adapter)
    assert one.ranks == other.ranks
    assert one.folded.sizes == other.folded.sizes
    assert one.folded.delta.keys() == other.folded.delta.keys()
    assert all(torch.equal(part, other.folded.delta[name]) for name, part in one.folded.delta.items())
    for side in ("kept", "moments"):
        mine, others = getattr(one, side), getattr(other, side)
        assert mine.keys() == others.keys()
        for name, adapter in mine.items():
            assert_same(adapter, others[name])


def assert_pair(pair, A, B):
    """Equal to the literals within the rounding of float32."""
    torch.testing.assert_close(pair.A, torch.tensor(A, dtype=torch.float32))
    torch.testing.assert_close(pair.B, torch.tensor(B, dtype=torch.float32))
