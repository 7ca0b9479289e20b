"""`hetlora data`: each client's rows, before training and without the model's weights."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hetlora.cli import main
from hetlora.commands.preview.picture import bars_of, print_preview
from hetlora.commands.preview.preview import ClientPreview, Preview, preview
from hetlora.config import load_config
from small_federations import phones

ROWS = [
    *({"client": "a", "q": "12", "a": "345", "kind": "short", "split": "train"} for _ in range(3)),
    {"client": "a", "q": "12", "a": "3" * 20, "kind": "long", "split": "test"},
    {"client": "b", "q": "12", "a": "", "kind": "short", "split": "train"},
    {"client": "b", "q": "12", "a": "34567", "kind": "long", "split": "train"},
    {"client": "b", "q": "12", "a": "", "kind": "short", "split": "test"},
    {"client": "b", "q": "12", "a": "3", "kind": "other", "split": "validation"},
]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command in a folder with two clients' rows, and a base that is a tokenizer and a config without weights."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "base")
    Path("base/model.safetensors").unlink()
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf8")
    data = {"path": "rows.jsonl", "prompt": "{q}", "target": "{a}", "max_length": 16}
    one = {"rounds": 1, "clients_per_round": 1}
    Path("run.toml").write_text(phones("base", data=data, federation=one, method={"min_rank": 1}), encoding="utf8")

    def run(*options: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["data", "run.toml", *options])
        return code, *capsys.readouterr()

    return run


def test_json_counts_every_row_token_and_label_without_the_models_weights(call: Call):
    code, out, err = call("--json", "--by", "kind")
    assert (code, err, out.count("\n")) == (0, "", 1)
    shown = json.loads(out)
    # A row is its bytes and an end token: 2 + 3 + 1, or the longest sequence, 16.
    a = {"train": 3, "test": 1, "train_tokens": 18, "test_tokens": 16, "truncated": 1, "empty": 0}
    b = {"train": 1, "test": 0, "train_tokens": 8, "test_tokens": 0, "truncated": 0, "empty": 2}
    assert shown["clients"] == [
        {"client": "a", **a, "labels": {"short": 3, "long": 1}},
        {"client": "b", **b, "labels": {"short": 2, "long": 1}},
    ]
    assert shown["total"] == {**{key: a[key] + b[key] for key in a}, "labels": {"short": 5, "long": 2}}
    assert (shown["left_out_rows"], shown["left_out_clients"], shown["partition"]) == (1, 0, "natural")
    assert shown["largest_tenth_share"] == 0.75
    assert shown["no_tokens"] is None


def test_the_table_has_a_line_a_client_and_plain_bars_where_there_is_no_terminal(call: Call):
    code, out, _ = call("--by", "kind")
    assert code == 0
    assert "\x1b" not in out
    lines = out.splitlines()
    figures = ["train", "tokens", "truncated", "empty", "short", "long"]
    assert lines[0].split() == ["client", "train", "rows", "held", "out", *figures]
    assert lines[1].split() == ["a", "3", "1", "18", "1", "0", "3", "1"]
    assert lines[2].split() == ["b", "1", "0", "8", "0", "2", "2", "1"]
    assert (
        "4 training rows, 1 held out; 26 training tokens; 1 row truncated; 2 rows dropped for an empty target, such as rows"
        in out
    )
    assert "1 row on neither side of the split" in out
    first, second = lines[-2:]
    assert first.count("█") == pytest.approx(3 * first.count("▓"), abs=2)
    assert len(second) < len(first), "three rows make a shorter bar than four"


def test_without_labels_the_bars_are_the_two_sides(call: Call):
    out = call()[1]
    assert "training rows" in out.splitlines()[-3]
    assert "held out" in out.splitlines()[-3]


def test_a_tokenizer_that_does_not_load_costs_the_tokens_only(call: Call):
    code, out, _ = call("--set", "model.tokenizer=./nowhere")
    assert code == 0
    assert out.splitlines()[1].split() == ["a", "3", "1", "?", "?", "?"]
    assert "no tokens: the base model './nowhere'" in out
    assert json.loads(call("--json", "--set", "model.tokenizer=./nowhere")[1])["total"]["train_tokens"] is None


def test_a_base_without_tokenizer_files_has_no_tokens_though_its_architecture_has_a_tokenizer(call: Call):
    """transformers makes an empty tokenizer out of such a config.json, to which every text is empty."""
    Path("bare").mkdir()
    Path("bare/config.json").write_text('{"model_type": "gpt2", "vocab_size": 258}', encoding="utf8")
    code, out, _ = call("--set", "model.base=bare", "--json")
    shown = json.loads(out)
    assert (code, shown["total"]["train_tokens"], shown["total"]["empty"]) == (0, None, None)
    assert "'bare' has no tokenizer that loads: it knows no text; save one beside it" in shown["no_tokens"]


def test_a_tokenizer_may_lie_in_a_folder_without_a_model(call: Call):
    Path("base/config.json").rename("config.json")
    Path("base").rename("tokens")
    Path("base").mkdir()
    Path("config.json").rename("base/config.json")
    shown = json.loads(call("--json", "--set", "model.tokenizer=tokens")[1])
    assert (shown["no_tokens"], shown["total"]["train_tokens"]) == (None, 26)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "data.path=nowhere.jsonl"], "'nowhere.jsonl' does not exist"),
        (["--set", "data.pth=x"], "data.pth is not a key"),
        (["--by", "colour"], "field 'colour', the label, is missing"),
        (["--set", "data.chat=true"], "has no chat template"),
    ],
)
def test_bad_input_is_one_error_and_code_two(call: Call, options: list[str], said: str):
    code, out, err = call(*options)
    assert (code, out) == (2, "")
    assert said in err
    assert sorted(path.name for path in Path().iterdir()) == ["base", "rows.jsonl", "run.toml"]


def test_the_partition_is_the_one_a_run_would_have(call: Call):
    changes = ["partition.kind=shards", "partition.by=kind", "partition.clients=2", "partition.shards_per_client=1"]
    shown = json.loads(call("--json", *(part for change in changes for part in ("--set", change)))[1])
    assert shown["by"] == "kind"
    assert all(client["client"].startswith("client-00") for client in shown["clients"])


# The picture --------------------------------------------------------------------------------------------------------


def shown_of(count: int, labels: int = 0) -> Preview:
    names = tuple(f"label {index}" for index in range(labels))
    clients = tuple(
        ClientPreview(f"c{index}", index + 1, 1, 10, 1, 0, 0, dict.fromkeys(names, index + 1)) for index in range(count)
    )
    return Preview("many", "rows.jsonl", "natural", "kind" if labels else None, names, clients, {}, 0, None)


def text_of(shown: Preview, **options: Any) -> str:
    file = io.StringIO()
    print_preview(shown, file, **options)
    return file.getvalue()


def test_many_clients_are_shown_by_quantiles_and_a_sample_of_bars():
    text = text_of(shown_of(100))
    assert text.splitlines()[0].startswith("of 100 clients")
    assert [line.split()[:2] for line in text.splitlines() if line.startswith(("least", "median", "most"))] == [
        ["least", "1"],
        ["median", "51"],
        ["most", "100"],
    ]
    assert "30 of 100 clients, evenly by size:" in text
    assert "the largest tenth of the clients hold 19% of the training rows" in text, "955 of 5050"
    whole = text_of(shown_of(100), every=True)
    assert sum(line.startswith("c") for line in whole.splitlines()) == 1 + 2 * 100


class Terminal(io.StringIO):
    """A terminal as far as anybody asks."""

    def isatty(self) -> bool:
        """Return that it is one."""
        return True


@pytest.mark.parametrize("width", [20, 40, 80])
@pytest.mark.parametrize("count", [12, 100])
def test_no_number_is_lost_on_a_narrow_terminal(width: int, count: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    names = tuple(f"label {index}" for index in range(8))
    clients = tuple(
        ClientPreview(
            f"a client of a long name {n}", 1000 + n, 2000 + n, 3000 + n, 1, 4000 + n, 5000 + n,
            {name: 6000 + 100 * index + n for index, name in enumerate(names)},
        )
        for n in range(count)
    )  # fmt: skip
    file = Terminal()
    print_preview(Preview("wide", "rows.jsonl", "natural", "kind", names, clients, {}, 0, None), file)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
    table = plain[: plain.index("rows.jsonl, natural")]
    assert max(map(len, table.splitlines())) <= width
    wanted = [*(1000 * part + count - 1 for part in range(1, 6)), *(6000 + 100 * part + count - 1 for part in range(8))]
    assert [str(number) in table.split() for number in wanted] == [True] * 13
    bars = plain.splitlines()[-min(count, 30) :]
    assert [int(bar.split()[-1]) >= 8 * 6000 + 2800 for bar in bars] == [True] * len(bars), "nor at the end of a bar"
    assert all(heading in table for heading in ("train rows", "held out", "train tokens", "truncated", "empty", *names))


def test_names_that_differ_at_their_end_stay_different_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "60")
    clients = tuple(ClientPreview(f"{'x' * 100}{n}", 1, 1, 1, 1, 0, 0, {}) for n in range(3))
    file = Terminal()
    print_preview(Preview("long", "rows.jsonl", "natural", None, (), clients, {}, 0, None), file)
    assert all(f"…xxxxxxxxx{n} " in file.getvalue() for n in range(3))


def test_a_sample_of_bars_goes_from_the_largest_to_the_smallest():
    _, bars = bars_of(shown_of(100))
    assert (len(bars), bars[0].name, bars[-1].name) == (30, "c99", "c0")
    assert len({bar.name for bar in bars}) == 30


def test_many_labels_are_drawn_as_seven_and_others():
    legend, bars = bars_of(shown_of(3, labels=12))
    assert legend == (*(f"label {index}" for index in range(7)), "5 others")
    assert bars[2].parts == (3,) * 7 + (15,)
    assert len(bars_of(shown_of(3, labels=8))[0]) == 8


def test_names_that_hold_markup_or_control_characters_are_shown_as_text():
    clients = tuple(ClientPreview(name, 1, 1, 1, 1, 0, 0, {}) for name in ("[red]<b>&", "\x1b[31mred\x00"))
    shown = Preview("odd", "rows", "natural", None, (), clients, {}, 0, None)
    text = text_of(shown)
    assert "[red]<b>&" in text
    assert "\x1b" not in text
    assert "?[31mred?" in text


def test_the_run_counts_the_same_rows_that_the_preview_shows(call: Call):
    from hetlora.runs.display import QuietDisplay
    from hetlora.runs.local_experiment import LocalExperiment

    shown = json.loads(call("--json")[1])["total"]
    config = load_config(Path("run.toml"), ["model.base=nano"])
    seen = preview(config)
    record = LocalExperiment(config, QuietDisplay()).run_record()
    assert (record.truncated_rows, record.empty_rows) == (seen.total("truncated"), seen.total("empty"))
    assert (record.train_rows, record.test_rows) == (shown["train"], shown["test"])
    assert record.empty_rows == 2


def test_a_client_field_that_a_partition_makes_useless_is_said():
    from hetlora.commands.preview.preview import preview
    from hetlora.config import parse_config

    document = {
        "data": {"prompt": "{prompt}", "target": "{target}", "client_field": "name"},
        "partition": {"kind": "iid", "clients": 20},
        "federation": {"rounds": 1, "clients_per_round": 1},
        "ranks": {"kind": "same", "rank": 2},
        "training": {"steps": 1},
    }
    assert "data.client_field = 'name' is not read: partition.kind = 'iid'" in preview(parse_config(document)).notes[0]


def test_rows_on_both_sides_and_control_tokens_in_a_text_are_counted(tiny: str):
    from hetlora.data import ClientRows, Federation, Row
    from hetlora.data.inspection import notes_on, unread_fields
    from hetlora.model.lora_model import load_tokenizer

    same, spelled, fine = Row("q", "a"), Row("x <end> y <end>", "b"), Row("q", "c")
    clients = {"ana": ClientRows((same, spelled), (fine,)), "ben": ClientRows((Row("r", "<end>"),), (same,))}
    federation = Federation("rows", clients, fields=("q", "a", "split", "id"))
    notes = notes_on(federation, load_tokenizer(tiny))
    assert [note.split(":")[0] for note in notes] == [
        "1 held-out rows are training rows, too",
        "2 rows spell the control token '<end>' in their text, which the tokenizer reads as the token itself",
    ]
    assert notes_on(Federation("rows", {"ana": ClientRows((fine,), (same,))}), load_tokenizer(tiny)) == []
    assert unread_fields(federation, {"q", "a"}) == "id"
