"""Invariants of a finished round, for any cohort, any failures and any order of answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hetlora.core.adapter import rank_of
from hetlora.core.method import Method
from hetlora.core.round import RoundReport, run_round
from hetlora.core.types import Client, ClientUpdate, ServerState, TrainTask
from proofs.recomputed import difference, recomputed

__all__ = ["Given", "Watched", "problems_of", "same", "same_update"]

TOLERANCE = 1e-6
"""Of the recomputation, relative to the largest number of a factor; float32 rounds by 6e-8."""


@dataclass(frozen=True)
class Given:
    """An engine with given answers."""

    answers: Sequence[Any]

    def train(self, tasks: Sequence[TrainTask], method: Method[Any]) -> Iterator[Any]:  # noqa: ARG002  the protocol's
        """Yield them."""
        yield from self.answers


@dataclass
class Watched:
    """A method that records the updates of its sum.

    Attributes:
        inner: The method.
        before: Called before every update that is added.
        admitted: The updates that were added, in order.
    """

    inner: Method[Any]
    before: Callable[[], None] = lambda: None
    admitted: list[ClientUpdate] = field(default_factory=list)

    @property
    def method(self) -> Method[Any]:
        """Return it as a round takes it."""

        def add(total: Any, update: ClientUpdate, weight: float) -> Any:
            self.before()
            self.admitted.append(update)
            return self.inner.add(total, update, weight)

        return replace(self.inner, add=add)


def problems_of(
    method: Method[Any],
    rule: Mapping[str, str],
    before: ServerState,
    after: ServerState,
    report: RoundReport,
    cohort: Sequence[Client],
    admitted: Sequence[ClientUpdate],
) -> Iterator[str]:
    """Yield the problems of a round, from the updates added to its sum, in order.

    Args:
        method: The round's method.
        rule: The method's formula, for `proofs.recomputed`.
        before: The state before the round.
        after: The state after the round.
        report: The round's report.
        cohort: The clients of the round.
        admitted: Updates that reached the sum.
    """
    names = sorted(client.name for client in cohort)
    seen = sorted([*(client.client for client in report.clients), *(failure.client for failure in report.failures)])
    if seen != names:
        yield f"accounted for are {seen}, asked were {names}"
    counted = [update.client for update in admitted]
    if sorted(counted) != sorted(client.client for client in report.clients):
        yield f"counted were {counted}, reported {[client.client for client in report.clients]}"
    if after.round != before.round + 1:
        yield f"round {after.round} follows"
    for client in cohort:
        was, now = before.rank(client), after.rank(client)
        if any(rank_of(now, name) > rank_of(was, name) for name in before.adapter):
            yield f"the rank of {client.name!r} grew from {was} to {now}"
    if not admitted and not same(after, before):
        yield "nobody was admitted, and the state changed"
    alone, _ = run_round(before, method, Given(admitted), cohort)
    if not same(after, alone) or dict(after.answered) != dict(alone.answered):
        yield "the state is not that of the admitted updates alone"
    in_order, _ = run_round(before, method, Given(sorted(admitted, key=lambda update: update.client)), cohort)
    arrays = {name: (A.double().numpy(), B.double().numpy()) for name, (A, B) in in_order.adapter.items()}
    if not difference(rule, after.adapter, arrays) <= TOLERANCE:
        yield f"in another order the state is {difference(rule, after.adapter, arrays):.1e} another"
    if admitted:
        off = difference(rule, after.adapter, recomputed(rule, before, admitted))
        if not off <= TOLERANCE:
            yield f"the state is {off:.1e} off the method's formula"


def same(one: ServerState, other: ServerState) -> bool:
    """Whether adapter and ranks of two states are equal, bit for bit, and neither hangs on a graph of gradients."""
    return dict(one.ranks) == dict(other.ranks) and all(
        torch.equal(mine, theirs) and not mine.requires_grad
        for name, pair in one.adapter.items()
        for mine, theirs in zip(pair, other.adapter[name], strict=True)
    )


def same_update(one: ClientUpdate, other: ClientUpdate) -> bool:
    """Whether two updates say the same of the same client in the same round, bit for bit."""
    return (one.client, one.round, one.rank) == (other.client, other.round, other.rank) and all(
        torch.equal(mine, theirs)
        for name, pair in one.adapter.items()
        for mine, theirs in zip(pair, other.adapter[name], strict=True)
    )
