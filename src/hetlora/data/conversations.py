"""The turns of a conversation, as a record holds them: every key of a turn is read, or refused by its name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hetlora.data.fields import Fields, available
from hetlora.errors import DataError, printable

__all__ = ["Message", "fold_system", "read_tools", "read_turns", "readable"]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "observation": "tool"}
"""Roles of ShareGPT by other names."""
EXTRA = ("tool_calls", "reasoning_content", "name", "tool_call_id")
"""Keys of a turn that are handed to the chat template as they are."""


class Message(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: One of `ROLES`.
        content: Its text.
        extra: Its keys of `EXTRA` as a JSON object; empty without any.
        scored: Whether an answer is trained; False where its `weight` or `train` says so.
    """

    role: str
    content: str
    extra: str = ""
    scored: bool = True

    def for_template(self) -> dict[str, Any]:
        """Return the turn as chat templates take it."""
        return {"role": self.role, "content": self.content, **(json.loads(self.extra) if self.extra else {})}


def readable(turns: Sequence[Message]) -> str:
    r"""Return a conversation for people to read.

    Example:
        >>> readable([Message("user", "1 + 1?"), Message("assistant", "2")])
        'user: 1 + 1?\nassistant: 2'
    """
    return "\n".join(f"{turn.role}: {turn.content}{turn.extra}" for turn in turns)


def read_turns(fields: Fields, name: str, where: str) -> tuple[Message, ...]:
    """Return the turns in a field of a record.

    A turn is ``{"role": …, "content": …}``, or ShareGPT's ``{"from": …, "value": …}``; the content is text, or a list of parts
    of text. `weight` and `train` say whether an answer is scored; `tool_calls`, `reasoning_content`, `name` and `tool_call_id`
    go to the chat template. A key that is null counts as absent. A list of objects may be stored by column.

    Raises:
        DataError: The field is missing or is no such list, or a turn has a key that nothing reads; names the turn and the key.

    Example:
        >>> read_turns({"m": [{"from": "human", "value": "Hi"}]}, "m", "line 1")[0][:2]
        ('user', 'Hi')
    """
    given = fields.get(name)
    if isinstance(given, Mapping):
        given = _from_columns(given)
    if not isinstance(given, Sequence) or isinstance(given, str):
        state = "is no list of turns, nor lists of one length by column" if name in fields else "is missing"
        raise DataError(f"{where}: field {name!r} {state}; the row has {available(fields)}. Set data.messages")
    return tuple(_turn(turn, f"{where}: turn {number} of field {name!r}") for number, turn in enumerate(given, start=1))


def read_tools(fields: Fields, where: str) -> str:
    """Return the field `tools` of a record as JSON: a list of objects, or the JSON text of one; empty without any.

    Raises:
        DataError: It is neither.
    """
    given = fields.get("tools")
    if not given:
        return ""
    try:
        tools = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        tools = None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{where}: field 'tools' is no list of objects; mend the row, or give the field another name")
    return _json(list(tools), f"{where}: field 'tools'") if tools else ""


def fold_system(turns: Sequence[Message], where: str) -> tuple[Message, ...]:
    r"""Return the conversation with its system turn at the beginning of the user turn that follows, after a blank line.

    Raises:
        DataError: No user turn follows.

    Example:
        >>> fold_system([Message("system", "Be brief."), Message("user", "1 + 1?")], "line 1")[0].content
        'Be brief.\n\n1 + 1?'
    """
    if not turns or turns[0].role not in ("system", "developer"):
        return tuple(turns)
    if len(turns) < 2 or turns[1].role != "user":
        raise DataError(
            f"{where}: data.fold_system needs a user's turn after the system's; mend the row, or take the key away"
        )
    system, user, *rest = turns
    return (user._replace(content=f"{system.content}\n\n{user.content}"), *rest)


def _from_columns(columns: Mapping[str, object]) -> list[dict[str, object]] | None:
    lists = [values for values in columns.values() if isinstance(values, (list, tuple))]
    if not lists or len(lists) < len(columns) or len(set(map(len, lists))) > 1:
        return None
    return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]


def _turn(given: object, where: str) -> Message:
    if not isinstance(given, Mapping):
        raise DataError(f"{where} is a {type(given).__name__}, not an object; mend the row")
    turn = {key: value for key, value in given.items() if value is not None}
    role = _role(turn, where)
    content = turn.pop("content" if "content" in turn else "value", None)
    scored = _scored(turn, role, where)
    extra = {key: turn.pop(key) for key in EXTRA if turn.get(key)}
    left = [key for key in turn if key not in EXTRA]  # a key of EXTRA that is left is empty, and says nothing
    if left:
        raise DataError(
            f"{where} has the key {printable(str(left[0]))}, which nothing here reads; take it out of the rows"
        )
    return Message(role, _content(content, extra, where), _json(extra, where) if extra else "", scored)


def _role(turn: dict[str, Any], where: str) -> str:
    given = turn.pop("role", None) or turn.pop("from", None)
    role = SHAREGPT.get(given, given) if isinstance(given, str) else None
    if role not in ROLES:
        known = ", ".join((*ROLES, *SHAREGPT))
        raise DataError(
            f"{where} has the role {printable(str(given))}, and not one of {known}; mend the row or leave it out"
        )
    return str(role)


def _scored(turn: dict[str, Any], role: str, where: str) -> bool:
    marks = {key: turn.pop(key) for key in ("weight", "train") if key in turn}
    for key, value in marks.items():
        if value not in (0, 1):
            raise DataError(f"{where}: {key} = {printable(str(value))}; a turn is scored (1, true) or not (0, false)")
        if value and role != "assistant":
            raise DataError(f"{where}: {key} = {value} of the role {role}; only answers are scored, take the key out")
    return all(marks.values())


def _content(given: object, extra: Mapping[str, object], where: str) -> str:
    if given is None and "tool_calls" in extra:
        return ""
    if isinstance(given, str):
        return given
    if not isinstance(given, Sequence):
        raise DataError(f"{where} has no text content; mend the row or leave it out")
    texts = []
    for part in given:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise DataError(f"{where} has a part of type {printable(str(kind))}; only parts of text can be trained on")
        texts.append(text)
    return "".join(texts)


def _json(value: object, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {error}; mend the row") from error
