"""Values stay what they are in the file: the same rows in every form give the same federation, alone or in a folder."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from hetlora.config import parse_config
from hetlora.config.build_data import read_federation
from hetlora.data import Federation
from hetlora.data.files import file_source
from hetlora.errors import DataError

pytestmark = pytest.mark.run

ROWS = [
    {"client": "ana", "Review Text": "00047", "a-b": "2024-01-31"},
    {"client": "ana", "Review Text": "NA", "a-b": 'a "quoted", text\nof two lines'},
    {"client": "ben", "Review Text": "None", "a-b": ""},
    {"client": "ben", "Review Text": "1.10", "a-b": "true"},
    {"client": "ben", "Review Text": "é 漢", "a-b": "nan"},
]


def cells(delimiter: str) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue()


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TEXTS = {
    "rows.jsonl": LINES,
    "rows.json": json.dumps(ROWS, indent=1),
    "array.jsonl": "\n " + json.dumps(ROWS),
    "rows.csv": cells(","),
    "rows.tsv": cells("\t"),
    "rows.txt": LINES,
}
FORMS = [*TEXTS, "rows.jsonl.gz", "rows.csv.gz", "rows.jsonl.zst", "rows.json.zst", "rows.parquet", "bom.csv"]


def write(folder: Path, name: str) -> Path:
    """Write the rows in the form that a name says."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    if name == "rows.parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        arrow = pytest.importorskip("pyarrow")
        parquet.write_table(arrow.Table.from_pylist(ROWS), file)
        return file
    text = TEXTS["rows.csv" if name == "bom.csv" else name.removesuffix(".gz").removesuffix(".zst")].encode()
    if name.endswith(".zst"):
        with pytest.importorskip("pyarrow").CompressedOutputStream(str(file), "zstd") as packed:
            packed.write(text)
    elif name.endswith(".gz"):
        file.write_bytes(gzip.compress(text))
    else:
        file.write_bytes((b"\xef\xbb\xbf" if name == "bom.csv" else b"") + text)
    return file


def read(path: Path, **data: Any) -> Federation:
    keys = {
        "path": str(path),
        "split_field": "",
        "test_share": 0.3,
        "prompt": "{Review Text} {a-b}",
        "target": "{Review Text}",
    }
    document = {
        "data": {**keys, **data},
        "federation": {"rounds": 1, "clients_per_round": 1},
        "ranks": {"kind": "same", "rank": 2},
        "training": {"steps": 1},
    }
    return read_federation(parse_config(document))


def texts(federation: Federation) -> dict[str, Any]:
    return {name: (rows.train, rows.test) for name, rows in federation.clients.items()}


@pytest.mark.parametrize("name", FORMS)
def test_the_same_rows_in_any_form_alone_or_in_a_folder_are_the_same_federation(tmp_path: Path, name: str):
    alone = texts(read(write(tmp_path / "rows", name)))
    expected = sorted((f"{row['Review Text']} {row['a-b']}", row["Review Text"]) for row in ROWS)
    assert sorted((row.prompt, row.target) for own in alone.values() for side in own for row in side) == expected
    if name != "rows.txt":  # a folder of .txt files is what the datasets library makes of it: a row a line
        assert texts(read(tmp_path / "rows")) == alone


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused_as_null_is(tmp_path: Path, value: str):
    (tmp_path / "rows.jsonl").write_text(f'{{"client": "ana", "Review Text": {value}, "a-b": "x"}}', encoding="utf8")
    with pytest.raises(DataError, match=r"line 1: field 'Review Text' is not text but -?(nan|inf)"):
        read(tmp_path / "rows.jsonl")


def test_dates_of_a_table_are_text(tmp_path: Path):
    import datetime as dt

    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    day = dt.date(2024, 1, 31)
    parquet.write_table(
        arrow.Table.from_pylist([{"client": "ana", "day": day, "none": None}] * 2), tmp_path / "rows.parquet"
    )
    federation = read(tmp_path / "rows.parquet", prompt="{day}{none}", target="x")
    assert {row.prompt for rows in federation.clients.values() for row in (*rows.train, *rows.test)} == {"2024-01-31"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.csv", "client,q\nana,1,2\n", "line 2: 3 cells under 2 columns"),
        ("rows.csv", 'client,q\nana,"1\n', "rows.csv, line "),
        ("rows.csv", "client,q,q\nana,1,2\n", "two columns are called 'q'"),
        ("rows.csv", "client,q,\nana,1,2\n", "line 2: 3 cells under 3 columns, 2 of them with a name"),
        ("rows.json", '{"client": "ana", "q": 1, "q": 2}', "the key 'q' stands twice"),
        ("rows.json", "[1]", "item 1: a int, not an object"),
        ("rows.json", "[{", "not JSON"),
        ("rows.json", '{\n"client": "ana"\n}', "the file is one JSON object; save the rows by themselves"),
        ("rows.json", '{"data": [{"client": "ana"}]}', "the file is one JSON object, with rows in 'data'"),
        ("rows.json", '{\n"n": 1, "data": [\n{"client": "ana"}]}', "the file is one JSON object, with rows in 'data'"),
        ("rows.json", '{\n"client": "ana",,\n}', "line 1: not JSON"),
        ("rows.parquet", "x", "cannot be read as Parquet"),
        ("rows.jsonl.zst", "x", "cannot be read as text"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused_with_the_place(
    tmp_path: Path, name: str, content: str, said: str
):
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(content, encoding="utf8")
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.csv", b"q,a\none,1\ncaf\xe9,2\n", "rows.csv, line 3: the byte 0xe9 is not UTF-8"),
        ("rows.txt", b"one\n", "line 1: not JSON"),
        (
            "rows.txt",
            b"one\n",
            "Its name ends in none of .jsonl, .ndjson, .json, .csv, .tsv, .parquet, so it is read as JSON",
        ),
        ("rows.xlsx", b"PK\x03\x04\xff", "line 1: the byte 0xff is not UTF-8"),
        ("rows.xlsx", b"PK\x03\x04\xff", "Its name ends in none of "),
    ],
)
def test_what_is_no_text_or_has_an_unknown_ending_is_refused_with_the_reason(
    tmp_path: Path, name: str, content: bytes, said: str
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    assert said in str(caught.value)


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        read(Path("rows.csv"))
    assert "'rows.csv' does not exist in the working directory; give" in str(caught.value)


def test_a_first_row_without_turns_is_a_row(tmp_path: Path):
    """Neither is an object around rows."""
    for first in (
        '{"messages": []}',
        '{"messages": [{"role": "user", "content": "x"}]}',
        '{"turns": [{"speaker": "a"}]}',
    ):
        (tmp_path / "rows.jsonl").write_text(f"{first}\n{first}\n", encoding="utf8")
        assert len(list(file_source(str(tmp_path / "rows.jsonl")).records)) == 2


def test_a_spreadsheets_semicolons_divide_where_no_comma_does(tmp_path: Path):
    (tmp_path / "rows.csv").write_text('\nclient;q;n\nana;1,5;"a;b"\nana;2;c\n', encoding="utf8")
    own = read(tmp_path / "rows.csv", prompt="{q}{n}", target="x").clients["ana"]
    assert sorted(row.prompt for row in (*own.train, *own.test)) == ["1,5a;b", "2c"]
    (tmp_path / "rows.csv").write_text('client;"q, or r"\nana;1\nana;2\n', encoding="utf8")
    assert read(tmp_path / "rows.csv", prompt="{q, or r}", target="x").clients["ana"].train
    (tmp_path / "rows.csv").write_text('client,"q;r"\nana,1\nana,2\n', encoding="utf8")
    assert read(tmp_path / "rows.csv", prompt="{q;r}", target="x").clients["ana"].train


def test_blank_lines_before_the_header_and_empty_columns_are_passed_over(tmp_path: Path):
    (tmp_path / "rows.csv").write_text("\n,,,\nclient,q,,\nana,1,,\nana,2,,\n", encoding="utf8")
    own = read(tmp_path / "rows.csv", prompt="{q}", target="x").clients["ana"]
    assert sorted(row.prompt for row in (*own.train, *own.test)) == ["1", "2"]


def test_a_cell_longer_than_the_csv_modules_own_bound_is_read(tmp_path: Path):
    long = "x" * 200_000
    (tmp_path / "rows.csv").write_text(f"client,Review Text,a-b\nana,{long},1\nana,b,2\n", encoding="utf8")
    rows = read(tmp_path / "rows.csv").clients["ana"]
    assert long in {row.target for row in (*rows.train, *rows.test)}
    assert csv.field_size_limit() == 131_072


def test_a_folder_of_two_forms_names_the_file_that_would_be_left_out(tmp_path: Path):
    for name in ("rows.csv", "rows.jsonl"):
        write(tmp_path / "rows", name)
    with pytest.raises(DataError, match=r"rows\.(csv|jsonl) would be left out"):
        read(tmp_path / "rows")


def test_a_number_and_a_truth_value_are_as_they_are_written(tmp_path: Path):
    written = ["1.10", "1e3", "12345678901234567890.5", "0.00001", "7", "true", "false"]
    lines = "".join(f'{{"client": "a", "q": "{n}", "a": {text}}}\n' for n, text in enumerate(written))
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf8")
    (tmp_path / "rows.csv").write_text(
        "client,q,a\n" + "".join(f"a,{n},{text}\n" for n, text in enumerate(written)), encoding="utf8"
    )
    keys = {"prompt": "{q}", "target": "{a}"}
    first, second = (texts(read(tmp_path / name, **keys)) for name in ("rows.jsonl", "rows.csv"))
    assert sorted(row.target for side in first["a"] for row in side) == sorted(written)
    assert first == second


def test_a_short_number_of_a_table_is_short_and_nested_dates_and_nulls_are_text(tmp_path: Path):
    import datetime as dt

    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {"client": "a", "x": 0.1, "meta": {"day": dt.date(2024, 1, 31), "none": None}, "gone": None},
        {"client": "a", "x": 0.1, "meta": {"day": dt.date(2024, 1, 31), "none": "b"}, "gone": {"y": "c"}},
    ]
    kinds = arrow.struct([("day", arrow.date32()), ("none", arrow.string())])
    schema = arrow.schema(
        [
            ("client", arrow.string()),
            ("x", arrow.float32()),
            ("meta", kinds),
            ("gone", arrow.struct([("y", arrow.string())])),
        ]
    )
    parquet.write_table(arrow.Table.from_pylist(rows, schema), tmp_path / "rows.parquet")
    own = read(tmp_path / "rows.parquet", prompt="{x} {meta.day} {meta.none}{gone.y}", target="t").clients["a"]
    assert sorted(row.prompt for row in (*own.train, *own.test)) == ["0.1 2024-01-31 ", "0.1 2024-01-31 bc"]


def test_nulls_of_a_json_file_stay_in_what_a_turn_calls(tmp_path: Path):
    call = {"type": "function", "function": {"name": "set", "arguments": {"alarm": None, "n": 1}}}
    row = {
        "client": "a",
        "m": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}],
    }
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist([row] * 2), tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps([row] * 2), encoding="utf8")
    for name, arguments in (("rows.json", '{"alarm": null, "n": 1}'), ("rows.parquet", '{"n": 1}')):
        own = read(tmp_path / name, prompt="", target="", messages="m").clients["a"]
        assert arguments in (*own.train, *own.test)[0].answer, "a columnar file gives every object every key"


@pytest.mark.parametrize("split_field", ["split", ""])
def test_a_column_split_of_a_table_goes_before_the_name_of_its_file(tmp_path: Path, split_field: str):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"client": "a", "q": f"{n}", "split": "test" if n else "train"} for n in range(3)]
    (tmp_path / "rows").mkdir()
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows/train.parquet")
    keys = {"prompt": "{split} {q}", "target": "{q}", "split_field": split_field}
    alone, folder = read(tmp_path / "rows/train.parquet", **keys), read(tmp_path / "rows", **keys)
    assert texts(alone) == texts(folder)
    if split_field:
        assert [row.target for row in folder.clients["a"].test] == ["1", "2"]


def test_a_packing_that_only_the_datasets_library_knows_is_no_way_around(tmp_path: Path):
    import bz2

    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/rows.csv.bz2").write_bytes(bz2.compress(b"client,q,a\nana,001,NA\nana,002,\n"))
    own = read(tmp_path / "rows", prompt="{q}", target="{a}").clients["ana"]
    assert sorted((row.prompt, row.target) for row in (*own.train, *own.test)) == [("001", "NA"), ("002", "")]


def test_json_that_is_no_rows_may_lie_beside_the_rows(tmp_path: Path):
    write(tmp_path / "rows", "rows.csv")
    (tmp_path / "rows/dataset_infos.json").write_text("{}", encoding="utf8")
    assert texts(read(tmp_path / "rows")) == texts(read(tmp_path / "rows/rows.csv"))


# Templates ----------------------------------------------------------------------------------------------------------


def test_a_part_stands_only_where_its_field_is_not_blank(tmp_path: Path):
    rows = [
        {"client": "a", "instruction": "Add", "input": "1 + 1", "output": "2"},
        {"client": "a", "instruction": "Greet", "input": "  ", "output": "Hi"},
        {"client": "a", "instruction": "Count", "output": "1"},
        {"client": "a", "instruction": "Null", "input": None, "output": "0"},
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows), encoding="utf8")
    prompt = "{instruction}{?input}\nInput: {input}{/input}\nAnswer:"
    own = read(tmp_path / "alpaca.json", client_field="client", prompt=prompt, target=" {output}").clients["a"]
    assert {row.prompt for row in (*own.train, *own.test)} == {
        "Add\nInput: 1 + 1\nAnswer:", "Greet\nAnswer:", "Count\nAnswer:", "Null\nAnswer:",
    }  # fmt: skip


def test_a_field_may_be_nested_and_a_dot_may_be_of_its_name(tmp_path: Path):
    rows = [{"client": "a", "meta": {"id": {"x": n}}, "a.b": f"dotted {n}"} for n in range(2)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf8")
    own = read(tmp_path / "rows.json", prompt="{meta.id.x}", target="{a.b}").clients["a"]
    assert sorted((row.prompt, row.target) for row in (*own.train, *own.test)) == [("0", "dotted 0"), ("1", "dotted 1")]
    with pytest.raises(DataError, match=r"field 'meta\.id\.y' is missing; the row has a\.b, client, meta"):
        read(tmp_path / "rows.json", prompt="{meta.id.y}", target="{a.b}")


# Who is held out ----------------------------------------------------------------------------------------------------


def test_every_client_of_two_texts_or_more_trains_and_is_measured(tmp_path: Path):
    """A hash alone left five of twelve clients of twelve rows without a held-out row."""
    rows = [
        {"client": f"c{client}", "q": f"{client} {row}", "a": "x"}
        for client in range(40)
        for row in range(2 + client % 3)
    ]
    rows += [{"client": "one text", "q": "same", "a": "x"}] * 3
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf8")
    federation = read(tmp_path / "rows.json", prompt="{q}", target="{a}", test_share=0.1)
    sides = {name: (len(rows.train), len(rows.test)) for name, rows in federation.clients.items()}
    assert all(train and test for name, (train, test) in sides.items() if name != "one text")
    assert sides["one text"] in [(3, 0), (0, 3)], "rows of equal text stay together"
    chosen = federation.select(None, 1, 0)
    assert dict(chosen.left_out) in [
        {"one text": "no held-out row"},
        {"one text": "fewer training rows than data.min_rows = 1"},
    ]


def test_rows_without_a_client_are_not_those_of_one(tmp_path: Path):
    (tmp_path / "rows.csv").write_text("client,q,a\nana,1,2\n  ,3,4\n", encoding="utf8")
    with pytest.raises(DataError, match=r"line 3: field 'client', the client, is empty"):
        read(tmp_path / "rows.csv", prompt="{q}", target="{a}")
