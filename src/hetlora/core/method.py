"""The contract of a method, a frozen record of pure functions, and the contract of an engine."""

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
"""Maps the live factors `[G, ...]` of a batch of clients to one differentiable value per client, `[G]`."""


def no_penalty(_: Sequence[TrainTask]) -> Penalty | None:
    """Add nothing to the local loss."""
    return None


def keep_rank(_: TrainTask, update: ClientUpdate) -> ClientUpdate:
    """Send all that was trained: no pruning."""
    return update


def merge_totals(total: Any, other: Any) -> Any:
    """Merge two sums by their own `merge`, as those of `hetlora.core.aggregation` have it."""
    return total.merge(other)


@dataclass(frozen=True)
class Method(Generic[Total]):
    """A federated method: a record of pure functions, made by a factory whose arguments are its hyperparameters.

    Attributes:
        name: Its name in `hetlora.methods.METHODS`, or any other.
        distribute: Server: returns what a client receives.
        weigh: Server: returns an update's weight, at least 0. Weights need not sum to one.
        start: Server: returns an empty sum.
        add: Server: returns the sum with one more update. It may reuse the memory of `total`. Order does not matter.
        finish: Server: returns the next state's adapter from the sum. The loop itself keeps rounds and ranks.
        merge: Server: returns the sum of two sums, for engines that yield a `PartialTotal`. It may reuse the memory of both.
            Order does not matter.
        penalty: Client: from the tasks of a batch of G clients, returns the term added to each client's local loss, or None.
        prune: Client: returns the update to send after local training. A function that changes more than the rank must have no
            `lowest_rank`; admission then does not check how far the factors moved.
        lowest_rank: Server: from an assigned rank, returns the lowest rank that `prune` can leave. None if that is unknown,
            or if clients do not prune.
        keep: Client: from its update, returns what it keeps on its device for its next round; None for nothing. A method that
            keeps something is personal: `distribute` gives each client its own adapter, which also serves it.
        trains: "adapter", or "weights" for every weight of the base. A weight of n numbers then is a module of shape
            `[n, 1]` whose B `[n, 1]` is its change, beside the frozen A `[[1]]`.
        folds: Whether it changes the base. An adapter alone then does not hold the result.
        averages: What the server averages: "factors" (A and B apart, like FedAvg if all ranks are equal), "products" B A,
            or "nothing".
        ranks: "any", or "equal" if all clients need the same rank.
        clients: "sampled" cohorts of the federation's clients, "pooled" (one client holds the rows of all), or "nobody".
        refuses: Option to the reason why the method refuses it: "server_optimizer", "proximal", "average" (over rounds),
            "robustness" (any), "over_slots" (aggregations that take each number of a slot by itself, and replace all updates
            by one), "product" (aggregations that compare the products B A), and "adapter" (an adapter to start from).
        reference: The paper: authors, title, venue, arXiv id. A wrapper appends its own.

    Example:
        A complete method, FedAvg on zero-padded factors, and one round of it. Here the clients only add a number to B.

        >>> from dataclasses import replace
        >>> import torch
        >>> from hetlora import Client, ClientUpdate, LoraPair, Method, ServerState, WeightedSum, run_round
        >>> from hetlora.core.method import truncate_to_rank
        >>> def mean():
        ...     return Method(
        ...         name="mean",
        ...         distribute=truncate_to_rank,
        ...         weigh=lambda update: float(update.examples),
        ...         start=lambda state: WeightedSum.like(state.adapter),
        ...         add=lambda total, update, weight: total.add(update.adapter, weight),
        ...         finish=lambda state, total: replace(state, adapter=total.mean(empty=state.adapter)),
        ...     )
        >>> class Clients:
        ...     def __init__(self, steps):
        ...         self.steps = steps
        ...     def train(self, tasks, method):
        ...         for task in tasks:
        ...             A, B = task.adapter["q_proj"]
        ...             trained = {"q_proj": LoraPair(A, B + self.steps[task.client])}
        ...             yield ClientUpdate(task.client, task.round, task.rank, trained, examples=10, steps=1, loss=0.5)
        >>> state = ServerState({"q_proj": LoraPair(A=torch.ones(2, 1), B=torch.zeros(1, 2))})
        >>> cohort = [Client("phone", rank=1, examples=10), Client("laptop", rank=2, examples=10)]
        >>> state, report = run_round(state, mean(), Clients({"phone": 2.0, "laptop": 4.0}), cohort)
        >>> state.adapter["q_proj"].B  # slot 0: (2 + 4) / 2; slot 1: (0 + 4) / 2, padded for the phone
        tensor([[3., 2.]])
        >>> report.shares()
        {'phone': 0.5, 'laptop': 0.5}
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
    reference: str = ""

    @property
    def declared(self) -> dict[str, str | bool]:
        """Return the properties that the records hold, so that no code asks for a method's name."""
        return {key: getattr(self, key) for key in ("trains", "folds", "averages", "ranks", "clients")}


def expected(method: Method[Any], training: ExpectedTraining | None, rounding: float = 0.0) -> AdmissionRule:
    """Return what an honest update of a method satisfies beyond its task.

    Args:
        method: Its pruning decides which ranks are possible.
        training: What a client does before it prunes; None if unknown.
        rounding: See `AdmissionRule`.
    """
    if method.prune is keep_rank:
        return AdmissionRule(training, lambda assigned: assigned, rounding)
    return AdmissionRule(training if method.lowest_rank else None, method.lowest_rank, rounding)


class Engine(Protocol):
    """The place where clients train: this process, or other machines."""

    def train(
        self, tasks: Sequence[TrainTask], method: Method[Any]
    ) -> Iterator[ClientUpdate | ClientFailure | PartialTotal]:
        """Yield answers in any order. A client without an answer is yielded as a failure, or not at all."""
        ...


@dataclass(frozen=True)
class WeightedUpdate:
    """An admitted update with its weight.

    Attributes:
        update: The update; its factors may have been bounded.
        weight: Its weight in the sum.
        bounded: "A", "B" (the change of the factor) or "weight", to the share that is left of it.
    """

    update: ClientUpdate
    weight: float
    bounded: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RobustResult:
    """A round's updates after bounds on their influence.

    Attributes:
        sums: The summands. A robust aggregation replaces the updates by one.
        clients: Client to its own weighted update, for the record.
    """

    sums: Sequence[WeightedUpdate]
    clients: Mapping[str, WeightedUpdate]


class RobustAggregation(Protocol):
    """Bounds on a client's influence on the average; implemented by `hetlora.core.robust.Robustness`."""

    def __call__(
        self, answers: Sequence[tuple[TrainTask, ClientUpdate]], weigh: Callable[[ClientUpdate], float]
    ) -> RobustResult:
        """Return the summands of a round, from all its admitted updates in the cohort's order."""
        ...


class LocalTrainer(Protocol):
    """Local training of a batch of clients; implemented by `hetlora.training.local`."""

    def __call__(self, tasks: Sequence[TrainTask], penalty: Penalty | None) -> list[ClientUpdate | ClientFailure]:
        """Return one answer per task, in order."""
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
    """Distribute by truncation: the first r_k slots by index, not by importance (HetLoRA's step 1; sure)."""
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
