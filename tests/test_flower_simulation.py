"""Flower's simulation on Ray gives the adapters of one process, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs hetlora[flower]")

from safetensors.torch import load_file

from hetlora.config import load_config
from hetlora.runs.display import QuietDisplay
from hetlora.runs.local_experiment import LocalExperiment
from processes import HANGS
from proofs.flower import HOSTED

pytestmark = [pytest.mark.slow, pytest.mark.process]

CONFIG = HOSTED.replace("OUTPUT", "runs") + "\n[flower]\nsupernodes = 2\n"


def test_the_simulation_of_flower_gives_the_adapters_of_one_process(tmp_path: Path):
    (tmp_path / "run.toml").write_text(CONFIG)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "hetlora.cli", "run", "run.toml", "--engine", "flower-sim", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout)
    assert summary["updates"] == 12, done.stderr
    assert summary["failures"] == 0, done.stderr

    here = LocalExperiment(load_config(tmp_path / "run.toml", [f'output="{tmp_path / "here"}"']), QuietDisplay())
    here.engine.group_size, here.engine.workers = 1, 1  # type: ignore[attr-defined]
    expected = here.run()
    assert expected.prunes == summary["prunes"] > 0
    assert expected.adapter is not None
    ours = load_file(expected.adapter / "adapter_model.safetensors")
    theirs = load_file(tmp_path / summary["adapter"] / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.equal(theirs[name]), name
    rounds = [json.loads(line) for line in (tmp_path / summary["records"]).read_text().splitlines()]
    networks = [record["network"] for record in rounds if record["kind"] == "round"]
    assert all(network["nodes"] == 2 and network["bytes_up"] > 10_000 for network in networks)
