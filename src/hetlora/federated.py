"""The round: what the server sends, what a client does with it, and how the answers become the next global adapter.

This is the whole loop, for every method and every engine (HetLoRA, Cho et al., EMNLP 2024; the paper's four steps are
in `hetlora.methods.hetlora`)::

    for every client k of the round's cohort:
        task   = method.distribute(state, k)               # server: truncation to the client's rank
        update = engine.train(task, method)                # client: local steps with the penalty, then self-pruning
        admit(update)                                      # server: refuse what the sum must not see
        total  = method.add(total, update, method.weigh(update))      # one update at a time, in any order
    state = method.finish(state, total)

Every value that travels is a frozen record; the state a round starts from is never changed.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, Protocol, TypeVar

from torch import Tensor

from hetlora.adapter import Adapter, Factors, Rank, num_bytes, num_parameters, rank_of, truncate
from hetlora.admission import Expected, Training, admit
from hetlora.errors import RefusedUpdateError, ShapeError, printable
from hetlora.versioned import updated

__all__ = [
    "Bounded",
    "Client",
    "ClientFailure",
    "ClientReport",
    "ClientUpdate",
    "Counted",
    "Engine",
    "Fit",
    "Folded",
    "Method",
    "Penalty",
    "Robust",
    "RoundReport",
    "ServerState",
    "TrainTask",
    "example_weight",
    "keep_rank",
    "local_round",
    "no_penalty",
    "run",
    "run_round",
    "truncate_to_rank",
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
class Folded:
    """What a method has folded into the frozen base: module m then computes `(W0 + s ΔW_m) x + s B A x`.

    Attributes:
        delta: Module to `ΔW [out, in]`, float32; empty where nothing was folded.
        sizes: Round to the bytes that its part of `delta` takes as stacked factors, which is how it travels.
    """

    delta: Mapping[str, Tensor] = field(default_factory=dict)
    sizes: Mapping[int, int] = field(default_factory=dict)

    def plus(self, delta: Mapping[str, Tensor], round_number: int, size: int) -> Folded:
        """Return this with one round's change on top."""
        total = {module: self.delta[module] + part if self.delta else part for module, part in delta.items()}
        return Folded({name: part.float() for name, part in total.items()}, {**self.sizes, round_number: size})

    def num_bytes(self, since: int) -> int:
        """Return what a client must receive that has all before round `since`: the rounds' stacks, or the sum if smaller."""
        missed = sum(size for round_number, size in self.sizes.items() if round_number >= since)
        return min(missed, sum(part.numel() * part.element_size() for part in self.delta.values()))


NOTHING_FOLDED = Folded()

MOST_WEIGHT = 2.0**500
"""What no honest weight reaches, nor its inverse, so that products with it neither overflow nor vanish."""


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
    folded: Folded = NOTHING_FOLDED
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
    def iterate(self) -> ServerState:
        """The state with the adapter that clients go on from, where a method hands out another (`hetlora.methods.steady`)."""
        return replace(self, adapter=self.moments["iterate"]) if "iterate" in self.moments else self

    @functools.cached_property
    def served(self) -> ServerState:
        """The state whose distribution is what clients are served with, and not what they train on next.

        Both are the same but for an average over rounds, which `distribute` passes over for its moment "iterate".
        """
        return replace(self, moments={}) if "iterate" in self.moments else self

    def rank(self, client: Client) -> Rank:
        """Return the client's rank as of now: what is left after pruning, and no more than it affords."""
        left = self.ranks.get(client.name, client.rank)
        # The device behind a name may have been exchanged for a smaller one.
        if isinstance(left, int) and isinstance(client.rank, int):
            return min(left, client.rank)
        return {module: min(rank_of(left, module), rank_of(client.rank, module)) for module in self.adapter}

    def used(self, clients: Iterable[Client]) -> Adapter:
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
    folded: Folded = NOTHING_FOLDED
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


Total = TypeVar("Total")
Penalty = Callable[[Adapter], Tensor]
"""Maps the live factors `[G, ...]` of a batch of clients to one differentiable value a client, `[G]`."""


def no_penalty(_: Sequence[TrainTask]) -> Penalty | None:
    """Add nothing to the local loss."""
    return None


def keep_rank(_: TrainTask, update: ClientUpdate) -> ClientUpdate:
    """Send what was trained."""
    return update


@dataclass(frozen=True)
class Method(Generic[Total]):
    """A federated method: a record of pure functions, made by a factory whose arguments are its hyperparameters.

    Attributes:
        name: Its name in `hetlora.methods.METHODS`.
        distribute: Server: what a client receives.
        weigh: Server: an update's weight, at least 0. Weights need not sum to one.
        start: Server: an empty sum.
        add: Server: the sum with one more update. Takes over `total` (it may reuse its memory); order does not matter.
        finish: Server: the next state's adapter from the sum. The loop itself keeps rounds and ranks.
        penalty: Client: from the tasks of a batch of G clients, the term added to each one's local loss; None for none.
        prune: Client: after local training, the update it sends. One that changes more than the rank has no `lowest_rank`,
            and is then not held against what local training can come to.
        lowest_rank: Server: from a rank that was assigned, the lowest one that `prune` leaves of it; None where that is not
            known, or nobody prunes.
        keep: Client: from its update, what it keeps on its device for its next round; None for nothing. A method that keeps
            something is personal: each client is served by its own adapter, the one that `distribute` gives it.
        trains: "adapter", or "weights" for every weight of the base. A weight of n numbers then is a module of shape
            `[n, 1]` whose B `[n, 1]` is its change, beside the frozen A `[[1]]`.
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
    trains: Literal["adapter", "weights"] = "adapter"
    clients: Literal["sampled", "pooled", "nobody"] = "sampled"
    refuses: Mapping[str, str] = field(default_factory=dict)


def expected(method: Method[Any], training: Training | None) -> Expected:
    """Return what an honest update of a method satisfies beyond its task.

    Args:
        method: One that nobody prunes in leaves each rank as it was assigned.
        training: What a client does before it prunes; None where that is not known.
    """
    if method.prune is keep_rank:
        return Expected(training, lambda assigned: assigned)
    return Expected(training if method.lowest_rank else None, method.lowest_rank)


class Engine(Protocol):
    """Where clients train: in this process, or on other machines."""

    def train(self, tasks: Sequence[TrainTask], method: Method[Any]) -> Iterator[ClientUpdate | ClientFailure]:
        """Yield answers as they come, in any order; a client that gives none is yielded as a failure or not at all."""
        ...


@dataclass(frozen=True)
class Counted:
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
class Bounded:
    """A round's updates after bounds on their influence.

    Attributes:
        sums: What is added up; of a robust aggregation not the updates themselves.
        clients: Client to its own update as it counts, for the record.
    """

    sums: Sequence[Counted]
    clients: Mapping[str, Counted]


class Robust(Protocol):
    """Bounds on what a client can do to the average; implemented by `hetlora.robust.Robustness`."""

    def __call__(
        self, answers: Sequence[tuple[TrainTask, ClientUpdate]], weigh: Callable[[ClientUpdate], float]
    ) -> Bounded:
        """Return what enters the sum, from all admitted updates of a round in the cohort's order."""
        ...


class Fit(Protocol):
    """Local training of a batch of clients; implemented by `hetlora.training`."""

    def __call__(self, tasks: Sequence[TrainTask], penalty: Penalty | None) -> list[ClientUpdate | ClientFailure]:
        """Return one answer a task, in order."""
        ...


def local_round(tasks: Sequence[TrainTask], method: Method[Any], fit: Fit) -> Iterator[ClientUpdate | ClientFailure]:
    """Do the clients' half of a round: train with the method's penalty, then self-prune.

    Args:
        tasks: One task a client; all of them train in one batch.
        method: Gives the penalty and the pruning.
        fit: Trains the batch.
    """
    for task, answer in zip(tasks, fit(tasks, method.penalty(tasks)), strict=True):
        yield answer if isinstance(answer, ClientFailure) else method.prune(task, answer)


@dataclass(frozen=True)
class ClientReport:
    """One client's part in a round, for the record.

    Attributes:
        client: Its name.
        rank: The rank it received.
        new_rank: The rank after self-pruning.
        weight: Its weight in the sum; its share of the average is `weight / Σ weights`.
        loss: Its mean training loss.
        examples: Number of its training examples.
        steps: Local steps it took.
        bytes_up: Bytes of the tensors it sent.
        trained: Number of parameters it trained.
        bounded: What was lowered of its influence, and to which share, see `Counted`; empty where nothing was.
    """

    client: str
    rank: Rank
    new_rank: Rank
    weight: float
    loss: float
    examples: int
    steps: int
    bytes_up: int
    trained: int
    bounded: Mapping[str, float] = field(default_factory=dict)

    @property
    def pruned(self) -> bool:
        """Whether it cut its rank in this round."""
        return self.new_rank != self.rank


@dataclass(frozen=True)
class RoundReport:
    """What happened in a round.

    Attributes:
        round: Its number, from 0.
        ranks: Client to the rank it was sent, for the whole cohort.
        bytes_down: Bytes of the tensors sent to the whole cohort.
        clients: The clients whose updates were admitted, in the cohort's order.
        failures: Answers that could not be used, with the reasons: of every client without a report, and a second or
            foreign answer where one came.
    """

    round: int
    ranks: Mapping[str, Rank]
    bytes_down: int
    clients: tuple[ClientReport, ...]
    failures: tuple[ClientFailure, ...]

    def shares(self) -> dict[str, float]:
        """Return each client's share of the average, `p_k = w_k / Σ_j w_j`; all zero where every weight is."""
        total = sum(client.weight for client in self.clients)
        return {client.client: client.weight / total if total else 0.0 for client in self.clients}


def run_round(
    state: ServerState,
    method: Method[Any],
    engine: Engine,
    cohort: Sequence[Client],
    *,
    training: Training | None = None,
    robust: Robust | None = None,
) -> tuple[ServerState, RoundReport]:
    """Do one round with the clients of `cohort`.

    A client that fails, or whose update is refused, costs the round only that client. With no update at all the
    adapter stays as it was.

    Args:
        state: The state before the round.
        method: What the server and the clients do.
        engine: Where the clients train.
        cohort: Who takes part.
        training: What an honest client does; an update that cannot have come from it is refused. None believes all.
        robust: Bounds what a client can do to the average. It compares a round's updates, which are therefore held in memory
            until all have come instead of being added up one by one.

    Returns:
        The next state, and the report of what happened.

    Raises:
        ValueError: The cohort names a client twice.
    """
    twice = [name for name, count in Counter(client.name for client in cohort).items() if count > 1]
    if twice:
        raise ValueError(f"the cohort of round {state.round} names {', '.join(twice)} twice; draw without replacement")
    tasks = {client.name: method.distribute(state, client) for client in cohort}
    most = {client.name: client.examples for client in cohort} if training is not None else {}
    honest = expected(method, training)
    total = method.start(state)
    reports: dict[str, ClientReport] = {}
    held: dict[str, ClientUpdate] = {}
    kept: dict[str, Adapter] = {}
    failures: list[ClientFailure] = []
    for answer in engine.train(list(tasks.values()), method):
        if isinstance(answer, ClientFailure):
            failures.append(answer)
            continue
        try:
            task = admit(answer, tasks, reports.keys() | held.keys(), honest)
            weight = _weight(method, answer, most.get(answer.client, answer.examples))
        except RefusedUpdateError as refusal:
            sender = getattr(answer, "client", None)  # whatever came, it need not be an update
            failures.append(ClientFailure(sender if isinstance(sender, str) else repr(sender), str(refusal)))
            continue
        if robust is None:
            total = method.add(total, answer, weight)
            reports[answer.client] = _report(task, answer, weight)
        else:
            held[answer.client] = answer
        if method.keep is not None:
            kept[answer.client] = method.keep(answer)
    if robust is not None:
        in_order = [(tasks[client], held[client]) for client in tasks if client in held]
        result = robust(in_order, lambda update: _weight_if_any(method, update))
        for one in result.sums:
            total = method.add(total, one.update, one.weight)
        for task, answer in in_order:
            counted = result.clients[task.client]
            reports[task.client] = _report(task, answer, counted.weight, counted.bounded)

    silent = tasks.keys() - reports.keys() - {failure.client for failure in failures}
    failures += [ClientFailure(client, "no answer") for client in sorted(silent)]
    pruned = {report.client: report.new_rank for report in reports.values() if report.pruned}
    after = method.finish(state, total) if reports else state
    after = replace(
        after,
        round=state.round + 1,
        ranks=updated(state.ranks, pruned),
        answered=updated(state.answered, dict.fromkeys(reports, state.round)),
        kept=updated(state.kept, kept),
    )
    return after, RoundReport(
        round=state.round,
        ranks={client: task.rank for client, task in tasks.items()},
        bytes_down=sum(task.bytes_down for task in tasks.values()),
        clients=tuple(reports[client] for client in tasks if client in reports),
        failures=tuple(failures),
    )


def _weight(method: Method[Any], update: ClientUpdate, most_examples: int) -> float:
    """Return the weight of an admitted update, or refuse one that has none, or one of more examples than there are."""
    if update.examples > most_examples:
        told = f"client {update.client!r} reports {update.examples} examples, and has {most_examples}"
        raise RefusedUpdateError(printable(told))
    try:
        weight = float(method.weigh(update))
    except Exception as error:  # a method's arithmetic on what a client says must not end the run
        raise RefusedUpdateError(printable(f"client {update.client!r} cannot be weighed: {error}"[:500])) from error
    if not (weight == 0.0 or 1 / MOST_WEIGHT <= weight <= MOST_WEIGHT):
        raise RefusedUpdateError(printable(f"client {update.client!r} has a weight of {weight}"))
    return weight


def _weight_if_any(method: Method[Any], update: ClientUpdate) -> float:
    """Return the weight of an admitted update whose factors were bounded since; 0 where it has none any more."""
    try:
        return _weight(method, update, update.examples)
    except RefusedUpdateError:
        return 0.0


def run(
    state: ServerState,
    method: Method[Any],
    engine: Engine,
    cohort: Callable[[int], Sequence[Client]],
    rounds: int,
    *,
    training: Training | None = None,
    robust: Robust | None = None,
) -> Iterator[tuple[ServerState, RoundReport]]:
    """Do the rounds `state.round … rounds - 1`, yielding the state after each with its report.

    Args:
        state: Where to start, or to go on.
        method: What the server and the clients do.
        engine: Where the clients train.
        cohort: From a round's number, the clients that take part in it.
        rounds: Total number of rounds of the run.
        training: As `run_round` takes it.
        robust: As `run_round` takes it.
    """
    while state.round < rounds:
        state, report = run_round(state, method, engine, cohort(state.round), training=training, robust=robust)
        yield state, report


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


def _report(
    task: TrainTask, update: ClientUpdate, weight: float, bounded: Mapping[str, float] | None = None
) -> ClientReport:
    return ClientReport(
        client=task.client,
        rank=task.rank,
        new_rank=update.rank,
        weight=weight,
        loss=update.loss,
        examples=update.examples,
        steps=update.steps,
        bytes_up=num_bytes(update.adapter, task.sends),
        trained=num_parameters(task.adapter, task.trains),
        bounded=bounded or {},
    )
