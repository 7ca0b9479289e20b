"""Names and layout of a model's tensors in llama.cpp's format GGUF, by architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from hetlora.errors import ModelError

__all__ = ["ARCHITECTURES", "GgufNames", "gguf_names"]

ARCHITECTURES: Mapping[str, bool] = {"llama": True, "qwen2": False, "qwen3": False}
"""Architecture to whether llama.cpp stores the rows of `q_proj` and `k_proj` in another order: what the tests compare with it.

The names are llama.cpp's; `model_type` of transformers is the same. llama.cpp rotates neighbouring numbers of a head, and
transformers the halves; for Qwen and others llama.cpp rotates halves, too.
"""


@dataclass(frozen=True)
class GgufNames:
    """How a model's tensors are called, and lie, in a GGUF file.

    Attributes:
        architecture: Such as "llama".
        layers: Number of layers.
        heads: Number of attention heads.
        key_heads: Number of heads of keys and values.
        tied: Whether the output layer is the embedding, so that a file has no tensor of it.
    """

    architecture: str
    layers: int
    heads: int
    key_heads: int
    tied: bool = False

    def gguf(self, module: str) -> str:
        """Return the GGUF name of a module.

        Raises:
            ModelError: llama.cpp has no such tensor.

        Example:
            >>> gguf_names("llama", layers=2, heads=9, key_heads=3).gguf("model.layers.1.self_attn.q_proj")
            'blk.1.attn_q'
        """
        if self.tied and module == "lm_head":
            raise ModelError(
                "the output layer of this base is its embedding, and llama.cpp adapts no such output layer; leave lm_head out "
                "of model.target_modules, or export without --format"
            )
        found = self._map.get_name(module)
        if found is None:
            raise ModelError(f"llama.cpp has no tensor for {module} of the architecture {self.architecture!r}")
        return str(found)

    def module(self, name: str) -> str:
        """Return the module of a GGUF name.

        Raises:
            ModelError: It is none of transformers' modules.

        Example:
            >>> gguf_names("llama", layers=2, heads=9, key_heads=3).module("blk.1.attn_q")
            'model.layers.1.self_attn.q_proj'
        """
        try:
            return self._modules[name]
        except KeyError:
            raise ModelError(f"{name!r} names no module of the architecture {self.architecture!r}") from None

    def to_gguf(self, module: str, rows: Tensor) -> Tensor:
        """Return the rows `[out, ...]` of a weight, a bias or a factor `B` in the order of the file."""
        heads = self._permuted(module)
        if heads is None:
            return rows
        parts = rows.reshape(heads, 2, -1, *rows.shape[1:])  # [heads, 2, size / 2, ...]
        return parts.transpose(1, 2).reshape(rows.shape)

    def from_gguf(self, module: str, rows: Tensor) -> Tensor:
        """Return rows in the order of transformers: the inverse of `to_gguf`."""
        heads = self._permuted(module)
        if heads is None:
            return rows
        parts = rows.reshape(heads, -1, 2, *rows.shape[1:])  # [heads, size / 2, 2, ...]
        return parts.transpose(1, 2).reshape(rows.shape)

    def _permuted(self, module: str) -> int | None:
        """Return the number of heads among whose rows the order differs; None where it does not."""
        if not ARCHITECTURES[self.architecture]:
            return None
        return {"q_proj": self.heads, "k_proj": self.key_heads}.get(module.rpartition(".")[2])

    @cached_property
    def _map(self) -> Any:
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        which = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}[self.architecture]
        assert which in MODEL_ARCH
        return get_tensor_name_map(which, self.layers)

    @cached_property
    def _modules(self) -> Mapping[str, str]:
        parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
        parts += ["self_attn.q_norm", "self_attn.k_norm"]
        parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
        modules = ["model.embed_tokens", "model.norm", "lm_head"]
        modules += [f"model.layers.{layer}.{part}" for layer in range(self.layers) for part in parts]
        return {found: module for module in modules if (found := self._map.get_name(module)) is not None}


def gguf_names(architecture: str, *, layers: int, heads: int, key_heads: int, tied: bool = False) -> GgufNames:
    """Return the names of an architecture of `ARCHITECTURES`."""
    return GgufNames(architecture, layers, heads, key_heads, tied)
