"""The plan of `hetlora compare`: `[compare]` and the run beside it, resolved into validated configurations."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from hetlora.commands.compare.run_names import with_run_folder
from hetlora.config import RunConfig, key_path, parse_config, read_named, validation_messages
from hetlora.errors import ConfigError, expand_path
from hetlora.methods.lookup import made_of
from hetlora.runs.fingerprints import FileFingerprints
from hetlora.runs.text import method_labels

__all__ = ["CompareConfig", "Comparison", "MethodEntry", "PlannedMethod", "PlannedRun", "load_comparison", "plan"]


def _distinct(values: list[Any]) -> list[Any]:
    twice = [str(value) for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ValueError(f"names {', '.join(twice)} twice; once is enough")
    return values


def _printable(label: str) -> str:
    if not label.strip() or not label.isprintable():
        raise ValueError(f"{label!r} cannot be shown in a table; use printable text on one line")
    return label


def _labelled(entries: list[MethodEntry]) -> list[MethodEntry]:
    """Give every entry a label: its configured one, or a unique name of its method."""
    labels = method_labels(entry.name for entry in entries)
    return [entry.model_copy(update={"label": entry.label or labels[entry.name]}) for entry in entries]


Label = Annotated[str, AfterValidator(_printable)]
Rates = Annotated[list[PositiveFloat], Field(min_length=1), AfterValidator(_distinct)]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1), AfterValidator(_distinct)]


class MethodEntry(BaseModel):
    """One of `compare.methods`: a method; every other key is an argument of its factory, as in `[method]`."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    name: str
    label: Label | None = None
    learning_rates: Rates | None = None
    rate_of: str | None = None
    changes: dict[str, Any] = Field(default_factory=dict, alias="set")

    @property
    def shown(self) -> str:
        """Return the method's label in the table."""
        return self.label or self.name

    @property
    def method(self) -> dict[str, Any]:
        """Return the `[method]` section of its runs."""
        return {"name": self.name, **(self.model_extra or {})}


class CompareConfig(BaseModel):
    """The section `[compare]`: methods, seeds, tuning and metric."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    methods: Annotated[list[MethodEntry], AfterValidator(_labelled)] = Field(min_length=1)
    seeds: Seeds = [0]
    learning_rates: Rates | None = None
    validation_share: float = Field(default=0.2, gt=0.0, lt=1.0)
    tuning_rounds: PositiveInt | None = None
    metric: Literal["perplexity", "rougeL"] = "perplexity"
    target: PositiveFloat | None = None
    reference: str | None = None
    jobs: PositiveInt = 1

    @model_validator(mode="after")
    def _agree(self) -> CompareConfig:
        labels = [entry.shown for entry in self.methods]
        twice = [label for label, count in Counter(labels).items() if count > 1]
        problems = [f"two methods are called {label!r}; give each a label of its own" for label in twice]
        if self.reference is not None and self.reference not in labels:
            problems.append(f"reference = {self.reference!r} is the label of no method; use one of {', '.join(labels)}")
        problems += self._rates_of_others()
        if self.target is not None and self.metric == "rougeL":
            problems.append(
                "target: only perplexity is measured after every round; take it away, or set metric = 'perplexity'"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _rates_of_others(self) -> list[str]:
        """Return the problems of all `rate_of`."""
        tuned = [entry.shown for entry in self.methods if self._is_tuned(entry)]
        problems = []
        for taker in (entry for entry in self.methods if entry.rate_of is not None):
            if taker.rate_of not in tuned:
                others = ", ".join(tuned) or "none"
                problems.append(
                    f"{taker.shown}: rate_of = {taker.rate_of!r} is no method that is tuned; use one of {others}"
                )
            if taker.learning_rates or _own_rate(taker):
                problems.append(f"{taker.shown}: rate_of stands beside a learning rate of its own; keep one")
            if not _trains(taker):
                problems.append(f"{taker.shown}: nobody trains, so that there is no rate to take; take rate_of away")
        return problems

    def _is_tuned(self, entry: MethodEntry) -> bool:
        rates = entry.learning_rates or self.learning_rates or []
        return entry.rate_of is None and len(rates) > 1 and _trains(entry) and not _own_rate(entry)


class _CompareFile(BaseModel):
    """The part of a file that this module validates; it gives problems their full keys."""

    compare: CompareConfig


@dataclass(frozen=True)
class PlannedRun:
    """One run, fully resolved.

    Attributes:
        label: The method's label in the table.
        learning_rate: Of its clients.
        seed: Its seed.
        tuning: Whether it is evaluated on validation rows, held out of the training rows.
        config: The run; `output` and `name` are its folder.
        stamps: Stamps of the local files it reads, from when the folder was named.
    """

    label: str
    learning_rate: float
    seed: int
    tuning: bool
    config: RunConfig
    stamps: Mapping[str, str | None]

    @property
    def folder(self) -> Path:
        """Return the folder of the run, named after everything that decides its figures."""
        return expand_path(self.config.output) / self.config.name

    def __str__(self) -> str:
        tuning = "tuning, " if self.tuning else ""
        return f"{self.label} ({tuning}learning rate {self.learning_rate:g}, seed {self.seed})"


@dataclass(frozen=True)
class PlannedMethod:
    """One method of a comparison.

    Attributes:
        label: Its label in the table.
        name: Its name in a configuration.
        tuning: Tuning run per learning rate; empty with a single rate.
        final: Final runs per learning rate, one per seed.
        trains: Whether clients train; if not, there is no learning rate.
        rate_of: Label of the method whose chosen rate it takes; None if it is tuned itself.
    """

    label: str
    name: str
    tuning: Mapping[float, PlannedRun]
    final: Mapping[float, tuple[PlannedRun, ...]]
    trains: bool
    rate_of: str | None = None


@dataclass(frozen=True)
class Comparison:
    """A comparison ready to run.

    Attributes:
        name: The name in the run's file.
        folder: Folder of runs and tables.
        settings: The section `[compare]`.
        methods: In the order of the file.
    """

    name: str
    folder: Path
    settings: CompareConfig
    methods: tuple[PlannedMethod, ...]


def load_comparison(path: Path, changes: Sequence[str] = (), jobs: int | None = None) -> Comparison:
    """Read a comparison from a run's TOML file with a `[compare]` table.

    Args:
        path: The file.
        changes: ``key.key=value``, as for a run.
        jobs: Replaces `compare.jobs`.

    Raises:
        ConfigError: Lists all problems of all methods.
    """
    return plan(read_named(path, changes), str(path), jobs)


def plan(document: Mapping[str, Any], source: str = "the configuration", jobs: int | None = None) -> Comparison:
    """Resolve every method, learning rate and seed into a validated run.

    Args:
        document: The file as plain data.
        source: Its name, for messages.
        jobs: Replaces `compare.jobs`.

    Raises:
        ConfigError: Lists all problems of all methods, with the methods' labels.
    """
    if not isinstance(document.get("compare"), Mapping):
        raise ConfigError(source, ["[compare] is missing; examples/compare_stdlib.toml shows a whole comparison"])
    compare = document["compare"] if jobs is None else {**document["compare"], "jobs": jobs}
    try:
        settings = _CompareFile.model_validate({"compare": compare}).compare
    except ValidationError as error:
        raise ConfigError(source, validation_messages(error, _CompareFile)) from error
    base = {key: value for key, value in document.items() if key != "compare"}
    found: dict[str, list[str]] = {}
    methods, digests = [], FileFingerprints()
    for entry in settings.methods:
        try:
            methods.append(_plan_method(base, settings, entry, digests))
        except ConfigError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(entry.shown)
    if found:
        raise ConfigError(source, [f"{_names(labels, settings)}: {problem}" for problem, labels in found.items()])
    run = next(iter(methods[0].final.values()))[0].config
    return Comparison(document.get("name", "run"), Path(run.output).parent, settings, tuple(methods))


def _names(labels: Sequence[str], settings: CompareConfig) -> str:
    return ", ".join(labels) if len(labels) < len(settings.methods) or len(labels) == 1 else "every method"


def _plan_method(
    base: Mapping[str, Any], settings: CompareConfig, entry: MethodEntry, digests: FileFingerprints
) -> PlannedMethod:
    document = _document(base, entry)
    trains = _trains(entry)
    giver = next((other for other in settings.methods if other.shown == entry.rate_of), entry)
    grid = (giver.learning_rates or ([] if _own_rate(giver) else settings.learning_rates) or []) if trains else []
    tuned = giver is entry and len(grid) > 1
    configs: dict[tuple[float | None, int, bool], RunConfig] = {}
    problems: dict[str, None] = {}
    for rate, seed, tuning in _cells(grid, settings.seeds, tuned=tuned):
        try:
            configs[rate, seed, tuning] = _resolve(document, settings, rate, seed, tuning=tuning)
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise ConfigError(entry.shown, list(problems))

    def planned(rate: float | None, seed: int, *, tuning: bool) -> PlannedRun:
        config = with_run_folder(configs[rate, seed, tuning], entry.shown, digests)
        return PlannedRun(entry.shown, config.training.learning_rate, seed, tuning, config, digests.stamps(config))

    rates: Sequence[float | None] = grid or [None]
    first = settings.seeds[0]
    judged = [planned(rate, first, tuning=True) for rate in rates] if tuned else []
    counted = [tuple(planned(rate, seed, tuning=False) for seed in settings.seeds) for rate in rates]
    return PlannedMethod(
        label=entry.shown,
        name=entry.name,
        tuning={run.learning_rate: run for run in judged},
        final={runs[0].learning_rate: runs for runs in counted},
        trains=trains,
        rate_of=entry.rate_of,
    )


def _cells(grid: Sequence[float], seeds: Sequence[int], *, tuned: bool) -> Iterator[tuple[float | None, int, bool]]:
    rates: Sequence[float | None] = grid or [None]
    for rate in rates:
        if tuned:
            yield rate, seeds[0], True
        yield from ((rate, seed, False) for seed in seeds)


def _resolve(
    document: Mapping[str, Any], settings: CompareConfig, rate: float | None, seed: int, *, tuning: bool
) -> RunConfig:
    """Validate the run of one cell of the grid. A tuning run measures only its metric, once at the end."""
    full = copy.deepcopy(dict(document))
    full["seed"] = seed
    for section, key, value, wanted in (
        ("training", "learning_rate", rate, rate is not None),
        ("data", "validation_share", settings.validation_share, tuning),
        ("federation", "rounds", settings.tuning_rounds, tuning and settings.tuning_rounds is not None),
        ("evaluation", "every", 0, tuning),
        ("evaluation", "generate", 0, tuning and settings.metric == "perplexity"),
    ):
        if wanted and isinstance(full.setdefault(section, {}), dict):
            full[section][key] = value
    config = parse_config(full)
    if settings.metric == "rougeL" and not config.evaluation.generate:
        problem = "compare.metric = 'rougeL' needs generated answers; set evaluation.generate to how many"
        raise ConfigError("the configuration", [problem])
    return config


# The changes of one method ------------------------------------------------------------------------------------------

_FIXED = {
    "method": "the entry itself says it: its name and its other keys",
    "name": "a comparison has one",
    "output": "a comparison has one",
    "seed": "compare.seeds says it",
    "compare": "it is about all methods",
}


def _trains(entry: MethodEntry) -> bool:
    made = made_of(entry.name, {})
    return made is None or made.clients != "nobody"


def _own_rate(entry: MethodEntry) -> bool:
    return any(path == ("training", "learning_rate") for path, _ in _leaves(entry.changes))


def _document(base: Mapping[str, Any], entry: MethodEntry) -> dict[str, Any]:
    """Return the run's file with the method's changes on top.

    Raises:
        ConfigError: A method may not make one of the changes.
    """
    changes, problems = _nested(entry.changes)
    for section in changes.keys() & _FIXED.keys():
        problems.append(f"set.{section} is not for a method to change: {_FIXED[section]}")
    data = base.get("data")
    if (isinstance(data, Mapping) and data.get("validation_share")) or "validation_share" in _section(changes, "data"):
        problems.append("data.validation_share is set by the comparison while it tunes; set compare.validation_share")
    if entry.learning_rates and _own_rate(entry):
        problems.append("set.training.learning_rate and learning_rates both give the rate; keep one")
    if problems:
        raise ConfigError(entry.shown, problems)
    return {**_merged(base, changes), "method": entry.method}


def _section(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = document.get(name)
    return section if isinstance(section, Mapping) else {}


def _leaves(changes: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every value with its path; top-level keys may be dotted, ``"ranks.kind" = "same"``."""
    for key, value in changes.items():
        path = prefix or tuple(key_path(key) or [key])
        path = (*path, key) if prefix else path
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, path)
        else:
            yield path, value


def _nested(changes: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return changes as nested sections, and the problems of their keys."""
    nested: dict[str, Any] = {}
    problems: list[str] = []
    for path, value in _leaves(changes):
        table = nested
        for part in path[:-1]:
            table = table.setdefault(part, {}) if isinstance(table, dict) else table
        if not isinstance(table, dict):
            problems.append(f"set.{'.'.join(path)}: {'.'.join(path[:-1])} is a value there, not a section")
        elif path[-1] in table:
            problems.append(f"set.{'.'.join(path)} is given twice, as a table and as a dotted key; keep one")
        else:
            table[path[-1]] = value
    return nested, problems


def _merged(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge changes into `table` key by key; a change with a `kind` replaces its section, since other kinds have other keys.

    Example:
        >>> _merged({"ranks": {"kind": "uniform", "min": 2, "max": 8}}, {"ranks": {"max": 4}})
        {'ranks': {'kind': 'uniform', 'min': 2, 'max': 4}}
        >>> _merged({"ranks": {"kind": "uniform", "min": 2, "max": 8}}, {"ranks": {"kind": "same", "rank": 4}})
        {'ranks': {'kind': 'same', 'rank': 4}}
    """
    merged = dict(table)
    for key, value in changes.items():
        old = merged.get(key)
        joins = isinstance(value, Mapping) and isinstance(old, Mapping) and "kind" not in value
        merged[key] = _merged(old, value) if joins and isinstance(old, Mapping) else value
    return merged
