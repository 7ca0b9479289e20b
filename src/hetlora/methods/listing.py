"""What `hetlora methods` prints: every method's name, one line and reference, read from its factory's docstring."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

__all__ = ["MethodInfo", "catalogue", "entry_of"]


class MethodInfo(NamedTuple):
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


def catalogue(methods: Mapping[str, Callable[..., Any]]) -> list[MethodInfo]:
    """Return an entry for every method.

    Raises:
        ValueError: A factory's docstring has no first line or no section `Reference:`.

    Example:
        >>> from hetlora.methods import METHODS
        >>> [entry.name for entry in catalogue(METHODS)][:2]
        ['hetlora', 'zeropad']
    """
    entries = [entry_of(name, factory) for name, factory in methods.items()]
    for entry in entries:
        if not (entry.line and entry.reference):
            raise ValueError(f"the docstring of {entry.name} needs a first line and a section 'Reference:'")
    return entries


def entry_of(name: str, factory: Callable[..., Any]) -> MethodInfo:
    """Return the entry of one method; what its factory's docstring does not say is empty."""
    lines = inspect.getdoc(factory)
    line, _, rest = (lines or "").partition("\n")
    reference = rest.partition("\nReference:\n")[2].split("\n\n")[0]
    arguments = {key: parameter.default for key, parameter in inspect.signature(factory).parameters.items()}
    return MethodInfo(name, line, " ".join(reference.split()), arguments)
