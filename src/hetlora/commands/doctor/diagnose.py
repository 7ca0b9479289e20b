"""All checks in their order: each is made where those before it allow it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from hetlora.commands.doctor.base_model import adapted_shapes, load_model, load_tokenization
from hetlora.commands.doctor.data import look_at_clients, look_at_examples
from hetlora.commands.doctor.findings import CHECKS, Diagnosis, Notes
from hetlora.commands.doctor.invariants import prove
from hetlora.commands.doctor.machine import look_at_bundled_base, look_at_machine
from hetlora.commands.doctor.settings import look_at_memory, look_at_method, look_at_ranks, look_at_training
from hetlora.commands.doctor.tiny_run import TinyFederation
from hetlora.config import RunConfig, load_config
from hetlora.config.reading import read_document
from hetlora.core.adapter import Adapter
from hetlora.core.client_list import Members
from hetlora.core.ranks import same_ranks
from hetlora.errors import ConfigError
from hetlora.model.initial_adapter import import_adapter
from hetlora.model.lora_model import LoraModel, pick_device
from hetlora.runs.tracking import need_trackers

__all__ = ["examine"]

OUTPUT = Path("runs")
"""Where runs are written that do not say."""


def examine(path: Path | None = None, changes: Sequence[str] = (), *, available: int | None = None) -> Diagnosis:
    """Look at this machine, and at a configuration.

    Args:
        path: The run's TOML file; None looks at the machine alone.
        changes: As `hetlora.config.load_config` takes them.
        available: Bytes of memory that there are; None asks the system.

    Raises:
        ConfigError: There is no such file, or a change has no such form: a mistake in the command, not in the run.
    """
    began, notes = time.monotonic(), Notes()
    if path is None:
        look_at_machine(notes, OUTPUT)
        look_at_bundled_base(notes)
    else:
        config = _configuration(notes, path, changes)
        if config is not None:
            dtype: torch.dtype = getattr(torch, config.model.dtype)
            look_at_machine(notes, Path(config.output), dtype, config.threads)
            _look_at_run(notes, config, available)
            made = {finding.check for finding in notes.findings} | notes.skipped.keys() | {"bundled base"}
            notes.skip("what they need is not there", *(check for check in CHECKS if check not in made))
    order = {check: place for place, check in enumerate(CHECKS)}
    findings = tuple(sorted(notes.findings, key=lambda finding: order[finding.check]))
    return Diagnosis(findings, notes.skipped, time.monotonic() - began)


def _configuration(notes: Notes, path: Path, changes: Sequence[str]) -> RunConfig | None:
    try:
        read_document(path, changes)
    except ConfigError as error:
        if error.source == "--set" or not path.is_file():
            raise
    config = notes.attempt("configuration", str(path), lambda: load_config(path, changes))
    if config is None:
        notes.skip("the configuration is not valid", *(check for check in CHECKS if check != "configuration"))
    else:
        notes.ok("configuration", f"{str(path)!r} is valid", str(path))
    return config


def _look_at_run(notes: Notes, config: RunConfig, available: int | None) -> None:
    """Look at the base, the rows and the settings, and where all of them allow it at two tiny rounds."""
    device = notes.attempt("device", "model.device", lambda: pick_device(config.model.device))
    if device is not None:
        notes.ok("device", str(device), "model.device")
    notes.attempt("trackers", "tracking.to", lambda: _look_at_trackers(notes, config))
    shapes = adapted_shapes(notes, config)
    tokenization = load_tokenization(notes, config)
    federation = look_at_clients(notes, config)
    looked = ranks = None
    if federation is not None:
        looked = look_at_examples(notes, config, federation, tokenization) if tokenization is not None else None
        look_at_training(notes, config, federation)
        ranks = look_at_ranks(notes, config, federation, shapes)
    if ranks is not None:
        look_at_method(notes, config, ranks, shapes)
    fits = False
    if ranks is not None and shapes is not None and device is not None:
        fits = look_at_memory(notes, config, ranks.largest, device, available)
    model = None
    if shapes is not None and device is not None and (fits or ranks is None):
        model = load_model(notes, config, device, tokenization)
    imported = None if model is None else _first_adapter(notes, config, model)
    if model is None or imported is None or ranks is None or looked is None or not any(looked.examples.values()):
        return
    assert federation is not None, "ranks are those of its clients"
    counts = federation.counts("train")
    tiny = TinyFederation.of(config, model, ranks, looked.examples, imported)
    trainers = Members(same_ranks(ranks.names, 1) if tiny.method.trains == "weights" else ranks, counts)
    prove(notes, tiny, trainers)


def _first_adapter(notes: Notes, config: RunConfig, model: LoraModel) -> Adapter | None:
    """Read what the run starts from; an empty adapter where it starts afresh, None where it cannot be read."""
    folder = config.model.adapter
    if folder is None:
        notes.ok("first adapter", "none: fresh factors", "model.adapter")
        return {}
    imported = notes.attempt("first adapter", "model.adapter", lambda: import_adapter(folder, model))
    if imported is not None:
        widest = max(A.shape[0] for A, _ in imported.values())
        notes.ok("first adapter", f"{len(imported)} modules of rank {widest}", "model.adapter")
    return imported


def _look_at_trackers(notes: Notes, config: RunConfig) -> None:
    need_trackers(config.tracking.to)
    notes.ok("trackers", ", ".join(config.tracking.to) or "none", "tracking.to")
