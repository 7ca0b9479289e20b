"""A configuration as the TOML file that a run is begun from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["toml_text"]


def toml_text(config: Mapping[str, Any]) -> str:
    """Return a configuration as TOML; what is None is left out, for TOML has no such value.

    Example:
        >>> print(toml_text({"seed": 1, "model": {"base": "nano", "tokenizer": None}, "ranks": {"of": {"a b": 2}}}), end="")
        seed = 1
        <BLANKLINE>
        [model]
        base = "nano"
        <BLANKLINE>
        [ranks]
        of = { "a b" = 2 }
    """
    own = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    sections = {key: value for key, value in config.items() if isinstance(value, Mapping)}
    parts = [_lines(own), *(f"[{_key(name)}]\n{_lines(section)}" for name, section in sections.items())]
    return "\n".join(part for part in parts if part)


def _lines(section: Mapping[str, Any]) -> str:
    return "".join(f"{_key(key)} = {_value(value)}\n" for key, value in section.items() if value is not None)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _text(name)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items() if item is not None)
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list):
        return f"[{', '.join(_value(item) for item in value if item is not None)}]"
    return json.dumps(value)


def _text(text: str) -> str:
    # TOML's strings are JSON's but for halves of characters, which it has none of, and DEL.
    whole = text.encode("utf8", "replace").decode("utf8")
    return json.dumps(whole, ensure_ascii=False).replace("\x7f", "\\u007f")
