"""`hetlora generate`: equal to the run's evaluation, from text, rows and files; bad input is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hetlora import generate
from hetlora.cli import main
from hetlora.commands.generate import Completion, _use_of_text, describe_generated
from hetlora.config import DataConfig, parse_config
from hetlora.config.build_data import make_rendering
from hetlora.data.templates import ChatTemplate, Conversation, Message
from hetlora.errors import HetLoraError, printable
from hetlora.model.lora_model import LoraModel, load_base
from hetlora.runs.display import QuietDisplay
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.runs.result import RunResult
from hetlora.training.generation import generate_texts
from proofs.small_run import document
from small_federations import run_small

pytestmark = pytest.mark.run

Started = Callable[..., RunResult]
ALL = {"evaluation": {"every": 0, "generate": 100, "max_new_tokens": 4}}
"""Every held-out row is answered by the run itself."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory whose runs the tests of this file share."""
    return tmp_path_factory.mktemp("place")


@pytest.fixture
def ran(place: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Started:
    """Run a method once, in the working directory of the tests."""
    monkeypatch.chdir(place)

    def call(name: str = "hetlora", **changes: Any) -> RunResult:
        key = json.dumps([name, changes])
        if key not in done:
            done[key] = run_small(tiny, name, **ALL, **changes)
        return done[key]

    done = _RESULTS.setdefault(place, {})
    return call


_RESULTS: dict[Path, dict[str, RunResult]] = {}


def folder_of(result: RunResult) -> Path:
    return result.records.parent


def held_out(result: RunResult) -> tuple[list[dict[str, str]], list[str], list[str]]:
    """The rows of the run's own answers, without their targets, and what base and result said."""
    assert result.final is not None
    rows = [{"question": answer.prompt} for answer in result.final.answers]
    return rows, [answer.text for answer in result.base.answers], [answer.text for answer in result.final.answers]


# What it says -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["hetlora", "flora", "fedex_lora", "full"])
def test_it_says_what_the_runs_evaluation_said(ran: Started, name: str, kind: str) -> None:
    result = ran(name, kind=kind)
    rows, before, after = held_out(result)
    answers = list(generate(folder_of(result), rows, compare_base=True))
    assert [answer.base for answer in answers] == before
    assert [answer.text for answer in answers] == after
    assert [answer.prompt for answer in answers] == [row["question"] for row in rows]
    assert before != after, "what was learned must matter"


def test_text_of_a_template_that_is_a_field_is_the_prompt_and_order_is_kept(ran: Started) -> None:
    result = ran()
    rows, _, after = held_out(result)
    mixed = [row if index % 2 else row["question"] for index, row in enumerate(rows)]
    assert [answer.text for answer in generate(folder_of(result), mixed)] == after
    backwards = list(reversed(mixed))
    assert [answer.text for answer in generate(folder_of(result), backwards)] == list(reversed(after))


def test_one_prompt_is_one_and_not_its_letters_or_keys(ran: Started) -> None:
    result = ran()
    rows, _, after = held_out(result)
    for prompt in (rows[0], rows[0]["question"]):
        [answer] = generate(folder_of(result), prompt)
        assert (answer.prompt, answer.text) == (rows[0]["question"], after[0])


@pytest.mark.parametrize(("prompt", "kind"), [(["a", "b"], "list"), (3, "int"), (None, "NoneType")])
def test_what_is_neither_text_nor_fields_is_refused(ran: Started, prompt: Any, kind: str) -> None:
    with pytest.raises(HetLoraError, match=f"prompt 2: of type {kind}; a prompt is text, or a mapping"):
        list(generate(folder_of(ran()), ["what is 1?", prompt]))


class Hearing(QuietDisplay):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def say(self, text: str) -> None:
        self.heard.append(text)


def test_a_prompt_that_is_cut_is_said_to_be(ran: Started, capsys: pytest.CaptureFixture[str]) -> None:
    folder, long = folder_of(ran()), "".join(f"what is {number}? " for number in range(100, 124))
    display = Hearing()
    short, answer, seen = generate(folder, ["what is 1?", long, long[-44:]], display=display)
    assert (short.cut, answer.cut, seen.cut) == (0, len(long) - 44, 0)  # a token a byte, and four of the answer
    assert (answer.prompt, answer.text) == (long, seen.text)
    said = f"prompt 2: the first {len(long) - 44} of its {len(long)} tokens are cut"
    assert [line for line in display.heard if "prompt" in line] == [
        f"{said}; with an answer of 4 they are more than data.max_length = 48"
    ]
    assert main(["generate", str(folder), "--prompt", long, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"prompt": long, "text": answer.text, "cut": answer.cut}
    assert f"prompt 1: the first {len(long) - 44} of its {len(long)} tokens are cut" in err


def test_a_rank_a_tier_and_a_client_say_what_their_slots_say(ran: Started) -> None:
    result = ran()
    experiment = LocalExperiment(
        parse_config(document("runs", model={"base": "llama", "device": "cpu"})), QuietDisplay()
    )
    tokenization = experiment.data.tokenization
    model = LoraModel(load_base("llama"), scaling=1.7)
    questions = [row for _, row in experiment.data.federation.clients.items() for row in row.test]
    said = {}
    for rank in (1, 2, 4):
        model.use(result.state.truncated(rank))
        said[rank] = generate_texts(model, tokenization, questions, 4)
    prompts = [row.prompt for row in questions]

    def texts(**part: Any) -> list[str]:
        return [answer.text for answer in generate(folder_of(result), prompts, **part)]

    assert texts(rank=1) == said[1] != said[4]
    assert texts(tier="2") == said[2]
    name, rank = next((name, rank) for name, rank in result.ranks.items() if rank in said)
    assert texts(client=name) == said[rank]


def test_each_client_of_a_personal_method_says_its_own(ran: Started) -> None:
    result = ran("local", training={"steps": 8, "batch_size": 2, "learning_rate": 5e-2})
    assert result.final is not None
    for client in ("phone 1", "phone/2", "tablet 1", "tablet 2"):
        own = [answer for answer in result.final.answers if answer.client == client]
        said = generate(folder_of(result), [answer.prompt for answer in own], client=client)
        assert [answer.text for answer in said] == [answer.text for answer in own]
    with pytest.raises(HetLoraError, match="name a client, one of 'phone 1'"):
        generate(folder_of(result), ["what is 1?"])


def test_a_written_model_without_a_checkpoint_says_the_same(ran: Started) -> None:
    result = ran("flora", checkpoint_every=0)
    rows, before, after = held_out(result)
    answers = list(generate(folder_of(result), rows, compare_base=True))
    assert ([answer.base for answer in answers], [answer.text for answer in answers]) == (before, after)


def test_more_tokens_than_the_runs_own_are_said_where_there_is_room(ran: Started) -> None:
    result = ran()
    [short] = generate(folder_of(result), ["what is 1?"])
    [long] = generate(folder_of(result), ["what is 1?"], max_new_tokens=12)
    assert long.text.startswith(short.text)
    assert len(long.text) > len(short.text)
    for wrong in (0, 48, 100):
        with pytest.raises(HetLoraError, match=f"max_new_tokens = {wrong} leaves no room .* give 1 … 47"):
            generate(folder_of(result), ["what is 1?"], max_new_tokens=wrong)


def test_a_base_that_has_changed_is_not_asked(ran: Started, tiny: str) -> None:
    ran()
    shutil.copytree(tiny, "changing")
    result = ran(model={"base": "changing", "device": "cpu", "scaling": 1.7})
    with Path("changing/config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(HetLoraError, match=r"model\.base = 'changing' does not hold what it held"):
        generate(folder_of(result), ["what is 1?"])


# Rows that are not prompt and target --------------------------------------------------------------------------------


def test_a_chats_question_is_its_users_turn() -> None:
    row = ChatTemplate("{q}?", "{a}", "Be {mood}.").question({"q": "1 + 1", "mood": "brief"}, "line 1")
    assert row.turns == (Message("system", "Be brief."), Message("user", "1 + 1?"))
    assert row.target == ""


@pytest.mark.parametrize("answered", [False, True])
def test_a_conversations_question_is_all_but_the_last_answer(answered: bool) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        *([{"role": "assistant", "content": "d"}] if answered else []),
    ]
    row = Conversation("messages", "Be brief.").question({"messages": turns}, "line 1")
    assert row.turns is not None
    assert [turn.content for turn in row.turns] == ["Be brief.", "a", "b", "c"]


def test_a_run_over_chats_answers_after_the_templates_own_tokens(ran: Started, tiny: str) -> None:
    from transformers import AutoTokenizer

    ran()
    if not Path("talking").exists():
        shutil.copytree(tiny, "talking")
        tokenizer = AutoTokenizer.from_pretrained("talking")
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}<end>{% endfor %}"
            "{% if add_generation_prompt %}a:{% endif %}"
        )
        tokenizer.save_pretrained("talking")
    data = {**document("runs")["data"], "chat": True, "target": "{answer}"}
    result = ran(model={"base": "talking", "device": "cpu", "scaling": 1.7}, data=data)
    rows, before, after = held_out(result)
    answers = list(generate(folder_of(result), rows, compare_base=True))
    assert ([answer.base for answer in answers], [answer.text for answer in answers]) == (before, after)
    plain = [row["question"] for row in rows]
    assert [answer.text for answer in generate(folder_of(result), plain)] == after, "text is the user's turn"
    assert [answer.text for answer in generate(folder_of(result), plain, raw=True)] != after
    [long] = generate(folder_of(result), {"question": "why? " * 60})
    assert (answers[0].cut, long.cut) == (0, len("u:a:") + len("why? " * 60) + 1 - 44)  # the end of a turn is one token


@pytest.mark.parametrize(
    ("data", "field", "said"),
    [
        ({"prompt": "{q}"}, "q", None),
        ({"prompt": "Q: {q} A:"}, "q", "the text is put into 'Q: {q} A:', as in training"),
        ({"prompt": "{q}{?more} {more}{/more} A:"}, "q", "the text is put into"),
        ({"prompt": "{q}", "chat": True}, "q", "the user's turn of a chat"),
        ({"prompt": "{q}", "chat": True, "system": "You are {who}."}, None, "the text is given as it is"),
        ({"messages": "turns"}, "turns", "the user's turn of a chat"),
        ({"messages": "turns", "system": "You are {who}."}, None, "trained on a conversation"),
        ({"prompt": "{a} and {b}"}, None, "trained on '{a} and {b}', which a JSON object with a, b fills"),
        ({"prompt": "{a.b}:"}, "a.b", "the text is put into '{a.b}:'"),
        ({"prompt": ""}, None, None),
        ({"prompt": "Once"}, None, None),
    ],
)
def test_text_becomes_the_one_field_that_the_template_needs(
    data: dict[str, Any], field: str | None, said: str | None
) -> None:
    config = DataConfig.model_validate({"target": "" if "messages" in data else "{answer}", **data})
    found, note = _use_of_text(config, make_rendering(config))
    assert found == field
    assert (note is None) if said is None else (said in str(note))


def test_text_is_put_into_the_template_unless_it_is_to_stay_raw(
    ran: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {**document("runs")["data"], "prompt": "Q: {question}"}
    run = folder_of(ran(data=data))
    filled, row, text = generate(run, ["Q: what is 1?"], raw=True), {"question": "what is 1?"}, "what is 1?"
    [answer] = filled
    assert [one.prompt for one in generate(run, [row, text])] == ["Q: what is 1?"] * 2
    assert [one.text for one in generate(run, [row, text])] == [answer.text] * 2
    assert main(["generate", str(run), "--prompt", text, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["prompt"] == "Q: what is 1?"
    assert err.count("the text is put into 'Q: {question}'") == 1
    assert main(["generate", str(run), "--prompt", text, "--json", "--raw"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["prompt"] == text
    assert "the text is" not in err


def test_fields_need_a_template(ran: Started) -> None:
    data = {**document("runs")["data"], "prompt": "", "target": "{answer}"}
    result = ran(data=data)
    with pytest.raises(HetLoraError, match=r"prompt 1: the run has no data\.prompt"):
        list(generate(folder_of(result), [{"question": "what is 1?"}]))
    assert len(list(generate(folder_of(result), ["the number"]))) == 1


# The command --------------------------------------------------------------------------------------------------------


def test_a_prompt_is_answered_by_text_alone(ran: Started, capsys: pytest.CaptureFixture[str]) -> None:
    result = ran()
    rows, before, after = held_out(result)
    run = str(folder_of(result))
    assert main(["generate", run, "--prompt", rows[0]["question"], "--quiet"]) == 0
    assert capsys.readouterr().out == f"{printable(after[0])}\n"
    assert main(["generate", run, "--prompt", json.dumps(rows[0]), "--compare", "base", "--quiet"]) == 0
    assert capsys.readouterr().out == f"base:\n  {printable(before[0])}\nresult:\n  {printable(after[0])}\n"
    assert main(["generate", run, "--prompt", rows[0]["question"], "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out) == {"prompt": rows[0]["question"], "text": after[0]}


def test_a_file_is_answered_line_by_line(ran: Started, capsys: pytest.CaptureFixture[str]) -> None:
    result = ran()
    rows, before, after = held_out(result)
    lines = [json.dumps(row) for row in rows[:-1]]
    Path("asked.jsonl").write_text("\n".join([*lines, "", json.dumps(rows[-1]["question"])]) + "\n")
    code = main(["generate", str(folder_of(result)), "--file", "asked.jsonl", "--compare", "base", "--quiet"])
    assert code == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said == [
        {"prompt": row["question"], "text": text, "base": base}
        for row, base, text in zip(rows, before, after, strict=True)
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"question": "a"}\n{"question"', "asked.jsonl, line 2: not JSON"),
        ("3\n", "asked.jsonl, line 1: of type int; every line must be a JSON object or string"),
        ('{"answer": "a"}\n', "prompt 1: field 'question' is missing; the row has answer"),
        (b"\xff\xfe\n", "'asked.jsonl' cannot be read as text"),
        ('{"question": "\\ud83d?"}\n', r"prompt 1: holds '\ud83d', half a character; give text in UTF-8"),
        (None, "'asked.jsonl' cannot be read as text"),
    ],
)
def test_a_file_that_holds_no_prompts_is_one_error(
    ran: Started, content: str | bytes | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(ran())
    path = Path("asked.jsonl")
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["generate", str(folder), "--file", "asked.jsonl", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rank", "9"], "rank 9 is not of this run"),
        (["--client", "nobody"], "there is no client 'nobody' in this run; there are 'phone 1'"),
        (["--max-new-tokens", "48"], "max_new_tokens = 48 leaves no room"),
    ],
)
def test_bad_input_is_one_error(
    ran: Started, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(folder_of(ran())), "--prompt", "a", *options, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_no_terminal_obeys_an_answer() -> None:
    answer = Completion("a", "one\n\x1b[2Jtwo", "\x1b]0;title\x07")
    assert "\x1b" not in describe_generated(answer)
    assert describe_generated(answer).endswith("result:\n  one\n  \\x1b[2Jtwo")
    assert "\x1b" not in json.dumps(answer.summary())
