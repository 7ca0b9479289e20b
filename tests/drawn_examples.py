"""Number of examples that hypothesis draws per law."""

from __future__ import annotations

from hypothesis import settings

QUICK = "quick"
"""The profile of `make quick`, `--hypothesis-profile=quick`: a tenth of the examples, and two at the least."""


def examples(count: int) -> settings:
    """Return the decorator of a law: `count` examples, the same ones each time, however long they take."""
    if settings.get_current_profile_name() == QUICK:
        count = max(2, count // 10)
    return settings(deadline=None, derandomize=True, max_examples=count)
