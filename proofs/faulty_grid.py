"""A Flower federation in one process with seeded faults of every kind, in virtual time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import httpx
import torch
from flwr.app import Message, RecordDict
from flwr.app.error import Error

from hetlora.core.adapter import Adapter, FlatAdapter
from hetlora.core.method import Method
from hetlora.core.round import local_round
from hetlora.core.types import ClientFailure, ClientUpdate, TrainTask
from hetlora.flower.client_runtime import ClientMemory, ClientRuntime
from hetlora.flower.envelope import Envelope
from hetlora.flower.flwr_messages import from_record_dict, to_record_dict
from hetlora.flower.membership import ClientInfo, Node
from hetlora.flower.node_config import NodeConfig
from hetlora.flower.wire.numbers import compress, decompress
from proofs.grid import LocalGrid, VirtualClock
from proofs.simulated import trained

__all__ = ["Faults", "FaultyGrid", "ServerCrash", "SimulatedNode"]


class ServerCrash(BaseException):
    """The server's process is gone, at this very step."""


@dataclass(frozen=True)
class Faults:
    """Probability of each fault, per message, pull, node or round.

    Attributes:
        lost: A message or an answer never arrives.
        late: It takes up to twice the round's deadline.
        twice: It arrives a second time.
        corrupt: Bits of an answer change, or its content is another.
        lie: A node gives a wrong answer.
        fails: A client reports a failure.
        gone: A node dies in a round, loses its memory and comes back.
        hangs: A pull of answers takes minutes.
        refused: A message cannot be sent.
        crash: The server dies within the next steps.
    """

    lost: float
    late: float
    twice: float
    corrupt: float
    lie: float
    fails: float
    gone: float
    hangs: float
    refused: float
    crash: float

    @classmethod
    def drawn(cls, rng: random.Random) -> Faults:
        """Draw the probabilities: some kinds of fault never happen, others often."""
        return cls(**{kind.name: rng.choice((0.0, 0.0, 0.02, 0.1, 0.4)) for kind in fields(cls)})


@dataclass
class SimulatedNode:
    """A node of the federation and its process, which may die.

    Attributes:
        node: The server's entry for it.
        settings: Its owner's settings.
        method: Of the run.
        precision: Codec of the tasks.
        clients: The clients it hosts.
        everybody: All clients of the federation, in order.
        up: Whether it is connected.
        lives: Number of starts.
        process: Its memory.
        did: Results of its clients.
        waiting: Messages that the SuperLink holds while it is offline.
    """

    node: Node
    settings: NodeConfig
    method: Method[Any]
    precision: Any
    clients: list[str]
    everybody: list[str]
    up: bool = True
    lives: int = 0
    process: _Process = field(init=False)
    did: list[ClientUpdate] = field(default_factory=list)
    waiting: list[tuple[str, Message]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin with an empty memory."""
        self.lives += 1
        self.process = _Process(self)


class _Process(ClientRuntime):
    """The clients of a node as they are, but for what is loaded and computed: they train by `proofs.simulated.trained`."""

    def __init__(self, owner: SimulatedNode) -> None:
        self.settings, self.method = owner.settings, owner.method
        self._find = owner.everybody.index
        self.memories: dict[str, ClientMemory] = {}
        self.precision = owner.precision
        self.truth: Mapping[str, TrainTask] = {}
        self.failing: Callable[[], bool] = lambda: False
        self.did = owner.did
        self.problems: list[str] = []

    def fit(self, task: TrainTask) -> ClientUpdate | ClientFailure:
        """Train one client; check that it received what was sent."""
        meant = self.truth[task.client]
        if (task.round, task.rank, task.trains, task.sends) != (meant.round, meant.rank, meant.trains, meant.sends):
            self.problems.append(f"client {task.client!r} trains another task of round {task.round} than it was sent")
        elif not _as_sent(task.adapter, meant.adapter, self.precision):
            self.problems.append(
                f"client {task.client!r} trains on other factors in round {task.round} than it was sent"
            )
        if self.failing():
            if len(self.did) % 2:
                raise MemoryError("no memory")
            return ClientFailure(task.client, "training broke down")
        [answer] = local_round([task], self.method, lambda tasks, _: [trained(tasks[0])])
        if isinstance(answer, ClientUpdate):
            self.did.append(answer)
        return answer


def _as_sent(got: Adapter, sent: Adapter, precision: Any) -> bool:
    """Whether every factor is what the way makes of the one that was sent; rounding is the same whenever it happens."""
    for name, pair in sent.items():
        layout = [((name,), (1, *pair.A.shape), (1, *pair.B.shape))]
        whole = FlatAdapter(torch.cat([factor.flatten() for factor in pair]), layout)
        rounded = FlatAdapter(decompress(compress(whole, precision)), layout)
        if not all(torch.equal(mine, other) for mine, other in zip(got[name], rounded[name], strict=True)):
            return False
    return got.keys() == sent.keys()


class FaultyGrid(LocalGrid):
    """Flower's grid with its SuperLink and nodes.

    Args:
        rng: Random generator of the simulation.
        nodes: By number.
        faults: Probability per kind of fault.
        deadline: Seconds per round.
        tell: Called with every event.

    Attributes:
        clock: The time of all.
        tasks: Client to the task that the server is sending; `sent` keeps it by message.
        crash_in: Steps until the server dies; None for never.
        problems: Errors that the clients found.
        counts: Occurrences per kind of event.
    """

    def __init__(
        self,
        rng: random.Random,
        nodes: Mapping[int, SimulatedNode],
        faults: Faults,
        deadline: float,
        tell: Callable[[float, str], None],
    ) -> None:
        super().__init__()
        self.rng, self.nodes, self.faults, self.deadline = rng, nodes, faults, deadline
        self.clock = VirtualClock(self._look, self.step)
        self._tell = tell
        self.tasks: Mapping[str, TrainTask] = {}
        self.sent: dict[str, dict[str, TrainTask]] = {}
        self.answers: dict[str, list[Message]] = {}
        self.old: dict[str, list[bytes]] = {}
        self.crash_in: int | None = None
        # By a generator of its own, so that a trial is what it was before there was this kind of fault.
        self._overload = random.Random(repr(rng.getstate()[1][:8]))
        self._overloaded = self._overload.choice((0.0, 0.0, 0.02, 0.1, 0.4))
        self.problems: list[str] = []
        self.counts: dict[str, int] = {}

    # What the server does -------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Count a step of the server; it may crash here."""
        if self.crash_in is not None:
            self.crash_in -= 1
            if self.crash_in <= 0:
                self.crash_in = None
                self.happens("crash", "the server dies")
                raise ServerCrash

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are connected."""
        return [number for number, node in self.nodes.items() if node.up]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages on their way."""
        names = []
        for message in messages:
            self.step()
            if message.metadata.message_id in self.sent:  # pushed again after an error: it is there already
                names.append(message.metadata.message_id)
                continue
            self.answers_with_an_error()
            if self.chance(self.faults.refused):
                self.happens("refused", "a message cannot be sent")
                continue
            name = self.named(message)
            names.append(name)
            clients = from_record_dict(message.content).value["clients"]
            self.sent[name] = {client: self.tasks[client] for client in clients}
            self.tell(f"{name} to node {message.metadata.dst_node_id}: {', '.join(clients)}")
            self.travels("task", name, lambda name=name, message=message: self.arrives(name, message))  # type: ignore[misc]
            self.answers_with_an_error()
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the available answers, each once."""
        self.step()
        self.answers_with_an_error()
        found = [answer for name in message_ids for answer in self.answers.pop(name, [])]
        if found and self.chance(self.faults.corrupt / 4):
            self.happens("corrupt", "an answer cannot be unpacked")
            raise ValueError("bad object")
        if self.chance(self.faults.crash / 50):
            self.happens("crash", "the SuperLink is lost")
            raise httpx.ConnectError("the SuperLink is lost")
        return found

    # What happens in between ------------------------------------------------------------------------------------------

    def tell(self, text: str) -> None:
        """Record an event."""
        self._tell(self.clock.now(), text)

    def chance(self, share: float) -> bool:
        """Draw whether something happens."""
        return share > 0.0 and self.rng.random() < share

    def happens(self, kind: str, text: str) -> None:
        """Count and record a fault."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.tell(text)

    def answers_with_an_error(self) -> None:
        """Let the SuperLink answer with HTTP 500, as one whose database is locked.

        Raises:
            httpx.HTTPStatusError: It does.
        """
        if self._overload.random() < self._overloaded:
            self.happens("overloaded", "the SuperLink answers with an error")
            request = httpx.Request("POST", "https://superlink/v1/runtime")
            raise httpx.HTTPStatusError("database is locked", request=request, response=httpx.Response(500))

    def _look(self) -> float:
        if self.chance(self.faults.hangs):
            self.happens("hangs", "a look for an answer hangs")
            return self.rng.uniform(1.0, 3.0 * self.deadline)
        return self.rng.choice((0.0, 0.01, 0.1))

    def travels(self, what: str, name: str, arrive: Callable[[], None]) -> None:
        """Let a task or an answer arrive once, twice, late or never."""
        if self.chance(self.faults.lost):
            self.happens("lost", f"the {what} of {name} is lost")
            return
        for _ in range(1 + self.chance(self.faults.twice)):
            seconds = self.rng.uniform(0.01, 0.5)
            if self.chance(self.faults.late):
                seconds = self.rng.uniform(0.2, 2.0) * self.deadline
                self.happens("late", f"the {what} of {name} takes {seconds:.1f} s")
            self.clock.later(seconds, arrive)

    def node_dies(self, node: SimulatedNode) -> None:
        """Let a node die now and come back later, with nothing in its memory."""
        if not node.up:
            return
        self.happens("gone", f"node {node.node.number} dies")
        node.up = False

        def back() -> None:
            node.start()
            node.up = True
            self.tell(f"node {node.node.number} is back")
            waiting, node.waiting = node.waiting, []
            self.rng.shuffle(waiting)
            for name, message in waiting:
                self.arrives(name, message)

        self.clock.later(self.rng.uniform(0.1, 1.5) * self.deadline, back)

    # What a node does -------------------------------------------------------------------------------------------------

    def arrives(self, name: str, message: Message) -> None:
        """Let a node take a task: it trains, or the SuperLink keeps it, or nobody does."""
        node = self.nodes[message.metadata.dst_node_id]
        if not node.up:
            keep = self.chance(0.5)
            self.tell(f"{name} finds node {node.node.number} away{', and waits' if keep else ''}")
            if keep:
                node.waiting.append((name, message))
            return
        life = node.lives
        self.clock.later(self.rng.uniform(0.1, 0.6) * self.deadline, lambda: self.is_done(name, message, node, life))

    def is_done(self, name: str, message: Message, node: SimulatedNode, life: int) -> None:
        """Let a node answer, if it is still the same process."""
        if node.lives != life or not node.up:
            self.tell(f"the work on {name} died with node {node.node.number}")
            return
        process = node.process
        process.truth, process.failing = self.sent[name], lambda: self.chance(self.faults.fails)
        said = process.train(from_record_dict(message.content), node.settings, keeps=node.node.keeps)
        self.problems += process.problems
        process.problems = []
        reply = self._said(said, name, message, node)
        self.tell(f"node {node.node.number} answers {name}")
        self.travels("answer", name, lambda: self.answers.setdefault(name, []).append(reply))

    def _said(self, said: Envelope, name: str, message: Message, node: SimulatedNode) -> Message:
        """Return the node's answer: honest, a lie, or damaged."""
        if self.chance(self.faults.lie):
            lie = self.rng.choice(sorted(LIES))
            self.happens("lie", f"node {node.node.number} lies in {name}: {lie}")
            said = LIES[lie](self.rng, said, self.old, node)
        for entry, blob in zip(_entries(said), said.blobs, strict=False):
            self.old.setdefault(str(entry.get("client")), []).append(blob)
        if self.chance(self.faults.corrupt):
            self.happens("corrupt", f"the answer of {name} is damaged")
            way = self.rng.randrange(4)
            if way == 0:
                return Message(Error(self.rng.choice((1, 2, 5, 8)), "damaged"), reply_to=message)
            if way == 1:
                return Message(RecordDict(), reply_to=message)
            said = replace(said, blobs=[_damaged(self.rng, blob) for blob in said.blobs])
        return Message(to_record_dict(said), reply_to=message)


def _damaged(rng: random.Random, blob: bytes) -> bytes:
    """Flip bits; of the numbers mostly, where the outcome may be a valid update."""
    data = bytearray(blob)
    begin = 8 + int.from_bytes(data[:8], "little") if rng.random() < 0.8 else 0
    for _ in range(rng.choice((1, 3))):
        if begin < len(data):
            data[rng.randrange(begin, len(data))] ^= 1 << rng.randrange(8)
    return bytes(data[: len(data) - rng.choice((0, 0, 0, 1, 5))])


Lie = Callable[[random.Random, Envelope, "dict[str, list[bytes]]", SimulatedNode], Envelope]


def _entries(said: Envelope) -> list[dict[str, Any]]:
    answers = said.value.get("answers")
    return [entry for entry in answers if isinstance(entry, dict)] if isinstance(answers, list) else []


def _replayed(rng: random.Random, said: Envelope, old: dict[str, list[bytes]], _: SimulatedNode) -> Envelope:
    """Answer with the bytes of an earlier round."""
    blobs = [
        rng.choice(old.get(str(entry.get("client"))) or [blob])
        for entry, blob in zip(_entries(said), said.blobs, strict=False)
    ]
    return replace(said, blobs=blobs)


def _renamed(rng: random.Random, said: Envelope, _: dict[str, list[bytes]], node: SimulatedNode) -> Envelope:
    names = [*node.clients, "eve", "c0", "c1"]
    return replace(said, value={"answers": [{**entry, "client": rng.choice(names)} for entry in _entries(said)]})


LIES: dict[str, Lie] = {
    "an earlier answer": _replayed,
    "other names": _renamed,
    "answers of each other": lambda _, said, __, ___: replace(said, blobs=said.blobs[1:] + said.blobs[:1]),
    "everything twice": lambda _, said, __, ___: Envelope("train", {"answers": _entries(said) * 2}, said.blobs * 2),
    "one is left out": lambda _, said, __, ___: Envelope("train", {"answers": _entries(said)[1:]}, said.blobs[1:]),
    "one answer for all": lambda _, said, __, ___: replace(said, blobs=said.blobs[:1] * len(said.blobs)),
    "it lacks what it has": lambda _, said, __, ___: replace(
        said, value={"answers": [{"client": entry.get("client"), "lacks": "A"} for entry in _entries(said)]}
    ),
    "nothing": lambda _, __, ___, ____: Envelope("train", {}, []),
    "a refusal": lambda _, __, ___, ____: Envelope("refused", {"reason": "no memory"}),
    "no answers but bytes": lambda rng, said, _, __: Envelope(
        "train", {"answers": rng.choice([1, [1], {}])}, said.blobs
    ),
}

ANNOUNCED = 9
"""Rows of every client: `proofs.simulated.trained` uses as many at most."""


def node_of_own(number: int, name: str, rank: int, *, keeps: bool) -> tuple[Node, NodeConfig]:
    """Return a node that is one client with data of its own."""
    return Node(number, keeps, client=ClientInfo(name, rank, ANNOUNCED, 0)), NodeConfig(
        data="rows.jsonl", name=name, rank=rank
    )
