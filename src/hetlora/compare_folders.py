"""Where a comparison keeps its runs: folders named after all that decides a run's figures."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from pathlib import Path

from hetlora import __version__
from hetlora.config import RunConfig
from hetlora.errors import HetLoraError

__all__ = ["DataDigests", "placed"]


def placed(config: RunConfig, label: str, digests: DataDigests) -> RunConfig:
    """Return the run with the folder that keeps it: the label, and a digest of all that decides its figures."""
    runs = Path(config.output) / config.name / "runs"
    return config.model_copy(update={"output": str(runs), "name": f"{_slug(label)}-{_digest(config, digests)}"})


def _slug(label: str) -> str:
    """Return a label as part of a file's name.

    Example:
        >>> _slug("HetLoRA γ=0.99")
        'hetlora-0.99'
    """
    ascii_only = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9.]+", "-", ascii_only.lower()).strip("-.")[:60] or "method"


class DataDigests(dict[str, str | None]):
    """Digests of data by path: every run of a comparison needs one, and a file is read once."""

    def __missing__(self, path: str) -> str | None:
        self[path] = _data_digest(path)
        return self[path]


def _digest(config: RunConfig, digests: DataDigests) -> str:
    """Return a digest of the resolved run, of hetlora's version and of the local data, in 12 hexadecimal digits."""
    decides = {
        "config": config.model_dump(mode="json", exclude={"name", "output"}),
        "data": digests[config.data.path],
        "hetlora": __version__,
    }
    text = json.dumps(decides, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _data_digest(path: str) -> str | None:
    """Return a digest of a local file, or of all files of a folder; None for the bundled data and a name on a hub."""
    try:
        root = Path(path).expanduser()
        files = sorted(item for item in root.rglob("*") if item.is_file()) if root.is_dir() else [root]
        if not root.exists():
            return None
        digest = hashlib.sha256()
        for file in files:
            digest.update(str(file.relative_to(root)).encode())
            with file.open("rb") as content:
                while block := content.read(1 << 20):
                    digest.update(block)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~ of an unknown user
        raise HetLoraError(f"the data {path!r} cannot be read: {error}") from error
    return digest.hexdigest()
