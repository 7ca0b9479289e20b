"""Reads and validates a run; an error lists all problems, each with its key."""

from __future__ import annotations

import contextlib
import copy
import json
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hetlora.config.conflicts import cross_section_problems
from hetlora.config.sections import ONE_RANK, RANK_KINDS, RUN_NAME, TIER_KINDS, RunConfig, keys_called, unknown_key
from hetlora.errors import ConfigError

__all__ = [
    "Changes",
    "key_path",
    "load_config",
    "load_run_config",
    "parse_config",
    "parse_run_config",
    "read_document",
    "read_named",
    "validation_messages",
    "with_changes",
    "with_trackers",
]


_NOT_TOML = (ValueError, RecursionError)
"""Errors of the parser: its own, and Python's for text that is not UTF-8, too long numbers, too deep lists."""


def load_config(path: Path, changes: Sequence[str] = (), track: Sequence[str] = ()) -> RunConfig:
    """Read a run from a TOML file; see `with_changes` and `with_trackers`. Its `[compare]` is ignored.

    Raises:
        ConfigError: Lists every problem.
    """
    document = with_trackers(read_named(path, changes), track)
    document.pop("compare", None)  # hetlora.commands.compare.grid reads it; one file serves a run and its comparison
    return parse_config(document, str(path))


def read_document(path: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Read a TOML file and apply changes, see `with_changes`.

    Raises:
        ConfigError: The file cannot be read, or a change has another form.
    """
    if not path.is_file():
        way = "hetlora examples demo copies one here, and hetlora new writes one for your rows"
        raise ConfigError(str(path), [f"there is no such file; {way}"])
    try:
        document: dict[str, Any] = tomllib.loads(
            path.read_text("utf-8-sig")
        )  # Notepad and PowerShell begin a file with a mark
    except (*_NOT_TOML, OSError) as error:
        from hetlora.data.files import format_of

        rows = f"; if it holds rows: hetlora new mine.toml --data {shlex.quote(str(path))}" if format_of(path) else ""
        raise ConfigError(str(path), [f"not TOML: {error}{rows}"]) from error
    return with_changes(document, changes)


def read_named(path: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Read a TOML file as `read_document` does; a run without a name has that of the file.

    Raises:
        ConfigError: The file cannot be read, or a change has another form.
    """
    document = read_document(path, changes)
    return {"name": path.stem, **document} if RUN_NAME.match(path.stem) else document


Changes = Mapping[str, Any] | Sequence[str] | str
"""Changes of a configuration, see `with_changes`."""


def with_changes(document: Mapping[str, Any], changes: Changes, source: str = "--set") -> dict[str, Any]:
    """Return a run given as plain data with changes applied.

    Args:
        document: The run.
        changes: One or several ``"key.key=value"``, or a mapping ``{"key.key": value}``. ``"key.key="`` and None remove a key.
        source: Where the changes are from, for messages.

    Raises:
        ConfigError: A change has another form.

    Example:
        >>> with_changes({"name": "mine", "seed": 1}, ["federation.rounds=2", "seed="])
        {'name': 'mine', 'federation': {'rounds': 2}}
        >>> with_changes({"name": "mine", "seed": 1}, {"federation.rounds": 2, "seed": None})
        {'name': 'mine', 'federation': {'rounds': 2}}
    """
    result = copy.deepcopy(dict(document))
    if isinstance(changes, Mapping):
        found = [_put(result, str(key), key_path(str(key)), copy.deepcopy(value)) for key, value in changes.items()]
    else:
        found = [_apply(result, change) for change in ([changes] if isinstance(changes, str) else changes)]
    problems = [problem for problem in found if problem is not None]
    if problems:
        raise ConfigError(source, problems)
    return result


def with_trackers(document: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a run given as plain data with these trackers added.

    Example:
        >>> with_trackers({"tracking": {"to": ["tensorboard"]}}, ["trackio"])
        {'tracking': {'to': ['tensorboard', 'trackio']}}
    """
    result = dict(document)
    section = result.get("tracking", {})
    if names and isinstance(section, Mapping) and isinstance(to := section.get("to", []), list):
        result["tracking"] = {**section, "to": [*to, *names]}
    return result


def load_run_config(path: Path) -> RunConfig:
    """Read the configuration that a run has written, `config.json` in its folder.

    Raises:
        ConfigError: It is missing or invalid.
    """
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        problem = f"{error.strerror or error}; give the folder of a run, which is where its records.jsonl is"
        raise ConfigError(str(path), [problem]) from error
    except ValueError as error:
        raise ConfigError(str(path), [f"not JSON: {error}"]) from error
    return parse_run_config(text, str(path))


def parse_run_config(text: str, source: str, admit: Callable[[str], None] | None = None) -> RunConfig:
    """Validate a run that was written as JSON with all its keys.

    Args:
        text: The JSON.
        source: Its origin, for messages.
        admit: As in `hetlora.methods.lookup.find_method`; needed where another machine names the method.

    Raises:
        ConfigError: Lists every problem.
    """
    try:
        document = json.loads(text)
        if (
            isinstance(data := document.get("data") if isinstance(document, dict) else None, dict)
            and "begin" not in data
        ):
            data["begin"] = "always"  # hetlora 0.1.0 before this key began every text with the begin-of-text token
            text = json.dumps(document)
        return RunConfig.model_validate_json(text, context={"admit": admit})
    except ValidationError as error:
        raise ConfigError(source, validation_messages(error)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(source, [f"not JSON: {error}"]) from error


def parse_config(document: Mapping[str, Any], source: str = "the configuration") -> RunConfig:
    """Validate a run given as plain data.

    Raises:
        ConfigError: Lists every problem with its key and the accepted values.

    Example:
        >>> parse_config({"federation": {"rounds": 1, "clients_per_round": 2}, "data": {"target": "{target}"},
        ...               "ranks": {"kind": "same", "rank": 0}, "training": {"steps": 1}})
        Traceback (most recent call last):
        hetlora.errors.ConfigError: the configuration has 1 problem:
          ranks.rank = 0: input should be greater than 0
    """
    if huge := [f"{key}: a whole number of {bits} bits; no key takes one of so many" for key, bits in _huge(document)]:
        raise ConfigError(source, huge)
    between_keys = cross_section_problems(document)
    try:
        config = RunConfig.model_validate(document)
    except ValidationError as error:
        raise ConfigError(source, [*validation_messages(error), *between_keys]) from error
    if between_keys:
        raise ConfigError(source, between_keys)
    return config


MOST_BITS = 1024
"""Largest size of a whole number: it still fits a float, and Python still writes its digits in a message."""


def _huge(document: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the path and the bits of every whole number of more than `MOST_BITS`."""
    waiting: list[tuple[str, Any]] = [("", document)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(f"{path}.{key}".lstrip("."), item) for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{path}.{index}", item) for index, item in enumerate(value)]
        elif isinstance(value, int) and value.bit_length() > MOST_BITS:
            yield path, value.bit_length()


def validation_messages(error: ValidationError, model: type[BaseModel] = RunConfig) -> list[str]:
    """Return one line per problem of data that `model` refused."""
    return [_problem(details, model) for details in error.errors()]


def _problem(details: ErrorDetails, model: type[BaseModel]) -> str:
    """Return a problem as ``key = value: problem and accepted values``."""
    # The path also holds the kind of ranks, which is no key of the file.
    path = [str(part) for index, part in enumerate(details["loc"]) if not (index == 1 and part in RANK_KINDS)]
    key, value = ".".join(path), details["input"]
    if details["type"] == "extra_forbidden":
        if len(path) == 1 and (meant := keys_called(key)):
            return f"{key} is not a key; did you mean {' or '.join(meant)}?"
        return unknown_key(key, _accepted(details["loc"], model), last=path[-1])
    if details["type"] == "missing":
        whole = (
            f", or change the whole section: --set '{ONE_RANK}'" if details["loc"] == ("ranks", "same", "rank") else ""
        )
        return f"{key} is missing; add it{whole}"
    if details["type"] == "value_error":
        message = details["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    message = details["msg"][0].lower() + details["msg"][1:]
    if details["type"].startswith("union_tag"):
        given = value.get("kind") if isinstance(value, Mapping) else None
        state = "is missing" if given is None else f"= {given!r} is not a kind of ranks"
        return f"{key}.kind {state}; use one of {', '.join(RANK_KINDS)}"
    if details["type"] in ("model_type", "model_attributes_type"):
        return f"{key} = {value!r} is a value; make it a section, [{key}]"
    given = f" = {value!r}" if not isinstance(value, (Mapping, list)) else ""
    return f"{key}{given}: {message}"


def _accepted(location: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    """Return the keys of the section of an unknown key."""
    if location[0] == "ranks":
        kind = str(location[1])
        is_tier = kind in TIER_KINDS and location[2] == "tiers" and len(location) > 3
        return list((TIER_KINDS if is_tier else RANK_KINDS)[kind].model_fields)
    section = model
    for part in location[:-1]:
        annotation = section.model_fields[str(part)].annotation
        # An optional section is a union of its model and None.
        inner = next(iter(get_args(annotation)), annotation)
        assert isinstance(inner, type) and issubclass(inner, BaseModel)  # noqa: PT018
        section = inner
    return list(section.model_fields)


def _apply(document: dict[str, Any], change: str) -> str | None:
    """Apply one ``key.key=value`` or ``key.key=`` to the document; return the problem, if there is one."""
    key, equals, text = change.partition("=")
    path = key_path(key)
    if not equals or path is None:
        return f"{change!r} is not of the form key.key=value"
    value: Any = text if text.strip() else None  # a bare word is a string: --set model.base=nano
    with contextlib.suppress(*_NOT_TOML):
        parsed = tomllib.loads(f"value = {text}")
        if parsed.keys() != {"value"}:
            return f"{change!r} holds more than one value; give each key a --set of its own"
        value = parsed["value"]
    return _put(document, change, path, value)


def _put(document: dict[str, Any], change: str, path: Sequence[str] | None, value: Any) -> str | None:
    """Set a key of the document, or remove it if the value is None; return the problem, if there is one."""
    if not path:
        return f"{change!r} is no key; write it as key.key"
    *sections, last = path
    table = document
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            return f"{change!r}: {section} is a value, not a section"
    if value is not None:
        table[last] = value
    elif last in table:
        del table[last]
    else:
        return _unknown(path)
    return None


def _unknown(path: Sequence[str]) -> str | None:
    """Return what is wrong with the name of a key that is to be taken away and not there; None for one that could be."""
    fields = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    if path[0] not in fields:
        return None if path[0] == "compare" else unknown_key(".".join(path), fields, path[0])
    section = fields[path[0]]
    if len(path) == 2 and isinstance(section, type) and issubclass(section, BaseModel) and path[0] != "method":
        return None if path[1] in section.model_fields else unknown_key(".".join(path), section.model_fields, path[1])
    return None


def key_path(key: str) -> list[str] | None:
    """Return the parts of a dotted TOML key (``ranks.of."a.b"`` has three), or None where it is none."""
    try:
        node: Any = tomllib.loads(f"{key} = 0")
    except _NOT_TOML:
        return None
    path: list[str] = []
    while isinstance(node, dict):
        if len(node) != 1:
            return None
        [(name, node)] = node.items()
        path.append(name)
    return path
