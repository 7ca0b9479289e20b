"""The tokens of a row are those of its text as a whole, and those that TRL makes of it, whatever the tokenizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawn_examples import examples
from hetlora.data import Conversation, Example, Row, Tokenization
from hetlora.data.seam import encode, split_ids
from hetlora.model.lora_model import load_tokenizer
from small_tokenizers import KINDS, save

pytestmark = pytest.mark.run

PAIRS = [
    ("Q: The capital of Norway?\nA:", " Oslo."),
    ("Q: The capital of Norway?\nA: ", "Oslo."),
    ("Question: 1 + 1?\n", "Answer: two"),
    ("12", "34"),
    ("naïve ", "café 漢字 🙂"),
    ("a  b ", "  c "),
    ("cap", "ital"),
    ("It", "'s"),
    ("caf", "e\u0301"),
    ("🙂", "\u200d🙂"),
]
DIALOGUES = [
    [("user", "The capital of Norway?"), ("assistant", "Oslo.")],
    [("user", "1 + 1?"), ("assistant", "two"), ("user", "naïve café?"), ("assistant", "漢字 🙂")],
]


@pytest.fixture(scope="module", params=sorted(KINDS))
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(save(request.param, tmp_path_factory.mktemp("tokenizers")))


@pytest.mark.parametrize("pair", PAIRS, ids=repr)
def test_the_tokens_are_those_of_the_text_and_all_of_the_target_is_scored(tokenizer: Any, pair: tuple[str, str]):
    ids = split_ids(tokenizer, pair[0], "".join(pair))
    assert (*ids.prompt, *ids.target) == encode(tokenizer, "".join(pair))
    if ids.clean:
        assert ids.prompt == encode(tokenizer, pair[0])
    else:
        inside = tokenizer.decode(ids.prompt).strip()
        assert pair[0].strip().startswith(inside), "what is not scored is of the prompt alone"


@examples(40)
@given(prompt=st.text(max_size=12), target=st.text(min_size=1, max_size=12))
def test_whatever_the_text_nothing_of_the_target_is_unscored(tokenizer: Any, prompt: str, target: str):
    ids = split_ids(tokenizer, prompt, prompt + target)
    assert (*ids.prompt, *ids.target) == encode(tokenizer, prompt + target)
    offsets = tokenizer(prompt + target, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if not ids.clean:
        assert all(end <= len(prompt) for _, end in offsets[: len(ids.prompt)]), (
            "no unscored token reaches into the target"
        )


def test_a_dummy_space_stands_once(tmp_path: Path):
    """Tokenized apart, the target would begin with a space of its own."""
    tokenizer = load_tokenizer(save("llama2_like", tmp_path))
    (example,) = Tokenization(tokenizer, 64).examples([Row("Norway is", " Oslo")])
    text = tokenizer.decode(example.ids, skip_special_tokens=True)
    assert text.strip() == "Norway is Oslo"
    assert encode(tokenizer, " Oslo") not in [example.ids[example.scored_from : -1]]


def test_a_token_over_the_border_is_scored_and_counted(tmp_path: Path):
    tokenizer = load_tokenizer(save("gpt2_like", tmp_path))
    tokenization = Tokenization(tokenizer, 64)
    (example,) = tokenization.examples([Row("The cap", "ital of Norway")])
    assert tokenization.unclean == 1
    assert tokenizer.decode(example.ids[: example.scored_from]) == "The"
    assert tokenizer.decode(example.ids[example.scored_from : -1]) == " capital of Norway"


class _WithoutOffsets:
    """A tokenizer without offsets, as those written in Python are."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str, **options: Any) -> Any:
        assert not options.pop("return_offsets_mapping", False)
        return self._tokenizer(text, **options)


@pytest.mark.parametrize("pair", PAIRS, ids=repr)
def test_without_offsets_the_tokens_are_the_same_and_no_fewer_are_scored(tokenizer: Any, pair: tuple[str, str]):
    bare: Any = _WithoutOffsets(tokenizer)
    without, ids = split_ids(bare, pair[0], "".join(pair)), split_ids(tokenizer, pair[0], "".join(pair))
    assert (*without.prompt, *without.target) == (*ids.prompt, *ids.target)
    assert (len(without.prompt), without.clean) <= (len(ids.prompt), ids.clean)


# TRL ----------------------------------------------------------------------------------------------------------------


def as_messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def of_trl(folders: list[str]) -> dict[str, dict[str, list[dict[str, list[int]]]]]:
    plain = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    turns = [{"prompt": as_messages(own[:-1]), "completion": as_messages(own[-1:])} for own in DIALOGUES]
    whole = [{"messages": as_messages(own)} for own in DIALOGUES[:1]]
    asked = {
        "folders": folders,
        "rows": {"plain": (plain, {}), "turns": (turns, {}), "assistant": (whole, {"assistant_only_loss": True})},
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("trl_rows.py"))],
        input=json.dumps(asked), capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def labelled(example: Example) -> dict[str, list[int]]:
    ids = list(example.ids)
    return {"input_ids": ids, "labels": [-100] * example.scored_from + ids[example.scored_from :]}


@pytest.mark.process
def test_trl_makes_the_same_tokens_and_scores_the_same_of_them(tmp_path: Path):
    """Prompt and completion as text and as turns, and whole conversations of which the answers alone are scored.

    TRL cuts where the prompt's own tokens end, even where they are no beginning of the text's; such rows are compared by their
    tokens alone. Of a conversation as a whole, TRL does not score the line break behind the end of a turn.
    """
    pytest.importorskip("trl")
    folders = {kind: save(kind, tmp_path) for kind in KINDS}
    theirs = of_trl(list(folders.values()))
    compared = 0
    for kind, folder in folders.items():
        tokenizer = load_tokenizer(folder)
        for pair, row in zip(PAIRS, theirs[folder]["plain"], strict=True):
            tokenization = Tokenization(tokenizer, 512)
            (example,) = tokenization.examples([Row(*pair)])
            ours = labelled(example)
            assert ours["input_ids"] == row["input_ids"], (kind, pair)
            assert tokenization.unclean or ours == row, (kind, pair)
            compared += not tokenization.unclean
        for turns, row in zip(DIALOGUES, theirs[folder]["turns"], strict=True):
            tokenization = Tokenization(tokenizer, 512)
            last = Conversation("m", scored="last").rows({"m": as_messages(turns)}, "")
            ours = labelled(tokenization.examples(last)[0])
            assert ours["input_ids"] == row["input_ids"], (kind, turns)
            assert tokenization.unclean or ours == row, (kind, turns)
            compared += not tokenization.unclean
        (row,) = theirs[folder]["assistant"]
        (example,) = Tokenization(tokenizer, 512).examples(Conversation("m").rows({"m": as_messages(DIALOGUES[0])}, ""))
        ours = labelled(example)
        assert ours["input_ids"] == row["input_ids"], kind
        differ = [place for place, (a, b) in enumerate(zip(ours["labels"], row["labels"], strict=True)) if a != b]
        assert {tokenizer.decode([ours["input_ids"][place]]).strip() for place in differ} <= {""}, kind
    assert compared >= 30, compared
