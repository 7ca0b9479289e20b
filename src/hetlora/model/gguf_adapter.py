"""LoRA adapters in llama.cpp's format GGUF: written for llama.cpp and Ollama, and read back."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hetlora.core.adapter import Adapter, LoraPair
from hetlora.errors import ModelError, expand_path, printable
from hetlora.model.gguf_base import check_gguf_package
from hetlora.model.gguf_names import ARCHITECTURES, GgufNames, gguf_names
from hetlora.model.peft_files import PeftAdapter

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["check_gguf_adapter", "names_of", "read_gguf_adapter", "write_gguf_adapter"]

TYPES = {torch.float32: "F32", torch.float16: "F16"}


def names_of(config: PretrainedConfig) -> GgufNames:
    """Return the names that llama.cpp has for a base's modules.

    Raises:
        ModelError: The architecture is not among those that are compared with llama.cpp.
    """
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"the base is a {config.model_type}; what llama.cpp computes with an adapter is tested for "
            f"{', '.join(ARCHITECTURES)}. Export it as PEFT's folder (without --format), or merged (--merged), and convert that"
        )
    return gguf_names(
        config.model_type,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads or config.num_attention_heads,
        tied=bool(config.tie_word_embeddings),
    )


def write_gguf_adapter(
    adapter: Adapter, file: Path, names: GgufNames, *, scaling: float, base: str, dtype: torch.dtype = torch.float32
) -> None:
    """Write an adapter as a GGUF file.

    llama.cpp adds `alpha / r B A` with one `alpha` for all modules and each module's own rank `r`. With `alpha = s r₀`, where
    `r₀` is the most frequent rank, `B` of a module of another rank is written times `r / r₀`, so that each adds `s B A`.

    Args:
        adapter: Factors `A [r, in]`, `B [out, r]`; modules may differ in rank.
        file: A new file.
        names: Of the base.
        scaling: `s`.
        base: Name of the base, for information.
        dtype: Type of the numbers, float32 or float16.

    Raises:
        ModelError: llama.cpp has no tensor for a module, or `gguf` is not installed.
    """
    check_gguf_package()
    from gguf import GGMLQuantizationType, GGUFType, GGUFWriter, Keys, LlamaFileType

    common = Counter(int(pair.A.shape[0]) for pair in adapter.values()).most_common(1)[0][0]
    writer = GGUFWriter(file, names.architecture)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, scaling * common)
    writer.add_name(f"HetLoRA adapter of {printable(base)}")
    writer.add_file_type(LlamaFileType.ALL_F32 if dtype == torch.float32 else LlamaFileType.MOSTLY_F16)
    for module, (A, B) in adapter.items():
        rank = int(A.shape[0])
        folded = names.to_gguf(module, B if rank == common else B * (rank / common))  # [out, r]
        for letter, factor in (("a", A), ("b", folded)):
            values = factor.to(dtype)
            if not bool(values.isfinite().all()):
                raise ModelError(
                    f"{module} has numbers that {str(dtype).removeprefix('torch.')} does not hold; use float32"
                )
            writer.add_tensor(
                f"{names.gguf(module)}.weight.lora_{letter}",
                values.contiguous().numpy(),
                raw_dtype=GGMLQuantizationType[TYPES[dtype]],
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf_adapter(file: Path | str, names: GgufNames) -> PeftAdapter:
    """Read an adapter from a GGUF file.

    Args:
        file: The file.
        names: Of the base that it belongs to.

    Raises:
        ModelError: It is no LoRA adapter, is of another architecture, or holds more than factors of linear modules.
    """
    check_gguf_package()
    from gguf import GGUFReader, Keys

    file = expand_path(file)
    if not file.is_file():
        raise ModelError(f"{str(file)!r} is no file")
    try:
        reader = GGUFReader(file)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ModelError(f"{str(file)!r} is no GGUF file that can be read: {error}") from error
    kind = fields.get(Keys.General.TYPE), fields.get(Keys.Adapter.TYPE)
    if kind != ("adapter", "lora"):
        raise ModelError(f"{str(file)!r} is no LoRA adapter: its general.type and adapter.type are {kind}")
    if (architecture := fields.get(Keys.General.ARCHITECTURE)) != names.architecture:
        raise ModelError(f"{str(file)!r} adapts a model of {architecture!r}, and the base is of {names.architecture!r}")
    if invocation := fields.get(Keys.Adapter.ALORA_INVOCATION_TOKENS):
        raise ModelError(f"{str(file)!r} works only after the tokens {invocation}: a training has no such condition")
    if not isinstance(alpha := fields.get(Keys.Adapter.LORA_ALPHA, 0.0), float) or not math.isfinite(alpha):
        raise ModelError(f"{str(file)!r} has an {Keys.Adapter.LORA_ALPHA} of {alpha!r}, which is no finite number")
    # The file holds a float32; its shortest decimal is what was meant, such as 6.8.
    alpha = float(str(np.float32(alpha)))
    adapter = _pairs(reader, names, file)
    # As llama.cpp: an alpha of 0 is none.
    return PeftAdapter(adapter, {module: alpha / A.shape[0] if alpha else 1.0 for module, (A, _) in adapter.items()})


def _pairs(reader: Any, names: GgufNames, file: Path) -> dict[str, LoraPair]:
    """Return the factors of every module."""
    factors: dict[str, dict[str, Tensor]] = {}
    for tensor in reader.tensors:
        name, _, letter = tensor.name.rpartition(".weight.lora_")
        if letter not in ("a", "b") or tensor.tensor_type.name not in TYPES.values() or tensor.data.ndim != 2:
            raise ModelError(
                f"{str(file)!r} holds {printable(tensor.name)!r} ({tensor.tensor_type.name}), which is no factor of a linear "
                "module in float32 or float16"
            )
        values = torch.from_numpy(tensor.data.astype("float32", copy=True))
        if not bool(values.isfinite().all()):
            raise ModelError(f"{printable(tensor.name)!r} of {str(file)!r} is not finite")
        factors.setdefault(names.module(name), {})[letter] = values
    if not factors:
        raise ModelError(f"{str(file)!r} holds no factors")
    for module, pair in factors.items():
        if pair.keys() != {"a", "b"} or pair["a"].shape[0] != pair["b"].shape[1] or not len(pair["a"]):
            raise ModelError(f"{str(file)!r} holds for {module} no two factors of one rank")
    return {module: LoraPair(pair["a"], names.from_gguf(module, pair["b"])) for module, pair in factors.items()}


def check_gguf_adapter(
    file: Path, adapter: Adapter, names: GgufNames, scaling: float, dtype: torch.dtype = torch.float32
) -> None:
    """Read a file back, and compare `A` and `s B` of each module with what was to be written.

    Raises:
        ModelError: A module is missing, or its update is another one.
    """
    read = read_gguf_adapter(file, names)
    if read.adapter.keys() != adapter.keys():
        raise ModelError(
            f"{file.name} does not hold the modules that were written: {sorted(read.adapter.keys() ^ adapter.keys())[0]}"
        )
    for module, (A, B) in adapter.items():
        back, scale = read.adapter[module], read.scaling[module]
        allowed = 1e-6 if dtype == torch.float32 else 1e-3
        for wanted, found in ((A, back.A), (B, back.B * (scale / scaling))):
            if float((wanted - found).abs().max()) > allowed * max(float(wanted.abs().max()), 1e-4):
                raise ModelError(f"{module} was read back from {file.name} as other numbers than were written")
