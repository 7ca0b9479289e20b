"""A model in llama.cpp's format GGUF as a folder of transformers, which a run takes as its base.

transformers' own loader reads the weights and the tokenizer. What it leaves out is restored here, and each number is compared
with what llama.cpp's own package `gguf` reads from the file.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hetlora.errors import ModelError, expand_path
from hetlora.model.gguf_names import ARCHITECTURES, GgufNames, gguf_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ConvertedBase", "check_gguf_package", "convert_gguf"]

LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where these vocabularies split a text before they merge; both stand in the tokenizer.json of those models."""

PLAIN, DIGITS = "", "digits"
"""GPT-2's split, and the same after every digit has been split off."""

SPLITS: Mapping[str, str] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), PLAIN),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), LLAMA_3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN_2),
}
"""`tokenizer.ggml.pre` to how a text is split: what the tests compare with llama.cpp. transformers knows some of them."""

WHOLE_WORDS = LLAMA_3
"""The split whose vocabularies take a word that they hold as it is, without merging it."""

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
"""By type: what a number may differ by, as a part of the largest number of its tensor."""


@dataclass(frozen=True)
class ConvertedBase:
    """A base made of a GGUF file.

    Attributes:
        folder: The folder.
        architecture: Of the file, such as "llama".
        parameters: Numbers of the model.
        stored: Kinds in which the file stores its tensors, such as "Q4_1", the most frequent first.
        dtype: Type of the written numbers.
    """

    folder: Path
    architecture: str
    parameters: int
    stored: tuple[str, ...]
    dtype: str


def check_gguf_package() -> None:
    """Raise an error if what reads and writes GGUF is not installed.

    Raises:
        ModelError: A package is missing.
    """
    for name in ("gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise ModelError(f"GGUF files need the package {name}, which is not installed; pip install 'hetlora[gguf]'")


def convert_gguf(file: Path | str, folder: Path | str, *, dtype: torch.dtype = torch.bfloat16) -> ConvertedBase:
    """Write a GGUF model as a folder of transformers: safetensors, configuration and tokenizer.

    Weights that the file stores in fewer bits get the values that llama.cpp computes with, rounded to `dtype`.

    Args:
        file: The GGUF file.
        folder: A new folder.
        dtype: Type of the written numbers, float32 or bfloat16.

    Raises:
        ModelError: The file cannot be read, its architecture or tokenizer is not among those that are tested, or what was
            read is not what the file holds.
    """
    check_gguf_package()
    from gguf import GGUFReader

    file, folder = expand_path(file), expand_path(folder)
    if not file.is_file():
        raise ModelError(f"{str(file)!r} is no file; give a GGUF file")
    if folder.exists():
        raise ModelError(f"{str(folder)!r} exists, and nothing is written over; give another folder")
    try:
        reader = GGUFReader(file)
    except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ModelError(f"{str(file)!r} is no GGUF file that can be read: {error}") from error
    names = _names(reader, file)
    _check_positions(reader, names, file)
    split = _split(reader, file)
    base = _load(file, dtype)
    _check_numbers(reader, names, base, file)
    tokenizer = _tokenizer(file, split)
    try:
        _save(base, tokenizer, folder)
    except OSError as error:
        raise ModelError(f"{str(folder)!r} cannot be written: {error}") from error
    kinds = [tensor.tensor_type.name for tensor in reader.tensors]
    return ConvertedBase(
        folder,
        names.architecture,
        sum(parameter.numel() for parameter in base.parameters()),
        tuple(sorted(set(kinds), key=lambda kind: -kinds.count(kind))),
        str(dtype).removeprefix("torch."),
    )


def _save(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write under another name first: a folder that is there is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f"{folder.name}.", suffix=".part", dir=folder.parent, ignore_cleanup_errors=True
    ) as beside:
        whole = Path(beside) / "whole"
        whole.mkdir()
        base.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        _check_saved(whole, tokenizer)
        whole.rename(folder)


def _check_saved(folder: Path, tokenizer: Any) -> None:
    """Load a tokenizer again: transformers gives some architectures the split of their own, whatever was saved."""
    from transformers import AutoTokenizer

    again: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    ways = [json.loads(one.backend_tokenizer.to_str()) for one in (tokenizer, again)]
    if any(ways[0][part] != ways[1][part] for part in ("pre_tokenizer", "model", "added_tokens")):
        raise ModelError(
            f"transformers loads the saved tokenizer as {type(again).__name__}, which makes other tokens than the file's; take "
            "the model's own folder"
        )


def _field(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _names(reader: Any, file: Path) -> GgufNames:
    """Return how the file's tensors are called in transformers."""
    architecture = _field(reader, "general.architecture")
    kind = _field(reader, "general.type")
    if kind not in (None, "model"):
        raise ModelError(f"{str(file)!r} holds no model: its general.type is {kind!r}; give the GGUF file of a model")
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{str(file)!r} is of the architecture {architecture!r}; tested are {', '.join(ARCHITECTURES)}. Take the model's "
            "own folder of safetensors, if there is one"
        )
    return gguf_names(
        architecture,
        layers=int(_field(reader, f"{architecture}.block_count")),
        heads=int(_field(reader, f"{architecture}.attention.head_count")),
        key_heads=int(
            _field(reader, f"{architecture}.attention.head_count_kv")
            or _field(reader, f"{architecture}.attention.head_count")
        ),
    )


def _check_positions(reader: Any, names: GgufNames, file: Path) -> None:
    """Refuse positions that are scaled: transformers' loader leaves that out without a word."""
    scaling = _field(reader, f"{names.architecture}.rope.scaling.type")
    if scaling not in (None, "none") or any(tensor.name.startswith("rope_") for tensor in reader.tensors):
        raise ModelError(
            f"{str(file)!r} scales positions ({scaling or 'rope_freqs'}), which is not read from a GGUF file; take the model's "
            "own folder"
        )


def _split(reader: Any, file: Path) -> str:
    """Return how the file's tokenizer splits a text."""
    model, name = _field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre")
    if model != "gpt2":
        raise ModelError(
            f"{str(file)!r} has a tokenizer of the kind {model!r}; tested is 'gpt2', byte-level BPE. Take the "
            "model's own folder"
        )
    if name not in SPLITS:
        raise ModelError(
            f"{str(file)!r} splits texts as {name!r} before it merges; tested are {', '.join(SPLITS)}. Other tokens than "
            "llama.cpp's would come out without a word; take the model's own folder"
        )
    return SPLITS[name]


def _load(file: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the model with transformers, into one that can be saved."""
    from transformers import AutoModelForCausalLM

    try:
        read, report = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"transformers cannot load {str(file)!r}: {str(error).strip().splitlines()[0][:300]}"
        ) from error
    if missing := sorted(report["missing_keys"]):  # transformers would fill them at random without an error
        raise ModelError(f"{str(file)!r} lacks {len(missing)} weights of its architecture ({', '.join(missing[:3])})")
    # What was read from a GGUF file refuses to be saved: its configuration says that it is quantised.
    config = copy.deepcopy(read.config)
    for mark in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, mark):
            delattr(config, mark)
    config.dtype = dtype
    return _filled(config, read, dtype)


def _filled(config: Any, read: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model of a configuration with the weights of another one."""
    from transformers import AutoModelForCausalLM

    base: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    base.load_state_dict({name: tensor.to(dtype) for name, tensor in read.state_dict().items()})
    base.tie_weights()
    base.generation_config = copy.deepcopy(read.generation_config)
    return base


def _check_numbers(reader: Any, names: GgufNames, base: PreTrainedModel, file: Path) -> None:
    """Compare what transformers' loader has read with what llama.cpp's own package reads: it could go wrong silently."""
    config, of = base.config, names.architecture
    for key, value in (
        (f"{of}.rope.freq_base", config.rope_parameters["rope_theta"]),
        (f"{of}.attention.layer_norm_rms_epsilon", config.rms_norm_eps),
    ):
        if (own := _field(reader, key)) is not None and not math.isclose(own, value, rel_tol=1e-6):
            raise ModelError(
                f"{key} of {str(file)!r} is {own}, and transformers has read {value}; take the model's own folder"
            )
    ours = base.state_dict()
    seen = set()
    for name, values in _tensors(reader, names):
        own = ours.get(name)
        if own is None:
            raise ModelError(f"{str(file)!r} holds {name}, which {type(base).__name__} has no place for")
        seen.add(name)
        apart = float((own.float() - values).abs().max()) if own.shape == values.shape else float("inf")
        if not apart <= ROUNDING[own.dtype] * max(float(values.abs().max()), 1e-30):
            raise ModelError(
                f"{name} of {str(file)!r} was read otherwise than llama.cpp's package reads it (up to {apart:.2g} apart): "
                "take the model's own folder, or another version of transformers"
            )
    tied = {name for name, tensor in ours.items() if any(tensor.data_ptr() == ours[other].data_ptr() for other in seen)}
    if left := sorted(ours.keys() - seen - tied):
        raise ModelError(f"{str(file)!r} does not hold {left[0]}, which {type(base).__name__} computes with")


def _tensors(reader: Any, names: GgufNames) -> Iterator[tuple[str, Tensor]]:
    """Yield name and values of each tensor, as transformers lays them out."""
    from gguf import dequantize

    for tensor in reader.tensors:
        name = tensor.name.removesuffix(".weight").removesuffix(".bias")
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype("float32", copy=True))
        module = names.module(name)
        yield f"{module}.{tensor.name.rpartition('.')[2]}", names.from_gguf(module, values)


def _tokenizer(file: Path, split: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer with transformers, and let it split texts as the file says."""
    from tokenizers import Regex, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
    own = pre_tokenizers.ByteLevel
    ways: Mapping[str, Callable[[], Any]] = {
        PLAIN: lambda: own(add_prefix_space=False),
        DIGITS: lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), own(add_prefix_space=False)]
        ),
    }
    by_pattern = lambda: pre_tokenizers.Sequence(  # noqa: E731
        [pre_tokenizers.Split(Regex(split), behavior="isolated"), own(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.backend_tokenizer.pre_tokenizer = ways.get(split, by_pattern)()
    tokenizer.backend_tokenizer.model.ignore_merges = split == WHOLE_WORDS
    return tokenizer
