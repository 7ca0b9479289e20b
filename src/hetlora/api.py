"""Runs from Python, in a notebook or a script, as on the command line, with values instead of printed lines.

A `Run` reads its folder at every call and keeps no state, so it can be of another process or an earlier day.
"""

from __future__ import annotations

import html
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

from hetlora.errors import HetLoraError, expand_path
from hetlora.runs.folder import read_summary
from hetlora.runs.former import former_names
from hetlora.runs.process import set_up

if TYPE_CHECKING:
    from types import ModuleType

    from plotly.graph_objects import Figure

    from hetlora.commands.compare.comparison import ComparisonResult
    from hetlora.commands.export.export import ExportResult
    from hetlora.config import Changes, RunConfig
    from hetlora.runs.observer import Observer
    from hetlora.runs.reader import Run as Recorded
    from hetlora.runs.result import RunResult

__all__ = ["RoundTable", "Run", "compare", "open_run", "resume", "resume_run", "run", "start_run"]

SourceOfRun = os.PathLike[str] | str
ENGINES: dict[str, str] = {
    "in-process": "hetlora.runs.local_experiment",
    "flower-sim": "hetlora.flower.simulation",
}
"""Name, as ``--engine`` takes it, to a module with `start(config, display)` and `resume(folder, display)`.

A program may add its own: `docs/extending.md`.
"""

COLUMNS = ("round", "loss", "perplexity", "bytes_up", "bytes_down", "prunes", "failures")
MOST_ROWS = 10
"""Rows of the table that a notebook shows; `Run.table` has all of them."""


class RoundTable(list[dict[str, Any]]):
    """Rounds as dictionaries, which print as a table; so does a slice of them.

    Example:
        >>> RoundTable([{"round": 1, "loss": 4.5996, "perplexity": None, "bytes_up": 92160, "prunes": 0}])
        round   loss  perplexity  bytes_up  prunes
            1  4.600           —    92,160       0
    """

    @overload
    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> RoundTable: ...
    def __getitem__(self, index: SupportsIndex | slice) -> dict[str, Any] | RoundTable:
        if isinstance(index, slice):
            return RoundTable(super().__getitem__(index))
        return super().__getitem__(index)

    def __repr__(self) -> str:
        if not self:
            return "no rounds"
        from hetlora.runs.text import aligned

        lines = [list(self[0]), *([_cell(value) for value in row.values()] for row in self)]
        return "\n".join(aligned(lines, left=()))

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in (self[0] if self else COLUMNS))
        rows = ["".join(f"<td>{html.escape(_cell(value))}</td>" for value in row.values()) for row in self]
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _cell(value: object) -> str:
    from hetlora.runs.text import figure

    return figure(value, ",") if isinstance(value, int) else figure(value if isinstance(value, float) else None)


@dataclass(frozen=True, repr=False)
class Run:
    """A run by its folder, complete or not; functions that accept the folder of a run accept it, too.

    Attributes:
        folder: The folder with its records; text and ``~`` are accepted, too.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", expand_path(self.folder))

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        try:
            return self._sentence()
        except HetLoraError as error:  # a missing folder must not break the output of a notebook
            return str(error)

    def _repr_html_(self) -> str:
        try:
            last = self.table()[-MOST_ROWS:]
        except HetLoraError as error:
            return f"<p>{html.escape(str(error))}</p>"
        return f"<p>{html.escape(self._sentence())}</p>{last._repr_html_() if last else ''}"

    def _sentence(self) -> str:
        from hetlora.commands.report.summary import sentence

        recorded = self._recorded()
        text = sentence(recorded)
        if recorded.rounds and not any(item.weights for item in recorded.rounds):
            text += " No client ever gave an update; the records say why."
        if recorded.summary is None:
            text += f" It is not complete: hetlora.resume({str(self.folder)!r}) goes on, unless it is still running."
        return text

    def _recorded(self) -> Recorded:
        from hetlora.runs.reader import read_run

        return read_run(self.folder)

    def summary(self) -> dict[str, Any] | None:
        """Return the object that ``hetlora run --json`` prints; None if the run is not complete."""
        return read_summary(self.folder)

    def table(self) -> RoundTable:
        """Return one row per finished round.

        Perplexity is on held-out rows, None if it was not measured; bytes are those of the tensors sent up and down; `prunes`
        and `failures` are counts.

        Raises:
            HetLoraError: The records cannot be read.
        """
        return RoundTable(
            {
                "round": item.number,
                "loss": item.loss,
                "perplexity": item.perplexity,
                "bytes_up": item.bytes_up,
                "bytes_down": item.bytes_down,
                "prunes": len(item.prunes),
                "failures": len(item.failures),
            }
            for item in self._recorded().rounds
        )

    def plot(self) -> Figure:
        """Return held-out perplexity and loss over the rounds as a plotly figure.

        Raises:
            HetLoraError: The run has no curve yet.
        """
        from hetlora.commands.report.charts import curves_chart
        from hetlora.commands.report.summary import grouped

        chart = curves_chart(grouped([self._recorded()]))
        if chart is None:
            raise HetLoraError(f"{str(self.folder)!r} has no curve: no round has a loss or a perplexity yet")
        return chart.figure

    def report(self, output: SourceOfRun | None = None) -> Path:
        """Write the page of ``hetlora report`` to `output`, by default ``report.html`` in the run's folder; return its path.

        Raises:
            HetLoraError: The page cannot be written.
        """
        from hetlora.commands.report import write_report

        return write_report([self.folder], self.folder / "report.html" if output is None else expand_path(output))

    def export(self, output: SourceOfRun | None = None, **part: Any) -> ExportResult:
        """Export what was learned for other programs, as ``hetlora export`` does.

        Args:
            output: A new folder; by default one within the run's.
            **part: `rank`, `tier`, `client`, `merged` and other arguments of `hetlora.export_run`.

        Raises:
            HetLoraError: As `hetlora.export_run`.
        """
        with set_up():  # before the import of torch
            from hetlora.commands.export.export import export_run

            return export_run(self, output, **part)

    def generate(self, prompt: str | Mapping[str, Any], **part: Any) -> str:
        """Return the greedy answer to one prompt; `hetlora.generate` answers many, also with the base.

        Args:
            prompt: The fields of a row for the run's template, or text, as in `hetlora.generate`.
            **part: `rank`, `tier`, `client`, `max_new_tokens` or `raw`, as in `hetlora.generate`.

        Raises:
            HetLoraError: As `hetlora.generate`; or `compare_base` is set.
        """
        if part.get("compare_base"):
            raise HetLoraError(
                "run.generate returns one text; hetlora.generate(run, prompt, compare_base=True) yields answers that have the "
                "base's beside them"
            )
        with set_up():
            from hetlora.commands.generate import generate

            [answer] = generate(self, [prompt], **part)
        return answer.text


def run(
    config: SourceOfRun | Mapping[str, Any] | RunConfig,
    *,
    changes: Changes = (),
    track: Sequence[str] | str = (),
    display: Observer | bool = False,
    observers: Sequence[Observer] | Observer = (),
    engine: str = "in-process",
) -> Run:
    """Run a federation as ``hetlora run`` does: measure the base, do the rounds, measure and write the result.

    Args:
        config: The run's TOML file, the same as plain data, or a validated configuration.
        changes: Changed keys: ``{"federation.rounds": 2}``, or a list of ``"federation.rounds=2"`` as for ``--set``.
        track: Names of trackers, besides those of `tracking.to`.
        display: Shows the progress; True shows it on standard error, by default nothing is shown. An error of an observer given
            here ends the run.
        observers: Called after the display; see `hetlora.Observer`. One that raises an error is dropped.
        engine: Where clients train, as for ``--engine``.

    Returns:
        The run, complete.

    Raises:
        HetLoraError: The run is not possible, or it cannot be written.
        KeyboardInterrupt: It was interrupted. If it had begun its rounds, what they have learned is written, and the text says
            how to resume.

    Example:
        >>> rows = {"path": "rows.jsonl", "target": "{answer}"}
        >>> settings = {"data": rows, "ranks": {"kind": "same", "rank": 4}, "training": {"steps": 5}}
        >>> run(settings, changes=["federation.rounds=2", "federation.clients_per_round=0"])
        Traceback (most recent call last):
        hetlora.errors.ConfigError: the configuration has 1 problem:
          federation.clients_per_round = 0: input should be greater than 0
    """
    with set_up():
        return _ended(start_run(_configured(config, changes, track), _seen_by(display, observers), engine))


def resume(
    folder: SourceOfRun,
    *,
    display: Observer | bool = False,
    observers: Sequence[Observer] | Observer = (),
    engine: str = "in-process",
) -> Run:
    """Resume a run from its newest checkpoint, as ``hetlora resume`` does; a complete one is returned as it is.

    Args:
        folder: The run's folder, or the run.
        display: As `hetlora.run`.
        observers: As `hetlora.run`; not called if the run is complete.
        engine: As `hetlora.run`.

    Raises:
        HetLoraError: There is no run, or it would not be the same run any more.
        KeyboardInterrupt: As `hetlora.run`.
    """
    folder = expand_path(folder)
    if read_summary(folder) is not None:
        return open_run(folder)
    with set_up():
        return _ended(resume_run(folder, _seen_by(display, observers), engine))


def compare(
    config: SourceOfRun | Mapping[str, Any],
    *,
    changes: Changes = (),
    jobs: int | None = None,
    display: bool = False,
) -> ComparisonResult:
    """Run several methods over several seeds and write one table, as ``hetlora compare`` does; called again, it goes on.

    Args:
        config: A run's TOML file with a `[compare]` table, or the same as plain data.
        changes: As `hetlora.run`.
        jobs: Runs at a time, instead of `compare.jobs`.
        display: Whether progress is shown on standard error.

    Returns:
        The comparison, which prints as its table. It has the `rows` and `notes` of the table, the raw figures (`results`) and
        the `folder`; `table()` returns the rows as dictionaries, and `report()` writes the page of ``hetlora report``.

    Raises:
        HetLoraError: The comparison is not possible, or its folder cannot be written.
        KeyboardInterrupt: Finished runs are kept.

    Example:
        >>> compare({"data": {"target": "{t}"}})
        Traceback (most recent call last):
        hetlora.errors.ConfigError: the configuration has 1 problem:
          [compare] is missing; examples/compare_stdlib.toml shows a whole comparison
    """
    from hetlora.config import read_named, with_changes

    with set_up():
        from hetlora.commands.compare import comparison
        from hetlora.commands.compare.display import CompareDisplay
        from hetlora.commands.compare.grid import plan
        from hetlora.runs.runner import explain_write_errors

        if isinstance(config, Mapping):
            planned = plan(with_changes(config, changes, "changes"), jobs=jobs)
        else:
            planned = plan(with_changes(read_named(expand_path(config)), changes, "changes"), str(config), jobs)
        with explain_write_errors(str(planned.folder)):
            return comparison.compare(planned, CompareDisplay(quiet=not display))


def open_run(folder: SourceOfRun) -> Run:
    """Open a run that has ended, was interrupted, or is still running.

    Raises:
        HetLoraError: The folder is no run.

    Example:
        >>> open_run("runs/nowhere")
        Traceback (most recent call last):
        hetlora.errors.HetLoraError: 'runs/nowhere' is not there; give the folder of a run, which is where its records.jsonl is
    """
    from hetlora.runs.reader import RECORDS, no_run, read_run

    folder = expand_path(folder)
    if not (folder / RECORDS).is_file():
        raise no_run(folder, RECORDS)
    return Run(read_run(folder).folder)


def start_run(config: RunConfig, display: Observer, engine: str) -> RunResult:
    """Execute a run in a new folder, in a process that is set up; Ctrl-C ends the rounds cleanly.

    Raises:
        HetLoraError: The run is not possible, or it cannot be written.
    """
    from hetlora.runs.runner import explain_write_errors
    from hetlora.runs.tracking import need_trackers

    need_trackers(config.tracking.to)
    with explain_write_errors(config.output):
        return _engine(engine).start(config, display)  # type: ignore[no-any-return]


def resume_run(folder: Path, display: Observer, engine: str) -> RunResult:
    """Resume a run that is not complete, in a process that is set up.

    Raises:
        HetLoraError: There is no run, it would not be the same, or it cannot be written.
    """
    from hetlora.runs.runner import explain_write_errors

    with explain_write_errors(str(folder)):
        return _engine(engine).resume(folder, display)  # type: ignore[no-any-return]


def _engine(name: str) -> ModuleType:
    """Return the module of an engine; Flower's simulation is an extra."""
    if name not in ENGINES:
        raise HetLoraError(f"engine {name!r} is not known; use one of {', '.join(ENGINES)}")
    if name == "flower-sim" and not (importlib.util.find_spec("flwr") and importlib.util.find_spec("ray")):
        raise HetLoraError("engine flower-sim needs Flower and Ray: pip install 'hetlora[flower]'")
    return importlib.import_module(ENGINES[name])


def _configured(
    config: SourceOfRun | Mapping[str, Any] | RunConfig, changes: Changes, track: Sequence[str] | str
) -> RunConfig:
    from hetlora.config import RunConfig, parse_config, read_named, with_changes, with_trackers

    source = "the configuration"
    if isinstance(config, RunConfig):
        if not changes and not track:
            return config
        document: Mapping[str, Any] = config.model_dump(mode="json", exclude_defaults=True)
    elif isinstance(config, Mapping):
        document = config
    else:
        document, source = read_named(expand_path(config)), str(config)
    document = with_changes(document, changes, "changes")
    document = with_trackers(document, [track] if isinstance(track, str) else track)
    document.pop("compare", None)  # one file serves a run and its comparison
    return parse_config(document, source)


def _seen_by(display: Observer | bool, observers: Sequence[Observer] | Observer) -> Observer:
    from hetlora.runs.display import choose_display
    from hetlora.runs.observer import Observers, as_display, check_observer

    shown = choose_display(quiet=not display) if isinstance(display, bool) else as_display(display)
    given = observers if isinstance(observers, Sequence) else [observers]
    others = [check_observer(item, f"observers[{index}]") for index, item in enumerate(given)]
    return Observers([shown], others) if others else shown


def _ended(result: RunResult) -> Run:
    """Return a finished run, or raise the interrupt that ended it."""
    folder = result.records.parent
    if result.interrupted:
        raise KeyboardInterrupt(f"kept the adapter of round {result.rounds}; hetlora.resume({str(folder)!r}) goes on")
    return Run(folder)


__getattr__ = former_names(__name__, begin=start_run, go_on=resume_run)
