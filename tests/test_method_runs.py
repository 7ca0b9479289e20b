"""Every method in a whole run: two rounds on a tiny base, the output loads, and a second run is equal."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hetlora.cli import main
from hetlora.config import RunConfig, parse_config
from hetlora.errors import ConfigError
from hetlora.methods import METHODS, averaged, fedprox, hetlora
from hetlora.model.lora_model import load_base
from hetlora.runs.display import QuietDisplay
from hetlora.runs.local_experiment import LocalExperiment, RunResult
from hetlora.runs.records import read_records
from hetlora.training.evaluation import client_scores
from proofs.small_run import CLIENTS, document, write_rows

pytestmark = pytest.mark.run

ONE_RANK, PERSONAL, MERGED = {"fedavg", "fedit"}, {"fedsa_lora", "local"}, {"flora", "fedex_lora", "full"}
IDS = torch.arange(2, 22).view(2, 10)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four rows of four clients."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path)
    return path


def config_of(name: str, tiny: str, rows: Path, output: Path, **changes: Any) -> RunConfig:
    sections: dict[str, Any] = {
        "name": name,
        "model": {"base": tiny, "device": "cpu"},
        "data": {**document("")["data"], "path": str(rows)},
        "federation": {"rounds": 2, "clients_per_round": 3},
        "method": {"name": name, **({"gamma": 0.5, "penalty": 5.0, "min_rank": 1} if name == "hetlora" else {})},
        "training": {"steps": 3, "batch_size": 2, "learning_rate": 1e-2},
        "evaluation": {"every": 1},
        **({"ranks": {"kind": "same", "rank": 4}} if name in ONE_RANK else {}),
    }
    return parse_config(document(str(output), **{**sections, **changes}), "the configuration of a test")


def run_once(name: str, tiny: str, rows: Path, output: Path, **changes: Any) -> tuple[LocalExperiment, RunResult]:
    experiment = LocalExperiment(config_of(name, tiny, rows, output, **changes), QuietDisplay())
    return experiment, experiment.run()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def loaded(base: str, folder: Path) -> nn.Module:
    """What a user would load: a whole model, or PEFT files over the base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if folder.name == "model":
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    return PeftModel.from_pretrained(load_base(base), str(folder)).eval()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def timeless(records: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [{key: value for key, value in record.items() if key not in ("seconds", "config")} for record in records]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_and_what_it_writes_computes_as_what_was_measured(
    name: str, tiny: str, rows: Path, tmp_path: Path
) -> None:
    experiment, result = run_once(name, tiny, rows, tmp_path)
    state, folded = result.state, result.state.folded.delta
    assert result.failures == 0
    assert result.final is not None
    assert math.isfinite(result.final.overall.perplexity or math.nan)
    if name == "zeroshot":
        assert (result.rounds, result.updates, result.adapter) == (0, 0, None)
        assert result.final == result.base
        return
    assert (result.rounds, result.updates) == (2, 2 if name == "central" else 6)
    assert result.final.overall.perplexity < result.base.overall.perplexity, "three steps a round help"
    assert (result.bytes_up == 0) == (name == "local")
    if name in PERSONAL:
        assert result.adapter.name == "adapters"
        folders = {path.name for path in result.adapter.iterdir()}
        index = json.loads((result.adapter / "index.json").read_text("utf8"))
        assert index.keys() == state.kept.keys()
        assert folders == {*index.values(), "index.json"}
        for client in experiment.clients:
            if client.name in state.kept:
                experiment.model.use(experiment.method.distribute(state, client).adapter)
                ours = logits(experiment.model.base)
                theirs = logits(loaded(tiny, result.adapter / index[client.name]))
                torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
        return
    assert result.adapter.name == ("model" if name in MERGED else "adapter")
    experiment.model.use(state.owned_slots(experiment.trainers), folded)
    ours, plain = logits(experiment.model.base), logits(load_base(tiny))
    torch.testing.assert_close(logits(loaded(tiny, result.adapter)), ours, rtol=1e-4, atol=1e-4)
    assert float((ours - plain).abs().max()) > 1e-3


TWICE = ("hetlora", "flexlora", "flora", "fedsa_lora")
"""Methods of every kind: factors averaged, products redistributed, products folded, factors of a client's own."""


@pytest.mark.parametrize(
    "name", [name if name in TWICE else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_a_second_run_is_the_same_bit_for_bit(name: str, tiny: str, rows: Path, tmp_path: Path) -> None:
    (_, one), (_, other) = (run_once(name, tiny, rows, tmp_path / side) for side in ("one", "other"))
    assert timeless(read_records(one.records)) == timeless(read_records(other.records))
    assert (one.base, one.final, one.bytes_up, one.bytes_down) == (
        other.base,
        other.final,
        other.bytes_up,
        other.bytes_down,
    )
    if one.adapter is not None:
        assert files_of(one.adapter) == files_of(other.adapter)


@pytest.mark.parametrize("name", sorted(PERSONAL))
def test_personal_methods_measure_each_client_under_its_own_adapter(
    name: str, tiny: str, rows: Path, tmp_path: Path
) -> None:
    experiment, result = run_once(name, tiny, rows, tmp_path, federation={"rounds": 1, "clients_per_round": 3})
    assert result.final is not None
    [absent] = {client.name for client in experiment.clients} - result.state.kept.keys()
    for client in experiment.clients:
        own = experiment.method.distribute(result.state, client).adapter
        alone = client_scores(experiment.model, experiment.data, [client.name], own, None)
        assert result.final.clients[client.name] == alone[client.name]
        for other in experiment.clients:
            if client.name != absent and other.name not in (absent, client.name):
                theirs = experiment.method.distribute(result.state, other).adapter
                [score] = client_scores(experiment.model, experiment.data, [client.name], theirs, None).values()
                assert score != result.final.clients[client.name], "another client's adapter scores otherwise"
    # Who never trained has the base, to the rounding of rows that were scored beside others: 1e-6 of a logit of float32, tens
    # of which are in a loss.
    expected = result.base.clients[absent].perplexity
    assert result.final.clients[absent].perplexity == pytest.approx(expected, rel=1e-5)


def test_the_pooled_run_has_one_client_with_the_rows_and_steps_of_all(tiny: str, rows: Path, tmp_path: Path) -> None:
    experiment, result = run_once("central", tiny, rows, tmp_path)
    [record, *_] = [r for r in read_records(result.records) if r["kind"] == "round"]
    assert record["ranks"] == {"everyone": 4}
    assert record["clients"]["everyone"]["examples"] == 16
    assert record["clients"]["everyone"]["steps"] == 3 * 3
    assert len(experiment.engine.data.train("everyone")) == 16
    assert result.final.clients.keys() == set(CLIENTS)


def test_wrappers_and_drop_outs_act_in_a_run(tiny: str, rows: Path, tmp_path: Path) -> None:
    training = {"steps": 3, "batch_size": 2, "learning_rate": 1e-2}
    _, plain = run_once("zeropad", tiny, rows, tmp_path)
    _, near = run_once("zeropad", tiny, rows, tmp_path, training={**training, "proximal": 100.0})
    _, server = run_once("zeropad", tiny, rows, tmp_path, server_optimizer={"name": "momentum", "learning_rate": 0.5})
    federation = {"rounds": 2, "clients_per_round": 4, "dropout": 0.5}
    _, fewer = run_once("zeropad", tiny, rows, tmp_path, federation=federation)

    def size(result: RunResult) -> float:
        return sum(float(pair.B.norm()) for pair in result.state.adapter.values())

    assert size(near) < 0.7 * size(plain), "a large mu holds clients back"
    assert server.state.moments.keys() == {"first"}
    assert size(server) != size(plain)
    assert (fewer.updates, fewer.failures) == (4, 4)
    reasons = {reason for r in read_records(fewer.records) if r["kind"] == "round" for reason in r["failures"].values()}
    assert reasons == {"dropped out before training"}


@pytest.mark.parametrize("name", METHODS)
def test_a_configuration_refuses_a_wrapper_with_the_methods_reason(name: str, tiny: str, rows: Path) -> None:
    refuses = METHODS[name]().refuses
    server = {"server_optimizer": {"name": "adam", "learning_rate": 0.1}}
    proximal = {"training": {"steps": 1, "proximal": 0.1}}
    for wrapper, changes in (("server_optimizer", server), ("proximal", proximal)):
        if wrapper in refuses:
            with pytest.raises(ConfigError) as caught:
                config_of(name, tiny, rows, Path("out"), **changes)
            assert refuses[wrapper] in str(caught.value)
        else:
            config_of(name, tiny, rows, Path("out"), **changes)


# hetlora methods -----------------------------------------------------------------------------------------------------


def test_the_command_lists_every_method_with_a_line_and_a_reference(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed] == list(METHODS)
    for entry in listed:
        assert len(entry["line"].split()) > 3
        assert entry["line"].endswith(".")
        assert entry["reference"]
        METHODS[entry["name"]](**entry["arguments"])
    cited = {entry["name"] for entry in listed if "arXiv" in entry["reference"]}
    assert METHODS.keys() - cited == {"local", "carryover", "principal"}, "the others have a paper"


def test_a_wrapper_adds_its_reference_to_that_of_the_method() -> None:
    method = fedprox(averaged(hetlora(), power=3.0), mu=0.1)
    assert re.findall(r"arXiv ([\d.]+)\.", method.reference) == ["2401.06432", "1212.1824", "1812.06127"]
    assert fedprox(replace(hetlora(), reference=""), mu=0.1).reference.startswith("Li et al.")
