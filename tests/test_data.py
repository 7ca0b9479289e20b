"""From files to padded batches: every row that is lost, moved or cut is counted."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawn_examples import examples
from hetlora.data import (
    STDLIB,
    ClientRows,
    Example,
    Federation,
    Row,
    Split,
    Template,
    Tokenization,
    TokenizedFederation,
    read_jsonl,
)
from hetlora.errors import DataError
from hetlora.model.lora_model import load_tokenizer

PLAIN = Template("{q}", "{a}")
END = 0  # of the tiny tokenizer, whose other tokens are single bytes
often = examples(100)


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def row(client: Any = "a", question: Any = "1 + 1?", answer: Any = "2", **fields: Any) -> dict[str, Any]:
    return {"client": client, "q": question, "a": answer, "split": "train", **fields}


def read(path: str, split: Split | None = None) -> Federation:
    return read_jsonl(path, client="client", template=PLAIN, split=split or Split())


# Reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_arrive_with_their_client_on_their_side_in_the_order_of_the_file(tmp_path: Path, name: str):
    rows = [row("b", "first"), row("a", "ünï"), row("b", "held out", split="test"), row("b", "second")]
    federation = read(write(tmp_path / name, rows))
    assert list(federation.clients) == ["b", "a"], "clients stand in the order of their first row"
    assert federation.clients["b"] == ClientRows((Row("first", "2"), Row("second", "2")), (Row("held out", "2"),))
    assert federation.clients["a"] == ClientRows((Row("ünï", "2"),), ())


def test_blank_lines_are_skipped_and_still_counted_as_lines(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row()) + "\n\n   \n" + '{"client": "a", "a": "x"}', encoding="utf8")
    with pytest.raises(DataError, match="line 4"):
        read(str(path))


def test_a_client_may_be_named_by_a_number(tmp_path: Path):
    federation = read(write(tmp_path / "rows.jsonl", [row(7), row("7"), row(8)]))
    assert {name: len(rows.train) for name, rows in federation.clients.items()} == {"7": 2, "8": 1}


def test_a_file_in_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.jsonl", [row()])
    assert list(read("~/rows.jsonl").clients) == ["a"]


def test_a_missing_file_is_named_with_the_way_out(tmp_path: Path):
    path = str(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=f"{path}.*does not exist.*'stdlib'"):
        read(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"client": "a", "q": ', "not JSON"),
        ("[1, 2]", "a list, not an object"),
        ('"text"', "a str, not an object"),
        ("null", "a NoneType, not an object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"client": "a", "q": "x", "split": "train"}', "field 'a' is missing; the row has client, q, split"),
        ('{"q": "x", "a": "y", "split": "train"}', "field 'client', the client, is missing; the row has a, q, split"),
        ('{"client": "a", "q": "x", "a": "y"}', "field 'split' is missing; the row has a, client, q"),
        ('{"client": "a", "q": ["x"], "a": "y", "split": "train"}', "field 'q' is not text"),
        ('{"client": "a", "q": null, "a": "y", "split": "train"}', "field 'q' is null"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_by_file_and_number(tmp_path: Path, line: str, said: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row())}\n{line}\n", encoding="utf8")
    with pytest.raises(DataError) as caught:
        read(str(path))
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert said in str(caught.value)


def test_a_client_that_is_no_name_is_not_called_missing(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [row(None)])
    with pytest.raises(DataError, match="line 1") as caught:
        read(path)
    assert "is missing" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="holds no rows"):
        read(str(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.jsonl", '{"client": "é"}'.encode("latin-1")), ("rows.jsonl.gz", b'{"client": "a"}\n')],
    ids=["not UTF-8", "not gzip"],
)
def test_a_file_in_another_encoding_is_named(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        read(str(tmp_path / name))


# The split ----------------------------------------------------------------------------------------------------------


def test_values_of_the_field_choose_the_side_and_other_values_are_left_out(tmp_path: Path):
    rows = [row(question=str(session), session=session) for session in range(1, 6)]
    split = Split("session", train=("1", "2", "3"), test=("4",))
    federation = read(write(tmp_path / "rows.jsonl", rows), split)
    assert [text.prompt for text in federation.clients["a"].train] == ["1", "2", "3"]
    assert [text.prompt for text in federation.clients["a"].test] == ["4"]


def test_the_hash_is_not_advised_to_who_has_it(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [row()])
    hashed, named = read(path, Split(field=None, share=0.001)), read(path)
    with pytest.raises(
        DataError, match=r"no row is on the side data\.test of the split; raise data\.test_share, or give"
    ):
        hashed.select(None, 1, 0)
    with pytest.raises(DataError, match=r'data\.test of the split; set data\.test, or set data\.split_field = ""'):
        named.select(None, 1, 0)


def test_a_client_whose_rows_are_all_left_out_is_still_known(tmp_path: Path):
    federation = read(write(tmp_path / "rows.jsonl", [row(split="validation")]))
    assert federation.clients["a"] == ClientRows((), ())


TEXTS = st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), min_size=1, max_size=30)


@often
@given(texts=TEXTS, order=st.randoms(use_true_random=False))
def test_the_hash_puts_a_text_on_one_side_whatever_stands_around_it(texts: list[tuple[str, str]], order: Any):
    split = Split(field=None, share=0.4)
    before = {text: split.side({}, Row(*text), "line 1") for text in texts}
    order.shuffle(texts)
    half = texts[: len(texts) // 2 + 1]
    assert {text: split.side({"client": "b"}, Row(*text), "line 9") for text in half}.items() <= before.items()
    assert set(before.values()) <= {"train", "test"}


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_hash_holds_out_the_share_asked_for(share: float):
    split = Split(field=None, share=share)
    held_out = sum(split.side({}, Row(f"question {index}", "x"), "") == "test" for index in range(4000))
    # Four standard deviations of a binomial draw; the hash is fixed, so this passes always or never.
    assert abs(held_out - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5


def test_a_larger_share_holds_out_the_same_rows_and_more():
    rows = [Row(f"question {index}", "x") for index in range(300)]
    small, large = (
        {text for text in rows if Split(None, share=share).side({}, text, "") == "test"} for share in (0.1, 0.3)
    )
    assert small < large


def test_the_hash_is_the_same_on_every_machine():
    rows = [Row(f"question {index}", "x") for index in range(20)]
    held_out = [index for index, text in enumerate(rows) if Split(None, share=0.2).side({}, text, "") == "test"]
    expected = [
        index
        for index, text in enumerate(rows)
        if int(hashlib.sha256(f"{text.prompt}\0{text.target}".encode()).hexdigest()[:16], 16) / 2**64 < 0.2
    ]
    assert held_out == expected


def test_the_border_between_prompt_and_target_counts():
    """ "ab" + "c" and "a" + "bc" are different rows; one seen must not decide about the other."""
    sides = [
        tuple(Split(None, share=0.5).side({}, text, "") for text in (Row(f"{n}b", "c"), Row(f"{n}", "bc")))
        for n in range(40)
    ]
    assert any(first != second for first, second in sides)


# Templates ----------------------------------------------------------------------------------------------------------


def test_a_template_takes_text_and_numbers_and_keeps_literal_braces():
    template = Template("{{{n}}} {q}{q}", "{{}}")
    assert template.row({"n": 3, "q": 0.5, "unused": None}, "line 1") == Row("{3} 0.50.5", "{}")


def test_text_that_looks_like_a_template_is_not_filled_again():
    assert PLAIN.row({"q": "{a} {{}} %s", "a": "{q}"}, "line 1") == Row("{a} {{}} %s", "{q}")


def test_a_missing_field_is_named_with_the_place_and_the_fields_there_are():
    with pytest.raises(DataError) as caught:
        PLAIN.row({"q": "x", "answer": "y"}, "rows.jsonl, line 3")
    message = str(caught.value)
    assert message.startswith("rows.jsonl, line 3: field 'a' is missing; the row has answer, q.")
    assert "data.prompt / data.target" in message


@pytest.mark.parametrize("value", [None, ["x"], {"x": 1}])
def test_a_field_that_is_not_text_is_named_as_such(value: object):
    with pytest.raises(DataError, match=f"line 1: field 'q' is {'null' if value is None else 'not text'}"):
        PLAIN.row({"q": value, "a": "y"}, "line 1")


@pytest.mark.parametrize("text", ["{", "}", "{q", "{}", "{?}", "{?q}", "{/q}", "{?q}{?r}{/q}{/r}", "{{q}"])
def test_braces_that_hold_no_field_name_are_refused_with_the_way_to_write_them(text: str):
    for prompt, target in ((text, "x"), ("x", text)):
        with pytest.raises(DataError, match=re.escape("{{ }}")) as caught:
            Template(prompt, target)
        assert repr(text) in str(caught.value)


@often
@given(text=st.text())
def test_a_template_without_fields_is_its_own_text(text: str):
    escaped = text.replace("{", "{{").replace("}", "}}")
    assert Template(escaped, "").row({}, "line 1") == Row(text, "")


# Tokens -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_begin(tiny: str):
    """The tiny tokenizer with a begin-of-text token, as Llama's has: the byte "~"."""
    tokenizer = load_tokenizer(tiny)
    tokenizer.bos_token = "~"
    return tokenizer


@pytest.fixture(scope="module")
def setting(tiny: str):
    """The same tokenizer, which puts its begin-of-text token before every text by itself."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(tiny)
    tokenizer.bos_token = "~"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="~ $A", special_tokens=[("~", tokenizer.bos_token_id)]
    )
    return tokenizer


def tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def only(tokenization: Tokenization, text: Row) -> Example:
    (example,) = tokenization.examples([text])
    return example


def test_the_prompt_is_not_scored_and_the_target_and_its_end_are(tiny_tokenizer: Any):
    example = only(Tokenization(tiny_tokenizer, 64), Row("what?", "this"))
    assert example.ids == (*tokens(tiny_tokenizer, "what?this"), END)
    assert example.scored_from == 5
    assert example.scored == 5, "four letters and the end"


@pytest.mark.parametrize("begin", ["tokenizer", "always", "never"])
@pytest.mark.parametrize("sets", [False, True])
def test_the_begin_token_is_what_the_tokenizer_sets_or_what_is_asked_for(
    with_begin: Any, setting: Any, begin: Any, sets: bool
):
    tokenizer = setting if sets else with_begin
    tokenization = Tokenization(tokenizer, 64, begin=begin)
    first = (tokenizer.bos_token_id,)
    begun = first if begin == "always" or (sets and begin == "tokenizer") else ()
    example = only(tokenization, Row("what?", "this"))
    assert example == Example((*begun, *tokens(tokenizer, "what?this"), END), len(begun) + 5)
    assert tokenization.prompt_ids(Row("what?", ""), 8) == (*begun, *tokens(tokenizer, "what?"))
    alone = () if begin == "never" else first  # the first token of a text needs a predecessor
    assert only(tokenization, Row("", "this")) == Example((*alone, *tokens(tokenizer, "this"), END), len(alone))


def test_the_end_token_can_be_left_out(tiny_tokenizer: Any):
    assert only(Tokenization(tiny_tokenizer, 64, end=False), Row("what?", "this")).ids == tokens(
        tiny_tokenizer, "what?this"
    )


def test_without_a_begin_token_the_end_token_precedes_a_target_without_prompt(tiny_tokenizer: Any):
    """The first token of a text can be scored only after something."""
    example = only(Tokenization(tiny_tokenizer, 64), Row("", "this"))
    assert example == Example((END, *tokens(tiny_tokenizer, "this"), END), 1)
    assert example.scored == 5


def test_a_row_with_an_empty_target_is_dropped_and_counted(tiny_tokenizer: Any):
    tokenization = Tokenization(tiny_tokenizer, 64)
    assert len(tokenization.examples([Row("what?", ""), Row("what?", "this"), Row("", "")])) == 1
    assert (tokenization.empty, tokenization.truncated) == (2, 0)


def test_a_long_prompt_is_cut_at_its_start_and_the_target_is_kept_whole(tiny_tokenizer: Any):
    tokenization = Tokenization(tiny_tokenizer, 16)
    example = only(tokenization, Row("0123456789abcdef", "target"))
    assert example.ids == (*tokens(tiny_tokenizer, "789abcdeftarget"), END)
    assert tokenization.truncated == 1


def test_a_long_target_is_cut_at_its_end_and_leaves_a_quarter_to_the_prompt(tiny_tokenizer: Any):
    tokenization = Tokenization(tiny_tokenizer, 16)
    example = only(tokenization, Row("0123456789", "abcdefghijklmnopqrstuvwxyz"))
    assert example.ids == tokens(tiny_tokenizer, "6789abcdefghijkl")
    assert example.scored_from == 4
    assert tokenization.truncated == 1


def test_a_row_that_just_fits_is_not_counted_as_cut(tiny_tokenizer: Any):
    tokenization = Tokenization(tiny_tokenizer, 8)
    only(tokenization, Row("abc", "defg"))
    assert tokenization.truncated == 0
    only(tokenization, Row("abc", "defgh"))
    assert tokenization.truncated == 1


SOME_TEXT = st.text(alphabet="abcé ~漢", max_size=30)


@pytest.mark.parametrize("begins", [False, True])
@often
@given(prompt=SOME_TEXT, target=SOME_TEXT.filter(str.strip), max_length=st.integers(2, 40))
def test_a_cut_row_is_the_end_of_its_prompt_and_the_beginning_of_its_target(
    tiny_tokenizer: Any, with_begin: Any, begins: bool, prompt: str, target: str, max_length: int
):
    tokenizer = with_begin if begins else tiny_tokenizer
    tokenization = Tokenization(tokenizer, max_length, begin="always")
    ids, scored_from = only(tokenization, Row(prompt, target))
    begin = (tokenizer.bos_token_id,) if begins else () if prompt else (END,)
    whole_prompt, whole_target = tokens(tokenizer, prompt), (*tokens(tokenizer, target), END)

    assert len(ids) <= max_length
    assert ids[: len(begin)] == begin
    kept_prompt, kept_target = ids[len(begin) : scored_from], ids[scored_from:]
    assert kept_target
    assert kept_target == whole_target[: len(kept_target)]
    assert kept_prompt == whole_prompt[len(whole_prompt) - len(kept_prompt) :]
    is_cut = (kept_prompt, kept_target) != (whole_prompt, whole_target)
    assert tokenization.truncated == is_cut
    assert is_cut == (len(begin) + len(whole_prompt) + len(whole_target) > max_length)
    assert not is_cut or len(ids) == max_length, "nothing is cut that would have fitted"


@pytest.mark.parametrize("begins", [False, True])
@often
@given(target=SOME_TEXT.filter(str.strip), max_length=st.integers(2, 40))
def test_splitting_a_long_row_loses_no_token_and_scores_each_once(
    tiny_tokenizer: Any, with_begin: Any, begins: bool, target: str, max_length: int
):
    tokenizer = with_begin if begins else tiny_tokenizer
    tokenization = Tokenization(tokenizer, max_length, "split")
    examples = tokenization.examples([Row("", target)])
    first = tokenizer.bos_token_id if begins else END
    assert all(example.ids[0] == first and example.scored_from == 1 for example in examples)
    assert all(len(example.ids) <= max_length for example in examples)
    joined = tuple(token for example in examples for token in example.ids[1:])
    assert joined == (*tokens(tokenizer, target), END)
    assert sum(example.scored for example in examples) == len(joined)
    assert tokenization.truncated == 0


def test_a_long_row_with_a_prompt_is_cut_even_where_rows_are_split(tiny_tokenizer: Any):
    tokenization = Tokenization(tiny_tokenizer, 8, "split")
    assert len(tokenization.examples([Row("abcdef", "ghijkl")])) == 1
    assert tokenization.truncated == 1


def test_the_model_answers_after_the_very_tokens_it_was_trained_after(tiny_tokenizer: Any, with_begin: Any):
    for tokenizer in (tiny_tokenizer, with_begin):
        tokenization = Tokenization(tokenizer, 32)
        text = Row("what is this?", "a thing")
        example = only(tokenization, text)
        assert tokenization.prompt_ids(text, room=8) == example.ids[: example.scored_from]


@pytest.mark.parametrize("begins", [False, True])
@often
@given(prompt=SOME_TEXT.filter(bool), max_length=st.integers(3, 40), data=st.data())
def test_a_prompt_leaves_room_for_the_answer_and_keeps_its_end(
    tiny_tokenizer: Any, with_begin: Any, begins: bool, prompt: str, max_length: int, data: st.DataObject
):
    tokenizer = with_begin if begins else tiny_tokenizer
    room = data.draw(st.integers(1, max_length - 2), label="room")
    ids = Tokenization(tokenizer, max_length, begin="always").prompt_ids(Row(prompt, "x"), room)
    whole = tokens(tokenizer, prompt)
    kept = ids[begins:]
    assert len(ids) == min(len(whole) + begins, max_length - room)
    assert kept == whole[len(whole) - len(kept) :]


def test_a_client_is_tokenized_once(tiny_tokenizer: Any):
    """Rows that were cut are counted once, however often they are trained on."""
    federation = Federation("x", {"a": ClientRows((Row("", "a long target"),), (Row("q", "a"),))})
    data = TokenizedFederation(federation, Tokenization(tiny_tokenizer, 8))
    assert data.train("a") is data.train("a")
    assert data.tokenization.truncated == 1
    assert len(data.test("a")) == len(data.test_rows("a")) == 1


# Selection ----------------------------------------------------------------------------------------------------------


def federation_of(**sizes: tuple[int, int]) -> Federation:
    """Return a federation whose clients have so many training and held-out rows."""
    text = Row("q", "a")
    return Federation(
        "sizes", {name: ClientRows((text,) * train, (text,) * test) for name, (train, test) in sizes.items()}
    )


def test_clients_with_too_few_rows_or_none_held_out_are_left_out():
    federation = federation_of(a=(5, 1), b=(4, 1), c=(9, 0), d=(0, 3), e=(6, 2))
    assert list(federation.select(None, 5, seed=0).clients) == ["a", "e"]
    assert list(federation.select(None, 1, seed=0).clients) == ["a", "b", "e"]


def test_a_number_of_clients_is_drawn_by_the_seed_and_keeps_its_order():
    federation = federation_of(**{f"c{index:02}": (1, 1) for index in range(20)})
    draws = [tuple(federation.select(5, 1, seed).clients) for seed in range(10)]
    assert all(len(draw) == 5 and list(draw) == sorted(draw) for draw in draws)
    assert draws == [tuple(federation.select(5, 1, seed).clients) for seed in range(10)]
    assert len(set(draws)) > 5, "another seed draws others"
    assert federation.select(20, 1, seed=0).clients == federation.clients


@pytest.mark.parametrize(("count", "min_rows", "have"), [(3, 1, "2 of 3"), (None, 9, "0 of 3"), (1, 9, "0 of 3")])
def test_too_few_clients_are_refused_with_the_numbers_and_the_way_out(count: int | None, min_rows: int, have: str):
    with pytest.raises(DataError) as caught:
        federation_of(a=(1, 1), b=(2, 1), c=(3, 0)).select(count, min_rows, seed=0)
    assert have in str(caught.value)
    way_out = "lower data.clients or data.min_rows" if count else "lower data.min_rows"
    assert way_out in str(caught.value)


# The bundled federation ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stdlib() -> Federation:
    return read_jsonl(STDLIB, client="client", template=Template("{prompt}", "{target}"), split=Split())


@pytest.fixture(scope="module")
def stated() -> str:
    return (files("hetlora") / "data" / "bundled" / STDLIB / "README.md").read_text("utf8")


def test_the_bundled_federation_has_the_sizes_its_readme_states(stdlib: Federation, stated: str):
    found = re.search(r"(\d+) clients, (\d+) rows \((\d+) train, (\d+) test\)", stated)
    assert found
    train = sum(len(rows.train) for rows in stdlib.clients.values())
    test = sum(len(rows.test) for rows in stdlib.clients.values())
    assert tuple(map(int, found.groups())) == (len(stdlib.clients), train + test, train, test)
    table = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|$", stated, flags=re.MULTILINE))
    assert table == {name: str(len(rows.train) + len(rows.test)) for name, rows in stdlib.clients.items()}


def test_every_bundled_client_has_both_sides_and_nothing_empty(stdlib: Federation):
    for name, rows in stdlib.clients.items():
        assert rows.train, name
        assert rows.test, name
        assert all(text.prompt.strip() and text.target.strip() for text in rows.train + rows.test), name


def test_no_bundled_row_is_on_both_sides(stdlib: Federation):
    """Over all clients: a row that one client trains on must not be another's test."""
    train = {text for rows in stdlib.clients.values() for text in rows.train}
    test = {text for rows in stdlib.clients.values() for text in rows.test}
    assert not train & test


def test_no_bundled_prompt_gives_its_answer_away(stdlib: Federation):
    leaks = [
        (name, text.target)
        for name, rows in stdlib.clients.items()
        for text in rows.train + rows.test
        if text.target in " ".join(text.prompt.split())
    ]
    assert not leaks
