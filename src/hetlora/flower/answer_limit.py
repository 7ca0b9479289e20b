"""How large an honest answer to a message may be, in words that travel with the message.

Who guards the SuperLink reads it there, and refuses a larger answer before it is stored.
"""

from __future__ import annotations

import re

__all__ = ["answer_limit", "answer_limit_text"]


def answer_limit_text(label: str, limit: int) -> str:
    """Return the text of a message's `group_id`.

    Example:
        >>> answer_limit_text("train", 73738)
        'train; answer <= 73738 bytes'
    """
    return f"{label}; answer <= {limit} bytes"


def answer_limit(group_id: str) -> int | None:
    """Return the limit in bytes that a `group_id` names, or None.

    Example:
        >>> answer_limit("train; answer <= 73738 bytes"), answer_limit("3")
        (73738, None)
    """
    found = re.search(r"answer <= (\d{1,15}) bytes$", group_id)
    return int(found[1]) if found else None
