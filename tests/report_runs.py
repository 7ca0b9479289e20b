"""Runs for tests of reports: real runs on the tiny base, and handwritten records for rare cases."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hetlora.cli import main
from hetlora.runs.records import EvaluationRecord, Records, RoundRecord, RunRecord
from proofs.small_run import document, write_rows
from small_federations import PHONES, phones

ROUNDS = 4


def write_config(folder: Path, tiny: str) -> Path:
    """Write a small federation's rows and the file of a run in which clients drop out and prune; return the file."""
    write_rows(folder / "rows.jsonl", PHONES)
    text = phones(
        tiny,
        data={**document("runs")["data"], "path": str(folder / "rows.jsonl")},
        federation={"rounds": ROUNDS, "clients_per_round": 3, "dropout": 0.3},
        evaluation={"generate": 4, "max_new_tokens": 4},
    )
    (folder / "run.toml").write_text(text, encoding="utf8")
    return folder / "run.toml"


def real_runs(folder: Path, tiny: str) -> dict[str, Path]:
    """Run HetLoRA with two seeds, and each client alone; return the run's folders by name."""
    config = write_config(folder, tiny)
    alone = ["method.name=local", "method.gamma=", "method.penalty=", "method.min_rank="]
    bounded = ["robustness.largest_share=0.52"]
    changes = {"het": bounded, "het-1": [*bounded, "seed=1"], "local": alone}
    for name, changed in changes.items():
        every = [f"name={name}", f"output={json.dumps(str(folder / 'runs'))}", *changed]
        assert main(["run", str(config), "--quiet", *(part for one in every for part in ("--set", one))]) == 0
    return {name: folder / "runs" / name for name in changes}


RUN = RunRecord(
    hetlora="0.1.0",
    config={
        "name": "written",
        "seed": 0,
        "checkpoint_every": 1,
        "federation": {"rounds": 3, "clients_per_round": 2},
        "method": {"name": "hetlora"},
    },
    versions={"torch": "2"},
    clients=2,
    train_rows=10,
    test_rows=4,
    left_out_clients=0,
    left_out_rows=0,
    truncated_rows=0,
    empty_rows=0,
    counted_clients=2,
    modules=4,
    max_rank=8,
    base_parameters=1000,
    trainable_parameters={"a": 40, "b": 80},
)


def a_round(number: int, **changes: Any) -> RoundRecord:
    """Return the record of a round of two clients, `a` of rank 4 and `b` of rank 8, in which nothing happens."""
    record = RoundRecord(
        round=number,
        loss=2.0,
        perplexity=None,
        ranks={"a": 4, "b": 8},
        weights={"a": 0.25, "b": 0.75},
        prunes={},
        failures={},
        bytes_up=1000,
        bytes_down=2000,
        live_slots=8,
        seconds=1.0,
        clients={name: {"loss": 2.0, "examples": 4, "steps": 1, "weight": 1.0} for name in "ab"},
    )
    return replace(record, **changes)


def measured(number: int, perplexity: float, clients: Sequence[str] = ("a", "b")) -> EvaluationRecord:
    """Return a measurement in which everyone has the same perplexity."""
    scores = {"perplexity": perplexity, "rougeL": 10.0, "tokens": 5, "generated": 1}
    return EvaluationRecord(number, scores, {"4": scores, "8": scores}, dict.fromkeys(clients, scores))


def write_run(folder: Path, *records: Any, complete: bool = True, head: RunRecord = RUN) -> Path:
    """Write a run's folder: its first record, those given, and its summary if it is complete."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(head.config), encoding="utf8")
    file = Records(folder / "records.jsonl")
    for record in (head, *records):
        file.append(record)
    if complete:
        (folder / "summary.json").write_text(json.dumps({"ranks": {}, "seconds": 3.0}), encoding="utf8")
    return folder
