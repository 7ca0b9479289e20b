"""A client's rows, base and memory before it joins a federation, for `hetlora client check`."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict, dataclass
from typing import Any

from hetlora.commands.preview.preview import ClientPreview, preview
from hetlora.config import RunConfig
from hetlora.config.build import model_dtype
from hetlora.config.build_model import build_outline
from hetlora.config.one_client import affordable_rank, one_client
from hetlora.errors import HetLoraError, ModelError, expand_path, printable
from hetlora.model.quantize import loading_options
from hetlora.runs.identity import identity

__all__ = ["ClientCheck", "check_client"]


@dataclass(frozen=True)
class ClientCheck:
    """What a client would bring to a federation.

    Attributes:
        path: The rows' file or folder.
        rows: The numbers of rows and tokens.
        max_length: Tokens at which a row is cut.
        base: The base's name or folder.
        sha256: Digests of the base and its tokenizer, which must be the server's where bases must not differ.
        memory: The memory that was asked about, in 10⁶ bytes; None without a question.
        quantize: How its base would be stored; None as the run says.
        rank: The largest rank that fits it; without a question the largest of the run.
        notes: Oddities of the rows, as `hetlora data` prints them.
    """

    path: str
    rows: ClientPreview
    max_length: int
    base: str
    sha256: dict[str, str]
    memory: float | None
    quantize: str | None
    rank: int
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """Return the object that ``hetlora client check --json`` prints."""
        return asdict(self)

    def describe(self) -> str:
        """Return it as text for a person."""
        rows = self.rows
        fits = (
            f"fits {self.memory:g} MB" if self.memory is not None else "is the run's largest; --memory says what fits"
        )
        cut = f"cut at {self.max_length} tokens: {rows.truncated}; left out for an empty target: {rows.empty}"
        held_out = f"{rows.test} held out" if rows.test else "none held out, so that it is not measured"
        lines = {
            "rows": f"{rows.train + rows.test}, {rows.train} for training and {held_out}",
            "tokens": f"{rows.train_tokens} for training and {rows.test_tokens} held out; {cut}",
            "base": f"{self.base} is here (SHA-256 {self.sha256['base'][:12]}...)",
            "rank": f"{self.rank} {fits}",
        }
        noted = [*lines.items(), *(("note", note) for note in self.notes)]
        text = "\n".join(f"{name + ':':<8} {printable(line)}" for name, line in noted)
        return f"{text}\nthis client can take part: --node-config {shlex.quote(self._node_config())}"

    def _node_config(self) -> str:
        places = {"data": _absolute(self.path)}
        if expand_path(self.base).is_dir():
            places["base"] = _absolute(self.base)
        if self.quantize:
            places["quantize"] = self.quantize
        return " ".join(
            [*(f"{key}={json.dumps(place)}" for key, place in places.items()), f'name="NAME" rank={self.rank}']
        )


def _absolute(place: str) -> str:
    """Return a file or folder by its whole path; a name, such as that of a data set of the hub, as it is."""
    path = expand_path(place)
    return str(path.absolute()) if path.exists() else place


def check_client(
    config: RunConfig,
    path: str,
    base: str | None = None,
    memory: float | None = None,
    quantize: str | None = None,
) -> ClientCheck:
    """Look at a client's rows, base and memory as its own process will when a server sends it this run.

    Args:
        config: The run.
        path: The rows, as `data.path`.
        base: Where the base lies here, if the run names another place.
        memory: Memory for training in 10⁶ bytes.
        quantize: How the base is stored here, if not as the run says.

    Raises:
        HetLoraError: The client cannot take part; with the first reason.
    """
    if config.flower.clients != "nodes":
        raise HetLoraError(
            'flower.clients = "config": the clients of this run are those of its configuration, and none brings its own rows; '
            'ask for the run.toml of a federation with flower.clients = "nodes"'
        )
    if memory is not None and not 0 < memory < math.inf:
        raise HetLoraError(f"--memory {memory:g}: give the memory for training in MB, more than 0")
    here = one_client(config, path, base, quantize=quantize)
    evaluation = here.evaluation.model_copy(update={"rows_per_client": None})  # all rows are counted
    shown = preview(here.model_copy(update={"evaluation": evaluation}), measured=False)
    if shown.no_tokens is not None:
        raise ModelError(shown.no_tokens)
    [rows] = shown.clients
    digests = identity(here.model.base, here.model.tokenizer)
    loading_options(here.model.quantize, model_dtype(here), "cpu")  # its library is here
    build_outline(here)  # the base has the modules that are to be adapted
    rank = here.ranks.largest if memory is None else affordable_rank(here, memory)
    return ClientCheck(path, rows, here.data.max_length, here.model.base, digests, memory, quantize, rank, shown.notes)
