"""Codecs: the bytes of an update, and the cost of the rounding in training loss.

Every task and every update of a run of the demonstration goes through its bytes: the tasks as they are, the updates as changes,
with each client's residual kept for its next answer. The run in float32 is bit for bit the one without bytes. Of the others,
the training loss of the last round differs by less than that of different seeds does; see `benchmarks/precision.py`.

    OMP_NUM_THREADS=1 python -m benchmarks.wire [--quick]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.precision import SEEDS, agreement, curve, prepared
from benchmarks.server import cohort
from benchmarks.table import Row, row
from hetlora.core.adapter import Adapter
from hetlora.core.method import Engine, Method
from hetlora.core.types import ClientFailure, ClientUpdate, TrainTask
from hetlora.flower.wire.codec import max_update_bytes, pack_task, pack_update, parse_task, parse_update

HIDDEN, MODULES, RANK = 256, 24, 8
ROUNDS = {True: 2, False: 5}
TARGETS: dict[str, str] = {"bfloat16": "<= 0.55", "int8": "<= 0.3"}


class OverTheWire:
    """An engine that serializes everything between clients and server.

    Args:
        engine: The engine of the clients.
        precision: Codec of the factors, both ways.
    """

    def __init__(self, engine: Engine, precision: str) -> None:
        self.engine = engine
        self.precision = precision
        self.residuals: dict[str, Adapter | None] = {}

    def train(self, tasks: Sequence[TrainTask], method: Method[Any]) -> Iterator[ClientUpdate | ClientFailure]:
        """Yield each client's update as the server parses it."""
        asked = {task.client: task for task in tasks}
        received = {name: parse_task(pack_task(task, precision=self.precision)) for name, task in asked.items()}
        for answer in self.engine.train(list(received.values()), method):
            if isinstance(answer, ClientFailure):
                yield answer
                continue
            client = answer.client
            data, self.residuals[client] = pack_update(
                answer, received[client], precision=self.precision, residual=self.residuals.get(client)
            )
            assert len(data) <= max_update_bytes(asked[client], self.precision)
            yield parse_update(data, asked[client])


def rows(quick: bool) -> Iterable[Row]:
    """Yield the rows of the table."""
    yield from sizes()
    demo = prepared(quick)
    seeds = range(SEEDS[quick])
    exact, plain = last(demo, seeds, quick, "float32"), curve(demo, 0, ROUNDS[quick])
    assert exact[0] == plain[-1:]
    for precision in TARGETS:
        compressed = last(demo, seeds, quick, precision)
        yield agreement(f"{precision} on the wire", exact, compressed, "<= 1", judge=not quick)


def sizes() -> Iterator[Row]:
    """Yield the bytes of an update, all of them, against float32's."""
    state, [update] = cohort(HIDDEN, MODULES, (RANK,), 1)
    task = TrainTask(update.client, 0, RANK, state.adapter)
    whole = len(pack_update(update, task).data)
    for precision, target in TARGETS.items():
        length = len(pack_update(update, task, precision=precision).data)
        note = f"{length:,} of {whole:,} bytes: {MODULES} modules {HIDDEN} x {HIDDEN}, rank {RANK}, header included"
        yield row(f"update on the wire, {precision}: bytes of float32's", [length / whole], target, note=note)


def last(experiment: Any, seeds: Iterable[int], quick: bool, precision: str) -> list[list[float]]:
    """Return the last round's training loss a seed."""
    around = functools.partial(OverTheWire, precision=precision)
    return [curve(experiment, seed, ROUNDS[quick], around)[-1:] for seed in seeds]


def main() -> None:
    """Print the rows."""
    for line in rows("--quick" in sys.argv):
        print(f"{line.name}: {line.ratio:.3f} {line.target} {line.holds} {line.note}", flush=True)


if __name__ == "__main__":
    main()
