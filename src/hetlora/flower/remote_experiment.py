"""A federation of clients with their own data: the server holds no rows and no weights, only the announced clients."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from hetlora._version import __version__
from hetlora.config import RunConfig
from hetlora.config.build import local_training, make_method, make_robust, wire_rounding
from hetlora.config.build_model import build_outline
from hetlora.config.preconditions import check_result
from hetlora.core.adapter import Adapter, Rank, num_parameters, trained
from hetlora.core.client_list import sample_evaluated_clients
from hetlora.core.method import keep_rank
from hetlora.core.ranks import tiers_of
from hetlora.core.sampling import sample_cohort
from hetlora.core.types import Client, ServerState, TrainTask
from hetlora.flower.engine import check_method
from hetlora.flower.envelope import Envelope
from hetlora.flower.membership import ClientInfo
from hetlora.flower.session import Network
from hetlora.flower.transport import DeliveryFailure, Transport, pause_between_looks
from hetlora.flower.wire.codec import pack_task
from hetlora.model.initial_adapter import describe_import, import_adapter, initial_adapter
from hetlora.model.lora_model import locate_base
from hetlora.model.peft_files import export_adapter
from hetlora.runs.fingerprints import FileFingerprints
from hetlora.runs.observer import Observer
from hetlora.runs.records import RoundRecord, RunRecord
from hetlora.runs.result import Measurement
from hetlora.runs.runner import Experiment
from hetlora.training.evaluation import Score, tier_scores

__all__ = ["RemoteExperiment"]

MOST_NLL = 1e4
"""Maximal negative log-likelihood per token in nats; more is a bug or an attack."""


class RemoteExperiment(Experiment):
    """A run over Flower's grid whose clients announce themselves.

    Cohorts are drawn from the clients that are connected when a round begins; clients may come and go between rounds. They
    score their own held-out rows and send only sums.

    Args:
        config: The run, with ``flower.clients = "nodes"``.
        display: Shows the progress.
        transport: Sends messages and receives answers.

    Raises:
        HetLoraError: The base's configuration is missing here, or the method cannot run over Flower.
    """

    def __init__(self, config: RunConfig, display: Observer, transport: Transport) -> None:
        self.config = config
        self.display = display
        self.method = make_method(config)
        self.robust = make_robust(config)
        self.training = local_training(config)
        self.rounding = wire_rounding(config)
        check_method(self.method)
        self.model = build_outline(config)
        for note in self.model.notes:
            display.say(note)
        check_result(config, self.model)
        self.imported = None
        if config.model.adapter is not None:
            self.imported = import_adapter(config.model.adapter, self.model)
            display.say(describe_import(config.model.adapter, self.imported, config.ranks.largest))
        self.network = Network(transport, config, display.say, lambda registry, name: registry.clients().get(name))
        self.engine = self.network.engine
        self.known: dict[str, ClientInfo] = {}

    @property
    def rounds(self) -> int:
        """Rounds of the run."""
        return self.config.federation.rounds

    def first_state(self) -> ServerState:
        """Return the initial state at the largest rank of `[ranks]`, fresh or imported."""
        seed = self.config.seed
        return ServerState(initial_adapter(self.model, self.config.ranks.largest, seed, self.imported), seed=seed)

    def cohort(self, round_number: int) -> Sequence[Client]:
        """Wait until enough clients are connected, and draw a cohort.

        Raises:
            HetLoraError: Too few clients connect in time.
        """
        members = [self._client(info) for info in self._connected().values()]
        size = min(self.config.federation.clients_per_round, len(members))
        return sample_cohort(members, size, round_number, self.config.seed)

    def measure(self, state: ServerState | None, *, generate: bool = True) -> Measurement:  # noqa: ARG002
        """Let clients score their held-out rows; clients that do not answer in time are left out and reported."""
        connected = {name: info for name, info in self._connected().items() if info.test}
        names = sample_evaluated_clients(list(connected), self.config.evaluation.clients, self.config.seed)
        scores = self._scores(self._ask([connected[name] for name in names], state))
        in_order = {name: scores[name] for name in names if name in scores}
        ranks = {name: self._client(connected[name]).rank for name in in_order}
        tiers = tiers_of([rank for rank in ranks.values() if isinstance(rank, int)])
        by_tier = {name: tiers[rank] for name, rank in ranks.items() if isinstance(rank, int)}
        return Measurement(in_order, tier_scores(in_order, by_tier), ())

    def _ask(self, clients: Sequence[ClientInfo], state: ServerState | None) -> dict[str, ClientInfo]:
        """Send each client the adapter to score; return the client per message id."""
        nodes, asked, transport = self.network.registry.clients(), {}, self.network.transport
        until = transport.clock.now() + self.config.flower.deadline
        packed: dict[str, bytes] = {}
        for info in clients:
            blobs = []
            if state is not None:
                key = "" if self.config.evaluation.adapter == "global" else json.dumps(state.rank(self._client(info)))
                if key not in packed:
                    packed[key] = self._packed(self._measured_adapter(state, self._client(info)), state.round)
                blobs = [packed[key]]
            envelope = Envelope("evaluate", self.network.terms, blobs)
            name = transport.send(envelope, nodes[info.name].number, max(0.0, until - transport.clock.now()))
            if isinstance(name, DeliveryFailure):
                self._not_measured(info, name.reason)
            else:
                asked[name] = info
        return asked

    def _scores(self, waiting: dict[str, ClientInfo]) -> dict[str, Score]:
        """Return the scores that arrive before the deadline."""
        transport, deadline = self.network.transport, self.config.flower.deadline
        until = transport.clock.now() + deadline
        scores: dict[str, Score] = {}
        while waiting and transport.clock.now() < until:
            for name, info in list(waiting.items()):
                reply = transport.poll(name)
                if reply is None:
                    continue
                del waiting[name]
                score = _score(reply, info.test * self.config.data.max_length)
                if isinstance(score, DeliveryFailure):
                    self._not_measured(info, score.reason)
                else:
                    scores[info.name] = score
            transport.clock.sleep(pause_between_looks(len(waiting)) if waiting else 0.0)
        transport.abandon(waiting)
        for info in waiting.values():
            self._not_measured(info, f"no answer within {deadline:g} s")
        return scores

    def _packed(self, adapter: Adapter, round_number: int) -> bytes:
        """Return an adapter as bytes, the same for all clients that score it, rounded as they receive it for training."""
        ranks = {module: pair.A.shape[-2] for module, pair in adapter.items()}
        return pack_task(TrainTask("", round_number, ranks, adapter), precision=self.config.flower.precision)

    def _not_measured(self, info: ClientInfo, reason: str) -> None:
        self.display.say(f"client {info.name!r} was not measured: {reason}")

    def write_result(self, state: ServerState, folder: Path) -> Path | None:
        """Export the slots that some client has trained as PEFT files."""
        export_adapter(
            trained(state.adapter),  # the ranks of disconnected clients are unknown
            folder / "adapter",
            base=locate_base(self.config.model.base),
            target_modules=self.model.target_modules,
            scaling=self.model.scaling,
            fan_in_fan_out=self.model.fan_in_fan_out,
        )
        return folder / "adapter"

    def run_record(self) -> RunRecord:
        """Return the record of the run, with the clients that are connected at its start."""
        first = self.first_state()
        return RunRecord(
            hetlora=__version__,
            config=json.loads(self.config.model_dump_json()),
            versions={name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "flwr")}
            | {"python": platform.python_version()},
            clients=len(self.known),
            train_rows=sum(info.train for info in self.known.values()),
            test_rows=sum(info.test for info in self.known.values()),
            left_out_clients=0,
            left_out_rows=0,
            truncated_rows=0,
            empty_rows=0,
            counted_clients=0,
            modules=len(self.model.shapes),
            max_rank=self.config.ranks.largest,
            base_parameters=sum(parameter.numel() for parameter in self.model.base.parameters()),
            trainable_parameters={
                client.name: num_parameters(self.method.distribute(first, client).adapter) for client in self._members()
            },
            self_pruning=self.method.prune is not keep_rank,
            method=self.method.declared,
        )

    def ranks(self, state: ServerState) -> Mapping[str, Rank]:
        """Return the ranks of all clients that connected to this server, or that ever pruned."""
        return {**state.ranks, **{client.name: state.rank(client) for client in self._members()}}

    def digests(self) -> Mapping[str, str | None]:
        """Return digests that must not change when resuming: base, tokenizer, imported adapter; data belong to the clients."""
        found = FileFingerprints().digests(self.config)
        return self.network.identity | {key: found[key] for key in ("model.adapter", "method.name") if key in found}

    def annotate(self, record: RoundRecord) -> RoundRecord:
        """Add network figures to a round's record; ask the nodes of failed clients to announce themselves again."""
        for name in record.failures:
            node = self.network.registry.clients().get(name)
            if node is not None:
                self.network.registry.forget(node.number)
        return self.network.annotate(record)

    def _connected(self) -> dict[str, ClientInfo]:
        """Wait for enough clients and return all connected ones."""
        flower, registry = self.config.flower, self.network.registry
        least = flower.min_clients or self.config.federation.clients_per_round
        registry.gather(
            lambda: len(registry.clients()) >= least, flower.wait, lambda: _more(least - len(registry.clients()))
        )
        connected = {name: node.client for name, node in registry.clients().items() if node.client is not None}
        self.known |= connected
        return connected

    def _members(self) -> list[Client]:
        return [self._client(info) for _, info in sorted(self.known.items())]

    def _client(self, info: ClientInfo) -> Client:
        return Client(info.name, min(info.rank, self.config.ranks.largest), info.train)

    def _measured_adapter(self, state: ServerState, client: Client) -> Adapter:
        if self.config.evaluation.adapter == "global":
            return trained(state.adapter)
        return self.method.distribute(state.serving_state, client).adapter


def _more(count: int) -> str:
    return "1 more client" if count == 1 else f"{count} more clients"


def _score(reply: Envelope | DeliveryFailure, limit: int) -> Score | DeliveryFailure:
    if isinstance(reply, DeliveryFailure):
        return reply
    nll, tokens = reply.value.get("nll"), reply.value.get("tokens")
    if (
        isinstance(tokens, int)
        and isinstance(nll, (int, float))
        and 0 <= tokens <= limit
        and 0.0 <= nll <= MOST_NLL * tokens
    ):
        return Score(float(nll), int(tokens))
    return DeliveryFailure(f"a score of nll = {nll!r} over {tokens!r} tokens, of which there are {limit} at most")
