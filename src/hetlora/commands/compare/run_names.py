"""Folder names of a comparison's runs, derived from everything that decides a run's figures."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import re
import unicodedata
from pathlib import Path

from hetlora._version import __version__
from hetlora.config import RunConfig
from hetlora.runs.fingerprints import FileFingerprints

__all__ = ["with_run_folder"]


def with_run_folder(config: RunConfig, label: str, digests: FileFingerprints) -> RunConfig:
    """Set the folder of a run: its label, and a digest of everything that decides its figures."""
    runs = Path(config.output) / config.name / "runs"
    name = f"{_slug(label)}-{_digest(config, label, digests)}"
    # An unfinished run starts again, so checkpoints would be useless.
    return config.model_copy(update={"output": str(runs), "name": name, "checkpoint_every": 0})


def _slug(label: str) -> str:
    """Return a label as part of a file's name.

    Example:
        >>> _slug("HetLoRA γ=0.99")
        'hetlora-0.99'
        >>> _slug("mypkg.fair:fair")
        'mypkg-fair-fair'
    """
    ascii_only = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
    # Dots only within numbers: some systems take what follows another dot for a file extension.
    return re.sub(r"([^a-z0-9.]|(?<!\d)\.|\.(?!\d))+", "-", ascii_only.lower()).strip("-")[:60].rstrip(".") or "method"


def _digest(config: RunConfig, label: str, digests: FileFingerprints) -> str:
    """Return a digest of label, resolved run, versions and local files, in 12 hexadecimal digits."""
    decides = {
        "label": label,  # two labels may have the same slug
        "config": config.model_dump(mode="json", exclude={"name", "output", "checkpoint_every", "tracking"}),
        "files": digests.digests(config),
        "versions": {"hetlora": __version__, **_versions()},
    }
    text = json.dumps(decides, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
