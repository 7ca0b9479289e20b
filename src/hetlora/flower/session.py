"""The nodes of a federation, the engine over them, and what a round's record says of the network."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from hetlora.config import RunConfig
from hetlora.config.build import local_training
from hetlora.flower.engine import FlowerEngine
from hetlora.flower.envelope import Envelope
from hetlora.flower.membership import Node, NodeRegistry
from hetlora.flower.transport import Transport
from hetlora.flower.wire.header import VERSION
from hetlora.runs.identity import identity
from hetlora.runs.records import RoundRecord

__all__ = ["Network"]


class Network:
    """A federation's nodes, and the engine over them.

    Args:
        transport: Over which messages go.
        config: The run.
        say: Is told who comes and goes, and who fails.
        node_of: From the registry and a client's name, the node that speaks for it.

    Attributes:
        terms: What stands in every message.
        identity: Digests of the base and its tokenizer, which every node must have the same of.
        engine: Where clients train.
        registry: Who is there.
        transport: As given.
    """

    def __init__(
        self,
        transport: Transport,
        config: RunConfig,
        say: Callable[[str], None],
        node_of: Callable[[NodeRegistry, str], Node | None],
    ) -> None:
        self.say = say
        self.identity = identity(config.model.base, config.model.tokenizer)
        self.terms = {"wire": VERSION, "config": config.model_dump_json(), "identity": self.identity}
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
        )
        self._before = (0, 0)

    def annotate(self, record: RoundRecord) -> RoundRecord:
        """Say who failed, and return the record of a round with what the network knows.

        That is the bytes that travelled, and when clients were last seen.
        """
        for client, reason in record.failures.items():
            self.say(f"round {record.round}: client {client!r} gave nothing: {reason}")
        sent, received = self.transport.sent, self.transport.received
        network: dict[str, Any] = {
            "bytes_down": sent - self._before[0],
            "bytes_up": received - self._before[1],
            "nodes": len(self.registry.nodes),
        }
        self._before = (sent, received)
        seen: Mapping[str, float] = self.registry.seen
        if seen:
            network["last_seen"] = {name: _time(when) for name, when in sorted(seen.items())}
        return replace(record, network=network)


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
