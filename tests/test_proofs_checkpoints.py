"""The proof of damaged checkpoints in small, and that it detects planted faults."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hetlora.runs.checkpoint
from proofs import checkpoints
from proofs.checkpoints import PARTS, Damaged

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with checkpoints.a_run() as folder:
        yield folder


@pytest.fixture
def damaged(folder: Path) -> Iterator[Damaged]:
    damaged = Damaged(folder)
    yield damaged
    damaged.restore()


def failures(damaged: Damaged, part: str) -> list[str]:
    """What a part of the proof reports of its first trials."""
    found = itertools.islice(PARTS[part](damaged, range(40)), 60)
    return [problem for problems in found for problem in problems]


@pytest.mark.parametrize("part", PARTS)
def test_a_small_proof_holds(damaged: Damaged, part: str):
    assert failures(damaged, part) == []


def test_the_command_prints_its_figures(capsys: pytest.CaptureFixture[str]):
    assert checkpoints.main(["--only", "both", "--trials", "100", "--seed", "3"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line.items() >= {"proof": "checkpoints", "trials": 2, "failures": 0, "seed": 3, "both": 2}.items()


# That it can fail ---------------------------------------------------------------------------------------------------


def believing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the digest."""
    require = hetlora.runs.checkpoint._require
    monkeypatch.setattr(
        hetlora.runs.checkpoint, "_require", lambda holds, problem: require(holds or "SHA-256" in problem, problem)
    )


def forgetting(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the newest one only."""
    found = hetlora.runs.checkpoint._generations
    monkeypatch.setattr(hetlora.runs.checkpoint, "_generations", lambda folder: found(folder)[:1])


def raising(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an error that nobody documents."""

    def read(_: Path) -> Any:
        raise ValueError

    monkeypatch.setattr(hetlora.runs.checkpoint, "read_checkpoint", read)


def mistaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the older one taken for another."""
    read = hetlora.runs.checkpoint._read

    def older(file: Any) -> Any:
        checkpoint = read(file)
        for A, _ in checkpoint.progress.state.adapter.values():
            A[0, 0] += 1.0
        return checkpoint

    monkeypatch.setattr(hetlora.runs.checkpoint, "_read", older)


@pytest.mark.parametrize(
    ("plant", "part", "said"),
    [
        (believing, "flips", "and not the older one as it was; --only flips --trials 1 --seed "),
        (forgetting, "flips", "the older one is not used"),
        (raising, "ranges", "it raises ValueError"),
        (mistaking, "appended", "and not the older one as it was"),
    ],
)
def test_a_planted_fault_is_reported(
    damaged: Damaged, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None], part: str, said: str
):
    plant(monkeypatch)
    assert said in "\n".join(failures(damaged, part))


def test_a_checkpoint_that_is_written_over_the_one_before_is_reported(
    damaged: Damaged, monkeypatch: pytest.MonkeyPatch
):
    """In its place and not beside it, and the older ones removed first."""

    def write(_: Any, folder: Path) -> Path:
        for path in (folder / "checkpoints").iterdir():
            path.unlink()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_checkpoint", write)
    later = checkpoints._not_written(damaged, damaged.last, 28)
    assert later == [f"{path.name} is no longer what it was" for path in (damaged.path, damaged.older)]
