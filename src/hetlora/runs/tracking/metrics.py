"""Named figures of the records, which every tracker logs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hetlora.runs.records import EvaluationRecord, RoundRecord

__all__ = ["evaluation_figures", "round_figures"]


def round_figures(record: RoundRecord, *, bytes_up: int, bytes_down: int) -> dict[str, float]:
    """Return the finite figures of a round. Ranks by module count by the largest.

    Args:
        record: The record of the round.
        bytes_up: Bytes of the tensors of all admitted updates up to and including this round.
        bytes_down: Bytes of the tensors sent up to and including this round.
    """
    ranks = [rank if isinstance(rank, int) else max(rank.values()) for rank in record.ranks.values()]
    figures = {
        "train/loss": record.loss,
        "eval/perplexity": record.perplexity,
        "comm/bytes_up": record.bytes_up,
        "comm/bytes_down": record.bytes_down,
        "comm/total_bytes_up": bytes_up,
        "comm/total_bytes_down": bytes_down,
        "clients/asked": len(ranks),
        "clients/admitted": len(record.clients) + len(record.summed),
        "clients/failures": len(record.failures),
        "clients/prunes": len(record.prunes),
        "clients/bounded": sum(bool(client.get("bounded")) for client in record.clients.values()),
        "clients/largest_share": max(record.weights.values(), default=None),
        "rank/mean": sum(ranks) / len(ranks) if ranks else None,
        "rank/min": min(ranks, default=None),
        "rank/max": max(ranks, default=None),
        "rank/live_slots": record.live_slots,
        "time/seconds": record.seconds,
    }
    network = record.network or {}
    figures |= {f"network/{name}": network.get(name) for name in ("bytes_up", "bytes_down", "nodes")}
    return _finite(figures)


def evaluation_figures(record: EvaluationRecord, group: str = "eval") -> dict[str, float]:
    """Return the finite figures of a measurement, overall and by tier.

    Args:
        record: The record of the measurement.
        group: Prefix of their names.

    Example:
        >>> scores = {"perplexity": 41.5, "rougeL": None}
        >>> evaluation_figures(EvaluationRecord(8, scores, {"4": scores}, {}))
        {'eval/perplexity': 41.5, 'eval/tier-4/perplexity': 41.5}
    """
    parts = {group: record.overall, **{f"{group}/tier-{tier}": scores for tier, scores in record.tiers.items()}}
    names = ("perplexity", "rougeL")
    return _finite({f"{part}/{name}": scores.get(name) for part, scores in parts.items() for name in names})


def _finite(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if isinstance(value, (int, float)) and math.isfinite(value)}
