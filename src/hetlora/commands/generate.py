"""A run's result asked: what it says after a prompt, beside what the base alone says."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hetlora.config.build_data import make_rendering, make_tokenization
from hetlora.config.build_model import build_model, build_tokenizer
from hetlora.data.templates import Row, RowTemplate
from hetlora.data.tokenization import Tokenization
from hetlora.errors import DataError, HetLoraError, printable
from hetlora.model.lora_model import LoraModel
from hetlora.runs.display import QuietDisplay
from hetlora.runs.process import set_up
from hetlora.runs.trained_run import AdapterSelection, TrainedRun, open_run
from hetlora.training.evaluation import generate_texts

__all__ = ["Completion", "as_prompt", "describe_generated", "generate", "read_prompts"]

Prompt = str | Mapping[str, Any]

AT_ONCE = 256
"""Prompts that are held at a time: those of like length are answered together."""


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        prompt: What the model was given, as people read it.
        text: What it said.
        base: What the base alone said; None where it was not asked.
        cut: Tokens at the beginning of a prompt too long for `data.max_length`, which no model was given.
    """

    prompt: str
    text: str
    base: str | None = None
    cut: int = 0

    def summary(self) -> dict[str, Any]:
        """Return it as plain data, a line that ``hetlora generate --file`` prints; `cut` where something was."""
        base = {} if self.base is None else {"base": self.base}
        return {"prompt": self.prompt, "text": self.text, **base, **({"cut": self.cut} if self.cut else {})}


def generate(
    run: os.PathLike[str] | str,
    prompts: Iterable[Prompt] | Prompt,
    *,
    rank: int | None = None,
    tier: str | None = None,
    client: str | None = None,
    compare_base: bool = False,
    max_new_tokens: int | None = None,
    display: QuietDisplay | None = None,
) -> Iterator[Completion]:
    """Say what a run's result says after each prompt, greedily, in order.

    Args:
        run: Folder of the run.
        prompts: Text, which the model is given as it is; or the fields of a row, which the run's template makes a prompt of.
            One of them is one prompt.
        rank: Ask the first slots of the global adapter, so many.
        tier: Ask what every device of a tier of the results affords.
        client: Ask what this client would be served with; of a personal method its own adapter.
        compare_base: Ask the base alone, too.
        max_new_tokens: Longest answer; by default that of the run's evaluation.
        display: Is told what goes on, and which prompts are cut at their beginning: with the answer they have
            `data.max_length` tokens.

    Yields:
        An answer a prompt.

    Raises:
        HetLoraError: There is no such run or part, its base is another by now, or a prompt cannot be used. All but the last
            is raised at once, and not when the first answer is asked for.
    """
    part, display = AdapterSelection(rank, tier, client), display or QuietDisplay()
    if isinstance(prompts, (str, Mapping)):  # which hold letters and keys, and no prompts
        prompts = [prompts]
    with set_up():
        asked = _asked(open_run(run, display.say), part, display, max_new_tokens, compare_base=compare_base)
    return _answers(asked, prompts)


@dataclass(frozen=True)
class _Asked:
    """Who is asked, and how: all that is loaded before the first answer."""

    speakers: list[_Generator]
    tokenization: Tokenization
    rendering: RowTemplate
    longest: int
    display: QuietDisplay


def _asked(
    learned: TrainedRun,
    part: AdapterSelection,
    display: QuietDisplay,
    max_new_tokens: int | None,
    *,
    compare_base: bool,
) -> _Asked:
    longest = learned.config.evaluation.max_new_tokens if max_new_tokens is None else max_new_tokens
    room = learned.config.data.max_length
    if not 1 <= longest < room:
        raise HetLoraError(
            f"max_new_tokens = {longest} leaves no room for an answer, or for a prompt, within data.max_length = {room}; give "
            f"1 … {room - 1}"
        )
    speakers = _speakers(learned, part, display, compare_base=compare_base)
    tokenization = make_tokenization(learned.config, build_tokenizer(learned.config))
    return _Asked(speakers, tokenization, make_rendering(learned.config.data), longest, display)


@dataclass(frozen=True)
class _Generator:
    """A model, and what it computes with."""

    model: LoraModel
    adapter: Any
    folded: Any

    def say(self, tokenization: Tokenization, rows: list[Row], longest: int) -> list[str]:
        self.model.use(self.adapter, self.folded)
        return generate_texts(self.model, tokenization, rows, longest)


def _speakers(
    learned: TrainedRun, part: AdapterSelection, display: QuietDisplay, *, compare_base: bool
) -> list[_Generator]:
    """Return what answers: what was learned, and the base where it is asked for."""
    whole = learned.written_model
    adapter = None if whole is not None and part == AdapterSelection() else learned.adapter(part)
    learned.check_unchanged("model.base", "model.tokenizer")
    display.say(f"asking {learned.source}")
    if whole is None:
        model = build_model(learned.config)
        speakers = [_Generator(model, adapter, learned.folded or None)]
        return [*speakers, _Generator(model, None, None)] if compare_base else speakers
    # What the run has written is whole, and of no fewer bits.
    merged = learned.config.model.model_copy(update={"base": str(whole), "quantize": "none"})
    speakers = [_Generator(build_model(learned.config.model_copy(update={"model": merged})), None, None)]
    return [*speakers, _Generator(build_model(learned.config), None, None)] if compare_base else speakers


def _answers(asked: _Asked, prompts: Iterable[Prompt]) -> Iterator[Completion]:
    rest = enumerate(prompts, start=1)
    while some := list(itertools.islice(rest, AT_ONCE)):
        rows = [_row(asked.rendering, prompt, f"prompt {number}") for number, prompt in some]
        with set_up():  # not around a yield, which leaves the process to others
            told = _told(asked, rows)
            cut = [_cut(asked, row, number) for row, (number, _) in zip(rows, some, strict=True)]
        for row, texts, tokens in zip(rows, told, cut, strict=True):
            yield Completion(row.prompt, texts[0], texts[1] if len(texts) > 1 else None, tokens)


def _told(asked: _Asked, rows: list[Row]) -> list[list[str]]:
    """Return what each speaker says, a list a row."""
    # A chat's turn ends by its own token, and plain text does not: each kind is asked by itself.
    told: dict[int, list[str]] = {}
    for chat in (False, True):
        own = [index for index, row in enumerate(rows) if (row.turns is not None) is chat]
        if own:
            among = [rows[index] for index in own]
            said = [speaker.say(asked.tokenization, among, asked.longest) for speaker in asked.speakers]
            told |= {index: [texts[place] for texts in said] for place, index in enumerate(own)}
    return [told[index] for index in range(len(rows))]


def _cut(asked: _Asked, row: Row, number: int) -> int:
    """Return how many tokens of a prompt no model was given, and say so: an answer to half a question looks like any other."""
    unlimited = replace(asked.tokenization, max_length=sys.maxsize)
    whole, kept = (len(of.prompt_ids(row, asked.longest)) for of in (unlimited, asked.tokenization))
    if kept < whole:
        asked.display.say(
            f"prompt {number}: the first {whole - kept} of its {whole} tokens are cut; with an answer of {asked.longest} they "
            f"are more than data.max_length = {asked.tokenization.max_length}"
        )
    return whole - kept


def _row(rendering: RowTemplate, prompt: Prompt, where: str) -> Row:
    if isinstance(prompt, str):
        return Row(prompt, "")
    if not isinstance(prompt, Mapping):
        raise DataError(f"{where}: of type {type(prompt).__name__}; a prompt is text, or a mapping of a row's fields")
    row = rendering.question(prompt, where)
    if not row.prompt and row.turns is None:
        raise DataError(f"{where}: the run has no data.prompt, so that fields make no prompt; give text")
    return row


def read_prompts(path: Path) -> Iterator[Prompt]:
    """Yield the prompts of a file, a JSON line each: an object is a row's fields, a string is text; empty lines are none.

    Args:
        path: The file; ``.gz`` allowed.

    Raises:
        DataError: It cannot be read, or a line is neither; names the line.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _prompt(line, f"{path}, line {number}")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{str(path)!r} cannot be read as text ({error}); give a JSON Lines file in UTF-8") from error


def _prompt(line: str, where: str) -> Prompt:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); every line must be a JSON object or string") from error
    if not isinstance(found, (str, dict)):
        raise DataError(f"{where}: of type {type(found).__name__}; every line must be a JSON object or string")
    return found


def as_prompt(text: str) -> Prompt:
    """Return the fields of a row where text is a JSON object, else the text.

    Example:
        >>> as_prompt('{"question": "what is 3?"}'), as_prompt("{ is a brace")
        ({'question': 'what is 3?'}, '{ is a brace')
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, dict) else text


def describe_generated(answer: Completion) -> str:
    """Say an answer for a person; beside the base's, each under its name."""
    text = _lines(answer.text)
    return text if answer.base is None else f"base:\n{_lines(answer.base, '  ')}\nresult:\n{_lines(answer.text, '  ')}"


def _lines(text: str, before: str = "") -> str:
    """Return text that no terminal obeys, with its lines."""
    return "\n".join(before + printable(line) for line in text.split("\n"))
