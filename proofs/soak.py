"""Prove that the memory of a long run stops growing after its first rounds.

A whole run in this process, 1,000 rounds of 100 clients on a random base of one layer, with HetLoRA that prunes, drop-outs,
measurements and a checkpoint after every round. After each round the proof reads from the system how much memory is resident,
how many files are open and how many threads there are. From round 100 on the most resident memory must stay below that of
round 100 and 1 % of it, and neither files nor threads may become more. glibc is set up as every run sets it up, to keep freed
memory (`hetlora.runs.process.prepare_process`); nothing is trimmed, and no garbage is collected but by Python itself.

    python -m proofs.soak            # trials are rounds; --clients, --settled: fewer, and the round that is compared with
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hetlora.config import RunConfig, parse_config
from hetlora.runs.display import QuietDisplay
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.runs.process import prepare_process, quiet_transformers
from hetlora.runs.records import RoundRecord
from proofs.outcome import Outcome, arguments
from proofs.small_run import document, write_base, write_rows

ROUNDS, CLIENTS, SETTLED = 1000, 100, 100
ALLOWED = 0.01
"""By what share of itself resident memory may grow."""


class Held(NamedTuple):
    """Memory, files and threads of a process."""

    resident: int
    """Bytes."""
    files: int
    threads: int


def held() -> Held:
    """Return those of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files, threads = (sum(1 for _ in Path("/proc/self", kind).iterdir()) for kind in ("fd", "task"))
    return Held(pages * os.sysconf("SC_PAGE_SIZE"), files, threads)


class Watching(QuietDisplay):
    """Record them after every round."""

    def __init__(self, outcome: Outcome, rounds: int) -> None:
        self.outcome, self.rounds = outcome, rounds
        self.seen: list[Held] = []

    def round_ended(self, record: RoundRecord) -> None:
        """Look."""
        self.seen.append(held())
        self.outcome.tried([] if record.clients else [f"nobody trained in round {record.round}"], of=self.rounds)


def config_of(folder: Path, rounds: int, clients: int, seed: int) -> RunConfig:
    """Write base and rows into a folder, and return the configuration of the run."""
    write_base(folder / "base", layers=1)
    write_rows(folder / "rows.jsonl", [f"client {number}" for number in range(clients)])
    whole = document(
        str(folder / "runs"),
        seed=seed,
        threads=1,
        model={"base": str(folder / "base"), "device": "cpu"},
        federation={"rounds": rounds, "clients_per_round": clients, "dropout": 0.05},
        training={"steps": 1, "batch_size": 1, "learning_rate": 1e-3},
        evaluation={"every": max(1, rounds // 20), "generate": 2, "max_new_tokens": 4},
    )
    whole["data"] = {**whole["data"], "path": str(folder / "rows.jsonl")}
    return parse_config(whole, "the configuration of the soak")


def soak(outcome: Outcome, rounds: int, clients: int, settled: int) -> None:
    """Run, and compare the process's resources after round `settled` with those later.

    Args:
        outcome: Receives the result.
        rounds: Number of rounds.
        clients: Number of clients, all in every round.
        settled: The reference round, from 1.
    """
    again = f"--trials {rounds} --clients {clients} --settled {settled} --seed {outcome.seed}"
    with tempfile.TemporaryDirectory() as folder:
        watching = Watching(outcome, rounds)
        config = config_of(Path(folder), rounds, clients, outcome.seed)
        result = LocalExperiment(config, watching).run()
        outcome.figures["records_megabytes"] = round(result.records.stat().st_size / 1e6, 1)
    outcome.figures |= {"updates": result.updates, "prunes": result.prunes}
    outcome.tried(growth(watching.seen, settled, outcome, again), trials=0)


def growth(seen: Sequence[Held], settled: int, outcome: Outcome, again: str) -> list[str]:
    """Return what grew after round `settled`, and record the figures."""
    begun, later = seen[settled - 1], seen[settled:]
    most = Held(*(max(column) for column in zip(*later, strict=True)))
    last = seen[-1]
    share = most.resident / begun.resident - 1.0
    outcome.figures |= {
        f"resident_megabytes_after_{settled}": round(begun.resident / 1e6, 2),
        f"resident_megabytes_after_{len(seen)}": round(last.resident / 1e6, 2),
        "most_resident_megabytes_later": round(most.resident / 1e6, 2),
        "growth_percent": round(100.0 * share, 3),
        "files": [begun.files, most.files],
        "threads": [begun.threads, most.threads],
    }
    problems = []
    if share >= ALLOWED:
        problems.append(
            f"resident memory grew by {100.0 * share:.2f} % after round {settled}, from {begun.resident} bytes "
            f"to {most.resident}; {again} repeats it"
        )
    for what in ("files", "threads"):
        if getattr(most, what) > getattr(begun, what):
            problems.append(
                f"{what} became more: {getattr(begun, what)} after round {settled}, then {getattr(most, what)}; "
                f"{again} repeats it"
            )
    return problems


def main(options: Sequence[str] | None = None) -> int:
    """Run the proof; return the exit code."""
    parser = arguments(__doc__ or "", ROUNDS)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--settled", type=int, default=SETTLED, help="the round that later ones are compared with")
    chosen = parser.parse_args(options)
    if not 1 <= chosen.settled < chosen.trials:
        parser.error("--settled is a round before the last one")
    prepare_process()
    quiet_transformers()
    outcome = Outcome("soak", chosen.seed)
    soak(outcome, chosen.trials, chosen.clients, chosen.settled)
    return outcome.end()


if __name__ == "__main__":
    sys.exit(main())
