"""Identity of a base model and its tokenizer, whatever their names: digests of their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from hetlora.errors import ModelError
from hetlora.model.lora_model import locate_base

__all__ = ["difference", "identity", "weights_digest"]

WEIGHTS = ("*.safetensors",)
BASE = ("config.json", *WEIGHTS)
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
)
NOT_ARCHITECTURE = (
    *("_name_or_path", "transformers_version", "dtype", "quantization_config", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""What a configuration says beside the modules, their shapes and how they compute."""


def identity(base: str, tokenizer: str | None = None, *, same_weights: bool = True) -> dict[str, str]:
    """Return the SHA-256 of the files of a base model, and of those of its tokenizer with the chat template.

    Args:
        base: A folder, a name on the Hugging Face hub whose files are here already, or ``"nano"``.
        tokenizer: Place of the tokenizer, if not with the base.
        same_weights: Whether the base is its files; else it is its architecture with the shapes, whatever the weights.

    Raises:
        ModelError: There are no such files.

    Example:
        >>> identity("nano") == identity("nano", "nano"), sorted(identity("nano"))
        (True, ['base', 'tokenizer'])
        >>> sorted(identity("nano", same_weights=False))
        ['architecture', 'tokenizer']
    """
    own = {"base": weights_digest(base)} if same_weights else {"architecture": _architecture(base)}
    return own | {"tokenizer": _digest(tokenizer or base, TOKENIZER)}


def weights_digest(base: str) -> str:
    """Return the SHA-256 of the configuration and the weights of a base model.

    Raises:
        ModelError: There are no such files.
    """
    if not any(file for pattern in WEIGHTS for file in _folder(base).glob(pattern)):
        raise ModelError(f"{base!r} has no weights ({', '.join(WEIGHTS)}) on this machine; get the whole model")
    return _digest(base, BASE)


def _architecture(base: str) -> str:
    """Return the SHA-256 of a base's configuration, as far as it says how it computes."""
    from transformers import AutoConfig

    try:
        document = AutoConfig.from_pretrained(_folder(base), trust_remote_code=False, local_files_only=True).to_dict()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the configuration of {base!r} cannot be read: {str(error).strip().splitlines()[0]}"
        ) from error
    return hashlib.sha256(json.dumps(_computing(document), sort_keys=True, default=str).encode()).hexdigest()


def _computing(value: object) -> object:
    """Return a configuration, and those within it, without `NOT_ARCHITECTURE`."""
    if not isinstance(value, Mapping):
        return value
    return {key: _computing(part) for key, part in value.items() if key not in NOT_ARCHITECTURE}


def difference(server: Mapping[str, str], here: Mapping[str, str]) -> str | None:
    """Return how the identity here differs from the server's; None if they are equal.

    Example:
        >>> difference({"base": "ab" * 32}, {"base": "cd" * 32})
        "the base here (cdcdcdcdcdcd) is not the server's (abababababab)"
    """
    parts = [
        f"the {name} here ({here.get(name, 'none')[:12]}) is not the server's ({digest[:12]})"
        for name, digest in server.items()
        if here.get(name) != digest
    ]
    return "; ".join(parts) or None


def _digest(name: str, patterns: Iterable[str]) -> str:
    folder = _folder(name)
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    if not files:
        raise ModelError(f"{name!r} has none of {', '.join(patterns)} in its folder")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name!a} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            while block := content.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _folder(name: str) -> Path:
    place = Path(locate_base(name) if name == "nano" or not Path(name).is_dir() else name)
    if place.is_dir():
        return place
    from transformers.utils import cached_file

    try:
        file = cached_file(name, "config.json", local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"the base model {name!r} is not on this machine: {str(error).splitlines()[0]}") from error
    return Path(str(file)).parent
