"""An export is loaded by another process, with the tool that it is for, and must give the logits that the run has learned."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hetlora.commands.export import read_back
from hetlora.config import RunConfig
from hetlora.config.build_data import load_federation, make_tokenization
from hetlora.config.build_model import build_model, build_tokenizer
from hetlora.core.adapter import Adapter, map_tensors
from hetlora.errors import HetLoraError, printable
from hetlora.model.lora_model import LoraModel, locate_base, pick_device
from hetlora.runs.trained_run import TrainedRun
from hetlora.training.generation import cache_agrees

__all__ = ["ReadBack", "check_export"]

ROWS, TOKENS = 4, 64
"""Rows that are compared, and tokens of each at most: a vocabulary may have 250,000 logits a token."""

ROUNDING = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""By type: what the largest logit times this may differ by. The sums run in another order, and each is rounded."""


@dataclass(frozen=True)
class ReadBack:
    """What another program computes with an export.

    Attributes:
        tool: The program, with its version.
        rows: How many rows were compared.
        of_the_run: Whether they are the run's own; else they are made up, for the run's are not here.
        difference: The largest difference of a logit from the run's.
        largest: The largest logit of the run's.
        learned: The largest change of a logit by what the run has learned; None where its base is not known beside it.
        allowed: The largest difference that may be rounding.
        cache: Whether transformers' `generate` answers as whole passes do.
    """

    tool: str
    rows: int
    of_the_run: bool
    difference: float
    largest: float
    learned: float | None
    allowed: float
    cache: bool

    def summary(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**vars(self)}

    def lines(self) -> tuple[str, str]:
        """Return what was compared, and what was found."""
        whose = "of the run" if self.of_the_run else "made up, for the run's own are not here"
        learned = "" if self.learned is None else f"; what was learned changes them by {self.learned:.2g}"
        return (
            f"by {self.tool} on {self.rows} rows {whose}",
            f"logits up to {self.largest:.3g} differ by at most {self.difference:.1g}{learned}",
        )


def check_export(learned: TrainedRun, adapter: Adapter | None, folder: Path, *, merged: bool, dtype: str) -> ReadBack:
    """Load what was written in a new process, and compare logits on rows of the run.

    Args:
        learned: The run.
        adapter: What was written or merged; None where the run itself had merged it.
        folder: Where it was written.
        merged: Whether it is a whole model.
        dtype: Of the numbers written.

    Raises:
        HetLoraError: The tool cannot load it, or computes something else with it.
    """
    config = learned.config
    rows, of_the_run = _rows(config)
    ours, base, cache = _learned_logits(learned, adapter, rows, merged=merged, dtype=dtype)
    tool = "transformers" if merged else "peft"
    tool = f"{tool} {version(tool)}"
    theirs = _logits_elsewhere(config, folder, rows, merged=merged, dtype=dtype, tool=tool)
    if any(one.shape != other.shape for one, other in zip(ours, theirs, strict=True)):
        raise HetLoraError(f"{tool} gives logits of another shape with what was written, {_NOTHING_LEFT}")
    largest, change = max(float(one.abs().max()) for one in ours), None if base is None else _apart(ours, base)
    allowed = largest * max(ROUNDING[config.model.dtype], ROUNDING[dtype] if merged else 0.0)
    if change is not None and allowed == largest * ROUNDING["float32"]:  # little was learned: most of it must be there
        allowed = min(allowed, max(allowed / 10, change / 2))
    done = ReadBack(tool, len(rows), of_the_run, _apart(ours, theirs), largest, change, allowed, cache)
    if not done.difference <= done.allowed:  # nor is a NaN
        raise HetLoraError(
            f"{tool} computes something else with what was written: logits up to {largest:.3g} differ by {done.difference:.3g} "
            f"from the run's, and rounding explains {allowed:.1g}; {_NOTHING_LEFT}"
        )
    return done


def _apart(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest difference; NaN where there is one."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(one, other, strict=True)]).max())


_NOTHING_LEFT = "so nothing was written; --no-check (check=False) writes it nevertheless"


def _rows(config: RunConfig) -> tuple[list[tuple[int, ...]], bool]:
    """Return the tokens of a held-out row of each of the first clients, and whether there are any: else they are made up."""
    tokenizer = build_tokenizer(config)
    found: list[tuple[int, ...]] = []
    if config.flower.clients != "nodes":
        try:
            federation, tokenization = load_federation(config), make_tokenization(config, tokenizer)
            for name in federation.names[: 4 * ROWS]:
                found += [
                    example.ids[:TOKENS] for example in tokenization.examples(federation.clients[name].test[:1])[:1]
                ]
        except HetLoraError:  # a complete run can be taken away without its data
            found = []
    if found:
        return found[:ROWS], True
    drawn = torch.randint(len(tokenizer), (ROWS, TOKENS // 4), generator=torch.Generator().manual_seed(config.seed))
    return [tuple(row) for row in drawn.tolist()], False


def _learned_logits(
    learned: TrainedRun, adapter: Adapter | None, rows: list[tuple[int, ...]], *, merged: bool, dtype: str
) -> tuple[list[Tensor], list[Tensor] | None, bool]:
    """Return logits `[tokens, vocabulary]` of each row of the run, of its base if that is known, and whether caches agree."""
    model_config = learned.config.model
    if not merged or learned.written_model is not None:  # what others load has no fewer bits
        model_config = model_config.model_copy(update={"quantize": "none"})
    if adapter is None:
        model_config = model_config.model_copy(update={"base": str(learned.written_model)})
    elif not merged:
        adapter = map_tensors(lambda factor: factor.to(getattr(torch, dtype)).float(), adapter)
    model = build_model(learned.config.model_copy(update={"model": model_config}))
    model.use(adapter, learned.folded or None)
    found = _logits(model, rows)
    by_length = sorted(rows, key=len)
    cache = cache_agrees(model, by_length[0], by_length[-1])
    model.use(None)
    base = None if adapter is None else _logits(model, rows)
    del model
    gc.collect()  # the other process needs as much
    return found, base, cache


def _logits(model: LoraModel, rows: list[tuple[int, ...]]) -> list[Tensor]:
    with torch.inference_mode():
        return [model.base(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().cpu() for ids in rows]


def _logits_elsewhere(
    config: RunConfig, folder: Path, rows: list[tuple[int, ...]], *, merged: bool, dtype: str, tool: str
) -> list[Tensor]:
    """Return the logits of each row as the tool computes them."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        request, answer = Path(place) / "request.json", Path(place) / "logits.safetensors"
        asked = {
            "model": str(folder) if merged else locate_base(config.model.base),
            "dtype": dtype if merged else config.model.dtype,
            "adapter": None if merged else str(folder),
            "device": str(pick_device(config.model.device)),
            "rows": rows,
            "answer": str(answer),
        }
        request.write_text(json.dumps(asked), encoding="utf8")
        # It finds the packages that this process has found, wherever they are.
        environment = {
            **os.environ,
            "PYTHONSAFEPATH": "1",
            "PYTHONPATH": os.pathsep.join(place for place in sys.path if place),
        }
        command = [sys.executable, str(read_back.__file__), str(request)]
        done = subprocess.run(  # noqa: S603  our own interpreter, our own code
            command, env=environment, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode:
            reason = next(
                (line for line in reversed(done.stderr.splitlines()) if line.strip()), f"code {done.returncode}"
            )
            raise HetLoraError(f"{tool} cannot load what was written ({printable(reason)[:300]}), {_NOTHING_LEFT}")
        found = load_file(answer)
        return [found[str(row)] for row in range(len(rows))]
