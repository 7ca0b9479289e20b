"""A run in this process, built from its configuration: loading, measuring, training, writing results."""

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
from hetlora.errors import HetLoraError, expand_path
from hetlora.model.initial_adapter import initial_adapter
from hetlora.model.lora_model import locate_base
from hetlora.model.merge import write_merged
from hetlora.model.peft_files import export_adapter
from hetlora.runs.fingerprints import FileFingerprints, downloaded
from hetlora.runs.folder import make_folder
from hetlora.runs.observer import Observer
from hetlora.runs.parts import Parts, build_parts, simulation_engine
from hetlora.runs.reader import read_config
from hetlora.runs.records import RunRecord
from hetlora.runs.result import Measurement, RunResult
from hetlora.runs.resume import resume_as
from hetlora.runs.runner import Experiment, execute_run
from hetlora.training.evaluation import Answer, Score, client_scores, evaluate_generation, rows_to_generate, tier_scores

__all__ = ["BuiltExperiment", "LocalExperiment", "fresh_folder", "resume", "start"]


class BuiltExperiment(Experiment):
    """An experiment whose clients its configuration names, and whose server scores their held-out rows.

    Args:
        parts: The parts of the run.
        engine: Where its clients train.
        display: Shows the progress.
    """

    def __init__(self, parts: Parts, engine: Engine, display: Observer) -> None:
        self.display, self.engine, self.rounding = display, engine, 0.0
        self.config, self.method, self.robust = parts.config, parts.method, make_robust(parts.config)
        self.model, self.imported, self.data = parts.model, parts.imported, parts.data
        self.clients, self.measured = parts.clients, parts.measured
        self.allowance, self.training = parts.allowance, parts.training
        ranks = self.clients.ranks
        self.max_rank = ranks.largest  # no client has slots beyond it
        self.trainers = self._who_trains()
        tiers = tiers_of([ranks[name] for name in self.measured])
        self.tiers = {name: tiers[ranks[name]] for name in self.measured}
        self.generated_rows = rows_to_generate(self.data, self.measured, self.config.evaluation.generate)
        if self.config.evaluation.generate and not self.generated_rows:
            display.say("no ROUGE-L: no held-out row has a prompt to answer")

    def run(self) -> RunResult:
        """Run in a new folder, see `hetlora.runs.runner`. Ctrl-C ends the rounds cleanly."""
        return execute_run(self, fresh_folder(Path(self.config.output), self.config.name))

    def measure(self, state: ServerState | None, *, generate: bool = True) -> Measurement:
        """Score the measured clients' held-out rows with the adapter of `state`, or with the base if it is None.

        With `evaluation.adapter = "global"` all rows are scored with the whole adapter, with `"received"` each client's with
        the slots of its rank. Methods that keep adapters on the clients are always measured as received.
        """
        return self._measured(self._by_adapter(state), None if state is None else state.folded.delta, generate=generate)

    def measure_adapter(
        self, adapter: Adapter, folded: Mapping[str, Tensor] | None = None, *, generate: bool = True
    ) -> Measurement:
        """Score the measured clients' held-out rows with one adapter.

        Args:
            adapter: Factors `A [r, in]`, `B [out, r]`.
            folded: Change that is folded into the base, by module.
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
                # Without gradients a pass keeps no activations, so twice the tokens fit.
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
        """Write what the run has learned and return where; None if nobody trained.

        A global adapter becomes PEFT files with the slots that some client still has. Adapters of the clients become one folder
        each, listed in `index.json`. Changed weights and folded changes, which PEFT files cannot hold, become a whole model.
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
        # A client's name can be anything, even a path, so it is no folder's name.
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
        """Return the first state, with factors of the largest rank, drawn by the seed or imported."""
        seed = self.config.seed
        return ServerState(initial_adapter(self.model, self.max_rank, seed, self.imported), seed=seed)

    def cohort(self, round_number: int) -> Sequence[Client]:
        """Draw the clients of a round by seed and number."""
        size = min(self.config.federation.clients_per_round, len(self.trainers))
        cohort = sample_cohort(self.trainers, size, round_number, self.config.seed)
        if self.config.data.long_rows == "truncate" or self.method.clients == "pooled":
            return cohort
        # A long row gives several examples, so the rows are no bound of a client's examples.
        return [replace(client, examples=len(self.data.train(client.name))) for client in cohort]

    def ranks(self, state: ServerState) -> Mapping[str, Rank]:
        """Return the ranks of the listed clients; none if whole weights are trained."""
        if self.method.trains == "weights":
            return {}
        return {client.name: state.rank(client) for client in self._listed()}

    def digests(self) -> Mapping[str, str | None]:
        """Return digests of the local files that the run reads, and the commits of a base or tokenizer of the hub.

        A change of a data set of the hub is not noticed without `data.revision`.
        """
        return FileFingerprints().digests(self.config) | downloaded(self.config)

    def run_record(self) -> RunRecord:
        """Return the first record."""
        federation, counts = self.data.federation, self.data.counts
        return RunRecord(
            hetlora=__version__,
            config=json.loads(self.config.model_dump_json()),
            versions={name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
            | {"python": platform.python_version()},
            clients=len(self.clients),
            train_rows=federation.total("train"),
            test_rows=federation.total("test"),
            left_out_clients=len(federation.left_out),
            left_out_rows=sum(federation.left_out_rows.values()),
            truncated_rows=counts.truncated,
            empty_rows=counts.empty,
            counted_clients=counts.clients,
            modules=len(self.model.shapes),
            max_rank=self.max_rank,
            base_parameters=self.model.base.num_parameters(),  # tensors store two 4-bit weights per number
            trainable_parameters=self._trainable_parameters(),
            self_pruning=self.method.prune is not keep_rank,
            method=self.method.declared,
        )

    def _who_trains(self) -> Sequence[Client]:
        """Return the population of the cohorts."""
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
        """Yield the clients that results and records list: the measured ones, or the pooled client."""
        if isinstance(self.trainers, ClientList):
            return map(self.trainers.named, self.measured)
        return iter(self.trainers)

    def _trainable_parameters(self) -> dict[str, int]:
        """Return each listed client's trained parameters at its first rank, the larger number of two rounds."""
        first = self.first_state()
        trained: dict[str, int] = {}
        for client, state in itertools.product(self._listed(), (first, replace(first, round=1))):
            task = self.method.distribute(state, client)
            trained[client.name] = max(trained.get(client.name, 0), num_parameters(task.adapter, task.trains))
        return trained


class LocalExperiment(BuiltExperiment):
    """An experiment whose clients train in this process.

    Args:
        config: The validated run.
        display: Shows the progress.

    Raises:
        HetLoraError: Data, base or ranks do not allow the run; nothing is trained or written before.
    """

    def __init__(self, config: RunConfig, display: Observer) -> None:
        parts = build_parts(config, display)
        super().__init__(parts, simulation_engine(parts), display)


def start(config: RunConfig, display: Observer) -> RunResult:
    """Execute a run whose clients train in this process, in a new folder."""
    return LocalExperiment(config, display).run()


def resume(
    folder: Path, display: Observer, make: Callable[[RunConfig, Observer], Experiment] | None = None
) -> RunResult:
    """Resume a run, see `hetlora.runs.resume`; by default its clients train in this process."""
    if read_config(folder).flower.clients == "nodes":  # before a line about its checkpoints
        raise HetLoraError(
            f"{str(folder)!r} is a run over machines of their own (flower.clients = 'nodes'), where `flwr run` resumes it, see "
            "docs/deploy.md; a rehearsal is started again: hetlora flower local"
        )
    return resume_as(make or LocalExperiment, folder, display)


def fresh_folder(output: Path, name: str) -> Path:
    """Create `output/name`, or the first of `name-2`, `name-3` … that does not exist."""
    try:
        output = expand_path(output, strict=True)
        make_folder(output, exist_ok=True)
        for number in itertools.count(1):
            folder = output / (name if number == 1 else f"{name}-{number}")
            if not folder.exists():
                make_folder(folder)
                break
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
        raise HetLoraError(f"cannot write to {str(output)!r}: {error}; set output to a folder you own") from error
    return folder
