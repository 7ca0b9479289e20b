"""`hetlora client check`: what a client's owner learns before it joins."""

from __future__ import annotations

import importlib.util
import json
import shlex
import tomllib
from pathlib import Path

import pytest

from hetlora.cli import main
from hetlora.flower.new_app import new_app

pytestmark = pytest.mark.run


@pytest.fixture
def app(tmp_path: Path) -> Path:
    new_app(tmp_path / "fed")
    rows = [
        {"prompt": f"count {row}", "target": f"to {row} " * (400 if row == 3 else 1), "id": row} for row in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def check(app: Path, *options: str, rows: str = "rows.jsonl") -> int:
    return main(["client", "check", str(app / rows), "--config", str(app / "fed" / "run.toml"), *options])


def test_a_client_learns_its_rows_its_base_and_the_rank_it_affords(app: Path, capsys: pytest.CaptureFixture[str]):
    assert check(app, "--memory", "82") == 0
    printed = capsys.readouterr().out
    assert "rows:    40, " in printed
    assert "cut at 224 tokens: 1; left out for an empty target: 0" in printed
    assert "nano is here (SHA-256 " in printed
    assert "note:    fields that are not read: id" in printed
    assert check(app, "--memory", "82", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert 1 < found["rank"] < 16
    assert f"rank:    {found['rank']} fits 82 MB" in printed
    assert found["rows"]["train"] + found["rows"]["test"] == 40
    assert check(app, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 16


def test_a_client_without_a_held_out_row_may_take_part_and_reads_that_it_is_not_measured(
    app: Path, capsys: pytest.CaptureFixture[str]
):
    (app / "rows.jsonl").write_text('{"prompt": "x", "target": "y"}')
    assert check(app) == 0
    assert "1, 1 for training and none held out, so that it is not measured\n" in capsys.readouterr().out


def test_what_the_check_finds_is_what_the_client_announces(app: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("flwr", reason="needs hetlora[flower]")
    from hetlora.config import load_config
    from hetlora.flower.client_runtime import ClientRuntime
    from hetlora.flower.node_config import NodeConfig

    assert check(app, "--memory", "82", "--set", "evaluation.rows_per_client=", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    config = load_config(app / "fed" / "run.toml", ["evaluation.rows_per_client="])
    settings = NodeConfig.read({"data": str(app / "rows.jsonl"), "name": "ana", "memory": 82.0})
    hello = ClientRuntime(config, settings).hello(settings, keeps=False).value
    assert [hello[key] for key in ("rank", "train", "test")] == [
        found["rank"], found["rows"]["train"], found["rows"]["test"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "text", "said"),
    [
        ((), '{"prompt": "x"}', "rows.jsonl, line 1: field 'target' is missing"),
        ((), "", "holds no rows"),
        (("--memory", "1"), None, "memory = 1 MB: rank 1 does not fit; give more, or take a smaller base"),
        (("--memory", "0"), None, "--memory 0: give the memory"),
        (("--base", "/nowhere"), None, "the base model '/nowhere' is not a folder"),
        (("--set", "flower.clients=config"), None, "none brings its own rows"),
    ],
)
def test_who_cannot_take_part_reads_one_reason(
    options: tuple[str, ...], text: str | None, said: str, app: Path, capsys: pytest.CaptureFixture[str]
):
    if text is not None:
        (app / "rows.jsonl").write_text(text)
    assert check(app, *options) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert not printed.out
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("rows", "place"), [("it's.jsonl", "{app}/it's.jsonl"), ("~/rows.jsonl", "{app}/rows.jsonl"), ("stdlib", "stdlib")]
)
def test_the_line_that_is_printed_is_one_that_a_shell_and_flower_read(
    app: Path, rows: str, place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(app))
    (app / "it's.jsonl").write_bytes((app / "rows.jsonl").read_bytes())
    monkeypatch.chdir(app)
    assert main(["client", "check", rows, "--config", str(app / "fed" / "run.toml")]) == 0
    words = shlex.split(capsys.readouterr().out.partition("take part: ")[2])
    config = tomllib.loads("\n".join(words[1].replace(" name=", "\nname=").replace(" rank=", "\nrank=").splitlines()))
    assert config == {"data": place.format(app=app), "name": "NAME", "rank": 16}


def test_a_node_asks_how_its_base_would_be_stored(
    app: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert check(app, "--quantize", "bfloat16") == 0
    words = shlex.split(capsys.readouterr().out.partition("take part: ")[2])
    assert 'quantize="bfloat16"' in words[1]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "bitsandbytes" else find(name))
    assert check(app, "--quantize", "int8") == 2
    assert "needs bitsandbytes" in capsys.readouterr().err
    assert check(app, "--quantize", "int7") == 2
    assert "model.quantize" in capsys.readouterr().err


def test_rows_that_are_not_there_are_no_rows(app: Path, capsys: pytest.CaptureFixture[str]):
    assert check(app, rows="gone.jsonl") == 2
    assert "does not exist" in capsys.readouterr().err
