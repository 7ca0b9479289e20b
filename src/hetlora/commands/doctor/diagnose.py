"""All checks in order; a check is skipped if an earlier one prevents it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hetlora.commands.doctor.configuration import (
    adapted_shapes,
    check_clients,
    check_examples,
    check_memory,
    check_method_settings,
    check_ranks,
    check_training,
    load_model,
    load_tokenization,
)
from hetlora.commands.doctor.dry_run import TinyFederation, check_rounds
from hetlora.commands.doctor.findings import CHECKS, Diagnosis, Finding
from hetlora.commands.doctor.machine import check_bundled_base, check_machine
from hetlora.config import RunConfig, load_config
from hetlora.config.build import make_method, model_dtype
from hetlora.config.reading import read_document
from hetlora.core.adapter import Adapter
from hetlora.core.client_list import ClientList
from hetlora.core.ranks import same_ranks
from hetlora.errors import ConfigError
from hetlora.methods.lookup import find_method
from hetlora.model.initial_adapter import import_adapter
from hetlora.model.lora_model import LoraModel, pick_device
from hetlora.runs.tracking import need_trackers
from hetlora.testing import BrokenLawError
from hetlora.testing import laws as all_laws

__all__ = ["check_laws", "examine"]

OUTPUT = Path("runs")
"""Default folder of runs."""
OF_PLAIN_AVERAGES = ("equal clients", "FedAvg")
"""Laws that hold for the plain method only, not for a server optimiser around it."""


def examine(
    path: Path | None = None,
    changes: Sequence[str] = (),
    *,
    laws: bool = False,
    available: int | None = None,
    show: Callable[[Finding], object] | None = None,
) -> Diagnosis:
    """Check this machine, and a configuration if one is given.

    Args:
        path: The run's TOML file; None checks the machine only.
        changes: As `hetlora.config.load_config` takes them.
        laws: Whether to check the run's method against the laws of `hetlora.testing`, too.
        available: Bytes of available memory; None asks the system.
        show: Called with every finding immediately.

    Raises:
        ConfigError: The file does not exist, or a change is malformed: a mistake in the command, not in the run.
    """
    found = Diagnosis(show)
    if path is None:
        check_machine(found, OUTPUT)
        check_bundled_base(found)
        return found
    config = _configuration(found, path, changes)
    if config is None:
        found.skip("the configuration is not valid", *(check for check in CHECKS if check != "configuration"))
        return found
    check_machine(found, Path(config.output), model_dtype(config), config.threads)
    _check_run(found, config, available)
    made = {finding.check for finding in found.findings} | found.skipped.keys() | {"bundled base"}
    found.skip("what they need is not there", *(check for check in CHECKS if check not in made))
    if laws:
        check_laws(found, config)
    return found


def check_laws(found: Diagnosis, config: RunConfig) -> None:
    """Check the run's method against every law, with its wrappers if the law covers wrapped methods."""
    plain, wrapped = find_method(config.method.name)(**config.method.arguments), make_method(config)
    for name, law in all_laws():
        method = plain if name in OF_PLAIN_AVERAGES else wrapped
        check, way_out = f"law: {name}", "mend the method; hetlora.testing.check_method repeats the check"
        try:
            law(method, config.seed)
        except BrokenLawError as error:
            found.note(check, error.problem, "method.name", way_out, fail=True)
        else:
            found.note(check, str(law.__doc__), "method.name")


def _configuration(found: Diagnosis, path: Path, changes: Sequence[str]) -> RunConfig | None:
    try:
        read_document(path, changes)
    except ConfigError as error:
        if error.source == "--set" or not path.is_file():
            raise
    valid = f"{str(path)!r} is valid"
    return found.attempt("configuration", str(path), lambda: load_config(path, changes), lambda _: valid)


def _check_run(found: Diagnosis, config: RunConfig, available: int | None) -> None:
    """Check the base, the rows and the settings, then, if all of them allow it, run two tiny rounds."""
    device = found.attempt("device", "model.device", lambda: pick_device(config.model.device), str)
    trackers = config.tracking.to
    found.attempt("trackers", "tracking.to", lambda: need_trackers(trackers), lambda _: ", ".join(trackers) or "none")
    shapes = adapted_shapes(found, config)
    tokenization = load_tokenization(found, config)
    federation = check_clients(found, config)
    examples = ranks = None
    if federation is not None:
        examples = None if tokenization is None else check_examples(found, config, federation, tokenization)
        check_training(found, config, federation)
        ranks = check_ranks(found, config, federation, shapes)
    if ranks is not None:
        check_method_settings(found, config, ranks, shapes)
    fits = False
    if ranks is not None and shapes is not None and device is not None:
        fits = check_memory(found, config, ranks.largest, device, available)
    model = None
    if shapes is not None and device is not None and (fits or ranks is None):
        model = load_model(found, config, device, tokenization)
    first = None if model is None else _first_adapter(found, config, model)
    if model is None or first is None or ranks is None or federation is None or not any((examples or {}).values()):
        return
    tiny = TinyFederation.of(config, model, ranks, examples or {}, first)
    own_ranks = same_ranks(ranks.names, 1) if tiny.method.trains == "weights" else ranks
    check_rounds(found, tiny, ClientList(own_ranks, federation.counts("train")))


def _first_adapter(found: Diagnosis, config: RunConfig, model: LoraModel) -> Adapter | None:
    """Read the adapter that the run starts from. It is empty for fresh factors and None if it cannot be read."""
    folder = config.model.adapter
    if folder is None:
        found.note("first adapter", "none: fresh factors", "model.adapter")
        return {}
    return found.attempt(
        "first adapter",
        "model.adapter",
        lambda: import_adapter(folder, model),
        lambda adapter: f"{len(adapter)} modules of rank {max(A.shape[0] for A, _ in adapter.values())}",
    )
