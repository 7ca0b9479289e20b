"""Export of a run as a PEFT folder, with a file for llama.cpp beside it, or as a whole model; with a model card."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from hetlora.commands.export.asking import how_to_ask
from hetlora.commands.export.check import ReadBack, check_export
from hetlora.commands.export.model_card import Card, model_card
from hetlora.commands.export.tier_scores import TierScores, score_tiers
from hetlora.config.build_model import build_model, build_outline
from hetlora.core.adapter import Adapter, map_tensors, pad
from hetlora.errors import HetLoraError, expand_path
from hetlora.model.gguf_adapter import check_gguf_adapter, names_of, write_gguf_adapter
from hetlora.model.lora_model import load_base, load_tokenizer
from hetlora.model.merge import write_merged
from hetlora.model.peft_files import export_adapter
from hetlora.runs.display import QuietDisplay
from hetlora.runs.folder import make_folder
from hetlora.runs.process import set_up
from hetlora.runs.trained_run import AdapterSelection, TrainedRun, open_run

__all__ = ["ExportResult", "describe_export", "export_run"]

DType = Literal["float32", "bfloat16", "float16"]
Format = Literal["peft", "gguf"]

GGUF = "adapter.gguf"
MODELFILE = """# ollama create NAME -f Modelfile, after the next line names the GGUF file of the base
FROM ./base.gguf
ADAPTER ./adapter.gguf
PARAMETER temperature 0
"""


@dataclass(frozen=True)
class ExportResult:
    """An export.

    Attributes:
        folder: Its folder.
        merged: Whether it is a whole model instead of an adapter.
        ranks: Number of modules per rank of the adapter; empty for a whole model.
        dtype: Of the numbers.
        round: The last round of the exported state.
        source: Description of what was exported.
        scores: Scores per tier; None if not requested.
        gguf: The file for llama.cpp; None if not requested.
        check: Comparison with what another program computes; None if not requested.
    """

    folder: Path
    merged: bool
    ranks: dict[int, int]
    dtype: str
    round: int
    source: str
    scores: TierScores | None
    gguf: Path | None = None
    check: ReadBack | None = None

    def __str__(self) -> str:
        return describe_export(self)

    def summary(self) -> dict[str, Any]:
        """Return the object that ``hetlora export --json`` prints."""
        return {
            "folder": str(self.folder),
            "kind": "model" if self.merged else "adapter",
            "ranks": self.ranks,
            "dtype": self.dtype,
            "round": self.round,
            "source": self.source,
            "scores": None if self.scores is None else self.scores.summary(),
            "gguf": None if self.gguf is None else str(self.gguf),
            "check": None if self.check is None else self.check.summary(),
        }


def export_run(
    run: os.PathLike[str] | str,
    output: os.PathLike[str] | str | None = None,
    *,
    rank: int | None = None,
    tier: str | None = None,
    client: str | None = None,
    merged: bool = False,
    dtype: DType = "float32",
    file_format: Format = "peft",
    equal_ranks: bool = False,
    scores: bool = False,
    check: bool = True,
    display: QuietDisplay | None = None,
) -> ExportResult:
    """Export a run, complete or not, as a PEFT folder or a whole model, with a model card.

    Without `rank`, `tier`, `client` and `merged` this exports the whole global adapter.

    Args:
        run: Folder of the run.
        output: A new folder. By default a folder within `run`/exports, named after the part.
        rank: Export the first `rank` slots of the global adapter.
        tier: Export the adapter for a tier of the results, at the rank that all its devices afford.
        client: Export the adapter that this client would be served; of a personal method its own adapter.
        merged: Export the whole model, with the whole adapter merged into its weights.
        dtype: Of the written numbers.
        file_format: "gguf" also writes the adapter as a file for llama.cpp and Ollama, with a Modelfile.
        equal_ranks: Pad modules of smaller rank with zero slots, for programs that take a single rank.
        scores: Also measure each tier's adapter on the run's held-out rows.
        check: Load the export in a new process, with the program that it is for, and compare logits.
        display: Shows the progress.

    Raises:
        HetLoraError: The run or part does not exist, the folder exists or cannot be written, no adapter can hold the
            result, or another program computes something else with it.
    """
    part, display = AdapterSelection(rank, tier, client), display or QuietDisplay()
    if merged and part != AdapterSelection():
        raise HetLoraError("a merged model takes the whole adapter; give no rank, tier or client with it")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise HetLoraError(f"dtype {dtype!r} is none that is written; use float32, bfloat16 or float16")
    _check_format(file_format, dtype, merged=merged)
    with set_up():
        learned = open_run(run, display.say)
        if file_format == "gguf":
            names_of(build_outline(learned.config).base.config)  # before slow work
        adapter = _adapter(learned, part, merged=merged, equal_ranks=equal_ranks)
        place = _place(learned, output, "model" if merged else part.name)  # before slow work
        measured = score_tiers(learned, display) if scores else None
        ranks = {} if merged or adapter is None else Counter(int(pair.A.shape[0]) for pair in adapter.values())
        file = place / GGUF if file_format == "gguf" else None
        done = ExportResult(
            place, merged, dict(sorted(ranks.items())), dtype, learned.round, learned.source, measured, file
        )
        return _write(learned, adapter, done, part, display if check else None)


def _check_format(file_format: str, dtype: str, *, merged: bool) -> None:
    if file_format not in ("peft", "gguf"):
        raise HetLoraError(f"format {file_format!r} is none that is written; use peft or gguf")
    if file_format == "gguf" and merged:
        raise HetLoraError(
            "a GGUF file holds the adapter; leave --merged away, or convert the merged folder with llama.cpp"
        )
    if file_format == "gguf" and dtype == "bfloat16":
        raise HetLoraError("llama.cpp's adapters are tested in float32 and float16; give --dtype float16")


def _adapter(learned: TrainedRun, part: AdapterSelection, *, merged: bool, equal_ranks: bool) -> Adapter | None:
    """Return the adapter to write or merge; None if the run itself has merged it."""
    if learned.in_weights and not merged:
        raise HetLoraError(
            f"method {learned.config.method.name} has changed the base's weights, which no adapter holds; export the merged "
            "model (--merged)"
        )
    if merged and learned.personal:
        learned.adapter(part)  # raises an error that names the clients
    if learned.written_model:
        return None
    adapter = learned.adapter(part)
    return pad(adapter, max(pair.A.shape[0] for pair in adapter.values())) if equal_ranks else adapter


def _place(learned: TrainedRun, output: os.PathLike[str] | str | None, name: str) -> Path:
    """Return the path of the export, which does not exist yet."""
    if output is None:
        exports = learned.folder / "exports"
        names = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
        return next(place for place in map(exports.__truediv__, names) if not (place.exists() or place.is_symlink()))
    place = expand_path(output)
    if place.exists() or place.is_symlink():
        raise HetLoraError(f"{str(place)!r} exists, and nothing is written over; give another folder")
    return place


def _write(
    learned: TrainedRun, adapter: Adapter | None, done: ExportResult, part: AdapterSelection, check: QuietDisplay | None
) -> ExportResult:
    """Write to a temporary folder, check it unless `check` is None, and rename it: an existing export is complete."""
    place = done.folder
    try:
        make_folder(place.parent, exist_ok=True)
        # A unique name, so that the leftovers of a killed export do not block the next one. The export is a subfolder, because
        # the temporary folder is accessible to its owner only.
        with tempfile.TemporaryDirectory(
            prefix=f"{place.name}.", suffix=".part", dir=place.parent, ignore_cleanup_errors=True
        ) as beside:
            unfinished = Path(beside) / "whole"
            make_folder(unfinished)
            if done.merged:
                _write_model(learned, adapter, unfinished, done.dtype)
            else:
                assert adapter is not None
                _write_adapter(learned, adapter, unfinished, done)
            if (template := learned.config.data.chat_template) is not None:
                text = expand_path(template).read_text("utf-8-sig")
                (unfinished / "chat_template.jinja").write_text(text, encoding="utf8")
            if check is not None:
                check.say("reading it back in another program, which --no-check leaves out")
                found = check_export(learned, adapter, unfinished, merged=done.merged, dtype=done.dtype)
                done = replace(done, check=found)
            asking = how_to_ask(learned.config)
            card = model_card(
                learned,
                Card(
                    place,
                    done.merged,
                    done.ranks,
                    done.dtype,
                    part,
                    done.scores,
                    asking,
                    done.check,
                    done.gguf is not None,
                ),
            )
            (unfinished / "README.md").write_text(card, encoding="utf8", errors="backslashreplace")
            unfinished.rename(place)
    except (OSError, ValueError, SafetensorError) as error:
        raise HetLoraError(
            f"cannot write {str(place)!r}: {error}; give a folder that you may write, with some space"
        ) from error
    return done


def _write_adapter(learned: TrainedRun, adapter: Adapter, folder: Path, done: ExportResult) -> None:
    dtype = done.dtype
    number_type: torch.dtype = getattr(torch, dtype)
    model = build_outline(learned.config)
    for module, pair in map_tensors(lambda factor: factor.to(number_type), adapter).items():
        if not all(bool(factor.isfinite().all()) for factor in pair):
            raise HetLoraError(f"{module} has numbers that {dtype} does not hold; use bfloat16 or float32")
    export_adapter(
        adapter,
        folder,
        base=learned.named.model.base,  # not its path on this machine
        target_modules=model.target_modules,
        scaling=model.scaling,
        fan_in_fan_out=model.fan_in_fan_out,
        dtype=number_type,
    )
    if done.gguf is not None:
        names, base = names_of(model.base.config), learned.named.model.base
        write_gguf_adapter(adapter, folder / GGUF, names, scaling=model.scaling, base=base, dtype=number_type)
        check_gguf_adapter(folder / GGUF, adapter, names, model.scaling, number_type)
        (folder / "Modelfile").write_text(MODELFILE, encoding="utf8")


def _write_model(learned: TrainedRun, adapter: Adapter | None, folder: Path, dtype: str) -> None:
    config, number_type = learned.config, getattr(torch, dtype)
    tokenizer = config.model.tokenizer or config.model.base
    if adapter is None:  # the run itself has merged it
        assert learned.written_model is not None
        written = str(learned.written_model)
        load_base(written).to(number_type).save_pretrained(folder)
        load_tokenizer(written).save_pretrained(folder)
    else:
        learned.check_unchanged("model.base", "model.tokenizer")
        base, folded = config.model.base, learned.folded
        # The outline knows how to merge; only a quantised base needs its weights here.
        model = build_outline(config) if config.model.quantize == "none" else build_model(config)
        write_merged(model, adapter, folded, folder, base=base, tokenizer=tokenizer, dtype=number_type)
    _check_finite(folder, dtype)


def _check_finite(folder: Path, dtype: str) -> None:
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise HetLoraError(f"{name} has numbers that {dtype} does not hold; use bfloat16 or float32")


def describe_export(done: ExportResult) -> str:
    """Describe an export for a person."""
    ranks = ", ".join(f"{count} modules of rank {rank}" for rank, count in done.ranks.items())
    if len(done.ranks) == 1:
        ranks = f"rank {next(iter(done.ranks))}"
    kind = "merged model:" if done.merged else "adapter (PEFT):"
    lines = [f"{kind:<15} {done.folder}", f"{'':<15} {ranks or 'whole weights'}, {done.dtype}, from {done.source}"]
    if done.gguf is not None:
        lines.append(f"{'llama.cpp:':<15} {done.gguf}, and a Modelfile for Ollama")
    if done.check is not None:
        compared, found = done.check.lines()
        lines += [f"{'read back:':<15} {compared}", f"{'':<15} {found}"]
    return "\n".join([*lines, *([] if done.scores is None else ["", done.scores.table()])])
