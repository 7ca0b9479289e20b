"""The federated methods, one small file each. `METHODS` maps a name to the factory that makes the method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hetlora.federated import Method
from hetlora.methods.fedavg import fedavg
from hetlora.methods.hetlora import hetlora
from hetlora.methods.rbla import rbla
from hetlora.methods.zeropad import zeropad

__all__ = ["METHODS", "fedavg", "hetlora", "rbla", "zeropad"]

METHODS: Mapping[str, Callable[..., Method[Any]]] = {
    "fedavg": fedavg,
    "hetlora": hetlora,
    "rbla": rbla,
    "zeropad": zeropad,
}
"""Name to factory; a factory's keyword arguments are the method's hyperparameters."""
