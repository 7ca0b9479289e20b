"""What `hetlora flower new` prints, done: Flower's simulation, then a rehearsal with real processes, TLS and keys; offline."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs hetlora[flower]")

from hetlora.cli import main
from hetlora.errors import HetLoraError
from hetlora.flower.local_federation import OF, LocalFederation, end_leftovers, free_port
from hetlora.flower.new_app import new_app, next_steps
from hetlora.flower.rehearsal import MARK, _fresh, _said_when_interrupted, _ServerLines, rehearse
from hetlora.runs.folder import folder_lock
from processes import HANGS, started
from test_flower_processes import alone

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
}


def short_app(folder: Path) -> Path:
    """Write an app of one short round."""
    new_app(folder / "fed")
    run = folder / "fed" / "run.toml"
    text = run.read_text().replace("rounds = 5", "rounds = 1").replace("steps = 5", "steps = 1")
    run.write_text(text.replace("rows_per_client = 8", "rows_per_client = 1"))
    return folder / "fed"


def left_of(folder: Path) -> list[str]:
    """Return the commands of processes that have a folder in their environment or command."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(folder).encode() in (entry / name).read_bytes() for name in ("environ", "cmdline")):
                found.append((entry / "cmdline").read_text())
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_the_first_printed_step_ends_with_an_adapter(tmp_path: Path):
    app = short_app(tmp_path)
    command = shlex.split(next_steps(Path(app.name)).splitlines()[1])
    environment = {
        **{name: value for name, value in ENVIRONMENT.items() if not name.startswith("FLWR_")},
        OF: str(tmp_path),  # by which what is left is found
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
    }
    try:
        done = subprocess.run(
            [*alone(), *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=HANGS,
            check=False,
        )
    finally:
        end_leftovers(tmp_path)  # Flower leaves the SuperLink of its simulation running
    assert left_of(tmp_path) == []
    said = done.stdout + done.stderr
    assert f"adapter (PEFT): {tmp_path}/runs/federation/adapter" in said, said
    assert "the clients are those of [data] and [partition]" in said
    assert (tmp_path / "runs/federation/adapter/adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at /proc")
def test_the_second_printed_step_is_a_rehearsal_that_leaves_nothing_running(tmp_path: Path):
    app = short_app(tmp_path)
    command = [*alone(), sys.executable, "-m", "hetlora", "flower", "local", str(app), "--clients", "2"]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"adapter (PEFT): {app}/runs/federation/adapter" in done.stdout
    assert (app / "runs/federation/adapter/adapter_model.safetensors").is_file()
    assert "client 'client-2' (rank 8, " in done.stderr
    assert "round 1/1  loss" in done.stderr
    assert left_of(tmp_path) == []
    local = app / "local"
    assert stat.S_IMODE(local.stat().st_mode) == 0o700
    assert (local / ".gitignore").read_text() == "*\n"
    for name in ("server.key", "client-1", "client-2"):
        assert stat.S_IMODE((local / name).stat().st_mode) == 0o600
        key = (local / name).read_text().splitlines()[1]
        assert not any(key in log.read_text(errors="replace") for log in local.glob("*.log")), "no key is in a log"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_rehearsal_that_is_stopped_leaves_nothing_running(how: signal.Signals, tmp_path: Path):
    app = short_app(tmp_path)
    command = [sys.executable, "-m", "hetlora", "flower", "local", str(app)]
    with started(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as rehearsal:
        hung = threading.Timer(HANGS, rehearsal.kill)
        hung.start()
        assert rehearsal.stderr is not None
        said = ""
        while "SuperNodes started" not in said and (line := rehearsal.stderr.readline()):
            said += line
        assert len(left_of(app / "local")) > 3, said
        rehearsal.send_signal(how)
        time.sleep(0.5)
        rehearsal.send_signal(how)  # an impatient person
        said += rehearsal.stderr.read()
        # A signal that comes after all is ended, while Python itself ends, kills it; a shell shows 130 then, too.
        assert rehearsal.wait() in (130, -how), said
        hung.cancel()
    assert "Traceback" not in said
    assert left_of(app / "local") == []


def test_a_rehearsal_shows_the_servers_lines_and_ends_where_it_refuses_a_client(tmp_path: Path):
    log = tmp_path / "run.log"
    said: list[str] = []
    lines = _ServerLines(log, said.append)
    log.write_text("\x1b[92mINFO \x1b[0m: Flower's\nwaiting for 2 more clients: nobody is here\nround 1/1  lo")
    lines.show()
    with log.open("a") as file:
        file.write("ss 3.2\nhetlora: run.toml has 1 problem:\n  seed = -1")
    lines.show()
    with log.open("a") as file:
        file.write(": give 0 or more\nExit Code: 700\n  Flower's\n")
    lines.show()
    assert said == ["waiting for 2 more clients: nobody is here", "round 1/1  loss 3.2"]
    assert lines.failure == "run.toml has 1 problem:\n  seed = -1: give 0 or more"
    with log.open("a") as file:
        file.write("node 7 was refused: client 'client-1': its rows are none\n")
    with pytest.raises(HetLoraError, match="node 7 was refused: client 'client-1': its rows are none"):
        lines.show()


def test_an_interrupted_rehearsal_says_after_which_round_and_where_its_records_are(tmp_path: Path):
    federation, said = LocalFederation(tmp_path / "local"), list[str]()
    former, run = (tmp_path / "runs" / name for name in ("federation", "federation-2"))
    for folder in (former, run):
        folder.mkdir(parents=True)
    for recorded, expected in (
        ([{"kind": "run"}], "interrupted before a round had ended; there are no records of one"),
        ([{"kind": "run", "config": {}}, {"kind": "round", "round": 2}], f"interrupted after round 2; records: {run};"),
    ):
        (run / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in recorded))
        with (
            pytest.raises(KeyboardInterrupt, match=re.escape(expected)),
            _said_when_interrupted(federation, tmp_path, {former}, said.append),
        ):
            raise KeyboardInterrupt
    assert said == ["interrupted: 0 of Flower's processes are being ended"] * 2


def test_a_rehearsal_names_the_keys_that_it_sets_and_refuses_what_its_server_would(tmp_path: Path):
    app, said = short_app(tmp_path), list[str]()
    (app / "local").mkdir()
    (app / "local" / "mine.txt").touch()
    with pytest.raises(HetLoraError, match="holds files"):  # so that no process is started
        rehearse(app, 2, said.append)
    assert said == [
        "the rehearsal sets these keys of run.toml: federation.clients_per_round=2, flower.min_clients=2, flower.wait=90"
    ]
    run = app / "run.toml"
    run.write_text(run.read_text().replace('name = "hetlora"\nmin_rank = 2', 'name = "flora"'))
    with pytest.raises(HetLoraError, match="'flora' does not run over Flower"):
        rehearse(app, 2, said.append)


def test_a_process_that_ends_is_an_error_with_the_last_lines_of_its_log(tmp_path: Path):
    federation = LocalFederation(tmp_path / "local")
    federation.start("superlink", "sh", "-c", "echo a port is taken; exit 3").wait()
    with pytest.raises(HetLoraError, match=r"(?s)'superlink' ended; .*superlink\.log ends with:\na port is taken"):
        federation.check()
    federation.stop()


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (("run.toml", None), (), "run.toml is not there; write an app with hetlora flower new"),
        (None, ("--clients", "0"), "--clients 0: give 1 or more"),
        (None, ("--clients", "500"), "500 clients asked for"),
        (("local", ""), (), "holds files that are no rehearsal's"),
    ],
)
def test_a_rehearsal_that_cannot_begin_says_why(
    change: tuple[str, str | None] | None,
    options: tuple[str, ...],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    app = short_app(tmp_path)
    if change == ("local", ""):
        (app / "local").mkdir()
        (app / "local" / "mine.txt").write_text("mine")
    elif change:
        (app / change[0]).unlink()
    assert main(["flower", "local", str(app), *options]) == 2
    assert said in capsys.readouterr().err
    assert change != ("local", "") or (app / "local" / "mine.txt").is_file()


def test_a_folder_that_is_no_rehearsals_is_not_emptied(tmp_path: Path):
    local, elsewhere = tmp_path / "local", tmp_path / "elsewhere"
    local.mkdir()
    for name, text in ((".gitignore", "*.pt\n"), ("thesis.txt", "years")):
        (local / name).write_text(text, encoding="utf8")
    with pytest.raises(HetLoraError, match="holds files that are no rehearsal's"), _fresh(local):
        pass
    assert (local / "thesis.txt").read_text("utf8") == "years"
    with _fresh(elsewhere):
        (elsewhere / "log").write_text("left", encoding="utf8")
    with _fresh(elsewhere):
        assert {item.name for item in elsewhere.iterdir()} == {".lock", ".gitignore", ".hetlora-rehearsal"}
    (tmp_path / "link").symlink_to(elsewhere)
    with pytest.raises(HetLoraError, match="no rehearsal's"), _fresh(tmp_path / "link"):
        pass


def test_two_rehearsals_of_an_app_do_not_meet(tmp_path: Path):
    app = short_app(tmp_path)
    (app / "local").mkdir()
    (app / "local" / MARK).touch()
    with folder_lock(app / "local", "held"), pytest.raises(HetLoraError, match="another rehearsal runs in"):
        rehearse(app, 2, lambda _: None)
