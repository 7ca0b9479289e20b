"""An export is read back by the program that it is for, and its card's code answers as `hetlora generate` does."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hetlora import export_run, generate
from hetlora.cli import main
from hetlora.commands.export import export as exporting
from hetlora.config import parse_config
from hetlora.core.adapter import LoraPair
from hetlora.errors import HetLoraError
from hetlora.runs.display import QuietDisplay
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.runs.result import RunResult
from proofs.small_bases import write_base_of
from proofs.small_run import document, write_rows
from small_federations import write_gpt2

pytestmark = pytest.mark.run

CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NOT_GREEDY = {
    "repetition_penalty": 1.7,
    "do_sample": True,
    "temperature": 2.0,
    "suppress_tokens": list(range(60, 90)),
    "eos_token_id": [0, 120, 121],
}
Run = Callable[..., RunResult]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checked")


@cache
def started(tiny: str, kind: str, begin: str, settings: str) -> RunResult:
    """Run a base whose generation settings are not greedy, and whose tokenizer begins a text so."""
    base = f"{kind}-{begin}"
    if not Path(base).exists():
        if kind == "gpt2":
            write_gpt2(Path(base), tiny)
        else:
            shutil.copytree(tiny, base)
        (Path(base) / "generation_config.json").write_text(json.dumps({**NOT_GREEDY, "transformers_version": "5.0.0"}))
        tell_begin(Path(base), begin)
    if not Path("rows.jsonl").exists():
        write_rows(Path("rows.jsonl"))
    sections = {
        "model": {"base": base, "device": "cpu"},
        "federation": {"rounds": 2, "clients_per_round": 3},
        "training": {"steps": 2, "batch_size": 2, "learning_rate": 5e-2},
        "evaluation": {"every": 0, "max_new_tokens": 12},
        **json.loads(settings),
    }
    output = f"runs/{base}-{len(settings)}"
    return LocalExperiment(parse_config(document(output, **sections)), QuietDisplay()).run()


def tell_begin(base: Path, begin: str) -> None:
    """Give a tokenizer a begin token, and let it set the token or not; and a chat template."""
    path = base / "tokenizer_config.json"
    told = {**json.loads(path.read_text()), "chat_template": CHATML}
    if begin != "none":
        told["bos_token"] = "<pad>"
    path.write_text(json.dumps(told))
    if begin == "set":
        whole = json.loads((base / "tokenizer.json").read_text())
        parts = [{"SpecialToken": {"id": "<pad>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        tokens = {"<pad>": {"id": "<pad>", "ids": [1], "tokens": ["<pad>"]}}
        pair = [*parts, {"Sequence": {"id": "B", "type_id": 1}}]
        whole["post_processor"] = {
            "type": "TemplateProcessing",
            "single": parts,
            "pair": pair,
            "special_tokens": tokens,
        }
        (base / "tokenizer.json").write_text(json.dumps(whole))


@pytest.fixture
def ran(place: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(place)

    def call(kind: str = "llama", begin: str = "none", **changes: Any) -> RunResult:
        return started(tiny, kind, begin, json.dumps(changes))

    return call


def code_of(folder: Path) -> str:
    text = (folder / "README.md").read_text("utf8")
    [code] = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return code


def said(code: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})  # the point is to execute what readers will copy
    return capsys.readouterr().out.removesuffix("\n")


# The card's code ----------------------------------------------------------------------------------------------------

QUESTIONS = ["what is 3?", "say it: {2}", "what is 12 and 30, please?" * 3]


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "model"])
@pytest.mark.parametrize(("kind", "begin"), [("llama", "none"), ("llama", "unset"), ("llama", "set"), ("gpt2", "none")])
def test_the_cards_code_answers_as_generate_does(
    ran: Run, kind: str, begin: str, capsys: pytest.CaptureFixture[str], *, merged: bool
) -> None:
    data = {
        "path": "rows.jsonl",
        "client_field": "device",
        "prompt": "{{Q}} {question}\nA:",
        "target": " {answer}",
        "max_length": 48,
    }
    run = ran(kind, begin, data=data).records.parent
    code = code_of(export_run(run, merged=merged, check=False).folder)
    assert r"prompt = '{Q} {question}\nA:'.replace('{question}', 'What can you do?')  # the template" in code
    asked = [{"question": question} for question in QUESTIONS]
    answers = [answer.text for answer in generate(run, asked)]
    assert len(set(answers)) > 1
    for question, answer in zip(QUESTIONS, answers, strict=True):
        prompt = f"{{Q}} {question}\nA:"
        assert said(re.sub(r"prompt = .*", lambda _, prompt=prompt: f"prompt = {prompt!r}", code), capsys) == answer


@pytest.mark.parametrize(
    ("kind", "target"), [pytest.param("moshi", "linear", marks=pytest.mark.slow), ("camembert", "query")]
)
def test_the_cards_code_asks_by_whole_passes_where_generate_answers_otherwise(
    tiny: str, ran: Run, kind: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of moshi's the cache is wrong, and of camembert's the positions."""
    write_base_of(kind, "", Path(tiny), Path(f"{kind}-none"))
    run = ran(kind, model={"base": f"{kind}-none", "device": "cpu", "target_modules": [target]}).records.parent
    code = code_of(export_run(run, merged=True).folder)
    assert "By whole passes" in code
    answers = [answer.text for answer in generate(run, ["what is 3?", "number"])]
    for prompt, answer in zip(["what is 3?", "number"], answers, strict=True):
        assert said(re.sub(r"prompt = .*", f"prompt = {prompt!r}", code), capsys) == answer


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "model"])
@pytest.mark.parametrize(("kind", "begin"), [("llama", "none"), ("llama", "set"), ("gpt2", "unset")])
def test_the_cards_code_asks_a_chat_as_generate_does(
    ran: Run, kind: str, begin: str, capsys: pytest.CaptureFixture[str], *, merged: bool
) -> None:
    data = {
        "path": "rows.jsonl",
        "client_field": "device",
        "chat": True,
        "system": "Hm.",
        "prompt": "{question}",
        "target": "{answer}",
        "max_length": 64,
    }
    run = ran(kind, begin, data=data).records.parent
    code = code_of(export_run(run, merged=merged, check=False).folder)
    asked = [{"question": question} for question in QUESTIONS[:2]]
    answers = [answer.text for answer in generate(run, asked)]
    assert len(set(answers)) > 1
    for question, answer in zip(QUESTIONS, answers, strict=False):
        assert said(code.replace("'{question}'", repr(question)), capsys) == answer


@pytest.mark.parametrize("merged", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["adapter", "model"])
def test_the_cards_code_has_the_runs_own_template_and_its_arguments(
    ran: Run, capsys: pytest.CaptureFixture[str], *, merged: bool
) -> None:
    Path("own.jinja").write_text("{{ mood }}" + CHATML.replace("<|", "[").replace("|>", "]"))
    chat = {"chat": True, "prompt": "{question}", "target": "{answer}", "chat_template": "own.jinja"}
    data = {
        "path": "rows.jsonl",
        "client_field": "device",
        **chat,
        "chat_template_kwargs": {"mood": "glad"},
        "max_length": 64,
    }
    run = ran(data=data).records.parent
    code = code_of(export_run(run, merged=merged, check=False).folder)
    answers = [answer.text for answer in generate(run, [{"question": question} for question in QUESTIONS[:2]])]
    for question, answer in zip(QUESTIONS, answers, strict=False):
        assert said(code.replace("'{question}'", repr(question)), capsys) == answer


def test_a_chat_that_the_template_alone_does_not_make_is_asked_by_its_tokens(
    ran: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hetlora.commands.export.asking import how_to_ask
    from hetlora.data.tokenization import Tokenization
    from hetlora.runs.trained_run import open_run

    data = {"path": "rows.jsonl", "client_field": "device", "chat": True, "prompt": "{question}", "target": "{answer}"}
    config = open_run(ran(data=data).records.parent).config
    assert "apply_chat_template(messages" in how_to_ask(config).lines
    monkeypatch.setattr(Tokenization, "prompt_ids", lambda *_: (5, 6, 7))
    assert how_to_ask(config).lines.endswith("ids = [5, 6, 7]  # of these messages")


# Read back ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["adapter", "model"])
def test_the_figure_is_printed_and_stands_in_the_card(
    ran: Run, capsys: pytest.CaptureFixture[str], *, merged: bool
) -> None:
    run = str(ran().records.parent)
    option = ["--merged"] if merged else []
    assert main(["export", run, *option]) == 0
    out, err = capsys.readouterr()
    assert "reading it back in another program, which --no-check leaves out" in err
    tool = "transformers 5" if merged else "peft 0"
    found = r"logits up to \d\S* differ by at most \S+; what was learned changes them by \d"
    assert re.search(rf"^read back:      by {tool}\S+ on 4 rows of the run\n {{16}}{found}", out, re.MULTILINE)
    folder = Path(re.findall(r": +(runs/\S+)", out)[0])
    card = (folder / "README.md").read_text()
    assert "| read back | by " in card
    assert "on 4 rows of the run" in card


def test_without_a_check_the_card_says_so(ran: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(ran().records.parent), "--no-check", "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["check"] is None
    assert "| read back | not checked |" in (Path(told["folder"]) / "README.md").read_text()


def test_rows_are_made_up_where_the_runs_own_are_away(ran: Run) -> None:
    run = ran().records.parent
    Path("rows.jsonl").rename("away.jsonl")
    try:
        done = export_run(run, rank=2)
    finally:
        Path("away.jsonl").rename("rows.jsonl")
    assert done.check is not None
    assert "4 rows made up, for the run's own are not here" in done.check.lines()[0]
    told = done.summary()["check"]
    assert told["difference"] <= told["allowed"] < told["learned"] < told["largest"]
    assert (told["rows"], told["of_the_run"]) == (4, False)


def left(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "exports").iterdir())


@pytest.mark.parametrize("merged", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["adapter", "model"])
def test_an_export_that_computes_something_else_is_an_error(
    ran: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, merged: bool
) -> None:
    run = ran().records.parent
    assert main(["export", str(run), "--no-check", "--quiet"]) == 0
    before = left(run)
    name, place = ("write_merged", 1) if merged else ("export_adapter", 0)
    write = getattr(exporting, name)

    def wrong(*given: Any, **options: Any) -> None:
        some = list(given)
        # One module of four does nothing, as where another program adapts fewer modules.
        some[place] = {
            module: LoraPair(A, B if index else 0 * B) for index, (module, (A, B)) in enumerate(given[place].items())
        }
        write(*some, **options)

    monkeypatch.setattr(exporting, name, wrong)
    capsys.readouterr()
    assert main(["export", str(run), "--quiet", *(["--merged"] if merged else [])]) == 2
    error = capsys.readouterr().err
    tool = "transformers" if merged else "peft"
    assert re.search(rf"hetlora: {tool} [\d.]+ computes something else with what was written: logits up to \d", error)
    assert "so nothing was written; --no-check" in error
    assert left(run) == before


@pytest.mark.slow
def test_little_that_was_learned_must_be_there_too(ran: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from hetlora.runs.trained_run import TrainedRun

    run, whole, write = ran().records.parent, TrainedRun.adapter, exporting.export_adapter
    monkeypatch.setattr(
        TrainedRun, "adapter", lambda *given: {name: LoraPair(A, 2e-5 * B) for name, (A, B) in whole(*given).items()}
    )
    check = export_run(run).check
    assert check is not None
    assert check.difference <= check.allowed
    assert check.learned is not None
    assert check.learned < 1e-4 * check.largest
    nothing = lambda adapter, *given, **options: write(  # noqa: E731
        {name: LoraPair(A, 0 * B) for name, (A, B) in adapter.items()}, *given, **options
    )
    monkeypatch.setattr(exporting, "export_adapter", nothing)
    with pytest.raises(HetLoraError, match="computes something else"):
        export_run(run)


def test_an_export_that_its_program_does_not_load_is_an_error(ran: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run, write = ran().records.parent, exporting.export_adapter

    def broken(adapter: Any, folder: Path, *given: Any, **options: Any) -> None:
        write(adapter, folder, *given, **options)
        path = Path(folder) / "adapter_config.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text("utf8")), "target_modules": ["nothing"]}), encoding="utf8"
        )

    monkeypatch.setattr(exporting, "export_adapter", broken)
    with pytest.raises(HetLoraError, match=r"peft [\d.]+ cannot load what was written \(peft\..*'nothing'\} not found"):
        export_run(run)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_read_back_as_such(ran: Run, dtype: Any) -> None:
    check = export_run(ran().records.parent, merged=True, dtype=dtype).check
    assert check is not None
    assert 1e-4 * check.largest < check.difference <= check.allowed


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("full", marks=pytest.mark.slow), "flora", pytest.param("local", marks=pytest.mark.slow)]
)
def test_changed_weights_and_own_adapters_are_read_back(ran: Run, name: str) -> None:
    part: dict[str, Any] = {"client": "phone 1"} if name == "local" else {"merged": True}
    check = export_run(ran(method={"name": name}).records.parent, **part).check
    assert check is not None
    assert check.learned is not None
    assert check.difference <= check.allowed < check.learned
