"""Reads a run's TOML file and validates it."""

from __future__ import annotations

from hetlora.config.reading import (
    Changes,
    key_path,
    load_config,
    load_run_config,
    parse_config,
    parse_run_config,
    read_document,
    read_named,
    validation_messages,
    with_changes,
    with_trackers,
)
from hetlora.config.sections import RANK_KINDS, TIER_KINDS, DataConfig, MemoryRanks, PartitionConfig, RunConfig

__all__ = [
    "RANK_KINDS",
    "TIER_KINDS",
    "Changes",
    "DataConfig",
    "MemoryRanks",
    "PartitionConfig",
    "RunConfig",
    "key_path",
    "load_config",
    "load_run_config",
    "parse_config",
    "parse_run_config",
    "read_document",
    "read_named",
    "validation_messages",
    "with_changes",
    "with_trackers",
]
