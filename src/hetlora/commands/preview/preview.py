"""The data of each client of a run before training, for `hetlora data`. Needs the tokenizer but not the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hetlora.config import RunConfig
from hetlora.config.build_data import fields_read, ignored_client_field, load_federation, make_tokenization
from hetlora.config.build_model import build_tokenizer
from hetlora.data import Federation, Tokenization, TokenizedFederation
from hetlora.data.inspection import ShownExample, describe_borders, notes_on, shown_examples, unread_fields
from hetlora.data.partition import LENGTH
from hetlora.errors import ModelError

__all__ = ["ClientPreview", "Preview", "preview", "quantiles"]

QUANTILES = {"least": 0.0, "10 %": 0.1, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "90 %": 0.9, "most": 1.0}


@dataclass(frozen=True)
class ClientPreview:
    """The data of one client. The token counts, `truncated` and `empty` are None if no tokenizer loads.

    Attributes:
        client: Its name.
        train: Number of training rows with a target.
        test: Number of held-out rows with a target.
        train_tokens: Tokens of the training examples.
        test_tokens: Tokens of the held-out examples.
        truncated: Rows that lose tokens.
        empty: Rows dropped for an empty target.
        labels: Number of records per label.
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
    """The data of all clients.

    Attributes:
        name: The name of the run.
        path: Source of the rows.
        partition: The kind of partition.
        by: The field of the labels, or "length"; None without labels.
        labels: The labels: bins of length in order, others by frequency.
        clients: The clients of the run.
        left_out: Names of the clients that are left out, by the reason.
        left_out_rows: Number of rows on neither side of the split.
        no_tokens: Why tokens are not counted; None if they are.
        notes: Oddities of the rows, see `hetlora.data.inspection.notes_on`.
        examples: Training examples as tokens, as many as asked for.
        empty_at: The place of a row that is dropped for an empty target; empty where none is.
    """

    name: str
    path: str
    partition: str
    by: str | None
    labels: tuple[str, ...]
    clients: tuple[ClientPreview, ...]
    left_out: Mapping[str, tuple[str, ...]]
    left_out_rows: int
    no_tokens: str | None
    notes: tuple[str, ...] = ()
    examples: tuple[ShownExample, ...] = ()
    empty_at: str = ""

    @property
    def largest_tenth_share(self) -> float:
        """Return the share of the training rows held by the largest tenth of the clients, rounded up."""
        sizes = sorted((client.train for client in self.clients), reverse=True)
        return sum(sizes[: math.ceil(len(sizes) / 10)]) / max(1, sum(sizes))

    def total(self, figure: str) -> int | None:
        """Return the sum of an attribute over the clients; None if it is unknown."""
        values = [getattr(client, figure) for client in self.clients]
        return None if any(value is None for value in values) else sum(values)

    def summary(self) -> dict[str, Any]:
        """Return the object that ``hetlora data --json`` prints."""
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
            "left_out_clients": sum(map(len, self.left_out.values())),
            "largest_tenth_share": self.largest_tenth_share,
            "clients": [asdict(client) for client in self.clients],
        }


def preview(config: RunConfig, by: str | None = None, examples: int = 0, *, measured: bool = True) -> Preview:
    """Read the data of a run, divide them among the clients and count rows and tokens.

    Args:
        config: The run.
        by: A field or "length" to count records by; by default that of the partition.
        examples: How many examples to show.
        measured: As for `load_federation`.

    Raises:
        HetLoraError: The data cannot be used as the configuration says.
    """
    federation = load_federation(config, by, measured=measured)
    tokenizer, no_tokens = None, None
    try:
        tokenizer = build_tokenizer(config)
    except ModelError as error:
        no_tokens = str(error)
    data = TokenizedFederation(federation, make_tokenization(config, tokenizer)) if tokenizer is not None else None
    by = by or config.partition.by
    clients = tuple(_client(federation, data, name) for name in federation.clients)
    notes = [*ignored_client_field(config), *notes_on(federation, tokenizer)]
    if data is not None:
        notes += describe_borders(*data.tokenization.counted[2:], dated=data.tokenization.dated)
    if unread := unread_fields(federation, fields_read(config.data, by)):
        notes.append(f"fields that are not read: {unread}")
    left_out: dict[str, tuple[str, ...]] = {}
    for name, reason in federation.left_out.items():
        left_out[reason] = (*left_out.get(reason, ()), name)
    return Preview(
        name=config.name,
        path=config.data.path,
        partition=config.partition.kind,
        by=by,
        labels=_label_order(federation, by),
        clients=clients,
        left_out=left_out,
        left_out_rows=sum(federation.left_out_rows.values()),
        no_tokens=no_tokens,
        notes=tuple(notes),
        examples=shown_examples(federation, data.tokenization, examples) if data is not None and examples else (),
        empty_at=federation.first_blank(),
    )


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """Return minimum, quantiles (nearest rank) and maximum.

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
    train, test = (sum(not row.blank for row in side) for side in (rows.train, rows.test))
    return ClientPreview(name, train, test, sizes[0], sizes[1], truncated, empty, labels)


def _cut(tokenization: Tokenization) -> tuple[int, int]:
    return tokenization.truncated, tokenization.empty


def _label_order(federation: Federation, by: str | None) -> tuple[str, ...]:
    counts: Counter[str] = Counter()
    for name in federation.clients:
        counts.update(federation.labels.get(name, {}))
    if by == LENGTH:
        return tuple(sorted(counts, key=lambda name: int(name.split("-")[0])))
    return tuple(sorted(counts, key=lambda name: (-counts[name], name)))
