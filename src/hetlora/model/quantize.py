"""Quantised bases: linear layers are stored in 16, 8 or 4 bits, and compute in the base's own type.

bitsandbytes quantises to 8 and 4 bits while the checkpoint is read. The matrix product is ours, and the same on every device:
the forward and the backward pass dequantise the weight, one layer at a time, and each row of the input is independent of the
others. The library's own 8-bit layer also quantises the activations, and its 4-bit layer repacks weights on some processors.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from hetlora.errors import ModelError
from hetlora.model.outline import is_outline

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Quantization",
    "dequantize_on_the_fly",
    "fake_quantize",
    "is_quantized",
    "loading_options",
    "quantized_layers",
    "store_in_bfloat16",
    "stores_transposed",
    "whole_weight",
]

Quantization = Literal["none", "bfloat16", "int8", "nf4"]
"""Storage of the weights. "bfloat16" keeps 8 significant bits, "int8" has a scale per row, "nf4" quantiles of a normal
distribution and a scale per block of 64."""

BLOCK = 64
"""Weights that share a scale in `nf4`; bitsandbytes' default."""


def loading_options(quantize: Quantization, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """Return the options of `from_pretrained` that quantise the linear layers of the body; empty but for "int8" and "nf4".

    The output layer, the embeddings and weights tied to them are not quantised.

    Raises:
        ModelError: bitsandbytes is not installed.

    Example:
        >>> loading_options("none", torch.float32, "cpu")
        {}
    """
    if quantize in ("none", "bfloat16"):
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantize = {quantize!r} needs bitsandbytes, which is not installed; pip install 'hetlora[quantize]', or "
            "set model.quantize = 'none'"
        )
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_8bit=quantize == "int8",
        load_in_4bit=quantize == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": str(device)}}


def is_quantized(base: nn.Module) -> bool:
    """Whether some of the base's weights are quantised."""
    return bool(quantized_layers(base))


def quantized_layers(base: nn.Module) -> Mapping[str, nn.Module]:
    """Return the quantised layers by path."""
    kinds = ("Int8Params", "Params4bit", _BFloat16Params.__name__)
    # Of its own: a LoRA layer passes on the weight of the one within it.
    return {
        path: layer
        for path, layer in base.named_modules()
        if type(dict(layer.named_parameters(recurse=False)).get("weight")).__name__ in kinds
    }


def dequantize_on_the_fly(base: nn.Module) -> None:
    """Make the quantised layers compute `W x + b` with the dequantised `W`, in the type of `x`.

    Raises:
        ModelError: The base has no quantised layer.
    """
    layers = quantized_layers(base)
    if not layers:
        raise ModelError(f"{type(base).__name__} has no linear layer to quantise; set model.quantize = 'none'")
    for layer in layers.values():
        _compute_with(layer, functools.partial(whole_weight, layer))


class _BFloat16Params(nn.Parameter):
    """A weight in bfloat16 of a layer that computes in another type."""


def store_in_bfloat16(base: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the weights of the linear layers of the body to bfloat16, and bring everything else to `dtype`.

    A checkpoint in bfloat16 computes the same as with all weights in `dtype`, bit for bit.

    Args:
        base: The base; changed in place.
        dtype: Type in which it computes.
    """
    sharing: dict[nn.Parameter, list[Any]] = {}
    for layer in _linear_layers(base):
        sharing.setdefault(layer.weight, []).append(layer)
    while sharing:
        weight, layers = sharing.popitem()
        stored = _BFloat16Params(weight.data.to(torch.bfloat16), requires_grad=False)
        for layer in layers:
            layer.weight = stored
    for module in base.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point() and not isinstance(tensor, _BFloat16Params):
                tensor.data = tensor.data.to(dtype)
    base.config.dtype = dtype


def _linear_layers(base: PreTrainedModel) -> list[Any]:
    """Return the linear layers of the body: not the output layer, what shares the embeddings' weight, or computes otherwise."""
    kept = {
        id(module.weight)
        for module in (base.get_output_embeddings(), base.get_input_embeddings())
        if module is not None and hasattr(module, "weight")
    }
    linear = [module for module in base.modules() if isinstance(module, nn.Linear) or stores_transposed(module)]
    outline = is_outline(base)
    return [layer for layer in linear if id(layer.weight) not in kept and _only_multiplies(layer, outline=outline)]


def _only_multiplies(layer: Any, *, outline: bool) -> bool:
    """Whether a layer gives `W x + b`: Falcon's own class does, a router that is also a linear layer gives its choice.

    Args:
        layer: A linear layer, or one of a class made from it.
        outline: Whether it has no numbers, so that only shapes can be compared.
    """
    if type(layer) is nn.Linear or stores_transposed(layer):
        return True
    weight = layer.weight  # [out, in]
    x = torch.arange(2 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(2, -1) / weight.shape[1] - 1
    wanted = nn.functional.linear(x, weight, layer.bias)  # [2, out]
    try:
        with torch.no_grad():
            given = layer(x)
    except Exception:  # noqa: BLE001  whatever it wants, it is no product of this
        return False
    if not isinstance(given, Tensor) or given.shape != wanted.shape:
        return False
    return outline or torch.allclose(given, wanted, rtol=1e-2, atol=1e-2)  # in 16 bits, too


def whole_weight(layer: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the dequantised weight of a layer `[out, in]`, which every computation uses.

    Args:
        layer: One of `quantized_layers`.
        dtype: Type of the result.
    """
    weight = layer.weight
    whole: Tensor
    if type(weight).__name__ == "Int8Params":
        # The scales stay float32: a scale rounded to bfloat16 would shift a whole row.
        whole = weight.data.to(dtype).mul_(weight.SCB.float()[:, None] / 127)  # [out, in], scales [out, 1]
    elif isinstance(weight, _BFloat16Params):
        whole = weight.data.to(dtype)
        whole = whole.T if stores_transposed(layer) else whole
    else:
        from bitsandbytes.functional import dequantize_4bit

        whole = dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    return whole


def stores_transposed(layer: nn.Module) -> bool:
    """Whether the checkpoint stores this linear layer's weight `[in, out]`, as GPT-2's Conv1D does."""
    # bitsandbytes' layers are always [out, in], and name the class that they replace.
    return getattr(layer, "source_cls", type(layer)).__name__ == "Conv1D"


def fake_quantize(base: PreTrainedModel, quantize: Quantization) -> None:
    """Give a base on fake tensors weights of the size of quantised ones, with the same computation.

    Args:
        base: A base on fake tensors; changed in place.
        quantize: Storage of its weights.
    """
    if quantize == "none":
        return
    for layer in _linear_layers(base):
        weight: Any = layer.weight
        shape = weight.shape[::-1] if stores_transposed(layer) else weight.shape
        if quantize == "bfloat16":
            layer.weight = nn.Parameter(weight.data.to(torch.bfloat16), requires_grad=False)
            _compute_with(layer, functools.partial(_no_numbers, shape))
            continue
        scales = shape[0] if quantize == "int8" else -(-weight.numel() // BLOCK)
        size = weight.numel() if quantize == "int8" else -(-weight.numel() // 2)
        layer.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)
        layer.register_buffer("scales", torch.empty(scales))
        _compute_with(layer, functools.partial(_no_numbers, shape))


def _no_numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _compute_with(layer: Any, whole: Callable[[torch.dtype], Tensor]) -> None:
    def forward(x: Tensor) -> Tensor:
        # Flat: PyTorch may give a view for more dimensions, and a LoRA layer could not add to what a function gave as a view.
        flat: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), whole, layer.bias)  # type: ignore[no-untyped-call]
        return flat.view(*x.shape[:-1], flat.shape[-1])  # [..., in] -> [..., out]

    layer.forward = forward


class _Product(torch.autograd.Function):
    """`W x + b` with a frozen `W` that both passes dequantise and neither keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, whole: Callable[[torch.dtype], Tensor], bias: Tensor | None) -> Tensor:
        ctx.whole = whole
        return nn.functional.linear(x, whole(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        [gradient] = gradients
        return gradient @ ctx.whole(gradient.dtype), None, None
