"""The first commands of a newcomer: a configuration for own rows, the examples, the demonstration."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from hetlora.cli import main
from hetlora.commands.examples import example_names
from hetlora.commands.new import write_new
from hetlora.config import load_config
from hetlora.config.build_data import load_federation
from hetlora.errors import HetLoraError

NUMBERS = range(24)
ROWS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "alpaca": (
        [{"instruction": f"Add {n}", "input": "1" if n % 2 else "", "output": f"{n + 1}"} for n in NUMBERS],
        {"prompt": "{instruction}{?input}\n{input}{/input}\n\nAnswer:", "target": " {output}", "split_field": ""},
    ),
    "questions of users": (
        [{"user": f"u{n % 3}", "Question": f"{n}?", "Answer": f"{n}"} for n in NUMBERS],
        {"client_field": "user", "prompt": "{Question}\n\nAnswer:", "target": " {Answer}"},
    ),
    "messages with a split": (
        [
            {
                "speaker": n % 4, "split": "validation" if n > 15 else "train",
                "messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}"}],
            }
            for n in NUMBERS
        ],
        {"client_field": "speaker", "messages": "messages", "split_field": "split", "train": ["train"], "test": ["validation"]},
    ),
    "plain text": ([{"text": f"text {n}"} for n in NUMBERS], {"prompt": "", "target": "{text}"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_configuration_is_written_that_reads_the_rows_as_they_are(tmp_path: Path, name: str):
    rows, expected = ROWS[name]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows), encoding="utf8")
    made = write_new(tmp_path / "new" / "mine.toml", str(data))
    config = load_config(made.path)
    assert config.name == "mine"
    found = config.data.model_dump()
    assert {key: found[key] for key in expected} == expected
    federation = load_federation(config)
    assert len(federation.clients) >= 2
    held = [row for own in federation.clients.values() for row in (*own.train, *own.test)]
    assert len(held) >= 20, "hardly a row is left out"
    assert all(not row.blank for row in held)


def test_fields_whose_names_say_nothing_are_guessed_by_their_order_and_it_is_said(tmp_path: Path):
    rows = [{"id": n, "user": f"u{n % 3}", "What now?": f"what of {n}", "it is": f"it is {n}"} for n in NUMBERS]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf8")
    made = write_new(tmp_path / "mine.toml", str(tmp_path / "rows.json"))
    assert made.seen[-1].startswith("guessed from the order of the fields")
    config = load_config(made.path)
    assert (config.data.prompt, config.data.target) == ("{What now?}\n\nAnswer:", " {it is}")
    assert config.data.client_field == "user"
    federation = load_federation(config)
    assert {row.target for own in federation.clients.values() for row in own.train} <= {f" it is {n}" for n in NUMBERS}


def test_rows_sorted_by_their_split_and_their_user_are_divided_by_them(tmp_path: Path):
    """All rows count, and not the first two thousand, which may be of one side and one user."""
    sides = [("train", 2500), ("test", 300)]
    rows = [
        {"split": side, "user": f"u{3 * n // many}", "text": f"{side} {n}"} for side, many in sides for n in range(many)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf8")
    made = write_new(tmp_path / "mine.toml", str(tmp_path / "rows.json"))
    config = load_config(made.path)
    assert (config.data.split_field, config.data.test, config.data.client_field) == ("split", ["test"], "user")
    assert made.seen[0] == "rows: 2800"
    federation = load_federation(config)
    assert all(row.target.startswith("train") for own in federation.clients.values() for row in own.train)


def test_a_place_that_cannot_be_written_is_one_error(tmp_path: Path):
    (tmp_path / "file").write_text("", encoding="utf8")
    with pytest.raises(HetLoraError, match=r"cannot write .*give another name"):
        write_new(tmp_path / "file" / "mine.toml")


def test_rows_without_words_an_old_file_and_no_rows_are_refused(tmp_path: Path):
    (tmp_path / "rows.json").write_text('[{"alpha": 1, "beta": "x"}]', encoding="utf8")
    with pytest.raises(HetLoraError, match=r"no field holds a conversation.*its fields are alpha, beta"):
        write_new(tmp_path / "mine.toml", str(tmp_path / "rows.json"))
    assert not (tmp_path / "mine.toml").exists()
    (tmp_path / "mine.toml").write_text("kept", encoding="utf8")
    with pytest.raises(HetLoraError, match="exists already"):
        write_new(tmp_path / "mine.toml", str(tmp_path / "rows.json"))
    assert (tmp_path / "mine.toml").read_text("utf8") == "kept"
    (tmp_path / "none.json").write_text("[]", encoding="utf8")
    with pytest.raises(HetLoraError, match="holds no rows"):
        write_new(tmp_path / "other.toml", str(tmp_path / "none.json"))


@pytest.mark.run
def test_a_run_of_ones_own_rows_in_two_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: str
):
    monkeypatch.chdir(tmp_path)
    with Path("rows.csv").open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, ["user", "question", "answer"])
        writer.writeheader()
        writer.writerows({"user": f"u{n % 3}", "question": f"{n} + 1?", "answer": n + 1} for n in NUMBERS)
    assert main(["new", "mine.toml", "--data", "rows.csv", "--base", tiny]) == 0
    out = capsys.readouterr().out
    assert "clients: 3, by 'user'" in out
    assert "hetlora run mine.toml" in out
    assert main(["run", "mine.toml", "--quiet", "--set", "federation.rounds=1", "--set", "evaluation.generate="]) == 0
    assert Path("runs/mine/adapter/adapter_model.safetensors").is_file()


def test_the_examples_are_listed_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["examples"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith("   ")] == example_names()
    assert lines[0].startswith("  demo ")
    assert any(line.endswith("over two seeds.") for line in lines), "whole sentences"
    assert main(["examples", "demo", "dolly", "--to", str(tmp_path / "own")]) == 0
    assert load_config(tmp_path / "own/demo.toml").name == "demo"
    capsys.readouterr()
    assert main(["examples", "msc", "demo", "--to", str(tmp_path / "own")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert not (tmp_path / "own/msc.toml").exists(), "all or none"
    assert main(["examples", "nothing"]) == 2
    assert "there is no example 'nothing'; there are demo, " in capsys.readouterr().err


def test_without_a_command_the_first_three_are_shown(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[:3]] == ["demo", "new", "run"]


@pytest.mark.slow
def test_the_demonstration_runs_from_any_folder_and_ends_with_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--quiet", "--set", "federation.rounds=1", "--set", "evaluation.generate="]) == 0
    assert (tmp_path / "runs/demo/report.html").stat().st_size > 1_000_000
