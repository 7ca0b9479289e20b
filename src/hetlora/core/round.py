"""The round: the server sends tasks, clients train, and the server sums their updates into the next global adapter.

This is the whole loop, for every method and every engine (the four steps of HetLoRA are in `hetlora.methods.hetlora`)::

    for every client k of the round's cohort:
        task   = method.distribute(state, k)               # server: truncation to the client's rank
        update = engine.train(task, method)                # client: local steps with the penalty, then self-pruning
        admit(update)                                      # server: refuse invalid updates
        total  = method.add(total, update, method.weigh(update))      # one update at a time, in any order
    state = method.finish(state, total)

Every value that travels is a frozen record. A round never changes the state that it starts from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from hetlora.core.adapter import Adapter, Rank, num_bytes, num_parameters, rank_of
from hetlora.core.admission import ExpectedTraining, admit
from hetlora.core.method import (
    Engine,
    LocalTrainer,
    Method,
    RobustAggregation,
    expected,
    merge_totals,
)
from hetlora.core.persistent_map import updated
from hetlora.core.types import Client, ClientFailure, ClientUpdate, PartialTotal, ServerState, TrainTask
from hetlora.errors import RefusedUpdateError, printable

__all__ = [
    "ClientReport",
    "RoundReport",
    "local_round",
    "partial_total",
    "run_round",
    "run_rounds",
]


MOST_WEIGHT = 2.0**500
"""Largest weight, and its inverse the smallest: products with a weight then neither overflow nor vanish."""


def local_round(
    tasks: Sequence[TrainTask], method: Method[Any], fit: LocalTrainer
) -> Iterator[ClientUpdate | ClientFailure]:
    """Do the clients' half of a round: train with the method's penalty, then self-prune.

    Args:
        tasks: One task per client; all clients train in one batch.
        method: Defines the penalty and the pruning.
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
        bounded: See `WeightedUpdate`; empty if nothing was bounded.
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
    """The record of a round.

    Attributes:
        round: Its number, from 0.
        ranks: Client to its assigned rank, for the whole cohort.
        bytes_down: Bytes of the tensors sent to the whole cohort.
        clients: The clients whose updates were admitted, in the cohort's order.
        failures: Unusable answers with the reasons, also second answers and answers of clients that were not asked.
        summed: The clients that came as a `PartialTotal`, with their ranks after self-pruning.
        bytes_summed: Bytes of the tensors that these have sent.
    """

    round: int
    ranks: Mapping[str, Rank]
    bytes_down: int
    clients: tuple[ClientReport, ...]
    failures: tuple[ClientFailure, ...]
    summed: Mapping[str, Rank] = field(default_factory=dict)
    bytes_summed: int = 0

    def shares(self) -> dict[str, float]:
        """Return each client's share of the average, `p_k = w_k / Σ_j w_j`; all zero if all weights are.

        Empty if some clients came as a sum, since their weights are unknown.
        """
        if self.summed:
            return {}
        total = sum(client.weight for client in self.clients)
        return {client.client: client.weight / total if total else 0.0 for client in self.clients}


def run_round(
    state: ServerState,
    method: Method[Any],
    engine: Engine,
    cohort: Sequence[Client],
    *,
    training: ExpectedTraining | None = None,
    rounding: float = 0.0,
    robust: RobustAggregation | None = None,
) -> tuple[ServerState, RoundReport]:
    """Do one round with the clients of `cohort`.

    A failed client or a refused update costs the round only that client. Without any update the adapter does not change.

    Args:
        state: The state before the round.
        method: The method.
        engine: The place where the clients train.
        cohort: The clients of the round.
        training: The training of an honest client; an update that it cannot have made is refused. None admits all.
        rounding: The largest change of a number on its way here, as a share of the largest change of its slot.
        robust: Bounds a client's influence. It compares the updates, so that all of them are held in memory until the last one
            has come.

    Returns:
        The next state and the round's report.

    Raises:
        ValueError: The cohort names a client twice.
    """
    twice = [name for name, count in Counter(client.name for client in cohort).items() if count > 1]
    if twice:
        raise ValueError(f"the cohort of round {state.round} names {', '.join(twice)} twice; draw without replacement")
    tasks = {client.name: method.distribute(state, client) for client in cohort}
    examples = {client.name: client.examples for client in cohort} if training is not None else {}
    honest = expected(method, training, rounding)
    total = method.start(state)
    reports: dict[str, ClientReport] = {}
    held: dict[str, ClientUpdate] = {}
    kept: dict[str, Adapter] = {}
    failures: list[ClientFailure] = []
    summed: dict[str, Rank] = {}
    bytes_summed = 0
    answered: set[str] = set()
    for answer in engine.train(list(tasks.values()), method):
        if isinstance(answer, ClientFailure):
            failures.append(answer)
            continue
        if isinstance(answer, PartialTotal):
            problem = _partial_problem(answer, tasks, answered, method, robust)
            if problem is not None:
                lost = [str(client) for client in answer.clients if client not in summed] or ["a sum of nobody"]
                failures += [ClientFailure(printable(client), printable(problem)) for client in lost]
                continue
            total = method.merge(total, answer.total)
            summed |= answer.ranks
            answered |= answer.ranks.keys()
            bytes_summed += answer.bytes_up
            continue
        try:
            task = admit(answer, tasks, answered, honest)
            weight = _weight(method, answer, examples.get(answer.client, answer.examples))
        except RefusedUpdateError as refusal:
            sender = getattr(answer, "client", None)  # the answer may be anything
            failures.append(ClientFailure(sender if isinstance(sender, str) else repr(sender), str(refusal)))
            continue
        answered.add(answer.client)
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
        for summand in result.sums:
            total = method.add(total, summand.update, summand.weight)
        for task, answer in in_order:
            counted = result.clients[task.client]
            reports[task.client] = _report(task, answer, counted.weight, counted.bounded)

    silent = tasks.keys() - reports.keys() - summed.keys() - {failure.client for failure in failures}
    failures += [ClientFailure(client, "no answer") for client in sorted(silent)]
    pruned = {report.client: report.new_rank for report in reports.values() if report.pruned}
    pruned |= {client: rank for client, rank in summed.items() if rank != tasks[client].rank}
    after = method.finish(state, total) if reports or summed else state
    after = replace(
        after,
        round=state.round + 1,
        ranks=updated(state.ranks, pruned),
        answered=updated(state.answered, dict.fromkeys([*reports, *summed], state.round)),
        kept=updated(state.kept, kept),
    )
    return after, RoundReport(
        round=state.round,
        ranks={client: task.rank for client, task in tasks.items()},
        bytes_down=sum(task.bytes_down for task in tasks.values()),
        clients=tuple(reports[client] for client in tasks if client in reports),
        failures=tuple(failures),
        summed={client: summed[client] for client in tasks if client in summed},
        bytes_summed=bytes_summed,
    )


def _partial_problem(
    partial: PartialTotal,
    tasks: Mapping[str, TrainTask],
    answered: Set[str],
    method: Method[Any],
    robust: RobustAggregation | None,
) -> str | None:
    """Return why a sum of several clients cannot be added; None if it can."""
    names = partial.clients
    if not names or not set(names) <= tasks.keys():
        return f"a sum of the clients {', '.join(map(repr, names))}, which are not some of those that were asked"
    if not answered.isdisjoint(names):
        return f"a sum with {', '.join(sorted(answered & set(names)))}, who had answered already"
    if robust is not None:
        return "a sum of several clients, and [robustness] needs each client's update"
    for client, rank in partial.ranks.items():
        sent = tasks[client]
        known = set(rank) == set(sent.adapter) if isinstance(rank, Mapping) else isinstance(rank, int)
        if not known or not all(1 <= rank_of(rank, name) <= rank_of(sent.rank, name) for name in sent.adapter):
            return f"a sum in which client {client!r} has rank {rank}, and was sent {sent.rank}"
    if method.merge is merge_totals and not hasattr(partial.total, "merge"):
        return f"a sum of several clients, and the total of {method.name}, {type(partial.total).__name__}, has no merge"
    if method.keep is not None or method.averages == "nothing":
        return f"a sum of several clients, and {method.name} needs each client's update"
    return None


def _weight(method: Method[Any], update: ClientUpdate, most_examples: int) -> float:
    """Return the weight of an admitted update; refuse it if it has none, or reports more examples than the client has."""
    if update.examples > most_examples:
        problem = f"client {update.client!r} reports {update.examples} examples, and has {most_examples}"
        raise RefusedUpdateError(printable(problem))
    try:
        weight = float(method.weigh(update))
    except Exception as error:  # a client's numbers must not end the run
        raise RefusedUpdateError(printable(f"client {update.client!r} cannot be weighed: {error}"[:500])) from error
    if not (weight == 0.0 or 1 / MOST_WEIGHT <= weight <= MOST_WEIGHT):
        raise RefusedUpdateError(printable(f"client {update.client!r} has a weight of {weight}"))
    return weight


def partial_total(method: Method[Any], tasks: Sequence[TrainTask], updates: Sequence[ClientUpdate]) -> PartialTotal:
    """Return the weighted sum of some clients' admitted updates, for an engine to yield.

    Args:
        method: The method that sums.
        tasks: All tasks of the round; the widest per module gives the size of the sum.
        updates: The updates to sum; admit them before.

    Raises:
        RefusedUpdateError: An update has no weight, as in a round.
    """
    widest = {
        module: max((task.adapter[module] for task in tasks), key=lambda pair: pair.A.shape[-2])
        for module in tasks[0].adapter
    }
    total = method.start(ServerState(widest, round=tasks[0].round))
    weights = [_weight(method, update, update.examples) for update in updates]
    for update, weight in zip(updates, weights, strict=True):
        total = method.add(total, update, weight)
    sends = {task.client: task.sends for task in tasks}
    bytes_up = sum(num_bytes(update.adapter, sends[update.client]) for update in updates)
    return PartialTotal(total, {update.client: update.rank for update in updates}, bytes_up)


def _weight_if_any(method: Method[Any], update: ClientUpdate) -> float:
    """Return the weight of an update after bounding its factors; 0 if it has no weight any more."""
    try:
        return _weight(method, update, update.examples)
    except RefusedUpdateError:
        return 0.0


def run_rounds(
    state: ServerState,
    method: Method[Any],
    engine: Engine,
    cohort: Callable[[int], Sequence[Client]],
    rounds: int,
    *,
    training: ExpectedTraining | None = None,
    rounding: float = 0.0,
    robust: RobustAggregation | None = None,
) -> Iterator[tuple[ServerState, RoundReport]]:
    """Do the rounds `state.round … rounds - 1`, yielding the state after each round with its report.

    Args:
        state: The state to start or resume from.
        method: The method.
        engine: The place where the clients train.
        cohort: Returns the clients of a round, from its number.
        rounds: Total number of rounds of the run.
        training: See `run_round`.
        rounding: See `run_round`.
        robust: See `run_round`.
    """
    while state.round < rounds:
        clients = cohort(state.round)
        state, report = run_round(state, method, engine, clients, training=training, rounding=rounding, robust=robust)
        yield state, report


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
