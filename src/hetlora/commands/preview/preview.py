"""What each client of a run would hold, before anything is trained: `hetlora data`. Needs the tokenizer, never the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hetlora.config import RunConfig
from hetlora.config.build_data import load_federation, make_tokenization
from hetlora.config.build_model import build_tokenizer
from hetlora.data import Federation, Tokenization, TokenizedFederation
from hetlora.data.partition import LENGTH
from hetlora.errors import ModelError

__all__ = ["ClientPreview", "Preview", "preview", "quantiles"]

QUANTILES = {"least": 0.0, "10 %": 0.1, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "90 %": 0.9, "most": 1.0}


@dataclass(frozen=True)
class ClientPreview:
    """What one client would hold.

    Attributes:
        client: Its name.
        train: Its training rows.
        test: Its held-out rows.
        train_tokens: Tokens of its training examples; None where no tokenizer loads, as the next three.
        test_tokens: Tokens of its held-out examples.
        truncated: Rows of either side that lose tokens.
        empty: Rows of either side that are dropped for an empty target.
        labels: How many of its records have which label.
    """

    client: str
    train: int
    test: int
    train_tokens: int | None
    test_tokens: int | None
    truncated: int | None
    empty: int | None
    labels: Mapping[str, int]


@dataclass(frozen=True)
class Preview:
    """What all clients would hold.

    Attributes:
        name: The name of the run.
        path: Where the rows come from.
        partition: The kind of partition.
        by: What the labels are of; None without labels.
        labels: The labels: bins of length in order, others by how many records have them.
        clients: The clients of the run.
        left_out_clients: Clients that are not drawn, have too few rows or none held out.
        left_out_rows: Rows on neither side of the split.
        no_tokens: Why tokens are not counted; None where they are.
    """

    name: str
    path: str
    partition: str
    by: str | None
    labels: tuple[str, ...]
    clients: tuple[ClientPreview, ...]
    left_out_clients: int
    left_out_rows: int
    no_tokens: str | None

    @property
    def largest_tenth_share(self) -> float:
        """Return the share of the training rows that the tenth of the clients with most of them hold, rounded up."""
        sizes = sorted((client.train for client in self.clients), reverse=True)
        return sum(sizes[: math.ceil(len(sizes) / 10)]) / max(1, sum(sizes))

    def total(self, figure: str) -> int | None:
        """Return the sum of a figure over the clients, by the attribute's name; None where it is not known."""
        values = [getattr(client, figure) for client in self.clients]
        return None if any(value is None for value in values) else sum(values)

    def summary(self) -> dict[str, Any]:
        """Return all of it as plain data, the object that ``hetlora data --json`` prints."""
        figures = ("train", "test", "train_tokens", "test_tokens", "truncated", "empty")
        labels: Counter[str] = Counter()
        for client in self.clients:
            labels.update(client.labels)
        return {
            **{key: value for key, value in asdict(self).items() if key not in ("clients", "labels")},
            "total": {
                **{figure: self.total(figure) for figure in figures},
                "labels": {name: labels[name] for name in self.labels},
            },
            "largest_tenth_share": self.largest_tenth_share,
            "clients": [asdict(client) for client in self.clients],
        }


def preview(config: RunConfig, by: str | None = None) -> Preview:
    """Read the data of a run, divide them among the clients, and count.

    Args:
        config: The run.
        by: A field, or "length", to count records by; by default that of the partition.

    Raises:
        HetLoraError: The data cannot be used as the configuration says.
    """
    federation = load_federation(config, by)
    tokenizer, no_tokens = None, None
    try:
        tokenizer = build_tokenizer(config)
    except ModelError as error:
        no_tokens = str(error)
    data = TokenizedFederation(federation, make_tokenization(config, tokenizer)) if tokenizer is not None else None
    by = by or config.partition.by
    return Preview(
        name=config.name,
        path=config.data.path,
        partition=config.partition.kind,
        by=by,
        labels=_label_order(federation, by),
        clients=tuple(_client(federation, data, name) for name in federation.clients),
        left_out_clients=federation.left_out_clients,
        left_out_rows=sum(federation.left_out_rows.values()),
        no_tokens=no_tokens,
    )


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """Return the least, some quantiles (the value of nearest rank) and the most.

    Example:
        >>> quantiles([3, 1, 2])["median"]
        2
    """
    ordered = sorted(values)
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in QUANTILES.items()}


def _client(federation: Federation, data: TokenizedFederation | None, name: str) -> ClientPreview:
    rows = federation.clients[name]
    sizes: list[int | None] = [None, None]
    truncated = empty = None
    if data is not None:
        before = _cut(data.tokenization)
        sizes = [sum(len(example.ids) for example in side(name)) for side in (data.train, data.test)]
        truncated, empty = (now - was for now, was in zip(_cut(data.tokenization), before, strict=True))
    labels = federation.labels.get(name, {})
    return ClientPreview(name, len(rows.train), len(rows.test), sizes[0], sizes[1], truncated, empty, labels)


def _cut(tokenization: Tokenization) -> tuple[int, int]:
    return tokenization.truncated, tokenization.empty


def _label_order(federation: Federation, by: str | None) -> tuple[str, ...]:
    counts: Counter[str] = Counter()
    for name in federation.clients:
        counts.update(federation.labels.get(name, {}))
    if by == LENGTH:
        return tuple(sorted(counts, key=lambda name: int(name.split("-")[0])))
    return tuple(sorted(counts, key=lambda name: (-counts[name], name)))
