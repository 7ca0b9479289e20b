"""Checks of a comparison before anything runs or is written: everything that the start of one of its runs would refuse."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from hetlora.commands.compare.grid import Comparison, PlannedRun
from hetlora.commands.compare.workers import read_result
from hetlora.config import RunConfig
from hetlora.config.build import assign_ranks, cost_model, make_method
from hetlora.config.build_data import load_federation, make_tokenization
from hetlora.config.preconditions import check_cohort, check_length
from hetlora.data import Federation, Row
from hetlora.errors import ConfigError, HetLoraError
from hetlora.model.lora_model import build_base, load_tokenizer, pick_device
from hetlora.runs.tracking import need_trackers

__all__ = ["check_comparison"]


def check_comparison(comparison: Comparison) -> None:
    """Check the runs of a comparison that are to be done; data, tokenizers and bases that runs share are read once.

    Raises:
        ConfigError: Lists all problems, each with the labels of its methods.
    """
    need_trackers(list({name: None for run in _all_runs(comparison) for name in run.config.tracking.to}))
    checks, metric = _Checks(), comparison.settings.metric
    found: dict[str, list[str]] = {}
    for runs in _by_data(_to_do(comparison)):
        for run, problem in _problems(runs, checks, metric):
            found.setdefault(problem, []).append(run.label)
    if found:
        lines = [f"{', '.join(dict.fromkeys(labels))}: {problem}" for problem, labels in found.items()]
        raise ConfigError("the comparison", lines)


def _all_runs(comparison: Comparison) -> Iterator[PlannedRun]:
    for method in comparison.methods:
        yield from (*method.tuning.values(), *next(iter(method.final.values())))


def _to_do(comparison: Comparison) -> Iterator[PlannedRun]:
    """Yield the runs without a result. Finished runs at one rate show that those at another rate can be done, too."""
    for method in comparison.methods:
        yield from (run for run in method.tuning.values() if read_result(run.folder) is None)
        if not any(all(read_result(run.folder) for run in runs) for runs in method.final.values()):
            yield from next(iter(method.final.values()))


def _by_data(planned: Iterable[PlannedRun]) -> list[list[PlannedRun]]:
    """Group the runs by their rows; of runs that differ only in the learning rate, keep the first."""
    groups: dict[str, dict[tuple[str, str], PlannedRun]] = {}
    for run in planned:
        own = {"name", "output", "threads"}
        rows = run.config.model_dump_json(exclude={*own, "method", "training", "model", "ranks"})
        rest = run.config.model_copy(update={"training": run.config.training.model_copy(update={"learning_rate": 1.0})})
        key = (run.label, rest.model_dump_json(exclude=own))
        groups.setdefault(rows, {}).setdefault(key, run)
    return [list(group.values()) for group in groups.values()]


def _problems(runs: Sequence[PlannedRun], checks: _Checks, metric: str) -> Iterator[tuple[PlannedRun, str]]:
    try:
        federation = load_federation(runs[0].config)
    except HetLoraError as error:
        yield from ((run, problem) for run in runs for problem in _messages(error))
        return
    for run in runs:
        for check in (checks.model, checks.clients, checks.rows):
            try:
                check(run.config, federation)
            except HetLoraError as error:
                yield from ((run, problem) for problem in _messages(error))
        if metric == "rougeL" and not _has_prompts(federation):
            rows = "validation" if run.tuning else "held-out"
            yield (
                run,
                f"compare.metric = 'rougeL': no {rows} row has a prompt to answer; set data.prompt, or the metric",
            )


def _messages(error: HetLoraError) -> Sequence[str]:
    return error.problems if isinstance(error, ConfigError) else [str(error)]


def _has_prompts(federation: Federation) -> bool:
    return any(row.prompt and row.target.strip() for rows in federation.holdings() for row in rows.test)


@dataclass
class _Checks:
    """The checks of a run against its data; checks are cached."""

    known: dict[str, HetLoraError | None] = field(default_factory=dict)
    tokenizers: dict[str, Any] = field(default_factory=dict)
    rendered: set[tuple[str, int, Row]] = field(default_factory=set)

    def model(self, config: RunConfig, _: Federation) -> None:
        """Check the device, the base, its target modules and the longest row."""
        key = repr((config.model.model_dump_json(), config.data.max_length, _trains_weights(config)))
        if key not in self.known:
            try:
                _check_base(config)
                self.known[key] = None
            except HetLoraError as error:
                self.known[key] = error
        if (known := self.known[key]) is not None:
            raise known

    def clients(self, config: RunConfig, federation: Federation) -> None:
        """Check the cohort and the ranks against the clients."""
        check_cohort(config, len(federation.clients))
        assign_ranks(config, federation.counts("train"))

    def rows(self, config: RunConfig, federation: Federation) -> None:
        """Check the tokenizer, and that its template accepts all conversations; other rows can always be tokenized."""
        name = config.model.tokenizer or config.model.base
        if name not in self.tokenizers:
            self.tokenizers[name] = load_tokenizer(name)
        tokenization = make_tokenization(config, self.tokenizers[name])
        if not config.data.is_chat:
            return
        for rows in federation.holdings():
            for row in (*rows.train, *rows.test):
                if (key := (name, config.data.max_length, row)) not in self.rendered:
                    tokenization.examples([row])
                    self.rendered.add(key)


def _trains_weights(config: RunConfig) -> bool:
    return make_method(config).trains == "weights"


def _check_base(config: RunConfig) -> None:
    pick_device(config.model.device)
    if _trains_weights(config):  # whatever modules it has
        with FakeTensorMode():
            base = build_base(config.model.base)
    else:
        base = cost_model(config).model.base
    check_length(config, base.config)
