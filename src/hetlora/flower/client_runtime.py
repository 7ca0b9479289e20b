"""The work of a node: local training, self-pruning and scoring, on rows that never leave it."""

from __future__ import annotations

import functools
import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hetlora._version import __version__
from hetlora.config import RunConfig, parse_run_config
from hetlora.config.build import local_training, make_method
from hetlora.config.build_data import load_federation, make_tokenization
from hetlora.config.build_model import load_fitting_model
from hetlora.config.one_client import ONE, affordable_rank, one_client
from hetlora.core.adapter import Adapter, rank_of
from hetlora.core.codecs import CODECS
from hetlora.core.method import Penalty
from hetlora.core.population import finder
from hetlora.core.round import local_round
from hetlora.core.types import ClientFailure, ClientUpdate, TrainTask
from hetlora.data import TokenizedFederation
from hetlora.errors import ConfigError, HetLoraError, WireError, printable
from hetlora.flower.envelope import MOST_REASON, READS, Envelope, quoted
from hetlora.flower.node_config import NodeConfig
from hetlora.flower.wire.codec import pack_update, parse_task
from hetlora.runs.identity import difference, weights_digest
from hetlora.runs.identity import identity as identity_of
from hetlora.runs.records import plain
from hetlora.training.evaluation import client_scores
from hetlora.training.local import train_clients

__all__ = ["ClientMemory", "ClientRuntime", "answer"]


def answer(envelope: Envelope, settings: NodeConfig, *, keeps: bool, simulated: bool = False) -> Envelope:
    """Answer a server's message; every failure becomes a "refused" answer.

    Args:
        envelope: The server's message.
        settings: The settings of this node.
        keeps: Whether this process does all of the node's work, so that factors it has received need not be sent again.
        simulated: Whether this is a simulation by one user, so that the server may name any method.
    """
    try:
        return _answered(envelope, settings, keeps=keeps, simulated=simulated)
    except HetLoraError as error:
        said = str(error).replace("\n  ", " ")  # a line of a log
        return Envelope("refused", {"reason": quoted(f"{said}{_other_version(envelope.value)}")})
    except Exception as error:  # noqa: BLE001  the process keeps its loaded model
        # The text may contain parts of rows, which must not leave this machine.
        print(printable(f"hetlora: {type(error).__name__}: {error}"), file=sys.stderr, flush=True)
        return Envelope("refused", {"reason": f"{type(error).__name__}; the client's own log has its text"})


def _other_version(value: Mapping[str, Any]) -> str:
    """Return the versions of both sides, if they differ: the cause of many a refusal, such as of a key that is newer."""
    theirs = value.get("hetlora", "an older one")
    return "" if theirs == __version__ else f" (hetlora {__version__} here, {quoted(theirs, 50)} on the server)"


def _answered(envelope: Envelope, settings: NodeConfig, *, keeps: bool, simulated: bool) -> Envelope:
    value = envelope.value
    version = value.get("wire")
    if version not in READS:
        raise WireError(
            f"the server speaks version {version!r} of the wire format, this client {' and '.join(map(repr, READS))}; "
            "install one hetlora"
        )
    if not isinstance(value.get("config"), str) or not isinstance(value.get("identity"), dict):
        raise WireError("the server does not say which run it means, or which base")
    identity = json.dumps(value["identity"], sort_keys=True)
    here = _session(value["config"], identity, settings, None if simulated else settings.admit)
    if envelope.kind == "hello":
        return here.hello(settings, keeps=keeps)
    if envelope.kind == "train":
        return here.train(envelope, settings, keeps=keeps)
    if envelope.kind == "evaluate":
        return here.evaluate(envelope)
    raise WireError(f"a message of kind {envelope.kind!r}, which this client does not know")


SESSIONS = 1
"""Number of runs in memory; each has its own base."""

MEMORIES = 2
"""Number of servers whose adapters are kept, so that two runs on one node only load the base anew for each other."""


@dataclass
class ClientMemory:
    """What a server has sent to a node's clients, and what rounding has left to send to it, by client.

    Attributes:
        received: Round and adapter.
        residual: The rounding error of the last update.
    """

    received: dict[str, tuple[int, Adapter]] = field(default_factory=dict)
    residual: dict[str, Adapter] = field(default_factory=dict)


_sessions: dict[tuple[Any, ...], ClientRuntime] = {}
_memories: dict[str, ClientMemory] = {}


def _session(config: str, identity: str, settings: NodeConfig, admit: Callable[[str], None] | None) -> ClientRuntime:
    """Return the runtime of a run, loaded once; a changed file of rows is read again."""
    # In a simulation one process serves several nodes, which share base and data.
    shared = replace(settings, place=None, nodes=None)
    key = (config, identity, shared, _stamp(settings.data))
    if key not in _sessions:
        while len(_sessions) >= SESSIONS:
            del _sessions[next(iter(_sessions))]
            gc.collect()  # before the next base is loaded, not after
        run = parse_run_config(config, "the server's configuration", admit)
        _sessions[key] = ClientRuntime(run, shared, identity=json.loads(identity))
    return _sessions[key]


def _stamp(data: str | None) -> tuple[tuple[str, int, int], ...]:
    """Return names, sizes and modification times of the client's files."""
    root = Path(data or "")
    if not data or not root.exists():
        return ()
    files = [root] if root.is_file() else sorted(item for item in root.rglob("*") if item.is_file())
    return tuple((str(file), (state := file.stat()).st_size, state.st_mtime_ns) for file in files)


class ClientRuntime:
    """The clients of a node, with their base and their rows.

    Args:
        config: The run, as the server sent it.
        settings: The node's rows, rank and path of the base. The hosted share of clients is not used here.
        identity: Digests of the server's base and tokenizer, which are compared before anything is loaded.

    Raises:
        HetLoraError: Data, base or settings are invalid.
    """

    def __init__(self, config: RunConfig, settings: NodeConfig, *, identity: Mapping[str, str] | None = None) -> None:
        torch.set_num_threads(settings.threads)
        self.settings = settings
        self.config = _on_this_node(config, settings)
        base = self.config.model.base
        tokenizer = self.config.model.tokenizer or base
        for place in (base, tokenizer):
            if settings.data and not settings.base and _is_path(place):
                problem = f"the run's base or tokenizer {place!r} is a folder of the server's; add base=\"FOLDER\""
                raise ConfigError("--node-config", [problem])
        same = self.config.federation.same_weights
        if identity is not None and (differs := difference(identity, identity_of(base, tokenizer, same_weights=same))):
            raise ConfigError("this node", [f'{differs}; get the same files, or start it with base="FOLDER"'])
        federation = load_federation(self.config, measured=settings.data is None)
        self._find = finder(federation.names)  # a client's index in the configuration decides its node
        self.model, loaded = load_fitting_model(self.config)
        self.data = TokenizedFederation(federation, make_tokenization(self.config, loaded))
        self.method = make_method(self.config)
        self.training = local_training(self.config)
        self.memories = _memories

    @functools.cached_property
    def rank(self) -> int | None:
        """The rank that this node affords: configured, or derived from its memory; None for the run's rank."""
        if self.settings.memory is None:
            return self.settings.rank
        return affordable_rank(self.config, self.settings.memory)

    @functools.cached_property
    def _weights(self) -> str:
        # Once: a base may have gigabytes, and a node announces itself again and again.
        return weights_digest(self.config.model.base)

    def hello(self, settings: NodeConfig, *, keeps: bool) -> Envelope:
        """Announce this node."""
        self._check_kind()
        if self.settings.data is None:
            return Envelope("hello", {"keeps": keeps, "share": [settings.place, settings.nodes]})
        largest = self.config.ranks.largest
        rows = {side: len(getattr(self.data, side)(ONE)) for side in ("train", "test")}
        if not rows["train"]:
            raise ConfigError("--node-config", [f"data={self.settings.data!r} has no training row"])
        rank = min(self.rank or largest, largest)
        value = {
            "keeps": keeps,
            "name": self.settings.name,
            "rank": rank,
            **rows,
            "quantize": self.config.model.quantize,
        }
        if not self.config.federation.same_weights:
            value["weights"] = self._weights
        return Envelope("hello", value)

    def _check_kind(self) -> None:
        """Refuse a run whose clients are not of this node's kind: the server would wait for others without a word."""
        own_rows = self.config.flower.clients == "nodes"
        if own_rows and self.settings.data is None:
            problem = (
                'this run takes clients with rows of their own; start this one with data="FILE" name="NAME" rank=R'
            )
        elif not own_rows and self.settings.data is not None:
            problem = (
                "this run's clients are those of its configuration; start this node with partition-id=I num-partitions=N, or "
                'set flower.clients = "nodes" on the server'
            )
        else:
            return
        raise HetLoraError(f"--node-config: {problem}")

    def train(self, envelope: Envelope, settings: NodeConfig, *, keeps: bool) -> Envelope:
        """Train every task of an envelope, one client at a time; answer with updates or reasons of failure."""
        precision = str(envelope.value.get("precision"))
        if precision not in CODECS:
            raise WireError(f"precision {precision!r}, which this client does not know")
        answers: list[dict[str, Any]] = []
        blobs: list[bytes] = []
        memory = self._memory(str(envelope.value.get("server")))
        since = envelope.value.get("since") or [None] * len(envelope.blobs)
        for name, begun, blob in zip(envelope.value.get("clients", ()), since, envelope.blobs, strict=True):
            entry: dict[str, Any] = {"client": name}
            try:
                task = parse_task(blob, _last_received(memory, name, begun))
            except WireError as error:
                # A frozen factor is missing after a restart, or is of another round if messages were reordered. The server then
                # sends it again.
                answers.append({**entry, "lacks": quoted(error, MOST_REASON)})
                continue
            try:
                self._check(name, task, settings)
                update = self.fit(task)
                if isinstance(update, ClientFailure):
                    entry["failure"] = quoted(update.reason, MOST_REASON)
                else:
                    data, residual = pack_update(update, task, precision=precision, residual=memory.residual.get(name))
                    if keeps:
                        if task.trains != "AB":  # otherwise both factors are sent every time
                            memory.received[name] = (task.round, task.adapter)
                        if residual is not None:
                            memory.residual[name] = residual
                    blobs.append(data)
            except (HetLoraError, torch.OutOfMemoryError, MemoryError) as error:
                entry["failure"] = quoted(str(error) or type(error).__name__, MOST_REASON)
            answers.append(entry)
        return Envelope("train", {"answers": answers}, blobs)

    def fit(self, task: TrainTask) -> ClientUpdate | ClientFailure:
        """Train and prune one client, independently of the node's other clients."""
        rows = self.data.train(ONE if self.settings.data else task.client)

        def fit(tasks: Sequence[TrainTask], penalty: Penalty | None) -> list[ClientUpdate | ClientFailure]:
            return train_clients(self.model, tasks, [rows], self.training, penalty, seed=self.config.seed)

        [answer] = local_round([task], self.method, fit)
        return answer

    def evaluate(self, envelope: Envelope) -> Envelope:
        """Score this client's held-out rows with the received adapter, or with the base if there is none."""
        if self.settings.data is None:
            raise WireError("this node hosts clients of the configuration, whose server measures by itself")
        adapter = parse_task(envelope.blobs[0]).adapter if envelope.blobs else None
        score = client_scores(self.model, self.data, [ONE], adapter, workers=1)[ONE]
        return Envelope("evaluate", plain({"nll": score.nll, "tokens": score.tokens}))

    def _memory(self, server: str) -> ClientMemory:
        """Return what is kept for a server, whose name is another after each start of its process."""
        memory = self.memories[server] = self.memories.pop(server, ClientMemory())  # the newest comes last
        while len(self.memories) > MEMORIES:
            del self.memories[next(iter(self.memories))]
        return memory

    def _check(self, name: str, task: TrainTask, settings: NodeConfig) -> None:
        if task.client != name or not self._hosts(name, settings):
            raise WireError(f"client {name!r} is not here")
        afforded = self.rank
        largest = max(rank_of(task.rank, module) for module in task.adapter)
        if afforded is not None and largest > afforded:
            raise WireError(f"rank {largest} was sent, and this client affords {afforded}")

    def _hosts(self, name: str, settings: NodeConfig) -> bool:
        if self.settings.data is not None:
            return name == self.settings.name
        try:
            return self._find(name) % (settings.nodes or 1) == settings.place
        except KeyError:
            return False


def _last_received(memory: ClientMemory, name: str, begun: object) -> Adapter | None:
    """Return the adapter that a client last received, if it is from this round."""
    number, adapter = memory.received.get(name, (None, None))
    return adapter if adapter is not None and number == begun else None


def _on_this_node(config: RunConfig, settings: NodeConfig) -> RunConfig:
    """Return the run with this node's base, device and data; all rows of its file belong to one client."""
    if config.data.chat_template is not None and (settings.data or settings.base):
        raise WireError(
            "data.chat_template is a file of the server's, which a node never opens; keep it in the base's folder"
        )
    return one_client(config, settings.data, settings.base, settings.device, settings.quantize)


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()
