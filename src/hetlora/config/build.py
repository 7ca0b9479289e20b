"""Builds the clients' ranks, the method with its wrappers, and the local training from a configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hetlora.config import MemoryRanks, RunConfig
from hetlora.core.codecs import CODECS
from hetlora.core.method import Method
from hetlora.core.population import names_of
from hetlora.core.ranks import (
    Ranks,
    explicit_ranks,
    normal_ranks,
    power_law_ranks,
    ranks_by_examples,
    same_ranks,
    tiered_ranks,
    uniform_ranks,
)
from hetlora.core.robust import Robustness
from hetlora.errors import ConfigError
from hetlora.methods import fedopt, fedprox
from hetlora.methods.lookup import find_method
from hetlora.training.cost_model import CostModel, LocalWork
from hetlora.training.local import LocalTraining

__all__ = [
    "assign_ranks",
    "cost_model",
    "largest_work",
    "local_training",
    "make_method",
    "make_robust",
    "model_dtype",
    "wire_rounding",
]


def assign_ranks(config: RunConfig, rows: Mapping[str, int]) -> Ranks:
    """Return every client's first rank.

    Args:
        config: The run.
        rows: Client to the number of its training rows.

    Raises:
        HetLoraError: A client has no rank, or a memory does not hold rank 1.
    """
    ranks, seed, clients = config.ranks, config.seed, names_of(rows)
    if ranks.kind == "same":
        return same_ranks(clients, ranks.rank)
    if ranks.kind == "tiers":
        return tiered_ranks(clients, [(tier.rank, tier.share) for tier in ranks.tiers], seed)
    if ranks.kind == "uniform":
        return uniform_ranks(clients, ranks.min, ranks.max, seed)
    if ranks.kind == "power-law":
        return power_law_ranks(clients, ranks.min, ranks.max, seed, ranks.exponent)
    if ranks.kind == "normal":
        return normal_ranks(clients, ranks.min, ranks.max, seed, mean=ranks.mean, std=ranks.std)
    if ranks.kind == "by-examples":
        return ranks_by_examples(rows, ranks.min, ranks.max, ranks.order)
    if ranks.kind == "memory":
        return tiered_ranks(clients, _ranks_that_fit(config, ranks), seed)
    return explicit_ranks(clients, ranks.of, ranks.default)


def _ranks_that_fit(config: RunConfig, ranks: MemoryRanks) -> Sequence[tuple[int, float]]:
    """Return each tier's rank and share. The rank must fit for any rows, so it follows from the largest work."""
    costs, work = cost_model(config), largest_work(config)
    fitting = [costs.largest_rank(round(tier.megabytes * 1e6), work, ranks.max) for tier in ranks.tiers]
    if not all(fitting):
        needed = math.ceil(costs.lora(1, work).peak_bytes / 1e5) / 10
        problems = [
            f"ranks.tiers.{index}.megabytes = {tier.megabytes:g}: rank 1 needs {needed} MB, with steps of {work.rows} rows of "
            f"{work.length} tokens; give that much, or lower training.batch_size or data.max_length"
            for index, (tier, rank) in enumerate(zip(ranks.tiers, fitting, strict=True))
            if not rank
        ]
        raise ConfigError("the configuration", problems)
    return [(rank, tier.share) for rank, tier in zip(fitting, ranks.tiers, strict=True)]


def make_method(config: RunConfig) -> Method[Any]:
    """Return the method of a run with its wrappers."""
    method = find_method(config.method.name)(**config.method.arguments)
    if config.training.proximal:
        method = fedprox(method, mu=config.training.proximal)
    server = config.server_optimizer
    if server is None:
        return method
    return fedopt(
        method,
        optimizer=server.name,
        learning_rate=server.learning_rate,
        beta1=server.beta1,
        beta2=server.beta2,
        tau=server.tau,
    )


def make_robust(config: RunConfig) -> Robustness | None:
    """Return the bounds of `[robustness]`; None without it."""
    section = config.robustness
    if section is None:
        return None
    return Robustness(
        clip=section.clip,
        weight_cap=section.weight_cap,
        largest_share=section.largest_share,
        aggregation=section.aggregation,
        byzantine=section.byzantine,
    )


def wire_rounding(config: RunConfig) -> float:
    """Return the largest rounding error of a number sent over Flower, as a share of the largest number of its slot."""
    return CODECS[config.flower.precision].rounding_bound


def cost_model(config: RunConfig) -> CostModel:
    """Return the cost model of a run's base and training; reads the base's config.json and no weights."""
    model = config.model
    return CostModel(
        model.base,
        local_training(config),
        target_modules=model.target_modules,
        layers=model.layers,
        dtype=model_dtype(config),
        quantize=model.quantize,
        recompute=config.training.recompute,
    )


def model_dtype(config: RunConfig) -> torch.dtype:
    """Return the type of a run's weights and activations."""
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    return dtype


def largest_work(config: RunConfig) -> LocalWork:
    """Return the largest work of a client: full batches of rows at `data.max_length`, all tokens scored."""
    # With epochs the number of steps depends on the rows; from two steps on the memory is the same.
    return LocalWork.bound(config.training.batch_size, config.data.max_length, config.training.steps or 2)


def local_training(config: RunConfig) -> LocalTraining:
    """Return the local training of `[training]`."""
    training = config.training
    return LocalTraining(
        learning_rate=training.learning_rate,
        batch_size=training.batch_size,
        steps=training.steps,
        epochs=training.epochs,
        optimizer=training.optimizer,
        weight_decay=training.weight_decay,
        clip_norm=training.clip_norm or None,
    )
