"""Reads records, configuration and summary of a run, complete or not, from its folder."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetlora.errors import HetLoraError
from hetlora.runs.folder import read_summary
from hetlora.runs.text import several

if TYPE_CHECKING:
    from hetlora.config import RunConfig

__all__ = [
    "CONFIG",
    "RECORDS",
    "Round",
    "Run",
    "Scores",
    "final_ranks",
    "no_run",
    "number",
    "read_config",
    "read_run",
    "read_runs",
    "section",
]

RECORDS, CONFIG, RESULTS = "records.jsonl", "config.json", "results.json"


@dataclass(frozen=True)
class Round:
    """The part of a `hetlora.runs.records.RoundRecord` that a report needs, with the same names.

    Attributes:
        ranks: Client of the cohort to the rank it was sent, the largest of ranks by module.
        bounded: Client to the factors that lowered its influence, by ``"A"``, ``"B"`` or ``"weight"``.
        travelled: Bytes up and down over the network, if known.
    """

    number: int
    loss: float | None
    perplexity: float | None
    ranks: Mapping[str, int]
    weights: Mapping[str, float]
    prunes: Mapping[str, int]
    failures: Mapping[str, str]
    bounded: Mapping[str, Mapping[str, float]]
    bytes_up: int
    bytes_down: int
    travelled: tuple[int, int] | None
    live_slots: int
    seconds: float
    summed: tuple[str, ...] = ()

    @property
    def updates(self) -> int:
        """Return the number of updates in the round's average."""
        return len(self.weights) + len(self.summed)


@dataclass(frozen=True)
class Scores:
    """A measurement: overall, by tier and by client, each `perplexity`, `rougeL` and `tokens`, None if unknown."""

    overall: Mapping[str, float | None]
    tiers: Mapping[str, Mapping[str, float | None]]
    clients: Mapping[str, Mapping[str, float | None]]


FORMER: Mapping[str, Mapping[str, str]] = {
    "zeroshot": {"clients": "nobody", "averages": "nothing"},
    "local": {"clients": "sampled", "averages": "nothing"},
    "full": {"trains": "weights"},
}
"""Declarations of methods, for records from before records held them."""


@dataclass(frozen=True)
class Run:
    """A run, complete or not.

    Attributes:
        folder: Its folder.
        label: Its name beside other runs.
        config: Its configuration; empty if neither records nor a file hold it.
        head: Its first record; empty if there is none.
        rounds: Its finished rounds.
        base: Measurement of the base.
        start: Measurement of the base with the adapter that the run starts from; None for a fresh one.
        final: Measurement after the last round; None if the run did not get there.
        summary: Its summary; None if the run is not complete.
        digests: SHA-256 of its files as they were read.
        unreadable: Number of unreadable lines of its records.
    """

    folder: Path
    label: str
    config: Mapping[str, Any]
    head: Mapping[str, Any]
    rounds: tuple[Round, ...]
    base: Scores | None
    start: Scores | None
    final: Scores | None
    summary: Mapping[str, Any] | None
    digests: Mapping[str, str]
    unreadable: int

    @property
    def method(self) -> str:
        """Return the name of its method."""
        return str(section(self.config, "method").get("name", "?"))

    @property
    def planned(self) -> int:
        """Return the number of planned rounds; 0 if nobody trains."""
        rounds = number(section(self.config, "federation").get("rounds"))
        return 0 if self.declared("clients") == "nobody" else int(rounds or 0)

    def declared(self, key: str) -> Any:
        """Return a declaration of its method from the records; None if they lack it."""
        return (section(self.head, "method") or FORMER.get(self.method, {})).get(key)

    @property
    def starts_from_adapter(self) -> bool:
        """Return whether its first round begins with a given adapter."""
        return section(self.config, "model").get("adapter") is not None

    @property
    def before(self) -> Scores | None:
        """Return the measurement before the first round."""
        return self.start if self.starts_from_adapter else self.base


def no_run(folder: Path, missing: str, instead: str = "") -> HetLoraError:
    """Return the error about a folder that is no run; it lists the runs within, e.g. of a comparison.

    Args:
        folder: What was given.
        missing: The file that a run has there.
        instead: What else could have been given.
    """
    if not folder.exists():
        why = "is not there"
    else:
        why = f"is no run, for it has no {missing}" if folder.is_dir() else "is a file and no folder"
    found = sorted({path.parent for pattern in ("*", "runs/*") for path in folder.glob(f"{pattern}/{RECORDS}")})
    within = f"; runs within are {several([str(path) for path in found])}" if found else ""
    return HetLoraError(
        f"{str(folder)!r} {why}; give the folder of a run, which is where its {RECORDS} is{instead}{within}"
    )


def read_config(folder: Path) -> RunConfig:
    """Return the configuration of a run from its folder.

    Raises:
        HetLoraError: The folder is no run, or its configuration is invalid.
    """
    from hetlora.config import load_run_config

    with contextlib.suppress(OSError):  # of a folder that may not be read, which the next line explains
        if not (folder / CONFIG).is_file():
            raise no_run(folder, CONFIG)
    return load_run_config(folder / CONFIG)


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a section of a configuration; empty if it is missing."""
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def number(value: object) -> float | None:
    """Return `value` as a number; None if it is no finite number.

    Example:
        >>> number(3), number(None), number(float("nan")), number(True)
        (3.0, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:  # whole numbers of JSON have no bound
        return None
    return found if math.isfinite(found) else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read runs, each once, in the order given; a comparison stands for the runs of its table.

    Raises:
        HetLoraError: A folder is no run and no comparison, or cannot be read.
    """
    runs: dict[Path, Run] = {}
    compared: dict[Path, Path] = {}
    for folder in folders:
        for place, label in _runs_in(folder):
            own = place.resolve()
            if own in runs:
                continue
            runs[own] = read_run(place, label)
            if label is not None:
                compared[own] = folder.resolve()
    return _called_apart(runs, compared)


def _called_apart(runs: Mapping[Path, Run], compared: Mapping[Path, Path]) -> list[Run]:
    """Make equal labels distinct: prefix them with the folder of the comparison, or of the run."""
    alike: dict[str, list[Path]] = {}
    for own, run in runs.items():
        alike.setdefault(run.label, []).append(own)
    labels: dict[Path, str] = {}
    for label, places in alike.items():
        # Seeds of one method share the label of their comparison and belong together; runs of other folders do not.
        comparisons = list(dict.fromkeys(compared[own] for own in places if own in compared))
        alone = [own for own in places if own not in compared]
        if len(comparisons) + len(alone) > 1:
            of_comparison = {folder: f"{name}/{label}" for folder, name in _ends_of_paths(comparisons, 1).items()}
            of_run = _ends_of_paths(alone, 2)
            labels |= {own: of_comparison[compared[own]] if own in compared else of_run[own] for own in places}
    return [replace(run, label=labels.get(own, run.label)) for own, run in runs.items()]


def _ends_of_paths(folders: Sequence[Path], length: int) -> dict[Path, str]:
    """Return the last `length` parts of different paths, or more until they differ."""
    while len({folder.parts[-length:] for folder in folders}) < len(folders):
        length += 1
    return {folder: Path(*folder.parts[-length:]).as_posix() for folder in folders}


def _runs_in(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield the runs of a folder, each with its label in a comparison."""
    try:
        if (folder / RECORDS).is_file():
            yield folder, None
            return
        counted = list(_compared(folder))
    except OSError as error:
        raise HetLoraError(f"cannot read {str(folder)!r}: {error.strerror or error}") from error
    if not counted:
        raise no_run(folder, RECORDS, ", or that of a comparison with a finished run")
    yield from counted


def _compared(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield the runs of a comparison's table; without a table, all runs except those that only tune."""
    within = folder / "runs"
    # A comparison has results, or a lock while it runs.
    if not within.is_dir() or not ((folder / RESULTS).is_file() or (folder / ".lock").is_file()):
        return
    try:
        entries = json.loads((folder / RESULTS).read_bytes())["runs"]
        labels = {str(entry["folder"]): str(entry["label"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        labels = {}
    if labels:
        # A name from a file could lead out of the folder.
        names = {path.name for path in within.iterdir()}
        chosen = [(within / name, label) for name, label in labels.items() if name in names]
        yield from ((path, label) for path, label in chosen if (path / RECORDS).is_file())
        return
    for path in sorted(within.iterdir()):
        if (path / RECORDS).is_file() and not number(section(_config_in(path), "data").get("validation_share")):
            yield path, None


def _config_in(folder: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, Mapping) else {}


def read_run(folder: Path, label: str | None = None) -> Run:
    """Read one run, complete or not. Lines that are no records, e.g. of a killed process, are counted and skipped.

    Raises:
        HetLoraError: The records cannot be read, or there is neither a first record nor a configuration.
    """
    digest, unreadable = hashlib.sha256(), 0
    head: Mapping[str, Any] = {}
    rounds: dict[int, Round] = {}
    measured: list[tuple[int, Scores]] = []
    try:
        # Line by line, because records of many clients are large.
        with (folder / RECORDS).open("rb") as file:
            for line in file:
                digest.update(line)
                record = _record(line)
                kind = None if record is None else record.get("kind")
                if record is not None and kind == "run":
                    head = record
                elif record is not None and kind == "round" and number(record.get("round")) is not None:
                    rounds[int(record["round"])] = _round(record)
                elif record is not None and kind == "evaluation":
                    measured.append((int(number(record.get("round")) or 0), _scores(record)))
                elif line.strip():
                    unreadable += 1
        digests = {RECORDS: digest.hexdigest()}
        if (folder / CONFIG).is_file():
            digests[CONFIG] = hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest()
    except OSError as error:
        raise HetLoraError(
            f"cannot read {str(folder / RECORDS)!r}: {error.strerror or error}; make it readable"
        ) from error
    config = section(head, "config") or _config_in(folder)
    if not head and not config:
        raise HetLoraError(
            f"{str(folder)!r} is no run: its {RECORDS} holds no record of one, and no {CONFIG} lies beside it; give the folder "
            "of a run"
        )
    # In a run without rounds, the measurement of the base is written twice, also as the result. In a run that starts from an
    # adapter, the second measurement of round 0 is that of the adapter.
    begun = [scores for _, scores in itertools.takewhile(lambda entry: entry[0] == 0, measured)]
    base = begun[0] if begun else None
    start = begun[1] if len(begun) > 1 and section(config, "model").get("adapter") is not None else None
    after = measured[(base is not None) + (start is not None) :]
    return Run(
        folder=folder,
        label=label or folder.resolve().name,
        config=config,
        head=head,
        rounds=tuple(rounds[key] for key in sorted(rounds)),
        base=base,
        start=start,
        final=after[-1][1] if after else None,
        summary=read_summary(folder),
        digests=digests,
        unreadable=unreadable,
    )


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _round(record: Mapping[str, Any]) -> Round:
    network = section(record, "network")
    travelled = number(network.get("bytes_up")), number(network.get("bytes_down"))
    bounded = {
        client: lowered
        for client, entry in section(record, "clients").items()
        if isinstance(entry, Mapping) and (lowered := _numbers(entry.get("bounded")))
    }
    return Round(
        number=int(record["round"]),
        loss=number(record.get("loss")),
        perplexity=number(record.get("perplexity")),
        ranks=_ranks(record.get("ranks")),
        weights=_numbers(record.get("weights")),
        prunes=_ranks(record.get("prunes")),
        failures={client: str(reason) for client, reason in section(record, "failures").items()},
        bounded=bounded,
        bytes_up=int(number(record.get("bytes_up")) or 0),
        bytes_down=int(number(record.get("bytes_down")) or 0),
        travelled=None if None in travelled else (int(travelled[0] or 0), int(travelled[1] or 0)),
        live_slots=int(number(record.get("live_slots")) or 0),
        seconds=number(record.get("seconds")) or 0.0,
        summed=tuple(map(str, found)) if isinstance(found := record.get("summed"), list) else (),
    )


def _ranks(found: object) -> dict[str, int]:
    """Return client to rank, the largest of ranks by module."""
    largest = {
        client: number(rank) if not isinstance(rank, Mapping) else max(_numbers(rank).values(), default=None)
        for client, rank in (found.items() if isinstance(found, Mapping) else ())
    }
    return {client: int(rank) for client, rank in largest.items() if rank is not None}


def _numbers(found: object) -> dict[str, float]:
    items = found.items() if isinstance(found, Mapping) else ()
    return {name: value for name, item in items if (value := number(item)) is not None}


def _scores(record: Mapping[str, Any]) -> Scores:
    def figures(found: object) -> dict[str, float | None]:
        entry = found if isinstance(found, Mapping) else {}
        return {name: number(entry.get(name)) for name in ("perplexity", "rougeL", "tokens")}

    parts = {
        part: {name: figures(entry) for name, entry in section(record, part).items()} for part in ("tiers", "clients")
    }
    return Scores(figures(record.get("overall")), parts["tiers"], parts["clients"])


def final_ranks(run: Run) -> dict[str, int]:
    """Return the ranks of a complete run's summary."""
    return _ranks((run.summary or {}).get("ranks"))
