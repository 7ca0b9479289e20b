"""The federated methods, one small file each, and their table `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hetlora.core.method import Method
from hetlora.methods.alone import central, local, zeroshot
from hetlora.methods.carryover import carryover
from hetlora.methods.fedavg import fedavg, fedit
from hetlora.methods.fedex_lora import fedex_lora
from hetlora.methods.fedopt import fedopt
from hetlora.methods.fedprox import fedprox
from hetlora.methods.fedsa_lora import fedsa_lora
from hetlora.methods.ffa_lora import ffa_lora
from hetlora.methods.flexlora import flexlora, recon_svd
from hetlora.methods.flora import flora
from hetlora.methods.full import full
from hetlora.methods.hetlora import hetlora
from hetlora.methods.principal import principal
from hetlora.methods.rbla import rbla
from hetlora.methods.replication import replication
from hetlora.methods.rolora import rolora
from hetlora.methods.steady import averaged, steady
from hetlora.methods.zeropad import zeropad

__all__ = [
    "METHODS",
    "averaged",
    "carryover",
    "central",
    "fedavg",
    "fedex_lora",
    "fedit",
    "fedopt",
    "fedprox",
    "fedsa_lora",
    "ffa_lora",
    "flexlora",
    "flora",
    "full",
    "hetlora",
    "local",
    "principal",
    "rbla",
    "recon_svd",
    "replication",
    "rolora",
    "steady",
    "zeropad",
    "zeroshot",
]

METHODS: dict[str, Callable[..., Method[Any]]] = {
    "hetlora": hetlora,
    "zeropad": zeropad,
    "replication": replication,
    "rbla": rbla,
    "carryover": carryover,
    "principal": principal,
    "steady": steady,
    "flexlora": flexlora,
    "recon_svd": recon_svd,
    "flora": flora,
    "fedex_lora": fedex_lora,
    "ffa_lora": ffa_lora,
    "rolora": rolora,
    "fedsa_lora": fedsa_lora,
    "fedavg": fedavg,
    "fedit": fedit,
    "full": full,
    "central": central,
    "local": local,
    "zeroshot": zeroshot,
}
"""Name to factory; a factory's keyword arguments are the method's hyperparameters.

A configuration may also name a factory of another package: `hetlora.methods.lookup.find_method`.
"""
