"""Generated answers of a trained run, optionally beside those of the base alone."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hetlora.config import DataConfig
from hetlora.config.build_data import make_rendering, make_tokenization
from hetlora.config.build_model import build_model, build_tokenizer
from hetlora.data.fields import field_names
from hetlora.data.templates import Conversation, Row, RowTemplate
from hetlora.data.tokenization import Tokenization
from hetlora.errors import DataError, HetLoraError, printable
from hetlora.model.lora_model import LoraModel
from hetlora.runs.display import QuietDisplay
from hetlora.runs.process import set_up
from hetlora.runs.trained_run import AdapterSelection, TrainedRun, open_run
from hetlora.training.generation import generate_texts

__all__ = ["Completion", "as_prompt", "describe_generated", "generate", "read_prompts"]

Prompt = str | Mapping[str, Any]

AT_ONCE = 256
"""Prompts per batch; prompts of similar length are answered together."""


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        prompt: The prompt as text.
        text: The model's answer.
        base: The answer of the base alone; None if not requested.
        cut: Tokens cut from the beginning of a prompt too long for `data.max_length`.
    """

    prompt: str
    text: str
    base: str | None = None
    cut: int = 0

    def summary(self) -> dict[str, Any]:
        """Return the object that ``hetlora generate --file`` prints; `cut` only if tokens were cut."""
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
    raw: bool = False,
    display: QuietDisplay | None = None,
) -> Iterator[Completion]:
    """Generate a trained run's answer to each prompt, greedily, in order.

    Args:
        run: Folder of the run.
        prompts: One or several prompts: the fields of a row, for the run's template, or text. Text becomes the field that the
            template needs, or the user's turn of a conversation. Where the template needs several fields, or none, the model
            receives it as it is.
        rank: Use the first `rank` slots of the global adapter.
        tier: Use the adapter for a tier of the results, at the rank that all its devices afford.
        client: Use the adapter that this client would be served; of a personal method its own adapter.
        compare_base: Also generate the answers of the base alone.
        max_new_tokens: Longest answer; by default that of the run's evaluation.
        raw: Give text to the model as it is.
        display: Shows the progress, what becomes of text, and which prompts are cut at their beginning so that prompt and
            answer fit `data.max_length`.

    Yields:
        One answer per prompt.

    Raises:
        HetLoraError: The run or part does not exist, its base has changed, or a prompt is invalid. All but invalid prompts are
            raised immediately, not at the first answer.
    """
    part, display = AdapterSelection(rank, tier, client), display or QuietDisplay()
    if isinstance(prompts, (str, Mapping)):  # a single prompt
        prompts = [prompts]
    with set_up():
        asked = _asked(open_run(run, display.say), part, display, max_new_tokens, compare_base=compare_base)
    if raw:
        asked = replace(asked, text_field=None, note=None)
    return _answers(asked, prompts)


@dataclass(frozen=True)
class _Asked:
    """The loaded models and settings."""

    generators: list[_Generator]
    tokenization: Tokenization
    rendering: RowTemplate
    text_field: str | None  # that text becomes; None gives text as it is
    note: str | None  # says what becomes of text
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
    generators = _generators(learned, part, display, compare_base=compare_base)
    tokenization = make_tokenization(learned.config, build_tokenizer(learned.config))
    rendering = make_rendering(learned.config.data)
    text = _use_of_text(learned.config.data, rendering)
    return _Asked(generators, tokenization, rendering, *text, longest, display)


def _use_of_text(data: DataConfig, rendering: RowTemplate) -> tuple[str | None, str | None]:
    """Return the one field that makes a prompt by itself, and a note on what becomes of text, if that is worth a line."""
    names = [data.messages] if data.messages else sorted(field_names(data.prompt) | field_names(data.system))
    alone = []
    for name in names:
        with contextlib.suppress(DataError):
            rendering.question(_as_fields(name, "text", rendering), "")
            alone.append(name)
    shown = "a conversation" if data.messages else repr(data.prompt)
    if len(alone) != 1:
        fields = f"the run was trained on {shown}, which a JSON object with {', '.join(names)} fills"
        return None, f"the text is given as it is; {fields}" if names else None
    if data.messages or data.chat:
        return alone[0], "the text is the user's turn of a chat, as in training; --raw gives it as it is"
    as_it_is = data.prompt == f"{{{alone[0]}}}"
    return alone[0], None if as_it_is else f"the text is put into {shown}, as in training; --raw gives it as it is"


def _as_fields(name: str, text: str, rendering: RowTemplate) -> Mapping[str, Any]:
    return {name: [{"role": "user", "content": text}] if isinstance(rendering, Conversation) else text}


@dataclass(frozen=True)
class _Generator:
    """A model with its adapter and folded changes."""

    model: LoraModel
    adapter: Any
    folded: Any

    def answers(self, tokenization: Tokenization, rows: list[Row], longest: int) -> list[str]:
        self.model.use(self.adapter, self.folded)
        return generate_texts(self.model, tokenization, rows, longest)


def _generators(
    learned: TrainedRun, part: AdapterSelection, display: QuietDisplay, *, compare_base: bool
) -> list[_Generator]:
    """Return the trained model, and the base if requested."""
    whole = learned.written_model
    adapter = None if whole is not None and part == AdapterSelection() else learned.adapter(part)
    learned.check_unchanged("model.base", "model.tokenizer")
    display.say(f"asking {learned.source}")
    if whole is None:
        model = build_model(learned.config)
        trained = _Generator(model, adapter, learned.folded or None)
        return [trained, _Generator(model, None, None)] if compare_base else [trained]
    # The model that the run has written is merged and not quantised.
    merged = learned.config.model.model_copy(update={"base": str(whole), "quantize": "none"})
    trained = _Generator(build_model(learned.config.model_copy(update={"model": merged})), None, None)
    return [trained, _Generator(build_model(learned.config), None, None)] if compare_base else [trained]


def _answers(asked: _Asked, prompts: Iterable[Prompt]) -> Iterator[Completion]:
    rest, note = enumerate(prompts, start=1), asked.note
    while some := list(itertools.islice(rest, AT_ONCE)):
        rows = [_row(asked, prompt, f"prompt {number}") for number, prompt in some]
        if note and any(isinstance(prompt, str) for _, prompt in some):
            asked.display.say(note)
            note = None
        with set_up():  # not around the yield, where other code runs
            answers = _generate(asked, rows)
            cut = [_cut(asked, row, number) for row, (number, _) in zip(rows, some, strict=True)]
        for row, texts, tokens in zip(rows, answers, cut, strict=True):
            yield Completion(row.prompt, texts[0], texts[1] if len(texts) > 1 else None, tokens)


def _generate(asked: _Asked, rows: list[Row]) -> list[list[str]]:
    """Return per row the answer of each generator."""
    # Chats have their own end-of-turn token, so chats and plain text are separate batches.
    answers: dict[int, list[str]] = {}
    for chat in (False, True):
        own = [index for index, row in enumerate(rows) if (row.turns is not None) is chat]
        if own:
            among = [rows[index] for index in own]
            columns = [generator.answers(asked.tokenization, among, asked.longest) for generator in asked.generators]
            answers |= {index: [texts[place] for texts in columns] for place, index in enumerate(own)}
    return [answers[index] for index in range(len(rows))]


def _cut(asked: _Asked, row: Row, number: int) -> int:
    """Return the number of cut tokens of a prompt, and report them: an answer to half a question looks like any other."""
    unlimited = replace(asked.tokenization, max_length=sys.maxsize)
    whole, kept = (len(of.prompt_ids(row, asked.longest)) for of in (unlimited, asked.tokenization))
    if kept < whole:
        asked.display.say(
            f"prompt {number}: the first {whole - kept} of its {whole} tokens are cut; with an answer of {asked.longest} they "
            f"are more than data.max_length = {asked.tokenization.max_length}"
        )
    return whole - kept


def _row(asked: _Asked, prompt: Prompt, where: str) -> Row:
    if isinstance(prompt, str):
        if asked.text_field is None:
            return _text_row(Row(prompt, ""), where)
        prompt = _as_fields(asked.text_field, prompt, asked.rendering)
    if not isinstance(prompt, Mapping):
        raise DataError(f"{where}: of type {type(prompt).__name__}; a prompt is text, or a mapping of a row's fields")
    row = asked.rendering.question(prompt, where)
    if not row.prompt and row.turns is None:
        raise DataError(f"{where}: the run has no data.prompt, so that fields make no prompt; give text")
    return _text_row(row, where)


def _text_row(row: Row, where: str) -> Row:
    """Refuse half of a surrogate pair, which JSON can spell and no tokenizer can read."""
    try:
        row.prompt.encode("utf8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: holds {row.prompt[error.start]!a}, half a character; give text in UTF-8") from error
    return row


def read_prompts(path: Path) -> Iterator[Prompt]:
    """Yield the prompts of a JSON Lines file: objects are fields of a row, strings are text; empty lines are skipped.

    Args:
        path: The file; ``.gz`` allowed.

    Raises:
        DataError: The file cannot be read, or a line is neither.
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
    """Parse text as the fields of a row if it is a JSON object.

    Example:
        >>> as_prompt('{"question": "what is 3?"}'), as_prompt("{ is a brace")
        ({'question': 'what is 3?'}, '{ is a brace')

    Raises:
        HetLoraError: It begins as such an object does, and is none.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if re.match(r"\s*\{\s*[\"']", text):
            raise HetLoraError(
                f"the prompt begins as a row does, and is no JSON object ({error}); mend it, or write a text that begins so "
                "as a JSON string into a file for --file"
            ) from error
        return text
    return found if isinstance(found, dict) else text


def describe_generated(answer: Completion) -> str:
    """Format an answer for a person, with the base's answer if there is one."""
    text = _lines(answer.text)
    return text if answer.base is None else f"base:\n{_lines(answer.base, '  ')}\nresult:\n{_lines(answer.text, '  ')}"


def _lines(text: str, before: str = "") -> str:
    """Escape control characters but keep line breaks."""
    return "\n".join(before + printable(line) for line in (text or "(nothing)").split("\n"))
