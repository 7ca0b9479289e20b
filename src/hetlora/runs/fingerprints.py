"""Digests of the local files that a run reads: data, base, tokenizer, the adapter it starts from, a person's own method."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from hetlora.config import RunConfig
from hetlora.errors import HetLoraError
from hetlora.methods.lookup import source_of
from hetlora.runs.folder import expand_path

__all__ = ["FileFingerprints", "changed_file", "downloaded"]

BUNDLED = "nano"  # hetlora.model.lora_model.NANO, which loads torch; the version of hetlora says what it is
MODEL_FILES = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja")
"""What transformers reads of a model's folder: weights, configuration and tokenizer."""


class FileFingerprints:
    """Digests and stamps of the local files that runs read: every run of a comparison needs them, and a file is read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[str | None, str | None]] = {}

    def digests(self, config: RunConfig) -> dict[str, str | None]:
        """Return digests of what the files hold, by the key of the configuration that names them."""
        return {key: self._both(key, place)[1] for key, place in _places(config).items()}

    def stamps(self, config: RunConfig) -> dict[str, str | None]:
        """Return what `changed_file` compares: sizes and times of the files as they were just before they were digested."""
        return {key: self._both(key, place)[0] for key, place in _places(config).items()}

    def _both(self, key: str, place: str) -> tuple[str | None, str | None]:
        if (key, place) not in self._known:
            self._known[key, place] = _stamp(key, place), _content(key, place)
        return self._known[key, place]


def changed_file(config: RunConfig, stamps: Mapping[str, str | None]) -> str | None:
    """Return which local files of a run are not those that its folder is named after; None where all are.

    Args:
        config: The run.
        stamps: Of `FileFingerprints.stamps`, when the comparison was planned.
    """
    keys = [f"{key} = {place!r}" for key, place in _places(config).items() if _stamp(key, place) != stamps[key]]
    return f"{', '.join(keys)} changed while the comparison ran; call it again" if keys else None


def downloaded(config: RunConfig) -> dict[str, str | None]:
    """Return which base and tokenizer of the Hugging Face hub are on this machine, by key; None for what is not.

    It is the commit that its name means here, which decides its files. A data set of the hub has none: give `data.revision`.
    """
    return {
        key: _snapshot(place)
        for key, place in _places(config).items()
        if key in ("model.base", "model.tokenizer") and _files(key, place) is None
    }


def _snapshot(name: str) -> str | None:
    """Return the commit of a model that was downloaded; a digest of its files where no commit is known."""
    from transformers.utils import cached_file

    for file in ("config.json", "tokenizer_config.json"):
        try:
            found = cached_file(name, file, local_files_only=True)
        except (OSError, ValueError):
            continue
        if found is not None:
            folder = Path(found).parent
            return folder.name if folder.parent.name == "snapshots" else _content("model.base", str(folder))
    return None


def _places(config: RunConfig) -> dict[str, str]:
    """Return where a run's data, model and method may be, by key."""
    model = config.model
    places = {
        "data.path": config.data.path,
        "model.base": model.base,
        "model.tokenizer": model.tokenizer,
        "model.adapter": model.adapter,
        "method.name": source_of(config.method.name),
    }
    return {key: place for key, place in places.items() if place and (place != BUNDLED or key == "data.path")}


def _files(key: str, place: str) -> list[Path] | None:
    """Return the files at a place; None for the bundled data and a name on a hub."""
    root = expand_path(place)
    if not root.is_dir():
        return [root] if root.exists() else None
    if key == "data.path":
        # Hidden ones are an editor's or the file system's, and no loader reads them.
        return sorted(item for item in root.rglob("*") if item.is_file() and not _hidden(item.relative_to(root)))
    return sorted(item for item in root.iterdir() if item.suffix in MODEL_FILES and item.is_file())


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _stamp(key: str, place: str) -> str | None:
    """Return a digest of the names, sizes and times of local files, which costs no reading."""
    try:
        files = _files(key, place)
        seen = [(str(file), (state := file.stat()).st_size, state.st_mtime_ns) for file in files or ()]
    except (OSError, ValueError) as error:
        raise HetLoraError(f"{key} = {place!r} cannot be read: {error}") from error
    return None if files is None else hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _content(key: str, place: str) -> str | None:
    """Return a digest of what local files hold, each under its name within the place."""
    digest = hashlib.sha256()
    try:
        files = _files(key, place)
        for file in files or ():
            name = os.path.relpath(file, expand_path(place))
            digest.update(f"{name!a} {file.stat().st_size}\n".encode())
            with file.open("rb") as content:
                while block := content.read(1 << 20):
                    digest.update(block)
    except (OSError, ValueError) as error:
        raise HetLoraError(f"{key} = {place!r} cannot be read: {error}") from error
    return None if files is None else digest.hexdigest()
