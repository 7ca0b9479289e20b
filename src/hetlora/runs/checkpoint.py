"""Checkpoints: written atomically after a round, and read only if undamaged.

A checkpoint is one safetensors file with the tensors of the server's state: the factors ``adapter.MODULE.A``; those of the i-th
moment, ``moments.I.MODULE.A``, and of the i-th client that keeps some, ``kept.I.MODULE.A`` (and B); ``folded.MODULE``. All else
is JSON in the header's metadata, with the SHA-256 of the whole file, computed with zeros in place of the digest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from torch import Tensor

from hetlora.core.adapter import Adapter, LoraPair, Rank
from hetlora.core.types import BaseDelta, ServerState
from hetlora.errors import CheckpointError, HetLoraError
from hetlora.runs.folder import atomic_write, make_folder
from hetlora.runs.result import Measurement, RunTotals
from hetlora.training.evaluation import Answer, Score

__all__ = ["Checkpoint", "checkpoint_path", "differences", "newest", "read_checkpoint", "write_checkpoint"]

FOLDER = "checkpoints"
KEPT = 2
"""Checkpoints on disk: the newest, and the one before in case it is damaged."""

FORMAT, VERSION = "hetlora-checkpoint", "1"
PREFIX = b'{"__metadata__":{"sha256":"'
PLACE = 8 + len(PREFIX)
"""Offset of the SHA-256 in the file, in 64 hexadecimal digits."""
ZEROS = b"0" * 64
ALIGNMENT = 64
"""The tensors begin at a multiple of it; spaces pad the header, as in safetensors."""

DTYPES = {"F64": torch.float64, "I64": torch.int64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Checkpoint:
    """A run after a round.

    Attributes:
        progress: The state after the round, and the totals.
        base: Measurement of the base.
        records: Length of the records file, in bytes.
        records_sha256: SHA-256 of these bytes.
        seconds: Wall-clock time so far.
        config: The whole configuration, as plain data.
        digests: `hetlora.runs.runner.Experiment.digests`.
        threads: PyTorch's threads. The grouping of clients depends on them, and so do the last bits of the adapter.
        made_by: What else decides the last bits: the versions of ``hetlora``, ``torch``, ``transformers`` and ``peft``, and the
            type of the ``device``.
    """

    progress: RunTotals
    base: Measurement
    records: int
    records_sha256: str
    seconds: float
    config: Mapping[str, Any]
    digests: Mapping[str, str | None]
    threads: int
    made_by: Mapping[str, str]


def write_checkpoint(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write a checkpoint into ``checkpoints`` of a run's folder, remove all others but the one before, and return its file.

    Contiguous tensors on the CPU are written without a copy.

    Raises:
        OSError: It cannot be written; the former checkpoints are still there.
        CheckpointError: A tensor is of a type that no checkpoint holds.
    """
    state = checkpoint.progress.state
    # Wide numbers first, so that every tensor is aligned.
    tensors = sorted(_tensors(state), key=lambda item: -item[1].element_size())
    table, end = {}, 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        _require(tensor.dtype in NAMES, f"{name} is of {tensor.dtype}, which no checkpoint holds")
        table[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    metadata = {"sha256": ZEROS.decode(), "format": FORMAT, "version": VERSION, "state": json.dumps(_plain(checkpoint))}
    header = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    path = checkpoint_path(checkpoint, folder)
    make_folder(path.parent, exist_ok=True)
    digest = hashlib.sha256()
    with atomic_write(path) as file:
        for part in _parts(header, tensors):
            file.write(part)
            digest.update(part)
        file.seek(PLACE)
        file.write(digest.hexdigest().encode())
    _remove_others(path)
    return path


def checkpoint_path(checkpoint: Checkpoint, folder: Path) -> Path:
    """Return the file of a checkpoint in a run's folder."""
    return folder / FOLDER / _name(checkpoint.progress.state.round)


def newest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest usable checkpoint of a run; None if there are no checkpoints.

    Args:
        folder: The run's folder.
        say: Gets a message about every checkpoint that cannot be used.

    Raises:
        HetLoraError: No checkpoint can be used, or their folder cannot be read.
    """
    reasons = []
    try:
        generations = _generations(folder / FOLDER)
    except OSError as error:
        raise HetLoraError(
            f"no checkpoint can be looked for: {error}; bring the folder back, or remove {folder / FOLDER} to begin at round 0"
        ) from error
    for path in generations:
        try:
            checkpoint = read_checkpoint(path)
            _check_records(checkpoint, folder / "records.jsonl")
        except CheckpointError as error:
            reasons.append(f"{path} cannot be used: {error}")
            say(reasons[-1])
        else:
            return checkpoint
    if reasons:
        way_out = f"remove {folder / FOLDER} to begin at round 0"
        raise HetLoraError("no checkpoint is left to go on from; " + "; ".join([*reasons, way_out]))
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint of a file.

    Raises:
        CheckpointError: It is damaged, of another version of the format, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            checkpoint = _read(file)
        _require(path.name == _name(checkpoint.progress.state.round), "its name is not that of its round")
    except CheckpointError:
        raise
    except Exception as error:  # damage may raise anything
        raise CheckpointError(f"{type(error).__name__}: {error}"[:500]) from error
    return checkpoint


def differences(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    digests: Mapping[str, str | None],
    made_by: Mapping[str, str],
) -> list[str]:
    """Return what has changed since the checkpoint and would change the run, one line each; `[tracking]` may change.

    Args:
        checkpoint: The checkpoint of the run.
        config: The whole configuration now, as plain data.
        digests: Digests of base, tokenizer and data now.
        made_by: Versions and device now.
    """
    before, now = dict(_leaves(checkpoint.config)), dict(_leaves(config))
    changed = [
        f"{key} = {now.get(key)!r}, and the run began with {before.get(key)!r}"
        for key in dict.fromkeys([*before, *now])
        if not key.startswith("tracking.") and (key in before, before.get(key)) != (key in now, now.get(key))
    ]
    changed += [
        f"{key} = {now.get(key)!r} "
        + ("does not hold what it held when the run began" if digests.get(key) else "is not found here")
        for key in dict.fromkeys([*checkpoint.digests, *digests])
        if checkpoint.digests.get(key) != digests.get(key)
    ]
    changed += [
        f"{name} is {made_by.get(name, 'none')}, and the run began with {checkpoint.made_by.get(name, 'none')}"
        for name in dict.fromkeys([*checkpoint.made_by, *made_by])
        if checkpoint.made_by.get(name) != made_by.get(name)
    ]
    return changed


def _leaves(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _leaves(item, f"{path}{key}.")
        else:
            yield f"{path}{key}", item


# Files --------------------------------------------------------------------------------------------------------------


def _name(round_number: int) -> str:
    return f"round-{round_number:06d}.safetensors"


def _generations(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first."""
    try:
        found = [path for path in folder.iterdir() if re.fullmatch(r"round-\d{6,}\.safetensors", path.name)]
    except FileNotFoundError:
        if folder.is_symlink():  # perhaps to a disk that is not mounted
            raise
        return []
    return sorted(found, key=_round_of, reverse=True)


def _round_of(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))


def _remove_others(path: Path) -> None:
    """Remove all but this checkpoint and the one before it, and the partial files of killed processes."""
    found = _generations(path.parent)
    kept = [other for other in found if _round_of(other) <= _round_of(path)][:KEPT]
    # One of a later round is damaged, or the run would have been resumed from it.
    for other in [*(other for other in found if other not in kept), *path.parent.glob("round-*.part")]:
        other.unlink(missing_ok=True)


def _check_records(checkpoint: Checkpoint, path: Path) -> None:
    """Refuse a checkpoint whose records are missing or changed."""
    try:
        with path.open("rb") as file:
            begun = file.read(checkpoint.records)
        last = json.loads(begun.rstrip(b"\n").rpartition(b"\n")[2])
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the records before it are not there: {error}") from error
    whole = len(begun) == checkpoint.records and begun.endswith(b"\n") and isinstance(last, dict)
    _require(
        whole and last.get("kind") == "round" and last.get("round") == checkpoint.progress.state.round,
        f"{path.name} does not hold the records before it",
    )
    same = hashlib.sha256(begun).hexdigest() == checkpoint.records_sha256
    _require(same, f"the records before it in {path.name} are no longer those that were written")


# Writing ------------------------------------------------------------------------------------------------------------


def _tensors(state: ServerState) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a state with its name."""
    adapters = {"adapter": state.adapter}
    adapters |= {f"moments.{index}": adapter for index, adapter in enumerate(state.moments.values())}
    adapters |= {f"kept.{index}": adapter for index, adapter in enumerate(state.kept.values())}
    for part, adapter in adapters.items():
        for module, (A, B) in adapter.items():
            yield f"{part}.{module}.A", A
            yield f"{part}.{module}.B", B
    for module, delta in state.folded.delta.items():
        yield f"folded.{module}", delta


def _parts(header: bytes, tensors: list[tuple[str, Tensor]]) -> Iterator[Any]:
    """Yield the file's bytes, one tensor at a time."""
    yield len(header).to_bytes(8, "little") + header
    for _, tensor in tensors:
        yield _bytes_of(tensor.detach().cpu().contiguous())


def _bytes_of(tensor: Tensor) -> Any:
    """Return the memory of a contiguous tensor as bytes."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _plain(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a checkpoint without its tensors, for `_State`."""
    progress, state = checkpoint.progress, checkpoint.progress.state
    return {
        "made_by": dict(checkpoint.made_by),
        "config": checkpoint.config,
        "digests": dict(checkpoint.digests),
        "threads": checkpoint.threads,
        "records": checkpoint.records,
        "records_sha256": checkpoint.records_sha256,
        "seconds": checkpoint.seconds,
        "base": _plain_measurement(checkpoint.base),
        "final": None if progress.final is None else _plain_measurement(progress.final),
        "counts": {name: getattr(progress, name) for name in _Counts.model_fields},
        "round": state.round,
        "seed": state.seed,
        "ranks": {name: dict(rank) if isinstance(rank, Mapping) else rank for name, rank in state.ranks.items()},
        "answered": dict(state.answered),
        "folded_sizes": {str(number): size for number, size in state.folded.sizes.items()},
        "moments": list(state.moments),
        "kept": list(state.kept),
    }


def _plain_measurement(measurement: Measurement) -> dict[str, Any]:
    return {
        "clients": {name: asdict(score) for name, score in measurement.clients.items()},
        "tiers": {name: asdict(score) for name, score in measurement.tiers.items()},
        "answers": [asdict(answer) for answer in measurement.answers],
    }


# Reading ------------------------------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Score(_Strict):
    nll: float
    tokens: NonNegativeInt
    rouge: float
    generated: NonNegativeInt


class _Answer(_Strict):
    client: str
    prompt: str
    expected: str
    text: str
    rouge_l: float


class _Measurement(_Strict):
    clients: dict[str, _Score]
    tiers: dict[str, _Score]
    answers: list[_Answer]

    def measurement(self) -> Measurement:
        clients, tiers = (
            {name: Score(**dict(score)) for name, score in part.items()} for part in (self.clients, self.tiers)
        )
        return Measurement(clients, tiers, tuple(Answer(**dict(answer)) for answer in self.answers))


class _Counts(_Strict):
    prunes: NonNegativeInt
    updates: NonNegativeInt
    failures: NonNegativeInt
    bytes_up: NonNegativeInt
    bytes_down: NonNegativeInt


class _State(_Strict):
    made_by: dict[str, str]
    config: dict[str, Any]
    digests: dict[str, str | None]
    threads: PositiveInt
    records: PositiveInt
    records_sha256: str
    seconds: float
    base: _Measurement
    final: _Measurement | None
    counts: _Counts
    round: PositiveInt
    seed: int
    ranks: dict[str, NonNegativeInt | dict[str, NonNegativeInt]]
    answered: dict[str, NonNegativeInt]
    folded_sizes: dict[str, NonNegativeInt]
    moments: list[str]
    kept: list[str]


def _read(file: BinaryIO) -> Checkpoint:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    _require(len(start) == 8 and PLACE + 64 <= 8 + length <= size, "it is cut off, or no checkpoint")
    header = file.read(length)
    _require(header.startswith(PREFIX), "it is damaged, or no checkpoint")
    place = len(PREFIX)
    digest = hashlib.sha256(start + header[:place] + ZEROS + header[place + 64 :])
    table = json.loads(header)
    metadata = table.pop("__metadata__")
    _require(metadata.get("format") == FORMAT, "it is damaged, or no checkpoint")
    version = metadata.get("version")
    _require(version == VERSION, f"version {version!r} of the format, and this hetlora reads {VERSION!r}")
    tensors = _empty(table, size - 8 - length)
    for tensor in tensors.values():
        memory = _bytes_of(tensor)
        _require(file.readinto(memory) == len(memory), "it is cut off")  # type: ignore[attr-defined]
        digest.update(memory)
    _require(digest.hexdigest() == metadata["sha256"], "it is damaged: its SHA-256 is another")
    return _checkpoint(_State.model_validate(json.loads(metadata["state"])), tensors)


def _empty(table: Mapping[str, Any], size: int) -> dict[str, Tensor]:
    """Return empty tensors, if the table places them without gaps up to the end of the file."""
    shapes: dict[str, tuple[torch.dtype, list[int]]] = {}
    end = 0
    for name, entry in table.items():
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        _require(all(type(number) is int and number >= 0 for number in shape), f"{name} has shape {shape}")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        _require(
            entry == {"dtype": entry["dtype"], "shape": shape, "data_offsets": [begin, end]}, f"{name} is displaced"
        )
        shapes[name] = dtype, shape
    _require(end == size, f"{end} bytes of numbers are announced, and there are {size}")
    return {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in shapes.items()}


def _checkpoint(plain: _State, tensors: Mapping[str, Tensor]) -> Checkpoint:
    adapters, folded = _sorted_out(tensors)
    moments = {name: adapters.pop(f"moments.{index}", {}) for index, name in enumerate(plain.moments)}
    kept = {name: adapters.pop(f"kept.{index}", {}) for index, name in enumerate(plain.kept)}
    adapter = adapters.pop("adapter", {})
    _require(bool(adapter), "it holds no adapter")
    _require(not adapters, f"nobody is said to have {', '.join(adapters)}")
    ranks: dict[str, Rank] = dict(plain.ranks)
    state = ServerState(
        adapter,
        round=plain.round,
        ranks=ranks,
        answered=plain.answered,
        folded=BaseDelta(folded, {int(number): size for number, size in plain.folded_sizes.items()}),
        moments=moments,
        kept=kept,
        seed=plain.seed,
    )
    return Checkpoint(
        progress=RunTotals(state, plain.final.measurement() if plain.final else None, **dict(plain.counts)),
        base=plain.base.measurement(),
        records=plain.records,
        records_sha256=plain.records_sha256,
        seconds=plain.seconds,
        config=plain.config,
        digests=plain.digests,
        threads=plain.threads,
        made_by=plain.made_by,
    )


def _sorted_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Adapter], dict[str, Tensor]]:
    """Return the adapters by kind, e.g. ``kept.3``, and the folded change by module."""
    factors: dict[str, dict[str, dict[str, Tensor]]] = {}
    folded = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "folded":
            folded[rest] = tensor
            continue
        if kind != "adapter":
            index, _, rest = rest.partition(".")
            kind = f"{kind}.{index}"
        module, _, letter = rest.rpartition(".")
        factors.setdefault(kind, {}).setdefault(module, {})[letter] = tensor
    adapters = {
        kind: {module: _pair(f"{kind}.{module}", letters) for module, letters in modules.items()}
        for kind, modules in factors.items()
    }
    return dict(adapters), folded


def _pair(name: str, factors: Mapping[str, Tensor]) -> LoraPair:
    _require(factors.keys() == {"A", "B"}, f"{name} has the factors {', '.join(sorted(factors))}")
    A, B = factors["A"], factors["B"]
    fit = A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1]
    _require(fit, f"{name}: shapes {list(A.shape)} of A and {list(B.shape)} of B are no factors")
    return LoraPair(A, B)


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise CheckpointError(problem)
