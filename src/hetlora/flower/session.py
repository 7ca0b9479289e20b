"""The network of a federation: nodes, engine, and network figures of round records."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from hetlora._version import __version__
from hetlora.config import RunConfig
from hetlora.config.build import local_training
from hetlora.flower.engine import FlowerEngine
from hetlora.flower.envelope import WIRE, Envelope
from hetlora.flower.membership import Node, NodeRegistry
from hetlora.flower.transport import Transport
from hetlora.runs.identity import identity, weights_digest
from hetlora.runs.memory import peak_megabytes
from hetlora.runs.records import RoundRecord

__all__ = ["Network"]


class Network:
    """The nodes of a federation and the engine over them.

    Args:
        transport: Sends messages and receives answers.
        config: The run.
        say: Called with lines about nodes that come, go or fail.
        node_of: Returns a client's node, given the registry and the client's name.

    Attributes:
        terms: Part of every message.
        identity: Digests of the base and its tokenizer, which must match on every node.
        engine: Trains the clients.
        registry: The connected nodes.
    """

    def __init__(
        self,
        transport: Transport,
        config: RunConfig,
        say: Callable[[str], None],
        node_of: Callable[[NodeRegistry, str], Node | None],
    ) -> None:
        self.say = say
        self.identity = identity(config.model.base, config.model.tokenizer, same_weights=config.federation.same_weights)
        self._own = (
            config.model.quantize,
            (None if config.federation.same_weights else weights_digest(config.model.base)),
        )
        self.terms = {
            "wire": WIRE,
            "hetlora": __version__,
            "config": config.model_dump_json(),
            "identity": self.identity,
        }
        self.transport = transport
        self.registry = NodeRegistry(self.transport, Envelope("hello", self.terms), config.flower.wait, say)
        self.engine = FlowerEngine(
            self.transport,
            self.terms,
            lambda client: node_of(self.registry, client),
            precision=config.flower.precision,
            deadline=config.flower.deadline,
            answers=config.flower.answers,
            training=local_training(config),
            say=say,
        )
        self._before = (0, 0)

    def annotate(self, record: RoundRecord) -> RoundRecord:
        """Report failures and add sent bytes and times of last contact to the record of a round."""
        for client, reason in record.failures.items():
            self.say(f"round {record.round}: client {client!r} gave nothing: {reason}")
        sent, received = self.transport.sent, self.transport.received
        network: dict[str, Any] = {
            "bytes_down": sent - self._before[0],
            "bytes_up": received - self._before[1],
            "nodes": len(self.registry.nodes),
            "refused": self.registry.refused,
            "memory": peak_megabytes(torch.device("cpu")),
        }
        self._before = (sent, received)
        seen: Mapping[str, float] = self.registry.seen
        if seen:
            network["last_seen"] = {name: _time(when) for name, when in sorted(seen.items())}
        others = {
            name: {key: value for key, value in (("quantize", own.quantize), ("weights", own.weights)) if value}
            for name, own in self.registry.infos()
            if (own.quantize, own.weights) != self._own
        }
        if others:
            network["bases"] = others
        return replace(record, network=network)


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
