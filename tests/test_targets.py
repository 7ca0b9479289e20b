"""Which modules of a base are adapted, and which are refused by name before anything is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hetlora.config import parse_config
from hetlora.config.preconditions import check_result
from hetlora.core.adapter import LoraPair, map_tensors
from hetlora.core.types import ClientUpdate, TrainTask
from hetlora.data.tokenization import Example
from hetlora.errors import ConfigError, ModelError
from hetlora.model.base_config import longest_row, longest_steady_row
from hetlora.model.full_model import FullModel
from hetlora.model.lora_model import LoraModel, build_base, load_base
from hetlora.model.merge import check_mergeable
from hetlora.model.packing import pack_rows
from hetlora.model.peft_check import check_peft_modules
from hetlora.model.peft_files import export_adapter
from hetlora.model.text_pass import check_rows
from hetlora.training.local import LocalTraining, train_clients
from proofs.small_bases import make_base
from tests.small_models import gpt2, losses_of, random_adapter

IDS = torch.randint(2, 50, (2, 9), generator=torch.Generator().manual_seed(3))


def last_parts(model: LoraModel) -> set[str]:
    return {path.rpartition(".")[2] for path in model.shapes}


def test_all_linear_is_every_linear_module_but_the_output_layer(tiny: str) -> None:
    model = LoraModel(load_base(tiny), target_modules="all-linear")
    assert last_parts(model) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(model.shapes) == 14
    assert "lm_head" not in model.target_modules
    check_peft_modules(model)
    with pytest.raises(ModelError, match="stands for all of them"):
        LoraModel(load_base(tiny), target_modules=["all-linear", "q_proj"])


def test_a_configuration_may_say_all_linear_and_no_other_word() -> None:
    def targets(value: object) -> Any:
        document = {
            "model": {"base": "nano", "target_modules": value},
            "data": {"target": "{target}"},
            "federation": {"rounds": 1, "clients_per_round": 1},
            "ranks": {"kind": "same", "rank": 4},
            "training": {"steps": 1, "learning_rate": 1e-3},
        }
        return parse_config(document).model.target_modules

    assert targets("all-linear") == ["all-linear"]
    assert targets(["q_proj"]) == ["q_proj"]
    for wrong in ("every", [], [3]):
        with pytest.raises(ConfigError, match=r"model\.target_modules"):
            targets(wrong)


def test_a_name_may_be_the_last_parts_of_a_path(tiny: str) -> None:
    model = LoraModel(load_base(tiny), target_modules=["self_attn.k_proj", "model.layers.1.mlp.up_proj"])
    assert sorted(model.shapes) == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.k_proj",
    ]
    check_peft_modules(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_output_layer_can_be_adapted(tiny: str, kind: str) -> None:
    base, plain = (load_base(tiny) if kind == "llama" else gpt2().eval() for _ in range(2))
    model = LoraModel(base, target_modules=["lm_head"], scaling=1.5)
    adapter = random_adapter(model, 2)
    model.use({path: LoraPair(torch.stack([A, 2 * A]), torch.stack([B, B])) for path, (A, B) in adapter.items()})
    ours = losses_of(model, IDS, clients=2)
    A, B = adapter["lm_head"]
    for row, factor in enumerate((1.0, 2.0)):
        with torch.no_grad():
            hidden = plain.base_model(input_ids=IDS[row : row + 1]).last_hidden_state[0, :-1]
            logits = hidden @ (plain.get_output_embeddings().weight + 1.5 * factor * B @ A).T
            theirs = nn.functional.cross_entropy(logits, IDS[row, 1:], reduction="none")
        torch.testing.assert_close(ours.view(2, -1)[row], theirs, rtol=1e-4, atol=1e-5)


def test_of_a_base_for_images_the_text_part_is_adapted_and_it_is_said() -> None:
    model = LoraModel(make_base("gemma3"))
    assert model.shapes
    assert all(".language_model." in path for path in model.shapes)
    [note] = model.notes
    assert "left as they are, because no text passes through them" in note
    check_peft_modules(model)
    with pytest.raises(ModelError, match=r"vision_tower.*no text passes through it"):
        LoraModel(make_base("gemma3"), target_modules=["fc1"])


def test_an_outline_has_the_same_modules_as_the_base(tmp_path: Path) -> None:
    for kind, targets in (("bart", None), ("gemma3", "all-linear"), ("bert", ["dense"])):
        make_base(kind).save_pretrained(tmp_path / kind)
        loaded = LoraModel(load_base(str(tmp_path / kind)), target_modules=targets)
        with FakeTensorMode():
            outline = LoraModel(build_base(str(tmp_path / kind)), target_modules=targets)
        assert loaded.shapes == outline.shapes
        assert loaded.target_modules == outline.target_modules


@pytest.mark.process  # transformers asks for ninja
def test_where_there_is_no_default_here_it_is_that_of_peft() -> None:
    assert LoraModel(make_base("rwkv")).target_modules == ("key", "value", "receptance", "output")


def test_it_is_said_that_a_hybrid_has_attention_in_few_layers() -> None:
    [note] = LoraModel(make_base("jamba")).notes
    assert note.startswith("q_proj, v_proj are in 1 of the base's 2 layers")


class Reader(nn.Module):
    """Takes a linear layer's weight without calling the layer, as the recurrence of Mamba does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.q_proj = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.q_proj.weight.T


class Sorted(nn.Module):
    """Hands a linear layer the tokens in another order, as a mixture of experts does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.q_proj = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x.flatten(0, -2).flip(0)).flip(0).view(*x.shape[:-1], -1)


class Pair(nn.Linear):
    """A linear layer that returns a tuple, as Megatron's do."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class First(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.q_proj = Pair(inner.in_features, inner.out_features, bias=False)
        self.q_proj.weight = inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x)[0]


class Stopped(nn.Module):
    """Keeps gradients from a linear layer, as the choice of what attention sees does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.q_proj = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x).detach()


@pytest.mark.parametrize(
    ("around", "reason"),
    [
        (Reader, "reads its weight without calling it"),
        (Sorted, "does not see each client's tokens side by side"),
        (First, "does not map one tensor to one tensor"),
        (Stopped, "no gradient reaches it"),
    ],
)
def test_a_module_that_cannot_be_adapted_is_refused_by_name_and_left_out_of_all(
    tiny: str, around: type[nn.Module], reason: str
) -> None:
    def base() -> Any:
        made = load_base(tiny)
        attention = made.model.layers[1].self_attn
        attention.q_proj = around(attention.q_proj)
        return made

    path = "model.layers.1.self_attn.q_proj.q_proj"
    with pytest.raises(ModelError, match=rf"{path} cannot be adapted: .*{reason}"):
        LoraModel(base(), target_modules=["q_proj"])
    model = LoraModel(base(), target_modules="all-linear")
    assert path not in model.shapes
    assert len(model.shapes) == 13
    assert reason in model.notes[0]


def test_a_wrapped_layer_passes_on_what_the_base_asks_of_it(tiny: str) -> None:
    model = LoraModel(load_base(tiny), target_modules=["q_proj"])
    layer = model.base.model.layers[0].self_attn.q_proj
    assert layer.weight is layer.base.weight
    assert layer.bias is None
    assert (layer.in_features, layer.out_features) == (32, 32)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = layer.nonsense


@pytest.mark.parametrize(
    ("kind", "targets", "reason"),
    [
        ("deepseek_v3", ["gate_proj"], "without also targeting up_proj"),
        ("deepseek_v3", ["gate_proj", "up_proj", "down_proj"], "would leave model.layers.0.mlp.down_proj"),
        ("mamba2", ["out_proj"], "Mamba-based models"),
    ],
)
def test_what_peft_would_read_as_another_adapter_is_refused(kind: str, targets: list[str], reason: str) -> None:
    model = LoraModel(make_base(kind), target_modules=targets)
    with pytest.raises(ModelError, match=reason):
        check_peft_modules(model)


def config_of(method: str) -> Any:
    return parse_config(
        {
            "data": {"target": "{target}"},
            "federation": {"rounds": 1, "clients_per_round": 1},
            "ranks": {"kind": "same", "rank": 4},
            "training": {"steps": 1, "learning_rate": 1e-3},
            "method": {"name": method},
        }
    )


def test_modules_that_share_a_weight_are_not_merged() -> None:
    model = LoraModel(make_base("zamba"))
    assert len(model.shapes) == 4
    check_peft_modules(model)
    with pytest.raises(ModelError, match=r"layers\.1\..*q_proj and .*layers\.3\..*q_proj share one weight"):
        check_mergeable(model)
    check_result(config_of("fedavg"), model)
    with pytest.raises(ModelError, match="share one weight"):
        check_result(config_of("flora"), model)
    tied = LoraModel(gpt2(), target_modules=["lm_head"])
    with pytest.raises(ModelError, match=r"wte and lm_head share one weight"):
        check_mergeable(tied)
    check_mergeable(LoraModel(gpt2()))


def test_a_whole_model_that_transformers_would_not_load_is_not_trained(tmp_path: Path) -> None:
    make_base("mllama").save_pretrained(tmp_path)
    model = FullModel(load_base(str(tmp_path)))
    with pytest.raises(ModelError, match="part of a larger model"):
        check_result(config_of("full"), model)


def test_an_adapter_that_its_names_do_not_choose_is_not_exported(tmp_path: Path) -> None:
    adapter = {"layers.0.q_proj": LoraPair(torch.ones(1, 2), torch.ones(2, 1))}
    with pytest.raises(ModelError, match=r"layers\.0\.q_proj is none of the target modules v_proj"):
        export_adapter(adapter, tmp_path, base="nano", target_modules=["v_proj"], scaling=1.0)


def test_experts_are_refused_with_the_reason() -> None:
    with pytest.raises(ModelError, match=r"experts\.gate_up_proj is a weight of several experts together"):
        LoraModel(make_base("mixtral"), target_modules=["gate_up_proj"])


def test_a_router_gives_no_logits_while_training_and_it_is_said() -> None:
    model = LoraModel(make_base("mixtral", "router"))
    assert not model.base.config.output_router_logits
    assert any("output_router_logits" in note for note in model.notes)
    assert LoraModel(make_base("mixtral")).notes == ()


def test_parameters_that_no_text_meets_stand_still_where_all_are_trained() -> None:
    model = FullModel(make_base("bart"))
    rows = [Example((5, 6, 7, 8, 9, 10), 1), Example((9, 8, 7, 6), 1)]
    task = TrainTask("a", 0, 1, model.initial_adapter(), trains="B")
    [update] = train_clients(model, [task], [rows], LocalTraining(learning_rate=1e-2, batch_size=2, steps=2))
    assert isinstance(update, ClientUpdate)
    moved = {name for name, pair in update.adapter.items() if bool(pair.B.any())}
    assert not any("encoder_attn" in name for name in moved)
    assert "model.decoder.layers.0.self_attn.q_proj.weight" in moved


def test_a_base_that_cannot_be_trained_as_a_whole_is_refused() -> None:
    with pytest.raises(ModelError, match=r"ReformerModelWithLMHead cannot be trained as a whole: .*model\.train"):
        FullModel(make_base("reformer"))


class Config:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def get_text_config(self) -> Any:
        return getattr(self, "text_config", self)


@pytest.mark.parametrize(
    ("config", "longest", "steady"),
    [
        (Config(max_position_embeddings=100), 100, None),
        (Config(max_seq_len=90), 90, None),
        (Config(context_length=80), 80, None),
        (Config(text_config=Config(n_positions=70), max_position_embeddings=5), 70, None),
        (Config(), None, None),
        (Config(max_position_embeddings=100, rope_parameters={"rope_type": "dynamic"}), 100, 100),
        (
            Config(
                max_position_embeddings=100,
                rope_parameters={"rope_type": "yarn", "original_max_position_embeddings": 9},
            ),
            100,
            None,
        ),
        (
            Config(
                max_position_embeddings=100,
                rope_parameters={
                    "full": {"rope_type": "longrope", "original_max_position_embeddings": 40},
                    "window": {},
                },
            ),
            40,
            40,
        ),
    ],
)
def test_the_longest_row_stands_under_many_names(config: Any, longest: int | None, steady: int | None) -> None:
    assert longest_row(config) == longest
    assert longest_steady_row(config) == steady


def test_rows_beyond_the_first_length_of_a_longrope_are_refused_from_python_too() -> None:
    model = LoraModel(make_base("phi3", "longrope"))
    assert model.losses(pack_rows([[Example(tuple(range(2, 66)), 1)]])).shape == (63,)
    with pytest.raises(ModelError, match="a row of 65 tokens: Phi3ForCausalLM takes 64 at most"):
        model.losses(pack_rows([[Example(tuple(range(2, 67)), 1)]]))


def test_a_base_that_cannot_do_without_masks_does_not_pack() -> None:
    assert not LoraModel(make_base("deepseek_v32"), target_modules=["o_proj"]).packs


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
def test_recurrent_bases_compute_in_16_bits(kind: str, tmp_path: Path) -> None:
    make_base(kind).save_pretrained(tmp_path)
    model, plain = (load_base(str(tmp_path), dtype=torch.bfloat16) for _ in range(2))
    wrapped = LoraModel(model, target_modules=["in_proj"])
    with torch.no_grad():
        ours = losses_of(wrapped, IDS).view(2, -1)
        logits = plain(input_ids=IDS).logits.float()
    theirs = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="none").view(
        2, -1
    )
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("kind", "dtype", "rows", "reason"),
    [
        ("xlm", torch.float32, [[5, 2, 2, 9, 2, 7], [4, 8]], "depends on the rows beside it"),
        (
            "xlstm",
            torch.bfloat16,
            [[5, 9] * 24, [4, 8]],
            "cannot compute the loss of a row of 48 tokens .* in torch.bfloat16",
        ),
    ],
)
def test_a_base_whose_rows_depend_on_each_other_is_refused(
    kind: str, dtype: torch.dtype, rows: list[list[int]], reason: str
) -> None:
    base = make_base(kind).to(dtype)
    with pytest.raises(ModelError, match=reason):
        check_rows(LoraModel(base, target_modules=["all-linear"]), rows)


def test_losses_close_to_zero_are_not_a_share_of_nothing(tiny: str) -> None:
    """A base that foretells a text has losses that are rounding."""
    model = LoraModel(load_base(tiny))
    with torch.no_grad():
        model.base.get_output_embeddings().weight.mul_(1e4)
    greedy = [5]
    with torch.inference_mode():
        for _ in range(40):
            greedy.append(int(model.base(input_ids=torch.tensor([greedy])).logits[0, -1].argmax()))
    check_rows(model, [greedy, greedy[:30], greedy[:9]])


def test_rows_of_other_bases_pass(tiny: str) -> None:
    rows = [[5, 2, 2, 9, 2, 7] * 8, [4, 8], [0, 1, 2]]
    check_rows(LoraModel(load_base(tiny)), rows)
    check_rows(LoraModel(make_base("rwkv")), rows)
    check_rows(FullModel(make_base("gpt2")), rows)


@pytest.mark.parametrize(("layers", "within"), [("last 1", {1}), ("first 1", {0}), ([0, 1], {0, 1}), ([1], {1})])
def test_some_layers_alone_are_adapted(layers: Any, within: set[int], tiny: str):
    model = LoraModel(load_base(tiny), target_modules=["q_proj", "down_proj"], layers=layers)
    assert {int(path.split(".")[2]) for path in model.shapes} == within
    assert len(model.shapes) == 2 * len(within)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: (kept.append(one.numel()), one)[1], lambda one: one):
        model.use(map_tensors(torch.Tensor.requires_grad_, model.initial_adapter(2, 0)))
        model.losses(pack_rows([[Example((3, 4, 5, 6), 1)]]))
    whole = LoraModel(load_base(tiny), target_modules=["q_proj", "down_proj"])
    everything: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda one: (everything.append(one.numel()), one)[1], lambda one: one
    ):
        whole.use(map_tensors(torch.Tensor.requires_grad_, whole.initial_adapter(2, 0)))
        whole.losses(pack_rows([[Example((3, 4, 5, 6), 1)]]))
    # Below the lowest adapted layer nothing is kept for the backward pass.
    assert (sum(kept) < 0.7 * sum(everything)) == (0 not in within)


def test_layers_that_are_not_there_are_refused(tiny: str):
    for layers, reason in (
        ("last 3", r"model\.layers = 'last 3': LlamaForCausalLM has 2 layers, from 0 to 1"),
        ([2], r"model\.layers = \[2\]: LlamaForCausalLM has 2 layers"),
    ):
        with pytest.raises(ModelError, match=reason):
            LoraModel(load_base(tiny), layers=layers)
    with pytest.raises(ModelError, match="none of the target modules is there"):
        LoraModel(load_base(tiny), target_modules=["lm_head"], layers="last 1")
    with pytest.raises(ModelError, match=r"model\.layers = 'last 1': there is no 'lm_head', a target module"):
        LoraModel(load_base(tiny), target_modules=["q_proj", "lm_head"], layers="last 1")
    for layers in ("middle 1", [], "last 0"):
        with pytest.raises(ModelError, match="give 'last 10', 'first 4' or a list of numbers from 0"):
            LoraModel(load_base(tiny), layers=layers)


def test_an_adapter_of_some_layers_is_read_by_peft_as_such(tiny: str, tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = LoraModel(load_base(tiny), layers="last 1")
    export_adapter(
        model.initial_adapter(2, 0), tmp_path, base=tiny, target_modules=model.target_modules, scaling=model.scaling
    )
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path)
    names = [name.removeprefix("base_model.model.") for name, _ in theirs.named_parameters()]
    adapted = {name.split(".lora_A")[0] for name in names if ".lora_A" in name}
    assert adapted == model.shapes.keys()
