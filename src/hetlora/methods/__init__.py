"""The federated methods, one small file each. `METHODS` maps a name to the factory that makes the method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hetlora.federated import Method
from hetlora.methods.fedavg import fedavg
from hetlora.methods.hetlora import hetlora

__all__ = ["METHODS", "fedavg", "hetlora"]

METHODS: Mapping[str, Callable[..., Method[Any]]] = {
    "fedavg": fedavg,
    "hetlora": hetlora,
}
"""Name to factory; a factory's keyword arguments are the method's hyperparameters."""
