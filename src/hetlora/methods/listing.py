"""What `hetlora methods` prints: every method's name, one line and reference, read from its factory's docstring."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

__all__ = ["Entry", "catalogue"]


class Entry(NamedTuple):
    """A method as it is listed.

    Attributes:
        name: Its name in a configuration.
        line: What it does.
        reference: Where it is from.
        arguments: Its arguments with their defaults, as they are written.
    """

    name: str
    line: str
    reference: str
    arguments: Mapping[str, Any]


def catalogue(methods: Mapping[str, Callable[..., Any]]) -> list[Entry]:
    """Return an entry for every method.

    Raises:
        ValueError: A factory's docstring has no first line or no section `Reference:`.

    Example:
        >>> from hetlora.methods import METHODS
        >>> [entry.name for entry in catalogue(METHODS)][:2]
        ['hetlora', 'zeropad']
    """
    return [_entry(name, factory) for name, factory in methods.items()]


def _entry(name: str, factory: Callable[..., Any]) -> Entry:
    lines = inspect.getdoc(factory)
    line, _, rest = (lines or "").partition("\n")
    _, found, section = rest.partition("\nReference:\n")
    if not line or not found:
        raise ValueError(f"the docstring of {name} needs a first line and a section 'Reference:'")
    reference = section.split("\n\n")[0]
    arguments = {key: parameter.default for key, parameter in inspect.signature(factory).parameters.items()}
    return Entry(name, line, " ".join(reference.split()), arguments)
