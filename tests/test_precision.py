"""A 16-bit base: what stays float32, the error of a step against float32, and the warning where it is slow."""

from __future__ import annotations

import pytest
import torch

from hetlora.config.preconditions import INSTRUCTIONS, slow_dtype_warning
from hetlora.core.adapter import LoraPair, map_tensors
from hetlora.core.aggregation import WeightedSum
from hetlora.core.types import ClientUpdate, TrainTask
from hetlora.data.tokenization import Example
from hetlora.model.lora_model import LoraModel, load_base
from hetlora.training.local import LocalTraining, train_clients
from small_models import losses_of

pytestmark = pytest.mark.run

HALVES = [torch.bfloat16, torch.float16]
TEXT = "def close(self):\n    try:\n        self.throw(GeneratorExit)\n    except StopIteration:\n        pass\n"


def factors(model: LoraModel) -> dict[str, LoraPair]:
    """A fresh A beside a small B, so that gradients reach both."""
    generator = torch.Generator().manual_seed(1)
    return {
        path: LoraPair(A, 0.02 * torch.randn(B.shape, generator=generator))
        for path, (A, B) in model.initial_adapter(8, seed=0).items()
    }


def step(dtype: torch.dtype, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Return the mean loss and the whole gradient of nano's factors."""
    model = LoraModel(load_base("nano", dtype=dtype))
    adapter = map_tensors(lambda factor: factor.requires_grad_(), factors(model))
    model.use(adapter)
    loss = losses_of(model, ids).mean()
    loss.backward()
    gradients = [factor.grad for pair in adapter.values() for factor in pair]
    assert {gradient.dtype for gradient in gradients} == {torch.float32} == {loss.dtype}
    return float(loss.detach()), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("dtype", HALVES)
def test_the_gradient_of_a_step_is_float32s_within_three_per_cent(dtype: torch.dtype) -> None:
    from hetlora.model.lora_model import load_tokenizer

    ids = torch.tensor([load_tokenizer("nano")(TEXT)["input_ids"]])
    exact, exact_gradient = step(torch.float32, ids)
    loss, gradient = step(dtype, ids)
    assert loss == pytest.approx(exact, abs=0.01)
    assert float((gradient - exact_gradient).norm() / exact_gradient.norm()) < 0.03


@pytest.mark.parametrize("dtype", HALVES)
def test_adapters_optimiser_and_sums_are_float32_or_wider(tiny: str, dtype: torch.dtype) -> None:
    model = LoraModel(load_base(tiny, dtype=dtype))
    task, rows = TrainTask("a", 0, 4, model.initial_adapter(4, seed=0)), [Example(tuple(range(2, 20)), 4)] * 4
    [update] = train_clients(model, [task], [rows], LocalTraining(steps=2))
    assert isinstance(update, ClientUpdate)
    trained = [factor for pair in update.adapter.values() for factor in pair]
    assert {factor.dtype for factor in trained} == {torch.float32}
    # Numbers that a 16-bit type does not have: nothing was rounded on the way.
    assert any(not torch.equal(factor, factor.to(dtype).float()) for factor in trained)
    total = WeightedSum.like(update.adapter).add(update.adapter, 0.5)
    assert {factor.dtype for pair in total.factors.totals().values() for factor in pair} == {torch.float64}


def test_a_type_without_instructions_is_told_on_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    abilities = dict.fromkeys([name for names in INSTRUCTIONS.values() for name in names], False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", **abilities}, raising=False)
    cpu = torch.device("cpu")
    assert "bfloat16 is emulated on this processor" in str(slow_dtype_warning(torch.bfloat16, cpu))
    assert "float16 is emulated" in str(slow_dtype_warning(torch.float16, cpu))
    assert slow_dtype_warning(torch.float32, cpu) is None
    assert slow_dtype_warning(torch.bfloat16, torch.device("cuda")) is None
    abilities["amx_bf16"] = True
    assert slow_dtype_warning(torch.bfloat16, cpu) is None
    assert slow_dtype_warning(torch.float16, cpu) is not None
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert slow_dtype_warning(torch.float16, cpu) is None
