"""Flower's real processes, with TLS and keys, offline; `make test-flower` and `make prove-load` do more."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from processes import HANGS

pytest.importorskip("flwr", reason="needs hetlora[flower]")

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(
        not (shutil.which("openssl") and shutil.which("ssh-keygen")),
        reason="docs/deploy.md needs openssl and ssh-keygen",
    ),
]

ROOT = Path(__file__).parents[1]
ALONE = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
"""A network namespace of its own: whoever is contacted outside the federation is not there."""


def alone() -> list[str]:
    if not (shutil.which("unshare") and shutil.which("ip")):
        return []
    return ALONE if subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode == 0 else []


def proved(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    words = [*alone(), sys.executable, "-m", *command]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANGS, check=False)


def carried(part: str, place: Path) -> dict[str, Any]:
    done = proved("proofs.load", "--short", "--part", part, "--keep", str(place))
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert (done.returncode, found["problems"]) == (0, []), done.stdout + done.stderr
    return found


def test_two_supernodes_give_the_adapter_of_one_process_and_strangers_are_refused(tmp_path: Path):
    done = proved("proofs.flower", "--hosted", "--keep", str(tmp_path / "f"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "two nodes that host ten clients gave the adapter of one process, bit for bit" in done.stdout
    for way in (
        "without a key",
        "with a key nobody registered",
        "in plain text",
        "with another authority's certificate",
    ):
        assert f"a SuperNode {way} was refused" in done.stdout, done.stdout


@pytest.mark.slow
def test_every_mistake_is_answered_in_a_line_and_with_no_traceback(tmp_path: Path):
    shown = carried("refused", tmp_path / "f")["shown"]
    assert len(shown) == 6
    assert all(any(sides.values()) for sides in shown.values())


@pytest.mark.slow
def test_what_lying_nodes_send_costs_the_honest_ones_no_round(tmp_path: Path):
    found = carried("liars", tmp_path / "f")
    assert found["status"] == "finished:completed"
    assert set(found["failures"]) == {"arrays", "text"}


@pytest.mark.slow
def test_nodes_that_share_one_process_are_a_federation(tmp_path: Path):
    assert carried("fleet", tmp_path / "f")["nodes_10"]["admitted"] == 10
