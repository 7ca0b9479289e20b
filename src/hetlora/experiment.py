"""A whole run from its configuration: what is loaded, measured, trained and written, in this process."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from hetlora.adapter import Adapter, Rank, live_slots, rank_of, truncate
from hetlora.cohort import sample_cohort
from hetlora.config import RunConfig
from hetlora.data import ClientRows, Federation, Row, Split, Template, Tokenization, TokenizedFederation, read_jsonl
from hetlora.errors import ConfigError, HetLoraError, ModelError
from hetlora.evaluation import Answer, Score, answers, client_scores, spread, tier_scores, total_score
from hetlora.federated import Client, RoundReport, ServerState, keep_rank, run
from hetlora.lora_model import LoraModel, load_base, load_tokenizer, locate_base, pick_device
from hetlora.methods import METHODS
from hetlora.peft_io import export_adapter
from hetlora.ranks import explicit_ranks, power_law_ranks, same_ranks, tier_of, tiered_ranks, uniform_ranks
from hetlora.records import EvaluationRecord, Records, RoundRecord, RunRecord, plain
from hetlora.simulation import SimulationEngine
from hetlora.training import LocalTraining

__all__ = ["Display", "Experiment", "Measurement", "RunResult", "assign_ranks"]


class Display(Protocol):
    """What a run tells while it goes on."""

    def say(self, text: str) -> None:
        """Tell one thing, once."""

    def begin_rounds(self, total: int) -> None:
        """Rounds begin."""

    def end_round(self, record: RoundRecord) -> None:
        """A round is over."""

    def end_rounds(self) -> None:
        """The rounds are over, or were interrupted."""


@dataclass(frozen=True)
class Measurement:
    """Scores on held-out rows: by client, added up by tier and over all; and the answers generated for them."""

    clients: Mapping[str, Score]
    tiers: Mapping[str, Score]
    answers: tuple[Answer, ...]

    @property
    def overall(self) -> Score:
        """Return the score over all rows."""
        return total_score(self.clients.values())

    def summary(self) -> dict[str, Any]:
        """Return `perplexity` and `rougeL` over all, `tiers` and `clients`, as plain data."""
        parts = {"tiers": self.tiers, "clients": self.clients}
        return {
            **_figures(self.overall),
            **{part: {name: _figures(score) for name, score in scores.items()} for part, scores in parts.items()},
        }


def _figures(score: Score) -> dict[str, Any]:
    return {"perplexity": score.perplexity, "rougeL": score.rouge_l}


@dataclass(frozen=True)
class RunResult:
    """What a run gives: figures for a program, paths for a person.

    Attributes:
        name: The name of the run.
        base: Measurement of the base model.
        final: Measurement of the last global adapter; None where the run was interrupted before it.
        state: The last server state.
        rounds: Rounds done.
        ranks: Every client's rank at the end.
        prunes: Number of prunes.
        updates: Number of updates that were admitted.
        failures: Number of times a client was asked and gave nothing that could be used.
        bytes_up: Bytes of the tensors of admitted updates.
        bytes_down: Bytes of the tensors sent to clients.
        seconds: Wall-clock time from loaded to written.
        adapter: Folder with the global adapter as PEFT files.
        records: The records file.
        interrupted: Whether Ctrl-C ended it.
    """

    name: str
    base: Measurement
    final: Measurement | None
    state: ServerState
    rounds: int
    ranks: Mapping[str, Any]
    prunes: int
    updates: int
    failures: int
    bytes_up: int
    bytes_down: int
    seconds: float
    adapter: Path
    records: Path
    interrupted: bool

    def summary(self) -> dict[str, Any]:
        """Return the result as plain data, the object that ``hetlora run --json`` prints."""
        return plain(  # type: ignore[no-any-return]
            {
                "name": self.name,
                "base": self.base.summary(),
                "final": self.final.summary() if self.final else None,
                "rounds": self.rounds,
                "ranks": self.ranks,
                "prunes": self.prunes,
                "updates": self.updates,
                "failures": self.failures,
                "bytes_up": self.bytes_up,
                "bytes_down": self.bytes_down,
                "seconds": round(self.seconds, 2),
                "adapter": str(self.adapter),
                "records": str(self.records),
                "interrupted": self.interrupted,
            }
        )


class Experiment:
    """A federation ready to run: its data, ranks, model, method and engine.

    Args:
        config: The validated run.
        display: Is told what goes on.

    Raises:
        HetLoraError: Data, base or ranks do not allow the run; raised before anything is trained or written.
    """

    def __init__(self, config: RunConfig, display: Display) -> None:
        self.config = config
        self.display = display
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        federation = load_federation(config)
        names = list(federation.clients)
        display.say(_describe_data(federation))
        asked = config.federation.clients_per_round
        if asked > len(names):
            problem = f"federation.clients_per_round = {asked}: the data have {len(names)} clients; use at most that"
            raise ConfigError("the configuration", [problem])
        first_ranks = assign_ranks(config, names)

        device = pick_device(config.model.device)
        display.say(f"loading {config.model.base} onto {device}")
        base = load_base(config.model.base, dtype=getattr(torch, config.model.dtype), device=device)
        tokenizer = load_tokenizer(config.model.tokenizer or config.model.base)
        _check_fit(config, base, tokenizer)
        self.pad_id = int(tokenizer.pad_token_id)
        self.base_parameters = sum(parameter.numel() for parameter in base.parameters())
        self.model = LoraModel(base, target_modules=config.model.target_modules, scaling=config.model.scaling)
        tokenization = Tokenization(tokenizer, config.data.max_length, config.data.long_rows)
        self.data = TokenizedFederation(federation, tokenization)
        self.clients = [Client(name, first_ranks[name], len(self.data.train(name))) for name in names]
        tiers = {rank: tier_of(rank, list(first_ranks.values())) for rank in set(first_ranks.values())}
        self.tiers = {name: tiers[rank] for name, rank in first_ranks.items()}
        self.method = METHODS[config.method.name](**config.method.arguments)
        self.engine = SimulationEngine(
            self.model, self.data, _local_training(config), seed=config.seed, pad_id=self.pad_id
        )
        self.generated_rows = spread(self.data, names, config.evaluation.generate)
        if config.evaluation.generate and not self.generated_rows:
            display.say("no ROUGE-L: no held-out row has a prompt to answer")

    def run(self) -> RunResult:
        """Measure the base, do the rounds, measure the result, write the adapter. Ctrl-C ends the rounds cleanly."""
        began = time.monotonic()
        folder = _fresh_folder(Path(self.config.output), self.config.name)
        records = Records(folder / "records.jsonl")
        (folder / "config.json").write_text(self.config.model_dump_json(indent=2), encoding="utf8")

        self.display.say("measuring the base")
        base = self.measure(None)
        records.append(self._run_record())
        records.append(_evaluation_record(0, base))

        progress = _Progress(ServerState(self.model.initial_adapter(self.config.ranks.largest, self.config.seed)))
        interrupted = False
        self.display.begin_rounds(self.config.federation.rounds)
        try:
            self._do_rounds(progress, records)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            self.display.end_rounds()
        state, adapter = progress.state, folder / "adapter"
        self.write_adapter(state, adapter)
        if interrupted:
            self.display.say(f"interrupted: kept the adapter of round {state.round}")
        elif self.method.prune is not keep_rank and not progress.prunes:
            self.display.say("self-pruning never fired: lower min_rank or gamma, raise the penalty, or run longer")
        final = None if interrupted else progress.final
        if final is not None:
            records.append(_evaluation_record(state.round, final))
        return RunResult(
            name=self.config.name,
            base=base,
            final=final,
            state=state,
            rounds=state.round,
            ranks={client.name: state.rank(client) for client in self.clients},
            prunes=progress.prunes,
            updates=progress.updates,
            failures=progress.failures,
            bytes_up=progress.bytes_up,
            bytes_down=progress.bytes_down,
            seconds=time.monotonic() - began,
            adapter=adapter,
            records=records.path,
            interrupted=interrupted,
        )

    def measure(self, state: ServerState | None, *, generate: bool = True) -> Measurement:
        """Score every client's held-out rows: under the base where `state` is None, else under the federation's adapter.

        With `evaluation.adapter = "global"` that is the whole adapter for all; with `"received"` each client's rows are
        scored under the slots its own rank receives.
        """
        scores: dict[str, Score] = {}
        generated: list[Answer] = []
        for rank, names in self._by_adapter(state):
            adapter = None if state is None else truncate(state.adapter, rank) if rank else state.used(self.clients)
            scores |= client_scores(self.model, self.data, names, adapter, self.pad_id)
            own = set(names)
            rows = [row for row in self.generated_rows if row[0] in own] if generate else []
            if rows:
                generated += answers(self.model, self.data, rows, adapter, self.config.evaluation.max_new_tokens)
        place = {row: index for index, row in enumerate(self.generated_rows)}
        generated.sort(key=lambda answer: place[answer.client, Row(answer.prompt, answer.expected)])
        for answer in generated:
            scores[answer.client] += Score(rouge=answer.rouge_l, generated=1)
        in_order = {client.name: scores[client.name] for client in self.clients if client.name in scores}
        return Measurement(in_order, tier_scores(in_order, self.tiers), tuple(generated))

    def write_adapter(self, state: ServerState, folder: Path) -> None:
        """Write the global adapter as PEFT files: the slots that some client still has."""
        export_adapter(
            state.used(self.clients),
            folder,
            base=locate_base(self.config.model.base),
            target_modules=self.model.target_modules,
            scaling=self.model.scaling,
            fan_in_fan_out=self.model.fan_in_fan_out,
        )

    def _do_rounds(self, progress: _Progress, records: Records) -> None:
        """Do the rounds, each recorded when it is done; `progress` is true at any moment an interrupt may come."""
        federation, seed = self.config.federation, self.config.seed

        def cohort(round_number: int) -> list[Client]:
            return sample_cohort(self.clients, federation.clients_per_round, round_number, seed)

        began = time.monotonic()
        for state, report in run(progress.state, self.method, self.engine, cohort, federation.rounds):
            record = _round_record(report, state.adapter, time.monotonic() - began)
            progress.count(state, record)
            try:
                every = self.config.evaluation.every
                if state.round == federation.rounds:
                    progress.final = self.measure(state)
                    record = replace(record, perplexity=progress.final.overall.perplexity)
                elif every and state.round % every == 0:
                    record = replace(record, perplexity=self.measure(state, generate=False).overall.perplexity)
            finally:
                records.append(record)
            self.display.end_round(record)
            began = time.monotonic()

    def _by_adapter(self, state: ServerState | None) -> list[tuple[Rank | None, list[str]]]:
        """Group clients by the rank of the adapter that scores their rows; None is the whole of it."""
        if state is None or self.config.evaluation.adapter == "global":
            return [(None, [client.name for client in self.clients])]
        groups: dict[str, tuple[Rank | None, list[str]]] = {}
        for client in self.clients:
            rank = state.rank(client)
            groups.setdefault(json.dumps(rank), (rank, []))[1].append(client.name)
        return list(groups.values())

    def _run_record(self) -> RunRecord:
        clients = self.data.federation.clients.values()
        return RunRecord(
            hetlora=importlib.metadata.version("hetlora"),
            config=json.loads(self.config.model_dump_json()),
            versions={name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
            | {"python": platform.python_version()},
            clients=len(self.clients),
            train_rows=sum(len(rows.train) for rows in clients),
            test_rows=sum(len(rows.test) for rows in clients),
            left_out_clients=self.data.federation.left_out_clients,
            left_out_rows=sum(self.data.federation.left_out_rows.values()),
            truncated_rows=self.data.tokenization.truncated,
            empty_rows=self.data.tokenization.empty,
            modules=len(self.model.shapes),
            max_rank=self.config.ranks.largest,
            base_parameters=self.base_parameters,
            trainable_parameters={client.name: self.trainable_parameters(client) for client in self.clients},
        )

    def trainable_parameters(self, client: Client) -> int:
        """Return how many numbers a client trains at its first rank: `Σ_modules r (in + out)`."""
        shapes = self.model.shapes.items()
        return sum(rank_of(client.rank, name) * (shape.in_features + shape.out_features) for name, shape in shapes)


def load_federation(config: RunConfig) -> Federation:
    """Read the rows and choose the clients of a run."""
    data = config.data
    federation = read_jsonl(
        data.path,
        client=data.client_field,
        template=Template(data.prompt, data.target),
        split=Split(data.split_field or None, tuple(map(str, data.train)), tuple(map(str, data.test)), data.test_share),
    ).select(data.clients, data.min_rows, config.seed)
    if data.validation_share:
        federation = federation.hold_out_validation(data.validation_share)
    most = config.evaluation.rows_per_client
    clients = {name: ClientRows(rows.train, rows.test[:most]) for name, rows in federation.clients.items()}
    return replace(federation, clients=clients)


def _describe_data(federation: Federation) -> str:
    rows = federation.clients.values()
    parts = [
        f"data: {len(rows)} clients",
        f"{sum(len(own.train) for own in rows)} training rows, {sum(len(own.test) for own in rows)} held out",
    ]
    if federation.left_out_clients:
        parts.append(f"{federation.left_out_clients} clients left out (not drawn, too few rows, or none held out)")
    if federation.left_out_rows:
        parts.append(f"{sum(federation.left_out_rows.values())} rows on neither side of the split")
    return "; ".join(parts)


def assign_ranks(config: RunConfig, clients: list[str]) -> dict[str, int]:
    """Give every client its first rank, as `[ranks]` says."""
    ranks, seed = config.ranks, config.seed
    if ranks.kind == "same":
        return same_ranks(clients, ranks.rank)
    if ranks.kind == "tiers":
        return tiered_ranks(clients, [(tier.rank, tier.share) for tier in ranks.tiers], seed)
    if ranks.kind == "uniform":
        return uniform_ranks(clients, ranks.min, ranks.max, seed)
    if ranks.kind == "power-law":
        return power_law_ranks(clients, ranks.min, ranks.max, seed, ranks.exponent)
    return explicit_ranks(clients, ranks.of, ranks.default)


def _check_fit(config: RunConfig, base: Any, tokenizer: Any) -> None:
    """Refuse what would fail in the middle of a round, or silently: sequences, tokens, a model that sees the future."""
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=next(base.parameters()).device)
    with torch.inference_mode():
        one, other = base(input_ids=ids, use_cache=False).logits[:, :3].float()
    if not torch.allclose(one, other, rtol=1e-4, atol=1e-4):
        raise ModelError(f"the base {config.model.base!r} is not causal: a token changes what comes before it")
    longest = getattr(base.config, "max_position_embeddings", None)
    if longest is not None and config.data.max_length > longest:
        problem = (
            f"data.max_length = {config.data.max_length}: the base {config.model.base} takes {longest} tokens at most"
        )
        raise ConfigError("the configuration", [problem])
    known, spelled = base.get_input_embeddings().num_embeddings, len(tokenizer)
    if spelled > known:
        name = config.model.tokenizer or config.model.base
        raise ModelError(
            f"the tokenizer {name!r} has {spelled} tokens, the base {config.model.base!r} knows {known}; "
            "set model.tokenizer to the one the base was trained with"
        )


def _local_training(config: RunConfig) -> LocalTraining:
    training = config.training
    return LocalTraining(
        learning_rate=training.learning_rate,
        batch_size=training.batch_size,
        steps=training.steps,
        epochs=training.epochs,
        optimizer=training.optimizer,
        weight_decay=training.weight_decay,
        clip_norm=training.clip_norm or None,
    )


@dataclass
class _Progress:
    """Where a run is, and what it has added up to."""

    state: ServerState
    final: Measurement | None = None
    prunes: int = 0
    updates: int = 0
    failures: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    def count(self, state: ServerState, record: RoundRecord) -> None:
        """Add a finished round."""
        self.state = state
        self.prunes += len(record.prunes)
        self.updates += len(record.weights)
        self.failures += len(record.failures)
        self.bytes_up += record.bytes_up
        self.bytes_down += record.bytes_down


def _round_record(report: RoundReport, adapter: Adapter, seconds: float) -> RoundRecord:
    clients = report.clients
    return RoundRecord(
        round=report.round + 1,
        loss=sum(client.loss for client in clients) / len(clients) if clients else None,
        perplexity=None,
        ranks=report.ranks,
        weights=report.shares(),
        prunes={client.client: client.new_rank for client in clients if client.pruned},
        failures={failure.client: failure.reason for failure in report.failures},
        bytes_up=sum(client.bytes_up for client in clients),
        bytes_down=report.bytes_down,
        live_slots=live_slots(adapter),
        seconds=round(seconds, 3),
        clients={
            client.client: {
                "loss": client.loss,
                "examples": client.examples,
                "steps": client.steps,
                "weight": client.weight,
            }
            for client in clients
        },
    )


def _evaluation_record(round_number: int, measurement: Measurement) -> EvaluationRecord:
    def figures(score: Score) -> dict[str, Any]:
        return {**_figures(score), "tokens": score.tokens, "generated": score.generated}

    return EvaluationRecord(
        round=round_number,
        overall=figures(measurement.overall),
        tiers={name: figures(score) for name, score in measurement.tiers.items()},
        clients={name: figures(score) for name, score in measurement.clients.items()},
    )


def _fresh_folder(output: Path, name: str) -> Path:
    """Create `output/name`, or the first of `name-2`, `name-3` … that does not exist: no run writes over another."""
    try:
        output = output.expanduser()
        output.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = output / (name if number == 1 else f"{name}-{number}")
            if not folder.exists():
                folder.mkdir()
                break
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
        raise HetLoraError(f"cannot write to {str(output)!r}: {error}; set output to a folder you own") from error
    return folder
