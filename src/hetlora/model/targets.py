"""Which modules of a base are adapted: by name, all that are linear, or the ones usual for its architecture."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from hetlora.errors import ModelError
from hetlora.model.peft_check import usual_names_of_peft
from hetlora.model.quantize import stores_transposed
from hetlora.model.text_pass import NO_TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ALL_LINEAR", "Targets", "choose_targets", "is_linear", "linear_paths", "matching_paths"]

DEFAULT_TARGETS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, Phi, OPT, Falcon 3 ...
    ("c_attn",),  # GPT-2
    ("query_key_value",),  # GPT-NeoX, Pythia, BLOOM, Falcon
    ("qkv_proj",),  # Phi-3
    ("Wqkv",),  # MPT
)
"""Attention projections by architecture, the usual choice for LoRA; the first set that a text meets is taken, else PEFT's."""

ALL_LINEAR = "all-linear"
"""Stands for every linear module but the output layer, as PEFT means it."""

SHOWN = 3
"""Paths that a message names; the others are counted."""


class Targets(NamedTuple):
    """The modules that are adapted.

    Attributes:
        names: What chooses them in the base, for PEFT as well.
        paths: The modules, in the order of the base.
        notes: What a user should know of the choice.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    notes: tuple[str, ...]


def choose_targets(
    base: PreTrainedModel,
    obstacles: Mapping[str, str],
    wanted: Sequence[str] | None,
    layers: str | Sequence[int] | None = None,
) -> Targets:
    """Choose the modules to adapt.

    Args:
        base: The base, not wrapped yet.
        obstacles: Path of a linear module to why it cannot be adapted, of `hetlora.model.text_pass`.
        wanted: Names, or "all-linear"; None for the ones usual for the architecture.
        layers: The layers in which they are adapted: "last 10", "first 4", or their numbers from 0; None for all.

    Raises:
        ModelError: A name matches nothing that can be adapted, or the architecture has none of the usual ones.
    """
    linear = linear_paths(base)
    usable = [path for path in linear if path not in obstacles]
    if wanted is None:
        names = _usual_names(base, usable, linear)
        paths, notes = matching_paths(usable, names), _few_layers(base, matching_paths(usable, names), names)
    elif ALL_LINEAR in wanted:
        if len(wanted) > 1:
            raise ModelError("target module 'all-linear' stands for all of them; give no other name beside it")
        names, paths, notes = _last_parts(usable), usable, []
    else:
        linear = linear_paths(base, head=True)
        for name in wanted:
            _check_name(base, name, linear, obstacles)
        names, notes = tuple(wanted), []
        paths = [path for path in matching_paths(linear, names) if path not in obstacles]
    if layers is not None:
        there = set(_in_layers(base, linear, layers))
        paths, notes = [path for path in paths if path in there], []
        if not paths:
            raise ModelError(f"model.layers = {layers!r}: none of the target modules is there; take others")
        for name in names if wanted is not None else ():
            if not matching_paths(paths, [name]):
                raise ModelError(f"model.layers = {layers!r}: there is no {name!r}, a target module; take other layers")
        obstacles = {path: why for path, why in obstacles.items() if path in there}
    if not paths:
        raise ModelError(f"{type(base).__name__} has no linear module that a text passes through; {_text_model(base)}")
    everything = [path for path, _ in base.named_modules()]
    # A short name may also fit a module that is not adapted; whole paths then keep PEFT from adapting it.
    fit = names if matching_paths(everything, names) == paths else tuple(paths)
    left = {path: why for path, why in obstacles.items() if path in matching_paths(linear, names)}
    if wanted is not None and ALL_LINEAR in wanted:
        left = dict(obstacles)
    return Targets(fit, tuple(paths), (*notes, *_left_out(base, len(paths), left)))


def _in_layers(base: PreTrainedModel, linear: Sequence[str], layers: str | Sequence[int]) -> list[str]:
    """Return the paths of linear modules within some of the base's layers, which are counted in these paths."""
    if not layers or (isinstance(layers, str) and not re.fullmatch(r"(last|first) [1-9]\d{0,3}", layers)):
        raise ModelError(f"model.layers = {layers!r}: give 'last 10', 'first 4' or a list of numbers from 0")
    places = {path: int(at[1]) for path in linear if (at := re.search(r"\.(\d+)\.", path))}
    count = 1 + max(places.values(), default=-1)
    if isinstance(layers, str):
        which, _, text = layers.partition(" ")
        number = int(text)
        chosen = set(range(count - number, count) if which == "last" else range(number))
    else:
        number, chosen = 1 + max(layers), set(layers)
    if number > count:
        raise ModelError(f"model.layers = {layers!r}: {type(base).__name__} has {count} layers, from 0 to {count - 1}")
    return [path for path, place in places.items() if place in chosen]


def linear_paths(base: PreTrainedModel, *, head: bool = False) -> list[str]:
    """Return the paths of the linear modules, with the output layer or without."""
    output = base.get_output_embeddings()
    return [path for path, module in base.named_modules() if is_linear(module) and (head or module is not output)]


def matching_paths(paths: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the paths that a name stands for: the whole path, or its last parts.

    Example:
        >>> matching_paths(["layers.0.q_proj", "layers.0.v_proj"], ["q_proj"])
        ['layers.0.q_proj']
    """
    return [path for path in paths if any(path == name or path.endswith(f".{name}") for name in names)]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is linear; GPT-2's Conv1D is, with a weight stored `[in, out]`."""
    return isinstance(module, nn.Linear) or stores_transposed(module)


def _usual_names(base: PreTrainedModel, usable: Sequence[str], linear: Sequence[str]) -> tuple[str, ...]:
    """Return the names usual for an architecture, of which each stands for a module that can be adapted."""
    have = set(_last_parts(usable))
    for candidates in (*DEFAULT_TARGETS, *usual_names_of_peft(base)):
        if set(candidates) <= have:
            return candidates
    raise ModelError(
        f"no default target modules for this architecture; set model.target_modules, to {ALL_LINEAR!r} or to names "
        f"({_have(base, usable or linear)})"
    )


def _check_name(base: PreTrainedModel, name: str, linear: Sequence[str], obstacles: Mapping[str, str]) -> None:
    """Refuse a name that stands for no linear module, or for one that cannot be adapted."""
    found = matching_paths(linear, [name])
    if not found:
        weights = [path for path, _ in base.named_parameters() if path.split(".")[-1] == name.split(".")[-1]]
        experts = f"; {weights[0]} is a weight of several experts together, which is not adapted" if weights else ""
        raise ModelError(
            f"target module {name!r} is no linear module of the base model; {_have(base, linear)}{experts}"
        )
    for path in found:
        why = obstacles.get(path, "")
        if why and (why != NO_TEXT or all(obstacles.get(other) for other in found)):
            raise ModelError(
                f"target module {name!r}: {path} cannot be adapted: {why}; take others into model.target_modules"
            )


def _have(base: PreTrainedModel, paths: Sequence[str]) -> str:
    return f"this {type(base).__name__} has {', '.join(_last_parts(paths)) or 'none'}"


def _last_parts(paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted({path.rpartition(".")[2] for path in paths}))


def _left_out(base: PreTrainedModel, adapted: int, left: Mapping[str, str]) -> list[str]:
    """Say which modules of the chosen names are not adapted, and why."""
    said = []
    for why, count in Counter(left.values()).items():
        names = ", ".join(_last_parts([path for path in left if left[path] == why])[:SHOWN])
        rest = "are left as they are, because no text passes through them" if why == NO_TEXT else f"are not: {why}"
        said.append(f"{type(base).__name__}: {adapted} modules are adapted; {count} others ({names}) {rest}")
    return said


def _few_layers(base: PreTrainedModel, paths: Sequence[str], names: Sequence[str]) -> list[str]:
    """Say it where the usual modules are in some of the layers only, as in a hybrid of attention and recurrence."""
    places = [found for path in paths if (found := re.match(r"(.*?)\.(\d+)\.", path))]
    stacks = {found[1] for found in places}
    if len(stacks) != 1 or len(places) < len(paths):
        return []
    reached, layers = len({found[2] for found in places}), len(list(base.get_submodule(stacks.pop()).children()))
    if reached == layers:
        return []
    few = f"{', '.join(names)} are in {reached} of the base's {layers} layers, and only these are adapted"
    return [f"{few}; model.target_modules can name modules of the others"]


def _text_model(base: PreTrainedModel) -> str:
    if base.config.get_text_config() is base.config:
        return "give another base"
    return "save its language model by itself, with save_pretrained, and give its folder"
