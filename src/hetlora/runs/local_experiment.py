"""A whole run from its configuration: what is loaded, measured, trained and written, in this process."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hetlora._version import __version__
from hetlora.config import RunConfig, read_written
from hetlora.config.build import assign_ranks, cost_model, local_training, make_method, make_robust
from hetlora.config.build_data import load_federation, make_tokenization
from hetlora.config.preconditions import check_cohort, check_fit, emulation_note
from hetlora.core.adapter import Adapter, Rank, num_parameters
from hetlora.core.client_list import Members, draw_measured
from hetlora.core.method import Engine, keep_rank
from hetlora.core.population import MANY
from hetlora.core.ranks import same_ranks, tiers_of
from hetlora.core.sampling import DropOuts, sample_cohort
from hetlora.core.types import Client, ServerState
from hetlora.data import Example, Federation, TokenizedFederation
from hetlora.errors import ConfigError, HetLoraError
from hetlora.model.full_model import FullModel
from hetlora.model.initial_adapter import describe_import, first_adapter, import_adapter
from hetlora.model.lora_model import LoraModel, load_base, load_tokenizer, locate_base, pick_device
from hetlora.model.merge import write_merged
from hetlora.model.peft_files import export_adapter
from hetlora.runs.checkpoint import newest
from hetlora.runs.fingerprints import Digests, downloaded
from hetlora.runs.folder import make_folder, run_lock
from hetlora.runs.memory import Allowance, fit_memory
from hetlora.runs.observer import Observer
from hetlora.runs.records import RunRecord, holds_rounds
from hetlora.runs.result import Measurement, RunResult
from hetlora.runs.runner import Undertaking, execute_run, execute_run_within
from hetlora.runs.tracking import need_trackers
from hetlora.training.evaluation import Answer, Score, answers, client_scores, spread, tier_scores
from hetlora.training.local import LocalTraining
from hetlora.training.simulation import SimulationEngine

__all__ = ["Experiment", "fresh_folder", "resume"]


class Experiment(Undertaking):
    """A federation ready to run: its data, ranks, model, method and engine.

    Args:
        config: The validated run.
        display: Is told what goes on.

    Raises:
        HetLoraError: Data, base or ranks do not allow the run; raised before anything is trained or written.
    """

    def __init__(self, config: RunConfig, display: Observer) -> None:
        self.config = config
        self.display = display
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.flower.clients == "nodes":
            problem = "flower.clients = 'nodes': they are on machines of their own; start it by `flwr run`, see docs/deploy.md"
            raise ConfigError("the configuration", [problem])
        federation = load_federation(config)
        names = federation.names
        display.say(_describe_data(federation))
        check_cohort(config, len(names))
        rows = federation.counts("train")
        first_ranks = assign_ranks(config, rows)
        self.max_rank = first_ranks.largest  # slots beyond it would be nobody's

        device = pick_device(config.model.device)
        display.say(f"loading {config.model.base} onto {device}")
        dtype = getattr(torch, config.model.dtype)
        if note := emulation_note(dtype, device):
            display.say(note)
        base = load_base(config.model.base, dtype=dtype, device=device, quantize=config.model.quantize)
        tokenizer = load_tokenizer(config.model.tokenizer or config.model.base)
        check_fit(config, base, tokenizer)
        self.base_parameters = base.num_parameters()  # weights of 4 bits lie two in a number
        self.method = make_method(config)
        self.robust = make_robust(config)
        targets = config.model.target_modules
        self.model = (
            FullModel(base)
            if self.method.trains == "weights"
            else LoraModel(base, target_modules=targets, scaling=config.model.scaling)
        )
        self.imported = None
        if config.model.adapter is not None:
            self.imported = import_adapter(config.model.adapter, self.model)
            display.say(describe_import(config.model.adapter, self.imported, self.max_rank))
        self.data = TokenizedFederation(federation, make_tokenization(config, tokenizer))
        display.say(_describe_tokens(self.data))
        self.clients = Members(first_ranks, rows)
        self.trainers = self._who_trains()
        self.measured = draw_measured(names, config.evaluation.clients, config.seed)
        if len(self.measured) > MANY:
            display.say(f"each measurement is of all {len(names)} clients; evaluation.clients takes some of them")
        tiers = tiers_of([first_ranks[name] for name in self.measured])
        self.tiers = {name: tiers[first_ranks[name]] for name in self.measured}
        self.allowance = self._allowance()
        self.training = self._training()
        self.rounding = 0.0
        self.engine = self._make_engine()
        self.generated_rows = spread(self.data, self.measured, config.evaluation.generate)
        if config.evaluation.generate and not self.generated_rows:
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
                generated += answers(self.model, self.data, rows, adapter, longest, folded)
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
            self._export(state.used(self.trainers), folder / "adapter")
            return folder / "adapter"
        own = [self.clients.named(name) for name in self.data.federation.names if name in state.kept]
        folders = {client.name: f"{number:05d}" for number, client in enumerate(own)}
        adapters = folder / "adapters"
        adapters.mkdir()
        # A client's name can be anything, a path included, so it names no folder.
        (adapters / "index.json").write_text(json.dumps(folders, ensure_ascii=False, indent=1), encoding="utf8")
        for client in own:
            self._export(self.method.distribute(state.served, client).adapter, adapters / folders[client.name])
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
        return ServerState(first_adapter(self.model, self.max_rank, seed, self.imported), seed=seed)

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
        return Digests().digests(self.config) | downloaded(self.config)

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
            base_parameters=self.base_parameters,
            trainable_parameters=self._trainable_parameters(),
            self_pruning=self.method.prune is not keep_rank,
            method=self.method.declared,
        )

    def _who_trains(self) -> Sequence[Client]:
        """Return the population that cohorts are drawn from."""
        if self.method.trains == "weights":
            return Members(same_ranks(self.clients.ranks.names, 1), self.clients.rows)
        if self.method.clients == "pooled":
            return [Client("everyone", self.max_rank, sum(1 for _ in self.data.pooled()))]
        return [] if self.method.clients == "nobody" else self.clients

    def _allowance(self) -> Allowance:
        """Return how much is worked on at once, within `memory_megabytes` where it is set."""
        if self.config.memory_megabytes is None:
            return Allowance()
        if self.method.trains == "weights":
            problem = (
                "memory_megabytes: method full trains one client at a time and takes what `hetlora plan` says; drop it"
            )
            raise ConfigError("the configuration", [problem])
        allowance = fit_memory(self.config, cost_model(self.config), self.max_rank, torch.get_num_threads())
        assert allowance.predicted is not None
        self.display.say(
            f"memory: {allowance.predicted / 1e6:.0f} MB predicted, with {allowance.tokens_a_pass} tokens a pass, "
            f"{allowance.workers} passes at once and at most {allowance.clients_a_group} clients in each"
        )
        return allowance

    def _training(self) -> LocalTraining:
        """Return what a client does in a round; one that holds all rows does the work of a whole cohort."""
        settings = local_training(self.config)
        if self.method.clients != "pooled":
            return settings
        some = sample_cohort(self.data.federation.names, min(MANY, len(self.clients)), 0, self.config.seed)
        mean = sum(settings.count(len(self.data.train(name))) for name in some) / len(some)
        steps = max(1, round(self.config.federation.clients_per_round * mean))
        return replace(settings, steps=steps, epochs=None)

    def _make_engine(self) -> Engine:
        pooled = self.method.clients == "pooled"
        federation = self.config.federation
        engine = SimulationEngine(
            self.model,
            _Pooled(self.data) if pooled else self.data,
            self.training,
            seed=self.config.seed,
            tokens_a_pass=self.allowance.tokens_a_pass,
            workers=self.allowance.workers,
            clients_a_group=self.allowance.clients_a_group,
        )
        if not federation.dropout or pooled:
            return engine
        return DropOuts(engine, federation.dropout, federation.dropout_when, self.config.seed)

    def _by_adapter(self, state: ServerState | None) -> Iterator[tuple[Adapter | None, Sequence[str]]]:
        """Group clients by the adapter that scores their rows."""
        if state is None:
            yield None, self.measured
        elif self.method.keep is None and (
            self.config.evaluation.adapter == "global" or self.trainers is not self.clients
        ):
            yield state.used(self.trainers), self.measured
        else:
            groups: dict[tuple[bool, str], list[Client]] = {}
            for client in map(self.clients.named, self.measured):
                own = client.name in state.kept
                groups.setdefault((own, client.name if own else json.dumps(state.rank(client))), []).append(client)
            for group in groups.values():
                yield self.method.distribute(state.served, group[0]).adapter, [client.name for client in group]

    def _listed(self) -> Iterator[Client]:
        """Yield the clients that results and records list one by one: those that train, of a federation the measured ones."""
        if isinstance(self.trainers, Members):
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


def resume(
    folder: Path, display: Observer, make: Callable[[RunConfig, Observer], Undertaking] | None = None
) -> RunResult:
    """Go on with a run of this process or another, from its newest checkpoint, or from round 0 where there is none.

    Args:
        folder: Of the run.
        display: Is told what goes on.
        make: What the run is made of; by default an `Experiment`, in this process.

    Raises:
        HetLoraError: There is no run, or it is no longer the same: its configuration, base, tokenizer or data, the versions or
            the device; or it has rounds and keeps no checkpoints; and what `hetlora.runs.runner.execute_run` raises.
    """
    config = read_written(folder / "config.json")
    need_trackers(config.tracking.to)
    with run_lock(folder):  # from the reading of the checkpoint on: nobody may go on from it meanwhile
        resumed = newest(folder, display.say)
        if resumed is None and not config.checkpoint_every and holds_rounds(folder / "records.jsonl"):
            raise HetLoraError(
                f"{str(folder)!r} has done rounds and keeps no checkpoints (checkpoint_every = 0), so that it cannot go on; "
                "begin it again by hetlora run, or move its records.jsonl away to begin it anew in its folder"
            )
        if resumed is None:
            display.say("no checkpoint: beginning at round 0")
        else:
            display.say(f"going on from round {resumed.progress.state.round}")
            torch.set_num_threads(resumed.threads)
        return execute_run_within((make or Experiment)(config, display), folder, resumed)


@dataclass(frozen=True)
class _Pooled:
    """All training rows as those of one client."""

    data: TokenizedFederation

    def train(self, _: str) -> list[Example]:
        return list(self.data.pooled())


def _describe_data(federation: Federation) -> str:
    parts = [
        f"data: {len(federation.clients)} clients",
        f"{federation.total('train')} training rows, {federation.total('test')} held out",
    ]
    if federation.sampled is not None:
        pool = federation.sampled.pool
        parts.append(f"drawn from {len(pool.train)} training rows and {len(pool.test)} held out")
    if federation.left_out_clients:
        parts.append(f"{federation.left_out_clients} clients left out (not drawn, too few rows, or none held out)")
    if federation.left_out_rows:
        parts.append(f"{sum(federation.left_out_rows.values())} rows on neither side of the split")
    return "; ".join(parts)


def _describe_tokens(data: TokenizedFederation) -> str:
    counts = data.counts
    parts = [f"{counts.tokens} training tokens"]
    if counts.clients < len(data.federation.clients):
        parts[0] += f" with {counts.clients} clients, which alone are counted"
    if counts.truncated:
        parts.append(f"{counts.truncated} rows cut to data.max_length")
    if counts.empty:
        parts.append(f"{counts.empty} rows dropped for an empty target")
    return "; ".join(parts)


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
