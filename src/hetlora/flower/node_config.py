"""The settings of a SuperNode, from its ``--node-config``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hetlora.errors import HetLoraError

__all__ = ["QUANTIZED", "NodeConfig"]

QUANTIZED = ("none", "bfloat16", "int8", "nf4")
"""`hetlora.model.quantize.Quantization`, which loads torch."""

PLACE = ("partition-id", "num-partitions")


@dataclass(frozen=True)
class NodeConfig:
    """The settings of a node, set by its owner; no server can change them.

    A node is either one client with its own data, or it hosts a share of the configuration's clients: every `nodes`-th from the
    `place`-th on, with their data on this machine.

    Attributes:
        data: The client's own rows, a file or folder as in `data.path`.
        name: The client's unique name in the federation; needed with `data`.
        rank: The rank that its hardware affords; `data` needs this or `memory`.
        memory: Its memory for training in 10⁶ bytes, which determines the rank.
        base: Path of the base model here, if it differs from the run's configuration.
        device: As `model.device`.
        quantize: As `model.quantize`, if it differs from the run's configuration.
        threads: CPU threads.
        idle: Seconds without a message after which the client's process exits.
        methods: Comma-separated modules whose methods a server may name; their code then runs here.
        place: Index of the hosted share, from 0.
        nodes: Number of shares.
    """

    data: str | None = None
    name: str | None = None
    rank: int | None = None
    memory: float | None = None
    base: str | None = None
    device: str | None = None
    quantize: str | None = None
    threads: int = 1
    idle: float = 900.0
    methods: str | None = None
    place: int | None = None
    nodes: int | None = None

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> NodeConfig:
        """Return the settings of a ``--node-config``.

        Raises:
            HetLoraError: Lists the problems and the accepted keys.

        Example:
            >>> NodeConfig.read({"data": "notes.jsonl", "name": "ana", "rank": 8}).rank
            8
            >>> NodeConfig.read({"partition-id": 1, "num-partitions": 2}).place
            1
        """
        values = dict(config)
        problems = []
        for key, own in zip(PLACE, ("place", "nodes"), strict=True):
            values[own] = values.pop(key, None)
        known = {field.name: field.type for field in fields(cls)}
        for key, value in values.items():
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                problems.append(f"{key} is not a key; {hint}accepted: {', '.join([*list(known)[:-2], *PLACE])}")
            elif problem := _problem(key, value, str(known[key])):
                problems.append(problem)
        if not problems:
            settings = cls(**{key: value for key, value in values.items() if value is not None})
            problems = settings._conflicts()
            if not problems:
                return settings
        raise HetLoraError("--node-config: " + "; ".join(problems))

    def admit(self, module: str) -> None:
        """Check that a server may name a method of this module.

        Raises:
            ValueError: The owner of this node has not allowed its code to run.
        """
        allowed = self._modules()
        if module not in allowed:
            raise ValueError(
                f"the server names a method of the module {module}, whose code the owner of this node has not allowed to run; "
                f'look at what {module} is here, then add methods="{",".join([*allowed, module])}" to --node-config'
            )

    def _modules(self) -> list[str]:
        return [module.strip() for module in self.methods.split(",")] if self.methods else []

    def _conflicts(self) -> list[str]:
        problems = [
            f"methods={self.methods!r}: {module!r} is no module; give their paths with commas between, as in mypkg.fair"
            for module in self._modules()
            if not all(part.isidentifier() for part in module.split("."))
        ]
        if self.quantize not in (None, *QUANTIZED):
            problems.append(f"quantize={self.quantize!r} is none of {', '.join(QUANTIZED)}")
        if self.data is not None:
            if not self.name:
                problems.append('data needs name="...", which the federation knows this client by')
            if (self.rank is None) == (self.memory is None):
                problems.append("data needs either rank=R or memory=MEGABYTES, and not both")
        elif self.quantize is not None:
            problems.append(
                "quantize is for a node with data of its own; for hosted clients set model.quantize on the server"
            )
        elif self.place is None or self.nodes is None:
            problems.append('give data="FILE" name="NAME" rank=R, or partition-id=I num-partitions=N')
        elif not 0 <= self.place < self.nodes:
            problems.append(f"partition-id={self.place} is not within 0 ... {self.nodes - 1}")
        return problems


def _problem(key: str, value: object, kind: str) -> str | None:
    if value is None:
        return None
    if kind.startswith("str"):
        return None if isinstance(value, str) else f'{key}={value!r} is no text; write {key}="..."'
    if isinstance(value, bool) or not isinstance(value, int if kind.startswith("int") else (int, float)):
        return f"{key}={value!r} is no {'whole ' if kind.startswith('int') else ''}number"
    least = 0 if key == "place" else 1e-9
    return None if value >= least else f"{key}={value!r} is too small"
