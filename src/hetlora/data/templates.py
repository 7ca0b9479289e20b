"""The fields of a record, through a template, as the rows that a model learns from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from hetlora.data.conversations import Message, fold_system, read_tools, read_turns, readable
from hetlora.data.fields import Fields, field_names, fill
from hetlora.errors import DataError

__all__ = ["ChatTemplate", "Conversation", "Fields", "Message", "Record", "Row", "RowTemplate", "Template"]


@dataclass(frozen=True, order=True, slots=True)
class Row:
    """One example as text: the prompt is not scored, the target is. Rows are equal by their text, wherever they stand.

    Attributes:
        prompt: What the model sees first.
        target: The text it is to generate.
        turns: For a chat, the turns before the target, which the tokenizer's chat template renders; `prompt` is then the same
            for people to read. None where prompt and target are the text itself.
        answer: Other keys of the target's turn as JSON, such as its tool calls; empty without any.
        tools: The tools of a conversation as JSON; empty without any.
        where: The place of its record, for messages, and to keep a record's rows together; empty where it has none.
    """

    prompt: str
    target: str
    turns: tuple[Message, ...] | None = None
    answer: str = field(default="", repr=False)
    tools: str = field(default="", repr=False)
    where: str = field(default="", compare=False, repr=False)

    @property
    def blank(self) -> bool:
        """Return whether there is nothing to score."""
        return not self.target.strip() and not self.answer


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
        prompt: Text with fields in braces, see `hetlora.data.fields.fill`; empty where every token is scored.
        target: The same for the text to generate.

    Raises:
        DataError: It cannot be read as a template.

    Example:
        >>> Template("Q: {q} A:", " {a}").row({"q": "1 + 1?", "a": "2"}, where="line 1")
        Row(prompt='Q: 1 + 1? A:', target=' 2', turns=None)
    """

    prompt: str
    target: str

    def __post_init__(self) -> None:
        _check(self.prompt, self.target)

    def row(self, fields: Fields, where: str) -> Row:
        """Fill the template with one record.

        Raises:
            DataError: The record lacks a field; names the place and the fields it has.
        """
        prompt, target = fill([self.prompt, self.target], fields, where, "data.prompt / data.target")
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
        [prompt] = fill([self.prompt], fields, where, "data.prompt")
        return Row(prompt, "", where=where)


@dataclass(frozen=True)
class ChatTemplate:
    """A prompt as the user's turn and a target as the assistant's, for the tokenizer's chat template.

    Args:
        prompt: Text with fields in braces: the user's turn.
        target: The same for the assistant's answer.
        system: The same for a system turn at the beginning; none where it is empty.
        fold: Put the system turn's text at the beginning of the user's turn, for chat templates without that role.

    Example:
        >>> row = ChatTemplate("{q}", "{a}", "Be brief.").rows({"q": "1 + 1?", "a": "2"}, where="line 1")[0]
        >>> [(turn.role, turn.content) for turn in row.turns]
        [('system', 'Be brief.'), ('user', '1 + 1?')]
    """

    prompt: str
    target: str
    system: str = ""
    fold: bool = False

    def __post_init__(self) -> None:
        _check(self.prompt, self.target, self.system)

    def rows(self, fields: Fields, where: str) -> tuple[Row, ...]:
        """Return the one row of a record."""
        keys = "data.prompt / data.target / data.system"
        prompt, target, system = fill([self.prompt, self.target, self.system], fields, where, keys)
        return (self._row(prompt, system, target, where),)

    def question(self, fields: Fields, where: str) -> Row:
        """Return the user's turn of a record as a row."""
        prompt, system = fill([self.prompt, self.system], fields, where, "data.prompt / data.system")
        return self._row(prompt, system, "", where)

    def _row(self, prompt: str, system: str, target: str, where: str) -> Row:
        turns = (*_system(system), Message("user", prompt))
        return Row(prompt, target, fold_system(turns, where) if self.fold else turns, where=where)


@dataclass(frozen=True)
class Conversation:
    """A field that holds a list of turns: one row for every turn of the assistant that is scored.

    The turns before it are its prompt, so every answer is scored once and nothing else is.

    Args:
        field: Name of the field; see `hetlora.data.conversations.read_turns` for its forms.
        system: Template of a system turn for conversations that have none.
        scored: "all" answers, or only the "last" one. A turn whose `weight` or `train` says so is never scored.
        fold: Put the system turn's text at the beginning of the first user turn.

    Example:
        >>> turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
        >>> [(row.prompt, row.target) for row in Conversation("messages").rows({"messages": turns}, where="line 1")]
        [('user: 1 + 1?', '2')]
    """

    field: str
    system: str = ""
    scored: str = "all"
    fold: bool = False

    def __post_init__(self) -> None:
        _check(self.system)

    def rows(self, fields: Fields, where: str) -> tuple[Row, ...]:
        """Return a row for every scored turn of the assistant.

        A row has no target, to be dropped and counted, where the assistant's turn answers nothing as the very first, or
        where a conversation has none that is scored.

        Raises:
            DataError: The field is missing or is no such list.
        """
        turns, tools = self._turns(fields, where), read_tools(fields, where)
        answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        if self.scored == "last":
            answers = answers[-1:]
        rows = tuple(
            Row(readable(turns[:index]), turns[index].content, turns[:index], turns[index].extra, tools, where)
            if index
            else Row("", "", turns, "", tools, where)
            for index in answers
            if turns[index].scored
        )
        return rows or (Row(readable(turns), "", turns, "", tools, where),)

    def question(self, fields: Fields, where: str) -> Row:
        """Return a conversation as a row: all of it, but for a last turn of the assistant, which is what is asked for."""
        turns = self._turns(fields, where)
        if turns and turns[-1].role == "assistant":
            turns = turns[:-1]
        return Row(readable(turns), "", turns, "", read_tools(fields, where), where)

    def _turns(self, fields: Fields, where: str) -> tuple[Message, ...]:
        turns = read_turns(fields, self.field, where)
        if fields.get("system") and "system" not in field_names(self.system):
            way_out = "set data.system = '{?system}{system}{/system}', or take the field out"
            raise DataError(f"{where}: the field 'system' of the row is read by nobody; {way_out}")
        if not turns or turns[0].role not in ("system", "developer"):
            turns = (*_system(*fill([self.system], fields, where, "data.system")), *turns)
        return fold_system(turns, where) if self.fold else turns


def _system(text: str) -> tuple[Message, ...]:
    return (Message("system", text),) if text else ()


def _check(*templates: str) -> None:
    for template in templates:
        field_names(template)
