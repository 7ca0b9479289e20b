"""The memory that a client of a run needs with recomputed layers and without, and the largest rank in 2, 4 and 8 GB."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from hetlora.config import RunConfig
from hetlora.config.build import cost_model, largest_work, make_method
from hetlora.errors import HetLoraError, ModelError
from hetlora.runs.text import aligned
from hetlora.training.cost_model import CostModel

__all__ = ["DEVICES", "MemoryNeed", "MemoryPlan", "plan_memory"]

DEVICES = (2, 4, 8)
"""Memories of devices, in 10⁹ bytes."""


@dataclass(frozen=True)
class MemoryNeed:
    """The memory of one client, with its layers recomputed or not.

    Attributes:
        recompute: As `training.recompute`.
        base_bytes: Bytes of the base.
        peak_bytes: Peak training memory at the largest rank of the run.
        ranks: The largest rank that fits in each of `DEVICES`; 0 where rank 1 does not.
    """

    recompute: bool
    base_bytes: int
    peak_bytes: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one client of a run.

    Attributes:
        base: The base model.
        parameters: Its number of parameters.
        rank: The largest rank of the run.
        rows: Rows of a pass.
        length: Tokens per row.
        most: The rank beyond which slots of some module only cost.
        needs: One entry without recomputed layers, and one with them.
        missing: Why there is no entry with recomputed layers; empty if there is one.
    """

    base: str
    parameters: int
    rank: int
    rows: int
    length: int
    most: int
    needs: tuple[MemoryNeed, ...]
    missing: str

    def summary(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return asdict(self)

    def table(self) -> str:
        """Return the plan as text for a person."""
        head = ["recompute", "base MB", "peak MB", *(f"rank in {size} GB" for size in DEVICES)]
        rows = [
            [
                "yes" if one.recompute else "no",
                f"{one.base_bytes / 1e6:,.0f}",
                f"{one.peak_bytes / 1e6:,.0f}",
                *(str(rank) if rank else "none" for rank in one.ranks),
            ]
            for one in self.needs
        ]
        said = f"{self.base}: {self.parameters:,.0f} parameters. One client at rank {self.rank}, {self.rows} rows of"
        ranks = f"rank in 2 GB: the largest up to {self.most}, the size of the narrowest module, that fits by the cost model;"
        lines = [
            f"{said} {self.length} tokens, all of them scored:",
            *aligned([head, *rows]),
            f"{ranks} what Python and PyTorch take comes on top",
        ]
        return "\n".join([*lines, f"training.recompute = true: {self.missing}"] if self.missing else lines)


def plan_memory(config: RunConfig, say: Callable[[str], None] = lambda _: None) -> MemoryPlan:
    """Predict the peak memory of a client at the largest rank of a run, with its layers recomputed and not.

    Args:
        config: The run.
        say: Called with lines about the progress.

    Raises:
        HetLoraError: The base has no configuration, or the method trains its weights.
    """
    if make_method(config).trains == "weights":
        raise HetLoraError(
            f"--memory is about adapters, and method {config.method.name} trains the weights; see hetlora plan without it"
        )

    def costs(*, recompute: bool) -> CostModel:
        training = config.training.model_copy(update={"recompute": recompute})
        return cost_model(config.model_copy(update={"training": training}))

    work, rank, missing = largest_work(config), config.ranks.largest, ""
    plain = costs(recompute=False)
    models = {False: plain}
    try:
        models[True] = costs(recompute=True)
    except ModelError as error:
        missing = str(error)
    most = max(rank, min(min(shape) for shape in plain.model.shapes.values()))
    needs = []
    for recompute, model in models.items():
        say("tracing a step" + (" with recomputed layers" if recompute else ""))
        ranks = tuple(model.largest_rank(size * 10**9, work, most) for size in DEVICES)
        needs.append(MemoryNeed(recompute, model.base_bytes, model.lora(rank, work).peak_bytes, ranks))
    return MemoryPlan(config.model.base, plain.parameters, rank, work.rows, work.length, most, tuple(needs), missing)
