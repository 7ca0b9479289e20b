"""The engine for clients on other machines: sends tasks over Flower and yields answers as they arrive."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hetlora.core.admission import AdmissionRule, ExpectedTraining, admit
from hetlora.core.codecs import CODECS
from hetlora.core.method import Method, expected
from hetlora.core.types import ClientFailure, ClientUpdate, TrainTask
from hetlora.errors import ConfigError, RefusedUpdateError, WireError
from hetlora.flower.envelope import MOST_CLIENTS, Envelope, quoted
from hetlora.flower.flwr_messages import adapters_size
from hetlora.flower.membership import MOST_LISTED, STATUS, Node
from hetlora.flower.transport import PATIENCE, DeliveryFailure, Transport, pause_between_looks
from hetlora.flower.wire.codec import max_update_bytes, pack_task, parse_update

__all__ = ["FlowerEngine", "check_method"]

BUNDLE = 2**28
"""Bytes of tasks per message; Flower's limit is 2 GiB."""


def check_method(method: Method[Any]) -> None:
    """Refuse a method whose clients must keep or receive data that does not travel.

    Raises:
        ConfigError: With the reason.
    """
    problem = None
    if method.clients != "sampled":
        problem = "its clients are not the federation's"
    elif method.trains != "adapter":
        problem = "it trains whole weights, and only adapters travel"
    elif method.keep is not None:
        problem = "it keeps factors on the clients"
    elif method.folds:
        problem = "it changes the base, and only adapters travel"
    if problem is not None:
        raise ConfigError(
            "the configuration",
            [f"method.name = {method.name!r} does not run over Flower: {problem}; run it in-process, or take hetlora"],
        )


@dataclass(frozen=True)
class _Sent:
    """Tasks on their way to a node."""

    node: Node
    tasks: list[TrainTask]


@dataclass
class FlowerEngine:
    """An `Engine` over Flower's grid.

    A node's tasks travel in one message. A round ends after `answers` updates or at its deadline; late answers are ignored. A
    malformed answer affects only the clients of its node.

    Attributes:
        transport: Sends messages and receives answers.
        terms: Part of every message: the wire's version, the run as JSON, the identity of its base.
        node_of: Returns the current node of a client.
        precision: The codec of the adapters, in `hetlora.core.codecs.CODECS`.
        deadline: Seconds that a round waits for answers.
        answers: Updates after which a round ends; None waits for all.
        training: An honest client's training, see `hetlora.core.admission.admit`.
        say: Called once a minute with who has not answered.
        name: Random id of this server process; distinguishes its rounds from those of an earlier process.
    """

    transport: Transport
    terms: Mapping[str, Any]
    node_of: Callable[[str], Node | None]
    precision: str = "float32"
    deadline: float = 3600.0
    answers: int | None = None
    training: ExpectedTraining | None = None
    say: Callable[[str], None] = lambda _: None
    name: str = field(default_factory=lambda: os.urandom(8).hex())
    _held: dict[str, tuple[int, int]] = field(default_factory=dict)  # node and round of each client's last answer

    def train(self, tasks: Sequence[TrainTask], method: Method[Any]) -> Iterator[ClientUpdate | ClientFailure]:
        """Yield the clients' answers as they arrive, then the failures of the others."""
        check_method(method)
        honest = expected(method, self.training, CODECS[self.precision].rounding_bound)
        clock = self.transport.clock
        until = clock.now() + self.deadline
        by_node: dict[int, _Sent] = {}
        for task in tasks:
            node = self.node_of(task.client)
            if node is None:
                yield ClientFailure(task.client, "not connected")
            else:
                by_node.setdefault(node.number, _Sent(node, [])).tasks.append(task)
        waiting: dict[str, _Sent] = {}
        for sent in by_node.values():
            yield from self._send(sent, waiting, until)
        came, last = 0, False
        began = clock.now()
        next_line = began + STATUS
        while waiting and not last and (self.answers is None or came < self.answers):
            # One last pass after the deadline takes answers that arrived during the previous pass.
            last = clock.now() >= until
            for name in list(waiting):
                reply = self.transport.poll(name, min(PATIENCE, max(0.5, until - clock.now())))
                if reply is None:
                    continue
                for answer in self._read(reply, waiting.pop(name), waiting, until, honest):
                    came += isinstance(answer, ClientUpdate)
                    yield answer
            if waiting and clock.now() >= next_line:
                self.say(_awaited(waiting, clock.now() - began, self.deadline))
                next_line = clock.now() + STATUS
            if waiting and not last and (self.answers is None or came < self.answers):
                clock.sleep(min(pause_between_looks(len(waiting)), max(0.0, until - clock.now())))
        self.transport.abandon(waiting)
        enough = self.answers is not None and came >= self.answers
        reason = f"not awaited: {came} others had answered" if enough else f"no answer within {self.deadline:g} s"
        for sent in waiting.values():
            for task in sent.tasks:
                yield ClientFailure(task.client, reason)

    def _send(
        self, sent: _Sent, waiting: dict[str, _Sent], until: float, *, whole: bool = False
    ) -> Iterator[ClientFailure]:
        """Send a node its tasks; yield failures of those that cannot be sent."""
        for bundle, blobs in self._bundles(sent, whole=whole):
            clients = [task.client for task in bundle]
            value = {
                **self.terms,
                "precision": self.precision,
                "server": self.name,
                "clients": clients,
                "since": [self._since(task, sent.node, whole=whole) for task in bundle],
            }
            name = self.transport.send(
                Envelope("train", value, blobs),
                sent.node.number,
                max(0.0, until - self.transport.clock.now()),
                clients=clients,
                adapters=adapters_size([max_update_bytes(task, self.precision) for task in bundle]),
            )
            if isinstance(name, DeliveryFailure):
                yield from (ClientFailure(task.client, name.reason) for task in bundle)
            else:
                waiting[name] = _Sent(sent.node, bundle)

    def _bundles(self, sent: _Sent, *, whole: bool) -> Iterator[tuple[list[TrainTask], list[bytes]]]:
        tasks: list[TrainTask] = []
        blobs: list[bytes] = []
        size = 0
        for task in sent.tasks:
            factors = "AB" if self._since(task, sent.node, whole=whole) is None else task.receives
            blob = pack_task(task, precision=self.precision, factors=factors)
            if tasks and (size + len(blob) > BUNDLE or len(tasks) == MOST_CLIENTS):
                yield tasks, blobs
                tasks, blobs, size = [], [], 0
            tasks.append(task)
            blobs.append(blob)
            size += len(blob)
        if tasks:
            yield tasks, blobs

    def _since(self, task: TrainTask, node: Node, *, whole: bool) -> int | None:
        """Return the round from which the client has the factors that need not travel; None if all must travel.

        It is part of the message, because messages may be repeated or reordered: the client compares it with its own factors.
        """
        number, round_number = self._held.get(task.client, (None, None))
        return round_number if node.keeps and number == node.number and not whole and task.receives else None

    def _read(
        self,
        reply: Envelope | DeliveryFailure,
        sent: _Sent,
        waiting: dict[str, _Sent],
        until: float,
        honest: AdmissionRule,
    ) -> Iterator[ClientUpdate | ClientFailure]:
        """Yield a node's answers; send tasks again whose factors a client lacks."""
        if isinstance(reply, DeliveryFailure):
            yield from (ClientFailure(task.client, reply.reason) for task in sent.tasks)
            return
        asked = {task.client: task for task in sent.tasks}
        blobs = iter(reply.blobs)
        answers = reply.value.get("answers")
        for entry in answers[: len(sent.tasks)] if isinstance(answers, list) else []:
            client = entry.get("client") if isinstance(entry, Mapping) else None
            task = asked.pop(client, None) if isinstance(client, str) else None
            if task is None:
                continue  # unknown client or second answer
            if "failure" in entry:
                yield ClientFailure(task.client, quoted(entry["failure"]))
            elif "lacks" in entry and self._held.pop(task.client, None) is not None:
                yield from self._send(_Sent(sent.node, [task]), waiting, until, whole=True)
            elif "lacks" in entry:
                yield ClientFailure(task.client, quoted(entry["lacks"]))
            else:
                yield self._update(task, next(blobs, b""), sent.node, honest)
        yield from (ClientFailure(client, "its node's answer leaves it out") for client in asked)

    def _update(self, task: TrainTask, data: bytes, node: Node, honest: AdmissionRule) -> ClientUpdate | ClientFailure:
        try:
            if len(data) > (limit := max_update_bytes(task, self.precision)):
                return ClientFailure(task.client, f"refused: an update of {len(data)} bytes, where {limit} is the most")
            update = parse_update(data, task, self.precision)
            # Also checked here, since refused updates must not count towards `answers`.
            admit(update, {task.client: task}, (), honest)
        except (WireError, RefusedUpdateError) as error:
            return ClientFailure(task.client, quoted(f"refused: {error}"))
        if node.client is not None and update.examples > node.client.train:
            announced = f"where its node announced {node.client.train}"
            return ClientFailure(task.client, f"refused: {update.examples} examples, {announced}")
        self._held[task.client] = (node.number, task.round)
        return update


def _awaited(waiting: Mapping[str, _Sent], seconds: float, deadline: float) -> str:
    """Return a line about clients that have not answered."""
    tasks = [task for sent in waiting.values() for task in sent.tasks]
    names = [task.client for task in tasks]
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    listed = ", ".join(names[:MOST_LISTED]) + more
    return f"round {tasks[0].round + 1}: no answer yet from {listed}, after {seconds:.0f} of at most {deadline:g} s"
