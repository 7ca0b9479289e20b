"""HetLoRA: federated fine-tuning of language models with a LoRA rank for every client.

Names are loaded when they are first used, so that ``import hetlora`` costs nothing and loads neither transformers, peft
nor flwr.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hetlora.adapter import Adapter, LoraPair, Rank, delta_norm, pad, stack, tail, truncate
    from hetlora.aggregation import ProductSum, SlotSum, StackedSum, WeightedSum
    from hetlora.cohort import DropOuts, sample_cohort
    from hetlora.data import Federation, Split, Template, Tokenization, TokenizedFederation, read_jsonl
    from hetlora.errors import HetLoraError
    from hetlora.federated import (
        Client,
        ClientFailure,
        ClientUpdate,
        Engine,
        Method,
        ServerState,
        TrainTask,
        run_round,
    )
    from hetlora.lora_model import LoraModel, load_base, load_tokenizer
    from hetlora.methods import METHODS, fedavg, fedopt, fedprox
    from hetlora.methods.hetlora import hetlora
    from hetlora.peft_io import export_adapter
    from hetlora.runs import Run, open_run, resume, run
    from hetlora.simulation import SimulationEngine
    from hetlora.take_away.export import export_run
    from hetlora.take_away.generate import generate
    from hetlora.training import LocalTraining

__version__ = "0.1.0"

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
    "hetlora.adapter": "Adapter LoraPair Rank delta_norm pad stack tail truncate",
    "hetlora.aggregation": "ProductSum SlotSum StackedSum WeightedSum",
    "hetlora.cohort": "DropOuts sample_cohort",
    "hetlora.data": "Federation Split Template TokenizedFederation Tokenization read_jsonl",
    "hetlora.errors": "HetLoraError",
    "hetlora.federated": "Client ClientFailure ClientUpdate Engine Method ServerState TrainTask run_round",
    "hetlora.lora_model": "LoraModel load_base load_tokenizer",
    "hetlora.methods": "METHODS fedavg fedopt fedprox hetlora",
    "hetlora.peft_io": "export_adapter",
    "hetlora.runs": "Run open_run resume run",
    "hetlora.simulation": "SimulationEngine",
    "hetlora.take_away.export": "export_run",
    "hetlora.take_away.generate": "generate",
    "hetlora.training": "LocalTraining",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hetlora' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
