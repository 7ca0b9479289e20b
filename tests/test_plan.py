"""`hetlora plan`: its prediction equals the run's cost, without weights and in seconds."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from hetlora.cli import main
from hetlora.config import load_config
from hetlora.config.build import assign_ranks
from hetlora.core.round import run_rounds
from hetlora.core.sampling import sample_cohort
from hetlora.core.types import ServerState
from hetlora.errors import ConfigError
from hetlora.runs.display import QuietDisplay
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.training.cost_model import CostModel, LocalWork
from hetlora.training.local import LocalTraining
from proofs.small_run import document
from small_federations import phones

pytestmark = pytest.mark.run

BENCHMARK = runpy.run_path(str(Path(__file__).resolve().parent.parent / "benchmarks" / "costs.py"))
ROWS = {"phone-1": 3, "tablet-2": 14, "phone-2": 5, "tablet-1": 9}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with rows of different lengths, four clients of different sizes."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "device": client,
            "split": "test" if number == 0 else "train",
            "question": f"{'what ' * (1 + number % 4)}{number}?",
            "answer": f"{'it ' * (1 + 3 * number % 5)}{client}",
        }
        for client, count in ROWS.items()
        for number in range(count + 1)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return tmp_path


def write(base: str) -> Path:
    path = Path("run.toml")
    data = {**document("runs")["data"], "max_length": 64}
    federation = {"rounds": 3, "clients_per_round": 3}
    text = phones(
        base, data=data, federation=federation, method={"gamma": 1.0}, training={"epochs": 1, "batch_size": 3}
    )
    path.write_text(text, encoding="utf8")
    return path


def plan(capsys: pytest.CaptureFixture[str], base: str, *changes: str, flags: tuple[str, ...] = ()) -> dict[str, Any]:
    options = [part for change in changes for part in ("--set", change)]
    assert main(["plan", str(write(base)), "--json", *flags, *options]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], base: str, *changes: str) -> str:
    options = [part for change in changes for part in ("--set", change)]
    assert main(["plan", str(write(base)), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def memory(*megabytes: float, most: int = 16) -> str:
    tiers = ", ".join(f"{{ megabytes = {size}, share = {1 / len(megabytes)} }}" for size in megabytes)
    return f'ranks={{ kind = "memory", max = {most}, tiers = [{tiers}] }}'


# What it says is what a run takes -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("place")
def test_the_totals_are_those_of_the_run(tiny: str, capsys: pytest.CaptureFixture[str]):
    said = plan(capsys, tiny)
    experiment = LocalExperiment(load_config(write(tiny)), QuietDisplay())
    experiment.engine.group_size = 1  # attention pads rows of several clients to the longest of a block
    state = ServerState(experiment.model.initial_adapter(experiment.max_rank, seed=0))
    counter = FlopCounterMode(display=False, custom_mapping=BENCHMARK["UNCOUNTED"])
    with counter:
        rounds = run_rounds(
            state, experiment.method, experiment.engine, lambda n: sample_cohort(experiment.clients, 3, n, 0), 3
        )
        reports = [report for _, report in rounds]
    assert said["total"]["bytes_down"] == sum(report.bytes_down for report in reports)
    assert said["total"]["bytes_up"] == sum(client.bytes_up for report in reports for client in report.clients)
    assert said["total"]["flops"] == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.usefixtures("place")
def test_a_row_a_tier_and_one_for_full_fine_tuning(tiny: str, capsys: pytest.CaptureFixture[str]):
    said = plan(capsys, tiny)
    slot = 2 * ((32 + 32) + (32 + 16))  # both layers' q_proj and v_proj
    assert [(tier["tier"], tier["clients"], tier["parameters"]) for tier in said["tiers"]] == [
        ("2", 2, 2 * slot),
        ("4", 2, 4 * slot),
    ]
    whole = CostModel(tiny, LocalTraining(steps=1)).parameters
    assert (said["full"]["clients"], said["full"]["parameters"], said["full"]["share"]) == (4, whole, 1.0)
    assert said["tiers"][0]["share"] == pytest.approx(2 * slot / whole)
    assert said["full_total"]["bytes_up"] == 3 * 3 * 4 * whole
    thin, thick = said["tiers"]
    assert thin["peak_bytes"] < thick["peak_bytes"] < said["full"]["peak_bytes"]


@pytest.mark.usefixtures("place")
def test_the_plan_is_that_of_the_method(tiny: str, capsys: pytest.CaptureFixture[str]):
    """A layer's q_proj is [32, 32], its v_proj [16, 32], so that a slot of B is 48 numbers a layer."""
    one = "training={steps=1, batch_size=3}"  # half of the work to foretell
    ffa = plan(capsys, tiny, "method={name='ffa_lora'}", one)
    assert [tier["parameters"] for tier in ffa["tiers"]] == [2 * 2 * 48, 4 * 2 * 48]
    assert ffa["tiers"][0]["bytes_up"] == ffa["tiers"][0]["bytes_down"] == 4 * 2 * 2 * 48
    full = plan(capsys, tiny, "method={name='full'}", one)
    assert full["total"] == full["full_total"]
    central, base = plan(capsys, tiny, "method={name='central'}"), plan(capsys, tiny)
    slot = 2 * ((32 + 32) + (32 + 16))
    assert central["total"]["bytes_up"] == 3 * 4 * 4 * slot, "three rounds of one client of rank 4"
    assert central["total"]["flops"] == pytest.approx(base["total"]["flops"], rel=1e-6)
    assert [tier["clients"] for tier in central["tiers"]] == [1]
    assert (plan(capsys, tiny, "method={name='flora'}", one)["folds"], base["folds"]) == (True, False)
    nobody = plan(capsys, tiny, "method={name='zeroshot'}")
    assert nobody["total"] == {"bytes_down": 0, "bytes_up": 0, "flops": 0}
    assert nobody["tiers"][0]["parameters"] == 0
    assert nobody["full_total"] == base["full_total"]


@pytest.mark.usefixtures("place")
def test_a_timed_step_says_how_long_this_machine_trains(tiny: str, capsys: pytest.CaptureFixture[str]):
    one = ["training={steps=1, batch_size=3}", "federation.rounds=1"]
    assert plan(capsys, tiny, *one)["seconds"] is None
    command = ["plan", "run.toml", "--time", "--bound", "--set", f"model.base={tiny}"]
    assert main([*command, *(part for change in one for part in ("--set", change))]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^on this machine: training takes about \d+ s, by a timed step", out, re.MULTILINE)
    doing = ["reading the rows of ", "counting the costs of ", "loading "]
    assert [line.startswith(begin) for line, begin in zip(err.splitlines(), doing, strict=True)] == [True] * 3
    assert main([*command, "--json", "--set", "method={name='zeroshot'}"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] == 0.0


@pytest.mark.usefixtures("place")
def test_the_memory_is_that_of_the_largest_step(tiny: str, capsys: pytest.CaptureFixture[str]):
    """Three full rows at the length of the longest one, the most tokens that three rows of a client have scored."""
    said = plan(capsys, tiny)
    data = LocalExperiment(load_config(write(tiny)), QuietDisplay()).data
    examples = {name: data.train(name) for name in ROWS}
    longest = max(len(example.ids) for own in examples.values() for example in own)
    scored = max(sum(sorted(example.scored for example in own)[-3:]) for own in examples.values())
    assert (said["rows_from"], said["rows"], said["length"], said["scored"]) == ("data", 3, longest, scored)
    cost = CostModel(tiny, LocalTraining(epochs=1)).lora(4, LocalWork(3, longest, scored, 2))
    assert said["tiers"][1]["peak_bytes"] == cost.peak_bytes


@pytest.mark.usefixtures("place")
def test_the_bound_is_above_what_is_measured(tiny: str, capsys: pytest.CaptureFixture[str]):
    measured, bound = plan(capsys, tiny), plan(capsys, tiny, flags=("--bound",))
    assert (bound["rows_from"], bound["rows"], bound["length"], bound["scored"]) == ("bound", 3, 64, 3 * 63)
    assert "upper bound" in bound["why"]
    for less, more in zip([*measured["tiers"], measured["full"]], [*bound["tiers"], bound["full"]], strict=True):
        assert less["flops"] < more["flops"]
        assert less["peak_bytes"] < more["peak_bytes"]
        assert less["bytes_up"] == more["bytes_up"]


@pytest.mark.usefixtures("place")
def test_it_prints_a_table(tiny: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", str(write(tiny))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["rank", "clients"]
    assert [line.split()[0] for line in lines[2:5]] == ["2", "4", "full"]
    assert len({len(line) for line in lines[1:5]}) == 1, "columns are aligned"
    assert "measured on the rows" in lines[5]
    assert lines[7].startswith("all 3 rounds of 3 clients:")
    assert not Path("runs").exists()


# A base of any size, without its weights ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_base_of_seven_billion_parameters_needs_its_configuration_only(
    place: Path, capsys: pytest.CaptureFixture[str]
):
    from transformers import LlamaConfig

    base = str(place / "llama-7b")
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    LlamaConfig(vocab_size=32_000, **sizes).save_pretrained(base)
    said = plan(capsys, base, "model.dtype=bfloat16", "training={steps=1, batch_size=3}")
    assert said["full"]["parameters"] == 6_738_415_616  # Llama's published size
    assert said["tiers"][0]["parameters"] == 2 * 32 * 2 * (4096 + 4096)
    assert (said["rows_from"], said["length"]) == ("bound", 64)
    assert "no tokenizer" in said["why"]
    assert 13.4e9 < said["tiers"][0]["peak_bytes"] < 17e9
    assert 4 * 13.4e9 < said["full"]["peak_bytes"] < 60e9


# Ranks by memory ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("place")
def test_a_memory_gives_the_largest_rank_that_fits(tiny: str, capsys: pytest.CaptureFixture[str]):
    costs, work = CostModel(tiny, LocalTraining(epochs=1)), LocalWork.bound(3, 64)
    small, large = (costs.lora(rank, work).peak_bytes / 1e6 for rank in (3, 7))
    config = load_config(write(tiny), [memory(small, large)])
    assert sorted(assign_ranks(config, ROWS).values()) == [3, 3, 7, 7]
    assert sorted(assign_ranks(load_config(write(tiny), [memory(small, 900.0)]), ROWS).values()) == [3, 3, 16, 16]
    assert [tier["tier"] for tier in plan(capsys, tiny, memory(small, large))["tiers"]] == ["3", "7"]
    assert LocalExperiment(config, QuietDisplay()).max_rank == 7, "the global adapter has the ranks that were assigned"


@pytest.mark.usefixtures("place")
def test_memories_too_small_for_rank_1_are_refused_with_what_it_needs(tiny: str, capsys: pytest.CaptureFixture[str]):
    error = refusal(capsys, tiny, memory(0.2, 900.0, 0.1))
    assert "2 problems" in error
    assert "ranks.tiers.0.megabytes = 0.2: rank 1 needs " in error
    assert "ranks.tiers.2.megabytes = 0.1: rank 1 needs " in error
    needed = float(error.split("rank 1 needs ")[1].split(" MB")[0])
    assert assign_ranks(load_config(write(tiny), [memory(needed)]), ROWS)
    with pytest.raises(ConfigError, match="rank 1 needs"):
        assign_ranks(load_config(write(tiny), [memory(needed - 0.1)]), ROWS)


# Ranks by other rules, as the configuration gives them --------------------------------------------------------------


@pytest.mark.usefixtures("place")
def test_ranks_by_examples_and_normal_ranks_reach_the_clients(tiny: str):
    by_examples = 'ranks={ kind = "by-examples", min = 2, max = 8 }'
    assert list(assign_ranks(load_config(write(tiny), [by_examples]), ROWS).values()) == [2, 8, 4, 6]
    fewer = 'ranks={ kind = "by-examples", min = 2, max = 8, order = "decreasing" }'
    assert LocalExperiment(load_config(write(tiny), [fewer]), QuietDisplay()).clients[0].rank == 8
    normal = 'ranks={ kind = "normal", min = 2, max = 8, mean = 5, std = 0.01 }'
    assert set(assign_ranks(load_config(write(tiny), [normal]), ROWS).values()) == {5}


# What it refuses ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("place")
def test_what_a_run_refuses_is_refused_here_too(tiny: str, capsys: pytest.CaptureFixture[str]):
    assert "data.max_length = 513" in refusal(capsys, tiny, "data.max_length=513")
    assert "the data have 4 clients" in refusal(capsys, tiny, "federation.clients_per_round=5")
    assert "'norm' is no linear module" in refusal(capsys, tiny, 'model.target_modules=["norm"]')
    assert "is not a folder" in refusal(capsys, "/no/such/base")


@pytest.mark.usefixtures("place")
def test_the_memory_with_recomputed_layers_and_without_and_what_fits(tiny: str, capsys: pytest.CaptureFixture[str]):
    run = str(write(tiny))
    assert main(["plan", run, "--memory", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    plain, again = said["needs"]
    assert (plain["recompute"], again["recompute"]) == (False, True)
    assert again["peak_bytes"] < plain["peak_bytes"]
    work = LocalWork.bound(rows=3, length=64)
    assert (
        plain["peak_bytes"] == CostModel(tiny, LocalTraining(steps=2, batch_size=3)).lora(said["rank"], work).peak_bytes
    )
    assert plain["ranks"] == [said["most"]] * 3
    assert main(["plan", run, "--memory", "--time"]) == 2
    assert "leave --bound and --time away" in capsys.readouterr().err
    assert main(["plan", run, "--memory", "--set", "method.name=full"]) == 2
