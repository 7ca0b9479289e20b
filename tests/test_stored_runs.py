"""Law: this version reads, resumes and exports the runs of earlier versions (`stored/README.md`)."""

from __future__ import annotations

import importlib.metadata
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import hetlora
from hetlora.config import load_run_config
from hetlora.runs.checkpoint import newest, write_checkpoint
from hetlora.runs.fingerprints import FileFingerprints
from proofs.small_run import write_rows

pytestmark = pytest.mark.run

CUT = ("pruned", "kept", "folded")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with copies of the stored runs, and with the base and the rows that they name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(Path(__file__).parent / "stored", "stored")
    shutil.copytree(tiny, "base")
    write_rows(Path("rows.jsonl"))
    return tmp_path


def use_todays_versions(folder: Path) -> None:
    """Let a copied checkpoint name today's versions and base: a run is resumed only with those that it began with.

    What is tested is that this hetlora understands it, whatever torch is installed. Another transformers or another processor
    writes another base: its files name the version, and the last bits of what is drawn may differ.
    """
    checkpoint = newest(folder, pytest.fail)
    assert checkpoint is not None
    digests = FileFingerprints().digests(load_run_config(folder / "config.json"))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    made_by = {"hetlora": hetlora.__version__, **versions, "device": "cpu"}
    assert digests["data.path"] == checkpoint.digests["data.path"]
    if made_by != checkpoint.made_by or digests != checkpoint.digests:
        write_checkpoint(replace(checkpoint, made_by=made_by, digests=digests), folder)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return all that a run has learned, by file and name."""
    return {
        f"{path.relative_to(folder)} {name}": tensor
        for path in sorted(folder.glob("**/*.safetensors"))
        if path.parent.name != "checkpoints"
        for name, tensor in load_file(path).items()
    }


def are_close(some: Path, others: Path) -> None:
    """Hold each tensor to 1 %: kernels differ in last bits, which AdamW makes more of, from processor to processor."""
    ours, theirs = tensors_of(some), tensors_of(others)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        difference = torch.linalg.vector_norm(ours[name] - expected)
        assert difference <= 0.01 * torch.linalg.vector_norm(expected), name


@pytest.mark.parametrize("name", CUT)
def test_a_run_that_was_cut_goes_on_to_the_end_of_the_whole_one(name: str):
    folder = Path("stored") / name
    use_todays_versions(folder)
    cut = hetlora.open_run(folder)
    assert cut.summary() is None
    assert [row["round"] for row in cut.table()] == [1, 2]
    done = hetlora.resume(folder, display=False)
    assert [row["round"] for row in done.table()] == [1, 2, 3, 4]
    config = load_run_config(folder / "config.json").model_copy(update={"output": "now"})
    whole = hetlora.run(config, display=False)
    are_close(folder, whole.folder)
    before, now = done.summary(), whole.summary()
    assert before is not None
    assert now is not None
    for key in ("ranks", "prunes", "updates", "failures", "bytes_up", "bytes_down"):
        assert before[key] == now[key], key
    assert before["final"]["perplexity"] == pytest.approx(now["final"]["perplexity"], rel=1e-3)


def test_a_run_that_had_ended_ends_so_today():
    use_todays_versions(Path("stored/pruned"))
    hetlora.resume("stored/pruned", display=False)
    are_close(Path("stored/pruned"), Path("stored/finished"))


def test_a_run_that_had_ended_is_read():
    run = hetlora.open_run("stored/finished")
    summary = run.summary()
    assert summary is not None
    assert (summary["rounds"], summary["prunes"], summary["interrupted"]) == (4, 5, False)
    assert [row["round"] for row in run.table()] == [1, 2, 3, 4]
    assert hetlora.resume("stored/finished", display=False).summary() == summary
    page = run.report(Path("page.html")).read_text("utf8")
    assert "phone/2" in page


@pytest.mark.parametrize(
    ("name", "part"), [("pruned", {}), ("kept", {"client": "phone/2"}), ("folded", {"merged": True}), ("finished", {})]
)
def test_what_an_earlier_run_has_learned_is_exported(name: str, part: dict[str, str]):
    if name in CUT:
        use_todays_versions(Path("stored") / name)
    run = hetlora.open_run(Path("stored") / name)
    run.report(Path("page.html"))
    before = tensors_of(run.export("before", check=False, **part).folder)
    assert before
    after = tensors_of(hetlora.resume(run, display=False).export("after", check=False, **part).folder)
    assert before.keys() == after.keys()
    assert (name in CUT) == any(not torch.equal(before[key], after[key]) for key in before), (
        "the rounds that were missing"
    )
