"""A node's work: the base loaded once, the rows that never leave, local training, self-pruning, scoring."""

from __future__ import annotations

import functools
import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hetlora.config import RunConfig, parse_run_config
from hetlora.config.build import cost_model, largest_work, local_training, make_method
from hetlora.config.build_data import load_federation, make_tokenization
from hetlora.config.build_model import load_fitting_model
from hetlora.core.adapter import Adapter, rank_of
from hetlora.core.codecs import CODECS
from hetlora.core.method import Penalty
from hetlora.core.population import finder
from hetlora.core.round import local_round
from hetlora.core.types import ClientFailure, ClientUpdate, TrainTask
from hetlora.data import TokenizedFederation
from hetlora.errors import ConfigError, HetLoraError, WireError, printable
from hetlora.flower.envelope import Envelope, quoted
from hetlora.flower.node_config import NodeConfig
from hetlora.flower.wire.codec import pack_update, parse_task
from hetlora.flower.wire.header import VERSION
from hetlora.runs.identity import difference
from hetlora.runs.identity import identity as identity_of
from hetlora.runs.records import plain
from hetlora.training.evaluation import client_scores
from hetlora.training.local import train_clients

__all__ = ["ClientRuntime", "answer"]

ONE = "client-000"
"""The name of the one client of a partition into one."""


def answer(envelope: Envelope, settings: NodeConfig, *, keeps: bool, simulated: bool = False) -> Envelope:
    """Do what a server asks for; whatever goes wrong, the outcome is an answer that says it.

    Args:
        envelope: What the server asks.
        settings: Of this node.
        keeps: Whether this process does all of the node's work, so that what it has received need not be sent again.
        simulated: Whether server and node are one person's simulation, so that the server may name any method.
    """
    try:
        return _answered(envelope, settings, keeps=keeps, simulated=simulated)
    except HetLoraError as error:
        return Envelope("refused", {"reason": quoted(error)})
    except Exception as error:  # noqa: BLE001  a message that breaks this process would cost what it has loaded
        # Its text may hold a part of a row, which does not leave this machine.
        print(printable(f"hetlora: {type(error).__name__}: {error}"), file=sys.stderr, flush=True)
        return Envelope("refused", {"reason": f"{type(error).__name__}; the client's own log has its text"})


def _answered(envelope: Envelope, settings: NodeConfig, *, keeps: bool, simulated: bool) -> Envelope:
    value = envelope.value
    version = value.get("wire")
    if version != VERSION:
        raise WireError(
            f"the server speaks version {version!r} of the wire format, this client {VERSION!r}; install one hetlora"
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
"""Runs that are held at once: each has a base of its own."""

_sessions: dict[tuple[Any, ...], ClientRuntime] = {}


def _session(config: str, identity: str, settings: NodeConfig, admit: Callable[[str], None] | None) -> ClientRuntime:
    """Return the clients of a run, loaded once; a file of rows that has changed is read anew."""
    # Nodes that this process serves in turn share the base and the data; each hosts its own clients.
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
    """Return names, sizes and times of the client's own files."""
    root = Path(data or "")
    if not data or not root.exists():
        return ()
    files = [root] if root.is_file() else sorted(item for item in root.rglob("*") if item.is_file())
    return tuple((str(file), (state := file.stat()).st_size, state.st_mtime_ns) for file in files)


class ClientRuntime:
    """The clients of a node, with their base and their rows.

    Args:
        config: The run, as the server sent it.
        settings: Of the node; they decide which rows are read, what rank is afforded, and where the base lies. Which share of
            the configuration's clients is hosted is of no matter yet.
        identity: Of the server's base and tokenizer, which must be those here; they are looked at before anything is loaded.

    Raises:
        HetLoraError: Data, base or settings do not allow it.
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
        if identity is not None and (differs := difference(identity, identity_of(base, tokenizer))):
            raise ConfigError("this node", [f'{differs}; get the same files, or start it with base="FOLDER"'])
        federation = load_federation(self.config)
        self._find = finder(federation.names)  # places in the order of the configuration, by which nodes share them
        self.model, loaded = load_fitting_model(self.config)
        self.data = TokenizedFederation(federation, make_tokenization(self.config, loaded))
        self.method = make_method(self.config)
        self.training = local_training(self.config)
        self._received: dict[str, tuple[Any, int, Adapter]] = {}  # from which server, in which round
        self._residual: dict[str, Adapter] = {}

    @functools.cached_property
    def rank(self) -> int | None:
        """The rank that this node affords: as it was started with, or what fits its memory; None for the run's own."""
        if self.settings.memory is None:
            return self.settings.rank
        most = self.config.ranks.largest
        rank = cost_model(self.config).largest_rank(round(self.settings.memory * 1e6), largest_work(self.config), most)
        if not rank:
            raise ConfigError(
                "--node-config", [f"memory={self.settings.memory:g}: rank 1 does not fit; give more, or a smaller base"]
            )
        return rank

    def hello(self, settings: NodeConfig, *, keeps: bool) -> Envelope:
        """Say who is here."""
        # A server that asks who is here has no round behind it in which this node took part.
        self._received.clear()
        self._residual.clear()
        told: dict[str, Any] = {"keeps": keeps}
        if self.settings.data is None:
            return Envelope("hello", {**told, "share": [settings.place, settings.nodes]})
        most = self.config.ranks.largest
        rows = {side: len(getattr(self.data, side)(ONE)) for side in ("train", "test")}
        if not rows["train"]:
            raise ConfigError("--node-config", [f"data={self.settings.data!r} has no training row"])
        return Envelope("hello", {**told, "name": self.settings.name, "rank": min(self.rank or most, most), **rows})

    def train(self, envelope: Envelope, settings: NodeConfig, *, keeps: bool) -> Envelope:
        """Train every task of an envelope, each client by itself, and answer with its update or what went wrong."""
        precision = str(envelope.value.get("precision"))
        if precision not in CODECS:
            raise WireError(f"precision {precision!r}, which this client does not know")
        answers: list[dict[str, Any]] = []
        blobs: list[bytes] = []
        server = envelope.value.get("server")
        since = envelope.value.get("since") or [None] * len(envelope.blobs)
        for name, begun, blob in zip(envelope.value.get("clients", ()), since, envelope.blobs, strict=True):
            told: dict[str, Any] = {"client": name}
            try:
                task = parse_task(blob, self._known(name, server, begun))
            except WireError as error:
                # After a restart a factor that was not sent again is not here, and where messages came in another order than
                # they were sent it is of another round; the server then sends it.
                answers.append({**told, "lacks": str(error)})
                continue
            try:
                self._check(name, task, settings)
                update = self.fit(task)
                if isinstance(update, ClientFailure):
                    told["failure"] = update.reason
                else:
                    data, residual = pack_update(update, task, precision=precision, residual=self._residual.get(name))
                    if keeps:
                        if task.trains != "AB":  # else nothing is frozen, and all is sent every time
                            self._received[name] = (server, task.round, task.adapter)
                        if residual is not None:
                            self._residual[name] = residual
                    blobs.append(data)
            except (HetLoraError, torch.OutOfMemoryError, MemoryError) as error:
                told["failure"] = str(error) or type(error).__name__
            answers.append(told)
        return Envelope("train", {"answers": answers}, blobs)

    def fit(self, task: TrainTask) -> ClientUpdate | ClientFailure:
        """Train one client, and prune its rank: by itself, so that what it learns depends on nobody else on this node."""
        rows = self.data.train(ONE if self.settings.data else task.client)

        def fit(tasks: Sequence[TrainTask], penalty: Penalty | None) -> list[ClientUpdate | ClientFailure]:
            return train_clients(self.model, tasks, [rows], self.training, penalty, seed=self.config.seed)

        [answer] = local_round([task], self.method, fit)
        return answer

    def evaluate(self, envelope: Envelope) -> Envelope:
        """Score this client's held-out rows under the adapter that came, or under the base where none did."""
        if self.settings.data is None:
            raise WireError("this node hosts clients of the configuration, whose server measures by itself")
        adapter = parse_task(envelope.blobs[0]).adapter if envelope.blobs else None
        score = client_scores(self.model, self.data, [ONE], adapter, workers=1)[ONE]
        return Envelope("evaluate", plain({"nll": score.nll, "tokens": score.tokens}))

    def _known(self, name: str, server: object, begun: object) -> Adapter | None:
        """Return what a client has received from a server in a round, if that is the last it has received."""
        *source, adapter = self._received.get(name, (None, None, None))
        return adapter if adapter is not None and source == [server, begun] else None

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


def _on_this_node(config: RunConfig, settings: NodeConfig) -> RunConfig:
    """Return the run with this node's base, device and file in place of the server's; all rows of the file are one client's."""
    document = config.model_dump(mode="json")
    if settings.data:
        document["data"] |= {"path": settings.data, "subset": None, "revision": None, "clients": None, "min_rows": 1}
        document["partition"] = {"kind": "iid", "clients": 1}
        document["federation"] |= {"clients_per_round": 1}
    if settings.base:
        # With a base of its own a node takes its tokenizer from there: no path of a server's is ever opened.
        document["model"] |= {"base": settings.base, "tokenizer": None}
    if settings.device:
        document["model"] |= {"device": settings.device}
    return parse_run_config(json.dumps(document), "the server's configuration with this node's settings")


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()
