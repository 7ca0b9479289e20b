"""What `hetlora methods` prints: every method's name, the first line of its factory's docstring, reference and arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hetlora.core.method import Method

__all__ = ["GROUPS", "MethodInfo", "first_line", "list_methods"]

GROUPS: Mapping[str, tuple[str, ...]] = {
    "To begin with; fedavg with ranks.kind = 'same' is HomLoRA, one rank for all": (
        "hetlora", "zeropad", "flexlora", "flora", "ffa_lora", "fedavg",
    ),
    "Others that average factors slot by slot": ("replication", "rbla", "carryover", "steady"),
    "Others that average products": ("recon_svd", "principal", "fedex_lora"),
    "Others that freeze or keep a factor, or take one rank": ("rolora", "fedsa_lora", "fedit"),
    "References": ("full", "central", "local", "zeroshot"),
}  # fmt: skip
"""Methods by what they do, those that most comparisons have first."""


class MethodInfo(NamedTuple):
    """A method as it is listed.

    Attributes:
        name: Its name in a configuration.
        line: What it does.
        reference: See `Method.reference`.
        arguments: Its arguments with their defaults.
    """

    name: str
    line: str
    reference: str
    arguments: Mapping[str, Any]


def list_methods(methods: Mapping[str, Callable[..., Method[Any]]]) -> list[MethodInfo]:
    """Return an entry per method, with the defaults of its arguments.

    Example:
        >>> from hetlora.methods import METHODS
        >>> [entry.name for entry in list_methods(METHODS)][:2]
        ['hetlora', 'zeropad']
    """
    return [
        MethodInfo(
            name,
            first_line(factory),
            factory().reference,
            {key: parameter.default for key, parameter in inspect.signature(factory).parameters.items()},
        )
        for name, factory in methods.items()
    ]


def first_line(factory: Callable[..., Any]) -> str:
    """Return the first line of a factory's docstring; empty if it has none."""
    return (inspect.getdoc(factory) or "").partition("\n")[0]
