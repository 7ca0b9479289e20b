"""The predicted costs of a run per tier and in total, from its configuration, without reading weights; and a timed step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hetlora.config import RunConfig
from hetlora.config.build import assign_ranks, cost_model, largest_work, local_training, make_method
from hetlora.config.build_data import load_federation, make_tokenization
from hetlora.config.build_model import build_tokenizer
from hetlora.config.preconditions import check_cohort, check_length
from hetlora.core.adapter import ModuleShape, num_bytes, num_parameters, zeros
from hetlora.core.method import Method
from hetlora.core.ranks import tiers_of
from hetlora.core.round import run_round
from hetlora.core.sampling import sample_cohort
from hetlora.core.types import Client, ClientUpdate, ServerState
from hetlora.data import Federation, TokenizedFederation
from hetlora.errors import ModelError
from hetlora.model.packing import pack_rows
from hetlora.runs.display import QuietDisplay
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.runs.text import aligned, many
from hetlora.training.cost_model import Cost, CostModel, LocalWork
from hetlora.training.local import LocalTraining, local_batches

__all__ = ["Plan", "TierPlan", "Totals", "make_plan"]


@dataclass(frozen=True)
class TierPlan:
    """Costs per client of a tier: means over its clients, for the memory the maximum.

    Attributes:
        tier: Its rank or ranks, ``"8"`` or ``"6-10"``.
        clients: Number of its clients.
        parameters: Trained parameters.
        share: Their share of the base's parameters.
        bytes_down: Bytes received per round.
        bytes_up: Bytes sent per round, before any self-pruning.
        flops: Floating-point operations per round.
        peak_bytes: Peak training memory.
    """

    tier: str
    clients: int
    parameters: float
    share: float
    bytes_down: float
    bytes_up: float
    flops: float
    peak_bytes: int


@dataclass(frozen=True)
class Totals:
    """Costs of all clients in all rounds."""

    bytes_down: int
    bytes_up: int
    flops: float


@dataclass(frozen=True)
class Plan:
    """The costs of a run.

    Attributes:
        base: The base model.
        modules: Number of adapted modules.
        rows_from: Source of the row lengths: ``"data"``, or ``"bound"`` for all at `data.max_length`.
        why: The same in words.
        rows: Rows of the largest step, which determines the memory.
        length: Tokens per row of that step.
        scored: Scored tokens of that step.
        rounds: Number of rounds.
        clients_per_round: Clients per round.
        folds: Whether the method folds changes into the base, which are sent on top and not counted.
        tiers: Costs per client by tier, smallest ranks first.
        full: Costs per client of full fine-tuning.
        total: Of the run, with its cohorts, if no client fails or prunes.
        full_total: The same for full fine-tuning.
        seconds: Of the training of all rounds on this machine; None if no step was timed.
    """

    base: str
    modules: int
    rows_from: str
    why: str
    rows: int
    length: int
    scored: int
    rounds: int
    clients_per_round: int
    folds: bool
    tiers: tuple[TierPlan, ...]
    full: TierPlan
    total: Totals
    full_total: Totals
    seconds: float | None = None

    def summary(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return asdict(self)

    def table(self) -> str:
        """Return the plan as text for a person."""
        head = ["rank", "clients", "trained", "share", "MB down", "MB up", "GFLOP a round", "peak MB"]
        rows = [_cells(tier) for tier in (*self.tiers, self.full)]
        modules = f"{self.modules} adapted modules"
        work = f"{self.rows} rows of {self.length} tokens, {self.scored} of them scored"
        return "\n".join(
            [
                f"{self.base}: {self.full.parameters:,.0f} parameters, {modules}. One client, one round:",
                *aligned([head, *rows], left=()),
                f"lengths of rows: {self.why}",
                f"peak memory: of the largest step, {work}",
                f"all {self.rounds} rounds of {self.clients_per_round} clients: {_describe(self.total)}",
                *(["down comes on top, from round 2 on, what the method folds into the base"] if self.folds else []),
                f"with full fine-tuning: {_describe(self.full_total)}",
                *([] if self.seconds is None else [_duration(self.seconds)]),
            ]
        )


@dataclass(frozen=True)
class _Lengths:
    """The work of a run: its largest step, all steps of one round combined into one, and their number."""

    largest: LocalWork
    together: LocalWork
    together_steps: int
    steps: Mapping[str, int]
    rows_from: str
    why: str


def make_plan(
    config: RunConfig, *, bound: bool = False, timed: bool = False, say: Callable[[str], None] = lambda _: None
) -> Plan:
    """Predict the costs of a run.

    Args:
        config: The run.
        bound: Assume rows of `data.max_length` tokens, all scored. Otherwise rows are tokenized and measured, if the base has
            a tokenizer.
        timed: Load the base, too, and time a step of the first cohort on this machine.
        say: Called with lines about the progress.

    Raises:
        HetLoraError: The data or the base's configuration cannot be read, or do not fit together.
    """
    federation = load_federation(config)
    counts = federation.counts("train")
    check_cohort(config, len(counts))
    costs = cost_model(config)
    check_length(config, costs.model.base.config)
    ranks = assign_ranks(config, counts)
    say(f"counting the costs of {many(len(counts), 'client')}" + ("" if bound else ", from the tokens of their rows"))
    lengths = _lengths(config, federation, bound=bound)
    method = make_method(config)
    each, every = _clients(ranks, method, costs, lengths)
    tiers = _tiers(ranks, each, costs.parameters)
    federated, work = config.federation, lengths.largest
    cohorts = [
        name
        for number in range(federated.rounds)
        for name in sample_cohort(list(ranks), federated.clients_per_round, number, config.seed)
    ]
    spent = [each[name] for name in cohorts]
    if timed:
        say(f"loading {config.model.base} to time a step")
    if method.clients == "pooled":  # one client of the largest rank does the work of a cohort
        flops = round(sum(cost.flops for cost in spent) / federated.rounds)
        everyone = replace(max(each.values(), key=lambda cost: cost.parameters), flops=flops)
        tiers, spent = (_tier("all rows", [everyone], costs.parameters),), [everyone] * federated.rounds
    return Plan(
        base=config.model.base,
        modules=len(costs.model.shapes),
        rows_from=lengths.rows_from,
        why=lengths.why,
        rows=work.rows,
        length=work.length,
        scored=work.scored,
        rounds=federated.rounds,
        clients_per_round=federated.clients_per_round,
        folds=_folds(method),
        tiers=tiers,
        full=_tier("full", list(every.values()), costs.parameters),
        total=_total(spent),
        full_total=_total([every[name] for name in cohorts]),
        seconds=_timed(config, lengths.steps) if timed else None,
    )


def _timed(config: RunConfig, steps: Mapping[str, int]) -> float:
    """Return the seconds of all rounds: those of one step of the first cohort, times the mean number of steps."""
    one = config.training.model_copy(update={"steps": 1, "epochs": None})
    experiment = LocalExperiment(config.model_copy(update={"training": one}), QuietDisplay())
    if not experiment.rounds:
        return 0.0
    state, cohort = experiment.first_state(), experiment.cohort(0)
    taken = []
    for _ in range(3):  # the first one warms up
        began = time.perf_counter()
        run_round(state, experiment.method, experiment.engine, cohort)
        taken.append(time.perf_counter() - began)
    return experiment.rounds * min(taken) * sum(steps.values()) / len(steps)


def _clients(
    ranks: Mapping[str, int], method: Method[Any], costs: CostModel, lengths: _Lengths
) -> tuple[dict[str, Cost], dict[str, Cost]]:
    """Return each client's costs per round, and its costs of full fine-tuning."""
    whole = _cost(costs, None, lengths)
    every = {name: _of_client(whole, lengths.steps[name]) for name in ranks}
    if method.trains == "weights":
        return every, every
    by_rank = {rank: _cost(costs, rank, lengths) for rank in sorted(set(ranks.values()))}
    each = {
        name: _as_method(_of_client(by_rank[rank], lengths.steps[name]), method, costs, rank)
        for name, rank in ranks.items()
    }
    return each, every


def _tiers(ranks: Mapping[str, int], each: Mapping[str, Cost], whole: int) -> tuple[TierPlan, ...]:
    """Return one row per tier, smallest ranks first."""
    members: dict[str, list[Cost]] = {}
    tiers = tiers_of(list(ranks.values()))
    for name in sorted(ranks, key=lambda name: ranks[name]):
        members.setdefault(tiers[ranks[name]], []).append(each[name])
    return tuple(_tier(tier, own, whole) for tier, own in members.items())


def _lengths(config: RunConfig, federation: Federation, *, bound: bool) -> _Lengths:
    settings = local_training(config)
    if bound:
        return _bound(config, federation, settings, "")
    try:
        tokenizer = build_tokenizer(config)
    except ModelError as error:
        return _bound(config, federation, settings, f" ({error})")
    data = TokenizedFederation(federation, make_tokenization(config, tokenizer))
    return _measured(data, settings, config.seed)


def _bound(config: RunConfig, federation: Federation, settings: LocalTraining, reason: str) -> _Lengths:
    work = largest_work(config)
    steps = {name: settings.count(rows) for name, rows in federation.counts("train").items()}
    why = f"an upper bound, every row {work.length} tokens long and all of them scored{reason}"
    return _Lengths(work, replace(work, steps=1), 1, steps, "bound", why)


def _measured(data: TokenizedFederation, settings: LocalTraining, seed: int) -> _Lengths:
    """Measure every client's batches of the first round."""
    steps: dict[str, int] = {}
    rows = length = scored = 0
    tokens = squares = count = all_scored = 0
    for name in data.federation.clients:
        examples = data.train(name)
        steps[name] = settings.count(len(examples)) if examples else 0
        for batch in local_batches(examples, settings.batch_size, steps[name], f"{seed}:0:{name}"):
            tokens += sum(len(example.ids) for example in batch)
            squares += sum(rows_alike * longest**2 for rows_alike, longest in pack_rows([batch]).blocks)
            count += len(batch)
            all_scored += sum(example.scored for example in batch)
        rows = max(rows, min(settings.batch_size, len(examples)))
        length = max([length, *(len(example.ids) for example in examples)])
        largest_scores = sorted((example.scored for example in examples), reverse=True)[: settings.batch_size]
        scored = max(scored, sum(largest_scores))
    # Equivalent rows of equal length: the same number of tokens, for products, and of token pairs, for attention.
    even = round(squares / max(tokens, 1))
    largest = _work(rows, length, scored, min(2, max(steps.values())))
    why = f"measured on the rows, {tokens / max(count, 1):.0f} tokens on average"
    # FLOPs are proportional to rows and scored tokens, so all steps can be combined without rounding.
    return _Lengths(
        largest, _work(round(tokens / max(even, 1)), even, all_scored, 1), sum(steps.values()), steps, "data", why
    )


def _work(rows: int, length: int, scored: int, steps: int) -> LocalWork:
    rows, length = max(rows, 1), max(length, 1)
    return LocalWork(rows, length, min(scored, rows * (length - 1)), max(steps, 1))


def _cost(costs: CostModel, rank: int | None, lengths: _Lengths) -> tuple[Cost, float]:
    """Return the cost of the largest step at a rank (None for every weight), and the FLOPs of a mean step."""

    def cost(work: LocalWork) -> Cost:
        return costs.full(work) if rank is None else costs.lora(rank, work)

    return cost(lengths.largest), cost(lengths.together).flops / max(lengths.together_steps, 1)


def _as_method(cost: Cost, method: Method[Any], costs: CostModel, rank: int) -> Cost:
    """Replace parameters and bytes by those of the method's first round; FLOPs and memory stay those of both factors."""
    if method.clients == "nobody":
        return Cost(parameters=0, bytes_down=0, bytes_up=0, flops=0, peak_bytes=0)
    task = method.distribute(ServerState(zeros(costs.model.shapes, rank)), Client("planned", rank, 1))
    return replace(
        cost,
        parameters=num_parameters(task.adapter, task.trains),
        bytes_down=task.bytes_down,
        bytes_up=num_bytes(task.adapter, task.sends),
    )


def _folds(method: Method[Any]) -> bool:
    """Whether a round folds a change into the base; tested on a module of one number."""
    state = ServerState(zeros({"m": ModuleShape(1, 1)}, 1))
    update = ClientUpdate("planned", 0, 1, state.adapter, examples=1, steps=1, loss=0.0)
    return bool(method.finish(state, method.add(method.start(state), update, 1.0)).folded.delta)


def _of_client(cost: tuple[Cost, float], steps: int) -> Cost:
    largest, step_flops = cost
    return replace(largest, flops=round(step_flops * steps))


def _tier(name: str, costs: Sequence[Cost], whole: int) -> TierPlan:
    count = len(costs)
    parameters = sum(cost.parameters for cost in costs) / count
    return TierPlan(
        tier=name,
        clients=count,
        parameters=parameters,
        share=parameters / whole,
        bytes_down=sum(cost.bytes_down for cost in costs) / count,
        bytes_up=sum(cost.bytes_up for cost in costs) / count,
        flops=sum(cost.flops for cost in costs) / count,
        peak_bytes=max(cost.peak_bytes for cost in costs),
    )


def _total(costs: Sequence[Cost]) -> Totals:
    return Totals(
        bytes_down=sum(cost.bytes_down for cost in costs),
        bytes_up=sum(cost.bytes_up for cost in costs),
        flops=sum(cost.flops for cost in costs),
    )


def _cells(tier: TierPlan) -> list[str]:
    return [
        tier.tier,
        str(tier.clients),
        f"{tier.parameters:,.0f}",
        f"{tier.share:.2%}",
        f"{tier.bytes_down / 1e6:,.2f}",
        f"{tier.bytes_up / 1e6:,.2f}",
        f"{tier.flops / 1e9:,.2f}",
        f"{tier.peak_bytes / 1e6:,.1f}",
    ]


def _duration(seconds: float) -> str:
    length = (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
    return (
        f"on this machine: training takes about {length}, by a timed step of the first cohort; measurements come on top"
    )


def _describe(total: Totals) -> str:
    return f"{total.bytes_down / 1e6:,.2f} MB down, {total.bytes_up / 1e6:,.2f} MB up, {total.flops / 1e12:,.2f} TFLOP"
