"""`docs/models.md`, from what came out for every architecture."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

__all__ = ["Row", "models_page"]

MARKS = {"ok": "✓", "refused": "–", "skipped": "·", "wrong": "✗", "error": "✗"}

INTRODUCTION = """# Which models work

Every causal language model of transformers {transformers} that can be built small by its configuration has gone through
all that hetlora does with a base, with random weights; PEFT was {peft}, PyTorch {torch}.
`make test-architectures` does it again and writes this page.

Look for the `model_type` in the `config.json` of your model. What follows it after a slash is a variant, such as another
kind of positions.

{counts}

| column | what was looked at, against a reference that hetlora has no part in |
| --- | --- |
| targets | there are default target modules; without, all that can be adapted stand in for them in the other columns |
| run | a run of one round, with answers, learns |
| perplexity | the base's perplexity is that of transformers, one row at a time |
| cohort | two clients of different ranks, trained together, end where PEFT and AdamW bring each alone |
| all-linear | the same with `target_modules = "all-linear"` |
| export | PEFT reads the adapter, to the logits of the run |
| merged | transformers reads the merged model, to the logits of the run |
| generation | answers to many prompts at once are those of PEFT to each alone, by whole passes |
| plan | `hetlora plan` foretells parameters and memory |
| bfloat16 | a run with `model.dtype = "bfloat16"` |
| full | training all weights ends where plain PyTorch ends, and what is written is what was trained |

✓ right · – refused before anything is trained, for the reason below · ✗ wrong · a dot: there was nothing to look at
"""


class Row(NamedTuple):
    """An architecture on the page.

    Attributes:
        name: Type and variant.
        cells: Column to state and detail.
        unbuilt: Why it could not be built small; empty where it could.
    """

    name: str
    cells: Mapping[str, tuple[str, str]]
    unbuilt: str = ""


def models_page(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return the page.

    Args:
        rows: What came out.
        columns: In order.
    """
    versions = {name: importlib.metadata.version(name).split("+")[0] for name in ("transformers", "peft", "torch")}
    built = [row for row in rows if not row.unbuilt]
    parts = [
        INTRODUCTION.format(**versions, counts=_counts(built)),
        "\n".join(_table(built, columns)),
        "## Why something is refused\n\n" + "\n".join(_reasons(built, ("refused",))),
    ]
    if broken := list(_reasons(built, ("wrong", "error"))):
        parts.append("## What is wrong\n\n" + "\n".join(broken))
    if unbuilt := [row for row in rows if row.unbuilt]:
        told = (f"- `{row.name}`: {_plain(row.unbuilt)}" for row in unbuilt)
        parts.append("## What could not be built small\n\n" + "\n".join(told))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _counts(rows: Sequence[Row]) -> str:
    states = [{state for state, _ in row.cells.values()} for row in rows]
    broken = sum(bool(found & {"wrong", "error"}) for found in states)
    right = sum(found <= {"ok"} for found in states)
    kinds = len({row.name.split("/")[0] for row in rows})
    refused = len(rows) - right - broken
    return (
        f"Of {len(rows)} variants of {kinds} types, {right} are right in every column, {refused} are refused\n"
        f"in some column before anything is trained and right in the others, and {broken} go wrong somewhere."
    )


def _table(rows: Sequence[Row], columns: Sequence[str]) -> Iterable[str]:
    yield "| model | " + " | ".join(columns) + " |"
    yield "| --- |" + " :-: |" * len(columns)
    for row in rows:
        yield f"| `{row.name}` | " + " | ".join(MARKS[row.cells[column][0]] for column in columns) + " |"


def _reasons(rows: Sequence[Row], states: Sequence[str]) -> Iterable[str]:
    for row in rows:
        by_reason: dict[str, list[str]] = {}
        for column, (state, detail) in row.cells.items():
            if state in states:
                by_reason.setdefault(_plain(detail), []).append(column)
        for reason, columns in by_reason.items():
            yield f"- `{row.name}`, {', '.join(columns)}: {reason}"


def _plain(text: str) -> str:
    """Return text on one line, with nothing that Markdown reads."""
    return " ".join(text.split()).replace("<", "‹").replace(">", "›").replace("*", "\\*").replace("_", "\\_")
