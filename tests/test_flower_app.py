"""The Flower App: the files of `hetlora flower new`, and how the command line and Flower find it."""

from __future__ import annotations

import io
import shutil
import tomllib
import zipfile
from pathlib import Path

import pytest

from hetlora.cli import main
from hetlora.config import load_config
from hetlora.flower.new_app import new_app

ROOT = Path(__file__).parents[1]


def test_a_new_app_is_a_valid_run_and_a_valid_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["flower", "new", str(tmp_path / "My Phones")]) == 0
    printed = capsys.readouterr().out
    assert f"  flwr run '{tmp_path / 'My Phones'}' local --stream --federation-config" in printed
    assert f"  hetlora flower local '{tmp_path / 'My Phones'}'" in printed
    config = load_config(tmp_path / "My Phones" / "run.toml")
    assert config.flower.clients == "nodes"
    app = tomllib.loads((tmp_path / "My Phones" / "pyproject.toml").read_text())
    assert app["project"]["name"] == "my-phones"
    build = pytest.importorskip("flwr.cli.build", reason="needs hetlora[flower]")
    (tmp_path / "My Phones" / "local").mkdir()
    (tmp_path / "My Phones" / "local" / "settings.json").write_text("{}")
    assert bundled(build.build_fab_from_disk(tmp_path / "My Phones")) == {"pyproject.toml", "run.toml"}


def bundled(bundle: bytes) -> set[str]:
    with zipfile.ZipFile(io.BytesIO(bundle)) as opened:
        return {name for name in opened.namelist() if not name.startswith(".info")}


def test_what_is_there_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run.toml").write_text("mine")
    assert main(["flower", "new", str(tmp_path)]) == 2
    assert "there already; give another folder" in capsys.readouterr().err
    assert (tmp_path / "run.toml").read_text() == "mine"
    assert not (tmp_path / "pyproject.toml").exists()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    assert main(["flower", "new", str(tmp_path / "file" / "app")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_the_repository_is_an_app_that_holds_the_examples_alone(tmp_path: Path):
    build = pytest.importorskip("flwr.cli.build", reason="needs hetlora[flower]")
    # As a clone is: environments, in which Flower would look at every file, are in hidden folders.
    shutil.copytree(ROOT, tmp_path / "clone", ignore=shutil.ignore_patterns(".?*", "build", "runs", "__pycache__"))
    shutil.copy(ROOT / ".gitignore", tmp_path / "clone")
    names = bundled(build.build_fab_from_disk(tmp_path / "clone"))
    assert "examples/demo.toml" in names
    assert all(name == "pyproject.toml" or name.startswith("examples/") for name in names)


@pytest.mark.parametrize("path", ["pyproject.toml", "src/hetlora/flower/template/pyproject.toml"])
def test_the_named_parts_exist(path: str):
    pytest.importorskip("flwr", reason="needs hetlora[flower]")
    import importlib

    app = tomllib.loads((ROOT / path).read_text())["tool"]["flwr"]["app"]
    for component in app["components"].values():
        module, _, name = component.partition(":")
        assert hasattr(importlib.import_module(module), name)
    assert set(app["config"]) == {"config", "set", "resume"}


@pytest.mark.process
def test_clients_on_machines_of_their_own_are_no_run_of_this_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    new_app(tmp_path / "app")
    run = str(tmp_path / "app" / "run.toml")
    assert main(["run", run, "--set", f"output={tmp_path}"]) == 2
    assert "start it by `flwr run`, see docs/deploy.md" in capsys.readouterr().err
    pytest.importorskip("ray", reason="needs hetlora[flower]")
    assert main(["run", run, "--engine", "flower-sim"]) == 2
    assert "use 'config' here" in capsys.readouterr().err
    assert not list(tmp_path.glob("federation*"))


def test_without_flower_the_simulation_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else real(name, *rest))
    assert main(["run", str(ROOT / "examples" / "demo.toml"), "--engine", "flower-sim"]) == 2
    assert "pip install 'hetlora[flower]'" in capsys.readouterr().err
