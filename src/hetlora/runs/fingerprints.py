"""Digests of the local files that a run reads: data, base, tokenizer, its first adapter, a user's method."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from hetlora.config import RunConfig
from hetlora.errors import HetLoraError, expand_path
from hetlora.methods.lookup import source_of

__all__ = ["FileFingerprints", "changed_file", "downloaded"]

BUNDLED = "nano"  # hetlora.model.lora_model.NANO, which loads torch
MODEL_FILES = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja")
"""Files of a model's folder that transformers reads: weights, configuration and tokenizer."""


class FileFingerprints:
    """Digests and stamps of the local files that the runs of a comparison read; each file is read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[str | None, str | None]] = {}

    def digests(self, config: RunConfig) -> dict[str, str | None]:
        """Return digests of the files' content, by the key of the configuration that names them."""
        return {key: self._both(key, place)[1] for key, place in _places(config).items()}

    def stamps(self, config: RunConfig) -> dict[str, str | None]:
        """Return digests of the files' sizes and times, taken just before their content is read, for `changed_file`."""
        return {key: self._both(key, place)[0] for key, place in _places(config).items()}

    def _both(self, key: str, place: str) -> tuple[str | None, str | None]:
        if (key, place) not in self._known:
            self._known[key, place] = _stamp(key, place), _content(key, place)
        return self._known[key, place]


def changed_file(config: RunConfig, stamps: Mapping[str, str | None]) -> str | None:
    """Return a message that names the local files of a run that have changed; None if there are none.

    Args:
        config: The run.
        stamps: `FileFingerprints.stamps` from when the comparison was planned.
    """
    keys = [f"{key} = {place!r}" for key, place in _places(config).items() if _stamp(key, place) != stamps[key]]
    return f"{', '.join(keys)} changed while the comparison ran; call it again" if keys else None


def downloaded(config: RunConfig) -> dict[str, str | None]:
    """Return the commits of the base and tokenizer of the Hugging Face hub in the local cache, by key; None without one.

    A data set of the hub is not among them: give `data.revision`.
    """
    return {
        key: _snapshot(place)
        for key, place in _places(config).items()
        if key in ("model.base", "model.tokenizer") and _files(key, place) is None
    }


def _snapshot(name: str) -> str | None:
    """Return the commit of a downloaded model; a digest of its files if the commit is unknown."""
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
    """Return the places of a run's data, model and method, by key."""
    model = config.model
    places = {
        "data.path": config.data.path,
        "data.chat_template": config.data.chat_template,
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
        # No loader reads hidden files.
        return sorted(item for item in root.rglob("*") if item.is_file() and not _hidden(item.relative_to(root)))
    return sorted(item for item in root.iterdir() if item.suffix in MODEL_FILES and item.is_file())


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _stamp(key: str, place: str) -> str | None:
    """Return a digest of the names, sizes and times of local files."""
    try:
        files = _files(key, place)
        seen = [(str(file), (state := file.stat()).st_size, state.st_mtime_ns) for file in files or ()]
    except (OSError, ValueError) as error:
        raise HetLoraError(f"{key} = {place!r} cannot be read: {error}") from error
    return None if files is None else hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _content(key: str, place: str) -> str | None:
    """Return a digest of the content of local files and their names within the place."""
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
