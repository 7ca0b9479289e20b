"""Prove on a million updates that no malformed one is admitted and no honest one is lost.

Every trial is one malformed answer of the client mallory, by its own seed: bytes of the wire, or a value in place of a
`ClientUpdate`. Blocks of them come in one round among the answers of honest clients, through the code that a round runs.
Proved of each block: mallory is not admitted, every honest client is, and the state after the round is that of the honest
clients alone, bit for bit. A mutation that leaves a valid message, which `proofs.wire_oracle` tells without the package's code,
must be admitted. Now and then a block goes over Flower's messages, each answer in a round of its own.

    python -m proofs.admission --trials 1 --seed 4711

repeats the trial of that seed alone.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hetlora.core.admission import admit
from hetlora.core.method import Method
from hetlora.core.round import run_round
from hetlora.core.types import Client, ClientFailure, ClientUpdate, ServerState
from hetlora.errors import RefusedUpdateError, WireError
from hetlora.flower.wire.codec import pack_task, pack_update, parse_task, parse_update
from hetlora.methods import METHODS
from proofs.forgery import BYTES, MUTATIONS, OBJECTS, Honest
from proofs.outcome import Outcome, arguments
from proofs.processes import chunks, in_processes
from proofs.rounds import Given, same
from proofs.simulated import SHAPES, first_state, trained
from proofs.wire_oracle import acceptable

__all__ = ["main", "prove"]

BLOCK = 50
"""Trials of one round."""
CHUNK = 200 * BLOCK
"""Trials of one piece of work."""
FLOWER = 100
"""Every so many blocks go over Flower."""

SLOWEST = 0.5
"""Seconds of the processor's time that one answer may take."""
GROWTH = 128.0
"""Megabytes that memory may grow by, once every kind of round was there; the sizes that messages lie about begin at 2000."""

PRECISIONS = ("float32", "bfloat16", "int8")
MADE: Mapping[str, dict[str, Any]] = {
    "hetlora": {"gamma": 0.7, "min_rank": 1},
    "zeropad": {},
    "rbla": {},
    "ffa_lora": {},
    "rolora": {},
}
LIAR = Client("mallory", 3, 9)
HONEST = (
    Client("ana", 4, 9),
    Client("ben", 2, 9),
    Client("cleo", {name: 1 + index for index, name in enumerate(SHAPES)}, 9),
)


@dataclass(frozen=True)
class Scene:
    """A round that receives malformed answers.

    Attributes:
        method: The round's method.
        state: The state before the round.
        precision: Codec of the answers.
        honest: The answers of the honest clients as they arrive.
        bytes: The same as bytes.
        alone: The state after the round with these alone.
        liar: The honest answer of the lying client.
    """

    method: Method[Any]
    state: ServerState
    precision: str
    honest: tuple[ClientUpdate, ...]
    bytes: tuple[bytes, ...]
    alone: ServerState
    liar: Honest


SCENES = len(MADE) * len(PRECISIONS) * 4


@functools.cache
def scene(number: int) -> Scene:
    """Return one of `SCENES` rounds."""
    rest, which = divmod(number, len(MADE))
    variant, place = divmod(rest, len(PRECISIONS))
    precision: Any = PRECISIONS[place]
    name = list(MADE)[which]
    method = METHODS[name](**MADE[name])
    state = first_state(number, 4, round_number=variant)  # round 1 is equal to True
    liar = LIAR if variant % 2 else replace(LIAR, rank={module: 2 + index % 2 for index, module in enumerate(SHAPES)})
    answered = {client.name: _answer(method, state, client, precision) for client in (*HONEST, liar)}
    honest = tuple(
        parse_update(answered[client.name].data, answered[client.name].task) for client in HONEST
    )  # as bytes bring it
    alone, _ = run_round(state, method, Given(honest), HONEST)
    data = tuple(answered[client.name].data for client in HONEST)
    return Scene(method, state, precision, honest, data, alone, answered[liar.name])


def _answer(method: Method[Any], state: ServerState, client: Client, precision: Any) -> Honest:
    task = method.distribute(state, client)
    received = parse_task(pack_task(task, precision=precision))
    update = method.prune(received, trained(received))
    data = pack_update(update, received, precision=precision).data
    others = tuple(other.name for other in HONEST)
    return Honest(task, parse_update(data, task), data, others)


@dataclass
class Tally:
    """The results of some trials."""

    classes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    valid: int = 0
    slowest: float = 0.0
    slowest_class: str = ""
    growth: float = 0.0
    seconds: float = 0.0

    def took(self, kind: str, seconds: float) -> None:
        """Count one answer and the processor's time for it."""
        self.classes[kind] += 1
        self.seconds += seconds
        if seconds > self.slowest:
            self.slowest, self.slowest_class = seconds, kind


@dataclass(frozen=True)
class Forged:
    """A malformed answer.

    Attributes:
        kind: Its class.
        answer: Bytes, or a value in place of an update.
        valid: Whether it is a valid message by chance.
    """

    kind: str
    answer: Any
    valid: bool = False


def forged(seed: int, place: Scene) -> Forged:
    """Draw the malformed answer of a trial."""
    rng = random.Random(f"admission:{seed}")
    kinds, prefix = rng.choice(
        ((BYTES, "bytes"), (BYTES, "bytes"), (MUTATIONS, "mutation"), (MUTATIONS, "mutation"), (OBJECTS, "value"))
    )
    name = rng.choice(sorted(kinds))
    answer = kinds[name](rng, place.liar)
    if kinds is OBJECTS:
        return Forged(f"{prefix}: {name}", answer)
    valid = acceptable(answer, place.liar.task, place.precision)
    if valid and kinds is BYTES:
        raise AssertionError(f"the oracle calls {name!r} of seed {seed} valid, which it is not by construction")
    return Forged(f"{prefix}: {name}", answer, valid)


def received(answer: Any, place: Scene) -> Any:
    """Return what the round sees of an answer: an update or a refusal of its bytes.

    As `hetlora.flower.engine` reads an answer, but for the limit of its length, which a valid one may exceed by spaces.
    """
    task = place.liar.task
    if not isinstance(answer, bytes):
        return answer
    try:
        return parse_update(answer, task, place.precision)  # type: ignore[arg-type]
    except WireError as error:
        return ClientFailure(task.client, str(error))


def tried(trial: Forged, place: Scene, tally: Tally) -> tuple[Any, str | None]:
    """Process one answer; return what the round receives and the problem, if any."""
    task = place.liar.task
    began = time.thread_time()
    seen = received(trial.answer, place)
    admitted = False
    if not isinstance(seen, ClientFailure):
        try:
            admit(seen, {task.client: task}, ())
            admitted = True
        except RefusedUpdateError:
            pass
    tally.took(trial.kind, time.thread_time() - began)
    if admitted and not trial.valid:
        return seen, "it was admitted"
    if trial.valid and not admitted:
        return (
            seen,
            f"the oracle calls it valid, and it was refused: {seen.reason if isinstance(seen, ClientFailure) else seen}",
        )
    return seen, None


def block(seeds: range, tally: Tally) -> None:
    """Do the trials of one round."""
    place = scene(seeds[0] // BLOCK % SCENES)
    rng = random.Random(f"order:{seeds[0]}")
    seen: list[Any] = []
    for seed in seeds:
        trial = forged(seed, place)
        answer, problem = tried(trial, place, tally)
        tally.valid += trial.valid
        if problem:
            tally.problems.append(f"{trial.kind}: {problem}; {again(seed)}")
        elif not trial.valid:
            seen.append(answer)
    arrivals = sorted([*((rng.random(), answer) for answer in seen)], key=lambda pair: pair[0])
    places = sorted(rng.random() for _ in place.honest)
    stream = sorted([*arrivals, *zip(places, place.honest, strict=True)], key=lambda pair: pair[0])
    problem = round_problem(place, [answer for _, answer in stream])
    if problem:
        tally.problems.append(
            f"{problem}; a round of the seeds {seeds[0]} ... {seeds[-1]}: --trials {len(seeds)} --seed {seeds[0]}"
        )


def round_problem(place: Scene, answers: Sequence[Any]) -> str | None:
    """Run the round with these answers, and return what is wrong with its outcome."""
    liar = Client(LIAR.name, place.liar.task.rank, LIAR.examples)
    try:
        after, report = run_round(place.state, place.method, Given(answers), [*HONEST, liar])
    except Exception as error:  # noqa: BLE001  that is what must not happen
        return f"the round ended with {error!r}"
    if [client.client for client in report.clients] != [client.name for client in HONEST]:
        return f"admitted were {[client.client for client in report.clients]}"
    if LIAR.name not in {failure.client for failure in report.failures}:
        return "the client that lied is not accounted for"
    try:
        json.dumps([vars(failure) for failure in report.failures])
        json.dumps([vars(client) for client in report.clients], allow_nan=False)
    except (TypeError, ValueError) as error:
        return f"the report cannot be written: {error}"
    if not same(after, place.alone) or after.answered != place.alone.answered:
        return "the state is not that of the honest clients alone"
    return None


def again(seed: int) -> str:
    """Return the command that repeats one trial."""
    return f"python -m proofs.admission --trials 1 --seed {seed}"


def memory() -> tuple[float, float]:
    """Return the peak resident and virtual memory of this process, in megabytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return most, next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmPeak")), most)


@functools.cache
def warm() -> tuple[float, float]:
    """Run a round of every kind once; return the memory it took."""
    for number in range(SCENES):
        first = number * BLOCK
        block(range(first, first + BLOCK), Tally())
    over_flower(range(BLOCK), Tally())
    return memory()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Freeze existing objects, so that no single answer pays for collecting them."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def piece(first: int, last: int, *, warmed: bool) -> dict[str, Any]:
    """Do the trials `first … last - 1`, and return the results as plain data."""
    before = warm() if warmed else memory()
    tally = Tally()
    with uncollected():
        for seeds in chunks(first, last - first, BLOCK):
            (over_flower if seeds[0] // BLOCK % FLOWER == FLOWER - 1 else block)(seeds, tally)
            growth = max(now - then for now, then in zip(memory(), before, strict=True))
            if warmed and growth > GROWTH >= tally.growth:
                tally.problems.append(f"memory has grown by {growth:.0f} MB by the seeds {seeds[0]} ... {seeds[-1]}")
            tally.growth = max(tally.growth, growth)
    if tally.slowest > SLOWEST:
        tally.problems.append(
            f"an answer of {tally.slowest_class!r} took {tally.slowest:.2f} s; in the seeds {first} ... {last - 1}"
        )
    return {**vars(tally), "classes": dict(tally.classes), "peak": memory()[0]}


def over_flower(seeds: range, tally: Tally) -> None:
    """Run each trial in its own round, with answers as Flower messages."""
    from proofs.admission_flower import parcel_problem

    place = scene(seeds[0] // BLOCK % SCENES)
    for seed in seeds:
        began = time.thread_time()
        kind, problem = parcel_problem(seed, place)
        tally.took(f"flower: {kind}", time.thread_time() - began)
        if problem:
            tally.problems.append(f"flower: {kind}: {problem}; {again(seed)}")


def prove(trials: int, seed: int, processes: int | None = None) -> Outcome:
    """Run the trials of consecutive seeds.

    Args:
        trials: Number of trials.
        seed: Seed of the first trial.
        processes: Maximum number of processes; None for the number of cores.
    """
    outcome = Outcome("admission", seed)
    classes: Counter[str] = Counter()
    valid, growth, peak, slowest, seconds = 0, 0.0, 0.0, 0.0, 0.0
    pieces = [(part[0], part[-1] + 1) for part in chunks(seed, trials, CHUNK)]
    work = functools.partial(piece, warmed=trials > CHUNK)
    for part in in_processes(work, pieces, processes):
        classes.update(part["classes"])
        valid += part["valid"]
        growth, peak = max(growth, part["growth"]), max(peak, part["peak"])
        slowest, seconds = max(slowest, part["slowest"]), seconds + part["seconds"]
        outcome.tried(part["problems"], trials=sum(part["classes"].values()), of=trials)
    outcome.figures |= {
        "classes": dict(sorted(classes.items())),
        "by_hand": sum(not name.startswith("mutation") for name in classes),
        "malformed": sum(classes.values()) - valid,
        "valid_by_chance": valid,
        "updates_per_second_and_core": round(sum(classes.values()) / seconds) if seconds else None,
        "slowest_ms": round(1e3 * slowest, 2),
        "peak_megabytes": round(peak),
        "grown_megabytes": round(growth, 1),
    }
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Run the proof; return the exit code."""
    parser = arguments(__doc__ or "", trials=1_000_000)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    return prove(options.trials, options.seed).end()


if __name__ == "__main__":
    sys.exit(main())
