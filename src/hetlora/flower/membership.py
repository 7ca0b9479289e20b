"""The registry of connected nodes and their clients, with reasons of refusals."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hetlora.errors import HetLoraError
from hetlora.flower.envelope import Envelope, quoted
from hetlora.flower.node_config import QUANTIZED
from hetlora.flower.transport import DeliveryFailure, Transport, pause_between_looks

__all__ = ["ClientInfo", "Node", "NodeRegistry"]

AGAIN = 10.0
"""Seconds until a refused node is asked again, since every message starts a process there."""

STATUS = 60.0
"""Seconds between two lines about what is waited for."""

MOST_LISTED = 10
"""Clients and refusals that a line lists; the others are counted."""

MOST_NAME = 200
MOST_ROWS = 10**12


@dataclass(frozen=True)
class ClientInfo:
    """A client with its own data, as announced by its node.

    Attributes:
        name: Its unique name.
        rank: The rank that it affords.
        train: Its rows for training.
        test: Its rows for measuring.
        quantize: How it stores its base, as `model.quantize`; None if it is too old to say.
        weights: SHA-256 of its base, where bases may differ.
    """

    name: str
    rank: int
    train: int
    test: int
    quantize: str | None = None
    weights: str | None = None


@dataclass(frozen=True)
class Node:
    """A participating node.

    Attributes:
        number: Flower's number of it.
        keeps: Whether one process does all of its work, so that factors it has received need not be sent again.
        client: Its client, if it has its own data.
        share: Otherwise the index of its share of the configuration's clients, and the number of shares.
    """

    number: int
    keeps: bool
    client: ClientInfo | None = None
    share: tuple[int, int] | None = None


@dataclass
class NodeRegistry:
    """The nodes of a federation.

    Attributes:
        transport: Sends messages and receives answers.
        hello: The message to new nodes.
        patience: Seconds until a new node must answer; it loads its base meanwhile.
        say: Called with lines about nodes that come, go or are refused.
        nodes: The participating nodes by Flower's number.
        seen: Time of last contact per client, in seconds since 1970.
    """

    transport: Transport
    hello: Envelope
    patience: float
    say: Callable[[str], None]
    nodes: dict[int, Node] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)
    _asked: dict[int, tuple[str, float]] = field(default_factory=dict)
    _refused: dict[int, str] = field(default_factory=dict)
    _not_before: dict[int, float] = field(default_factory=dict)
    _reported: dict[int, Node] = field(default_factory=dict)
    _keys: dict[str, bytes] = field(default_factory=dict)

    def refresh(self) -> None:
        """Remove disconnected nodes, ask new ones, and admit those that answer."""
        self.transport.discard_late()
        keys = self.transport.nodes(self.patience)
        connected = keys.keys()
        for number in [number for number in self.nodes if number not in connected]:
            node = self.nodes.pop(number)
            self._reported.pop(number, None)
            self.say(f"{_called(node)} went away")
        for known in (self._refused, self._asked, self._not_before):
            for number in [number for number in known if number not in connected]:
                del known[number]
        last = self.transport.clock.now() + self.patience
        for number in sorted(connected - self.nodes.keys() - self._asked.keys()):
            if self.transport.clock.now() < self._not_before.get(number, 0.0):
                continue
            asked = self.transport.send(self.hello, number, max(0.0, last - self.transport.clock.now()))
            if isinstance(asked, str):
                self._asked[number] = (asked, self.transport.clock.now() + self.patience)
        for number, (name, until) in list(self._asked.items()):
            answer = self.transport.poll(name)
            if answer is None and self.transport.clock.now() < until:
                continue
            del self._asked[number]
            if answer is None:
                self.transport.abandon([name])
                answer = DeliveryFailure(f"no answer within {self.patience:g} s")
            self._admit(number, answer, keys.get(number, b""))
        now = time.time()
        for node in self.nodes.values():
            if node.client is not None:
                self.seen[node.client.name] = now

    def gather(self, enough: Callable[[], bool], seconds: float, wanted: Callable[[], str]) -> None:
        """Wait until enough nodes are connected; say once a minute what is missing and who is there.

        Args:
            enough: Returns whether they are.
            seconds: The longest wait.
            wanted: Returns a description of what is missing.

        Raises:
            HetLoraError: They did not connect in time; with refused nodes and reasons.
        """
        clock = self.transport.clock
        until, next_line = clock.now() + seconds, 0.0
        while True:
            self.refresh()
            if enough():
                return
            if clock.now() > until:
                raise HetLoraError(
                    f"waited {seconds:g} s for {wanted()}: {self.status()}; start more, or raise flower.wait"
                )
            if clock.now() >= next_line:
                self.say(f"waiting for {wanted()}: {self.status()}")
                next_line = clock.now() + STATUS
            clock.sleep(pause_between_looks(len(self._asked)))

    def status(self) -> str:
        """Return who is there, who was and is not, and who was refused and why, in one line."""
        clients = self.clients()
        here = [f"{name} (rank {own.rank}, {own.train} rows)" for name, own in self.infos()]
        here += [f"share {place} of {nodes}" for place, nodes in sorted(self.shares())]
        gone = [f"{name} (last seen {_clock_time(seen)})" for name, seen in self.seen.items() if name not in clients]
        refused = [f"node {number} ({reason})" for number, reason in self._refused.items()]
        parts = [_listed("here is", "here are", here) or "nobody is here"]
        parts += [_listed("gone is", "gone are", gone), _listed("refused was", "refused were", refused)]
        return "; ".join(filter(None, parts))

    @property
    def refused(self) -> int:
        """The number of connected nodes that are not let in."""
        return len(self._refused)

    def clients(self) -> dict[str, Node]:
        """Return the nodes of connected clients with their own data, sorted by the clients' names."""
        clients = {node.client.name: node for node in self.nodes.values() if node.client is not None}
        return dict(sorted(clients.items()))

    def infos(self) -> list[tuple[str, ClientInfo]]:
        """Return the connected clients with their own data, sorted by name."""
        return [(name, node.client) for name, node in self.clients().items() if node.client is not None]

    def shares(self) -> dict[tuple[int, int], Node]:
        """Return the nodes by their share of the configuration's clients."""
        return {node.share: node for node in self.nodes.values() if node.share is not None}

    def forget(self, number: int) -> None:
        """Remove a node, so that it is asked again."""
        self.nodes.pop(number, None)

    def _admit(self, number: int, answer: Envelope | DeliveryFailure, key: bytes) -> None:
        try:
            node = _read(number, answer)
            self._check(node, key)
        except HetLoraError as error:
            # It is asked again later, but reported once.
            if self._refused.get(number) != str(error):
                self.say(f"node {number} was refused: {error}")
                if not isinstance(answer, DeliveryFailure):
                    self._notify(number, str(error))  # it does not know: its own answer was no refusal
            self._refused[number] = str(error)
            self._not_before[number] = self.transport.clock.now() + AGAIN
            return
        self._refused.pop(number, None)
        self.nodes[number] = node
        if self._reported.get(number) != node:
            self.say(f"{_called(node)} is there")
        self._reported[number] = node

    def _notify(self, number: int, reason: str) -> None:
        """Let a node's log say why the server refused it."""
        name = self.transport.send(Envelope("refused", {"reason": reason}), number, 0.0)
        if isinstance(name, str):
            self.transport.abandon([name])

    def _check(self, node: Node, key: bytes) -> None:
        if node.client is not None and key and self._keys.setdefault(node.client.name, key) != key:
            raise HetLoraError(f"client {node.client.name!r} has another key; give this one another name")
        for other in self.nodes.values():
            if node.client is not None and other.client is not None and node.client.name == other.client.name:
                raise HetLoraError(f"another node speaks for client {node.client.name!r} already; give it another name")
            if node.share is not None and other.share is not None:
                if node.share[1] != other.share[1]:
                    raise HetLoraError(f"num-partitions={node.share[1]}, and others say {other.share[1]}")
                if node.share == other.share:
                    raise HetLoraError(f"another node has partition-id={node.share[0]} already")


def _read(number: int, answer: Envelope | DeliveryFailure) -> Node:
    """Return the node that an answer announces, after checking every field."""
    if isinstance(answer, DeliveryFailure):
        raise HetLoraError(answer.reason)
    value = answer.value
    keeps = value.get("keeps")
    if answer.kind != "hello" or not isinstance(keeps, bool):
        raise HetLoraError("an answer that announces nobody")
    if "share" in value:
        share = value["share"]
        if not (isinstance(share, list) and len(share) == 2 and all(type(part) is int for part in share)):
            raise HetLoraError(quoted(f"share {share!r} is none"))
        place, nodes = share
        if not 0 <= place < nodes <= MOST_ROWS:
            raise HetLoraError(quoted(f"share {share!r} is none"))
        return Node(number, keeps, share=(place, nodes))
    return Node(number, keeps, client=_announced(value))


def _announced(value: Mapping[str, Any]) -> ClientInfo:
    name = value.get("name")
    numbers = {key: value.get(key) for key in ("rank", "train", "test")}
    if not (isinstance(name, str) and 1 <= len(name) <= MOST_NAME and name.isprintable()):
        raise HetLoraError(f"the name {ascii(name)[:MOST_NAME]} is none: up to {MOST_NAME} printable characters")
    for key, number in numbers.items():
        least = 0 if key == "test" else 1
        if type(number) is not int or not least <= number <= MOST_ROWS:
            raise HetLoraError(quoted(f"client {name!r} announces {key} = {number!r}"))
    quantize, weights = value.get("quantize"), value.get("weights")
    if quantize is not None and quantize not in QUANTIZED:
        raise HetLoraError(quoted(f"client {name!r} announces quantize = {quantize!r}"))
    if weights is not None and not (isinstance(weights, str) and re.fullmatch("[0-9a-f]{64}", weights)):
        raise HetLoraError(quoted(f"client {name!r} announces weights = {weights!r}"))
    return ClientInfo(name, **numbers, quantize=quantize, weights=weights)  # type: ignore[arg-type]


def _listed(one: str, several: str, items: list[str]) -> str:
    """Return a list as text, empty without items.

    Example:
        >>> _listed("here is", "here are", ["ana (rank 8, 120 rows)", "ben (rank 4, 80 rows)"])
        'here are ana (rank 8, 120 rows), ben (rank 4, 80 rows)'
    """
    more = f" and {len(items) - MOST_LISTED} more" if len(items) > MOST_LISTED else ""
    return f"{one if len(items) == 1 else several} {', '.join(items[:MOST_LISTED])}{more}" if items else ""


def _clock_time(seconds: float) -> str:
    return time.strftime("%H:%M:%S UTC", time.gmtime(seconds))


def _called(node: Node) -> str:
    if node.client is not None:
        own = node.client
        stored = f", base in {own.quantize}" if own.quantize not in (None, "none") else ""
        return f"client {own.name!r} (rank {own.rank}, {own.train} rows{stored}, node {node.number})"
    assert node.share is not None
    return f"node {node.number} (share {node.share[0]} of {node.share[1]})"
