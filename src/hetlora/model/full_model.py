"""A causal language model with all weights trainable, with the interface of `LoraModel`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hetlora.core.adapter import Adapter, LoraPair, ModuleShape, Rank
from hetlora.errors import ModelError, ShapeError
from hetlora.model.base_config import longest_steady_row, quiet_router
from hetlora.model.lm_head import OutputHead
from hetlora.model.lora_layer import ActiveFactors
from hetlora.model.lora_model import LoraModel
from hetlora.model.outline import is_outline
from hetlora.model.packing import enable_packing
from hetlora.model.quantize import is_quantized
from hetlora.model.text_pass import check_training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FullModel"]


class FullModel(LoraModel):
    """A model whose *modules* are the parameters of the base: a parameter of n numbers has the shape `[n, 1]`.

    Its adapter holds the change of every parameter as `B [1, n, 1]` beside the constant `A [1, 1, 1] = 1`, of rank 1. The sums,
    the admission and the training of adapters thus also work for whole weights. Parameters that share a tensor (tied
    embeddings) are one module.

    Args:
        base: A Hugging Face causal language model; its parameters are changed in place by `use`.

    Raises:
        ModelError: Weights of the base are quantised, or it cannot be trained.
    """

    one_at_a_time = True

    def __init__(self, base: PreTrainedModel) -> None:
        if is_quantized(base):
            raise ModelError(
                "all weights are to be trained, and quantised ones cannot be; load the base with quantize='none'"
            )
        self.base = base.eval().requires_grad_(False)
        self.scaling = 1.0
        self.layers = {}
        self.target_modules = ()
        self._parameters: Mapping[str, nn.Parameter] = dict(base.named_parameters())
        self._start = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._changed: dict[str, Tensor] = {}
        self.shapes = {name: ModuleShape(parameter.numel(), 1) for name, parameter in self._parameters.items()}
        self.notes = tuple(quiet_router(base))
        self.longest = longest_steady_row(base.config)
        self.packs = enable_packing(base)
        self.head = OutputHead(base, trained=True)
        self.live = ActiveFactors()
        if not is_outline(base):
            check_training(self)

    def initial_adapter(self, rank: int = 1, seed: int = 0) -> dict[str, LoraPair]:  # noqa: ARG002  nothing is drawn
        """Return no change: `A = 1`, `B = 0`."""
        return {name: LoraPair(torch.ones(1, 1), torch.zeros(numel, 1)) for name, (numel, _) in self.shapes.items()}

    def use(
        self,
        adapter: Adapter | None,
        folded: Mapping[str, Tensor] | None = None,
        ranks: Sequence[Rank] | None = None,  # noqa: ARG002  all are 1
    ) -> None:
        """Compute with the changes of one client from now on; None is the base as it was.

        Raises:
            ShapeError: The adapter does not fit this model, holds several clients, or `folded` is not empty.
        """
        if folded or (adapter is not None and adapter.keys() != self.shapes.keys()):
            raise ShapeError("the changes are not those of all the model's weights; use the adapter of method full")
        self._changed = {}
        for name, parameter in self._parameters.items():
            if adapter is None:
                parameter.data.copy_(self._start[name])
                continue
            A, B = adapter[name]
            if B.numel() != parameter.numel():
                raise ShapeError(
                    f"{name}: changes {tuple(B.shape)} do not fit one client's weight {tuple(parameter.shape)}"
                )
            changed = self._start[name] + (B * A).view(parameter.shape).to(parameter)  # [1, n, 1] -> the parameter's
            if changed.requires_grad:
                self._changed[name] = changed
            else:  # generation uses the model itself
                parameter.data.copy_(changed)

    def _logits(self, inputs: dict[str, Any]) -> Tensor:
        logits: Tensor = torch.func.functional_call(self.base, self._changed, (), inputs).logits  # [rows, length, V]
        return logits
