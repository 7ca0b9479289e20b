"""A frozen base model with LoRA layers that hold G clients of different ranks at once.

The base exists once in memory. A batch of inputs holds the rows of G clients, client after client; for client g a module
computes `W0 x + scaling * B[g] A[g] x`. With G = 1 it is an ordinary LoRA model, by the same code.

The model does not know rounds: it computes with the factors given to `use`.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hetlora.core.adapter import Adapter, LoraPair, ModuleShape, Rank, rank_of
from hetlora.errors import ModelError, ShapeError, expand_path
from hetlora.model.base_config import longest_steady_row, quiet_router
from hetlora.model.lm_head import OutputHead
from hetlora.model.lora_layer import ActiveFactors, LoraLayer
from hetlora.model.outline import is_outline
from hetlora.model.packing import Pack, enable_packing, forward_pack
from hetlora.model.quantize import (
    Quantization,
    dequantize_on_the_fly,
    loading_options,
    store_in_bfloat16,
    stores_transposed,
)
from hetlora.model.recompute import recompute_layers
from hetlora.model.targets import choose_targets, linear_paths
from hetlora.model.text_pass import check_pass, check_recomputation, obstacles

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["NANO", "LoraModel", "build_base", "load_base", "load_tokenizer", "locate_base", "pick_device"]

NANO = "nano"
"""Name of the bundled base model; see its card in `hetlora/data/bundled/nano/README.md`."""


class LoraModel:
    """A causal language model whose target modules carry LoRA layers.

    Args:
        base: A Hugging Face causal language model. Its parameters are frozen and its target modules wrapped in place.
        target_modules: Names of linear modules, each the last part of a path (`q_proj`), its last parts (`mlp.up_proj`) or a
            whole path; or "all-linear". None takes the usual attention projections of the architecture. Modules that no
            text reaches, such as those of a vision tower, stay as they are.
        layers: The layers in which they are adapted: "last 10", "first 4", or their numbers from 0; None for all. Below the
            lowest of them nothing is kept for the backward pass.
        scaling: The factor of `B A`, one for the whole federation: LoRA's `alpha / r` would give clients of different ranks
            different units.
        recompute: Keep only the inputs of layers for the backward pass: less memory, a third more work, the same bits.

    Raises:
        ModelError: A name matches no linear module that can be adapted, or the architecture has none of the usual ones.

    Attributes:
        target_modules: The names that choose the adapted modules.
        shapes: Adapted module's path to its shape, in the order of the model.
        notes: What a user should know about the adapted modules and those left out.
        one_at_a_time: Whether it computes only for one client at a time, in one thread.
        packs: Whether it computes packed rows without padding.
    """

    one_at_a_time = False

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        target_modules: Sequence[str] | None = None,
        layers: str | Sequence[int] | None = None,
        scaling: float = 2.0,
        recompute: bool = False,
    ) -> None:
        self.base = base.eval().requires_grad_(False)
        self.scaling = scaling
        self.layers: dict[str, LoraLayer] = {}
        self.shapes: Mapping[str, ModuleShape] = {}
        self.live = ActiveFactors()
        notes = [*quiet_router(base)]
        self.packs = enable_packing(base)
        self.head = OutputHead(base)
        self.longest = longest_steady_row(base.config)
        wanted = [target_modules] if isinstance(target_modules, str) else target_modules
        chosen = choose_targets(base, obstacles(self, linear_paths(base)), wanted, layers)
        self.target_modules, self.notes = chosen.names, (*notes, *chosen.notes)
        self._wrap(chosen.paths)
        if recompute:
            recompute_layers(base, self.live)
        if not is_outline(base):
            check_pass(self)
            if recompute:
                check_recomputation(self)

    def _wrap(self, paths: Sequence[str]) -> None:
        """Put LoRA layers in the place of modules."""
        for path in paths:
            parent_path, _, name = path.rpartition(".")
            parent = self.base.get_submodule(parent_path)
            module = parent.get_submodule(name)
            layer = LoraLayer(module, path, _linear_shape(module), self.scaling, self.live)
            setattr(parent, name, layer)
            self.layers[path] = layer
            if module is self.head.module:
                self.head.is_adapted = True
        self.shapes = {path: layer.shape for path, layer in self.layers.items()}

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether an adapted layer stores its weight `[in, out]`, as GPT-2's Conv1D does."""
        return any(stores_transposed(layer.base) for layer in self.layers.values())

    @property
    def device(self) -> torch.device:
        """The device of the base."""
        parameter: Tensor = next(self.base.parameters())
        return parameter.device

    def initial_adapter(self, rank: int, seed: int) -> dict[str, LoraPair]:
        """Return fresh global factors: `A` uniform in ±1/√in (Kaiming, as LoRA and PEFT do), `B` zero, so ΔW = 0."""
        generator = torch.Generator().manual_seed(seed)
        adapter = {}
        for path, (out_features, in_features) in self.shapes.items():
            bound = 1 / math.sqrt(in_features)
            A = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)  # [rank, in]
            adapter[path] = LoraPair(A, torch.zeros(out_features, rank))  # B [out, rank]
        return adapter

    def use(
        self,
        adapter: Adapter | None,
        folded: Mapping[str, Tensor] | None = None,
        ranks: Sequence[Rank] | None = None,
    ) -> None:
        """Compute with these factors from now on, in this thread.

        Gradients reach the given tensors on any device; tensors on the base's device are not copied.

        Args:
            adapter: Factors `A [G, r, in]`, `B [G, out, r]`, or without G for one client; None is the base alone.
            folded: Module to `ΔW [out, in]` on top of its base weight; None or empty for nothing.
            ranks: Ranks of the G clients if slots beyond are padding, for which nothing is computed.

        Raises:
            ShapeError: The adapter's modules or shapes are not the model's.
        """
        if folded is not self.live.folded_from:  # local steps pass the same mapping again
            self.live.folded = {path: folded[path].to(self.device) for path in self.layers} if folded else None
            self.live.folded_from = folded
        if adapter is None:
            self.live.pairs = self.live.ranks = None
            return
        if adapter.keys() != self.layers.keys():
            difference = ", ".join(sorted(adapter.keys() ^ self.layers.keys()))
            raise ShapeError(f"the adapter's modules are not the model's target modules; they differ in {difference}")
        pairs = {}
        for path, (A, B) in adapter.items():
            out_features, in_features = self.shapes[path]
            if A.shape[-1] != in_features or B.shape[-2] != out_features or A.shape[-2] != B.shape[-1]:
                shapes = f"A {tuple(A.shape)}, B {tuple(B.shape)}"
                raise ShapeError(f"{path}: {shapes} do not fit a weight of shape {(out_features, in_features)}")
            here = LoraPair(A.to(self.device), B.to(self.device))
            pairs[path] = here if A.ndim == 3 else LoraPair(here.A[None], here.B[None])  # [1, r, in], [1, out, r]
        self.live.pairs = pairs
        self.live.ranks = None if ranks is None else {path: [rank_of(own, path) for own in ranks] for path in pairs}

    def losses(self, packed: Pack) -> Tensor:
        """Return `-log p(target)` of every scored token of a pack `[n]`, float32. Rows do not affect each other.

        A base without support for packs gets rows padded to the longest one.
        """
        packed = packed.to(self.device)
        self._check_length(packed)
        try:
            if self.packs:
                self.live.counts = self._counts(packed.counts)
                with forward_pack(packed) as inputs:
                    return self._losses(inputs, packed.scored, packed.targets)
            input_ids, places = packed.padded()  # [rows, length], [tokens]
            self.live.counts = self._counts([rows * input_ids.shape[1] for rows in packed.rows])
            return self._losses({"input_ids": input_ids, "use_cache": False}, places[packed.scored], packed.targets)
        finally:
            self.live.counts = None

    def _check_length(self, packed: Pack) -> None:
        if self.longest is not None and (most := max(packed.lengths)) > self.longest:
            raise ModelError(
                f"a row of {most} tokens: {type(self.base).__name__} takes {self.longest} at most without that a row's loss "
                "depends on those beside it; cut it"
            )

    def _counts(self, counts: Sequence[int]) -> tuple[int, ...]:
        """Return the tokens per client; all tokens together if one client's factors serve the rows of all."""
        pairs = self.live.pairs
        shared = pairs is not None and next(iter(pairs.values())).A.shape[0] == 1
        return (sum(counts),) if shared else tuple(counts)

    def _losses(self, inputs: dict[str, Any], positions: Tensor, targets: Tensor) -> Tensor:
        """Return `-log p(target)` at `positions [n]` of the `rows * length` positions."""
        if self.head.is_linear:
            hidden: Tensor = self.base.base_model(**inputs).last_hidden_state  # [rows, length, d]
            return self.head.losses(hidden.flatten(0, 1).index_select(0, positions), targets)
        if self.head.is_adapted:  # its LoRA layer sees every token of every client
            logits = self._logits(inputs).flatten(0, 1).index_select(0, positions)  # [n, V]
        else:
            with self.head.only(positions):
                logits = self._logits(inputs)  # [1, n, V]
        return nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets, reduction="none")

    def _logits(self, inputs: dict[str, Any]) -> Tensor:
        logits: Tensor = self.base(**inputs).logits
        return logits


def load_base(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantize: Quantization = "none",
) -> PreTrainedModel:
    """Load a causal language model by folder, hub name, or ``"nano"`` for the bundled one, without running code of the model.

    Only safetensors files are opened, never a pickle such as `pytorch_model.bin`.

    Args:
        name: The model.
        dtype: Type of its weights and of its computation.
        device: Device of the model.
        quantize: Storage of the linear layers of its body; see `hetlora.model.quantize`.

    Raises:
        ModelError: The model cannot be loaded.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    load = functools.partial(
        AutoModelForCausalLM.from_pretrained, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    options = loading_options(quantize, dtype, device)
    try:
        _refuse_foreign_code(name)
        exact = quantize == "bfloat16" and _stored_types(name) == {"BF16"}  # then no weight is ever held in more bits
        model, report = load(locate_base(name), dtype=torch.bfloat16 if exact else dtype, **options)
        if not options:
            model = model.to(device)
    except (
        ImportError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise ModelError(f"cannot load the base model {name!r}: {_why(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would fill them at random without an error.
        names = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise ModelError(
            f"the base model {name!r} lacks {len(missing)} of its weights ({names}); give a whole checkpoint"
        )
    if quantize == "bfloat16":
        store_in_bfloat16(model, dtype)
        if exact:
            _take_buffers(model, build_base(name, dtype=dtype))
    if quantize != "none":
        dequantize_on_the_fly(model)
    return model


def _stored_types(name: str) -> set[str]:
    """Return the types of a checkpoint's tensors, as safetensors calls them."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    config = cached_file(locate_base(name), "config.json")
    types = set()
    for file in Path(str(config)).parent.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            types |= {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118  no mapping
    return types


def _take_buffers(model: PreTrainedModel, fresh: PreTrainedModel) -> None:
    """Give a model the buffers that no checkpoint holds, such as rotary frequencies, from one built in another type."""
    stored, device = model.state_dict().keys(), model.device
    for path, buffer in fresh.named_buffers():
        if path not in stored:
            place, _, name = path.rpartition(".")
            model.get_submodule(place).register_buffer(name, buffer.to(device), persistent=False)


def _refuse_foreign_code(name: str) -> None:
    """Refuse files that transformers would load beside the base's own weights.

    transformers applies an adapter in the folder of a base, even from a pickle, and replaces a folder with only an adapter by
    the base that the adapter names. The index of a checkpoint may name pickles. If the package `kernels` is installed, an
    attention named like a repository is a compiled kernel from the hub.

    Raises:
        ModelError: The base has such files.
    """
    from transformers import AutoConfig
    from transformers.utils import cached_file, find_adapter_config_file

    place = locate_base(name)
    if find_adapter_config_file(place) is not None:
        raise ModelError(
            f"the base model {name!r} holds an adapter (adapter_config.json), which would be put upon it; merge the two, or "
            f"take the adapter's files away; else give {_GIVE}"
        )
    config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    weights = str(getattr(config, "transformers_weights", None) or "model.safetensors.index.json")
    named = [weights]
    if weights.endswith(".index.json"):
        index = cached_file(place, weights, _raise_exceptions_for_missing_entries=False)
        named = [] if index is None else list(json.loads(Path(index).read_text("utf8"))["weight_map"].values())
    if others := sorted({str(file) for file in named if not str(file).endswith(".safetensors")}):
        raise ModelError(
            f"the base model {name!r} names {others[0]!r} for its weights, no safetensors file; give {_GIVE}"
        )
    wanted = getattr(config, "_attn_implementation", None)
    for kernel in wanted.values() if isinstance(wanted, dict) else [wanted]:
        if isinstance(kernel, str) and "/" in kernel:
            raise ModelError(
                f"the config.json of the base model {name!r} asks for the compiled kernel {kernel!r}, which would be code of "
                "others; take attn_implementation out of it"
            )


def build_base(name: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build the architecture of a base from its config.json, with random weights.

    Within `FakeTensorMode` it has no weights, so that a model of any size takes no memory; else they are not initialised.

    Raises:
        ModelError: There is no configuration of a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    try:
        config = AutoConfig.from_pretrained(locate_base(name), trust_remote_code=False)
        with no_init_weights():  # which looks at numbers, of which an outline has none
            base = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        base.tie_weights()
    except (ImportError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot build the base model {name!r}: {_why(error)}") from error
    return base


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model.

    Args:
        name: A base model, or a folder with a tokenizer alone.

    Raises:
        ModelError: There is no tokenizer, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer

    way_out = "save one beside it with tokenizer.save_pretrained(folder), or set model.tokenizer to another base"
    try:
        tokenizer = AutoTokenizer.from_pretrained(_locate(name), trust_remote_code=False)
    except (ImportError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"the base model {name!r} has no tokenizer that loads: {_reason(error)}; {way_out}") from error
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        # transformers creates a tokenizer from the model's configuration alone, which turns every text into no token.
        raise ModelError(f"the base model {name!r} has no tokenizer that loads: it knows no text; {way_out}")
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {name!r} has no end-of-text token (eos_token); set one and save it again")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pick_device(name: str) -> torch.device:
    """Return the device by name; ``"auto"`` takes CUDA, then MPS, then the CPU.

    Raises:
        ModelError: This machine has no such device.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in counts or not (index or "0").isdigit():
        raise ModelError(f"device {name!r} is none that hetlora knows; use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'")
    if int(index or 0) >= counts[kind]:
        raise ModelError(f"device {name!r} is not available on this machine; use 'cpu' or 'auto'")
    return torch.device(name)


_GIVE = f"a folder with config.json and model.safetensors, a name on the Hugging Face hub, or {NANO!r}"


def locate_base(name: str) -> str:
    """Return the folder of a base model, or its hub name.

    Raises:
        ModelError: The name is that of a folder that does not exist or holds no model.
    """
    place = _locate(name)
    if Path(place).is_dir() and not (Path(place) / "config.json").is_file():
        raise ModelError(f"the folder {name!r} has no config.json, so it is no base model; give {_GIVE}")
    return place


def _locate(name: str) -> str:
    if name == NANO:
        return str(importlib.resources.files("hetlora") / "data" / "bundled" / NANO)
    if name.lower().endswith(".gguf"):
        raise ModelError(
            f"the base model {name!r} is a GGUF file, which is for inference; hetlora base {name} DIR makes a folder of it "
            "that can be trained"
        )
    folder = expand_path(name)
    if folder.is_dir():
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"the base model {name!r} is not a folder; give {_GIVE}")
    return name


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]


def _why(error: Exception) -> str:
    """Return the reason why a base does not load, and the way out where the reason is known."""
    if found := re.search(r"Unrecognized configuration class <class '[\w.]+\.(\w+)'>", str(error)):
        return (
            f"transformers has no causal language model of a {found[1]}; where it is part of a model for images or sound, save "
            "the language model within it by itself, with save_pretrained, and give its folder"
        )
    return f"{_reason(error)}; give {_GIVE}" if isinstance(error, OSError) else _reason(error)


def _linear_shape(module: Any) -> ModuleShape:
    if isinstance(module, nn.Linear):
        return ModuleShape(module.out_features, module.in_features)
    in_features, out_features = module.weight.shape
    return ModuleShape(out_features, in_features)
