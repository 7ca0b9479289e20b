"""`hetlora.testing`: each law holds for a correct method and is broken by a method with that one fault."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hetlora.core.adapter import LoraPair, map_tensors, truncate
from hetlora.core.aggregation import WeightedSum, weighted_mean
from hetlora.core.method import Method, truncate_to_rank
from hetlora.core.types import ServerState
from hetlora.errors import HetLoraError
from hetlora.methods import averaged, fedavg, fedopt, fedprox, hetlora, local, zeropad
from hetlora.testing import BrokenLawError, check_method, laws, state_difference

pytestmark = pytest.mark.run  # each does many rounds

LAWS = dict(laws())


def mean(**parts: Any) -> Method[Any]:
    """A method that keeps every law, but for these parts."""
    return replace(zeropad(), **{"name": "planted", **parts})


def scaled_finish(scale: float) -> Callable[[ServerState, WeightedSum], ServerState]:
    def finish(state, total):
        after = weighted_mean(state, total)
        return replace(after, adapter=map_tensors(lambda factor: scale * factor, after.adapter))

    return finish


# One method per way to break a law --------------------------------------------------------------------------------------


def with_another_rank(state, client):
    return truncate_to_rank(state, replace(client, rank=max(1, client.rank - 1)))


def of_another_client(state, client):
    return replace(truncate_to_rank(state, client), client="client-0")


def with_the_last_slots(state, client):
    task = truncate_to_rank(state, client)
    last = {name: LoraPair(A.flip(0), B.flip(1)) for name, (A, B) in state.adapter.items()}
    return replace(task, adapter=truncate(last, task.rank))


def with_what_another_keeps(state, client):
    task = truncate_to_rank(state, client)
    others = [kept for name, kept in state.kept.items() if name != client.name]
    wide = [kept for kept in others if next(iter(kept.values())).A.shape[0] >= client.rank]
    return replace(task, adapter=truncate(wide[0], client.rank)) if wide else task


def in_place(state, total):
    after = weighted_mean(state, total)
    for name, pair in state.adapter.items():
        pair.A.copy_(after.adapter[name].A)
    return after


def that_halves_the_update(total, update, weight):
    for pair in update.adapter.values():
        pair.B.mul_(0.5)
    return total.add(update.adapter, weight)


def in_half_precision(state, total):
    after = weighted_mean(state, total)
    return replace(after, adapter=map_tensors(torch.Tensor.half, after.adapter))


def the_last_counts_most() -> Method[Any]:
    def add(total, update, weight):
        return total[0].add(update.adapter, weight * total[1]), 2.0 * total[1]

    return mean(
        start=lambda state: (WeightedSum.like(state.adapter), 1.0),
        add=add,
        finish=lambda state, total: weighted_mean(state, total[0]),
    )


def by_the_place_of_a_module(total, update, weight):
    placed = {name: LoraPair(place * A, B) for place, (name, (A, B)) in enumerate(update.adapter.items())}
    return total.add(placed, weight)


def over_all_that_were_asked() -> Method[Any]:
    asked = [0]

    def distribute(state, client):
        asked[0] += 1
        return truncate_to_rank(state, client)

    def start(state):
        count, asked[0] = asked[0], 0
        return [WeightedSum.like(state.adapter), count, 0]

    def add(total, update, weight):
        return [total[0].add(update.adapter, weight), total[1], total[2] + 1]

    return mean(
        distribute=distribute,
        start=start,
        add=add,
        finish=lambda state, total: scaled_finish(total[2] / total[1])(state, total[0]),
    )


def with_a_memory_of_its_own() -> Method[Any]:
    seen = []

    def finish(state, total):
        seen.append(None)
        return scaled_finish(1.0 + 0.01 * len(seen))(state, total)

    return mean(finish=finish)


def with_noise(state, total):
    return scaled_finish(1.0 + 0.1 * float(torch.rand(1)))(state, total)


def that_holds_all_updates() -> Method[Any]:
    def finish(state, held):
        total = WeightedSum.like(state.adapter)
        for update, weight in held:
            total = total.add(update.adapter, weight)
        return weighted_mean(state, total)

    return mean(start=lambda _: [], add=lambda held, update, weight: [*held, (update, weight)], finish=finish)


def squares(adapter):
    return torch.stack([B.square().sum(dim=(-2, -1)) for _, B in adapter.values()]).sum(dim=0)


def of_padded_slots(adapter):
    return torch.stack([(A + 1.0).square().sum(dim=(-2, -1)) for A, _ in adapter.values()]).sum(dim=0)


def to_rank(change: int) -> Callable[..., Any]:
    def prune(_, update):
        rank = max(1, update.rank + change)
        return replace(update, rank=rank, adapter=truncate(update.adapter, min(rank, update.rank)))

    return prune


def to_the_last_slots(_, update):
    rank = max(1, update.rank - 1)
    last = {name: LoraPair(A.flip(0), B.flip(1)) for name, (A, B) in update.adapter.items()}
    return replace(update, rank=rank, adapter=truncate(last, rank))


def but_one_module(state, total):
    after = weighted_mean(state, total)
    last = list(state.adapter)[-1]
    return replace(after, adapter={**after.adapter, last: state.adapter[last]})


def that_kills_the_last_slot(state, total):
    after = weighted_mean(state, total).adapter
    return replace(
        state,
        adapter={
            name: LoraPair(torch.cat([A[:-1], 0 * A[-1:]]), torch.cat([B[:, :-1], 0 * B[:, -1:]], dim=1))
            for name, (A, B) in after.items()
        },
    )


BROKEN = [
    ("tasks", lambda: mean(distribute=with_another_rank), "'client-0' of rank 2 gets slots of rank 1 in q_proj"),
    ("tasks", lambda: mean(distribute=of_another_client), "'client-1' of rank 7 in round 0 receives the task of 'client-0'"),
    ("padding", lambda: mean(distribute=with_the_last_slots), "receives others from a padded global adapter: k_proj.A"),
    ("padding", lambda: mean(penalty=lambda _: of_padded_slots), "moves slots of q_proj that 'client-0' of rank 2 does not"),
    ("clients apart", lambda: replace(local(), distribute=with_what_another_keeps), "depends on what another client keeps"),
    ("clients apart", lambda: mean(weigh=lambda one: 5.0 if one.client == "client-0" else 1.0), "exchange their names"),
    ("values", lambda: mean(finish=in_place), "changed the state that it began from: k_proj.A"),
    ("values", lambda: mean(add=that_halves_the_update), "changed the update of 'client-0': k_proj.B"),
    ("values", lambda: mean(finish=in_half_precision), "not finite numbers of float32 (torch.float16)"),
    ("grouping", lambda: mean(merge=lambda total, _: total), "sums of 1 clients each, merged"),
    ("client order", the_last_counts_most, "a round whose clients answer in reverse"),
    ("layout", lambda: mean(add=by_the_place_of_a_module), "with its modules in another order: "),
    ("failures", over_all_that_were_asked, "'client-3' reports a failure, and the others' round is another one"),
    ("resuming", with_a_memory_of_its_own, "resumed after 0 of 2 rounds: "),
    ("randomness", lambda: mean(finish=with_noise), "the global random state of torch"),
    ("memory", that_holds_all_updates, "bytes at most with up to 64 updates"),
    ("penalty", lambda: mean(penalty=lambda _: lambda one: squares(one).mean().expand(4)), "of another client"),
    ("penalty", lambda: mean(penalty=lambda _: lambda one: squares(one).sum()), "of 4 clients the penalty has the shape ()"),
    ("penalty", lambda: mean(penalty=lambda _: lambda one: squares(one).detach()), "and no gradient"),
    ("penalty", lambda: mean(penalty=lambda of: lambda one: len(of) * squares(one)), "in a batch and"),
    ("pruning", lambda: mean(prune=to_rank(1), lowest_rank=lambda _: 1), "has rank 3 in q_proj, which is not within 1 ... 2"),
    ("pruning", lambda: mean(prune=to_rank(-1), lowest_rank=lambda rank: rank), "has rank 1 in q_proj, which is not within 2"),
    ("pruning", lambda: mean(prune=to_the_last_slots, lowest_rank=lambda _: 1), "other factors than the first slots"),
    ("weights", lambda: mean(weigh=lambda _: -1.0), "'client-0' has a weight of -1.0"),
    ("weights", lambda: mean(finish=lambda state, total: scaled_finish(total.weight)(state, total)), "weights times 0.25"),
    ("aggregate", lambda: mean(finish=lambda state, _: state), "change nothing in 3 of 3 modules (q_proj, k_proj, v_proj)"),
    ("aggregate", lambda: mean(finish=but_one_module), "change nothing in 1 of 3 modules (v_proj)"),
    ("aggregate", lambda: mean(averages="nothing"), "and the updates change the global adapter"),
    ("live slots", lambda: mean(finish=that_kills_the_last_slot), "7 of 8 slots that came back are live in q_proj"),
    ("idle clients", lambda: mean(finish=scaled_finish(0.5)), "computes with something else after an idle round: q_proj"),
    ("equal clients", lambda: mean(finish=scaled_finish(0.5)), "'full-0' of 1 that send the same does not get it back"),
    ("FedAvg", lambda: mean(add=lambda total, update, _: total.add(update.adapter, 1.0)), "away from FedAvg's"),
]  # fmt: skip


def test_the_page_of_methods_has_every_law():
    page = (Path(__file__).resolve().parent.parent / "docs/methods.md").read_text("utf8")
    rows = re.findall(r"^\| ([\w ]+) \| (.+) \|$", page[page.index("| law |") :], flags=re.MULTILINE)
    assert rows[1:] == [(name, law.__doc__) for name, law in LAWS.items()]


def test_every_law_has_a_method_that_breaks_it():
    assert {law for law, _, _ in BROKEN} == LAWS.keys()


@pytest.mark.parametrize(("law", "make", "problem"), BROKEN)
def test_a_method_that_breaks_a_law_is_told_the_law_the_case_and_the_values(law, make, problem):
    with pytest.raises(BrokenLawError) as caught:
        check_method(make(), only=law)
    assert caught.value.law == law
    assert problem in caught.value.problem
    assert str(caught.value).startswith(f"method '{make().name}' breaks the law '{law}' ({LAWS[law].__doc__}): ")
    with pytest.raises(AssertionError):  # among all laws it is found, too, be it by another one
        check_method(make())


def test_the_method_that_faults_are_planted_in_keeps_every_law():
    check_method(mean())
    check_method(mean(), seed=2**40)


def test_a_method_that_raises_is_told_the_law():
    def weigh(_):
        raise ZeroDivisionError("so many")

    with pytest.raises(BrokenLawError, match=r"breaks the law 'weights' .*: ZeroDivisionError: so many") as caught:
        check_method(mean(weigh=weigh), only=["tasks", "weights"])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


WRAPPED = [
    fedopt(hetlora(), optimizer="adam", learning_rate=0.1),
    fedprox(hetlora(gamma=0.5, min_rank=1), mu=0.1),
    averaged(fedavg(), power=3.0),
]


@pytest.mark.parametrize("method", WRAPPED, ids=["server optimiser", "proximal term", "average over rounds"])
def test_wrappers_keep_the_laws_but_those_of_plain_averages(method):
    check_method(method, only=LAWS.keys() - {"equal clients", "FedAvg"})


def test_what_is_no_method_and_no_law_is_refused():
    with pytest.raises(HetLoraError, match=r"'hetlora' is of type str; give what a factory returns"):
        check_method("hetlora")  # type: ignore[arg-type]
    with pytest.raises(HetLoraError, match=r"only='order' is no law; use some of weights, tasks, padding"):
        check_method(mean(), only="order")


def test_states_that_learned_the_same_have_no_difference():
    state = ServerState({"m": LoraPair(torch.ones(1, 2), torch.ones(2, 1))})
    assert state_difference(state, replace(state, round=5, answered={"a": 4})) is None
    assert state_difference(state, replace(state, ranks={"a": 1})) == "the ranks are {} and {'a': 1}"
    assert (
        state_difference(state, replace(state, kept={"a": state.adapter}))
        == "what 'a' keeps, m.A is in one of them only"
    )
