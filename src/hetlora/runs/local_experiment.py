"""A whole run from its configuration: what is loaded, measured, trained and written, in this process."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from hetlora._version import __version__
from hetlora.config import RunConfig
from hetlora.config.build import make_robust
from hetlora.core.adapter import Adapter, Rank, num_parameters
from hetlora.core.client_list import ClientList
from hetlora.core.method import Engine, keep_rank
from hetlora.core.ranks import same_ranks, tiers_of
from hetlora.core.sampling import sample_cohort
from hetlora.core.types import Client, ServerState
from hetlora.errors import HetLoraError
from hetlora.model.initial_adapter import initial_adapter
from hetlora.model.lora_model import locate_base
from hetlora.model.merge import write_merged
from hetlora.model.peft_files import export_adapter
from hetlora.runs.fingerprints import FileFingerprints, downloaded
from hetlora.runs.folder import make_folder
from hetlora.runs.observer import Observer
from hetlora.runs.parts import Parts, build_parts, simulation_engine
from hetlora.runs.records import RunRecord
from hetlora.runs.result import Measurement, RunResult
from hetlora.runs.resume import resume_as
from hetlora.runs.runner import Experiment, execute_run
from hetlora.training.evaluation import Answer, Score, client_scores, evaluate_generation, rows_to_generate, tier_scores

__all__ = ["BuiltExperiment", "LocalExperiment", "fresh_folder", "resume", "start"]


class BuiltExperiment(Experiment):
    """A federation of the clients of its configuration, ready to run; the server scores their held-out rows.

    Args:
        parts: What it is made of.
        engine: Where its clients train.
        display: Is told what goes on.
    """

    def __init__(self, parts: Parts, engine: Engine, display: Observer) -> None:
        self.display, self.engine, self.rounding = display, engine, 0.0
        self.config, self.method, self.robust = parts.config, parts.method, make_robust(parts.config)
        self.model, self.imported, self.data = parts.model, parts.imported, parts.data
        self.clients, self.measured = parts.clients, parts.measured
        self.allowance, self.training = parts.allowance, parts.training
        ranks = self.clients.ranks
        self.max_rank = ranks.largest  # slots beyond it would be nobody's
        self.trainers = self._who_trains()
        tiers = tiers_of([ranks[name] for name in self.measured])
        self.tiers = {name: tiers[ranks[name]] for name in self.measured}
        self.generated_rows = rows_to_generate(self.data, self.measured, self.config.evaluation.generate)
        if self.config.evaluation.generate and not self.generated_rows:
            display.say("no ROUGE-L: no held-out row has a prompt to answer")

    def run(self) -> RunResult:
        """Run in a folder of its own, see `hetlora.runs.runner`. Ctrl-C ends the rounds cleanly."""
        return execute_run(self, fresh_folder(Path(self.config.output), self.config.name))

    def measure(self, state: ServerState | None, *, generate: bool = True) -> Measurement:
        """Score the measured clients' held-out rows: under the base where `state` is None, else the federation's adapter.

        With `evaluation.adapter = "global"` that is the whole adapter for all; with `"received"` each client's rows are
        scored under what it would be served with, the slots of its own rank. A personal method, which keeps something on the
        client, is always measured as received.
        """
        return self._measured(self._by_adapter(state), None if state is None else state.folded.delta, generate=generate)

    def measure_adapter(
        self, adapter: Adapter, folded: Mapping[str, Tensor] | None = None, *, generate: bool = True
    ) -> Measurement:
        """Score the measured clients' held-out rows, all of them under one adapter.

        Args:
            adapter: Factors `A [r, in]`, `B [out, r]`.
            folded: What is folded into the base.
            generate: Whether answers are generated, too.
        """
        return self._measured([(adapter, self.measured)], folded, generate=generate)

    def _measured(
        self,
        by_adapter: Iterable[tuple[Adapter | None, Sequence[str]]],
        folded: Mapping[str, Tensor] | None,
        *,
        generate: bool,
    ) -> Measurement:
        scores: dict[str, Score] = {}
        generated: list[Answer] = []
        for adapter, names in by_adapter:
            scores |= client_scores(
                self.model,
                self.data,
                names,
                adapter,
                folded,
                # Without gradients a pass keeps nothing: twice the tokens fit where one was trained.
                tokens_a_pass=2 * self.allowance.tokens_a_pass,
                workers=self.allowance.workers,
            )
            own = set(names)
            rows = [row for row in self.generated_rows if row[0] in own] if generate else []
            if rows:
                longest = self.config.evaluation.max_new_tokens
                generated += evaluate_generation(self.model, self.data, rows, adapter, longest, folded)
        place = {(name, row.prompt, row.target): index for index, (name, row) in enumerate(self.generated_rows)}
        generated.sort(key=lambda answer: place[answer.client, answer.prompt, answer.expected])
        for answer in generated:
            scores[answer.client] += Score(rouge=answer.rouge_l, generated=1)
        in_order = {name: scores[name] for name in self.measured if name in scores}
        return Measurement(in_order, tier_scores(in_order, self.tiers), tuple(generated))

    def write_result(self, state: ServerState, folder: Path) -> Path | None:
        """Write what the run has learned and return where; None where nobody trained.

        A global adapter becomes PEFT files (the slots that some client still has), adapters that stayed with their clients a
        folder each, named by `index.json`, and what PEFT's files cannot hold, a whole model: changed weights, or a change
        folded into the base.
        """
        base = self.config.model.base
        if self.method.clients == "nobody":
            return None
        if self.method.trains == "weights" or state.folded.delta:
            merged = folder / "model"
            tokenizer = self.config.model.tokenizer or base
            write_merged(self.model, state.adapter, state.folded.delta, merged, base=base, tokenizer=tokenizer)
            return merged
        if self.method.keep is None:
            self._export(state.owned_slots(self.trainers), folder / "adapter")
            return folder / "adapter"
        own = [self.clients.named(name) for name in self.data.federation.names if name in state.kept]
        folders = {client.name: f"{number:05d}" for number, client in enumerate(own)}
        adapters = folder / "adapters"
        adapters.mkdir()
        # A client's name can be anything, a path included, so it names no folder.
        (adapters / "index.json").write_text(json.dumps(folders, ensure_ascii=False, indent=1), encoding="utf8")
        for client in own:
            self._export(self.method.distribute(state.serving_state, client).adapter, adapters / folders[client.name])
        return adapters

    def _export(self, adapter: Adapter, folder: Path) -> None:
        export_adapter(
            adapter,
            folder,
            base=locate_base(self.config.model.base),
            target_modules=self.model.target_modules,
            scaling=self.model.scaling,
            fan_in_fan_out=self.model.fan_in_fan_out,
        )

    @property
    def rounds(self) -> int:
        """Rounds of the run; none where the method trains nobody."""
        return 0 if self.method.clients == "nobody" else self.config.federation.rounds

    def first_state(self) -> ServerState:
        """Return the state before the first round: factors of the largest rank, drawn by the seed or imported."""
        seed = self.config.seed
        return ServerState(initial_adapter(self.model, self.max_rank, seed, self.imported), seed=seed)

    def cohort(self, round_number: int) -> Sequence[Client]:
        """Draw the clients of a round, by seed and number alone."""
        size = min(self.config.federation.clients_per_round, len(self.trainers))
        cohort = sample_cohort(self.trainers, size, round_number, self.config.seed)
        if self.config.data.long_rows == "truncate" or self.method.clients == "pooled":
            return cohort
        # Of a long row there are several examples, and nobody can use more than there are.
        return [replace(client, examples=len(self.data.train(client.name))) for client in cohort]

    def ranks(self, state: ServerState) -> Mapping[str, Rank]:
        """Return the ranks of the clients that results list one by one; none where whole weights are trained."""
        if self.method.trains == "weights":
            return {}
        return {client.name: state.rank(client) for client in self._listed()}

    def digests(self) -> Mapping[str, str | None]:
        """Return digests of the local files that the run reads, and the commits of a base or tokenizer of the hub.

        A data set of the hub counts by its name and `data.revision` alone: without one, what it holds may change unnoticed.
        """
        return FileFingerprints().digests(self.config) | downloaded(self.config)

    def run_record(self) -> RunRecord:
        """Return the first record: what is run, with which versions."""
        federation, counts = self.data.federation, self.data.counts
        return RunRecord(
            hetlora=__version__,
            config=json.loads(self.config.model_dump_json()),
            versions={name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
            | {"python": platform.python_version()},
            clients=len(self.clients),
            train_rows=federation.total("train"),
            test_rows=federation.total("test"),
            left_out_clients=federation.left_out_clients,
            left_out_rows=sum(federation.left_out_rows.values()),
            truncated_rows=counts.truncated,
            empty_rows=counts.empty,
            counted_clients=counts.clients,
            modules=len(self.model.shapes),
            max_rank=self.max_rank,
            base_parameters=self.model.base.num_parameters(),  # weights of 4 bits lie two in a number
            trainable_parameters=self._trainable_parameters(),
            self_pruning=self.method.prune is not keep_rank,
            method=self.method.declared,
        )

    def _who_trains(self) -> Sequence[Client]:
        """Return the population that cohorts are drawn from."""
        if self.method.trains == "weights":
            return ClientList(same_ranks(self.clients.ranks.names, 1), self.clients.rows)
        if self.method.clients == "pooled":
            return [Client("everyone", self.max_rank, sum(1 for _ in self.data.pooled()))]
        return [] if self.method.clients == "nobody" else self.clients

    def _by_adapter(self, state: ServerState | None) -> Iterator[tuple[Adapter | None, Sequence[str]]]:
        """Group clients by the adapter that scores their rows."""
        if state is None:
            yield None, self.measured
        elif self.method.keep is None and (
            self.config.evaluation.adapter == "global" or self.trainers is not self.clients
        ):
            yield state.owned_slots(self.trainers), self.measured
        else:
            groups: dict[tuple[bool, str], list[Client]] = {}
            for client in map(self.clients.named, self.measured):
                own = client.name in state.kept
                groups.setdefault((own, client.name if own else json.dumps(state.rank(client))), []).append(client)
            for group in groups.values():
                yield self.method.distribute(state.serving_state, group[0]).adapter, [client.name for client in group]

    def _listed(self) -> Iterator[Client]:
        """Yield the clients that results and records list one by one: those that train, of a federation the measured ones."""
        if isinstance(self.trainers, ClientList):
            return map(self.trainers.named, self.measured)
        return iter(self.trainers)

    def _trainable_parameters(self) -> dict[str, int]:
        """Return how many numbers each listed client trains at its first rank; where rounds differ, in that of the most."""
        first = self.first_state()
        most: dict[str, int] = {}
        for client, state in itertools.product(self._listed(), (first, replace(first, round=1))):
            task = self.method.distribute(state, client)
            most[client.name] = max(most.get(client.name, 0), num_parameters(task.adapter, task.trains))
        return most


class LocalExperiment(BuiltExperiment):
    """A federation whose clients train in this process, made from its configuration.

    Args:
        config: The validated run.
        display: Is told what goes on.

    Raises:
        HetLoraError: Data, base or ranks do not allow the run; raised before anything is trained or written.
    """

    def __init__(self, config: RunConfig, display: Observer) -> None:
        parts = build_parts(config, display)
        super().__init__(parts, simulation_engine(parts), display)


def start(config: RunConfig, display: Observer) -> RunResult:
    """Conduct a run whose clients train in this process, in a folder of its own."""
    return LocalExperiment(config, display).run()


def resume(
    folder: Path, display: Observer, make: Callable[[RunConfig, Observer], Experiment] | None = None
) -> RunResult:
    """Resume a run, see `hetlora.runs.resume`; by default its clients train in this process."""
    return resume_as(make or LocalExperiment, folder, display)


def fresh_folder(output: Path, name: str) -> Path:
    """Create `output/name`, or the first of `name-2`, `name-3` … that does not exist: no run writes over another."""
    try:
        output = output.expanduser()
        make_folder(output, exist_ok=True)
        for number in itertools.count(1):
            folder = output / (name if number == 1 else f"{name}-{number}")
            if not folder.exists():
                make_folder(folder)
                break
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
        raise HetLoraError(f"cannot write to {str(output)!r}: {error}; set output to a folder you own") from error
    return folder
