"""Hugging Face data sets from folders, and the messages where one cannot be loaded. Offline."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from hetlora.cli import main
from hetlora.config import load_config, parse_config
from hetlora.config.build_data import load_federation
from hetlora.data import Federation, Row, Template, dataset_source
from hetlora.data.huggingface import is_dataset
from hetlora.errors import DataError
from hetlora.model.lora_model import load_tokenizer
from hetlora.runs.records import read_records

pytestmark = pytest.mark.run

ROOT = Path(__file__).resolve().parent.parent
ROWS = [{"client": client, "q": f"{n} of {client}?", "a": f"it is {n}"} for client in ("x", "y") for n in range(4)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def by_split(rows: list[dict[str, Any]] = ROWS) -> datasets.DatasetDict:
    parts = {"train": rows[::2], "validation": rows[1:2], "test": rows[3::2]}
    return datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in parts.items()})


def read(path: Path | str, **data: Any) -> Federation:
    document = {
        "data": {"path": str(path), "prompt": "{q}", "target": "{a}", **data},
        "federation": {"rounds": 1, "clients_per_round": 1},
        "ranks": {"kind": "same", "rank": 8},
        "training": {"steps": 1},
    }
    return load_federation(parse_config(document))


def save(kind: str, folder: Path) -> Path:
    """Write the same rows in each form that `load_dataset` or `load_from_disk` reads."""
    parts = by_split()
    if kind == "save_to_disk":
        parts.save_to_disk(str(folder))
        return folder
    folder.mkdir()
    for name, part in parts.items():
        if kind == "parquet":
            part.to_parquet(str(folder / f"{name}.parquet"))
        elif kind == "csv":
            part.to_csv(str(folder / f"{name}.csv"))
        else:
            part.to_json(str(folder / f"{name}.jsonl"))
    return folder


# Reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # of the library
@pytest.mark.parametrize("kind", ["save_to_disk", "parquet", "json", "csv"])
def test_every_form_of_a_folder_gives_the_same_federation_with_its_splits_as_a_field(kind: str, tmp_path: Path):
    federation = read(save(kind, tmp_path / "rows"))
    assert {name: (len(rows.train), len(rows.test)) for name, rows in federation.clients.items()} == {
        "x": (2, 1),
        "y": (2, 2),
    }
    assert federation.clients["x"].train[1] == Row("2 of x?", "it is 2")
    assert federation.left_out_rows == {"validation": 1}
    gc.collect()  # the library leaves CSV files open; what it warns of must not fall into another test


def test_other_splits_may_be_chosen_and_a_field_of_the_name_goes_before(tmp_path: Path):
    by_split().save_to_disk(str(tmp_path / "a"))
    chosen = read(tmp_path / "a", test=["validation", "test"])
    assert (len(chosen.clients["x"].test), dict(chosen.left_out_rows)) == (2, {})
    own = [{**row, "split": ("train", "test")[n % 2]} for n, row in enumerate(ROWS)]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(own)}).save_to_disk(str(tmp_path / "b"))
    assert len(read(tmp_path / "b").clients["x"].test) == 2


def test_a_single_data_set_has_no_split_of_its_own(tmp_path: Path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(DataError, match=r"rows, row 0: field 'split' is missing; the row has a, client, q\."):
        read(tmp_path / "rows")
    assert read(tmp_path / "rows", split_field="", test_share=0.5).clients


def test_the_name_of_a_file_is_a_field_where_the_rows_have_none(tmp_path: Path):
    folder = tmp_path / "rows"
    (folder / "more").mkdir(parents=True)
    rows = [json.dumps({"q": f"{n}?", "a": f"{n}"}) for n in range(4)]
    for name in ("u-1.jsonl", "u-2.jsonl", "more/u-3.jsonl"):
        (folder / name).write_text("\n".join(rows), encoding="utf8")

    def owners() -> set[object]:
        fields = dataset_source(str(folder), fields={"q", "a", "file"}).records
        return {own["file"] for _, own in fields}

    assert owners() == {"u-1", "u-2", "u-3"}
    (folder / "more/u-1.jsonl").write_text("\n".join(rows), encoding="utf8")
    with pytest.raises(DataError, match=r"2 files are called 'u-1'.*rename them"):
        owners()
    (folder / "more/u-1.jsonl").unlink()
    (folder / "u-2.jsonl").write_text(json.dumps({"q": "?", "a": "!", "file": "f"}), encoding="utf8")
    with pytest.raises(DataError, match=r"the row has (a|no) field 'file', unlike those before it"):
        owners()


def test_a_folder_in_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    by_split().save_to_disk(str(tmp_path / "rows"))
    assert read("~/rows").clients.keys() == {"x", "y"}


def test_fields_that_are_not_used_are_not_decoded(tmp_path: Path):
    by_split().save_to_disk(str(tmp_path / "rows"))
    _, fields = next(iter(dataset_source(str(tmp_path / "rows"), fields={"a", "split"}).records))
    assert fields == {"split": "train", "a": "it is 0"}
    _, fields = next(iter(dataset_source(str(tmp_path / "rows"), fields={"a", "missing"}).records))
    assert fields.keys() == {"split", "client", "q", "a"}, "all of them, for the message that names them"


def test_new_content_is_read_though_the_files_time_is_the_old_one(tmp_path: Path):
    """The library's cache knows a file by its time, which a copy or an archive keeps."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for answer in ("old", "new"):
        (folder / "train.jsonl").write_text(
            "\n".join(json.dumps({**row, "a": answer}) for row in ROWS), encoding="utf8"
        )
        os.utime(folder / "train.jsonl", (1e9, 1e9))
        federation = read(folder, split_field="", test_share=0.4)
        assert {row.target for own in federation.clients.values() for row in own.train + own.test} == {answer}


@pytest.mark.parametrize("target", ["{a}", "{answer}"])
def test_a_column_that_cannot_be_decoded_matters_only_where_it_is_used(target: str, tmp_path: Path):
    rows = [{**row, "picture": {"bytes": b"no picture", "path": None}} for row in ROWS]
    features = datasets.Features(
        {**{name: datasets.Value("string") for name in ("client", "q", "a")}, "picture": datasets.Image()}
    )
    data = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "rows"))
    if target == "{a}":
        assert len(read(tmp_path / "rows").clients["x"].train) == 4
    else:
        with pytest.raises(DataError, match=r"field 'answer' is missing; the row has a, client, picture, q"):
            read(tmp_path / "rows", target=target)
    with pytest.raises(DataError, match=r"rows, split train: a value of .*picture.* cannot be decoded \(.+\); mend"):
        read(tmp_path / "rows", target="{picture}")


def test_a_field_without_a_value_is_empty_text(tmp_path: Path):
    """Columns give None for what a row does not have, and the rows of another's data set cannot be mended."""
    rows = [{**row, "context": None if n % 2 else "here"} for n, row in enumerate(ROWS)]
    by_split(rows).save_to_disk(str(tmp_path / "rows"))
    federation = read(tmp_path / "rows", prompt="{context}{q}")
    assert [row.prompt for row in federation.clients["x"].train] == ["here0 of x?", "here2 of x?"]
    assert [row.prompt for row in federation.clients["x"].test] == ["3 of x?"]


# What cannot be used ------------------------------------------------------------------------------------------------


def test_a_missing_field_is_named_with_split_and_row_and_the_fields_there_are(tmp_path: Path):
    by_split().save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(DataError) as caught:
        read(tmp_path / "rows", target="{answer}")
    assert f"{tmp_path}/rows, split train, row 0: field 'answer' is missing; the row has a, client, q" in str(
        caught.value
    )


@pytest.mark.parametrize(("value", "field"), [(["x"], "q"), ({"x": 1}, "q"), (None, "client"), (1.5, "client")])
def test_a_value_that_is_no_text_is_named_with_its_place(tmp_path: Path, value: Any, field: str):
    rows = [{"client": "x", "q": "a", "a": "b"} for _ in range(8)]
    for row in rows:
        row[field] = value
    by_split(rows).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(DataError, match=rf"rows, split train, row 0: field '{field}'.* is n"):
        read(tmp_path / "rows")


def test_a_split_that_is_not_there_is_named_with_those_there_are(tmp_path: Path):
    by_split().save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(DataError) as caught:
        read(tmp_path / "rows", test=["tset"])
    assert "no row is on the side data.test of the split (other values of the field: test, validation)" in str(
        caught.value
    )
    assert 'data.split_field = ""' in str(caught.value)


def test_a_folder_without_data_is_refused(tmp_path: Path):
    (tmp_path / "rows").mkdir()
    with pytest.raises(DataError, match=r"rows' cannot be loaded: .*any data files; give a folder with parquet"):
        read(tmp_path / "rows")


def test_a_folder_with_a_broken_file_is_refused_with_the_reason(tmp_path: Path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/train.parquet").write_bytes(b"this is no parquet file")
    with pytest.raises(DataError, match=r"rows, train\.parquet cannot be read as Parquet"):
        read(tmp_path / "rows")


def test_a_name_of_the_hub_without_a_network_is_told_so():
    with pytest.raises(DataError) as caught:
        read("owner/name")
    message = str(caught.value)
    assert message.startswith("the data set 'owner/name' cannot be loaded: ")
    assert all(part in message for part in ("no folder here", "HF_HUB_OFFLINE", "save_to_disk"))


@pytest.mark.parametrize(
    ("path", "expected"),
    [("owner/name", True), ("owner/na.me-1_2", True), ("stdlib", False), ("data/rows.jsonl", False), ("a/b/c", False),
     ("data/rows.jsonl.gz", False), ("./rows", False), ("/nowhere/rows", False), ("~nobody/rows", False)],
)  # fmt: skip
def test_what_looks_like_a_file_is_not_sought_on_the_hub(path: str, expected: bool):
    assert is_dataset(path) == expected


@pytest.mark.parametrize("key", ["subset", "revision"])
def test_keys_of_the_hub_are_refused_for_files(key: str, tmp_path: Path):
    for path in ("stdlib", tmp_path / "rows.jsonl"):
        with pytest.raises(DataError, match=rf"data\.{key} = 'v1' is for a data set"):
            read(path, **{key: "v1"})
    by_split().save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(DataError, match=rf"data\.{key} = 'v1'.*take the key away"):
        read(tmp_path / "rows", **{key: "v1"})


CARD = "---\nconfigs:\n- config_name: one\n  data_files: one.jsonl\n- config_name: two\n  data_files: two.jsonl\n---\n"


def test_a_subset_chooses_among_several_and_is_asked_for(tmp_path: Path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "README.md").write_text(CARD, encoding="utf8")
    for name in ("one", "two"):
        lines = [json.dumps({**row, "a": name}) for row in ROWS]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf8")
    chosen = read(folder, subset="two", split_field="", test_share=0.4)
    assert {row.target for rows in chosen.clients.values() for row in rows.train} == {"two"}
    for subset in (None, "three"):
        with pytest.raises(DataError, match=r"one.*two.*set data\.subset"):
            read(folder, subset=subset)


def test_a_library_that_is_not_installed_is_named_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    by_split().save_to_disk(str(tmp_path / "rows"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "datasets"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"is a Hugging Face data set.*pip install 'hetlora\[data\]'"):
        read(tmp_path / "rows")


# examples/hub.toml --------------------------------------------------------------------------------------------------


def test_the_example_of_the_hub_runs_on_folders_of_the_same_form(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The model and the data set are replaced, and nothing else of what is loaded."""
    from transformers import AutoModelForCausalLM

    model = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(model)
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(model)
    parts = {}
    for name, count in (("train", 60), ("test", 20)):
        turns = [("user", "assistant")[turn % 2] for turn in range(4)]
        rows = [
            {
                "messages": [{"role": role, "content": f"{role} {'x' * (n % 9)}"} for role in turns],
                "category": "ab"[n % 2],
            }
            for n in range(count)
        ]
        parts[name] = datasets.Dataset.from_list(rows)
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "chats"))
    changes = {
        "model.base": model,
        "model.dtype": "float32",
        "data.path": tmp_path / "chats",
        "partition.clients": 4,
        "partition.min_rows": 8,
        "federation.rounds": 1,
        "federation.clients_per_round": 2,
        "training.steps": 1,
        "evaluation.max_new_tokens": 4,
        "output": tmp_path / "runs",
    }
    command = ["run", str(ROOT / "examples/hub.toml"), "--json", "--quiet"]
    assert main([*command, *(part for key, value in changes.items() for part in ("--set", f"{key}={value}"))]) == 0
    result = json.loads(capsys.readouterr().out)
    records = read_records(Path(result["records"]))
    assert (records[0]["clients"], records[0]["train_rows"]) == (4, 120), "two answers a conversation"
    assert result["final"]["perplexity"] > 1.0
    assert records[-1]["overall"]["generated"] > 0
    assert load_config(ROOT / "examples/hub.toml").data.messages == "messages"


def test_a_plain_template_still_refuses_null():
    with pytest.raises(DataError, match="'q' is null"):
        Template("{q}", "").row({"q": None}, "line 1")
