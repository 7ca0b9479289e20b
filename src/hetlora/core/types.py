"""Frozen values of a federation: clients, the server's state, tasks and updates."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from hetlora.core.adapter import Adapter, Factors, Rank, num_bytes, rank_of, truncate

__all__ = [
    "BaseDelta",
    "Client",
    "ClientFailure",
    "ClientUpdate",
    "PartialTotal",
    "ServerState",
    "TrainTask",
]


@dataclass(frozen=True)
class Client:
    """A member of the federation, as the server knows it.

    Attributes:
        name: Unique in the federation.
        rank: The rank its hardware affords at the start.
        examples: Number of its training examples. An update that reports more is refused.
    """

    name: str
    rank: Rank
    examples: int


@dataclass(frozen=True)
class BaseDelta:
    """The change folded into the frozen base: module m then computes `(W0 + s ΔW_m) x + s B A x`.

    Attributes:
        delta: Module to `ΔW [out, in]`, float32; empty if nothing was folded.
        sizes: Round to the bytes of its part of `delta` as stacked factors, the form in which it travels.
    """

    delta: Mapping[str, Tensor] = field(default_factory=dict)
    sizes: Mapping[int, int] = field(default_factory=dict)

    def plus(self, delta: Mapping[str, Tensor], round_number: int, size: int) -> BaseDelta:
        """Return this change plus that of one round."""
        total = {module: self.delta[module] + part if self.delta else part for module, part in delta.items()}
        return BaseDelta({name: part.float() for name, part in total.items()}, {**self.sizes, round_number: size})

    def num_bytes(self, since: int) -> int:
        """Return the bytes that a client needs from round `since` on: the rounds' stacks, or the dense sum if smaller."""
        missed = sum(size for round_number, size in self.sizes.items() if round_number >= since)
        return min(missed, sum(part.numel() * part.element_size() for part in self.delta.values()))


NOTHING_FOLDED = BaseDelta()


@dataclass(frozen=True)
class ServerState:
    """The server's state between two rounds.

    Attributes:
        adapter: The global factors `A [r_max, in]`, `B [out, r_max]` of every module, float32. For a method that averages over
            rounds this is the average.
        round: Number of rounds done.
        ranks: Client to its rank after self-pruning, if that differs from its first one; absent clients keep theirs.
        answered: Client to the last round it answered. It need not receive again what it had received by then.
        folded: The change folded into the base.
        moments: Other adapters that the server keeps, by name: an optimiser's moments, or the last round's beside an average.
        kept: Client to the adapter that it keeps on its device. The state holds it only for the simulation: it does not
            travel, and no method's sum reads it.
        seed: Seed of the run, for methods that draw.
    """

    adapter: Adapter
    round: int = 0
    ranks: Mapping[str, Rank] = field(default_factory=dict)
    answered: Mapping[str, int] = field(default_factory=dict)
    folded: BaseDelta = NOTHING_FOLDED
    moments: Mapping[str, Adapter] = field(default_factory=dict)
    kept: Mapping[str, Adapter] = field(default_factory=dict)
    seed: int = 0
    _truncated: dict[Any, Adapter] = field(default_factory=dict, init=False, repr=False, compare=False)

    def truncated(self, rank: Rank) -> Adapter:
        """Return the first slots of the global adapter: one object per rank, so that memory does not grow with the cohort.

        Raises:
            ShapeError: `rank` is larger than the global adapter's.
        """
        key = tuple(sorted(rank.items())) if isinstance(rank, Mapping) else rank
        if key not in self._truncated:
            self._truncated[key] = truncate(self.adapter, rank)
        return self._truncated[key]

    @functools.cached_property
    def training_state(self) -> ServerState:
        """State whose adapter clients train on. Differs only if the method averages over rounds (`hetlora.methods.steady`)."""
        return replace(self, adapter=self.moments["iterate"]) if "iterate" in self.moments else self

    @functools.cached_property
    def serving_state(self) -> ServerState:
        """State to distribute for inference. Differs from the training state only if the method averages over rounds."""
        return replace(self, moments={}) if "iterate" in self.moments else self

    def rank(self, client: Client) -> Rank:
        """Return the client's current rank: what pruning has left, at most what its hardware affords."""
        left = self.ranks.get(client.name, client.rank)
        # A client may have changed to a smaller device since.
        if isinstance(left, int) and isinstance(client.rank, int):
            return min(left, client.rank)
        return {module: min(rank_of(left, module), rank_of(client.rank, module)) for module in self.adapter}

    def owned_slots(self, clients: Iterable[Client]) -> Adapter:
        """Return the slots that at least one of these clients has; all of them have pruned the others away."""
        widest = dict.fromkeys(self.adapter, 0)
        whole = {module: pair.A.shape[-2] for module, pair in self.adapter.items()}
        for rank in map(self.rank, clients):
            widest = {module: max(slots, rank_of(rank, module)) for module, slots in widest.items()}
            if widest == whole:  # the first few clients suffice, unless all have pruned
                break
        return truncate(self.adapter, widest)


@dataclass(frozen=True)
class TrainTask:
    """The task of one client in one round: its slots of the global adapter.

    Attributes:
        client: The client's name.
        round: Number of the round, from 0.
        rank: The assigned rank, equal to the slots of `adapter`.
        adapter: Factors `A [r, in]`, `B [out, r]`.
        receives: The factors that travel to the client; it has the others already.
        trains: The factors it trains; the others are frozen.
        sends: The factors that travel back.
        folded: The change folded into the base that it trains on.
        since: The first round whose folded change it has not received yet.
    """

    client: str
    round: int
    rank: Rank
    adapter: Adapter
    receives: Factors = "AB"
    trains: Factors = "AB"
    sends: Factors = "AB"
    folded: BaseDelta = NOTHING_FOLDED
    since: int = 0

    @property
    def bytes_down(self) -> int:
        """Bytes of the tensors that travel to the client."""
        return num_bytes(self.adapter, self.receives) + self.folded.num_bytes(self.since)


@dataclass(frozen=True)
class ClientUpdate:
    """The answer of one client.

    Attributes:
        client: The client's name.
        round: The round of the task it answers.
        rank: Its rank after self-pruning, at most the task's.
        adapter: Its trained factors at `rank`.
        examples: Number of its training examples.
        steps: Local optimiser steps it took.
        loss: Mean training loss over its steps (negative log-likelihood per scored token, without the penalty).
    """

    client: str
    round: int
    rank: Rank
    adapter: Adapter
    examples: int
    steps: int
    loss: float


@dataclass(frozen=True)
class ClientFailure:
    """A client without a usable answer, and the reason."""

    client: str
    reason: str


@dataclass(frozen=True)
class PartialTotal:
    """The sum of several clients' updates, for secure or hierarchical aggregation: the server sees no single update.

    The engine must admit each update (`hetlora.core.admission.admit`) before; `hetlora.core.round.partial_total` makes the sum.

    Attributes:
        total: A sum of `Method.start` and `Method.add`.
        ranks: Each summed client to its rank after self-pruning, which the server needs for its next task.
        bytes_up: Bytes of the tensors that these clients have sent.
    """

    total: Any
    ranks: Mapping[str, Rank]
    bytes_up: int = 0

    @property
    def clients(self) -> tuple[str, ...]:
        """Return the names of the summed clients."""
        return tuple(self.ranks)
