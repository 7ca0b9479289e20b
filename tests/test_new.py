"""The first commands of a newcomer: a configuration for own rows, the examples, the demonstration."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from hetlora.cli import main
from hetlora.commands.examples import example_names
from hetlora.commands.new.new import write_new
from hetlora.commands.preview.preview import preview
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
    assert "not used: 'id'" in made.seen
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


COLUMNS: dict[str, tuple[str, tuple[str, str, str]]] = {
    "short replies": (
        "Nr,What was asked?,Reply (gold),who asked", ("{What was asked?}\n\nAnswer:", " {Reply (gold)}", "who asked"),
    ),
    "words in names": (
        "Question text,Answer given,User ID", ("{Question text}\n\nAnswer:", " {Answer given}", "User ID"),
    ),
    "letters": ("q_text,a_text,userid", ("{q_text}\n\nAnswer:", " {a_text}", "userid")),
    "labels": ("user_id,text,label", ("{text}\n\nAnswer:", " {label}", "user_id")),
    "reviews": ("review,label,reviewerId", ("{review}\n\nAnswer:", " {label}", "client")),
    "the order": ("Frage,Antwort,Datum", ("{Frage}\n\nAnswer:", " {Antwort}", "client")),
}  # fmt: skip


def _write_rows(path: Path, columns: list[str], cells: dict[int, dict[str, Any]] | None = None) -> None:
    """Write rows whose columns of persons have three names, whose other long column has words, and the rest one."""
    short = ("reply", "answer", "a_text", "label", "antwort", "nr", "datum")
    rows: list[dict[str, Any]] = [
        {
            name: f"u{n % 3}" if any(word in name.lower() for word in ("user", "who"))
            else f"v{n}" if name.lower().startswith(short) else f"words of {n}"
            for name in columns
        }
        for n in range(1, 41)
    ]  # fmt: skip
    for place, changes in (cells or {}).items():
        rows[place - 1] = {name: value for name, value in (rows[place - 1] | changes).items() if value != "gone"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")


@pytest.mark.parametrize("name", COLUMNS)
def test_fields_are_found_by_words_in_their_names_and_the_others_are_listed(tmp_path: Path, name: str):
    head, (prompt, target, client) = COLUMNS[name]
    _write_rows(tmp_path / "rows.jsonl", head.split(","))
    made = write_new(tmp_path / "mine.toml", str(tmp_path / "rows.jsonl"))
    data = load_config(made.path).data
    assert (data.prompt, data.target, data.client_field) == (prompt, target, client)
    assert any(line.startswith("guessed from the ") for line in made.seen)
    used = f"{prompt}{target}{client}"
    unused = [repr(column) for column in head.split(",") if column not in used]
    assert [line for line in made.seen if line.startswith("not used: ")] == (
        [f"not used: {', '.join(unused)}"] if unused else []
    )


def test_a_person_names_the_fields_or_a_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    _write_rows(Path("rows.jsonl"), ["c1", "label", "who did", "c4"])
    named = ["--prompt", "c4", "--target", "label", "--client", "who did"]
    assert main(["new", "one.toml", "--data", "rows.jsonl", *named]) == 0
    assert "not used: 'c1'" in capsys.readouterr().out
    data = load_config(Path("one.toml")).data
    assert (data.prompt, data.target, data.client_field) == ("{c4}\n\nAnswer:", " {label}", "who did")
    assert main(["new", "two.toml", "--data", "rows.jsonl", "--prompt", "{c1}/{c4}: ", "--target", "{label}."]) == 0
    assert (load_config(Path("two.toml")).data.prompt, load_config(Path("two.toml")).data.target) == (
        "{c1}/{c4}: ",
        "{label}.",
    )
    wrong = [
        (["--target", "c5"], "has no field 'c5'; its fields are c1, label, who did, c4"),
        (["--prompt", "c1"], "needs --target"),
        (["--client", "nobody"], "has no field of that name"),
        (["--client", "c4"], "names 0 clients of two rows or more"),
    ]
    for options, message in wrong:
        capsys.readouterr()
        assert main(["new", "three.toml", "--data", "rows.jsonl", *options]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("cells", [{7: {"answer": "gone"}}, {7: {"answer": None}}, {1: {"answer": "gone"}}])
def test_a_bad_row_is_noted_and_changes_nothing(tmp_path: Path, cells: dict[int, dict[str, Any]]):
    [line] = cells
    cells |= {9: {"user_id": "gone"}, 11: {"user_id": " "}}
    _write_rows(tmp_path / "rows.jsonl", ["user_id", "question", "answer"], cells)
    made = write_new(tmp_path / "mine.toml", str(tmp_path / "rows.jsonl"))
    data = load_config(made.path).data
    assert (data.prompt, data.target, data.client_field) == ("{question}\n\nAnswer:", " {answer}", "user_id")
    notes = [note for note in made.seen if note.startswith("note: ")]
    assert len(notes) == 2
    assert f"line {line} has no 'answer'; a run refuses that" in notes[0]
    assert "2 rows have no 'user_id', the first is " in notes[1]


def test_a_name_that_no_template_can_hold_is_refused(tmp_path: Path):
    _write_rows(tmp_path / "rows.jsonl", ["q{1}", "answer"])
    with pytest.raises(HetLoraError, match=r"the field 'q\{1\}' cannot stand in a template"):
        write_new(tmp_path / "mine.toml", str(tmp_path / "rows.jsonl"))


def test_conversations_for_a_base_without_a_chat_template_get_one(tmp_path: Path):
    turns = [("system", "be kind"), ("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "2")]
    rows = [{"messages": [{"role": role, "content": f"{text} {n}"} for role, text in turns]} for n in NUMBERS]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf8")
    made = write_new(tmp_path / "mine.toml", str(tmp_path / "rows.json"))
    shown = preview(load_config(made.path), examples=1)
    assert any("a plain one is written to" in line for line in made.seen)
    assert shown.no_tokens is None
    assert not [note for note in shown.notes if "template" in note or "border" in note], shown.notes
    assert re.fullmatch(r"system: be kind \d+\nuser: one\? \d+\nassistant:", shown.examples[0].context)
    assert shown.examples[0].scored[-1] == "<|end|>"


def test_a_folder_of_a_file_per_client_has_them_as_clients(tmp_path: Path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for n in range(101, 105):
        _write_rows(folder / f"u-{n}.jsonl", ["question", "answer"])
    made = write_new(tmp_path / "mine.toml", str(folder))
    assert any(line.startswith("guessed that each file holds the rows of one client") for line in made.seen)
    config = load_config(made.path)
    assert config.data.client_field == "file"
    assert sorted(load_federation(config).names) == ["u-101", "u-102", "u-103", "u-104"]


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
