"""HetLoRA: federated fine-tuning of language models with a LoRA rank for every client.

Names are loaded at first use, so ``import hetlora`` is fast and loads neither transformers, peft nor flwr.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from hetlora._version import __version__ as __version__

if TYPE_CHECKING:
    from hetlora.api import Run, compare, open_run, resume, run
    from hetlora.commands.export.export import export_run
    from hetlora.commands.generate import generate
    from hetlora.core.adapter import Adapter, LoraPair, Rank, delta_norm, pad, stack, tail, truncate
    from hetlora.core.aggregation import ProductSum, SlotSum, StackedSum, WeightedSum
    from hetlora.core.method import Engine, Method
    from hetlora.core.round import run_round
    from hetlora.core.sampling import DropOuts, sample_cohort
    from hetlora.core.types import Client, ClientFailure, ClientUpdate, ServerState, TrainTask
    from hetlora.data import Federation, Split, Template, Tokenization, TokenizedFederation, read_jsonl
    from hetlora.errors import HetLoraError
    from hetlora.methods import METHODS, fedavg, fedopt, fedprox
    from hetlora.methods.hetlora import hetlora
    from hetlora.model.lora_model import LoraModel, load_base, load_tokenizer
    from hetlora.model.peft_files import export_adapter
    from hetlora.runs.observer import Observer
    from hetlora.training.local import LocalTraining
    from hetlora.training.simulation import SimulationEngine


__all__ = [
    "METHODS",
    "Adapter",
    "Client",
    "ClientFailure",
    "ClientUpdate",
    "DropOuts",
    "Engine",
    "Federation",
    "HetLoraError",
    "LocalTraining",
    "LoraModel",
    "LoraPair",
    "Method",
    "Observer",
    "ProductSum",
    "Rank",
    "Run",
    "ServerState",
    "SimulationEngine",
    "SlotSum",
    "Split",
    "StackedSum",
    "Template",
    "Tokenization",
    "TokenizedFederation",
    "TrainTask",
    "WeightedSum",
    "compare",
    "delta_norm",
    "export_adapter",
    "export_run",
    "fedavg",
    "fedopt",
    "fedprox",
    "generate",
    "hetlora",
    "load_base",
    "load_tokenizer",
    "open_run",
    "pad",
    "read_jsonl",
    "resume",
    "run",
    "run_round",
    "sample_cohort",
    "stack",
    "tail",
    "truncate",
]

_HOME = {
    "hetlora.core.adapter": "Adapter LoraPair Rank delta_norm pad stack tail truncate",
    "hetlora.core.aggregation": "ProductSum SlotSum StackedSum WeightedSum",
    "hetlora.core.sampling": "DropOuts sample_cohort",
    "hetlora.data": "Federation Split Template TokenizedFederation Tokenization read_jsonl",
    "hetlora.errors": "HetLoraError",
    "hetlora.core.method": "Engine Method",
    "hetlora.core.round": "run_round",
    "hetlora.core.types": "Client ClientFailure ClientUpdate ServerState TrainTask",
    "hetlora.model.lora_model": "LoraModel load_base load_tokenizer",
    "hetlora.methods": "METHODS fedavg fedopt fedprox hetlora",
    "hetlora.model.peft_files": "export_adapter",
    "hetlora.runs.observer": "Observer",
    "hetlora.api": "Run compare open_run resume run",
    "hetlora.training.simulation": "SimulationEngine",
    "hetlora.commands.export.export": "export_run",
    "hetlora.commands.generate": "generate",
    "hetlora.training.local": "LocalTraining",
}
# `hetlora.federated`, for one release.
__path__.append(f"{__path__[0]}/core/former")

_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hetlora' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
