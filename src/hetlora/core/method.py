"""What a method is: a frozen record of pure functions; and what methods and engines are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

from torch import Tensor

from hetlora.core.adapter import Adapter
from hetlora.core.admission import AdmissionRule, ExpectedTraining
from hetlora.core.types import Client, ClientFailure, ClientUpdate, PartialTotal, ServerState, TrainTask
from hetlora.errors import ShapeError

__all__ = [
    "Engine",
    "LocalTrainer",
    "Method",
    "Penalty",
    "RobustAggregation",
    "RobustResult",
    "WeightedUpdate",
    "example_weight",
    "keep_rank",
    "no_penalty",
    "truncate_to_rank",
]


Total = TypeVar("Total")
Penalty = Callable[[Adapter], Tensor]
"""Maps the live factors `[G, ...]` of a batch of clients to one differentiable value a client, `[G]`."""


def no_penalty(_: Sequence[TrainTask]) -> Penalty | None:
    """Add nothing to the local loss."""
    return None


def keep_rank(_: TrainTask, update: ClientUpdate) -> ClientUpdate:
    """Send what was trained."""
    return update


def merge_totals(total: Any, other: Any) -> Any:
    """Let a sum take over another by its own `merge`, as those of `hetlora.core.aggregation` do."""
    return total.merge(other)


@dataclass(frozen=True)
class Method(Generic[Total]):
    """A federated method: a record of pure functions, made by a factory whose arguments are its hyperparameters.

    Attributes:
        name: Its name in `hetlora.methods.METHODS`, or one of its own.
        distribute: Server: what a client receives.
        weigh: Server: an update's weight, at least 0. Weights need not sum to one.
        start: Server: an empty sum.
        add: Server: the sum with one more update. Takes over `total` (it may reuse its memory); order does not matter.
        finish: Server: the next state's adapter from the sum. The loop itself keeps rounds and ranks.
        merge: Server: the sum of two sums, for engines that give a `PartialTotal`. Takes over both; order does not matter.
        penalty: Client: from the tasks of a batch of G clients, the term added to each one's local loss; None for none.
        prune: Client: after local training, the update it sends. One that changes more than the rank has no `lowest_rank`,
            and is then not held against what local training can come to.
        lowest_rank: Server: from a rank that was assigned, the lowest one that `prune` leaves of it; None where that is not
            known, or nobody prunes.
        keep: Client: from its update, what it keeps on its device for its next round; None for nothing. A method that keeps
            something is personal: each client is served by its own adapter, the one that `distribute` gives it.
        trains: "adapter", or "weights" for every weight of the base. A weight of n numbers then is a module of shape
            `[n, 1]` whose B `[n, 1]` is its change, beside the frozen A `[[1]]`.
        folds: Whether it changes the base, which no adapter then holds.
        averages: What the server averages: "factors", A and B each as FedAvg does where all ranks are equal, "products" B A,
            or "nothing".
        ranks: "any", or "equal" for one rank for all.
        clients: Who takes part: "sampled" cohorts of the federation's clients, one client that holds the rows of all
            ("pooled"), or "nobody".
        refuses: Which wrappers make no sense around the method, and why: "server_optimizer", "proximal", "average" (over
            rounds), "robustness" (any), or "over_slots" (an aggregation that takes each number of a slot by itself; one update
            of nobody then stands for all), "product" (one that compares the products B A); and "adapter", one to start from.
    """

    name: str
    distribute: Callable[[ServerState, Client], TrainTask]
    weigh: Callable[[ClientUpdate], float]
    start: Callable[[ServerState], Total]
    add: Callable[[Total, ClientUpdate, float], Total]
    finish: Callable[[ServerState, Total], ServerState]
    penalty: Callable[[Sequence[TrainTask]], Penalty | None] = no_penalty
    prune: Callable[[TrainTask, ClientUpdate], ClientUpdate] = keep_rank
    lowest_rank: Callable[[int], int] | None = None
    keep: Callable[[ClientUpdate], Adapter] | None = None
    merge: Callable[[Total, Total], Total] = merge_totals
    trains: Literal["adapter", "weights"] = "adapter"
    folds: bool = False
    averages: Literal["factors", "products", "nothing"] = "factors"
    ranks: Literal["any", "equal"] = "any"
    clients: Literal["sampled", "pooled", "nobody"] = "sampled"
    refuses: Mapping[str, str] = field(default_factory=dict)

    @property
    def declared(self) -> dict[str, str | bool]:
        """Return what it says of itself. It stands in the records, so that nobody asks a name what a method does."""
        return {key: getattr(self, key) for key in ("trains", "folds", "averages", "ranks", "clients")}


def expected(method: Method[Any], training: ExpectedTraining | None, rounding: float = 0.0) -> AdmissionRule:
    """Return what an honest update of a method satisfies beyond its task.

    Args:
        method: One that nobody prunes in leaves each rank as it was assigned.
        training: What a client does before it prunes; None where that is not known.
        rounding: Of what travels, see `AdmissionRule`.
    """
    if method.prune is keep_rank:
        return AdmissionRule(training, lambda assigned: assigned, rounding)
    return AdmissionRule(training if method.lowest_rank else None, method.lowest_rank, rounding)


class Engine(Protocol):
    """Where clients train: in this process, or on other machines."""

    def train(
        self, tasks: Sequence[TrainTask], method: Method[Any]
    ) -> Iterator[ClientUpdate | ClientFailure | PartialTotal]:
        """Yield answers as they come, in any order; a client that gives none is yielded as a failure or not at all."""
        ...


@dataclass(frozen=True)
class WeightedUpdate:
    """An admitted update as it counts.

    Attributes:
        update: With its factors as they are, or as they were bounded.
        weight: In the sum.
        bounded: What was lowered, "A", "B" (the change of the factor) or "weight", and to which share of it.
    """

    update: ClientUpdate
    weight: float
    bounded: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RobustResult:
    """A round's updates after bounds on their influence.

    Attributes:
        sums: What is added up; of a robust aggregation not the updates themselves.
        clients: Client to its own update as it counts, for the record.
    """

    sums: Sequence[WeightedUpdate]
    clients: Mapping[str, WeightedUpdate]


class RobustAggregation(Protocol):
    """Bounds on what a client can do to the average; implemented by `hetlora.core.robust.Robustness`."""

    def __call__(
        self, answers: Sequence[tuple[TrainTask, ClientUpdate]], weigh: Callable[[ClientUpdate], float]
    ) -> RobustResult:
        """Return what enters the sum, from all admitted updates of a round in the cohort's order."""
        ...


class LocalTrainer(Protocol):
    """Local training of a batch of clients; implemented by `hetlora.training.local`."""

    def __call__(self, tasks: Sequence[TrainTask], penalty: Penalty | None) -> list[ClientUpdate | ClientFailure]:
        """Return one answer a task, in order."""
        ...


def example_weight(weights: str) -> Callable[[ClientUpdate], float]:
    """Return the usual weight of an update: its number of training examples `n_k`, or 1 for "equal".

    Raises:
        ValueError: `weights` is neither "examples" nor "equal".
    """
    if weights not in ("examples", "equal"):
        raise ValueError(f"weights={weights!r} is not allowed; use one of examples, equal")
    return lambda update: float(update.examples) if weights == "examples" else 1.0


def truncate_to_rank(state: ServerState, client: Client) -> TrainTask:
    """Distribute by truncation: the first r_k slots, by index and not by importance (HetLoRA's step 1; sure)."""
    rank = state.rank(client)
    try:
        adapter = state.truncated(rank)
    except ShapeError as error:
        way_out = "start from an adapter of the largest rank, model.initial_adapter(rank=...)"
        raise ShapeError(
            f"client {client.name!r} has a larger rank than the global adapter: {error}; {way_out}"
        ) from error
    since = state.answered.get(client.name, 0)
    return TrainTask(client.name, state.round, rank, adapter, folded=state.folded, since=since)
