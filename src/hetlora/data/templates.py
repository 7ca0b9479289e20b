"""What a record of data says: its fields, through a template, as the rows a model learns from."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from hetlora.errors import DataError, printable

__all__ = ["ChatTemplate", "Conversation", "Fields", "Message", "Record", "Row", "RowTemplate", "Template"]

Fields = Mapping[str, object]
ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """One turn of a conversation; the role is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True, order=True, slots=True)
class Row:
    """One example as text: the prompt is not scored, the target is. Rows are equal by their text, wherever they stand.

    Attributes:
        prompt: What the model sees first.
        target: What it is to say.
        turns: For a chat, what comes before the target as turns, which the tokenizer's chat template renders; `prompt` is
            then the same for people to read. None where prompt and target are the text itself.
        where: The place of its record, for messages, and to keep a record's rows together; empty where it has none.
    """

    prompt: str
    target: str
    turns: tuple[Message, ...] | None = None
    where: str = field(default="", compare=False, repr=False)


class Record(NamedTuple):
    """One record of a data set: its place for messages, its fields, and the rows it makes."""

    where: str
    fields: Fields
    rows: tuple[Row, ...]


class RowTemplate(Protocol):
    """How a record's fields become rows: `Template`, `ChatTemplate` or `Conversation`."""

    def rows(self, fields: Fields, where: str) -> tuple[Row, ...]:
        """Return one row or more."""
        ...

    def question(self, fields: Fields, where: str) -> Row:
        """Return a row without a target, to be answered: the fields of the prompt alone are needed."""
        ...


@dataclass(frozen=True)
class Template:
    """How the fields of a record become a prompt and a target.

    Args:
        prompt: Text with fields in braces, ``"{instruction}"``; empty where every token is scored.
        target: The same for what the model is to say.

    Raises:
        DataError: A brace holds anything but a plain field name.

    Example:
        >>> Template("Q: {q} A:", " {a}").row({"q": "1 + 1?", "a": "2"}, where="line 1")
        Row(prompt='Q: 1 + 1? A:', target=' 2', turns=None)
    """

    prompt: str
    target: str

    def __post_init__(self) -> None:
        _check_names(self.prompt, self.target)

    def row(self, fields: Fields, where: str) -> Row:
        """Fill the template with one record.

        Raises:
            DataError: The record lacks a field; names the place and the fields it has.
        """
        prompt, target = _fill([self.prompt, self.target], fields, where, "data.prompt / data.target")
        return Row(prompt, target, where=where)

    def rows(self, fields: Fields, where: str) -> tuple[Row, ...]:
        """Return the one row of a record."""
        return (self.row(fields, where),)

    def question(self, fields: Fields, where: str) -> Row:
        """Return the prompt of a record as a row.

        Example:
            >>> Template("Q: {q} A:", " {a}").question({"q": "1 + 1?"}, where="line 1").prompt
            'Q: 1 + 1? A:'
        """
        [prompt] = _fill([self.prompt], fields, where, "data.prompt")
        return Row(prompt, "", where=where)


@dataclass(frozen=True)
class ChatTemplate:
    """A prompt as the user's turn and a target as the assistant's, for the tokenizer's chat template.

    Args:
        prompt: Text with fields in braces: what the user says.
        target: The same for the assistant's answer.
        system: The same for a system turn at the beginning; none where it is empty.

    Example:
        >>> ChatTemplate("{q}", "{a}", "Be brief.").rows({"q": "1 + 1?", "a": "2"}, where="line 1")[0].turns
        (Message(role='system', content='Be brief.'), Message(role='user', content='1 + 1?'))
    """

    prompt: str
    target: str
    system: str = ""

    def __post_init__(self) -> None:
        _check_names(self.prompt, self.target, self.system)

    def rows(self, fields: Fields, where: str) -> tuple[Row, ...]:
        """Return the one row of a record."""
        keys = "data.prompt / data.target / data.system"
        prompt, target, system = _fill([self.prompt, self.target, self.system], fields, where, keys)
        return (Row(prompt, target, (*_system(system), Message("user", prompt)), where),)

    def question(self, fields: Fields, where: str) -> Row:
        """Return the user's turn of a record as a row."""
        prompt, system = _fill([self.prompt, self.system], fields, where, "data.prompt / data.system")
        return Row(prompt, "", (*_system(system), Message("user", prompt)), where)


@dataclass(frozen=True)
class Conversation:
    """A field that holds a list of ``{"role": …, "content": …}`` turns: one row for every turn of the assistant.

    The turns before it are its prompt, so every answer is scored once and nothing else is.

    Args:
        field: Name of the field.
        system: Template of a system turn for conversations that have none.

    Example:
        >>> turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
        >>> Conversation("messages").rows({"messages": turns}, where="line 1")
        (Row(prompt='user: 1 + 1?', target='2', turns=(Message(role='user', content='1 + 1?'),)),)
    """

    field: str
    system: str = ""

    def __post_init__(self) -> None:
        _check_names(self.system)

    def rows(self, fields: Fields, where: str) -> tuple[Row, ...]:
        """Return a row for every turn of the assistant.

        A row has no target, to be dropped and counted, where the assistant's turn answers nothing as the very first, or
        where a conversation has none.

        Raises:
            DataError: The field is missing or is no such list.
        """
        turns = self._turns(fields, where)
        rows = tuple(
            Row(_readable(turns[:index]), turn.content if index else "", turns[:index] if index else turns, where)
            for index, turn in enumerate(turns)
            if turn.role == "assistant"
        )
        return rows or (Row(_readable(turns), "", turns, where),)

    def question(self, fields: Fields, where: str) -> Row:
        """Return a conversation as a row: all of it, but for a last turn of the assistant, which is what is asked for."""
        turns = self._turns(fields, where)
        if turns and turns[-1].role == "assistant":
            turns = turns[:-1]
        return Row(_readable(turns), "", turns, where)

    def _turns(self, fields: Fields, where: str) -> tuple[Message, ...]:
        turns = _turns(fields, self.field, where)
        if turns and turns[0].role == "system":
            return turns
        return (*_system(*_fill([self.system], fields, where, "data.system")), *turns)


def _readable(turns: Sequence[Message]) -> str:
    return "\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def _system(text: str) -> tuple[Message, ...]:
    return (Message("system", text),) if text else ()


def _turns(fields: Fields, name: str, where: str) -> tuple[Message, ...]:
    given = fields.get(name)
    if isinstance(given, Mapping) and given.keys() >= {"role", "content"}:  # a list of objects, stored by column
        given = _from_columns(given["role"], given["content"])
    if not isinstance(given, Sequence) or isinstance(given, str):
        state = "is no list of turns, nor two lists role and content of one length" if name in fields else "is missing"
        raise DataError(f"{where}: field {name!r} {state}; the row has {_have(fields)}. Set data.messages")
    turns = []
    for number, turn in enumerate(given, start=1):
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            wanted = f"an object with a role ({', '.join(ROLES)}) and a text content"
            raise DataError(f"{where}: turn {number} of field {name!r} is not {wanted}; mend the row")
        turns.append(Message(role, content))
    return tuple(turns)


def _from_columns(roles: object, contents: object) -> list[dict[str, object]] | None:
    if not (isinstance(roles, (list, tuple)) and isinstance(contents, (list, tuple)) and len(roles) == len(contents)):
        return None
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def _check_names(*templates: str) -> None:
    for text in templates:
        for name in _fields(text):
            if not name.isidentifier():
                raise DataError(f"template {text!r}: {{{name}}} is not a field name; write literal braces as {{{{ }}}}")


def _fill(templates: Sequence[str], fields: Fields, where: str, keys: str) -> list[str]:
    for name in dict.fromkeys(name for template in templates for name in _fields(template)):
        if not isinstance(fields.get(name), (str, int, float)):
            state = "is not text" if name in fields else "is missing"
            raise DataError(
                f"{where}: field {name!r} {state}; the row has {_have(fields)}. Mend the row, or change {keys}"
            )
    return [template.format_map(fields) for template in templates]


def _have(fields: Fields) -> str:
    return ", ".join(map(printable, sorted(fields))) or "no fields"


def _fields(template: str) -> list[str]:
    literal = "write literal braces as {{ }}"
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise DataError(f"template {template!r}: {error}; {literal}") from error
    for name, form, conversion in parts:
        if form or conversion:
            raise DataError(
                f"template {template!r}: {{{name}}} takes no format; give the field's name alone, or {literal}"
            )
    return [str(name) for name, _, _ in parts]
