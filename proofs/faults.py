"""Prove that under any fault a round over Flower equals its admitted updates and accounts for every client.

Every trial is a federation drawn by its seed: clients, nodes, ranks, method, precision, deadline, how likely which fault is.
Messages and answers are lost, late, doubled, reordered and damaged; nodes lie, die and come back with nothing in memory;
looks for answers hang; the SuperLink answers with HTTP 500; the server dies at any step and goes on from its last checkpoint.
Real are the engine, its transport, the bytes, the admission, the methods, the clients' half of a round and the checkpoints;
simulated are the grid, the time and the training.

After every round: each member of the cohort is accounted for once, as a report or as a failure; the state is that of a round
that is given the admitted updates alone, bit for bit, and in another order but for the last bits; it is what the method's
formula gives in NumPy and float64; ranks only shrink; clients trained on what the server sent; without damage on the way, what
was admitted is what a client computed in this very round; and the round ended at its deadline. Every run ends.

    python -m proofs.faults --trials 1 --seed 4711 --trace

repeats the trial of that seed alone, and prints every event.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from hetlora.core.method import Method
from hetlora.core.round import RoundReport, run_round
from hetlora.core.sampling import sample_cohort
from hetlora.core.types import Client, ClientFailure, ClientUpdate, ServerState, TrainTask
from hetlora.flower.engine import FlowerEngine
from hetlora.flower.membership import Node
from hetlora.flower.node_config import NodeConfig
from hetlora.flower.transport import Transport
from hetlora.methods import METHODS
from hetlora.runs.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from hetlora.runs.result import Measurement, RunTotals
from proofs.faulty_grid import ANNOUNCED, Faults, FaultyGrid, ServerCrash, SimulatedNode, node_of_own
from proofs.outcome import Outcome, arguments
from proofs.processes import chunks, in_processes
from proofs.rounds import Watched, problems_of, same, same_update
from proofs.simulated import first_state

__all__ = ["Federation", "main", "prove", "simulate"]

RANK = 4
LIVES = 4
"""How often the server of a trial is started at most."""
CHUNK = 250

# Method, its arguments, and the formula that `proofs.recomputed` takes.
RULES: tuple[tuple[str, dict[str, Any], Mapping[str, str]], ...] = (
    ("hetlora", {"gamma": 0.6, "min_rank": 1}, {"sum": "padded", "weights": "norm"}),
    (
        "hetlora",
        {"gamma": 0.6, "min_rank": 1, "unowned": "zero"},
        {"sum": "padded", "weights": "norm", "unowned": "zero"},
    ),
    ("hetlora", {"gamma": 0.6, "min_rank": 1, "per_module": True}, {"sum": "padded", "weights": "norm"}),
    ("hetlora", {"gamma": 0.6, "min_rank": 2, "weights": "examples"}, {"sum": "padded", "weights": "examples"}),
    ("hetlora", {"gamma": 0.6, "min_rank": 1, "weights": "equal"}, {"sum": "padded", "weights": "equal"}),
    ("zeropad", {}, {"sum": "padded", "weights": "examples"}),
    ("rbla", {}, {"sum": "owners", "weights": "examples"}),
    ("rbla", {"weights": "equal"}, {"sum": "owners", "weights": "equal"}),
    ("replication", {}, {"sum": "replicated", "weights": "examples"}),
    ("ffa_lora", {}, {"sum": "padded", "weights": "examples", "trains": "B"}),
    ("rolora", {}, {"sum": "padded", "weights": "examples", "trains": "turns"}),
    ("flexlora", {}, {"sum": "products", "weights": "examples"}),
    ("fedavg", {}, {"sum": "padded", "weights": "examples"}),
)


@dataclass(frozen=True)
class Federation:
    """What a trial simulates.

    Attributes:
        method: What the server and the clients do.
        rule: The method's formula.
        clients: All of them.
        cohort: Number of clients per round.
        rounds: Number of rounds.
        precision: Codec of the messages.
        deadline: Seconds per round.
        answers: Updates after which a round ends.
        every: Rounds between checkpoints.
        own: Whether every node is one client with its own data.
        nodes: Number of nodes.
        keeps: Whether one process does all of a node's work.
        faults: Probability per kind of fault.
    """

    method: Method[Any]
    rule: Mapping[str, str]
    clients: tuple[Client, ...]
    cohort: int
    rounds: int
    precision: Any
    deadline: float
    answers: int | None
    every: int
    own: bool
    nodes: int
    keeps: bool
    faults: Faults

    @classmethod
    def drawn(cls, rng: random.Random) -> Federation:
        """Draw a federation."""
        name, options, rule = rng.choice(RULES)
        count = rng.randint(2, 8)
        ranks = [RANK if name == "fedavg" else rng.randint(1, RANK) for _ in range(count)]
        cohort, own = rng.randint(1, count), rng.random() < 0.3
        return cls(
            method=METHODS[name](**options),
            rule=rule,
            clients=tuple(Client(f"c{index}", rank, ANNOUNCED) for index, rank in enumerate(ranks)),
            cohort=cohort,
            rounds=rng.randint(1, 4),
            precision=rng.choice(("float32", "float32", "bfloat16", "int8")),
            deadline=rng.choice((5.0, 20.0, 600.0)),
            answers=rng.choice((None, None, rng.randint(1, cohort))),
            every=rng.choice((1, 1, 2)),
            own=own,
            nodes=count if own else rng.randint(1, 4),
            keeps=rng.random() < 0.7,
            faults=Faults.drawn(rng),
        )

    def make_nodes(self) -> dict[int, SimulatedNode]:
        """Start the nodes; a hosting node has every n-th client."""
        names = [client.name for client in self.clients]
        nodes = {}
        for place in range(self.nodes):
            number, hosted = 100 + place, names[place :: self.nodes]
            if self.own:
                node, settings = node_of_own(number, names[place], int(str(self.clients[place].rank)), keeps=self.keeps)
            else:
                node = Node(number, self.keeps, share=(place, self.nodes))
                settings = NodeConfig(place=place, nodes=self.nodes)
            nodes[number] = SimulatedNode(node, settings, self.method, self.precision, hosted, names)
        return nodes


@dataclass
class Trial:
    """A federation and its events.

    Attributes:
        seed: Of the trial.
        folder: For checkpoints.
        problems: Errors.
        events: What happened, in order.
        counts: Occurrences per kind of fault, and work done.
    """

    seed: int
    folder: Path
    problems: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"faults:{self.seed}")
        self.federation = Federation.drawn(self.rng)
        federation = self.federation
        self.grid = FaultyGrid(self.rng, federation.make_nodes(), federation.faults, federation.deadline, self._tell)
        self.kept: tuple[ServerState, Path | None] = (first_state(self.seed, RANK), None)

    def _tell(self, when: float, text: str) -> None:
        self.events.append(f"{when:10.2f} s  {text}")

    def run(self) -> None:
        """Run the federation; restart the server when it dies."""
        for life in range(LIVES):
            state = self._restored()
            if self.grid.chance(self.federation.faults.crash) and life + 1 < LIVES:
                self.grid.crash_in = self.rng.choice((1, 3, 10, 30, 100))
            try:
                self._serve(state)
            except (ServerCrash, httpx.HTTPError):
                self.grid.crash_in = None
                self.grid.clock.sleep(self.rng.uniform(1.0, self.federation.deadline))
            else:
                break
        else:
            if not self.grid.counts.get("crash"):
                self.problems.append("the run did not end")
        self.problems += self.grid.problems
        self.counts.update(self.grid.counts)

    def _restored(self) -> ServerState:
        """Return the state of the newest checkpoint, or the first state."""
        expected, path = self.kept
        if path is None:
            return expected
        state = read_checkpoint(path).progress.state
        self.grid.tell(f"the server goes on after round {state.round}")
        if not same(state, expected) or state.answered != expected.answered:
            self.problems.append(f"the state that was restored after round {state.round} is another")
        return state

    def _serve(self, state: ServerState) -> None:
        """Serve until the run is complete or the server dies."""
        federation, grid = self.federation, self.grid
        transport = Transport(grid, clock=grid.clock)
        engine = FlowerEngine(
            transport, {}, self._node_of, federation.precision, deadline=federation.deadline, answers=federation.answers
        )
        while state.round < federation.rounds:
            transport.discard_late()  # as the registry does before every round
            for node in grid.nodes.values():
                if grid.chance(federation.faults.gone):
                    after = self.rng.uniform(0.0, federation.deadline)
                    grid.clock.later(after, lambda node=node: grid.node_dies(node))  # type: ignore[misc]
            cohort = sample_cohort(federation.clients, federation.cohort, state.round, self.seed)
            grid.tell(f"round {state.round} of {', '.join(client.name for client in cohort)}")
            watched, began, sent = Watched(federation.method, grid.step), grid.clock.now(), len(grid.sent)
            after_round, report = run_round(state, watched.method, _Telling(engine, grid), cohort)
            grid.tell(
                f"round {state.round} ends: {', '.join(client.client for client in report.clients) or 'nobody'} admitted; "
                + "; ".join(f"{failure.client}: {failure.reason}" for failure in report.failures)
            )
            took, most = grid.clock.now() - began, federation.deadline + 1.0 + len(grid.sent) - sent
            if took > most:
                self.problems.append(f"round {state.round} took {took:.1f} s, and {most:.1f} s is the most")
            self._check(state, after_round, report, cohort, watched.admitted)
            state = after_round
            grid.step()
            if state.round % federation.every == 0:
                self.kept = (state, write_checkpoint(_checkpoint(state), self.folder))
                grid.tell(f"a checkpoint after round {state.round}")
                grid.step()

    def _node_of(self, client: str) -> Node | None:
        found = next(node for node in self.grid.nodes.values() if client in node.clients)
        return found.node if found.up else None

    def _check(
        self,
        before: ServerState,
        after: ServerState,
        report: RoundReport,
        cohort: Sequence[Client],
        admitted: Sequence[ClientUpdate],
    ) -> None:
        """Check all invariants of a round."""
        self.counts.update({"rounds": 1, "admitted": len(admitted), "asked": len(cohort)})
        found = list(problems_of(self.federation.method, self.federation.rule, before, after, report, cohort, admitted))
        faults = self.federation.faults
        if not faults.corrupt and self.federation.precision == "float32":
            computed = [update for node in self.grid.nodes.values() for update in node.did]
            found += [
                f"what was admitted of {update.client!r} is nothing that it computed in this round"
                for update in admitted
                if not any(same_update(update, own) for own in computed)
            ]
        self.problems += [f"round {before.round}: {problem}" for problem in found]


@dataclass(frozen=True)
class _Telling:
    """An engine that passes the server's tasks to the grid."""

    engine: FlowerEngine
    grid: FaultyGrid

    def train(self, tasks: Sequence[TrainTask], method: Method[Any]) -> Iterator[ClientUpdate | ClientFailure]:
        self.grid.tasks = {task.client: task for task in tasks}
        yield from self.engine.train(tasks, method)


def _checkpoint(state: ServerState) -> Checkpoint:
    nothing = Measurement({}, {}, ())
    return Checkpoint(RunTotals(state), nothing, 1, "0" * 64, 0.0, {}, {}, 1, {})


def simulate(seed: int) -> Trial:
    """Do the trial of a seed."""
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(seed, Path(folder))
        try:
            trial.run()
        except Exception as error:  # noqa: BLE001  that is what must not happen
            trial.problems.append(f"the run ended with {error!r}")
        return trial


def piece(first: int, last: int) -> dict[str, Any]:
    """Do the trials `first … last - 1`, and return the results as plain data."""
    problems, counts = [], Counter[str]()
    for seed in range(first, last):
        trial = simulate(seed)
        counts.update(trial.counts)
        problems += [f"{problem}; {again(seed)}" for problem in trial.problems]
    return {"problems": problems, "counts": dict(counts), "trials": last - first}


def again(seed: int) -> str:
    """Return the command that repeats one trial."""
    return f"python -m proofs.faults --trials 1 --seed {seed} --trace"


def prove(trials: int, seed: int, processes: int | None = None) -> Outcome:
    """Run the trials of consecutive seeds.

    Args:
        trials: Number of trials.
        seed: Seed of the first trial.
        processes: Maximum number of processes; None for the number of cores.
    """
    outcome, counts = Outcome("faults", seed), Counter[str]()
    pieces = [(part[0], part[-1] + 1) for part in chunks(seed, trials, CHUNK)]
    for part in in_processes(piece, pieces, processes):
        counts.update(part["counts"])
        outcome.tried(part["problems"], trials=part["trials"], of=trials)
    outcome.figures["counts"] = dict(sorted(counts.items()))
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Run the proof; return the exit code."""
    parser = arguments(__doc__ or "", trials=10_000)
    parser.add_argument("--trace", action="store_true", help="tell every event of every trial")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.trace:
        for seed in range(options.seed, options.seed + options.trials):
            trial = simulate(seed)
            print(f"seed {seed}: {trial.federation}", *trial.events, *trial.problems, sep="\n")
    return prove(options.trials, options.seed).end()


if __name__ == "__main__":
    sys.exit(main())
