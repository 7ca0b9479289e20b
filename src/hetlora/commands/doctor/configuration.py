"""Checks of a configuration against its base and its rows: modules, tokenizer, clients, ranks, memory, steps, pruning."""

from __future__ import annotations

import difflib
import random
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hetlora.commands.doctor.findings import Diagnosis
from hetlora.commands.doctor.machine import available_memory
from hetlora.config import MemoryRanks, RunConfig
from hetlora.config.build import assign_ranks, cost_model, largest_work, local_training, make_method
from hetlora.config.build_data import (
    fields_read,
    load_federation,
    make_tokenization,
    read_federation,
)
from hetlora.config.build_model import build_model, build_tokenizer, load_run_base
from hetlora.config.preconditions import (
    check_causal,
    check_cohort,
    check_length,
    check_tokenizer,
    wide_rank_warning,
)
from hetlora.core.adapter import LoraPair, ModuleShape, Rank, map_tensors, rank_of
from hetlora.core.method import Method, keep_rank
from hetlora.core.population import MANY
from hetlora.core.ranks import Ranks
from hetlora.core.types import Client, ClientUpdate, ServerState
from hetlora.data import Example, Federation, Tokenization, TokenizedFederation
from hetlora.data.inspection import describe_borders, notes_on, shown_examples, unread_fields
from hetlora.errors import ModelError
from hetlora.model.lora_model import LoraModel, build_base
from hetlora.model.targets import ALL_LINEAR, linear_paths, matching_paths
from hetlora.runs.memory import fit_memory
from hetlora.runs.text import figure, megabytes
from hetlora.training.cost_model import CostModel

__all__ = [
    "adapted_shapes",
    "check_clients",
    "check_examples",
    "check_memory",
    "check_method_settings",
    "check_ranks",
    "check_training",
    "load_model",
    "load_tokenization",
]

MOST_ROWS = 20_000
"""Rows to tokenize; of a larger federation a sample of clients is tokenized."""
MUCH_CUT, MUCH_LEFT_OUT = 0.1, 0.5
"""Shares of cut and of left-out rows above which the doctor warns."""
NAMED = 5
CONTEXT, TOKENS = 40, 12
"""Characters of context and scored tokens that are shown of an example."""
MANY_TIMES = 20
"""Passes over a client's rows in one round above which it memorizes them."""
MANY_STEPS = 10_000
LARGE_RATE = {"adamw": 0.1, "sgd": 100.0}
SMALL_RATE = 1e-6
NO_LIMIT = 1e9
"""In megabytes, as `memory_megabytes`."""
Shapes = Mapping[str, ModuleShape]


# The base ---------------------------------------------------------------------------------------------------------------


def adapted_shapes(found: Diagnosis, config: RunConfig) -> Shapes | None:
    """Check the base's architecture and its target modules, without weights; return the shape of each adapted module."""
    name, wanted, place = config.model.base, config.model.target_modules, "model.target_modules"
    with FakeTensorMode():
        base = found.attempt("base", "model.base", lambda: build_base(name))
        if base is None:
            found.skip("the base cannot be loaded", "causal", "target modules", "sequence length", "memory")
            return None
        fine, way_out = f"{config.data.max_length} tokens", "lower it"
        _holds(found, "sequence length", "data.max_length", lambda: check_length(config, base.config), fine, way_out)
        if make_method(config).trains == "weights":
            found.note("target modules", f"none: method {config.method.name} trains every weight", place)
            return build_model(config, base).shapes
        linear = linear_paths(base, head=True)
        if unknown := [one for one in wanted or [] if one != ALL_LINEAR and not matching_paths(linear, [one])]:
            have = sorted({path.rpartition(".")[2] for path in linear})
            close = [difflib.get_close_matches(module, [*have, *linear]) for module in unknown]
            meant = [f" (did you mean {' or '.join(map(repr, some))}?)" if some else "" for some in close]
            problem = "; ".join(f"{module!r} is none{hint}" for module, hint in zip(unknown, meant, strict=True))
            value = f"{problem}; this {type(base).__name__} has {', '.join(have)}"
            found.note("target modules", value, place, "take a name that the base has", fail=True)
            return None
        model = found.attempt(
            "target modules",
            place,
            lambda: build_model(config, base),
            lambda model: f"{', '.join(model.target_modules)}: {len(model.shapes)} modules",
        )
    return None if model is None else model.shapes


def load_tokenization(found: Diagnosis, config: RunConfig) -> Tokenization | None:
    """Load the tokenizer."""
    place = "model.tokenizer" if config.model.tokenizer else "model.base"
    return found.attempt("tokenizer", place, lambda: make_tokenization(config, build_tokenizer(config)))


def load_model(
    found: Diagnosis, config: RunConfig, device: torch.device, tokenization: Tokenization | None
) -> LoraModel | None:
    """Load the base with its weights and check that a run can start with it."""
    model = config.model
    base = found.attempt(
        "base",
        "model.base",
        lambda: load_run_base(config),
        lambda base: f"{model.base}: {base.num_parameters():,} parameters, {model.dtype}, on {device}",
    )
    if base is None:
        found.skip("the base cannot be loaded", "causal")
        return None
    causal, way_out = "no token changes what comes before it", "take a causal language model"
    fits = _holds(found, "causal", "model.base", lambda: check_causal(config, base), causal, way_out)
    if tokenization is not None:
        tokenizer, place = tokenization.tokenizer, "model.tokenizer" if model.tokenizer else "model.base"
        fine = f"{len(tokenizer)} tokens"
        fits &= _holds(found, "tokenizer", place, lambda: check_tokenizer(config, base, tokenizer), fine)
    if not fits:
        return None
    return found.attempt("target modules", "model.target_modules", lambda: build_model(config, base))


def _holds(
    found: Diagnosis, check: str, place: str, precondition: Callable[[], None], fine: str, way_out: str = ""
) -> bool:
    """Note and return whether a precondition of a run holds."""
    before = len(found.findings)
    found.attempt(check, place, precondition, lambda _: fine, way_out)
    return found.findings[before].status == "ok"


# The rows ---------------------------------------------------------------------------------------------------------------


def check_clients(found: Diagnosis, config: RunConfig) -> Federation | None:
    """Read the rows and divide them among the clients."""
    whole = found.attempt("rows", "data", lambda: read_federation(config))
    if whole is None:
        return None
    _check_left_out(found, config, whole)
    federation = found.attempt(
        "rows",
        "data",
        lambda: load_federation(config),
        lambda own: f"{len(own.clients)} clients, {own.total('train')} training rows, {own.total('test')} held out",
    )
    if federation is None:
        return None
    clients, asked, place = len(federation.names), config.federation.clients_per_round, "federation.clients_per_round"
    averages = "robustness" not in make_method(config).refuses
    if asked == 1 and averages and clients > 1:
        found.note("cohort", "one client a round", place, "raise it: an average of one is that one", warn=True)
    else:
        fine = f"{asked} of {clients} clients a round"
        _holds(found, "cohort", place, lambda: check_cohort(config, clients), fine)
    return federation


def _check_left_out(found: Diagnosis, config: RunConfig, whole: Federation) -> None:
    """Check the rows and clients that are left out of the run."""
    no_side = sum(whole.left_out_rows.values())
    rows = no_side + sum(len(own.train) + len(own.test) for own in whole.clients.values())
    values = ", ".join(sorted(whole.left_out_rows)[:NAMED])
    way_out = "set data.train and data.test to the values that the field has"
    value = f"{no_side} of {rows}" + (f" ({values})" if values else "")
    found.note("rows of no side", value, "data.split_field", way_out, warn=no_side > MUCH_LEFT_OUT * rows)
    empty = [name for name, own in whole.clients.items() if not own.train]
    silent = [name for name, own in whole.clients.items() if own.train and not own.test]
    few = sum(0 < len(own.train) < config.data.min_rows and bool(own.test) for own in whole.clients.values())
    if empty:
        way_out = "give them rows, or take them out of the data"
        found.note("clients left out", f"no training row: {_named(empty)}", "data.train", way_out, warn=True)
    if silent:
        way_out = 'raise data.test_share (with data.split_field = ""), or hold out a row of each'
        found.note("clients left out", f"no held-out row: {_named(silent)}", "data.test_share", way_out, warn=True)
    if not empty and not silent:
        found.note("clients left out", f"{few} with fewer than {config.data.min_rows} rows", "data.min_rows")


def check_examples(
    found: Diagnosis, config: RunConfig, federation: Federation, tokenization: Tokenization
) -> dict[str, Sequence[Example]] | None:
    """Tokenize the rows and note lost tokens and rows; return the training examples of the tokenized clients."""
    names, data = _some(config, federation), TokenizedFederation(federation, tokenization)
    before = tokenization.counted
    test = found.attempt("rows", "data", lambda: sum(len(data.test(name)) for name in names))
    train = found.attempt("rows", "data", lambda: {name: data.train(name) for name in names})
    if test is None or train is None:
        return None
    cut, dropped, *borders = (now - was for now, was in zip(tokenization.counted, before, strict=True))
    rows = test + sum(map(len, train.values())) + dropped
    of = f"of {rows} rows" + ("" if len(names) == len(federation.names) else f" of {len(names)} clients")
    way_out = "give those rows a target, or take them out: nobody learns from them"
    found.note("rows without a target", f"{dropped} {of}", "data.target", way_out, warn=dropped > 0)
    way_out = "raise data.max_length, or set data.long_rows = 'split' for rows without a prompt"
    found.note("rows too long", f"{cut} {of} are cut", "data.max_length", way_out, warn=cut > MUCH_CUT * rows)
    nothing = [name for name in names if not train[name]]
    value = f"no training row with a target: {_named(nothing)}" if nothing else f"none of {len(names)}"
    way_out = "raise data.min_rows, or give their rows targets: each of their rounds is a failure"
    found.note("empty clients", value, "data.target", way_out, fail=bool(nothing))
    notes = [
        *notes_on(federation, tokenization.tokenizer),
        *describe_borders(*borders, dated=tokenization.dated),
    ]
    for note in notes:
        found.note("oddities", note, "data", "look at the examples of `hetlora data CONFIG --show 3`", warn=True)
    if not notes:
        found.note("oddities", "none", "data")
    found.note("fields not read", unread_fields(federation, fields_read(config.data)) or "none", "data")
    for example in shown_examples(federation, tokenization, 1):
        context = f"…{example.context[-CONTEXT:]}" if len(example.context) > CONTEXT else example.context
        found.note("example", f"after {context!r} it is trained on |{'|'.join(example.scored[:TOKENS])}|", "data")
    return train


def _some(config: RunConfig, federation: Federation) -> Sequence[str]:
    """Return the clients whose rows are tokenized: all, or a sample with about `MOST_ROWS` rows."""
    rows = federation.total("train") + federation.total("test")
    names = federation.names
    if rows <= MOST_ROWS:
        return names
    count = max(1, len(names) * MOST_ROWS // rows)
    places = random.Random(f"doctor:{config.seed}").sample(range(len(names)), count)
    return [names[place] for place in sorted(places)]


def _named(clients: Sequence[str]) -> str:
    return ", ".join(map(repr, clients[:NAMED])) + (f" and {len(clients) - NAMED} more" if len(clients) > NAMED else "")


# The settings -----------------------------------------------------------------------------------------------------------


def check_ranks(found: Diagnosis, config: RunConfig, federation: Federation, shapes: Shapes | None) -> Ranks | None:
    """Assign and check the clients' ranks."""
    ranks = found.attempt("ranks", "ranks", lambda: assign_ranks(config, federation.counts("train")))
    if ranks is None:
        return None
    counts = Counter(ranks[name] for name in ranks.names[:MANY])
    value = ", ".join(f"{count} of rank {rank}" for rank, count in sorted(counts.items())[:8])
    adapted = {} if make_method(config).trains == "weights" else shapes or {}
    wide = wide_rank_warning(ranks.largest, adapted)
    found.note("ranks", wide or value, "ranks", warn=wide is not None)
    kind, unused = config.ranks, []
    if kind.kind == "tiers":
        unused = [f"rank {tier.rank}" for tier in kind.tiers if tier.rank not in counts]
    elif isinstance(kind, MemoryRanks):
        unused = ["a memory tier"] if len(counts) < len({tier.megabytes for tier in kind.tiers}) else []
    elif kind.kind == "explicit":
        unused = [repr(name) for name in kind.of if name not in ranks]
    value = f"{', '.join(unused[:NAMED])}: nobody has it" if unused else f"{len(counts)} different ranks"
    way_out = "raise its share or the number of clients, or take it away"
    found.note("tiers", value, "ranks", way_out, warn=bool(unused))
    return ranks


def check_memory(
    found: Diagnosis, config: RunConfig, largest: int, device: torch.device, available: int | None = None
) -> bool:
    """Compare the predicted memory of a run with the available memory; return whether the base may be loaded.

    Args:
        found: Receives the findings.
        config: The run.
        largest: The largest rank.
        device: Device of the run.
        available: Bytes of available memory; None asks the system.
    """
    if available is None:
        available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    place = "memory_megabytes"

    def predict() -> tuple[int, int] | None:
        costs = cost_model(config)
        try:
            return costs.base_bytes, _predicted(config, costs, largest, available)
        except ModelError as error:  # the run may fit all the same
            found.note("memory", str(error), place, "run a round, and look at the memory it took", warn=True)
            return 0, 0

    sizes = found.attempt("memory", place, predict)
    if not sizes or not any(sizes):
        return sizes is not None
    base, predicted = sizes
    there = "an amount that the system does not say" if available is None else megabytes(available, ".0f")
    value = f"{megabytes(predicted, '.0f')} predicted (the base {figure(base / 1e6, '.0f')}) of {there}"
    if available is None or predicted <= available:
        found.note("memory", value, place)
        return True
    if make_method(config).trains == "weights":
        way_out = "take a machine with more memory, a smaller base, or train adapters"
        found.note("memory", value, "method.name", way_out, fail=True)
        return base < available
    way_out = f"set memory_megabytes to at most {figure(available / 1e6, '.0f')}: less is then done at once"
    found.note("memory", value, place, way_out, warn=True)
    return True


def _predicted(config: RunConfig, costs: CostModel, largest: int, available: int | None) -> int:
    """Predict the bytes that a run holds; refuse a run that does not fit even with one client at a time."""
    if make_method(config).trains == "weights":
        return costs.full(largest_work(config)).peak_bytes
    threads, limit = config.threads or torch.get_num_threads(), config.memory_megabytes or NO_LIMIT
    there = NO_LIMIT if available is None else max(available / 1e6, 1e-6)

    def predicted(megabytes: float) -> int:
        limited = config.model_copy(update={"memory_megabytes": megabytes})
        allowance = fit_memory(limited, costs, largest, threads)
        assert allowance.predicted is not None
        return allowance.predicted

    predicted(min(limit, there))
    return predicted(limit)


def check_training(found: Diagnosis, config: RunConfig, federation: Federation) -> None:
    """Compare a client's work per round with its rows."""
    settings, training, clients = local_training(config), config.training, make_method(config).clients
    if clients == "nobody":
        found.note("local training", "nobody trains", "method.name")
        return
    counts = federation.counts("train")
    rows = [counts[name] for name in federation.names[:MANY]]
    median, largest = statistics.median(rows), settings.count(max(rows))
    steps = settings.count(round(median))
    if clients == "pooled":  # one client does the work of a whole cohort
        median = federation.total("train")
        steps = largest = round(config.federation.clients_per_round * statistics.fmean(map(settings.count, rows)))
    times, rate, kind = steps * training.batch_size / median, training.learning_rate, training.optimizer
    value = f"{steps} steps of {training.batch_size} rows on {median:.0f}, {times:.1f} times each"
    place = "training.steps" if training.steps else "training.epochs"
    concerns = [
        (times > MANY_TIMES, place, f"{value}; fewer are usual", "lower it"),
        (largest > MANY_STEPS, place, f"{largest} steps a round for the client with most rows", "set training.steps"),
        (rate > LARGE_RATE[kind], "training.learning_rate", f"{rate:g} is large for {kind}", "lower it, to 1e-2 or less"),
        (rate < SMALL_RATE, "training.learning_rate", f"{rate:g} is so small that little is learned", "raise it"),
    ]  # fmt: skip
    for holds, where, what, way_out in concerns:
        if holds:
            found.note("local training", what, where, way_out, warn=True)
    if not any(holds for holds, *_ in concerns):
        found.note("local training", value, "training")


def check_method_settings(found: Diagnosis, config: RunConfig, ranks: Ranks, shapes: Shapes | None) -> None:
    """Check for a server without effect and for pruning that cannot happen."""
    method, optimizer = make_method(config), config.server_optimizer
    if optimizer is not None and optimizer.learning_rate < SMALL_RATE:
        value, place = f"{optimizer.learning_rate:g} moves nothing that is seen", "server_optimizer.learning_rate"
        found.note("server", value, place, "raise it; 1 is plain averaging", warn=True)
    else:
        nobody = method.clients == "nobody"
        value = f"method {method.name}" + (" trains nobody" if nobody else "")
        found.note("server", value, "method.name", "take another, but to measure the base", warn=nobody)
    if method.prune is keep_rank:
        found.note("self-pruning", f"method {method.name} does not prune as it is set", "method")
    elif shapes is None:
        found.skip("the modules are not known", "self-pruning")
    else:
        some = sorted({ranks[name] for name in ranks.names[:MANY]})
        found.attempt("self-pruning", "method", lambda: _check_pruning(found, method, some, shapes))


def _check_pruning(found: Diagnosis, method: Method[object], ranks: list[int], shapes: Shapes) -> None:
    """Check which ranks the method cuts if a client of each rank halves all its factors."""
    module, (height, width) = next(iter(shapes.items()))
    state = ServerState({module: LoraPair(torch.ones(ranks[-1], width), torch.ones(height, ranks[-1]))})
    cut: dict[int, Rank] = {}
    for rank in ranks:
        task = method.distribute(state, Client("pruner", rank, 1))
        halved = map_tensors(lambda factor: 0.5 * factor, task.adapter)
        left = method.prune(task, ClientUpdate(task.client, task.round, task.rank, halved, 1, 1, 1.0)).rank
        if left != task.rank:
            cut[rank] = left
    prunes = ", ".join(f"{rank} to {rank_of(left, module)}" for rank, left in cut.items())
    never = f"can never fire: no client of rank {', '.join(map(str, ranks))} has a tail to cut"
    way_out = "lower method.min_rank below the largest rank, or set method.gamma = 1 to do without"
    value, place = f"a first prune cuts {prunes}" if cut else never, "method" if cut else "method.min_rank"
    found.note("self-pruning", value, place, way_out, warn=not cut)
