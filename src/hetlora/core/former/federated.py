"""`hetlora.federated` until 0.2: its names are now in `hetlora.core.types`, `hetlora.core.method` and `hetlora.core.round`."""

from __future__ import annotations

import warnings

from hetlora.core import method, types
from hetlora.core import round as rounds

__all__ = ["MOVED"]

FORMER = {
    types: ("Client", "ClientFailure", "ClientUpdate", "ServerState", "TrainTask"),
    method: ("Engine", "Method", "Penalty", "example_weight", "keep_rank", "no_penalty", "truncate_to_rank"),
    rounds: ("ClientReport", "RoundReport", "local_round", "run_round"),
}  # fmt: skip
RENAMED = {
    "Bounded": (method, "RobustResult"),
    "Counted": (method, "WeightedUpdate"),
    "Fit": (method, "LocalTrainer"),
    "Folded": (types, "BaseDelta"),
    "Robust": (method, "RobustAggregation"),
    "run": (rounds, "run_rounds"),
}
MOVED = {name: (module, name) for module, names in FORMER.items() for name in names} | RENAMED


def __getattr__(name: str) -> object:
    if name not in MOVED:
        raise AttributeError(f"module 'hetlora.federated' has no attribute {name!r}")
    module, now = MOVED[name]
    warnings.warn(f"hetlora.federated.{name} is now {module.__name__}.{now}", DeprecationWarning, stacklevel=2)
    return getattr(module, now)
