"""One validated model of a run, read from TOML."""

from __future__ import annotations

from hetlora.config.reading import (
    changed,
    key_path,
    load_config,
    load_run_config,
    parse_config,
    parse_run_config,
    read_document,
    tracked,
    validation_messages,
)
from hetlora.config.sections import RANK_KINDS, TIER_KINDS, DataConfig, MemoryRanks, PartitionConfig, RunConfig

__all__ = [
    "RANK_KINDS",
    "TIER_KINDS",
    "DataConfig",
    "MemoryRanks",
    "PartitionConfig",
    "RunConfig",
    "changed",
    "key_path",
    "load_config",
    "load_run_config",
    "parse_config",
    "parse_run_config",
    "read_document",
    "tracked",
    "validation_messages",
]
