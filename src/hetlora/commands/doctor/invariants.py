"""Two tiny rounds, and what must hold of them: of the method, of its average and of what the server keeps."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetlora.commands.doctor.engine import look_at_frozen_factors, look_at_what_is_trained
from hetlora.commands.doctor.findings import CHECKS, Notes
from hetlora.commands.doctor.synthetic import Replay, fold, made_up_state, moved, update_of
from hetlora.commands.doctor.tiny_run import TinyFederation, TinyRound
from hetlora.core.adapter import Adapter, live_slots, rank_of, truncate
from hetlora.core.method import Method
from hetlora.core.robust import cap_weights
from hetlora.core.round import run_round
from hetlora.core.sampling import sample_cohort
from hetlora.core.types import Client, ClientUpdate, ServerState
from hetlora.methods import fedavg
from hetlora.runs.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from hetlora.runs.result import Measurement, Progress

__all__ = ["FROM_ROUNDS", "prove"]

FROM_ROUNDS = tuple(itertools.dropwhile(lambda check: check != "updates", CHECKS))
"""The checks of the two tiny rounds."""

ROUNDING = 2.0**-23
"""The sums of the package are exact; of a method with sums of its own in float64 another order tips a float32 number over."""
NEXT_TO_NOTHING = 1e-14
OF_PRODUCTS = 1e-5
"""Relative to the largest number: products are of factors that are float32, and of folded changes that are, too."""
MOST_ROUNDS = 200
HALF = 0.5


def prove(notes: Notes, tiny: TinyFederation, trainers: Sequence[Client]) -> None:
    """Do two tiny rounds and look at them.

    Args:
        notes: Take what is found.
        tiny: The federation, cut down.
        trainers: The clients of the run itself, from which its cohorts are drawn.
    """
    if tiny.method.clients == "nobody":
        notes.skip(f"method {tiny.method.name} trains nobody", *FROM_ROUNDS)
        return
    rounds: list[TinyRound] = []
    with notes.guarding("updates", "training"):
        rounds.append(tiny.round(tiny.first_state()))
        rounds.append(tiny.round(rounds[-1].after))
        _updates(notes, rounds)
    with notes.guarding("sent is trained", "the engine"):
        # In the first round B is zero, which a client that lost it would have as well.
        begun = len(rounds) > 1 and bool(rounds[0].updates)
        look_at_what_is_trained(notes, tiny, rounds[1].before if begun else _in_the_midst(tiny))
    with notes.guarding("frozen factors", "the engine"):
        look_at_frozen_factors(notes, rounds)
    if len(rounds) < 2 or not all(one.updates for one in rounds):
        others = [check for check in FROM_ROUNDS if check not in ("updates", "sent is trained", "frozen factors")]
        notes.skip("there were no two rounds with updates", *others)
        return
    second = rounds[1]
    with notes.guarding("clients apart", "method.name"):
        _apart(notes, tiny, second)
    with notes.guarding("aggregate", "method.name"):
        _aggregate(notes, tiny.method, second)
    with notes.guarding("equal clients", "method.name"):
        _equal_clients(notes, tiny)
    with notes.guarding("client order", "method.name"):
        _order(notes, tiny, second)
    with notes.guarding("weights", "method.weights"):
        _weights(notes, tiny, second, trainers)
    with notes.guarding("live slots", "method.name"):
        _live_slots(notes, tiny, second, trainers)
    with notes.guarding("resuming", "checkpoint_every"):
        _resuming(notes, tiny, second)


def _updates(notes: Notes, rounds: Sequence[TinyRound]) -> None:
    failures = [f"{failure.client!r}: {failure.reason}" for one in rounds for failure in one.report.failures]
    asked, given = sum(len(one.tasks) for one in rounds), sum(len(one.updates) for one in rounds)
    problem = f"{given} of {asked} admitted; {'; '.join(failures[:3])}" if failures else None
    told = f"{given} of {asked} admitted in two rounds of {len(rounds[0].tasks)} clients"
    notes.judge("updates", problem, told, "training", "lower training.learning_rate, or mend the method")


def _in_the_midst(tiny: TinyFederation) -> ServerState:
    """Return a made-up state; of whole weights, of which a made-up change would be the end, the first one."""
    if tiny.method.trains == "weights":
        return tiny.first_state()
    return made_up_state(tiny.model.shapes, tiny.largest, tiny.config.seed)


# The method ---------------------------------------------------------------------------------------------------------


def _apart(notes: Notes, tiny: TinyFederation, last: TinyRound) -> None:
    """Look for a client that gets another's task, and for a sum that goes by names."""
    method, state = tiny.method, last.after
    mixed = []
    for client in tiny.cohort:
        task, name = method.distribute(state, client), client.name
        expected = state.rank(client)
        if (task.client, task.round) != (name, state.round):
            mixed.append(f"the task of {name!r} is for {task.client!r} in round {task.round}")
        elif any(
            rank_of(task.rank, path) != rank_of(expected, path) or A.shape[-2] != rank_of(expected, path)
            for path, (A, _) in task.adapter.items()
        ):
            mixed.append(f"{name!r} of rank {expected} gets slots of rank {task.rank}")
        else:
            alone = replace(
                state,
                ranks=_only(state.ranks, name),
                answered=_only(state.answered, name),
                kept=_only(state.kept, name),
            )
            if not _same(task.adapter, method.distribute(alone, client).adapter):
                mixed.append(f"what {name!r} gets depends on what another client keeps")
    names = [update.client for update in last.updates]
    if len(names) > 1:
        renamed = [replace(one, client=other) for one, other in zip(last.updates, names[1:] + names[:1], strict=True)]
        if _difference(tiny, fold(method, last.before, last.updates), fold(method, last.before, renamed)):
            mixed.append("clients that exchange their names change the sum")
    problem = "; ".join(mixed) or None
    told = f"{len(tiny.cohort)} clients get their own tasks, and names change no sum"
    notes.judge(
        "clients apart", problem, told, "method.name", "mend `distribute` or `add`: each has one client at a time"
    )


def _only(of: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {name: of[name]} if name in of else {}


def _aggregate(notes: Notes, method: Method[Any], last: TinyRound) -> None:
    """Compare what the server makes of the updates with what it makes of clients that learned nothing."""
    idle = [replace(one, adapter=truncate(last.tasks[one.client].adapter, one.rank)) for one in last.updates]
    after, without = fold(method, last.before, last.updates), fold(method, last.before, idle)
    unmoved = [path for path in after.adapter if not _moved(path, after, without)]
    count = len(after.adapter)
    if len(unmoved) == count and method.keep is not None:
        notes.ok("aggregate", f"method {method.name} averages nothing: each client keeps its own", "method.name")
        return
    problem = None
    if unmoved:
        problem = f"the updates change nothing in {len(unmoved)} of {count} modules ({', '.join(unmoved[:3])})"
    way_out = "mend the method's `add` and `finish`: the server does nothing with what it gets"
    notes.judge("aggregate", problem, f"the updates change {count} of {count} modules", "method.name", way_out)


def _moved(path: str, one: ServerState, other: ServerState) -> bool:
    nothing = torch.zeros(1)
    return not (
        torch.equal(one.adapter[path].A, other.adapter[path].A)
        and torch.equal(one.adapter[path].B, other.adapter[path].B)
        and torch.equal(one.folded.delta.get(path, nothing), other.folded.delta.get(path, nothing))
    )


def _equal_clients(notes: Notes, tiny: TinyFederation) -> None:
    method, state = tiny.plain, _in_the_midst(tiny)
    if method.clients == "pooled":
        notes.ok("equal clients", f"method {method.name} has one client", "method.name")
        return
    cohort = [Client(f"equal {number}", tiny.largest, 2) for number in range(3)]
    tasks = [method.distribute(state, client) for client in cohort]
    problems = []
    # Whoever sends the same, gets it back: as factors or folded into the base.
    alike = moved(tasks[0], seed=1)
    same, _ = run_round(state, method, Replay([update_of(task, alike) for task in tasks]), cohort)
    expected = replace(state, adapter=alike)
    for client in cohort:
        if far := _products_differ(_received(method, same, client), expected):
            problems.append(f"clients that send the same do not get it back ({far})")
            break
    told = "clients that send the same get it back"
    is_law = _averages_factors(method)
    if is_law:
        updates = [update_of(task, moved(task, seed=number)) for number, task in enumerate(tasks)]
        own, report = run_round(state, method, Replay(updates), cohort)
        plain, _ = run_round(state, replace(fedavg(), weigh=method.weigh), Replay(updates), cohort)
        if report.failures:
            problems.append(f"{report.failures[0].client!r}: {report.failures[0].reason}")
        if far := _far(own.adapter, plain.adapter):
            problems.append(f"clients of one rank are not averaged as by FedAvg ({far})")
        told = "clients of one rank are averaged as by FedAvg"
    way_out = "mend the method's `add` and `finish`: the weights may not sum to one"
    if problems and not is_law:
        notes.warn("equal clients", "; ".join(problems), "method.name", way_out)
    else:
        notes.judge("equal clients", "; ".join(problems) or None, told, "method.name", way_out)


def _averages_factors(method: Method[Any]) -> bool:
    """Whether clients of full rank are to be averaged as FedAvg does; a personal method keeps a part of them apart."""
    return method.averages == "factors" and method.keep is None and method.clients == "sampled"


def _received(method: Method[Any], state: ServerState, client: Client) -> ServerState:
    """Return the state as this client computes with it."""
    return replace(state, adapter=method.distribute(state, client).adapter)


def _order(notes: Notes, tiny: TinyFederation, last: TinyRound) -> None:
    method, updates = tiny.method, last.updates
    if len(updates) < 2:
        notes.ok("client order", "there is one client", "method.name")
        return
    expected = fold(method, last.before, updates)
    orders = [updates[::-1], *(updates[cut:] + updates[:cut] for cut in range(1, len(updates)))]
    differences = [_difference(tiny, expected, fold(method, last.before, order)) for order in orders]
    problem = next((f"another order gives another state ({one})" for one in differences if one), None)
    exact = all(_same(expected.adapter, fold(method, last.before, order).adapter) for order in orders)
    told = f"{len(orders)} other orders give the same state, " + ("bit for bit" if exact else "but for the last bit")
    way_out = (
        "mend the method's `add`: use the sums of hetlora.core.aggregation, and let nothing depend on who came before"
    )
    notes.judge("client order", problem, told, "method.name", way_out)


def _difference(tiny: TinyFederation, one: ServerState, other: ServerState) -> str | None:
    """Say how far two states are apart; None where it is rounding.

    Where slots are averaged one by one, factors are compared. Elsewhere an SVD may turn the slots, and what is compared is what
    clients of each rank compute.
    """
    if one.ranks != other.ranks or one.folded.sizes != other.folded.sizes:
        return "the ranks, or what is folded"
    if one.iterate is not one and (far := _difference(tiny, one.iterate.served, other.iterate.served)):
        return f"of what clients go on from, {far}"
    far = _far(one.adapter, other.adapter)
    if _averages_factors(tiny.method) and far is not None:
        return far
    if far is None and not one.folded.delta:
        return None
    for rank in sorted({client.rank for client in tiny.cohort if isinstance(client.rank, int)}):
        mine, theirs = (replace(state, adapter=truncate(state.adapter, rank)) for state in (one, other))
        if far := _products_differ(mine, theirs):
            return f"for clients of rank {rank}, {far}"
    return None


def _far(one: Adapter, other: Adapter) -> str | None:
    """Name a factor that differs by more than rounding; None where there is none."""
    for path, pair in one.items():
        for letter, mine, theirs in zip("AB", pair, other[path], strict=True):
            if not torch.allclose(mine, theirs, rtol=ROUNDING, atol=NEXT_TO_NOTHING):
                return f"{path}.{letter} by {float((mine - theirs).abs().max()):.2g}"
    return None


def _products_differ(one: ServerState, other: ServerState) -> str | None:
    """Name a module that computes something else in one state, tried on a few inputs: a product may be too large to form."""
    generator = torch.Generator().manual_seed(0)
    for path in one.adapter:
        x = torch.randn(one.adapter[path].A.shape[-1], 4, generator=generator, dtype=torch.float64)
        mine, theirs = _computed(one, path, x), _computed(other, path, x)
        apart, size = float((mine - theirs).abs().max()), float(theirs.abs().max())
        if not apart <= OF_PRODUCTS * size:
            return f"{path} computes {apart / size if size else apart:.2g} of itself apart"
    return None


def _computed(state: ServerState, path: str, x: Tensor) -> Tensor:
    A, B = state.adapter[path]
    product = B.double() @ (A.double() @ x)
    return product + state.folded.delta[path].double() @ x if state.folded.delta else product


def _same(one: Adapter, other: Adapter) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(mine, theirs) for path, pair in one.items() for mine, theirs in zip(pair, other[path], strict=True)
    )


# The average --------------------------------------------------------------------------------------------------------


def _weights(notes: Notes, tiny: TinyFederation, last: TinyRound, trainers: Sequence[Client]) -> None:
    method, some = tiny.method, last.updates[0]
    aggregation = "mean" if tiny.robust is None else tiny.robust.aggregation
    if aggregation == "krum":
        notes.ok("weights", "Krum takes one update, which is what it is for", "robustness.aggregation")
        return
    by_examples = method.weigh(replace(some, examples=1)) != method.weigh(replace(some, examples=1000))
    shares = {f"{client!r} in a tiny round": share for client, share in last.report.shares().items()}
    if (
        by_examples and method.clients == "sampled" and aggregation == "mean"
    ):  # the rows of the run itself are known, and decide
        shares = _shares_of_cohorts(tiny, some, trainers) or shares
    who, largest = max(shares.items(), key=lambda item: item[1])
    told = f"at most {largest:.0%} of the average, {who}"
    place = "method.weights" if "weights" in tiny.config.method.arguments or by_examples else "method.name"
    if largest > HALF and len(last.updates) >= 3:
        way_out = "set method.weights = 'equal' where the method takes it, or [robustness] largest_share"
        notes.warn("weights", told, place, way_out)
    else:
        notes.ok("weights", told, place)


def _shares_of_cohorts(tiny: TinyFederation, update: ClientUpdate, trainers: Sequence[Client]) -> dict[str, float]:
    """Return the largest share in each round of the run, of those with three clients or more."""
    federation, robust = tiny.config.federation, tiny.robust
    size = min(federation.clients_per_round, len(trainers))
    found = {}
    for number in range(min(federation.rounds, MOST_ROUNDS) if size >= 3 else 0):
        cohort = sample_cohort(trainers, size, number, tiny.config.seed)
        weights = [tiny.method.weigh(replace(update, examples=max(1, client.examples))) for client in cohort]
        if robust is not None:
            weights = cap_weights(weights, robust.weight_cap, robust.largest_share)
        largest = max(range(size), key=weights.__getitem__)
        found[f"{cohort[largest].name!r} in round {number + 1}"] = weights[largest] / (sum(weights) or 1.0)
    return found


def _live_slots(notes: Notes, tiny: TinyFederation, last: TinyRound, trainers: Sequence[Client]) -> None:
    if last.after.folded.delta or tiny.method.trains == "weights":
        notes.ok("live slots", f"method {tiny.method.name} keeps none from round to round", "method.name")
        return
    came_back = max(max(rank_of(one.rank, path) for path in one.adapter) for one in last.updates)
    live = live_slots(fold(tiny.method, last.before, last.updates).iterate.adapter)
    told = f"{live} of {came_back} slots that came back are live"
    if live < came_back:
        notes.fail("live slots", told, "method.name", "mend the method's `finish`: a slot of zeros never learns again")
        return
    thin = min(last.updates, key=lambda one: max(rank_of(one.rank, path) for path in one.adapter))
    left = live_slots(fold(tiny.method, last.after, [thin]).iterate.adapter)
    if left < live and _some_cohort_lacks_the_largest(tiny, trainers):
        way_out = "set method.unowned = 'keep', or ask more clients a round"
        value = f"{told}, but a round without clients of the largest rank leaves {left}, for good"
        notes.warn("live slots", value, "method.unowned", way_out)
        return
    notes.ok("live slots", told, "method.name")


def _some_cohort_lacks_the_largest(tiny: TinyFederation, trainers: Sequence[Client]) -> bool:
    federation = tiny.config.federation
    size = min(federation.clients_per_round, len(trainers))
    cohorts = (
        sample_cohort(trainers, size, number, tiny.config.seed) for number in range(min(federation.rounds, MOST_ROUNDS))
    )
    return any(all(client.rank != tiny.largest for client in cohort) for cohort in cohorts)


# Resuming -----------------------------------------------------------------------------------------------------------


def _resuming(notes: Notes, tiny: TinyFederation, last: TinyRound) -> None:
    """Write a checkpoint after the first round, go on from what is read, and compare with the second round as it was."""
    nothing = Measurement({}, {}, ())
    checkpoint = Checkpoint(
        Progress(last.before), nothing, 1, "", 0.0, tiny.config.model_dump(mode="json"), {}, torch.get_num_threads(), {}
    )
    with tempfile.TemporaryDirectory(prefix="hetlora-doctor-") as folder:
        state = read_checkpoint(write_checkpoint(checkpoint, Path(folder))).progress.state
    resumed = tiny.round(state).after
    apart = [
        part
        for part, mine, theirs in (
            ("the adapter", {"": resumed.adapter}, {"": last.after.adapter}),
            ("what clients keep", resumed.kept, last.after.kept),
            ("the moments of the server", resumed.moments, last.after.moments),
        )
        if mine.keys() != theirs.keys() or not all(_same(mine[key], theirs[key]) for key in mine)
    ]
    folded, expected = resumed.folded.delta, last.after.folded.delta
    if folded.keys() != expected.keys() or not all(torch.equal(folded[path], expected[path]) for path in folded):
        apart.append("what is folded into the base")
    if (resumed.round, resumed.ranks, resumed.answered) != (last.after.round, last.after.ranks, last.after.answered):
        apart.append("the ranks")
    problem = f"{', '.join(apart)} differ after the round that follows" if apart else None
    told = "a second round from the checkpoint of the first ends the same, bit for bit"
    way_out = "keep all that a method carries from round to round in the state, and draw by its seed alone"
    if problem is not None and tiny.model.device.type != "cpu":
        value = f"{problem}: what is summed on this device need not come out the same twice"
        notes.warn("resuming", value, "model.device", "set model.device = 'cpu' where bits must be equal")
        return
    notes.judge("resuming", problem, told, "checkpoint_every", way_out)
