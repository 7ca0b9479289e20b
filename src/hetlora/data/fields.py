"""Text with the fields of a record in braces: what `data.prompt`, `data.target` and `data.system` hold."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hetlora.errors import DataError, printable

__all__ = ["Fields", "available", "field_names", "fill"]

Fields = Mapping[str, object]

_MARKS = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_LITERAL = "write literal braces as {{ }}"


class _Field(NamedTuple):
    name: str


class _Section(NamedTuple):
    name: str
    parts: tuple[_Part, ...]


_Part = str | _Field | _Section


def field_names(template: str) -> set[str]:
    """Return the names of all fields of a template.

    Raises:
        DataError: It cannot be read as a template.

    Example:
        >>> sorted(field_names("{instruction}{?input}: {input}{/input}"))
        ['input', 'instruction']
    """
    return set(_names(_parsed(template)))


def fill(templates: Sequence[str], fields: Fields, where: str, keys: str) -> list[str]:
    """Return the templates with the values of one record.

    ``{name}`` is the value of a field: of that very name, or nested by dots. What stands between ``{?name}`` and ``{/name}``
    is there only where the field is there and not blank. Numbers are as they are written in the file,
    and truth values ``true`` and ``false``.

    Args:
        templates: The templates.
        fields: The record.
        where: Its place, for messages.
        keys: The keys of the configuration that hold the templates, for messages.

    Raises:
        DataError: A field is missing, or is neither text nor a finite number; names the place and the fields there are.

    Example:
        >>> alpaca = "{instruction}{?input}: {input}{/input}"
        >>> fill([alpaca, "{meta.id}"], {"instruction": "Add", "input": " ", "meta": {"id": 7}}, "line 1", "data.prompt")
        ['Add', '7']
    """
    try:
        return ["".join(_texts(_parsed(template), fields)) for template in templates]
    except _UnusableFieldError as error:
        if (bare := re.split("[:!]", error.name)[0]) != error.name and bare in fields:
            raise DataError(
                f"{where}: a template takes no format, as in {{{error.name}}}; give {{{bare}}} alone, or {_LITERAL}, in {keys}"
            ) from None
        raise DataError(
            f"{where}: field {error.name!r} {error.state}; the row has {available(fields)}. Mend the row, or change {keys}"
        ) from None


def available(fields: Fields) -> str:
    """Return the names of a record's fields, for messages."""
    return ", ".join(map(printable, sorted(fields))) or "no fields"


class _UnusableFieldError(Exception):
    def __init__(self, name: str, state: str) -> None:
        super().__init__(name, state)
        self.name, self.state = name, state


_MISSING = object()


def _find(fields: Fields, name: str) -> object:
    if name in fields:
        return fields[name]
    value: object = fields
    for part in name.split("."):
        if value == "":  # a struct of a columnar file that is null
            return ""
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _texts(parts: Sequence[_Part], fields: Fields) -> list[str]:
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, _Field):
            texts.append(_text(part.name, _find(fields, part.name)))
        elif (
            (value := _find(fields, part.name)) is not _MISSING
            and value is not None
            and _text(part.name, value).strip()
        ):
            texts += _texts(part.parts, fields)
    return texts


def _text(name: str, value: object) -> str:
    if value is _MISSING:
        raise _UnusableFieldError(name, "is missing")
    if isinstance(value, float) and not math.isfinite(value):
        raise _UnusableFieldError(name, f"is not text but {value}")
    if not isinstance(value, (str, int, float)):
        raise _UnusableFieldError(name, "is null" if value is None else "is not text")
    return str(value).lower() if isinstance(value, bool) else str(value)


def _names(parts: Sequence[_Part]) -> list[str]:
    names = []
    for part in parts:
        if not isinstance(part, str):
            names += [part.name, *(_names(part.parts) if isinstance(part, _Section) else ())]
    return names


@functools.lru_cache(maxsize=256)
def _parsed(template: str) -> tuple[_Part, ...]:
    open_parts: list[tuple[str, list[_Part]]] = [("", [])]
    end = 0
    for mark in _MARKS.finditer(template):
        open_parts[-1][1].append(template[end : mark.start()])
        end = mark.end()
        _take(template, mark, open_parts)
    open_parts[-1][1].append(template[end:])
    if len(open_parts) > 1:
        name = open_parts[-1][0]
        raise DataError(f"template {template!r}: {{?{name}}} has no end; add {{/{name}}} after the part, or {_LITERAL}")
    return tuple(part for part in open_parts[0][1] if part)


def _take(template: str, mark: re.Match[str], open_parts: list[tuple[str, list[_Part]]]) -> None:
    """Add one mark of a template to the innermost open part; a section's begin opens one, its end closes it."""
    text, name = mark.group(), mark.group(1)
    if text in ("{{", "}}"):
        open_parts[-1][1].append(text[0])
    elif name is None:
        raise DataError(f"template {template!r}: a single {text}; a field takes no format, and {_LITERAL}")
    elif not name.lstrip("?/"):
        raise DataError(f"template {template!r}: {text} names no field; {_LITERAL}")
    elif name.startswith("?"):
        open_parts.append((name[1:], []))
    elif not name.startswith("/"):
        open_parts[-1][1].append(_Field(name))
    elif name[1:] != open_parts[-1][0]:
        raise DataError(
            f"template {template!r}: {text} ends no part that is open; begin it with {{?{name[1:]}}}, or {_LITERAL}"
        )
    else:
        closed, parts = open_parts.pop()
        open_parts[-1][1].append(_Section(closed, tuple(part for part in parts if part)))
