"""What a federation holds and sends: clients, the server's state, tasks and updates. Values, all frozen."""

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
    """What a method has folded into the frozen base: module m then computes `(W0 + s ΔW_m) x + s B A x`.

    Attributes:
        delta: Module to `ΔW [out, in]`, float32; empty where nothing was folded.
        sizes: Round to the bytes that its part of `delta` takes as stacked factors, which is how it travels.
    """

    delta: Mapping[str, Tensor] = field(default_factory=dict)
    sizes: Mapping[int, int] = field(default_factory=dict)

    def plus(self, delta: Mapping[str, Tensor], round_number: int, size: int) -> BaseDelta:
        """Return this with one round's change on top."""
        total = {module: self.delta[module] + part if self.delta else part for module, part in delta.items()}
        return BaseDelta({name: part.float() for name, part in total.items()}, {**self.sizes, round_number: size})

    def num_bytes(self, since: int) -> int:
        """Return what a client must receive that has all before round `since`: the rounds' stacks, or the sum if smaller."""
        missed = sum(size for round_number, size in self.sizes.items() if round_number >= since)
        return min(missed, sum(part.numel() * part.element_size() for part in self.delta.values()))


NOTHING_FOLDED = BaseDelta()


@dataclass(frozen=True)
class ServerState:
    """What the server carries from round to round.

    Attributes:
        adapter: The global factors `A [r_max, in]`, `B [out, r_max]` of every module, float32; of a method that averages over
            rounds the average, see `iterate`.
        round: Number of rounds done.
        ranks: The ranks that differ from the client's first one, for absent clients too: self-pruning lasts.
        answered: Client to the last round it answered; what it had received by then it need not receive again.
        folded: What was folded into the base.
        moments: What the server remembers of the rounds beside the adapter, by name: of an optimiser, of an average.
        kept: Client to what it keeps on its device for its next round. It stands here for a simulation's sake: it does not
            travel, no server sees it, and no method's sum reads it.
        seed: Of the run, for methods that draw.
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
        """Return the first slots of the global adapter, one object a rank: views a client would grow with the cohort.

        Raises:
            ShapeError: `rank` is larger than the global adapter's.
        """
        key = tuple(sorted(rank.items())) if isinstance(rank, Mapping) else rank
        if key not in self._truncated:
            self._truncated[key] = truncate(self.adapter, rank)
        return self._truncated[key]

    @functools.cached_property
    def training_state(self) -> ServerState:
        """The state with the adapter that clients go on from, where a method hands out another (`hetlora.methods.steady`)."""
        return replace(self, adapter=self.moments["iterate"]) if "iterate" in self.moments else self

    @functools.cached_property
    def serving_state(self) -> ServerState:
        """The state to distribute for inference.

        It differs from the training state only if the method averages over rounds.
        """
        return replace(self, moments={}) if "iterate" in self.moments else self

    def rank(self, client: Client) -> Rank:
        """Return the client's rank as of now: what is left after pruning, and no more than it affords."""
        left = self.ranks.get(client.name, client.rank)
        # The device behind a name may have been exchanged for a smaller one.
        if isinstance(left, int) and isinstance(client.rank, int):
            return min(left, client.rank)
        return {module: min(rank_of(left, module), rank_of(client.rank, module)) for module in self.adapter}

    def owned_slots(self, clients: Iterable[Client]) -> Adapter:
        """Return the slots that at least one of these clients still has: the others are what all have pruned away."""
        widest = dict.fromkeys(self.adapter, 0)
        whole = {module: pair.A.shape[-2] for module, pair in self.adapter.items()}
        for rank in map(self.rank, clients):
            widest = {module: max(most, rank_of(rank, module)) for module, most in widest.items()}
            if widest == whole:  # of a large population the first few show that nothing is pruned away
                break
        return truncate(self.adapter, widest)


@dataclass(frozen=True)
class TrainTask:
    """What one client starts a round from: its slots of the global adapter.

    Attributes:
        client: The client's name.
        round: Number of the round, from 0.
        rank: The rank assigned, equal to the slots of `adapter`.
        adapter: Factors `A [r, in]`, `B [out, r]`.
        receives: The factors that travel to the client; it has the others.
        trains: The factors it trains; the others are frozen.
        sends: The factors that travel back.
        folded: What is folded into the base it trains on.
        since: The first round whose folding it has not received yet.
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
    """What one client answers.

    Attributes:
        client: The client's name.
        round: The round of the task it answers.
        rank: Its rank after self-pruning, at most the task's.
        adapter: Its trained factors at `rank`.
        examples: Number of its training examples.
        steps: Local optimiser steps it took.
        loss: Mean training loss over its steps (negative log-likelihood a scored token, without the penalty).
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
    """A client that was asked and gave nothing the round can use, and why."""

    client: str
    reason: str


@dataclass(frozen=True)
class PartialTotal:
    """The sum of several clients' updates, where the server learns no more: of a secure or a hierarchical aggregation.

    Whoever sums has admitted each update (`hetlora.core.admission.admit`) and weighed it. `hetlora.core.round.partial_total`
    makes one.

    Attributes:
        total: As `Method.start` and `Method.add` make it.
        ranks: Each client whose update is in it, to its rank after self-pruning: the server must know what to send it next.
        bytes_up: Bytes of the tensors that these clients have sent.
    """

    total: Any
    ranks: Mapping[str, Rank]
    bytes_up: int = 0

    @property
    def clients(self) -> tuple[str, ...]:
        """Return the names of the clients whose updates are in it."""
        return tuple(self.ranks)
