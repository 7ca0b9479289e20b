"""The tests notice the mistakes this field makes: each mutation of the sources must turn one of them red."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HETLORA, FEDERATED, LORA = "methods/hetlora.py", "federated.py", "lora_model.py"

# name: file, what stands there, what the mistake would write, the tests that must notice
MUTATIONS = {
    "no mistake at all": (HETLORA, "return bool(after < before)", "return bool(after < before)", "test_methods.py"),
    "equal weights instead of norms": (
        HETLORA,
        "return float(delta_norm(update.adapter))",
        "return 1.0",
        "test_methods.py",
    ),
    "never prune": (HETLORA, "return bool(after < before)", "return False", "test_methods.py"),
    "prune on equality": (HETLORA, "return bool(after < before)", "return bool(after <= before)", "test_methods.py"),
    "forget the ranks of absent clients": (
        FEDERATED,
        "ranks={**state.ranks, **pruned}",
        "ranks=pruned",
        "test_methods.py",
    ),
    "average over clients instead of weights": (
        FEDERATED,
        "(factor / self.weight)",
        "factor",
        "test_methods.py",
    ),
    "alpha / r instead of one scaling": (
        LORA,
        ".mul(self.scaling)",
        ".mul(self.scaling / A.shape[-2])",
        "test_training.py",
    ),
    "drop the tail penalty": (
        HETLORA,
        "return penalty * tail_norm(adapter, first)",
        "return 0.0 * tail_norm(adapter, first)",
        "test_training.py",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_turns_a_test_red(name: str, tmp_path: Path) -> None:
    file, right, wrong, tests = MUTATIONS[name]
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "bundled"))
    (tmp_path / "tests").mkdir()
    for part in ("conftest.py", tests):
        shutil.copy(ROOT / "tests" / part, tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "src" / "hetlora" / file
    source = path.read_text("utf8")
    assert source.count(right) == 1, f"the mutation no longer finds its place in {file}"
    path.write_text(source.replace(right, wrong), encoding="utf8")

    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{tests}"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src"), "PYTEST_ADDOPTS": ""}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    expected = 0 if right == wrong else 1
    assert run.returncode == expected, (
        f"exit code {run.returncode}, expected {expected}:\n{run.stdout[-2000:]}{run.stderr}"
    )
