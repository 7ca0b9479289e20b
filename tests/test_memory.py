"""A run stays within its memory limit, learns the same, and explains what to lower where it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hetlora.cli import main
from hetlora.config import RunConfig, load_config
from hetlora.config.build import cost_model
from hetlora.core.adapter import LoraPair
from hetlora.errors import ConfigError, HetLoraError
from hetlora.runs.display import QuietDisplay
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.runs.memory import explain_oom, fit_memory
from processes import HANGS

pytestmark = pytest.mark.large

RUN = """
name = "small"
[data]
path = "stdlib"
prompt = "{{prompt}} "
target = "{{target}}"
max_length = 64
clients = 6
min_rows = 4
[model]
base = "{base}"
[federation]
rounds = 1
clients_per_round = 6
[ranks]
kind = "same"
rank = 8
[training]
steps = 2
batch_size = 24
"""


@pytest.fixture
def path(tiny: str, tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(base=tiny), encoding="utf8")
    return path


def config(path: Path, megabytes: float) -> RunConfig:
    return load_config(path, [f"memory_megabytes={megabytes}", f"output={path.parent}"])


def test_less_memory_means_smaller_passes_then_fewer_workers_then_fewer_clients(path: Path) -> None:
    costs = cost_model(load_config(path))
    found = []
    for megabytes in (900.0, 8.0, 4.0, 2.0):
        allowed = fit_memory(config(path, megabytes), costs, 8, threads=3)
        assert allowed.predicted is not None
        assert allowed.predicted <= megabytes * 1e6
        found.append((allowed.tokens_a_pass, allowed.workers, allowed.clients_a_group))
    assert found[0] == (1024, 3, 2), "with plenty, as without a limit"
    assert found == sorted(found, key=lambda amounts: (amounts[2], amounts[1], amounts[0]), reverse=True)
    assert len(set(found)) == len(found)


def test_one_row_that_does_not_fit_is_refused_with_what_it_needs(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(path), "--set", "memory_megabytes=0.1"]) == 2
    error = capsys.readouterr().err
    assert "memory_megabytes = 0.1: one client at a time needs " in error
    assert "a pass of one row of 64 tokens" in error
    assert "lower data.max_length" in error
    needed = float(error.split("needs ")[1].split(" MB")[0])
    costs = cost_model(load_config(path))
    assert fit_memory(config(path, needed + 0.1), costs, 8, threads=2).workers == 1
    with pytest.raises(ConfigError):
        fit_memory(config(path, needed - 0.1), costs, 8, threads=2)


def test_a_run_within_a_limit_learns_the_same(path: Path) -> None:
    def adapter(*changes: str) -> dict[str, LoraPair]:
        run = load_config(path, [f"output={path.parent}", *changes])
        return dict(LocalExperiment(run, QuietDisplay()).run().state.adapter)

    whole, limited = adapter(), adapter("memory_megabytes=2.0")
    for name, pair in whole.items():
        for one, other in zip(pair, limited[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_training_every_weight_takes_no_limit(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(path), "--set", "memory_megabytes=900", "--set", 'method.name="full"']) == 2
    assert "memory_megabytes: method full" in capsys.readouterr().err


def test_the_summary_says_how_much_was_held(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(path), "--set", f"output={path.parent}", "--json"]) == 0
    held = json.loads(capsys.readouterr().out)["peak_megabytes"]
    if sys.platform.startswith("linux"):
        assert 50 < held < 20_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux limits a process's address space")
def test_running_out_says_what_to_lower(path: Path) -> None:
    script = f"""
import resource
from pathlib import Path
from hetlora.config import load_config
from hetlora.runs.display import QuietDisplay
from hetlora.errors import HetLoraError
from hetlora.runs.local_experiment import LocalExperiment
run = load_config(Path({str(path)!r}), ["output={path.parent}", "model.base=nano", "training.batch_size=512", "threads=1"])
experiment = LocalExperiment(run, QuietDisplay())
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 20_000_000, size + 20_000_000))
try:
    experiment.run()
except HetLoraError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=HANGS)
    assert "out of memory" in done.stdout, done.stderr[-2000:]
    assert "set memory_megabytes" in done.stdout


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="something else") as caught, explain_oom():
        raise RuntimeError("something else")
    assert not isinstance(caught.value, HetLoraError)
