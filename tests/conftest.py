"""Shared fixtures: a tiny random base model and its tokenizer. Tests need no network and no `../shared`."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing.process
import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read where it is imported: without it names of the hub are waited for

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from drawn_examples import QUICK

# torch and what needs it are imported by those who use them: the process that starts the workers has no use for them.
if TYPE_CHECKING:
    from hetlora.model.lora_model import LoraModel

if settings.get_current_profile_name() == "default":  # how long an example takes says nothing on a busy machine
    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")
settings.register_profile(QUICK, suppress_health_check=[HealthCheck.too_slow], deadline=None)

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared"

# A worker has a file at a time (`--dist loadscope`), for most of what files share between their tests takes longer than the
# tests, and would be made once a worker. The last file to begin then decides when all is done: the longest begin first.
LONG = (
    "flower_processes",
    "flower_first_steps",
    "mutations",
    "flower_simulation",
    "compare",
    "flower_engine",
    "readme",
    "report_browser",
    "costs",
    "reproduce",
    "proofs_admission",
    "method_laws",
    "proofs_resume",
    "docs",
    "docs_site",
    "doctor",
    "security",
    "resume",
    "cli",
    "examples",
)
"""Files of tests that take longest; what is not in it begins after them, in the order of names."""

NOT_QUICK = ("slow", "process", "document", "large", "run")
"""Marks of tests that `make quick` leaves out; `pyproject.toml` says what they mean."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no file whose mark `-m "not (this or that)"` leaves out: what they import takes longer than many tests.

    What tests share has no doctests, and would be imported for them.
    """
    if (
        collection_path.suffix == ".py"
        and collection_path.parent == HERE
        and not collection_path.name.startswith("test_")
    ):
        return True
    without = re.fullmatch(r"not (\w+|\(\w+(?: or \w+)*\))", config.getoption("markexpr"))
    if not without or collection_path.suffix != ".py":
        return None
    mark = re.search(r"^pytestmark = \[?\s*pytest\.mark\.(\w+)", collection_path.read_text("utf8"), re.MULTILINE)
    return True if mark and mark[1] in without[1].strip("()").split(" or ") else None  # None: others may say


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest; `--no-loadscope-reorder` keeps it so. Examples with the bundled base are large.

    Who takes the tiny base has a language model: making it imports more than all of `make quick` otherwise does.
    """
    for item in items:
        if isinstance(item, pytest.DoctestItem) and item.dtest and '"nano"' in (item.dtest.docstring or ""):
            item.add_marker("large")
        elif "tiny" in getattr(item, "fixturenames", ()):
            item.add_marker("run")
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True)
def _starts_processes_only_if_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse what is not quick to a test without a mark: `make quick` would run it."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("this test starts a process: give it the mark process")

    if not any(request.node.get_closest_marker(mark) for mark in NOT_QUICK):
        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
        monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real text and trained models, which is not part of the project."""
    if not SHARED.is_dir():
        pytest.skip("../shared, the folder of real text and trained models, is not here")
    return SHARED


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random Llama: 2 layers, hidden 32, grouped keys and values, untied output layer, 258 byte tokens."""
    from proofs.small_run import write_base

    folder = tmp_path_factory.mktemp("tiny")
    write_base(folder)
    return str(folder)


@pytest.fixture
def tiny_model(tiny: str) -> LoraModel:
    """The tiny base with LoRA layers on q_proj and v_proj."""
    from hetlora.model.lora_model import LoraModel, load_base

    return LoraModel(load_base(tiny), scaling=2.0)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny: str):
    """The tiny base's tokenizer."""
    from hetlora.model.lora_model import load_tokenizer

    return load_tokenizer(tiny)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The whole of `make demo`, once: what `hetlora run --json` prints."""
    return _demonstrated(tmp_path_factory, "demonstration")


@pytest.fixture(scope="session")
def short_demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`make demo` for two rounds, with four answers and one held-out row per client, once."""
    return _demonstrated(
        tmp_path_factory, "short", "federation.rounds=2", "evaluation.generate=4", "evaluation.rows_per_client=1"
    )


def _demonstrated(tmp_path_factory: pytest.TempPathFactory, name: str, *changes: str) -> dict[str, Any]:
    """Return what the demonstration prints. Of several processes of tests one runs it."""
    from hetlora import cli

    place = tmp_path_factory.getbasetemp()
    place = (place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / name
    output = place / "output.json"
    with FileLock(f"{place}.lock"):
        if not output.is_file():
            place.mkdir()
            out = io.StringIO()
            example = Path(__file__).resolve().parent.parent / "examples/demo.toml"
            command = ["run", str(example), "--report", "--json", "--quiet"]
            for change in (f"output={json.dumps(str(place))}", *changes):
                command += ["--set", change]
            with contextlib.redirect_stdout(out):
                code = cli.main(command)
            assert code == 0
            output.write_text(out.getvalue(), encoding="utf8")
    result: dict[str, Any] = json.loads(output.read_text("utf8"))
    return result
