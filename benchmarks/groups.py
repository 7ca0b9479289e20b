"""A cohort in groups against one client at a time: the same work in one run, as ratios.

OMP_NUM_THREADS=1 python benchmarks/groups.py
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from hetlora.cohort import sample_cohort
from hetlora.config import load_config
from hetlora.display import QuietDisplay
from hetlora.experiment import Experiment
from hetlora.federated import ServerState, run_round

SHAPES = {
    "1 row of at most 32 tokens a step": ["training.batch_size=1", "data.max_length=32", "evaluation.generate=0"],
    "the demonstration, about 600 tokens a step": [],
}
GROUPS = (1, 2, 4, 8, None)
REPEATS = 6


def main() -> None:
    """Print the ratio to one client at a time for every shape and group size; above 1 is faster."""
    for shape, changes in SHAPES.items():
        experiment = Experiment(load_config(Path("examples/demo.toml"), [*changes, "threads=1"]), QuietDisplay())
        state = ServerState(experiment.model.initial_adapter(16, seed=0))
        cohort = sample_cohort(experiment.clients, 8, round_number=0, seed=0)
        seconds: dict[int | None, list[float]] = {group: [] for group in GROUPS}
        losses: set[float] = set()
        for _ in range(REPEATS):
            for group in GROUPS:
                experiment.engine.group_size = group
                began = time.perf_counter()
                _, report = run_round(state, experiment.method, experiment.engine, cohort)
                seconds[group].append(time.perf_counter() - began)
                losses.add(round(sum(client.loss for client in report.clients), 3))
        if len(losses) != 1:
            raise SystemExit(f"the groupings disagree on the losses: {sorted(losses)}")
        for group in GROUPS:
            # The first pair is the warm-up.
            ratios = [one / many for one, many in zip(seconds[1][1:], seconds[group][1:], strict=True)]
            name = "chosen by the engine" if group is None else f"{group} a pass"
            print(f"{shape}, {name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
