"""Former names, which work for one release with a warning that states the new name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["former_names"]


def former_names(module: str, **names: Any) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module with former names.

    Args:
        module: The name of the module.
        **names: Former name to the object that it stands for.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        now = names[name]
        warnings.warn(f"{module}.{name} is now {now.__module__}.{now.__name__}", DeprecationWarning, stacklevel=2)
        return now

    return find
