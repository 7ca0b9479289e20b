"""The README: its demonstration and its Python run as shown, and its links exist."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest

from hetlora import cli
from hetlora.methods import METHODS

pytestmark = pytest.mark.document

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf8")


def blocks(language: str, page: str = "README.md") -> list[str]:
    text = (ROOT / page).read_text("utf8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_it_is_short() -> None:
    assert len(README.split()) <= 1200


def test_the_demonstration_runs(short_demo: dict[str, Any]) -> None:
    """Two of its rounds; what all of them come to is for `make test-all`, as is the rest of what the README shows."""
    assert short_demo["rounds"] == 2
    assert short_demo["final"]["perplexity"] < short_demo["base"]["perplexity"]
    assert len(set(short_demo["ranks"].values())) >= 2
    folder = Path(short_demo["records"]).parent
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert (folder / "report.html").is_file()


@pytest.mark.slow
def test_the_demonstration_does_what_it_is_for(demo: dict[str, Any]) -> None:
    assert demo["final"]["perplexity"] <= 0.8 * demo["base"]["perplexity"], "at least 20 % lower"
    assert demo["final"]["rougeL"] > demo["base"]["rougeL"]
    assert len(set(demo["ranks"].values())) >= 2
    assert demo["prunes"] >= 1
    adapter = Path(demo["adapter"])
    assert {path.name for path in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.slow
def test_the_demonstrations_adapter_loads_in_peft_to_the_perplexity_it_reported(demo: dict[str, Any]) -> None:
    """From the files alone: PEFT's model, its own loss, the held-out rows of a few clients."""
    import torch
    from peft import PeftModel

    from hetlora.config import load_config
    from hetlora.config.build_data import load_federation
    from hetlora.data import Tokenization, TokenizedFederation
    from hetlora.model.lora_model import load_base, load_tokenizer
    from hetlora.training.evaluation import Score

    config = load_config(ROOT / "examples/demo.toml")
    data = TokenizedFederation(load_federation(config), Tokenization(load_tokenizer("nano"), config.data.max_length))
    model = PeftModel.from_pretrained(load_base("nano"), demo["adapter"]).eval()
    for client in list(demo["final"]["clients"])[:3]:
        score = Score()
        for example in data.test(client):
            ids = torch.tensor([example.ids])
            labels = ids.masked_fill(torch.arange(ids.shape[1]) < example.scored_from, -100)
            with torch.inference_mode():
                loss = float(model(input_ids=ids, labels=labels).loss)
            score += Score(loss * example.scored, example.scored)
        assert score.perplexity == pytest.approx(demo["final"]["clients"][client]["perplexity"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_output_shown_is_the_output_there_is(demo: dict[str, Any], page: str) -> None:
    [shown] = [block for block in blocks("console", page) if "$ make demo" in block]
    before, after = map(float, re.findall(r"held-out perplexity ([\d.]+) -> ([\d.]+)", shown)[0])
    assert before == pytest.approx(demo["base"]["perplexity"], rel=0.01)
    assert after == pytest.approx(demo["final"]["perplexity"], rel=0.02), "processors round differently, but not more"
    for rounds, prunes in re.findall(r"(\d+) rounds, (\d+) prunes", shown):
        assert int(rounds) == demo["rounds"]
        assert int(prunes) >= 1
    recipe = (ROOT / "Makefile").read_text("utf8").partition("\ndemo:")[2].splitlines()[1]
    assert recipe.endswith("run examples/demo.toml --report")
    assert shown.splitlines()[-2:] == [
        f"{'records:':<15} runs/demo/records.jsonl",
        f"{'report:':<15} runs/demo/report.html",
    ]


def taken_away(demo: dict[str, Any], command: str, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    """Run a command of docs/export.md on the demonstration's folder; return the lines shown and those there are."""
    [shown] = [block for block in blocks("console", "docs/export.md") if f"$ hetlora {command} " in block]
    line, _, expected = shown.partition("\n")
    folder = str(Path(demo["records"]).parent)
    arguments = [part.replace("runs/demo", folder) for part in shlex.split(line.removeprefix("$ hetlora "))]
    capsys.readouterr()
    assert cli.main(arguments) == 0
    return expected.splitlines(), capsys.readouterr().out.replace(folder, "runs/demo").splitlines()


@pytest.mark.slow
def test_what_a_tier_gets_is_what_is_shown(demo: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    shown, there = taken_away(demo, "export", capsys)
    for lines in (shown, there):
        assert re.fullmatch(r"read back:      by peft \S+ on 4 rows of the run", lines.pop(2))
        assert re.fullmatch(
            r" {16}logits up to \S+ differ by at most \S+; what was learned changes them by \S+", lines.pop(2)
        )
    assert there[:4] == shown[:4]
    for wanted, line in zip(shown[4:], there[4:], strict=True):
        for one, other in zip(wanted.split(), line.split(), strict=True):
            if re.fullmatch(r"\d+\.\d\d", one):
                assert float(other) == pytest.approx(float(one), rel=0.02), "processors round differently, but not more"
            else:
                assert other == one


@pytest.mark.slow
def test_what_is_asked_is_answered_in_the_form_shown(demo: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    shown, there = taken_away(demo, "generate", capsys)
    assert (shown[0], there[0]) == ("base:", "base:")
    before, after = (lines[lines.index("result:") + 1 :] for lines in (shown, there))
    assert before
    assert after
    assert there[1 : there.index("result:")] != after, "the base says something else"


@pytest.mark.slow
def test_the_plan_shown_is_the_plan_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [shown] = [block for block in blocks("console", "docs/costs.md") if "$ hetlora plan" in block]
    monkeypatch.chdir(ROOT)
    assert cli.main(["plan", "examples/demo.toml"]) == 0
    assert capsys.readouterr().out == shown.partition("\n")[2]


@pytest.mark.slow
def test_the_python_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    [block] = blocks("python")
    assert len(block.splitlines()) <= 15, "fifteen lines are enough"
    exec(compile(block, "README.md", "exec"), {})  # the point is to execute what readers will copy
    *_, said = capsys.readouterr().out.splitlines()
    assert len(said.split()) > 2, "something worth reading"


def test_the_toml_runs_with_a_model_and_rows_of_ones_own(tiny: str, tmp_path: Path) -> None:
    rows = [
        {"user": user, "question": f"what is {number} plus {number}?", "answer": f"it is {number + number}"}
        for user in "abcdef"
        for number in range(40)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    [block] = blocks("toml")
    config = tmp_path / "mine.toml"
    config.write_text(block.replace("your/model", tiny).replace("your/rows.jsonl", str(data)), encoding="utf8")
    changes = ["federation.rounds=2", f"output={json.dumps(str(tmp_path / 'runs'))}"]
    assert cli.main(["run", str(config), "--quiet", *(part for change in changes for part in ("--set", change))]) == 0
    assert (tmp_path / "runs/mine/adapter/adapter_config.json").is_file()


def test_the_page_of_keys_is_what_the_configuration_accepts(capsys: pytest.CaptureFixture[str]) -> None:
    namespace = runpy.run_path(str(ROOT / "tools/describe_config.py"))
    namespace["main"]()
    assert capsys.readouterr().out == (ROOT / "docs/configuration.md").read_text("utf8")
    from hetlora.config import RANK_KINDS, RunConfig

    fields = {name: info.annotation for name, info in RunConfig.model_fields.items() if name != "ranks"}
    # An optional section is a union of its model and None.
    sections = {name: next(iter(get_args(kind)), kind) for name, kind in fields.items()}
    keys = {name for name, kind in sections.items() if not hasattr(kind, "model_fields")}
    keys |= {f"{name}.{key}" for name, kind in sections.items() for key in getattr(kind, "model_fields", ())}
    assert namespace["MEANINGS"].keys() == keys, "every key has its meaning"
    from hetlora.commands.compare.grid import CompareConfig, MethodEntry

    keys = {f"compare.{key}" for key in CompareConfig.model_fields if key != "methods"}
    keys |= {f"compare.methods.{key}" for key in MethodEntry.model_fields}
    assert namespace["COMPARE_MEANINGS"].keys() == keys
    assert RANK_KINDS
    shown = [name for names, _ in namespace["GROUPS"].values() for name in names]
    parts = RunConfig.model_fields.keys() - namespace["MEANINGS"].keys()
    assert sorted(shown) == sorted({"top", "compare", *parts}), "every section is in one group"


def test_the_page_of_methods_has_every_method() -> None:
    page = (ROOT / "docs/methods.md").read_text("utf8")
    described = re.findall(r"^## (\w+)$", page, flags=re.MULTILINE)
    assert described == re.findall(r"^\| \[`(\w+)`\]", page, flags=re.MULTILINE)
    assert set(described) == METHODS.keys()


def test_every_command_and_every_link_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf8"), flags=re.MULTILINE))
    commands = [
        line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")
    ]
    made = re.findall(r"`make ([a-z-]+)`", README) + [c.split()[1] for c in commands if c.startswith("make ")]
    assert made
    assert set(made) <= targets
    for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
