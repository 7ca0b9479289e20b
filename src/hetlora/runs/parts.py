"""Builds the parts of a run from its configuration, and refuses what does not fit before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hetlora.config import RunConfig
from hetlora.config.build import assign_ranks, cost_model, local_training, make_method, model_dtype
from hetlora.config.build_data import ignored_client_field, load_federation, make_tokenization
from hetlora.config.build_model import load_fitting_model
from hetlora.config.preconditions import check_cohort, slow_dtype_warning, wide_rank_warning
from hetlora.core.adapter import Adapter
from hetlora.core.client_list import ClientList, sample_evaluated_clients
from hetlora.core.method import Engine, Method
from hetlora.core.population import MANY
from hetlora.core.sampling import DropOuts, sample_cohort
from hetlora.data import Example, Federation, TokenizedFederation
from hetlora.data.inspection import both_sides, describe_borders
from hetlora.errors import ConfigError
from hetlora.model.initial_adapter import describe_import, import_adapter
from hetlora.model.lora_model import LoraModel, pick_device
from hetlora.runs.memory import MemoryPlan, fit_memory
from hetlora.runs.observer import Observer
from hetlora.runs.text import many, megabytes
from hetlora.training.local import LocalTraining
from hetlora.training.simulation import SimulationEngine

__all__ = ["Parts", "build_parts", "simulation_engine", "with_drop_outs"]


@dataclass(frozen=True)
class Parts:
    """Parts of a run, the same for every engine.

    Attributes:
        config: The validated run.
        method: What the server and the clients do.
        model: The base with what is trained in it.
        imported: The adapter that the run starts from; None for fresh factors.
        data: The clients' rows, as tokens.
        clients: Every client, with its first rank.
        measured: The clients whose held-out rows are scored.
        allowance: Limits of parallel work, for the memory.
        training: Local training of a client.
    """

    config: RunConfig
    method: Method[Any]
    model: LoraModel
    imported: Adapter | None
    data: TokenizedFederation
    clients: ClientList
    measured: Sequence[str]
    allowance: MemoryPlan
    training: LocalTraining


def build_parts(config: RunConfig, display: Observer) -> Parts:
    """Read and load the parts of a run, and describe them to the display.

    Raises:
        HetLoraError: Data, base or ranks do not allow the run.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.flower.clients == "nodes":
        problem = (
            "flower.clients = 'nodes': they are on machines of their own; start it by `flwr run`, see docs/deploy.md"
        )
        raise ConfigError("the configuration", [problem])
    federation = load_federation(config)
    display.say("; ".join([_describe_data(federation), *ignored_client_field(config)]))
    check_cohort(config, len(federation.names))
    rows = federation.counts("train")
    clients = ClientList(assign_ranks(config, rows), rows)
    device = pick_device(config.model.device)
    display.say(f"loading {config.model.base} onto {device}")
    if note := slow_dtype_warning(model_dtype(config), device):
        display.say(note)
    model, tokenizer = load_fitting_model(config)
    method = make_method(config)
    for note in model.notes:
        display.say(note)
    if method.trains != "weights" and (wide := wide_rank_warning(clients.ranks.largest, model.shapes)):
        display.say(wide)
    imported = None
    if config.model.adapter is not None:
        imported = import_adapter(config.model.adapter, model)
        display.say(describe_import(config.model.adapter, imported, clients.ranks.largest))
    data = TokenizedFederation(federation, make_tokenization(config, tokenizer))
    display.say(_describe_tokens(data))
    measured = sample_evaluated_clients(federation.names, config.evaluation.clients, config.seed)
    if len(measured) > MANY:
        display.say(f"each measurement is of all {len(clients)} clients; evaluation.clients takes some of them")
    allowance = _allowance(config, method, clients.ranks.largest, display)
    training = _training(config, method, data)
    return Parts(config, method, model, imported, data, clients, measured, allowance, training)


def simulation_engine(parts: Parts) -> Engine:
    """Return the in-process engine, with drop-outs if the run has them; a pooled client never drops out."""
    pooled, allowance = parts.method.clients == "pooled", parts.allowance
    engine = SimulationEngine(
        parts.model,
        _Pooled(parts.data) if pooled else parts.data,
        parts.training,
        seed=parts.config.seed,
        tokens_a_pass=allowance.tokens_a_pass,
        workers=allowance.workers,
        clients_a_group=allowance.clients_a_group,
    )
    return engine if pooled else with_drop_outs(parts.config, engine)


def with_drop_outs(config: RunConfig, engine: Engine) -> Engine:
    """Return an engine whose clients drop out at the run's rate."""
    federation = config.federation
    if not federation.dropout:
        return engine
    return DropOuts(engine, federation.dropout, federation.dropout_when, config.seed)


def _allowance(config: RunConfig, method: Method[Any], largest: int, display: Observer) -> MemoryPlan:
    """Return the limits of parallel work that keep the run within `memory_megabytes`."""
    if config.memory_megabytes is None:
        return MemoryPlan()
    if method.trains == "weights":
        problem = (
            "memory_megabytes: method full trains one client at a time and takes what `hetlora plan` says; drop it"
        )
        raise ConfigError("the configuration", [problem])
    allowance = fit_memory(config, cost_model(config), largest, torch.get_num_threads())
    assert allowance.predicted is not None
    display.say(
        f"memory: {megabytes(allowance.predicted, '.0f')} predicted, with {allowance.tokens_a_pass} tokens a pass, "
        f"{allowance.workers} passes at once and at most {allowance.clients_a_group} clients in each"
    )
    return allowance


def _training(config: RunConfig, method: Method[Any], data: TokenizedFederation) -> LocalTraining:
    """Return the local training; a client that holds all rows does the work of a whole cohort."""
    settings = local_training(config)
    if method.clients != "pooled":
        return settings
    names = data.federation.names
    sample = sample_cohort(names, min(MANY, len(names)), 0, config.seed)
    mean = sum(settings.count(len(data.train(name))) for name in sample) / len(sample)
    steps = max(1, round(config.federation.clients_per_round * mean))
    return replace(settings, steps=steps, epochs=None)


@dataclass(frozen=True)
class _Pooled:
    """All training rows as those of one client."""

    data: TokenizedFederation

    def train(self, _: str) -> list[Example]:
        return list(self.data.pooled())


def _describe_data(federation: Federation) -> str:
    parts = [
        f"data: {len(federation.clients)} clients",
        f"{federation.total('train')} training rows, {federation.total('test')} held out",
    ]
    if federation.sampled is not None:
        pool = federation.sampled.pool
        parts.append(f"drawn from {len(pool.train)} training rows and {len(pool.test)} held out")
    parts += [
        f"{many(count, 'client')} left out ({reason})"
        for reason, count in Counter(federation.left_out.values()).items()
    ]
    if federation.left_out_rows:
        parts.append(f"{many(sum(federation.left_out_rows.values()), 'row')} on neither side of the split")
    return "; ".join([*parts, *both_sides(federation)])


def _describe_tokens(data: TokenizedFederation) -> str:
    counts = data.counts
    parts = [f"{counts.tokens} training tokens"]
    if counts.clients < len(data.federation.clients):
        parts[0] += f" with {counts.clients} clients, which alone are counted"
    if counts.truncated:
        parts.append(f"{many(counts.truncated, 'row')} cut to data.max_length")
    if counts.empty:
        such_as = f", such as {place}" if (place := data.federation.first_blank()) else ""
        parts.append(f"{many(counts.empty, 'row')} dropped for an empty target{such_as}")
    dated = data.tokenization.dated
    return "; ".join([*parts, *describe_borders(counts.unclean, counts.unended, counts.doubled, dated=dated)])
