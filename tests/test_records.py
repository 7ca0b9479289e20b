"""Records are read back as written, and every line is plain JSON."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawn_examples import examples
from hetlora.runs.folder import read_summary, write_summary
from hetlora.runs.records import EvaluationRecord, Records, RoundRecord, RunRecord, plain, read_records

RUN = RunRecord(
    hetlora="0.1.0",
    config={"name": "phones", "ranks": {"kind": "same", "rank": 4}},
    versions={"torch": "2.6"},
    clients=2,
    train_rows=10,
    test_rows=4,
    left_out_clients=1,
    left_out_rows=0,
    truncated_rows=1,
    empty_rows=0,
    counted_clients=3,
    modules=4,
    max_rank=4,
)
ROUND = RoundRecord(
    round=1,
    loss=2.5,
    perplexity=None,
    ranks={"phone": 2, "größer": {"q_proj": 1}},
    weights={"phone": 0.25, "größer": 0.75},
    prunes={"phone": 1},
    failures={"tablet": 'said "no"\nand left'},
    bytes_up=10,
    bytes_down=12,
    live_slots=4,
    seconds=0.5,
    clients={"phone": {"loss": 2.5, "examples": 3, "steps": 1, "weight": 0.5}},
)
FIGURES = {"perplexity": 3.5, "rougeL": None, "tokens": 7, "generated": 0}
EVALUATION = EvaluationRecord(round=1, overall=FIGURES, tiers={"2": FIGURES}, clients={"phone": FIGURES})


def test_records_come_back_in_order_and_unchanged(tmp_path: Path):
    records = Records(tmp_path / "run" / "records.jsonl")
    assert read_records(records.path) == []
    for record in (RUN, EVALUATION, ROUND):
        records.append(record)
    run, evaluation, round_ = read_records(records.path)
    assert [run["kind"], evaluation["kind"], round_["kind"]] == ["run", "evaluation", "round"]
    assert run == vars(RUN)
    assert evaluation == vars(EVALUATION)
    assert round_ == vars(ROUND)


def test_text_that_no_file_holds_is_written_escaped(tmp_path: Path):
    """JSON of the network may hold half a surrogate pair; what one client says must not end the run."""
    odd = "half a pair: \ud800, größer"
    records = Records(tmp_path / "records.jsonl")
    records.append(replace(ROUND, failures={"tablet": odd}))
    assert b"\\ud800, gr\xc3\xb6\xc3\x9fer" in records.path.read_bytes()
    assert read_records(records.path)[0]["failures"] == {"tablet": odd}
    write_summary(tmp_path, {"name": odd})
    assert read_summary(tmp_path) == {"name": odd}


def test_every_record_is_on_disk_as_one_line_at_once(tmp_path: Path):
    records = Records(tmp_path / "records.jsonl")
    for count in range(1, 4):
        records.append(ROUND)
        assert records.path.read_bytes().count(b"\n") == count


def test_the_digest_of_a_long_file_costs_what_is_new_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    records, read = Records(tmp_path / "records.jsonl"), []
    open_file = Path.open

    class Reading:
        """A file that notes how many bytes are read of it."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Reading:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def seek(self, place: int) -> None:
            self.file.seek(place)

        def read(self, size: int) -> bytes:
            read.append(block := self.file.read(size))
            return block

    def digest(length: int) -> str:
        read.clear()
        with monkeypatch.context() as context:
            context.setattr(Path, "open", lambda path, mode: Reading(open_file(path, mode)))
            return records.sha256(length)

    for count in range(1, 6):
        records.append(ROUND)
        data = records.path.read_bytes()
        assert digest(len(data)) == hashlib.sha256(data).hexdigest()
        assert sum(map(len, read)) == len(data) // count, "one record's bytes"
    assert digest(7) == hashlib.sha256(data[:7]).hexdigest(), "fewer than before, too"
    records.cut(3)
    records.append(ROUND)
    data = records.path.read_bytes()
    assert digest(len(data)) == hashlib.sha256(data).hexdigest(), "and what was cut is forgotten"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_becomes_null(tmp_path: Path, value: float):
    records = Records(tmp_path / "records.jsonl")
    records.append(EvaluationRecord(1, {"perplexity": value}, {"2": {"perplexity": value}}, {}))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(records.path.read_text("utf8"), parse_constant=refuse)
    assert line["overall"] == {"perplexity": None}
    assert line["tiers"] == {"2": {"perplexity": None}}


DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children) | st.tuples(children) | st.dictionaries(st.text(), children),
    max_leaves=10,
)


@examples(100)
@given(value=DATA)
def test_plain_data_survive_strict_json(value: object):
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == plain(value)
    assert plain(plain(value)) == plain(value)
