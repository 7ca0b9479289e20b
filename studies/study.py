"""A study: a comparison's TOML file whose `[study]` table lists the tables and figures to make."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from hetlora.commands.compare.grid import Comparison, plan
from hetlora.config import read_document, validation_messages
from hetlora.errors import ConfigError

__all__ = ["KINDS", "FigureEntry", "Study", "StudyConfig", "TableEntry", "known_studies", "load_study", "questions"]

Kind = Literal["rounds", "megabytes", "train", "rates", "ranks", "weights", "tiers", "slots"]
KINDS: Mapping[str, str] = {
    "rounds": "held-out metric over the rounds",
    "megabytes": "held-out metric over the megabytes sent up and down",
    "train": "training loss over the rounds",
    "rates": "the metric over the learning rates, of the runs that tuned them",
    "ranks": "mean rank of the clients over the rounds",
    "weights": "a client's share of the average, as a multiple of the equal share, by its rank",
    "tiers": "held-out perplexity of each tier's clients",
    "slots": "size of the global adapter's slots at the end",
}
FileName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: FileName
    title: str = Field(min_length=1)
    methods: list[str] = Field(min_length=1)


class TableEntry(_Entry):
    """One of `study.tables`: rows of the comparison, each tested against one of them.

    Attributes:
        reference: The label of that one; None for the best mean.
        mean: Over what perplexity is averaged: all scored tokens, so that a client counts as much as its held-out rows are
            long, or clients, so that all count alike, `exp(mean_k log perplexity_k)`.
        round: The round after which perplexity is taken; None for the last one.
    """

    reference: str | None = None
    mean: Literal["tokens", "clients"] = "tokens"
    round: PositiveInt | None = None


class FigureEntry(_Entry):
    """One of `study.figures`; `KINDS` says what each kind shows."""

    kind: Kind


class StudyConfig(BaseModel):
    """`[study]`: the question, and how the answer is shown."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    question: str = Field(min_length=1)
    tables: list[TableEntry] = Field(min_length=1)
    figures: list[FigureEntry] = []


class _StudyFile(BaseModel):
    study: StudyConfig


@dataclass(frozen=True)
class Study:
    """A study ready to run.

    Attributes:
        name: The name of its file.
        settings: Its `[study]`.
        comparison: The comparison to run.
        document: The whole file as plain data, with the changes made to it.
    """

    name: str
    settings: StudyConfig
    comparison: Comparison
    document: Mapping[str, Any]


def known_studies() -> dict[str, Path]:
    """Return the studies of the repository, name to file.

    Example:
        >>> "smoke" in known_studies()
        True
    """
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.toml"))}


def questions() -> dict[str, str]:
    """Return the question of each study of the repository."""
    return {name: str(read_document(path)["study"]["question"]) for name, path in known_studies().items()}


def load_study(name: str, changes: Sequence[str] = (), jobs: int | None = None) -> Study:
    """Read a study.

    Args:
        name: One of `known_studies`, or a TOML file.
        changes: ``key.key=value``, as for a run.
        jobs: Takes the place of `compare.jobs`.

    Raises:
        ConfigError: There is none of that name, or it has problems: all of them.
    """
    path = known_studies().get(name, Path(name))
    if not path.is_file():
        known = ", ".join(known_studies())
        raise ConfigError("the study", [f"{name!r} is no study and no file of one; use one of {known}"])
    document = read_document(path, changes)
    source = str(path) if name not in known_studies() else f"study {name}"
    try:
        settings = _StudyFile.model_validate({"study": document.get("study")}).study
    except ValidationError as error:
        raise ConfigError(source, validation_messages(error, _StudyFile)) from error
    compared = copy.deepcopy({key: value for key, value in document.items() if key != "study"})
    compared.setdefault("name", f"study-{path.stem}")
    comparison = plan(compared, source, jobs)
    _check_labels(settings, comparison, source)
    return Study(path.stem, settings, comparison, document)


def _check_labels(settings: StudyConfig, comparison: Comparison, source: str) -> None:
    """Refuse tables and figures of methods that the comparison does not have, and two of one name."""
    labels = [method.label for method in comparison.methods]
    entries: list[_Entry] = [*settings.tables, *settings.figures]
    problems = []
    for entry in entries:
        asked = [*entry.methods, *([entry.reference] if isinstance(entry, TableEntry) and entry.reference else [])]
        if missing := [label for label in asked if label not in labels]:
            problems.append(
                f"study: {entry.name!r} names {', '.join(map(repr, missing))}, which no method is called; use some of "
                f"{', '.join(labels)}"
            )
        if isinstance(entry, TableEntry) and entry.reference and entry.reference not in entry.methods:
            problems.append(f"study: {entry.name!r} compares with {entry.reference!r}, which is not one of its methods")
    tuned = {method.label for method in comparison.methods if method.tuning}
    for figure in settings.figures:
        if figure.kind == "rates" and (untuned := [label for label in figure.methods if label not in tuned]):
            whose = ", ".join(map(repr, untuned))
            problems.append(
                f"study: {figure.name!r} shows learning rates of {whose}, which are not tuned here; take methods with "
                "several learning_rates"
            )
    for entry in settings.tables:
        problems += _other_perplexity(entry, comparison)
    names = [entry.name for entry in entries]
    problems += [
        f"study: two tables or figures are called {name!r}" for name in dict.fromkeys(names) if names.count(name) > 1
    ]
    if problems:
        raise ConfigError(source, problems)


def _other_perplexity(entry: TableEntry, comparison: Comparison) -> list[str]:
    """Return the reasons why a table cannot have its mean or round."""
    whose, metric = f"study: {entry.name!r}", comparison.settings.metric
    asked = [*(["mean"] if entry.mean != "tokens" else []), *(["round"] if entry.round is not None else [])]
    if not asked:
        return []
    if metric != "perplexity":
        keys = " and ".join(asked)
        return [
            (
                f"{whose} sets {keys}, for perplexity, while compare.metric is {metric!r}; set compare.metric = 'perplexity', "
                f"or take {keys} away"
            )
        ]
    if len(asked) == 2:
        return [f"{whose} sets mean and round; clients are measured after the last round only: keep one"]
    return [] if entry.round is None else _unmeasured(entry, entry.round, comparison)


def _unmeasured(entry: TableEntry, asked: int, comparison: Comparison) -> list[str]:
    """Return which methods of a table are not measured after a round."""
    problems = []
    for method in comparison.methods:
        if method.label not in entry.methods or not method.trains:
            continue
        run = next(iter(method.final.values()))[0].config
        every, last = run.evaluation.every, run.federation.rounds
        measured = sorted({*(range(every, last, every) if every else ()), last})
        if asked not in measured:
            problems.append(
                f"study: {entry.name!r} is of round {asked}, after which {method.label!r} is not measured; use one of "
                f"{', '.join(map(str, measured))}"
            )
    return problems
