"""Every key of a conversation and of its turns reaches the chat template, decides what is scored, or is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hetlora.data import Conversation, Tokenization
from hetlora.data.templates import ChatTemplate
from hetlora.errors import DataError
from hetlora.model.lora_model import load_tokenizer

PLAIN = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
READING = (
    "{% if tools %}tools {{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['reasoning_content'] %}({{ m['reasoning_content'] }}){% endif %}"
    "{{ m['content'] }}{% for call in m['tool_calls'] or [] %}[{{ call['function']['name'] }}]{% endfor %}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "where", "arguments": "{}"}}


def user(content: Any = "Oslo?", **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **keys}


def assistant(content: Any = "Norway.", **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def scored(
    tiny: str, template: str, turns: list[Any], conversation: Conversation | None = None, **fields: Any
) -> list[str]:
    """Return the scored text of every example that a conversation makes."""
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = template
    rows = (conversation or Conversation("m")).rows({"m": turns, **fields}, "line 1")
    examples = Tokenization(tokenizer, 512).examples(rows)
    return [tokenizer.decode(example.ids[example.scored_from :]) for example in examples]


@pytest.mark.parametrize("key", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 1, "train": False}])
def test_a_turn_of_weight_zero_is_read_and_not_scored(tiny: str, key: dict[str, Any]):
    turns = [user(), assistant("I do not care.", **key), user("Please."), assistant(weight=1)]
    assert scored(tiny, PLAIN, turns) == ["Norway.<end>"]
    (row,) = Conversation("m").rows({"m": turns}, "line 1")
    assert "I do not care." in row.prompt


def test_only_the_last_answer_is_scored_where_that_is_asked_for(tiny: str):
    turns = [user(), assistant("Norway."), user("Rome?"), assistant("Italy.")]
    assert scored(tiny, PLAIN, turns) == ["Norway.<end>", "Italy.<end>"]
    assert scored(tiny, PLAIN, turns, Conversation("m", scored="last")) == ["Italy.<end>"]


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        (assistant(value="the real answer"), "turn 2 of field 'm' has the key value, which nothing here reads"),
        (assistant(mood="glad"), "turn 2 of field 'm' has the key mood, which nothing here reads"),
        (assistant(weight=0.5), "turn 2 of field 'm': weight = 0.5; a turn is scored (1, true) or not (0, false)"),
        (assistant(train="yes"), "train = yes; a turn is scored"),
        (user(weight=1), "weight = 1 of the role user; only answers are scored"),
        ({"from": "function_call", "value": "{}"}, "turn 2 of field 'm' has the role function_call, and not one of"),
        (assistant([{"type": "image_url", "image_url": "x"}]), "has a part of type image_url; only parts of text"),
        (assistant(7), "turn 2 of field 'm' has no text content"),
        (assistant(None), "turn 2 of field 'm' has no text content"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(turn: dict[str, Any], said: str):
    with pytest.raises(DataError) as caught:
        Conversation("m").rows({"m": [user(), turn]}, "line 1")
    assert said in str(caught.value)
    assert str(caught.value).startswith("line 1: ")


def test_null_keys_and_parts_of_text_are_what_they_say(tiny: str):
    parts = [{"type": "text", "text": "Nor"}, {"type": "text", "text": "way."}]
    assert scored(tiny, PLAIN, [user(weight=None, tool_calls=None), assistant(parts, name=None)]) == ["Norway.<end>"]


def test_sharegpt_is_read_like_its_turns_by_their_usual_names():
    named = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Oslo?"},
        {"from": "gpt", "value": "Norway."},
    ]
    usual = [{"role": "system", "content": "Be brief."}, user(), assistant()]
    assert Conversation("m").rows({"m": named}, "") == Conversation("m").rows({"m": usual}, "")


def test_tool_calls_tools_and_thoughts_reach_a_template_that_reads_them(tiny: str):
    turns = [
        user(),
        assistant(None, tool_calls=[CALL]),
        {"role": "tool", "content": "found"},
        assistant(reasoning_content="so"),
    ]
    texts = scored(tiny, READING, turns, tools=[{"name": "where"}])
    assert texts == ["[where]<end>", "(so)Norway.<end>"]
    assert scored(tiny, READING, turns, tools=json.dumps([{"name": "where"}])) == texts


@pytest.mark.parametrize(
    ("turns", "fields", "said"),
    [
        ([user(), assistant("", tool_calls=[CALL])], {}, "the chat template ignores tool_calls of turn 2"),
        ([user(), assistant("a", tool_calls=[CALL]), user(), assistant()], {}, "ignores tool_calls of turn 2"),
        ([user(), assistant(reasoning_content="so")], {}, "the chat template ignores reasoning_content of turn 2"),
        ([user(), assistant()], {"tools": [{"name": "where"}]}, "the chat template ignores the row's tools"),
    ],
)
def test_a_template_that_ignores_what_a_row_says_is_refused(tiny: str, turns: Any, fields: Any, said: str):
    with pytest.raises(DataError, match=f"^line 1: .*{said}"):
        scored(tiny, PLAIN, turns, **fields)


def test_tools_that_are_no_list_of_objects_are_refused(tiny: str):
    for tools in ("{", 7, ["where"]):
        with pytest.raises(DataError, match="field 'tools' is no list of objects"):
            scored(tiny, READING, [user(), assistant()], tools=tools)


def test_a_template_that_leaves_out_a_turn_is_refused_and_the_system_turn_can_be_folded(tiny: str):
    template = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m['role'] in ('user', 'assistant') %}")
    turns = [{"role": "system", "content": "Be brief."}, user(), assistant()]
    with pytest.raises(
        DataError, match=r"leaves out the text of turn 1 \(system\); data\.fold_system puts it into the user's"
    ):
        scored(tiny, template, turns)
    folded = Conversation("m", fold=True)
    assert scored(tiny, template, turns, folded) == ["Norway.<end>"]
    (row,) = folded.rows({"m": turns}, "")
    assert row.turns is not None
    assert [(turn.role, turn.content) for turn in row.turns] == [("user", "Be brief.\n\nOslo?")]
    (row,) = ChatTemplate("{q}", "{a}", "Be brief.", fold=True).rows({"q": "Oslo?", "a": "Norway."}, "")
    assert row.turns is not None
    assert [(turn.role, turn.content) for turn in row.turns] == [("user", "Be brief.\n\nOslo?")]
    with pytest.raises(DataError, match="needs a user's turn after the system's"):
        folded.rows({"m": [turns[0], assistant()]}, "line 1")


def test_a_template_may_trim_a_text_and_leave_out_an_earlier_thought(tiny: str):
    template = PLAIN.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] | trim }}")
    turns = [user("  Oslo? "), assistant("<think>so</think> Norway."), user("Rome?"), assistant("Italy.")]
    assert scored(tiny, template, turns)[1] == "Italy.<end>"


def test_a_field_system_beside_the_turns_is_read_or_refused():
    turns = [user(), assistant()]
    with pytest.raises(DataError, match="the field 'system' of the row is read by nobody"):
        Conversation("m").rows({"m": turns, "system": "Be brief."}, "line 1")
    reading = Conversation("m", "{?system}{system}{/system}")
    assert reading.rows({"m": turns, "system": "Be brief."}, "")[0].prompt.startswith("system: Be brief.")
    assert reading.rows({"m": turns}, "")[0].prompt == "user: Oslo?"


def test_a_generation_prompt_that_opens_a_thought_is_an_error_with_the_way_out(tiny: str):
    template = PLAIN.replace(
        "<|assistant|>{% endif %}", "<|assistant|>{% if enable_thinking is not false %}<think>{% endif %}{% endif %}"
    )
    with pytest.raises(
        DataError, match=r"opens a thought that the answers do not have: set data\.chat_template_kwargs"
    ):
        scored(tiny, template, [user(), assistant()])
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = template
    tokenization = Tokenization(tokenizer, 512, template_arguments={"enable_thinking": False})
    (example,) = tokenization.examples(Conversation("m").rows({"m": [user(), assistant()]}, ""))
    assert tokenizer.decode(example.ids[example.scored_from :]) == "Norway.<end>"


def test_a_chat_template_of_ones_own_is_read_from_a_file(tmp_path: Path):
    from hetlora.config import parse_config
    from hetlora.config.build_model import build_tokenizer
    from hetlora.errors import ModelError

    document: dict[str, Any] = {
        "model": {"base": "nano"},
        "data": {"messages": "m", "chat_template": str(tmp_path / "own.jinja")},
        "federation": {"rounds": 1, "clients_per_round": 1},
        "ranks": {"kind": "same", "rank": 2},
        "training": {"steps": 1},
    }
    config = parse_config(document)
    with pytest.raises(ModelError, match=r"data\.chat_template = .*own\.jinja' cannot be read"):
        build_tokenizer(config)
    (tmp_path / "own.jinja").write_text(PLAIN, encoding="utf8")
    assert build_tokenizer(config).chat_template == PLAIN


# Templates of other people's making ---------------------------------------------------------------------------------


def test_a_template_that_wants_what_the_check_leaves_out_is_no_fault_of_the_row(tiny: str):
    """It is rendered once without the tool calls, to see that they are read; some templates refuse that."""
    strict = READING.replace(
        "<|{{ m['role'] }}|>",
        "{% if m['role'] == 'tool' and not messages[loop.index0 - 1]['tool_calls'] %}{{ raise_exception('no call') }}"
        "{% endif %}"
        "<|{{ m['role'] }}|>",
    )
    turns = [user(), assistant("", tool_calls=[CALL]), {"role": "tool", "content": '{"temp": "7 °C"}'}, assistant()]
    assert scored(tiny, strict, turns) == ["[where]<end>", "Norway.<end>"]


@pytest.mark.parametrize("escape", ["tojson", "string"])
def test_a_result_of_a_tool_may_be_escaped(tiny: str, escape: str):
    template = PLAIN.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'tool' %}{{ m['content'] | tojson }}{% else %}{{ m['content'] }}{% endif %}",
    )
    turns = [user(), {"role": "tool", "content": '{"temp": "7 °C"}'}, assistant()]
    assert scored(tiny, template if escape == "tojson" else PLAIN, turns) == ["Norway.<end>"]


@pytest.mark.parametrize(
    ("change", "turns"),
    [
        (("{{ m['content'] }}", "{{ m['content'] | replace(' ', '') }}"), [user("a b"), assistant("c d")]),
        (
            ("{% for m in messages %}", "{% for m in messages[-2:] %}"),
            [user("I am 5"), assistant("a"), user("I am 55"), assistant("b")],
        ),
    ],
    ids=["words run together", "the first turn is left out"],
)
def test_a_template_that_changes_or_drops_a_text_is_refused(tiny: str, change: tuple[str, str], turns: Any):
    with pytest.raises(DataError, match="the chat template leaves out the text of turn 1"):
        scored(tiny, PLAIN.replace(*change), turns)


def test_the_end_of_a_tool_call_is_an_end_of_its_own(tiny: str):
    template = READING.replace("{{ eos_token }}", "{% if m['tool_calls'] %}<call>{% else %}<turn>{% endif %}")
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>", "<turn>"]})
    turns = [user(), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "found"}, assistant()]
    rows = Conversation("m").rows({"m": turns}, "")
    ends = Tokenization(tokenizer, 512).ends(rows)
    assert set(tokenizer.convert_ids_to_tokens(ends)) == {"<end>", "<call>", "<turn>"}


def test_a_line_break_that_is_a_token_of_its_own_ends_no_answer(tiny: str):
    tokenizer = load_tokenizer(tiny)
    tokenizer.add_tokens(["\n\n"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rows = Conversation("m").rows({"m": [user(), assistant("one.\n\ntwo.")]}, "")
    tokenization = Tokenization(tokenizer, 512)
    (example,) = tokenization.examples(rows)
    assert tokenizer.decode(example.ids[example.scored_from :]).endswith("two.\n\n<end>")
    assert tokenization.ends(rows) == [tokenizer.eos_token_id]


def test_an_answer_is_scored_against_what_the_template_makes_of_it(tiny: str):
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = PLAIN.replace(
        "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<think>{% endif %}{{ m['content'] }}"
    )
    (row,) = Conversation("m").rows({"m": [user(), assistant()]}, "")
    assert Tokenization(tokenizer, 512).expected(row) == "<think>Norway."


def test_spaces_on_either_side_of_the_border_and_a_date_are_said(tiny: str):
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = PLAIN.replace("<|{{ m['role'] }}|>", "{{ m['role'] }}: ").replace(
        "<|assistant|>{%", "assistant: {%"
    )
    tokenization = Tokenization(tokenizer, 512)
    tokenization.examples(Conversation("m").rows({"m": [user(), assistant(" Norway.")]}, ""))
    assert (tokenization.doubled, tokenization.dated) == (1, False)
    tokenizer.chat_template = "{{ strftime_now('%d') }}" + PLAIN
    tokenization = Tokenization(tokenizer, 512)
    tokenization.examples(Conversation("m").rows({"m": [user(), assistant()]}, ""))
    assert (tokenization.doubled, tokenization.dated) == (0, True)


def test_arguments_that_the_template_never_reads_and_those_of_hetlora_are_refused():
    from hetlora.config import parse_config
    from hetlora.config.build_data import make_tokenization
    from hetlora.errors import ConfigError, ModelError

    document: dict[str, Any] = {
        "data": {"messages": "m", "chat_template_kwargs": {"nonsense": 1}},
        "federation": {"rounds": 1, "clients_per_round": 1},
        "ranks": {"kind": "same", "rank": 2},
        "training": {"steps": 1},
    }
    tokenizer = load_tokenizer("nano")
    tokenizer.chat_template = PLAIN
    with pytest.raises(ModelError, match="the chat template never reads nonsense"):
        make_tokenization(parse_config(document), tokenizer)
    document["data"]["chat_template_kwargs"] = {"chat_template": PLAIN}
    with pytest.raises(ConfigError, match=r"chat_template_kwargs\.chat_template is set by hetlora"):
        parse_config(document)
    document["data"] = {"messages": "m", "begin": "always"}
    with pytest.raises(ConfigError, match=r"data\.begin = 'always': the chat template sets its own"):
        parse_config(document)
