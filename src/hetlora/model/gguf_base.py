"""A model in llama.cpp's format GGUF as a folder of transformers, which a run takes as its base.

transformers' own loader reads the weights, and each number is compared with what llama.cpp's own package `gguf` reads from the
file. The tokenizer is built here from what the file says.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hetlora.errors import ModelError, expand_path, printable
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
    tokenizer = _tokenizer(reader, split, file)
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
    differ = any(ways[0][part] != ways[1][part] for part in ("pre_tokenizer", "added_tokens"))
    differ |= any(ways[0]["model"][part] != ways[1]["model"][part] for part in ("vocab", "merges", "ignore_merges"))
    if differ or any(
        tokenizer(text).input_ids != again(text).input_ids for text in ("", "In 1984, it's x = 3.14\n\n  y")
    ):
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

    def number(key: str) -> int:
        found = _field(reader, f"{architecture}.{key}")
        if not isinstance(found, int):
            raise ModelError(
                f"{str(file)!r}: {architecture}.{key} is {found!r} and no whole number; take the model's own folder"
            )
        return found

    grouped = "attention.head_count_kv"
    return gguf_names(
        architecture,
        layers=number("block_count"),
        heads=number("attention.head_count"),
        key_heads=number(grouped if f"{architecture}.{grouped}" in reader.fields else "attention.head_count"),
    )


def _check_positions(reader: Any, names: GgufNames, file: Path) -> None:
    """Refuse positions that are scaled: transformers' loader leaves that out without a word."""
    of = names.architecture
    scaled = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
    for key in reader.fields:
        plain = {f"{of}.rope.scaling.type": "none", f"{of}.rope.scaling.factor": 1.0, f"{of}.rope.scale_linear": 1.0}
        if key.startswith((f"{of}.rope.scal", f"{of}.attention.sliding_window")) and _field(reader, key) != plain.get(
            key
        ):
            scaled.append(key)
    if scaled:
        raise ModelError(
            f"{str(file)!r} scales positions or looks at the last ones only ({scaled[0]}), which transformers does not read "
            "from a GGUF file; take the model's own folder"
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
        # In a folder of its own: transformers looks at what lies beside it, such as an adapter's configuration.
        with tempfile.TemporaryDirectory() as alone:
            (Path(alone) / "model.gguf").symlink_to(file.resolve())
            read, report = AutoModelForCausalLM.from_pretrained(
                alone,
                gguf_file="model.gguf",
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
        try:
            numbers = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ModelError(
                f"the package gguf does not read {tensor.name}, stored as {tensor.tensor_type.name}"
            ) from error
        values = torch.from_numpy(numbers.astype("float32", copy=True))
        module = names.module(name)
        yield f"{module}.{tensor.name.rpartition('.')[2]}", names.from_gguf(module, values)


def _tokenizer(reader: Any, split: str, file: Path) -> PreTrainedTokenizerBase:
    """Build the tokenizer that the file describes: each token has the number that the file gives it.

    transformers' loader adds an end-of-text token that a vocabulary may not have, and leaves out control tokens whose signs are
    not those of bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens, merges = _field(reader, "tokenizer.ggml.tokens"), _field(reader, "tokenizer.ggml.merges")
    kinds = _field(reader, "tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    backend = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=split == WHOLE_WORDS,
        )
    )
    backend.pre_tokenizer, backend.decoder = _pre_tokenizer(split), decoders.ByteLevel()
    whole = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in whole])
    written = [token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in written])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    numbers = {name: _field(reader, f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    special = {name: tokens[number] for name, number in numbers.items() if number is not None}
    begin = _field(reader, "tokenizer.ggml.add_bos_token")
    if begin if begin is not None else split == LLAMA_3:  # as llama.cpp, where the file does not say
        _begin_with(backend, special.get("bos_token"), tokens, file)
    if _field(reader, "tokenizer.ggml.add_eos_token"):
        raise ModelError(f"{str(file)!r} ends each text with a token (add_eos_token), which prompts must not have")
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    if (template := _field(reader, "tokenizer.chat_template")) is not None:
        tokenizer.chat_template = template
    _check_special(tokenizer, [*whole, *written], tokens, file)
    return tokenizer


NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Kinds of tokens in `tokenizer.ggml.token_type`."""


def _begin_with(backend: Any, token: str | None, tokens: Sequence[str], file: Path) -> None:
    """Let texts begin with a token."""
    from tokenizers import processors

    if token is None:
        raise ModelError(f"{str(file)!r} wants a begin-of-text token and names none; take the model's own folder")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 $B:1", special_tokens=[(token, tokens.index(token))]
    )


def _check_special(tokenizer: Any, whole: Sequence[str], tokens: Sequence[str], file: Path) -> None:
    """Refuse a tokenizer in which a token has another number than in the file."""
    place = {token: number for number, token in enumerate(tokens)}
    wrong = [token for token in whole if tokenizer(token, add_special_tokens=False).input_ids != [place[token]]]
    if wrong or len(tokenizer) != len(tokens):
        raise ModelError(
            f"the tokenizer of {str(file)!r} cannot be built: {printable(wrong[0]) if wrong else len(tokenizer)!r} is not what "
            "the file says; take the model's own folder"
        )


def _pre_tokenizer(split: str) -> Any:
    """Return what divides a text before it is merged."""
    from tokenizers import Regex, pre_tokenizers

    by_bytes = pre_tokenizers.ByteLevel
    if split == PLAIN:
        return by_bytes(add_prefix_space=False)
    if split == DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, by_bytes(add_prefix_space=False)])
    pattern = pre_tokenizers.Split(Regex(split), behavior="isolated")
    return pre_tokenizers.Sequence([pattern, by_bytes(add_prefix_space=False, use_regex=False)])
