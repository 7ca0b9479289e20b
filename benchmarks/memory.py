"""Resident memory of a round against its prediction, with a limit and without.

python -m benchmarks.memory            # or --quick
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.table import Row, row

EXAMPLE = str(Path(__file__).parents[1] / "examples" / "demo.toml")
SMALL = ["data.max_length=64", "data.clients=4", "federation.clients_per_round=2", "training.steps=1"]
ROUNDS = 1
LIMITS = [("no tight limit", 10_000.0), ("a limit of 60 MB", 60.0)]
OPTIONS = ["evaluation.generate=0", "evaluation.every=0", "threads=2", f"federation.rounds={ROUNDS}"]


def rows(quick: bool) -> Iterable[Row]:
    """Yield the growth of a process while it trains over what was predicted beyond the base, at a wide and a tight limit."""
    if not sys.platform.startswith("linux"):
        print("memory: left out, resident memory is read from Linux's /proc")
        return
    for name, megabytes in LIMITS[-1:] if quick else LIMITS:
        changes = [
            *OPTIONS,
            *(SMALL if quick else ["training.batch_size=16", "federation.clients_per_round=3", "training.steps=2"]),
            f"memory_megabytes={megabytes}",
        ]
        first = _measure(changes)  # it repeats within a few percent
        said, tokens, workers = first["predicted"] / 1e6, first["tokens"], first["workers"]
        note = f"{said:.0f} MB predicted, {tokens} tokens a pass, {workers} passes at once; over libraries and base"
        share = first["grown"] / (first["predicted"] - first["base"])
        yield row(
            f"resident growth of a round over the prediction, {name}", [share], "<= 1.3", judge=not quick, note=note
        )


def _measure(changes: list[str]) -> dict[str, int]:
    # Freed blocks go back at once: what the allocator keeps for later is not what training needs.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", json.dumps(changes)]
    done = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _grown(changes: list[str]) -> dict[str, int]:
    from hetlora.config import load_config
    from hetlora.core.round import run_round
    from hetlora.core.sampling import sample_cohort
    from hetlora.core.types import ServerState
    from hetlora.runs.display import QuietDisplay
    from hetlora.runs.local_experiment import LocalExperiment
    from hetlora.runs.memory import peak_megabytes
    from hetlora.runs.process import quiet_transformers

    quiet_transformers()
    experiment = LocalExperiment(load_config(Path(EXAMPLE), changes), QuietDisplay())
    state = ServerState(experiment.model.initial_adapter(experiment.max_rank, seed=0))
    size = experiment.config.federation.clients_per_round
    small = sample_cohort(experiment.clients, 2, 0, 0)
    limit = experiment.engine.tokens_a_pass
    experiment.engine.tokens_a_pass = 8
    run_round(state, experiment.method, experiment.engine, small)  # what libraries allocate at their first use
    experiment.engine.tokens_a_pass = limit
    before = _resident()
    run_round(state, experiment.method, experiment.engine, sample_cohort(experiment.clients, size, 1, 0))
    peak = peak_megabytes(experiment.model.device) or 0.0
    allowance = experiment.allowance
    base = sum(tensor.nbytes for tensor in experiment.model.base.parameters())
    return {
        "grown": round(peak * 1e6) - before,
        "predicted": allowance.predicted or 0,
        "base": base,
        "tokens": allowance.tokens_a_pass,
        "workers": allowance.workers or 0,
    }


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(_grown(json.loads(options.measure))))
        return
    for line in rows(options.quick):
        print(line)


if __name__ == "__main__":
    main()
