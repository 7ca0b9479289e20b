"""The laws that every federated method obeys; `check_method` checks them.

The laws are checked on small random factors. No model is loaded, and each law takes milliseconds.
"""

from __future__ import annotations

import functools
import gc
import math
import random
import sys
import types
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetlora.core.adapter import (
    Adapter,
    LoraPair,
    ModuleShape,
    Rank,
    batch,
    live_slots,
    map_tensors,
    pad,
    rank_of,
    stacked,
    truncate,
    zeros,
)
from hetlora.core.method import Method, Penalty, keep_rank, merge_totals
from hetlora.core.round import RoundReport, local_round, run_round, run_rounds
from hetlora.core.types import Client, ClientFailure, ClientUpdate, ServerState, TrainTask
from hetlora.errors import HetLoraError
from hetlora.methods.fedavg import fedavg

__all__ = ["BrokenLawError", "Law", "check_method", "laws", "state_difference"]

FULL = 8
"""Rank of the global adapter. No module is smaller, so that the SVD of a product fills every slot."""
SHAPES = {"q_proj": ModuleShape(9, 10), "k_proj": ModuleShape(9, 10), "v_proj": ModuleShape(8, 11)}
WEIGHTS = {"weight": ModuleShape(6, 1), "bias": ModuleShape(2, 1)}
"""The modules of a method that trains weights; see `Method.trains`."""
RANKS = (2, 7, 4, FULL)
ROUNDING = 2.0**-23
"""Relative distance of neighbouring float32 numbers: the tolerance for sums that a method computes itself."""
OF_PRODUCTS = 1e-5
"""Tolerance for a product of float32 factors, relative to its largest number."""
GROWTH = 1.25
"""Factor by which a total may grow when the number of updates doubles. A total that holds every update doubles."""

Law = Callable[[Method[Any], int], None]
"""Takes a method and a seed; raises `BrokenLawError` if the method breaks the law."""
Body = Callable[["_Federation"], Iterator[str]]
Train = Callable[[TrainTask], "ClientUpdate | ClientFailure"]


class BrokenLawError(HetLoraError, AssertionError):
    """A method breaks a law.

    Attributes:
        law: The name of the law.
        problem: The case and the values that break it.
    """

    def __init__(self, method: str, law: str, promise: str, problem: str) -> None:
        self.law, self.problem = law, problem
        super().__init__(f"method {method!r} breaks the law {law!r} ({promise}): {problem}")


def check_method(method: Method[Any], *, seed: int = 0, only: str | Collection[str] | None = None) -> None:
    """Check the laws that every method must obey, and raise for the first one that is broken.

    A method's declarations decide which laws apply: a method that `averages` nothing is not compared with FedAvg, and a method
    with `ranks` "equal" meets no clients of different ranks.

    Args:
        method: The method, as its factory makes it.
        seed: Seed of the random factors. The same seed gives the same verdict.
        only: The name of one law or the names of several; None for all of `laws`.

    Raises:
        BrokenLawError: Names the law, the case and the values. It is also an `AssertionError`.
        HetLoraError: `method` is no `Method`, or `only` names no law.

    Example:
        >>> from dataclasses import replace
        >>> from hetlora.methods import fedavg
        >>> check_method(fedavg())
        >>> check_method(replace(fedavg(), weigh=lambda update: -1.0), only="weights")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        hetlora.testing.BrokenLawError: method 'fedavg' breaks the law 'weights' (...): 'client-0' has a weight of -1.0
    """
    if not isinstance(method, Method):
        problem = f"a method is expected, and {method!r} is of type {type(method).__name__}"
        raise HetLoraError(f"{problem}; give what a factory returns, such as hetlora.methods.fedavg()")
    table = dict(laws())
    wanted = list(table) if only is None else [only] if isinstance(only, str) else list(only)
    if unknown := [name for name in wanted if name not in table]:
        raise HetLoraError(f"only={unknown[0]!r} is no law; use some of {', '.join(table)}")
    for name in wanted:
        table[name](method, seed)


def laws() -> Iterator[tuple[str, Law]]:
    """Yield every law: its name, and a function of a method and a seed whose docstring states the law.

    Example:
        >>> from hetlora.methods import fedavg
        >>> table = dict(laws())
        >>> table["client order"](fedavg(), 0)
        >>> print(table["client order"].__doc__)
        the same updates in any order give the same bits
    """
    # Wrong weights break other laws, too, so that this law must come first.
    yield from sorted(_LAWS.items(), key=lambda law: law[0] != "weights")


_LAWS: dict[str, Law] = {}


def _law(name: str, promise: str) -> Callable[[Body], Body]:
    """Add a law to the table: a function that yields each breach of it, as a case with its values."""

    def enter(body: Body) -> Body:
        def law(method: Method[Any], seed: int) -> None:
            try:
                problem = next(body(_Federation(method, seed)), None)
            except Exception as error:  # a method is foreign code and may raise anything; the error must name the law
                raise BrokenLawError(method.name, name, promise, f"{type(error).__name__}: {error}") from error
            if problem is not None:
                raise BrokenLawError(method.name, name, promise, problem)

        law.__name__, law.__doc__ = body.__name__, promise
        _LAWS[name] = law
        return body

    return enter


# Clients whose training is a pure function of their task -------------------------------------------------------------


@dataclass(frozen=True)
class _Engine:
    """Clients that train one after the other, in the order that `order` gives."""

    change: Train
    order: Callable[[Sequence[TrainTask]], Iterable[TrainTask]] = list

    def train(self, tasks: Sequence[TrainTask], method: Method[Any]) -> Iterator[ClientUpdate | ClientFailure]:
        for task in self.order(tasks):
            yield from local_round([task], method, lambda one, _: [self.change(one[0])])


@dataclass(frozen=True)
class _Federation:
    """A method, with clients and states that its declarations allow."""

    method: Method[Any]
    seed: int

    @property
    def weights(self) -> bool:
        return self.method.trains == "weights"

    @property
    def full(self) -> int:
        return 1 if self.weights else FULL

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the cohort: one rank for a pooled method, and equal ranks if the method requires them."""
        if self.method.clients == "pooled":
            return (self.full,)
        return (self.full,) * len(RANKS) if self.weights or self.method.ranks == "equal" else RANKS

    @property
    def mixed(self) -> bool:
        return len(set(self.ranks)) > 1

    @property
    def cohort(self) -> list[Client]:
        return [Client(f"client-{place}", rank, 10) for place, rank in enumerate(self.ranks)]

    def alike(self, count: int) -> list[Client]:
        """Return `count` clients of full rank, or one if the method is pooled."""
        count = 1 if self.method.clients == "pooled" else count
        return [Client(f"full-{place}", self.full, 10) for place in range(count)]

    @functools.cached_property
    def first(self) -> ServerState:
        """A state with random factors. For a method that trains weights, A is the constant 1."""
        shapes = WEIGHTS if self.weights else SHAPES
        drawn = _noise(zeros(shapes, self.full), f"{self.seed}")
        if self.weights:
            drawn = {name: LoraPair(torch.ones_like(A), B) for name, (A, B) in drawn.items()}
        return ServerState(drawn, seed=self.seed)

    @functools.cached_property
    def second(self) -> ServerState:
        """The state after one round of the cohort."""
        return self.round(self.first)[0]

    def round(
        self, state: ServerState, change: Train | None = None, cohort: Sequence[Client] | None = None, **parts: Any
    ) -> tuple[ServerState, RoundReport]:
        """Do a round; `parts` replace fields of the method and the engine's `order`."""
        engine = _Engine(change or self.trained, parts.pop("order", list))
        return run_round(state, replace(self.method, **parts), engine, self.cohort if cohort is None else cohort)

    def trained(self, task: TrainTask) -> ClientUpdate:
        """Return factors far from the received ones: larger or smaller, depending on the client's name."""
        key = f"{self.seed} {task.client} {task.round}"
        number = zlib.crc32(key.encode())
        size = 4.0 if number % 2 else 0.2
        moved = _combined(lambda factor, noise: size * (factor + noise), task.adapter, _noise(task.adapter, key))
        return _update(task, moved, examples=1 + number % 7)

    def updates(self, state: ServerState, cohort: Sequence[Client] | None = None) -> list[ClientUpdate]:
        """Return the updates of a cohort."""
        return [self.trained(self.method.distribute(state, client)) for client in cohort or self.cohort]

    def folded(
        self, state: ServerState, updates: Iterable[ClientUpdate], weight: float | None = None, scale: float = 1.0
    ) -> ServerState:
        """Return the state after adding updates in this order, each with its own weight, or all with `weight`."""
        total = self.method.start(state)
        for update in updates:
            total = self.method.add(total, update, scale * (self.method.weigh(update) if weight is None else weight))
        return self.method.finish(state, total)

    def computed(self, state: ServerState, client: Client) -> dict[str, Tensor]:
        """Return `folded + B A` of the adapter that serves a client, in float64: its change of the base."""
        task = self.method.distribute(state.serving_state, client)
        return _products(task.adapter, task.folded.delta)


def _noise(like: Adapter, key: str) -> dict[str, LoraPair]:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return map_tensors(lambda factor: torch.randn(factor.shape, generator=generator), like)


def _combined(function: Callable[[Tensor, Tensor], Tensor], one: Adapter, other: Adapter) -> dict[str, LoraPair]:
    return {name: LoraPair(function(A, other[name].A), function(B, other[name].B)) for name, (A, B) in one.items()}


def _update(task: TrainTask, adapter: Adapter | None = None, examples: int = 3) -> ClientUpdate:
    """Return the update with these factors; frozen factors stay as received."""
    own = task.adapter if adapter is None else adapter
    kept = {
        name: LoraPair(*(getattr((own if one in task.trains else task.adapter)[name], one) for one in ("A", "B")))
        for name in task.adapter
    }
    return ClientUpdate(task.client, task.round, task.rank, kept, examples, steps=1, loss=1.0)


def _drawn_alike(task: TrainTask) -> ClientUpdate:
    """Return the same factors for all clients of a round that have the same rank."""
    return _update(task, _noise(task.adapter, f"round {task.round}"))


# Comparisons ------------------------------------------------------------------------------------------------------------


def _named(adapter: Adapter, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{name}.{one}": getattr(adapter[name], one) for name in sorted(adapter) for one in ("A", "B")}


def _tensors(state: ServerState) -> dict[str, Tensor]:
    """Return all tensors of a state by name."""
    found = _named(state.adapter) | {
        f"the change folded into {name}": part for name, part in state.folded.delta.items()
    }
    for name, kept in state.kept.items():
        found |= _named(kept, f"what {name!r} keeps, ")
    for name, moment in state.moments.items():
        found |= _named(moment, f"the moment {name!r}, ")
    return found


def _bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str | None:
    """Describe the first tensor that is not equal bit for bit; None if all are."""
    for name in sorted(one.keys() ^ other.keys()):
        return f"{name} is in one of them only"
    for name, tensor in one.items():
        if tensor.shape != other[name].shape:
            return f"{name} has the shapes {tuple(tensor.shape)} and {tuple(other[name].shape)}"
        if not torch.equal(tensor, other[name]):
            return f"{name} differs by {float((tensor - other[name]).abs().max()):.3g}"
    return None


def _near(one: Mapping[str, Tensor], other: Mapping[str, Tensor], share: float) -> str | None:
    """Describe the first tensor that differs by more than a share of its largest number; None if none does."""
    for name, tensor in one.items():
        apart, size = float((tensor - other[name]).abs().max()), float(other[name].abs().max())
        if not apart <= share * size:  # NaN is not
            return f"{name} differs by {apart:.3g}, its largest number is {size:.3g}"
    return None


def state_difference(one: ServerState, other: ServerState) -> str | None:
    """Describe the first difference between two states; None if they are equal bit for bit.

    `round` and `answered` are not compared.

    Example:
        >>> zero, one = ({"m": LoraPair(torch.zeros(1, 1), torch.full((1, 1), b))} for b in (0.0, 1.0))
        >>> state_difference(ServerState(zero), ServerState(one))
        'm.B differs by 1'
    """
    if dict(one.ranks) != dict(other.ranks):
        return f"the ranks are {dict(one.ranks)} and {dict(other.ranks)}"
    if dict(one.folded.sizes) != dict(other.folded.sizes):
        return f"the sizes of what is folded are {dict(one.folded.sizes)} and {dict(other.folded.sizes)}"
    return _bits(_tensors(one), _tensors(other))


def _products(adapter: Adapter, folded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: B.double() @ A.double() + (folded[name].double() if folded else 0.0) for name, (A, B) in adapter.items()
    }


def _copy(state: ServerState) -> ServerState:
    """Return an equal state that shares no memory with this one, like one that was saved and loaded."""

    def read(tensor: Tensor) -> Tensor:
        return torch.from_numpy(np.array(tensor.numpy(), copy=True))

    def all_of(adapters: Mapping[str, Adapter]) -> dict[str, dict[str, LoraPair]]:
        return {name: map_tensors(read, adapter) for name, adapter in adapters.items()}

    folded = replace(
        state.folded,
        delta={name: read(part) for name, part in state.folded.delta.items()},
        sizes=dict(state.folded.sizes),
    )
    return ServerState(
        map_tensors(read, state.adapter),
        round=state.round,
        ranks=dict(state.ranks),
        answered=dict(state.answered),
        folded=folded,
        moments=all_of(state.moments),
        kept=all_of(state.kept),
        seed=state.seed,
    )


# What clients receive ---------------------------------------------------------------------------------------------------


@_law("tasks", "a client receives a task of its own, with as many slots as its rank")
def _tasks(fed: _Federation) -> Iterator[str]:
    cohort = [*fed.cohort, Client("newcomer", fed.ranks[0], 1)]
    states = [("at first", fed.first), ("after a round", fed.second)]
    if fed.mixed:
        per_module = {name: 1 + place for place, name in enumerate(fed.first.adapter)}
        states.append(("with a rank per module", replace(fed.first, ranks={cohort[-2].name: per_module})))
    for when, state in states:
        for client in cohort:
            task, rank = fed.method.distribute(state, client), state.rank(client)
            client_text = f"{when}, {client.name!r} of rank {rank}"
            if (task.client, task.round) != (client.name, state.round):
                yield f"{client_text} in round {state.round} receives the task of {task.client!r} in round {task.round}"
            if task.adapter.keys() != state.adapter.keys():
                yield f"{client_text} receives the modules {', '.join(task.adapter)}"
            for name, (A, B) in task.adapter.items():
                slots, out, width = rank_of(rank, name), state.adapter[name].B.shape[0], state.adapter[name].A.shape[1]
                if rank_of(task.rank, name) != slots or (A.shape, B.shape) != ((slots, width), (out, slots)):
                    yield f"{client_text} gets slots of rank {task.rank} in {name}, A {tuple(A.shape)} and B {tuple(B.shape)}"
                if not (A.dtype == B.dtype == torch.float32 and A.isfinite().all() and B.isfinite().all()):
                    yield f"{client_text} receives factors in {name} that are not finite numbers of float32"


@_law("padding", "padding by zeros changes nothing: truncation undoes it, and what is padded stays exactly zero")
def _padding(fed: _Federation) -> Iterator[str]:
    if fed.weights:  # their rank is always 1
        return
    wide = replace(fed.first, adapter=pad(fed.first.adapter, FULL + 3))
    for client in fed.cohort:
        task = fed.method.distribute(fed.first, client)
        if (
            difference := _bits(_named(truncate(pad(task.adapter, FULL), task.rank)), _named(task.adapter))
        ) is not None:
            yield f"{client.name!r} of rank {client.rank}: padded and truncated, {difference}"
        padded = task if fed.method.ranks == "equal" else fed.method.distribute(wide, client)
        if (difference := _bits(_named(padded.adapter), _named(task.adapter))) is not None:
            yield f"{client.name!r} of rank {client.rank} receives others from a padded global adapter: {difference}"
    for when, tasks, live, values in _penalties(fed):
        for place, task in enumerate(tasks):
            for name, (A, B) in _gradient(values[place], live).items():
                rank = rank_of(task.rank, name)
                if A[place, rank:].any() or B[place, :, rank:].any():
                    yield f"{when}, the penalty moves slots of {name} that {task.client!r} of rank {rank} does not have"


@_law("clients apart", "a client's task does not depend on others, and names change no sum")
def _apart(fed: _Federation) -> Iterator[str]:
    state = fed.second
    for client in fed.cohort:
        name = client.name
        alone = replace(
            state,
            ranks={one: rank for one, rank in state.ranks.items() if one == name},
            answered={one: number for one, number in state.answered.items() if one == name},
            kept={one: kept for one, kept in state.kept.items() if one == name},
        )
        mine, without = (_named(fed.method.distribute(one, client).adapter) for one in (state, alone))
        if (difference := _bits(mine, without)) is not None:
            yield f"what {name!r} gets depends on what another client keeps: {difference}"
    updates = fed.updates(state)
    names = [update.client for update in updates]
    renamed = [replace(update, client=name) for update, name in zip(updates, names[1:] + names[:1], strict=True)]
    if (difference := state_difference(fed.folded(state, updates), fed.folded(state, renamed))) is not None:
        yield f"clients that exchange their names change the sum: {difference}"


# What a round does ------------------------------------------------------------------------------------------------------


@_law("values", "a round changes neither the state it begins from nor an update, and gives factors of the same shapes")
def _values(fed: _Federation) -> Iterator[str]:
    before = replace(fed.second, ranks={**fed.second.ranks, "somebody else": 1})
    copy, sent, copies = _copy(before), [], []

    def change(task: TrainTask) -> ClientUpdate:
        sent.append(fed.trained(task))
        copies.append(map_tensors(torch.clone, sent[-1].adapter))
        return sent[-1]

    after, _ = fed.round(before, change)
    if (difference := state_difference(before, copy)) is not None:
        yield f"the round changed the state that it began from: {difference}"
    if (before.round, dict(before.answered)) != (copy.round, dict(copy.answered)):
        yield f"the round changed who has answered, {copy.answered} to {before.answered}"
    for update, own in zip(sent, copies, strict=True):
        if (difference := _bits(_named(update.adapter), _named(own))) is not None:
            yield f"the round changed the update of {update.client!r}: {difference}"
    shapes, expected = ({name: tuple(one.shape) for name, one in _named(s.adapter).items()} for s in (after, before))
    if shapes != expected:
        yield f"the next state has factors of the shapes {shapes}, not {expected}"
    for name, tensor in _tensors(after).items():
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            yield f"in the next state {name} is not finite numbers of float32 ({tensor.dtype})"


@_law("client order", "the same updates in any order give the same bits")
def _order(fed: _Federation) -> Iterator[str]:
    expected, report = fed.round(fed.second)
    state, again = fed.round(fed.second, order=lambda tasks: tasks[::-1])
    if (difference := state_difference(state, expected)) is not None or again != report:
        yield f"a round whose clients answer in reverse: {difference or 'another report'}"
    # With equal weights, half of a mean's numbers lie exactly between two float32 numbers, where any earlier rounding shows.
    updates = [*fed.updates(fed.second), *fed.updates(fed.second, fed.alike(2))]
    orders = [updates[::-1], updates[::2] + updates[1::2]]
    for weight in (None, 0.157429):
        expected = fed.folded(fed.second, updates, weight)
        for order in orders:
            if (difference := state_difference(fed.folded(fed.second, order, weight), expected)) is not None:
                names = ", ".join(update.client for update in order)
                yield f"added in the order {names}{'' if weight is None else ' with equal weights'}: {difference}"


@_law(
    "grouping",
    "sums of some clients that are merged give the bits of single updates; a total without `merge` gives none",
)
def _grouping(fed: _Federation) -> Iterator[str]:
    method, updates = fed.method, fed.updates(fed.second)
    if method.averages == "nothing" or (
        method.merge is merge_totals and not hasattr(method.start(fed.second), "merge")
    ):
        return
    for size in (1, 2):
        total = method.start(fed.second)
        for first in range(0, len(updates), size):
            part = method.start(fed.second)
            for update in updates[first : first + size]:
                part = method.add(part, update, method.weigh(update))
            total = method.merge(total, part)
        if (
            difference := state_difference(method.finish(fed.second, total), fed.folded(fed.second, updates))
        ) is not None:
            yield f"sums of {size} clients each, merged: {difference}"


@_law("layout", "how an update lies in memory changes no bit")
def _layout(fed: _Federation) -> Iterator[str]:
    def in_stacks(adapter: Adapter) -> Adapter:
        return stacked(dict(reversed(list(adapter.items()))))

    def in_wider_memory(adapter: Adapter) -> Adapter:  # the columns of B lie apart
        return truncate(pad(adapter, FULL + 1), {name: A.shape[0] for name, (A, _) in adapter.items()})

    layouts: dict[str, Callable[[int, Adapter], Adapter]] = {
        "with its modules in another order": lambda _, adapter: dict(reversed(list(adapter.items()))),
        "as a FlatAdapter": lambda _, adapter: in_stacks(adapter),
        "as the first slots of wider factors": lambda _, adapter: in_wider_memory(adapter),
        "as a FlatAdapter at every other client": lambda k, adapter: adapter if k % 2 else in_stacks(adapter),
    }
    updates = fed.updates(fed.second)
    expected = fed.folded(fed.second, updates)
    for layout, change in layouts.items():
        laid = [replace(update, adapter=change(place, update.adapter)) for place, update in enumerate(updates)]
        if (difference := state_difference(fed.folded(fed.second, laid), expected)) is not None:
            yield f"an update {layout}: {difference}"


@_law("failures", "a client that fails or is refused costs the round only itself")
def _failures(fed: _Federation) -> Iterator[str]:
    before = replace(fed.second, round=fed.second.round + 4)  # an even number on: some methods alternate
    for case, cohort in (("nobody is asked", []), ("all fail", fed.cohort)):
        state, report = fed.round(before, lambda task: ClientFailure(task.client, "battery"), cohort)
        if (difference := state_difference(state, before)) is not None:
            yield f"a round in which {case}: {difference}"
        if (state.round, dict(state.answered)) != (before.round + 1, dict(before.answered)) or report.clients:
            yield f"a round in which {case} ends in round {state.round}, answered {dict(state.answered)}"
    failing, others = fed.cohort[-1].name, fed.cohort[:-1]
    expected, wanted = fed.round(before, cohort=others)

    def fails(task: TrainTask) -> ClientFailure:
        return ClientFailure(task.client, "battery")

    def breaks_down(task: TrainTask) -> ClientUpdate:
        return replace(_update(task), adapter=map_tensors(lambda factor: factor * math.nan, task.adapter))

    def thaws(task: TrainTask) -> ClientUpdate:
        return replace(_update(task), adapter=map_tensors(lambda factor: factor + 1.0, task.adapter))

    cases: dict[str, Train] = {"reports a failure": fails, "sends NaN": breaks_down}
    if "".join(fed.method.distribute(before, fed.cohort[-1]).trains) != "AB":
        cases["changes a frozen factor"] = thaws
    for case, misbehave in cases.items():

        def change(task: TrainTask, misbehave: Train = misbehave) -> ClientUpdate | ClientFailure:
            return misbehave(task) if task.client == failing else fed.trained(task)

        def prune(task: TrainTask, update: ClientUpdate) -> ClientUpdate:  # a failed client does not prune
            return update if task.client == failing else fed.method.prune(task, update)

        state, report = fed.round(before, change, prune=prune)
        if (difference := state_difference(state, expected)) is not None or report.clients != wanted.clients:
            yield f"{failing!r} {case}, and the others' round is another one: {difference or 'another report'}"
        if [failure.client for failure in report.failures] != [failing]:
            yield f"{failing!r} {case}, and the failures are {report.failures}"
    expected, _ = fed.round(before)
    state, report = fed.round(before, order=lambda tasks: [*tasks, tasks[0]])
    if (difference := state_difference(state, expected)) is not None or len(report.failures) != 1:
        yield f"{fed.cohort[0].name!r} answers twice: {difference or report.failures}"


@_law("resuming", "a run that goes on from its written state ends as the one that was not stopped, bit for bit")
def _resuming(fed: _Federation) -> Iterator[str]:
    def rounds(state: ServerState) -> list[tuple[ServerState, RoundReport]]:
        return list(run_rounds(state, fed.method, _Engine(fed.trained), lambda _: fed.cohort, rounds=2))

    whole = rounds(fed.first)
    for number, state in enumerate([fed.first, whole[0][0]]):
        resumed = rounds(_copy(state))
        if (difference := state_difference(resumed[-1][0], whole[-1][0])) is not None:
            yield f"resumed after {number} of 2 rounds: {difference}"
        if [report for _, report in resumed] != [report for _, report in whole[number:]]:
            yield f"resumed after {number} of 2 rounds: another report"


@_law("randomness", "a round draws by the state's seed alone")
def _randomness(fed: _Federation) -> Iterator[str]:
    def global_states() -> list[Any]:
        return [torch.get_rng_state().tolist(), str(np.random.get_state(legacy=False)), random.getstate()]  # noqa: NPY002

    before = global_states()
    fed.round(fed.first)
    for name, one, other in zip(("torch", "numpy", "random"), before, global_states(), strict=True):
        if one != other:
            yield f"a round draws from the global random state of {name}"


@_law("memory", "a total does not grow with the number of clients")
def _memory(fed: _Federation) -> Iterator[str]:
    state = replace(fed.first, adapter=dict(list(fed.first.adapter.items())[:1]))
    update, half = fed.updates(state)[-1], 64
    total, most, weight = fed.method.start(state), [0, 0], fed.method.weigh(update)
    for place in range(2 * half):
        own = replace(update, adapter=map_tensors(torch.clone, update.adapter))
        total = fed.method.add(total, own, weight)
        if place % 16 == 14:  # sums may queue a few updates
            most[place // half] = max(most[place // half], _bytes(total))
    if most[1] > GROWTH * most[0]:
        yield f"{most[0]} bytes at most with up to {half} updates, {most[1]} with up to {2 * half}"


def _bytes(root: object) -> int:
    """Return the bytes of all objects that `root` refers to, without code and modules."""
    seen: set[int] = set()
    size, queue = 0, [root]
    while queue:
        if id(one := queue.pop()) in seen or isinstance(one, (type, types.ModuleType, types.FunctionType, torch.dtype)):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            storage = one.untyped_storage()
            size += 0 if storage.data_ptr() in seen else storage.nbytes()
            seen.add(storage.data_ptr())
        elif isinstance(one, np.ndarray):
            size += one.nbytes
        else:
            size += sys.getsizeof(one)
            queue += gc.get_referents(one)
    return size


# What clients do --------------------------------------------------------------------------------------------------------


def _penalties(fed: _Federation) -> Iterator[tuple[str, list[TrainTask], dict[str, LoraPair], Tensor]]:
    """Yield the cohort's tasks, live factors and penalties: for B = 0 and for a later state, before and after training."""
    untrained = replace(fed.first, adapter={name: LoraPair(A, 0.0 * B) for name, (A, B) in fed.first.adapter.items()})
    for when, state in (("at first", untrained), ("after a round", fed.second)):
        tasks = [fed.method.distribute(state, client) for client in fed.cohort]
        penalty = fed.method.penalty(tasks)
        if penalty is not None:
            received, trained = [task.adapter for task in tasks], [fed.trained(task).adapter for task in tasks]
            yield f"{when}, before training", tasks, *_penalty_of(penalty, received)
            yield f"{when}, after training", tasks, *_penalty_of(penalty, trained)


def _penalty_of(penalty: Penalty, adapters: Sequence[Adapter]) -> tuple[dict[str, LoraPair], Tensor]:
    """Return the live factors of a batch `[G, ...]` and its penalties `[G]`."""
    live = map_tensors(lambda factor: factor.clone().requires_grad_(), batch(adapters))
    return live, penalty(live)


def _gradient(value: Tensor, live: Adapter) -> dict[str, LoraPair]:
    factors = [factor for pair in live.values() for factor in pair]
    parts = torch.autograd.grad(value, factors, retain_graph=True, allow_unused=True, materialize_grads=True)
    return {name: LoraPair(A, B) for name, A, B in zip(live, parts[::2], parts[1::2], strict=True)}


@_law("penalty", "a penalty is differentiable and gives each client a value of its own, whoever trains beside it")
def _penalty(fed: _Federation) -> Iterator[str]:
    for when, tasks, live, values in _penalties(fed):
        if values.shape != (len(tasks),) or not values.requires_grad or not values.isfinite().all():
            shape = f"the shape {tuple(values.shape)}" + ("" if values.requires_grad else " and no gradient")
            yield f"{when}, of {len(tasks)} clients the penalty has {shape}: {values.tolist()}"
        for place, task in enumerate(tasks):
            for name, factor in _named(_gradient(values[place], live)).items():
                if not factor.isfinite().all():
                    yield f"{when}, the gradient of {task.client!r} is not finite in {name}"
                if any(part.any() for mate, part in enumerate(factor) if mate != place):
                    yield f"{when}, the penalty of {task.client!r} moves {name} of another client"
            alone = fed.method.penalty([task])
            own = {name: LoraPair(A.detach()[place], B.detach()[place]) for name, (A, B) in live.items()}
            paid = None if alone is None else _penalty_of(alone, [truncate(own, task.rank)])[1].tolist()
            batched = values[place].item()
            if paid is None or not math.isclose(paid[0], batched, rel_tol=1e-4, abs_tol=1e-6):
                yield f"{when}, {task.client!r} pays {batched:.6g} in a batch and {paid} alone"


@_law("pruning", "pruning leaves the first slots as they are, at a rank from the lowest allowed to the one assigned")
def _pruning(fed: _Federation) -> Iterator[str]:
    prune, lowest = fed.method.prune, fed.method.lowest_rank
    if prune is keep_rank:
        return
    for client in fed.cohort:
        task = fed.method.distribute(fed.second, client)
        for size in (0.0, 0.5, 1.0, 10.0):
            update = _update(task, map_tensors(lambda factor, size=size: size * factor, task.adapter))  # type: ignore[misc]
            pruned = prune(task, update)
            client_text = (
                f"{client.name!r} of rank {task.rank}, which trained its factors to {size:g} times what it received,"
            )
            for name in task.adapter:
                assigned, left = rank_of(task.rank, name), rank_of(pruned.rank, name)
                least = 1 if lowest is None else max(1, lowest(assigned))
                if not least <= left <= assigned:
                    yield f"{client_text} has rank {left} in {name}, which is not within {least} ... {assigned}"
            # A method without `lowest_rank` may change the factors as well, see `Method.prune`.
            wanted = pruned.adapter if lowest is None else truncate(update.adapter, _within(pruned.rank, task.rank))
            if (difference := _bits(_named(pruned.adapter), _named(wanted))) is not None:
                yield f"{client_text} sends other factors than the first slots of what it trained: {difference}"
            if replace(pruned, rank=update.rank, adapter=update.adapter) != update:
                yield f"{client_text} changes more than its rank and factors by pruning"
    after, report = fed.round(fed.second)
    for failure in report.failures:
        yield f"the server refuses {failure.client!r}: {failure.reason}"
    for one in report.clients:
        client = next(client for client in fed.cohort if client.name == one.client)
        if one.pruned and fed.method.distribute(after, client).rank != after.rank(client):
            yield f"{one.client!r} pruned to {one.new_rank}, and receives another rank in the next round"


def _within(rank: Rank, assigned: Rank) -> Rank:
    return rank if isinstance(rank, Mapping) or isinstance(assigned, Mapping) else min(rank, assigned)


# The average ------------------------------------------------------------------------------------------------------------


@_law("weights", "weights are 0 or more, and only their ratios count")
def _weights(fed: _Federation) -> Iterator[str]:
    updates = fed.updates(fed.second)
    nothing = replace(updates[0], adapter=map_tensors(torch.zeros_like, updates[0].adapter))
    for update in (*updates, nothing, replace(updates[0], examples=10**6, loss=0.0)):
        weight = float(fed.method.weigh(update))
        if not 0.0 <= weight < math.inf:
            yield f"{update.client!r} has a weight of {weight}"
    expected = fed.folded(fed.second, updates)
    for scale in (0.25, 3.0):
        scaled = fed.folded(fed.second, updates, scale=scale)
        for client in fed.cohort:
            one, other = (fed.computed(state.training_state, client) for state in (scaled, expected))
            if (difference := _near(one, other, OF_PRODUCTS)) is not None:
                yield f"with all weights times {scale:g}, {client.name!r} computes with something else: {difference}"
    for name, tensor in _tensors(fed.folded(fed.second, updates, 0.0)).items():
        if not tensor.isfinite().all():
            yield f"where all weights are zero, {name} is not finite"
    shares = fed.round(fed.second)[1].shares()
    if not math.isclose(sum(shares.values()), 1.0, rel_tol=1e-12):
        yield f"the shares of a round sum to {sum(shares.values())}: {shares}"


@_law("aggregate", "the updates change what the server has in every module, unless the method averages nothing")
def _aggregate(fed: _Federation) -> Iterator[str]:
    tasks = [fed.method.distribute(fed.second, client) for client in fed.cohort]
    after = fed.folded(fed.second, map(fed.trained, tasks))
    idle = fed.folded(fed.second, map(_update, tasks))
    nothing = fed.method.averages == "nothing"

    def learned(state: ServerState, name: str) -> dict[str, Tensor]:
        return _named({name: state.training_state.adapter[name]}) | {
            key: state.folded.delta[key] for key in state.folded.delta if key == name
        }

    unmoved = [name for name in after.adapter if _bits(learned(after, name), learned(idle, name)) is None]
    if unmoved and not nothing:
        yield f"the updates change nothing in {len(unmoved)} of {len(after.adapter)} modules ({', '.join(unmoved)})"
    if nothing and len(unmoved) < len(after.adapter):
        yield "it declares averages = 'nothing', and the updates change the global adapter"


@_law("live slots", "no slot that came back is dead afterwards, zero in A and in B")
def _live_slots(fed: _Federation) -> Iterator[str]:
    if fed.weights or fed.method.averages == "nothing":
        return
    after = fed.folded(fed.first, fed.updates(fed.first)).training_state
    for name, pair in after.adapter.items():
        came_back = max(fed.ranks)
        if (live := live_slots({name: pair})) < came_back:
            yield f"{live} of {came_back} slots that came back are live in {name}"


@_law("idle clients", "clients that do not train change nothing of what anybody computes")
def _idle(fed: _Federation) -> Iterator[str]:
    cohorts = [fed.alike(3)]
    if fed.mixed and fed.method.averages == "factors":
        # The slots beyond rank 2 then have no owner in the cohort.
        cohorts.append([Client(f"thin-{place}", 2, 10) for place in range(3)])
    for cohort in cohorts:
        state, seen = fed.first, [*cohort, Client("newcomer", cohort[0].rank, 1)]
        for _ in range(2):
            before, (state, report) = state, fed.round(state, _update, cohort)
            if len(report.clients) < len(cohort):
                yield f"clients that return what they received are refused: {report.failures}"
            for client in seen:
                one, other = fed.computed(state, client), fed.computed(before, client)
                if (change := _near(one, other, OF_PRODUCTS)) is not None:
                    yield f"{client.name!r} of rank {client.rank} computes with something else after an idle round: {change}"


@_law("equal clients", "clients of full rank that send the same get it back")
def _equal(fed: _Federation) -> Iterator[str]:
    if fed.method.clients == "nobody":
        return
    for count in (1, 3):
        state, cohort = fed.first, fed.alike(count)
        for number in range(2):
            tasks = [fed.method.distribute(state, client) for client in cohort]
            sent = _products(_drawn_alike(tasks[0]).adapter, tasks[0].folded.delta)
            state, report = fed.round(state, _drawn_alike, cohort, prune=keep_rank)
            for failure in report.failures:
                yield f"the server refuses {failure.client!r}: {failure.reason}"
            for client in cohort:
                # A method that averages over rounds serves another adapter, but clients train on from this one.
                if (difference := _near(fed.computed(state.training_state, client), sent, OF_PRODUCTS)) is not None:
                    yield f"round {number}, {client.name!r} of {count} that send the same does not get it back: {difference}"


@_law("FedAvg", "where factors are averaged, clients of one rank are averaged as by FedAvg with the same weights")
def _fedavg(fed: _Federation) -> Iterator[str]:
    method = fed.method
    if method.averages != "factors" or method.keep is not None or method.clients != "sampled":
        return
    cohort = fed.alike(3)
    updates = {update.client: update for update in fed.updates(fed.first, cohort)}
    plain = replace(fedavg(), weigh=method.weigh, distribute=method.distribute)
    states = []
    for one in (replace(method, prune=keep_rank, lowest_rank=None), plain):
        after, report = run_round(fed.first, one, _Engine(lambda task: updates[task.client]), cohort)
        states.append(after)
        for failure in report.failures:
            yield f"the server refuses {failure.client!r}: {failure.reason}"
    for name, (own, other) in {
        name: (factor, _named(states[1].adapter)[name]) for name, factor in _named(states[0].adapter).items()
    }.items():
        if not torch.allclose(own, other, rtol=ROUNDING, atol=ROUNDING * float(other.abs().max())):
            yield f"{name} is {float((own - other).abs().max()):.3g} away from FedAvg's"
