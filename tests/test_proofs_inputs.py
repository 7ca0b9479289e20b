"""`make prove-inputs` in small, that it detects planted faults, and hypothesis on the documents."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawn_examples import examples
from hetlora.config import RunConfig, parse_config, parse_run_config
from hetlora.errors import ConfigError
from processes import HANGS
from proofs import inputs

# The library of data sets leaves a file that it cannot read open.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"),
]

TRIALS = {"document": 120, "toml": 120, "comparison": 40, "rows": 60, "folder": 2, "data": 6, "resume": 8}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> inputs.Bench:
    """A folder to try in; a machine that does other things, too, may take its time."""
    monkeypatch.setattr(inputs, "SECONDS", HANGS)
    monkeypatch.chdir(tmp_path)
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return inputs.Bench(tmp_path)


def test_every_kind_is_tried():
    assert TRIALS.keys() == inputs.TRIALS.keys() == inputs.WEIGHTS.keys()


@pytest.mark.parametrize("kind", TRIALS)
def test_whatever_a_file_holds_the_outcome_is_a_run_or_one_message(bench: inputs.Bench, kind: str):
    assert [failure for seed in range(TRIALS[kind]) if (failure := inputs.failure_of(kind, seed, bench))] == []


def test_its_last_line_is_its_figures(capsys: pytest.CaptureFixture[str]):
    assert inputs.main(["--trials", "2", "--seed", "5", "--kind", "document"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["proof"], last["trials"], last["failures"], last["seed"]) == ("inputs", 2, 0, 5)


# It can fail --------------------------------------------------------------------------------------------------------


def failures(bench: inputs.Bench, kind: str, trials: int) -> Iterator[str]:
    """Yield what a planted fault makes of some trials, as long as it is asked for; each says what repeats it."""
    for seed in range(trials):
        failure = inputs.failure_of(kind, seed, bench)
        if failure is not None:
            assert f"--kind {kind} --trials 1 --seed {seed}" in failure
            assert inputs.failure_of(kind, seed, bench) is not None, "it repeats"
            yield failure


def test_an_error_of_another_kind_is_reported(bench: inputs.Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hetlora.config.reading._NOT_TOML", (RecursionError,))
    assert any("UnicodeDecodeError" in failure for failure in failures(bench, "toml", 50))


def test_a_message_that_a_terminal_would_obey_is_reported(bench: inputs.Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hetlora.errors.printable", lambda text: text)
    assert any("a terminal would obey" in failure for failure in failures(bench, "document", 120))


def test_what_takes_too_long_is_reported(bench: inputs.Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inputs, "SECONDS", 1.0)
    monkeypatch.setattr("hetlora.config.reading.cross_section_problems", lambda _: time.sleep(HANGS))
    assert any("TimeoutError" in failure for failure in failures(bench, "document", 2))


def test_a_configuration_that_is_not_read_again_is_reported(bench: inputs.Bench, monkeypatch: pytest.MonkeyPatch):
    other = parse_config(inputs.DOCUMENTS[2])
    monkeypatch.setattr("hetlora.config.parse_run_config", lambda *_: other)
    assert any("not read again" in failure for failure in failures(bench, "document", 50))


def test_a_command_that_breaks_on_a_spoiled_folder_is_reported(bench: inputs.Bench, monkeypatch: pytest.MonkeyPatch):
    assert bench.run.is_dir()
    monkeypatch.setattr(
        "hetlora.runs.local_experiment.read_config",
        lambda folder: RunConfig.model_validate(json.loads((folder / "config.json").read_bytes())),
    )
    assert any(failures(bench, "resume", 12))


# Hypothesis ---------------------------------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
SECTIONS = ["model", "data", "partition", "federation", "ranks", "method", "training", "server_optimizer", "evaluation"]


@given(st.dictionaries(st.sampled_from([*SECTIONS, "name", "seed", "output", "flower", "threads"]), PLAIN))
@examples(150)
def test_any_plain_data_is_a_run_or_a_configuration_error(document: dict[str, Any]):
    with pytest.raises(ConfigError) as caught:
        parse_config(document)  # never a whole run: rounds, a rank and steps would have to be right at once
    inputs.obeyed(str(caught.value))


@given(st.sampled_from([0, 2]), st.sampled_from(SECTIONS), st.text(max_size=12), PLAIN)
@examples(150)
def test_a_run_with_any_key_more_is_a_run_or_a_configuration_error(which: int, section: str, key: str, value: Any):
    document = dict(inputs.DOCUMENTS[which])
    document[section] = {**document.get(section, {}), key: value}
    try:
        config = parse_config(document)
    except ConfigError as error:
        inputs.obeyed(str(error))
    else:
        assert parse_run_config(config.model_dump_json(), "itself") == config


@given(st.text(max_size=200) | PLAIN.map(lambda value: json.dumps(value)))
@examples(150)
def test_any_text_is_no_written_run(text: str):
    with pytest.raises(ConfigError):
        parse_run_config(text, "config.json")
