"""The cost model against a real run: held tensors, PyTorch's FLOP counter, a sum worked by hand.

What kernels and the allocator take beyond that is another on every processor: benchmarks/costs.py measures it.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hetlora.training.cost_model
from hetlora.core.adapter import zeros
from hetlora.core.round import run_round
from hetlora.core.types import Client, ServerState
from hetlora.data.tokenization import Example
from hetlora.errors import ModelError
from hetlora.methods import METHODS
from hetlora.model.lora_model import LoraModel, load_base
from hetlora.training.cost_model import CostModel, LocalWork
from hetlora.training.local import LocalTraining, train_clients

pytestmark = pytest.mark.large

SETTINGS = LocalTraining(steps=2)
WORK = LocalWork.bound(rows=2, length=24)
BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "costs.py"
bench = SimpleNamespace(**runpy.run_path(str(BENCHMARK)))
Shape = bench.Shape


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a small GPT-2: Conv1D, learned positions, an output layer tied to the embedding."""
    return bench.gpt2(str(tmp_path_factory.mktemp("gpt2")))


def small_llama(folder: Path) -> str:
    """Write the config.json of a Llama and nothing else."""
    from transformers import LlamaConfig

    sizes = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    LlamaConfig(**sizes, num_attention_heads=2).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def costs(tiny: str) -> CostModel:
    """Of the tiny base; what it has traced for one test it need not trace for the next."""
    return CostModel(tiny, SETTINGS)


# Memory and FLOPs against a real run --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        Shape("tiny", None, rows=2, length=48),
        Shape("gpt2", None, rows=2, length=48, optimizer="sgd"),
        Shape("tiny", 8, rows=2, length=64, prompt=40, dtype=torch.bfloat16),
        Shape("tiny", 8, rows=2, length=60, recompute=True),
        *(
            pytest.param(shape, marks=pytest.mark.slow)
            for shape in (
                Shape("tiny", 1, rows=3, length=40),
                Shape("tiny", 16, rows=2, length=64, prompt=40, steps=3),
                Shape("gpt2", 8, rows=2, length=96),
                Shape("nano", 4, rows=2, length=48, prompt=20),
                Shape("tiny", 64, rows=1, length=8),
                Shape("tiny", 4, rows=2, length=48, optimizer="sgd"),
                Shape("tiny", 4, rows=2, length=48, steps=1),
                Shape("gpt2", 32, rows=6, length=32, prompt=16),
                Shape("tiny", 4, rows=40, length=64),
                Shape("nano", None, rows=1, length=64),
            )
        ),
    ],
    ids=lambda shape: f"{shape.base}-{shape.rank}-{shape.rows}x{shape.length}",
)
def test_memory_and_flops_are_those_of_a_real_run(shape, tiny: str, gpt2: str):
    shape = shape._replace(base={"tiny": tiny, "gpt2": gpt2}.get(shape.base, shape.base))
    said, was = bench.predict(shape), bench.measure(shape)
    assert said.flops == was.flops
    # Beyond the model is what the loop keeps of a client: its loss and its counts.
    assert said.peak_bytes == pytest.approx(was.peak_bytes, rel=0, abs=64)


def test_what_operations_give_is_held_and_what_their_kernels_take_is_not():
    there = torch.zeros(8)
    with bench.Held([there]) as held:
        given = (there + 1.0).view(2, 4)
        assert held.most == held.before + 32
        del given
        there.to(torch.float64)
    assert (held.before, held.most) == (32, 96)
    if torch.backends.mkldnn.is_available():
        rows, weight = torch.ones(126, 258), torch.ones(32, 258)
        with bench.Held([rows, weight]) as held:  # oneDNN packs one of them on some processors
            torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
        assert held.most - held.before == 126 * 32 * 4


def test_the_penalty_of_a_method_adds_little(tiny: str):
    """It is left out of the model: the figure must hold with it, too."""
    from hetlora.core.types import TrainTask

    method = METHODS["hetlora"](gamma=0.5, penalty=0.1, min_rank=1)
    model = LoraModel(load_base(tiny))
    task = TrainTask("client", 0, 8, model.initial_adapter(8, seed=0))
    examples = [[Example(tuple(range(2, 50)), 1)] * 2]
    settings = LocalTraining(steps=2, batch_size=2)
    there = [*model.base.parameters(), *model.base.buffers(), *(f for pair in task.adapter.values() for f in pair)]
    with bench.Held(there) as held:
        train_clients(model, [task], examples, settings, method.penalty([task]))
    said = CostModel(tiny, settings).lora(8, LocalWork.bound(2, 48)).peak_bytes
    assert said - held.before == pytest.approx(held.most - held.before, rel=0.1)


def test_recomputation_holds_less_and_computes_more():
    work = LocalWork.bound(rows=4, length=200)
    plain, again = (CostModel("nano", SETTINGS, recompute=recompute).lora(4, work) for recompute in (False, True))
    assert again.peak_bytes < 0.6 * plain.peak_bytes
    assert plain.flops < again.flops < 1.4 * plain.flops


# FLOPs worked out by hand -------------------------------------------------------------------------------------------


def llama_flops(rank: int, rows: int, length: int, scored: int) -> int:
    """Return the FLOPs of a step of the tiny Llama with factors on q_proj and v_proj, term by term."""
    hidden, inner, keys, vocabulary = 32, 48, 16, 258
    tokens = rows * length
    queries_and_output, keys_and_values, mlp = 2 * hidden * hidden, 2 * hidden * keys, 3 * hidden * inner
    linear = 2 * tokens * (queries_and_output + keys_and_values + mlp)
    product = 2 * rows * length * length * hidden  # of queries and keys, or of their scores and the values
    ins, outs = hidden + hidden, hidden + keys  # of q_proj and v_proj together
    low_rank = 2 * tokens * rank * (ins + outs)
    head = 2 * scored * hidden * vocabulary
    forward = 2 * (linear + 2 * product + low_rank) + head
    # Gradients of inputs only, for the base is frozen. Below the first layer's attention nothing is trained.
    through_first = 2 * tokens * (hidden * hidden + mlp)
    attention = 5 * product  # the scores once more, and the gradients of scores, values, queries and keys
    factors = 2 * 2 * tokens * rank * outs + 2 * tokens * rank * ins  # dB and d(Ax), dA
    into_second = 2 * tokens * rank * ins
    return forward + through_first + linear + 2 * (attention + factors) + into_second + head


@pytest.mark.parametrize(("rank", "rows", "length", "scored"), [(1, 1, 8, 7), (4, 3, 20, 30), (16, 2, 64, 126)])
def test_flops_are_those_worked_out_by_hand(costs: CostModel, rank: int, rows: int, length: int, scored: int):
    work = LocalWork(rows, length, scored, steps=5)
    assert costs.lora(rank, work).flops == 5 * llama_flops(rank, rows, length, scored)


# Parameters and bytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_bytes_are_those_a_real_round_reports(tiny: str, costs: CostModel, rank: int):
    model = LoraModel(load_base(tiny))

    class Engine:
        def train(self, tasks, _):
            yield from train_clients(model, tasks, [[Example((5, 6, 7), 1)]], LocalTraining(steps=1))

    state = ServerState(model.initial_adapter(8, seed=0))
    _, report = run_round(state, METHODS["zeropad"](), Engine(), [Client("a", rank, 1)])
    cost = costs.lora(rank, WORK)
    assert (cost.bytes_down, cost.bytes_up) == (report.bytes_down, report.clients[0].bytes_up)
    assert cost.parameters == sum(factor.numel() for pair in zeros(model.shapes, rank).values() for factor in pair)


def test_full_fine_tuning_counts_every_weight_once(gpt2: str):
    """GPT-2's output layer is its embedding."""
    base = load_base(gpt2, dtype=torch.bfloat16)
    cost = CostModel(gpt2, SETTINGS, dtype=torch.bfloat16).full(WORK)
    assert cost.parameters == sum(parameter.numel() for parameter in base.parameters())
    assert cost.bytes_up == cost.bytes_down == 2 * cost.parameters


def test_a_rank_a_module(costs: CostModel):
    paths = list(costs.model.shapes)
    uneven = {path: 1 + 3 * index for index, path in enumerate(paths)}
    cost = costs.lora(uneven, WORK)
    assert cost.parameters == sum(factor.numel() for p in zeros(costs.model.shapes, uneven).values() for factor in p)
    assert costs.lora(dict.fromkeys(paths, 5), WORK) == costs.lora(5, WORK)
    assert costs.lora(1, WORK).peak_bytes < cost.peak_bytes < costs.lora(10, WORK).peak_bytes
    assert costs.lora(1, WORK).flops < cost.flops < costs.lora(10, WORK).flops


# One trace for all ranks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["tiny", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_two_traces_foretell_every_other_rank_exactly(base: str, tiny: str, gpt2: str):
    costs = CostModel({"tiny": tiny, "gpt2": gpt2}[base], SETTINGS)
    work = LocalWork(2, 24, 30, steps=2)
    for rank in (1, 2, 33, 200):
        traced, said = costs._lora_trace(rank, work), costs.lora(rank, work)
        assert (said.peak_bytes, said.flops) == (traced.peak, 2 * traced.step_flops)


def test_what_was_traced_once_is_not_traced_again_and_whatever_decides_it_is_told_apart(
    tiny: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hetlora.training.cost_model, "_TRACES", {})

    def traced(make: Callable[[], object]) -> bool:
        kept = set(hetlora.training.cost_model._TRACES)
        make()
        return set(hetlora.training.cost_model._TRACES) != kept

    work = LocalWork.bound(1, 5, 1)
    first = CostModel(tiny, LocalTraining(steps=1)).lora(3, work)
    assert not traced(lambda: CostModel(tiny, LocalTraining(steps=9, learning_rate=0.5)).lora(3, work))
    assert CostModel(tiny, LocalTraining(steps=1)).lora(3, work) == first
    for others in (
        {"settings": LocalTraining(steps=1, optimizer="sgd")},
        {"settings": LocalTraining(steps=1, clip_norm=None)},
        {"settings": LocalTraining(steps=1, weight_decay=0.1)},
        {"target_modules": ["up_proj"]},
        {"dtype": torch.bfloat16},
    ):
        assert traced(lambda others=others: CostModel(tiny, **{"settings": SETTINGS, **others}).lora(3, work)), others
    assert traced(lambda: CostModel(tiny, SETTINGS).full(work))
    monkeypatch.setattr(hetlora.training.cost_model, "TRACES_KEPT", kept := len(hetlora.training.cost_model._TRACES))
    assert traced(lambda: CostModel(tiny, SETTINGS).full(LocalWork.bound(1, 6, 1)))
    assert len(hetlora.training.cost_model._TRACES) == kept, "it is bounded"


def test_optimiser_and_steps_matter_where_they_should(tiny: str):
    """Where the factors are most of it: AdamW keeps two numbers a parameter, and keeps them from the second step on."""

    by = {name: CostModel(tiny, LocalTraining(steps=2, optimizer=name)) for name in ("sgd", "adamw")}

    def peak(optimizer: str, steps: int, rank: int = 300) -> int:
        return by[optimizer].lora(rank, LocalWork.bound(1, 4, steps)).peak_bytes

    parameters = 300 * 2 * ((32 + 32) + (32 + 16))
    assert peak("adamw", 2) - peak("sgd", 2) == pytest.approx(2 * 4 * parameters, rel=0.1)
    assert peak("adamw", 1) <= peak("adamw", 2) == peak("adamw", 7)


def test_the_largest_rank_within_a_budget_is_the_last_that_fits(costs: CostModel):
    for budget in (costs.lora(7, WORK).peak_bytes, costs.lora(8, WORK).peak_bytes - 1):
        assert costs.largest_rank(budget, WORK, most=64) == 7
    assert costs.largest_rank(10**12, WORK, most=64) == 64
    assert costs.largest_rank(costs.lora(1, WORK).peak_bytes, WORK, most=64) == 1
    assert costs.largest_rank(costs.lora(1, WORK).peak_bytes - 1, WORK, most=64) == 0


# What it needs, and what it refuses ---------------------------------------------------------------------------------


def test_a_configuration_without_weights_is_enough_and_nothing_random_moves(tmp_path: Path):
    state = torch.get_rng_state()
    costs = CostModel(small_llama(tmp_path), SETTINGS)
    assert costs.full(WORK).peak_bytes > costs.lora(2, WORK).peak_bytes > 4 * costs.parameters
    assert torch.equal(state, torch.get_rng_state())
    assert not any(parameter.requires_grad for parameter in costs.model.base.parameters())


def test_target_modules_are_those_of_the_model(tiny: str):
    costs = CostModel(tiny, SETTINGS, target_modules=["up_proj"])
    assert costs.lora(1, WORK).parameters == 2 * (32 + 48)
    with pytest.raises(ModelError, match="'query' is no linear module"):
        CostModel(tiny, SETTINGS, target_modules=["query"])


def test_a_base_that_is_none_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        CostModel(str(tmp_path), SETTINGS)
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}', encoding="utf8")
    with pytest.raises(ModelError, match=r"cannot build the base model .*nonsense"):
        CostModel(str(tmp_path), SETTINGS)


def mixture(folder: Path, *, experts: int, chosen: int) -> CostModel:
    from transformers import MixtralConfig

    MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=experts,
        num_experts_per_tok=chosen,
    ).save_pretrained(folder)
    return CostModel(str(folder), SETTINGS)


def test_a_mixture_costs_what_its_chosen_experts_cost(tmp_path: Path):
    few, many, twice = (
        mixture(tmp_path / name, experts=experts, chosen=chosen)
        for name, experts, chosen in (("few", 4, 1), ("many", 8, 1), ("twice", 8, 2))
    )
    step = WORK.rows * WORK.length * WORK.steps
    router = 2 * 2 * step * 16 * 4  # forward and, of the hidden states alone, backward
    assert many.lora(2, WORK).flops - few.lora(2, WORK).flops == router
    assert many.parameters - few.parameters == 4 * (3 * 16 * 24 + 16)
    expert = 2 * 2 * step * 3 * 16 * 24
    assert twice.lora(2, WORK).flops - many.lora(2, WORK).flops == expert
    assert twice.lora(2, WORK).peak_bytes > many.lora(2, WORK).peak_bytes


def test_a_base_that_cannot_be_traced_is_refused(tmp_path: Path):
    """The rotary frequencies follow the longest row."""
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    LlamaConfig(**sizes, rope_parameters=rope).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot be foretold.*Measure a run"):
        CostModel(str(tmp_path), SETTINGS).lora(1, WORK)


@pytest.mark.parametrize("numbers", [(0, 8, 0, 1), (2, 8, 15, 1), (2, 8, -1, 1), (2, 8, 3, 0)])
def test_work_that_cannot_be_is_refused(numbers: tuple[int, int, int, int]):
    with pytest.raises(ValueError, match="scored is at most"):
        LocalWork(*numbers)
