"""A dry run: two rounds of the run's method, base and bounds, with few clients and few short rows."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from hetlora.commands.doctor.findings import DRY_RUN, Diagnosis
from hetlora.config import RunConfig
from hetlora.config.build import local_training, make_method, make_robust
from hetlora.core.adapter import Adapter, Rank, live_slots, rank_of, truncate
from hetlora.core.method import Method, keep_rank
from hetlora.core.ranks import Ranks
from hetlora.core.robust import Robustness, cap_weights
from hetlora.core.round import RoundReport, run_round
from hetlora.core.sampling import sample_cohort
from hetlora.core.types import Client, ClientFailure, ClientUpdate, ServerState, TrainTask
from hetlora.data import Example
from hetlora.model.initial_adapter import initial_adapter
from hetlora.model.lora_model import LoraModel
from hetlora.runs.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from hetlora.runs.result import Measurement, RunTotals
from hetlora.testing import state_difference
from hetlora.training.local import LocalTraining
from hetlora.training.simulation import SimulationEngine

__all__ = ["TinyFederation", "TinyRound", "check_rounds", "shortened"]

CLIENTS, ROWS, TOKENS, BATCH, STEPS = 4, 4, 48, 2, 2
MOST_ROUNDS = 200
HALF = 0.5


@dataclass(frozen=True)
class TinyRound:
    """One round: the state before it, the tasks, the answers, and the state after it."""

    before: ServerState
    tasks: Mapping[str, TrainTask]
    answers: tuple[ClientUpdate | ClientFailure, ...]
    after: ServerState
    report: RoundReport

    @property
    def updates(self) -> list[ClientUpdate]:
        """Return the admitted updates, in the cohort's order."""
        own = {answer.client: answer for answer in self.answers if isinstance(answer, ClientUpdate)}
        return [own[client.client] for client in self.report.clients]


@dataclass(frozen=True)
class TinyFederation:
    """A run cut down to few clients, few short rows per client and two steps of local training.

    `method` includes the run's wrappers; `imported` is the adapter that the run starts from, None for fresh factors.
    """

    config: RunConfig
    model: LoraModel
    rows: Mapping[str, Sequence[Example]]
    cohort: tuple[Client, ...]
    method: Method[Any]
    settings: LocalTraining
    robust: Robustness | None
    imported: Adapter | None = None

    @classmethod
    def of(
        cls,
        config: RunConfig,
        model: LoraModel,
        ranks: Ranks,
        examples: Mapping[str, Sequence[Example]],
        imported: Adapter | None = None,
    ) -> TinyFederation:
        """Cut a run down to some of the clients in `examples`, which has their training rows."""
        method, own = make_method(config), local_training(config)
        names = chosen({name: ranks[name] for name, own in examples.items() if own})
        rows = {
            name: [shortened(row) for row in sorted(examples[name], key=lambda row: (len(row.ids), row.ids))[:ROWS]]
            for name in names
        }
        clients = [Client(name, 1 if method.trains == "weights" else ranks[name], len(rows[name])) for name in names]
        if method.clients == "pooled":
            rows = {"everyone": [row for own in rows.values() for row in own]}
            clients = [Client("everyone", max(ranks[name] for name in names), len(rows["everyone"]))]
        settings = replace(own, steps=STEPS, epochs=None, batch_size=min(own.batch_size, BATCH))
        robust = make_robust(config)
        return cls(config, model, rows, tuple(clients), method, settings, robust, imported or None)

    def first_state(self) -> ServerState:
        """Return the initial state."""
        largest = max(_widest(client.rank) for client in self.cohort)
        first = initial_adapter(self.model, largest, self.config.seed, self.imported)
        return ServerState(first, seed=self.config.seed)

    def engine(
        self, settings: LocalTraining | None = None, model: LoraModel | None = None, **options: Any
    ) -> SimulationEngine:
        """Return an engine for these clients, by default with the run's settings."""
        training, seed = settings or self.settings, self.config.seed
        return SimulationEngine(model or self.model, self, training, seed=seed, **options)

    def train(self, client: str) -> Sequence[Example]:
        """Return a client's rows; the engine reads them here."""
        return self.rows[client]

    def round(self, state: ServerState) -> TinyRound:
        """Run one round."""
        watched = _Watched(self.engine())
        after, report = run_round(state, self.method, watched, self.cohort, training=self.settings, robust=self.robust)
        return TinyRound(state, watched.tasks, tuple(watched.answers), after, report)


class _Watched:
    """An engine that records its tasks and answers."""

    def __init__(self, engine: SimulationEngine) -> None:
        self.engine = engine
        self.tasks: dict[str, TrainTask] = {}
        self.answers: list[ClientUpdate | ClientFailure] = []

    def train(self, tasks: Sequence[TrainTask], method: Method[Any]) -> Iterator[ClientUpdate | ClientFailure]:
        self.tasks = {task.client: task for task in tasks}
        for answer in self.engine.train(tasks, method):
            self.answers.append(answer)
            yield answer


def chosen(ranks: Mapping[str, int]) -> list[str]:
    """Return a few clients: one of the largest rank, of the smallest, of each between, and again.

    Example:
        >>> chosen({"a": 4, "b": 4, "c": 8, "d": 16, "e": 4})
        ['d', 'a', 'c', 'b']
    """
    by_rank: dict[int, list[str]] = {}
    for name, rank in ranks.items():
        by_rank.setdefault(rank, []).append(name)
    in_order = sorted(by_rank)
    groups = [by_rank[rank] for rank in [*in_order[-1:], *in_order[:-1]]]
    found: list[str] = []
    while len(found) < min(CLIENTS, len(ranks)):
        found += [group.pop(0) for group in groups if group]
    return found[:CLIENTS]


def shortened(row: Example) -> Example:
    """Shorten a row to tokens around the beginning of its target.

    Example:
        >>> short = shortened(Example(tuple(range(500)), scored_from=300))
        >>> short.ids[0], len(short.ids), short.scored
        (276, 48, 24)
    """
    start = max(0, row.scored_from - TOKENS // 2)
    return Example(row.ids[start : start + TOKENS], row.scored_from - start)


def _widest(rank: Rank) -> int:
    return rank if isinstance(rank, int) else max(rank.values())


# Checks of the two rounds ----------------------------------------------------------------------------------------------


def check_rounds(found: Diagnosis, tiny: TinyFederation, trainers: Sequence[Client]) -> None:
    """Run two tiny rounds and check them.

    Args:
        found: Receives the findings.
        tiny: The run, cut down.
        trainers: All clients of the run, from which its cohorts are drawn.
    """
    if tiny.method.clients == "nobody":
        found.skip(f"method {tiny.method.name} trains nobody", *DRY_RUN)
        return
    rounds: list[TinyRound] = []

    def both() -> None:
        rounds.append(tiny.round(tiny.first_state()))
        rounds.append(tiny.round(rounds[-1].after))
        failures = [f"{failure.client!r}: {failure.reason}" for item in rounds for failure in item.report.failures]
        asked, given = sum(len(item.tasks) for item in rounds), sum(len(item.updates) for item in rounds)
        value = f"{given} of {asked} admitted" + (f"; {'; '.join(failures[:3])}" if failures else "")
        way_out = "lower training.learning_rate, or mend the method"
        found.note("updates", value, "training", way_out, fail=bool(failures))

    found.attempt("updates", "training", both)
    # In the first round B is zero, also for a client that lost it; the check therefore needs another B.
    begun = len(rounds) > 1 and bool(rounds[0].updates)
    state = rounds[1].before if begun else _with_some_b(tiny)
    found.attempt("sent is trained", "the engine", lambda: _check_sent(found, tiny, state))
    found.attempt("frozen factors", "the engine", lambda: _check_frozen(found, rounds))
    if len(rounds) < 2 or not all(item.updates for item in rounds):
        found.skip("there were no two rounds with updates", "weights", "live slots", "resuming")
        return
    last = rounds[1]
    found.attempt("weights", "method.weights", lambda: _check_weights(found, tiny, last, trainers))
    found.attempt("live slots", "method.name", lambda: _check_live_slots(found, tiny, last, trainers))
    found.attempt("resuming", "checkpoint_every", lambda: _check_resuming(found, tiny, last))


def _with_some_b(tiny: TinyFederation) -> ServerState:
    """Return an initial state whose B is not zero; whole weights are unchanged, since a change would destroy the model."""
    state = tiny.first_state()
    if tiny.method.trains == "weights":
        return state
    return replace(state, adapter={name: pair._replace(B=pair.B + 0.01) for name, pair in state.adapter.items()})


@dataclass(frozen=True)
class _ZeroStep(LocalTraining):
    """Training with a learning rate of zero: the adapter comes back unchanged."""

    def make_optimizer(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.0)


class _RecordingModel:
    """A model that records the adapters it is given, before training changes them."""

    def __init__(self, model: LoraModel) -> None:
        self._model = model
        self.used: list[dict[str, Tensor]] = []

    def use(self, adapter: Adapter | None, folded: Mapping[str, Tensor] | None = None, *others: Any) -> None:
        if adapter is not None:
            self.used.append(_named(adapter) | {f"the change folded into {k}": v for k, v in (folded or {}).items()})
        self._model.use(adapter, folded, *others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _named(adapter: Adapter) -> dict[str, Tensor]:
    """Return copies of all factors by name; of a batch those of its first client."""
    pairs = [(f"{path}.{letter}", getattr(pair, letter)) for path, pair in adapter.items() for letter in ("A", "B")]
    return {name: (factor[0] if factor.ndim == 3 else factor).detach().cpu().clone() for name, factor in pairs}


def _check_sent(found: Diagnosis, tiny: TinyFederation, state: ServerState) -> None:
    """Compare the distributed factors with those in the model, and with those that a zero-step client returns."""
    tasks = [tiny.method.distribute(state, client) for client in tiny.cohort]
    sent = {task.client: _named(task.adapter) for task in tasks}
    still, watched = _ZeroStep(batch_size=tiny.settings.batch_size, steps=1), _RecordingModel(tiny.model)
    engine = tiny.engine(still, model=cast("LoraModel", watched), group_size=1, workers=1)
    answers = list(engine.train(tasks, replace(tiny.method, prune=keep_rank)))
    different = [repr(name) for name in sent.keys() - {answer.client for answer in answers}]
    total = 0
    for index, answer in enumerate(answers):
        used = watched.used[index] if len(watched.used) == len(answers) else {}
        returned = _named(answer.adapter) if isinstance(answer, ClientUpdate) else {}
        folded = next(task for task in tasks if task.client == answer.client).folded.delta
        own = sent[answer.client] | {f"the change folded into {path}": part for path, part in folded.items()}
        total += len(own)
        for name, tensor in own.items():
            places = (used, returned) if name in sent[answer.client] else (used,)
            if not all(name in place and torch.equal(tensor, place[name]) for place in places):
                different.append(f"{name} of {answer.client!r}")
    value = f"{total - len(different)} of {total} tensors bit-equal"
    value += f"; {', '.join(different[:3])} is not" if different else ""
    way_out = "a client must begin from its task alone: look at what the engine does with `task.adapter`"
    found.note("sent is trained", value, "the engine", way_out, fail=bool(different))


def _check_frozen(found: Diagnosis, rounds: Sequence[TinyRound]) -> None:
    """Check that the factors a task does not train came back unchanged."""
    changed, frozen = [], 0
    for item in rounds:
        for update in (answer for answer in item.answers if isinstance(answer, ClientUpdate)):
            task = item.tasks[update.client]
            received = truncate(task.adapter, update.rank)
            for path, letter in itertools.product(received, sorted({"A", "B"} - set(task.trains))):
                frozen += 1
                if not torch.equal(getattr(received[path], letter), getattr(update.adapter[path], letter)):
                    changed.append(f"{path}.{letter} of {update.client!r}")
    fine = f"{frozen} are as they were" if frozen else "the method freezes none"
    value = f"{len(changed)} of {frozen} changed: {', '.join(changed[:3])}" if changed else fine
    way_out = "train what `task.trains` names, and nothing else"
    found.note("frozen factors", value, "the engine", way_out, fail=bool(changed))


def _check_weights(found: Diagnosis, tiny: TinyFederation, last: TinyRound, trainers: Sequence[Client]) -> None:
    method, some = tiny.method, last.updates[0]
    aggregation = "mean" if tiny.robust is None else tiny.robust.aggregation
    if aggregation == "krum":
        found.note("weights", "Krum takes one update, which is what it is for", "robustness.aggregation")
        return
    by_examples = method.weigh(replace(some, examples=1)) != method.weigh(replace(some, examples=1000))
    shares = {f"{name!r} in a tiny round": share for name, share in last.report.shares().items()}
    if by_examples and method.clients == "sampled" and aggregation == "mean":
        shares = _shares_of_cohorts(tiny, some, trainers) or shares  # with weights by examples
    client, largest = max(shares.items(), key=lambda item: item[1])
    place = "method.weights" if "weights" in tiny.config.method.arguments or by_examples else "method.name"
    way_out = "set method.weights = 'equal' where the method takes it, or [robustness] largest_share"
    much = largest > HALF and len(last.updates) >= 3
    found.note("weights", f"at most {largest:.0%} of the average, {client}", place, way_out, warn=much)


def _cohorts(tiny: TinyFederation, trainers: Sequence[Client]) -> Iterator[list[Client]]:
    """Yield the cohorts of the run's first rounds."""
    federation = tiny.config.federation
    size = min(federation.clients_per_round, len(trainers))
    for number in range(min(federation.rounds, MOST_ROUNDS)):
        yield sample_cohort(trainers, size, number, tiny.config.seed)


def _shares_of_cohorts(tiny: TinyFederation, update: ClientUpdate, trainers: Sequence[Client]) -> dict[str, float]:
    """Return the largest share per round of the run, if cohorts have at least three clients."""
    found = {}
    for number, cohort in enumerate(_cohorts(tiny, trainers), start=1):
        if len(cohort) < 3:
            break
        weights = [tiny.method.weigh(replace(update, examples=max(1, client.examples))) for client in cohort]
        if tiny.robust is not None:
            weights = cap_weights(weights, tiny.robust.weight_cap, tiny.robust.largest_share)
        largest = max(range(len(cohort)), key=weights.__getitem__)
        found[f"{cohort[largest].name!r} in round {number}"] = weights[largest] / (sum(weights) or 1.0)
    return found


def _check_live_slots(found: Diagnosis, tiny: TinyFederation, last: TinyRound, trainers: Sequence[Client]) -> None:
    method, place = tiny.method, "method.name"
    if last.after.folded.delta or method.trains == "weights":
        found.note("live slots", f"method {method.name} keeps none from round to round", place)
        return

    def live_after(state: ServerState, updates: Sequence[ClientUpdate]) -> int:
        total = method.start(state)
        for update in updates:
            total = method.add(total, update, method.weigh(update))
        return live_slots(method.finish(state, total).training_state.adapter)

    def rank(update: ClientUpdate) -> int:
        return max(rank_of(update.rank, path) for path in update.adapter)

    came_back, live = max(map(rank, last.updates)), live_after(last.before, last.updates)
    value = f"{live} of {came_back} slots that came back are live"
    way_out = "mend the method's `finish`: a slot of zeros never learns again"
    if live >= came_back:
        left = live_after(last.after, [min(last.updates, key=rank)])
        widest = max(_widest(client.rank) for client in tiny.cohort)
        alone = any(all(client.rank != widest for client in cohort) for cohort in _cohorts(tiny, trainers))
        if left < live and alone:
            value += f", but a round without clients of the largest rank leaves {left}, for good"
            way_out, place = "set method.unowned = 'keep', or ask more clients a round", "method.unowned"
    found.note("live slots", value, place, way_out, warn=place == "method.unowned", fail=live < came_back)


def _check_resuming(found: Diagnosis, tiny: TinyFederation, last: TinyRound) -> None:
    """Resume from a checkpoint after the first round, and compare with the second round."""
    progress, threads = RunTotals(last.before), torch.get_num_threads()
    config = tiny.config.model_dump(mode="json")
    checkpoint = Checkpoint(progress, Measurement({}, {}, ()), 1, "", 0.0, config, {}, threads, {})
    with tempfile.TemporaryDirectory(prefix="hetlora-doctor-") as folder:
        state = read_checkpoint(write_checkpoint(checkpoint, Path(folder))).progress.state
    apart = state_difference(tiny.round(state).after, last.after)
    value = "a second round from the checkpoint of the first ends the same, bit for bit"
    place, way_out = "checkpoint_every", "keep all that a method carries on in the state, and draw by its seed alone"
    on_cpu = tiny.model.device.type == "cpu"
    if apart is not None:
        value = f"after the round that follows, {apart}"
        if not on_cpu:
            value += ": what is summed on this device need not come out the same twice"
            place, way_out = "model.device", "set model.device = 'cpu' where bits must be equal"
    found.note("resuming", value, place, way_out, warn=apart is not None, fail=apart is not None and on_cpu)
