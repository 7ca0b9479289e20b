"""The size of the largest honest answer to a message, as text in the message: the server writes it, the SuperLink reads it."""

from __future__ import annotations

import re

__all__ = ["answer_limit", "answer_limit_text"]

LIMIT = re.compile(r"answer <= ([0-9]{1,18}) bytes\Z")


def answer_limit_text(round_or_kind: str, limit: int) -> str:
    """Return the `group_id` of a message, which Flower's logs show.

    Args:
        round_or_kind: What the message is about.
        limit: Bytes of the largest honest answer, all of its adapters and its text together.

    Example:
        >>> answer_limit_text("round 3", 1_200_000)
        'round 3, answer <= 1200000 bytes'
    """
    return f"{round_or_kind}, answer <= {limit:d} bytes"


def answer_limit(group_id: str) -> int | None:
    """Return the limit that a `group_id` ends in, or None if it has none.

    Example:
        >>> answer_limit(answer_limit_text("hello", 4096)), answer_limit("3")
        (4096, None)
    """
    found = LIMIT.search(group_id)
    return int(found[1]) if found else None
