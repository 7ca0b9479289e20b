"""The examples on the research data run, with few rounds, clients and rows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hetlora.cli import main

pytestmark = pytest.mark.document

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "federation.rounds": 1,
    "federation.clients_per_round": 2,
    "training.steps": 1,
    "training.batch_size": 2,
    "data.max_length": 64,
    "evaluation.rows_per_client": 1,
    "evaluation.max_new_tokens": 4,
    "threads": 1,
}
# Ten clients hold all of dolly: most of the example's time is spent on reading and tokens, not on rounds.
CLIENTS = {"reddit_tifu": 8, "dolly": 2, "ubuntu_irc": 6, "shakespeare": 6, "msc": 6}


@pytest.mark.parametrize(
    "name", ["msc", *(pytest.param(name, marks=pytest.mark.slow) for name in CLIENTS if name != "msc")]
)
def test_an_example_runs(
    name: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert (shared / "data").is_dir()
    monkeypatch.chdir(ROOT)
    changes = {**SMALL, "data.clients": CLIENTS[name], "output": json.dumps(str(tmp_path))}
    if name in ("reddit_tifu", "dolly"):
        changes["evaluation.generate"] = 2
    command = ["run", str(ROOT / f"examples/{name}.toml"), "--json", "--quiet"]
    assert main([*command, *(part for key, value in changes.items() for part in ("--set", f"{key}={value}"))]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (len(result["ranks"]), result["updates"]) == (CLIENTS[name], 2)
    assert result["final"]["perplexity"] > 1.0
    assert (result["final"]["rougeL"] is not None) == ("evaluation.generate" in changes)


@pytest.mark.slow
def test_a_method_in_a_module_of_its_own_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/add_a_method.py")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    before, after = map(float, re.findall(r"perplexity ([\d.]+) -> ([\d.]+)", run.stdout)[0])
    assert after < 0.9 * before
    assert (tmp_path / "runs/fair/adapter/adapter_config.json").is_file()
