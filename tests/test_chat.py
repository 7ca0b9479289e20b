"""Chats: tokens are the template's, prompts are not scored, every answer and its end of turn are."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawn_examples import examples
from hetlora.cli import main
from hetlora.config import parse_config
from hetlora.config.build_data import load_federation
from hetlora.data import ChatTemplate, Conversation, Example, Federation, Message, Row, Template, Tokenization
from hetlora.data.chat import Chat, check_chat_template
from hetlora.errors import ConfigError, DataError, ModelError
from hetlora.model.lora_model import load_tokenizer
from hetlora.runs.records import read_records
from small_federations import phones

CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
DIALOGUE = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
]
END = 0


def tokenizer_with(folder: str, template: str) -> Any:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def chatty(tiny: str) -> Any:
    return tokenizer_with(tiny, CHATML)


def whole(tokenizer: Any, row: Row) -> list[int]:
    """The template's own tokens of the whole conversation."""
    messages = [turn.for_template() for turn in row.turns or ()] + [{"role": "assistant", "content": row.target}]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def scored(tokenizer: Any, example: Example) -> str:
    return tokenizer.decode(example.ids[example.scored_from :])


def only(tokenization: Tokenization, row: Row) -> Example:
    (example,) = tokenization.examples([row])
    return example


# Rows ---------------------------------------------------------------------------------------------------------------


def test_prompt_and_target_become_turns_after_the_system_turn():
    template = ChatTemplate("{q}", "{a}", "You are {who}.")
    (row,) = template.rows({"q": "1 + 1?", "a": "2", "who": "brief"}, "line 1")
    assert row == Row("1 + 1?", "2", (Message("system", "You are brief."), Message("user", "1 + 1?")))
    with pytest.raises(DataError, match=r"field 'who' is missing.*data\.system"):
        template.rows({"q": "1 + 1?", "a": "2"}, "line 1")


def test_every_turn_of_the_assistant_is_a_row_after_the_turns_before_it():
    rows = Conversation("m", "Be brief.").rows({"m": DIALOGUE}, "line 1")
    system = Message("system", "Be brief.")
    turns = [Message(**turn) for turn in DIALOGUE]
    assert [(row.target, row.turns) for row in rows] == [("1", (system, turns[0])), ("2", (system, *turns[:3]))]
    assert rows[1].prompt == "system: Be brief.\nuser: one?\nassistant: 1\nuser: two?"


def test_a_conversation_with_its_own_system_turn_keeps_it():
    own = {"role": "system", "content": "Shout."}
    (row,) = Conversation("m", "Be brief.").rows({"m": [own, *DIALOGUE[:2]]}, "line 1")
    assert row.turns == (Message("system", "Shout."), Message("user", "one?"))


def test_turns_stored_by_column_are_the_same_turns():
    columns = {"role": [turn["role"] for turn in DIALOGUE], "content": [turn["content"] for turn in DIALOGUE]}
    assert Conversation("m").rows({"m": columns}, "line 1") == Conversation("m").rows({"m": DIALOGUE}, "line 1")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"x": 1}, "line 1: field 'm' is missing; the row has x. Set data.messages"),
        ({"m": "hello"}, "field 'm' is no list of turns"),
        ({"m": None}, "field 'm' is no list of turns"),
        ({"m": ["hello"]}, "turn 1 of field 'm' is a str, not an object"),
        ({"m": [{"content": "x"}]}, "turn 1 of field 'm' has the role None, and not one of system, developer"),
        ({"m": [*DIALOGUE, {"role": "narrator", "content": "x"}]}, "turn 5 of field 'm' has the role narrator"),
        ({"m": [{"role": "user", "content": None}]}, "turn 1 of field 'm'"),
        ({"m": {"role": 1, "content": 2}}, "field 'm' is no list of turns"),
        ({"m": {"role": None, "content": None}}, "field 'm' is no list of turns"),
        ({"m": {"role": "user", "content": "abcd"}}, "field 'm' is no list of turns"),
        ({"m": {"role": ["user", "assistant"], "content": ["a"]}}, "nor lists of one length by column"),
        ({"m": {"role": ["user", "assistant"], "content": ["a", None]}}, "turn 2 of field 'm'"),
    ],
)
def test_a_field_that_holds_no_conversation_is_named(fields: dict[str, Any], said: str):
    with pytest.raises(DataError) as caught:
        Conversation("m").rows(fields, "line 1")
    assert said in str(caught.value)


# Tokens -------------------------------------------------------------------------------------------------------------


def test_the_tokens_are_the_templates_and_the_answer_and_its_end_are_scored(chatty: Any):
    (row,) = ChatTemplate("{q}", "{a}", "Be brief.").rows({"q": "1 + 1?", "a": "two"}, "")
    example = only(Tokenization(chatty, 256), row)
    assert list(example.ids) == whole(chatty, row)
    assert chatty.decode(example.ids[: example.scored_from]).endswith("1 + 1?<end>\n<|assistant|>")
    assert scored(chatty, example) == "two<end>\n"


TEXT = st.text(alphabet="ab é\n<|", min_size=1, max_size=12).filter(lambda text: bool(text.strip()))


@examples(60)
@given(contents=st.lists(TEXT, min_size=2, max_size=9))
def test_each_answer_of_a_conversation_is_scored_once_whatever_it_says(chatty: Any, contents: list[str]):
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    rows = Conversation("m").rows({"m": turns}, "")
    examples = Tokenization(chatty, 4096).examples(rows)
    assert [scored(chatty, example) for example in examples] == [f"{text}<end>\n" for text in contents[1::2]]
    for row, example in zip(rows, examples, strict=True):
        assert list(example.ids) == whole(chatty, row)


def test_the_model_answers_after_the_very_tokens_it_was_trained_after(chatty: Any):
    tokenization = Tokenization(chatty, 256)
    for row in Conversation("m").rows({"m": DIALOGUE}, ""):
        example = only(tokenization, row)
        assert tokenization.prompt_ids(row, room=16) == example.ids[: example.scored_from]


def test_where_a_token_would_reach_over_the_border_the_text_is_the_same():
    """Without a special token before the answer, a tokenizer may merge the two sides."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<end>": 0, "A": 1, ":": 2, "b": 3, ":b": 4, "q": 5}
    merging = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [(":", "b")])),
        eos_token="<end>",
        clean_up_tokenization_spaces=False,
    )
    merging.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% endif %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    assert whole(merging, Row("q", "b", (Message("user", "q"),))) == [5, 1, 4]
    row = Row("q", "b", (Message("user", "q"),))
    assert Chat(merging).answer_ids(row, row.turns or ()) == ((5, 1), (4,), False, False), (
        "the text's own tokens, all of b scored"
    )
    tokenization = Tokenization(merging, 64)
    assert tokenization.examples([row]) == [Example((5, 1, 4, 0), 2)]
    assert (tokenization.unclean, tokenization.unended) == (1, 1)


def test_a_template_whose_conversation_does_not_begin_with_its_prompt_is_refused(tiny: str):
    tokenizer = tokenizer_with(tiny, "{{ messages | length }}{{ messages[-1]['content'] }}")
    expected = r"does not begin with its own prompt: of 7.*data\.prompt without data\.chat"
    with pytest.raises(DataError, match=expected) as refused:
        Tokenization(tokenizer, 64).examples([Row("secret", "private", (Message("user", "secret"),))])
    assert not re.search("secret|private", str(refused.value)), (
        "a client sends the message to the server, and not its rows"
    )


def test_a_conversation_that_the_template_refuses_is_told_with_its_reason(tiny: str):
    row = ChatTemplate("q", "a", "system").rows({}, "rows.jsonl, line 7")[0]
    with pytest.raises(
        DataError,
        match=r"^rows\.jsonl, line 7: the chat template refuses .* of system, user \(user first\); mend the row",
    ):
        Tokenization(tokenizer_with(tiny, STRICT), 64).examples([row])


@pytest.mark.parametrize("fault", ["{{ 1 // 0 }}", "{{ 2.0 ** 5000 }}", "{% if %}", "{{ messages[9].content }}"])
def test_a_template_that_fails_in_any_way_names_the_row(tiny: str, fault: str):
    row = ChatTemplate("q", "a").rows({}, "line 7")[0]
    with pytest.raises(DataError, match=r"^line 7: the chat template refuses a conversation of user \(.+\)"):
        Tokenization(tokenizer_with(tiny, fault), 64).examples([row])


def test_an_assistant_that_speaks_first_answers_nothing_and_is_counted(chatty: Any):
    turns = [{"role": "assistant", "content": "Hello."}, *DIALOGUE[:2]]
    rows = Conversation("m").rows({"m": turns}, "line 1")
    tokenization = Tokenization(chatty, 256)
    examples = tokenization.examples(rows)
    assert [scored(chatty, example) for example in examples] == ["1<end>\n"]
    assert tokenization.empty == 1
    assert list(examples[0].ids) == whole(chatty, rows[1]), "the greeting is seen"
    assert Conversation("m", "S").rows({"m": turns}, "")[0].target == "Hello.", "there is a turn before it"


def test_a_long_chat_loses_its_first_exchanges_and_keeps_the_system_turn(chatty: Any):
    turns = [{"role": "system", "content": "S"}]
    for number in range(6):
        turns += [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": f"answer {number}"},
        ]
    last = Conversation("m").rows({"m": turns}, "")[-1]
    kept = Row("", "answer 5", (Message("system", "S"), *map(lambda turn: Message(**turn), turns[-4:-1])))  # noqa: C417
    room = len(whole(chatty, kept)) + 3
    tokenization = Tokenization(chatty, room)
    assert list(only(tokenization, last).ids) == whole(chatty, kept)
    assert tokenization.truncated == 1


def test_a_chat_that_is_too_long_in_one_exchange_is_cut_like_any_row(chatty: Any):
    row = ChatTemplate("{q}", "a").rows({"q": "x" * 100}, "")[0]
    tokenization = Tokenization(chatty, 40)
    example = only(tokenization, row)
    assert len(example.ids) == 40
    assert list(example.ids) == whole(chatty, row)[-40:]
    assert (tokenization.truncated, tokenization.empty) == (1, 0)


@pytest.mark.parametrize("answer", ["", "  \n"])
def test_an_empty_answer_is_dropped_and_counted_though_the_template_gives_it_tokens(chatty: Any, answer: str):
    tokenization = Tokenization(chatty, 64)
    assert tokenization.examples(ChatTemplate("q", "{a}").rows({"a": answer}, "")) == []
    assert tokenization.examples(Conversation("m").rows({"m": DIALOGUE[:1]}, "")) == [], "nobody answers"
    assert tokenization.empty == 2


def test_a_begin_token_stays_where_a_chat_is_cut(tiny: str):
    tokenizer = tokenizer_with(tiny, "~" + CHATML)
    tokenizer.bos_token = "~"
    (row,) = ChatTemplate("{q}", "a").rows({"q": "x" * 100}, "")
    example = only(Tokenization(tokenizer, 40), row)
    assert (example.ids[0], len(example.ids)) == (tokenizer.bos_token_id, 40)


ASKED = Row("a", "", (Message("user", "a"),))


def test_generation_stops_at_the_end_of_the_turn(chatty: Any, tiny: str):
    assert Chat(chatty).end(ASKED) == END
    other = tokenizer_with(tiny, CHATML.replace("{{ eos_token }}", "<|im_end|>"))
    other.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenization = Tokenization(other, 64)
    assert tokenization.ends([ASKED]) == [END, other.convert_tokens_to_ids("<|im_end|>")]
    assert tokenization.ends([Row("a", "")]) == [END]


def test_an_end_that_is_an_added_token_but_no_special_one_ends_an_answer(tiny: str):
    other = tokenizer_with(tiny, CHATML.replace("{{ eos_token }}", "<|im_end|>"))
    other.add_tokens(["<|im_end|>"])
    assert Chat(other).end(ASKED) == other.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("between", ["", " ", "###"])
def test_where_the_template_ends_no_answer_the_end_of_text_is_scored_and_counted(tiny: str, between: str):
    """A model that learns no end never stops; text such as "###" is no token that generation could stop at."""
    last = "{% if loop.last and m['role'] == 'assistant' %}" + between + "{% endif %}"
    tokenizer = tokenizer_with(
        tiny,
        "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}"
        + last
        + "{% if not loop.last %}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}\n### assistant: {% endif %}",
    )
    tokenization = Tokenization(tokenizer, 256)
    (row,) = ChatTemplate("{q}", "{a}").rows({"q": "1 + 1?", "a": "two"}, "")
    assert scored(tokenizer, only(tokenization, row)) == f"two{between}<end>"
    assert tokenization.unended == 1
    assert tokenization.ends([row]) == [END]


def test_the_header_of_a_turn_is_not_its_end(tiny: str):
    """A template may know no generation prompt; the header then stands in the answer."""
    tokenizer = tokenizer_with(
        tiny, "{% for m in messages %}<|head|>{{ m['role'] }} {{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|head|>"]})
    assert Chat(tokenizer).end(ASKED) == END


def test_a_tokenizer_without_a_chat_template_is_refused_with_the_way_out(tiny_tokenizer: Any):
    with pytest.raises(ModelError, match=r"tokenizer of 'tiny' has no chat template.*model\.tokenizer.*data\.prompt"):
        check_chat_template(tiny_tokenizer, "tiny")


# In a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the tiny base, its tokenizer with a chat template, and conversations of two clients."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "chatty")
    tokenizer_with(tiny, CHATML).save_pretrained("chatty")
    rows = [
        {"client": client, "q": f"{n}?", "a": f"{n}", "m": [{"role": "user", "content": f"{n}?"}, *DIALOGUE[1:]]}
        for client in "ab"
        for n in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    return tmp_path


def run(tiny: str, data: dict[str, Any], *changes: str) -> int:
    text = phones(
        tiny,
        data={"path": "rows.jsonl", "split_field": "", "test_share": 0.3, "max_length": 128, **data},
        federation={"rounds": 1, "clients_per_round": 2},
        ranks={"kind": "same", "rank": 2},
        method={"min_rank": 1},
        training={"steps": 1},
        evaluation={"generate": 2, "max_new_tokens": 4},
    )
    Path("run.toml").write_text(text, encoding="utf8")
    return main(["run", "run.toml", "--quiet", *(part for change in changes for part in ("--set", change))])


@pytest.mark.parametrize(
    ("data", "rows"),
    [({"chat": True, "system": "S", "prompt": "{q}", "target": "{a}"}, 24), ({"messages": "m"}, 48)],
    ids=["a row is a turn", "conversations"],
)
def test_a_run_learns_from_chats_and_answers_them(place: Path, tiny: str, data: dict[str, Any], rows: int):
    assert run(tiny, data, "model.tokenizer=chatty") == 0
    records = read_records(place / "runs/phones/records.jsonl")
    assert records[0]["train_rows"] + records[0]["test_rows"] == rows
    assert records[-1]["overall"]["generated"] == 2
    assert records[-1]["overall"]["perplexity"] < records[1]["overall"]["perplexity"]


def test_a_run_on_a_tokenizer_without_template_is_refused_and_nothing_written(
    place: Path, tiny: str, capsys: pytest.CaptureFixture[str]
):
    assert run(tiny, {"messages": "m"}) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert not (place / "runs").exists()


@pytest.mark.usefixtures("place")
def test_a_conversation_is_on_one_side_of_the_split():
    """Its later prompts hold its earlier answers: one side must not see the other's."""
    document = {"path": "rows.jsonl", "messages": "m", "split_field": "", "test_share": 0.5}
    federation: Federation = load_federation(config_of(**document))
    for rows in federation.clients.values():
        opening = [{row.turns[0] for row in side if row.turns} for side in (rows.train, rows.test)]
        assert not opening[0] & opening[1]
        assert len(rows.train) % 2 == len(rows.test) % 2 == 0


def test_a_conversation_is_not_torn_apart_by_validation(tmp_path: Path):
    """What is tuned must not have trained on prompts that hold the answers it is judged by."""
    rows = [{"client": "a", "m": [{"role": "user", "content": f"{n}?"}, *DIALOGUE[1:]]} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    document = {"path": str(tmp_path / "rows.jsonl"), "messages": "m", "split_field": "", "validation_share": 0.3}
    (own,) = load_federation(config_of(**document)).clients.values()
    opening = [{row.turns[0] for row in side if row.turns} for side in (own.train, own.test)]
    assert not opening[0] & opening[1]
    assert len(own.test) == 2 * len(opening[1])
    assert 8 <= len(opening[1]) <= 24, "three tenths of those that are not test rows"


def config_of(**data: Any) -> Any:
    whole = {"federation": {"rounds": 1, "clients_per_round": 1}, "ranks": {"kind": "same", "rank": 8}}
    return parse_config({**whole, "data": data, "training": {"steps": 1}})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "data.target is missing; add it"),
        ({"target": "{a}", "chat": True}, "data.chat = true needs the user's turn; set data.prompt, or data.messages"),
        (
            {"target": "{a}", "messages": "m"},
            "data.messages = 'm' takes whole conversations, so data.target has no place",
        ),
        (
            {"prompt": "{a}", "messages": "m"},
            "data.messages = 'm' takes whole conversations, so data.prompt has no place",
        ),
        ({"target": "{a}", "system": "S"}, "data.system is a turn of a chat; set data.chat = true"),
    ],
)
def test_keys_that_do_not_fit_together_are_named(data: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as caught:
        config_of(**data)
    assert [problem.startswith(said) for problem in caught.value.problems] == [True]


def test_a_plain_template_makes_no_turns():
    assert Template("{q}", "{a}").rows({"q": "x", "a": "y"}, "") == (Row("x", "y", None),)
