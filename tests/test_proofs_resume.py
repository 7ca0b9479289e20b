"""`make prove-resume` in small, and that it detects planted faults. Runs in forked processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from forks import forks
from proofs.primitives import Death, Durable, Primitive

pytestmark = [
    pytest.mark.slow,
    pytest.mark.process,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, kills, and reads /proc"),
]
ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys, types
import hetlora.runs.runner, hetlora.runs.folder
from hetlora.runs.records import Records
import proofs.resume as proof
proof.RUNS = {name: proof.RUNS[name] for name in RUNS}
PLANT
sys.exit(proof.main(OPTIONS))
"""


Proof = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proof]:
    """Run the proof in its own process; return its last line and its log."""
    with forks(tmp_path_factory.mktemp("forks")) as server:

        def call(options: Sequence[str], runs: Sequence[str] = ("hetlora",), plant: str = "") -> tuple[Any, str]:
            code = SCRIPT.replace("RUNS}", f"{tuple(runs)!r}}}").replace("OPTIONS", repr(list(options)))
            done = server.run(code.replace("PLANT", plant), ROOT, [ROOT / "src", ROOT])
            assert done.out, done.err[-3000:]
            line = json.loads(done.out.splitlines()[-1])
            assert done.code == (1 if line["failures"] else 0)
            return line, done.err

        yield call


def test_a_small_proof_holds(proof: Proof):
    line, log = proof(["--trials", "4", "--share", "0.015", "--seed", "1"], ["hetlora", "fedsa_lora", "flora"])
    assert line["failures"] == 0, log
    assert line["kills"] >= 4
    assert line["interrupts"] + line["refusals"] >= 2
    assert line["primitives"]["hetlora"] > 50


PLANTED = {
    "records that are not cut": (
        "Records.cut = lambda self, length: None",
        ["--deaths", "hetlora 60b"],
        "hetlora: another records; --deaths 'hetlora 60b' repeats it",
    ),
    "a file that is renamed before it is on the disk": (
        "hetlora.runs.folder.os = types.SimpleNamespace(**vars(hetlora.runs.folder.os) | {'fsync': lambda _: None})",
        ["--only", "power", "--share", "0.01"],
        "before it is on the disk",
    ),
    "a summary that is written first": (
        """
write = hetlora.runs.runner.Runner._written
def early(self, *, interrupted):
    hetlora.runs.runner.write_summary(self.folder, {})
    return write(self, interrupted=interrupted)
hetlora.runs.runner.Runner._written = early
""",
        ["--deaths", "hetlora 75b"],
        "hetlora: another ",
    ),
    "a full disk that nobody explains": (
        """
from hetlora.errors import HetLoraError
write = hetlora.runs.runner.write_checkpoint
def bare(checkpoint, folder):
    try:
        return write(checkpoint, folder)
    except OSError:
        raise HetLoraError("it failed") from None
hetlora.runs.runner.write_checkpoint = bare
""",
        ["--deaths", "hetlora 60f"],
        "without the reason or the way out",
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_reported(fault: str, proof: Proof):
    plant, options, said = PLANTED[fault]
    line, log = proof(options, plant=plant)
    assert line["failures"] >= 1
    assert said in log


def test_a_death_is_read_as_it_is_written():
    for text in ("12b", "3m", "7a", "9f", "1r", "0.25s", "1.5i"):
        assert str(Death.read(text)) == text
    with pytest.raises(ValueError, match="'12x' is no death"):
        Death.read("12x")


def test_what_was_not_synchronised_does_not_outlast_a_power_cut(tmp_path: Path):
    durable = Durable(tmp_path)
    folder, file = tmp_path / "run", tmp_path / "run" / "file"
    folder.mkdir()
    durable.after(Primitive("mkdir", str(folder)))
    file.write_bytes(b"one")
    durable.after(Primitive("open", str(file)))
    durable.after(Primitive("fsync", str(file)))
    assert durable.left() == {}, "the bytes are there, and no name"
    assert durable.left(tmp_path) == {"run": None, "run/file": b"one"}
    durable.after(Primitive("fsync", str(folder)))
    assert durable.left() == {}, "a folder without a name"
    durable.after(Primitive("fsync", str(tmp_path)))
    file.write_bytes(b"two")
    assert durable.left() == {"run": None, "run/file": b"one"}
    file.unlink()
    assert durable.left() == {"run": None, "run/file": b"one"}
    assert durable.left(tmp_path) == {"run": None}
