"""Flower's real processes, with TLS and keys, offline; `make test-flower` does more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from processes import HANGS

pytestmark = pytest.mark.process

pytest.importorskip("flwr", reason="needs hetlora[flower]")

ROOT = Path(__file__).parents[1]
ALONE = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
"""A network namespace of its own: whoever is contacted outside the federation is not there."""


def alone() -> list[str]:
    if not (shutil.which("unshare") and shutil.which("ip")):
        return []
    return ALONE if subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode == 0 else []


@pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("ssh-keygen")), reason="docs/deploy.md needs openssl and ssh-keygen"
)
def test_two_supernodes_give_the_adapter_of_one_process_and_strangers_are_refused(tmp_path: Path):
    place = tmp_path / "f"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    command = [*alone(), sys.executable, "-m", "proofs.flower", "--hosted", "--keep", str(place)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "two nodes that host ten clients gave the adapter of one process, bit for bit" in done.stdout
    for way in (
        "without a key",
        "with a key nobody registered",
        "in plain text",
        "with another authority's certificate",
    ):
        assert f"a SuperNode {way} was refused" in done.stdout, done.stdout
