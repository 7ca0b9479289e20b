"""Do the settings of a run make sense for its clients: ranks, memory, steps, pruning, server."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping

import torch

from hetlora.commands.doctor.findings import Notes
from hetlora.commands.doctor.machine import available_memory
from hetlora.commands.doctor.synthetic import made_up_state, update_of
from hetlora.config import MemoryRanks, RunConfig
from hetlora.config.build import assign_ranks, cost_model, largest_work, local_training, make_method
from hetlora.core.adapter import ModuleShape, Rank, map_tensors, rank_of
from hetlora.core.method import Method, keep_rank
from hetlora.core.population import MANY
from hetlora.core.ranks import Ranks
from hetlora.core.types import Client
from hetlora.data import Federation
from hetlora.errors import ConfigError, ModelError
from hetlora.runs.memory import fit_memory
from hetlora.training.cost_model import CostModel

__all__ = ["look_at_memory", "look_at_method", "look_at_ranks", "look_at_training"]

MANY_TIMES = 20
"""Times that a client sees a row in one round, from which on it rather learns its rows by heart."""
MANY_STEPS = 10_000
LARGE_RATE = {"adamw": 0.1, "sgd": 100.0}
SMALL_RATE = {"adamw": 1e-6, "sgd": 1e-6}
NO_LIMIT = 1e9
"""In megabytes, as `memory_megabytes`."""


def look_at_ranks(
    notes: Notes, config: RunConfig, federation: Federation, shapes: Mapping[str, ModuleShape] | None
) -> Ranks | None:
    """Give every client its rank; None where one has none."""
    ranks = notes.attempt("ranks", "ranks", lambda: assign_ranks(config, federation.counts("train")))
    if ranks is None:
        return None
    some = [ranks[name] for name in ranks.names[:MANY]]
    counts = Counter(some)
    told = ", ".join(f"{count} of rank {rank}" for rank, count in sorted(counts.items())[:8])
    narrow = {} if make_method(config).trains == "weights" else _narrower(shapes or {}, ranks.largest)
    if narrow:
        path, width = min(narrow.items(), key=lambda item: item[1])
        notes.warn(
            "ranks",
            f"{ranks.largest} is above the size of {len(narrow)} modules, such as {path} of {width}",
            "ranks",
            f"lower the largest rank to {width}: slots beyond a module's size only cost",
        )
    else:
        notes.ok("ranks", told, "ranks")
    kind = config.ranks
    if kind.kind == "tiers":
        nobodys = [f"rank {tier.rank}" for tier in kind.tiers if tier.rank not in counts]
    elif isinstance(kind, MemoryRanks):
        nobodys = ["a memory tier"] if len(counts) < len({tier.megabytes for tier in kind.tiers}) else []
    elif kind.kind == "explicit":
        nobodys = [repr(name) for name in kind.of if name not in ranks]
    else:
        nobodys = []
    if nobodys:
        way_out = "raise its share or the number of clients, or take it away"
        notes.warn("tiers", f"{', '.join(nobodys[:5])}: nobody has it", "ranks", way_out)
    else:
        notes.ok("tiers", f"{len(counts)} different ranks", "ranks")
    return ranks


def _narrower(shapes: Mapping[str, ModuleShape], rank: int) -> dict[str, int]:
    """Return the modules whose weight has a smaller rank than that, with its rank."""
    return {path: min(shape) for path, shape in shapes.items() if min(shape) < rank}


# Memory -------------------------------------------------------------------------------------------------------------


def look_at_memory(
    notes: Notes, config: RunConfig, largest: int, device: torch.device, available: int | None = None
) -> bool:
    """Compare what a run is predicted to hold with what there is; return whether the base may be loaded.

    Args:
        notes: Take what is found.
        config: The run.
        largest: The largest rank.
        device: Whose memory it is.
        available: Bytes that there are; None asks the system.
    """
    if available is None:
        available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    try:
        costs = cost_model(config)
        base, predicted = costs.base_bytes, _predicted(config, costs, largest, available)
    except ConfigError as error:
        for problem in error.problems:
            value, _, way_out = problem.partition("; ")
            notes.fail("memory", value, "memory_megabytes", way_out)
        return False
    except ModelError as error:
        notes.warn("memory", str(error), "memory_megabytes", "run a round, and look at the memory it took")
        return True
    there = "an amount that the system does not say" if available is None else f"{available / 1e6:.0f} MB"
    value = f"{predicted / 1e6:.0f} MB predicted (the base {base / 1e6:.0f}) of {there}"
    if available is None or predicted <= available:
        notes.ok("memory", value, "memory_megabytes")
        return True
    if make_method(config).trains == "weights":
        notes.fail("memory", value, "method.name", "take a machine with more memory, a smaller base, or train adapters")
        return base < available
    way_out = f"set memory_megabytes to at most {available / 1e6:.0f}: less is then done at once"
    notes.warn("memory", value, "memory_megabytes", way_out)
    return True


def _predicted(config: RunConfig, costs: CostModel, largest: int, available: int | None) -> int:
    """Return the bytes that a run will hold; refuse one that does not fit even with one client at a time."""
    if make_method(config).trains == "weights":
        return costs.full(largest_work(config)).peak_bytes
    threads, own = config.threads or torch.get_num_threads(), config.memory_megabytes or NO_LIMIT
    there = NO_LIMIT if available is None else max(available / 1e6, 1e-6)

    def predicted(megabytes: float) -> int:
        limited = config.model_copy(update={"memory_megabytes": megabytes})
        allowance = fit_memory(limited, costs, largest, threads)
        assert allowance.predicted is not None
        return allowance.predicted

    predicted(min(own, there))
    return predicted(own)


# Local training -----------------------------------------------------------------------------------------------------


def look_at_training(notes: Notes, config: RunConfig, federation: Federation) -> None:
    """Compare what a client does in a round with what it has."""
    settings, training, clients = local_training(config), config.training, make_method(config).clients
    if clients == "nobody":
        notes.ok("local training", "nobody trains", "method.name")
        return
    counts = federation.counts("train")
    rows = [counts[name] for name in federation.names[:MANY]]
    median, most = statistics.median(rows), settings.count(max(rows))
    steps = settings.count(round(median))
    if clients == "pooled":  # one client with all rows does the work of a whole cohort
        median = federation.total("train")
        steps = most = round(config.federation.clients_per_round * statistics.fmean(map(settings.count, rows)))
    times = steps * training.batch_size / median
    value = f"{steps} steps of {training.batch_size} rows on {median:.0f}, {times:.1f} times each"
    concerns = []
    if times > MANY_TIMES:
        concerns.append(
            ("training.steps" if training.steps else "training.epochs", f"{value}; fewer are usual", "lower it")
        )
    if most > MANY_STEPS:
        concerns.append(
            ("training.epochs", f"{most} steps a round for the client with most rows", "set training.steps")
        )
    rate, kind = training.learning_rate, training.optimizer
    if rate > LARGE_RATE[kind]:
        concerns.append(("training.learning_rate", f"{rate:g} is large for {kind}", "lower it, to 1e-2 or less"))
    if rate < SMALL_RATE[kind]:
        concerns.append(("training.learning_rate", f"{rate:g} is so small that little is learned", "raise it"))
    for place, what, way_out in concerns:
        notes.warn("local training", what, place, way_out)
    if not concerns:
        notes.ok("local training", value, "training")


# The method ---------------------------------------------------------------------------------------------------------


def look_at_method(notes: Notes, config: RunConfig, ranks: Ranks, shapes: Mapping[str, ModuleShape] | None) -> None:
    """Look for a server that does nothing, and for pruning that cannot happen."""
    method = make_method(config)
    optimizer = config.server_optimizer
    if method.clients == "nobody":
        notes.warn(
            "server", f"method {method.name} trains nobody", "method.name", "take another, but to measure the base"
        )
    elif optimizer is not None and optimizer.learning_rate < SMALL_RATE["adamw"]:
        place = "server_optimizer.learning_rate"
        notes.warn(
            "server", f"{optimizer.learning_rate:g} moves nothing that is seen", place, "raise it; 1 is plain averaging"
        )
    else:
        notes.ok("server", f"method {method.name}", "method.name")
    if method.prune is keep_rank:
        notes.ok("self-pruning", f"method {method.name} does not prune as it is set", "method")
    elif shapes is None:
        notes.skip("the modules are not known", "self-pruning")
    else:
        with notes.guarding("self-pruning", "method"):
            _pruning(notes, method, sorted({ranks[name] for name in ranks.names[:MANY]}), shapes)


def _pruning(notes: Notes, method: Method[object], ranks: list[int], shapes: Mapping[str, ModuleShape]) -> None:
    """Ask the method: a client of each rank halves all it has received, the tail with it. Whose rank is then cut?"""
    first = dict(list(shapes.items())[:1])
    cut: dict[int, Rank] = {}
    for rank in ranks:
        task = method.distribute(made_up_state(first, max(ranks)), Client("pruner", rank, 1))
        halved = update_of(task, map_tensors(lambda factor: 0.5 * factor, task.adapter))
        left = method.prune(task, halved).rank
        if left != task.rank:
            cut[rank] = left
    if cut:
        told = ", ".join(f"{rank} to {rank_of(left, next(iter(first)))}" for rank, left in cut.items())
        notes.ok("self-pruning", f"a first prune cuts {told}", "method")
    else:
        value = f"can never fire: no client of rank {', '.join(map(str, ranks))} has a tail to cut"
        way_out = "lower method.min_rank below the largest rank, or set method.gamma = 1 to do without"
        notes.warn("self-pruning", value, "method.min_rank", way_out)
