"""A run as one client with rows of its own takes part in it."""

from __future__ import annotations

import json

from hetlora.config.build import cost_model, largest_work
from hetlora.config.reading import parse_run_config
from hetlora.config.sections import RunConfig
from hetlora.errors import HetLoraError

__all__ = ["ONE", "affordable_rank", "one_client"]

ONE = "client-000"
"""The name of the one client of a partition into one."""


def one_client(
    config: RunConfig,
    data: str | None,
    base: str | None = None,
    device: str | None = None,
    quantize: str | None = None,
) -> RunConfig:
    """Return a run with the rows, base and device of this machine.

    Args:
        config: The run, as the server has it.
        data: The rows, all of one client; None for those of the configuration.
        base: Where the base lies here, with its tokenizer, which then is never looked for at the server's place.
        device: As `model.device`.
        quantize: As `model.quantize`.

    Raises:
        HetLoraError: The run cannot be had so.
    """
    document = config.model_dump(mode="json")
    if data:
        document["data"] |= {"path": data, "subset": None, "revision": None, "clients": None, "min_rows": 1}
        document["partition"] = {"kind": "iid", "clients": 1}
        document["federation"] |= {"clients_per_round": 1}
    if base:
        document["model"] |= {"base": base, "tokenizer": None}
    if device:
        document["model"] |= {"device": device}
    if quantize:
        document["model"] |= {"quantize": quantize}
    return parse_run_config(json.dumps(document), "the server's configuration with this client's settings")


def affordable_rank(config: RunConfig, megabytes: float) -> int:
    """Return the largest rank of a run whose training fits a client's memory, by the cost model.

    Raises:
        HetLoraError: Rank 1 does not fit.
    """
    rank = cost_model(config).largest_rank(round(megabytes * 1e6), largest_work(config), config.ranks.largest)
    if not rank:
        raise HetLoraError(f"memory = {megabytes:g} MB: rank 1 does not fit; give more, or take a smaller base")
    return rank
