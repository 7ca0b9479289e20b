"""The first global adapter: fresh factors, or an adapter trained before."""

from __future__ import annotations

from collections.abc import Collection

import torch

from hetlora.core.adapter import Adapter, LoraPair
from hetlora.errors import ModelError
from hetlora.model.gguf_adapter import names_of, read_gguf_adapter
from hetlora.model.lora_model import LoraModel
from hetlora.model.peft_files import PeftAdapter, read_adapter

__all__ = ["describe_import", "import_adapter", "initial_adapter"]


def import_adapter(folder: str, model: LoraModel) -> dict[str, LoraPair]:
    """Read an adapter of PEFT (a folder) or llama.cpp (a GGUF file) as factors of a model.

    `B` absorbs the ratio of the scalings, so that `s B A` stays the same.

    Args:
        folder: Its folder or file.
        model: Gives the modules, their shapes and the federation's scaling.

    Raises:
        ModelError: The adapter cannot be read, or its modules or shapes are not those of the model.
    """
    try:
        is_gguf = folder.lower().endswith(".gguf")
        read = read_gguf_adapter(folder, names_of(model.base.config)) if is_gguf else read_adapter(folder)
        _check_modules(read, model)
    except ModelError as error:
        raise ModelError(f"model.adapter = {folder!r}: {error}") from error
    return {
        path: LoraPair(A, B * (scale / model.scaling))
        if (scale := read.scaling[path]) != model.scaling
        else LoraPair(A, B)
        for path, (A, B) in ((path, read.adapter[path]) for path in model.shapes)
    }


def initial_adapter(model: LoraModel, rank: int, seed: int, imported: Adapter | None = None) -> dict[str, LoraPair]:
    """Return the first global factors `A [rank, in]`, `B [out, rank]`.

    Fresh factors are drawn by the seed, with `B = 0`. The slots of an imported adapter come first, as many as fit. The other
    slots stay fresh: they change nothing yet, but have a gradient.

    Args:
        model: Draws the fresh factors.
        rank: The largest rank of the federation.
        seed: Seed of the run.
        imported: Result of `import_adapter`.
    """
    fresh = model.initial_adapter(rank, seed)
    if imported is None:
        return fresh
    result = {}
    for module, (A, B) in fresh.items():
        known = imported[module]
        slots = min(rank, known.A.shape[0])
        result[module] = LoraPair(
            torch.cat([known.A[:slots], A[slots:]]), torch.cat([known.B[:, :slots], B[:, slots:]], dim=1)
        )
    return result


def describe_import(folder: str, imported: Adapter, rank: int) -> str:
    """Describe the start from an imported adapter, and the slots that are lost."""
    widest = max(pair.A.shape[0] for pair in imported.values())
    lost = f"; its slots beyond {rank}, the largest rank of the federation, are cut away" if widest > rank else ""
    return f"starting from the adapter in {folder}, of rank {widest}{lost}"


def _check_modules(read: PeftAdapter, model: LoraModel) -> None:
    if read.adapter.keys() != model.shapes.keys():
        other = sorted(read.adapter.keys() ^ model.shapes.keys())[0]
        raise ModelError(
            f"it adapts {_summary(read.adapter)}, and the run {_summary(model.shapes)}; they differ in {other}: set "
            "model.target_modules to the modules of the adapter"
        )
    for path, (A, B) in read.adapter.items():
        has, wants = (B.shape[0], A.shape[1]), tuple(model.shapes[path])
        if has != wants:
            raise ModelError(
                f"{path} is of shape {has} in it and {wants} in the base; give the base that it was trained on"
            )


def _summary(paths: Collection[str]) -> str:
    names = sorted({path.rpartition(".")[2] for path in paths})
    return f"{len(paths)} modules ({', '.join(names)})"
