"""What a federation starts from: fresh factors, or an adapter that was trained before."""

from __future__ import annotations

from collections.abc import Collection

import torch

from hetlora.core.adapter import Adapter, LoraPair
from hetlora.errors import ModelError
from hetlora.model.lora_model import LoraModel
from hetlora.model.peft_files import PeftAdapter, read_adapter

__all__ = ["describe_import", "import_adapter", "initial_adapter"]


def import_adapter(folder: str, model: LoraModel) -> dict[str, LoraPair]:
    """Read a PEFT adapter as factors of a model: `B` takes over the difference of the scalings, so that `s B A` is the same.

    Args:
        folder: Of the adapter.
        model: Says which modules there are, their shapes and the federation's scaling.

    Raises:
        ModelError: It cannot be read, or adapts other modules than the model, or modules of other shapes.
    """
    try:
        read = read_adapter(folder)
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

    Fresh ones are drawn by the seed, with `B = 0`. An imported adapter takes the first slots, as many as there is room for; the
    others stay fresh, so that they change nothing until they are trained, and can be.

    Args:
        model: Draws the fresh factors.
        rank: The largest of the federation.
        seed: Of the run.
        imported: Of `import_adapter`.
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
    """Say what a federation of this largest rank starts from, and what of it is lost."""
    widest = max(pair.A.shape[0] for pair in imported.values())
    lost = f"; its slots beyond {rank}, the largest rank of the federation, are cut away" if widest > rank else ""
    return f"starting from the adapter in {folder}, of rank {widest}{lost}"


def _check_modules(read: PeftAdapter, model: LoraModel) -> None:
    if read.adapter.keys() != model.shapes.keys():
        other = sorted(read.adapter.keys() ^ model.shapes.keys())[0]
        raise ModelError(
            f"it adapts {_shown(read.adapter)}, and the run {_shown(model.shapes)}; they differ in {other}: set "
            "model.target_modules to the modules of the adapter"
        )
    for path, (A, B) in read.adapter.items():
        has, wants = (B.shape[0], A.shape[1]), tuple(model.shapes[path])
        if has != wants:
            raise ModelError(
                f"{path} is of shape {has} in it and {wants} in the base; give the base that it was trained on"
            )


def _shown(paths: Collection[str]) -> str:
    names = sorted({path.rpartition(".")[2] for path in paths})
    return f"{len(paths)} modules ({', '.join(names)})"
