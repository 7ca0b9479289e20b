"""Sample answers of a run before and after it, from its newest checkpoint: the records hold none."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hetlora.runs.reader import Run, number, section

__all__ = ["Sample", "samples"]

MOST = 4
LONGEST = 1200
"""Characters of a text; a longer one is cut."""


class Sample(NamedTuple):
    """A held-out prompt with the expected answer and the generated ones; an answer that was not generated is None."""

    client: str
    prompt: str
    expected: str
    before: str | None
    after: str | None


def samples(run: Run) -> list[Sample]:
    """Return a few answers of a run, chosen by its seed; empty if no checkpoint holds any."""
    state = _newest_state(run.folder / "checkpoints")
    before, after = (_answers(state.get(when)) for when in ("base", "final"))
    keys = list(dict.fromkeys([*before, *after]))
    seed = int(number(run.config.get("seed")) or 0)
    chosen = sorted(random.Random(seed).sample(range(len(keys)), min(MOST, len(keys))))
    return [_sample(keys[place], before, after) for place in chosen]


_Key = tuple[str, str, str]


def _sample(key: _Key, before: Mapping[_Key, str], after: Mapping[_Key, str]) -> Sample:
    client, prompt, expected = map(_shown, key)
    was, now = (None if key not in texts else _shown(texts[key]) for texts in (before, after))
    return Sample(client, prompt, expected, was, now)


def _shown(text: str) -> str:
    cut = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    return cut.expandtabs(4).strip()


def _answers(measurement: Any) -> dict[_Key, str]:
    """Return client, prompt and expected answer to the generated one."""
    found = measurement.get("answers") if isinstance(measurement, Mapping) else None
    entries = [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []
    lines = [[str(entry.get(key, "")) for key in ("client", "prompt", "expected", "text")] for entry in entries]
    return {(client, prompt, expected): text for client, prompt, expected, text in lines}


def _newest_state(folder: Path) -> Mapping[str, Any]:
    """Return what the header of the newest checkpoint says; empty if there is none that can be read.

    A checkpoint is a safetensors file: 8 bytes with the length of its header, then the header as JSON.
    """
    for path in sorted(folder.glob("round-*.safetensors"), reverse=True):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, path.stat().st_size)))
            return section({"state": json.loads(section(header, "__metadata__")["state"])}, "state")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return {}
