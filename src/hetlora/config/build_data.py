"""Builds the federation and the tokenization of a run from its configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hetlora.data.chat import Chat, check_chat_template
from hetlora.data.client_rows import ClientRows
from hetlora.data.federation import ClientField, Federation, Partitioner, Source, Split, federate
from hetlora.data.fields import field_names
from hetlora.data.files import file_source
from hetlora.data.huggingface import dataset_source, is_dataset
from hetlora.data.partition import LENGTH, Labels, Partition, SharedPool
from hetlora.data.templates import ChatTemplate, Conversation, Fields, Row, RowTemplate, Template
from hetlora.data.tokenization import Tokenization
from hetlora.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hetlora.config import DataConfig, RunConfig

__all__ = [
    "fields_read",
    "ignored_client_field",
    "load_federation",
    "load_records",
    "make_rendering",
    "make_tokenization",
    "read_federation",
]


def load_federation(config: RunConfig, count_by: str | None = None, *, measured: bool = True) -> Federation:
    """Read the rows, divide them, and choose the clients of a run.

    Args:
        config: The run.
        count_by: A field, or "length", by which each client's records are counted; by default that of the partition.
        measured: Whether every client needs a held-out row. One with rows of its own takes part without, unmeasured.

    Raises:
        HetLoraError: The data do not fit the configuration.
    """
    data, partition = config.data, config.partition
    federation = read_federation(config, count_by).select(data.clients, data.min_rows, config.seed, measured=measured)
    if data.validation_share:
        federation = federation.hold_out_validation(data.validation_share)
    limit = config.evaluation.rows_per_client
    if partition.kind == "sampled":
        assert partition.clients is not None
        assert partition.rows_per_client is not None, "both validated by the configuration"
        return federation.sample(partition.clients, partition.rows_per_client, limit, config.seed)
    clients = {name: ClientRows(rows.train, rows.test[:limit]) for name, rows in federation.clients.items()}
    return replace(federation, clients=clients)


def read_federation(config: RunConfig, count_by: str | None = None) -> Federation:
    """Read the rows and divide them among all clients. The arguments are those of `load_federation`.

    Raises:
        HetLoraError: The data do not fit the configuration.
    """
    data, partition = config.data, config.partition
    by = count_by or partition.by
    if by and partition.kind == "sampled":
        raise DataError(
            "records are not counted by label with partition.kind = 'sampled': all clients draw from all of them"
        )
    labels = Labels(by, partition.bins) if by else None
    return federate(
        _source(data, partition.by, by),
        owner=_owner(config),
        template=make_rendering(data),
        split=_split(data),
        labels=labels,
    )


def load_records(config: RunConfig) -> dict[str, list[dict[str, Any]]]:
    """Return each client's records as they are in the data, for the clients of `load_federation`.

    Raises:
        HetLoraError: The data do not fit the configuration.
    """
    whole = federate(
        _source(config.data, config.partition.by),
        owner=_owner(config),
        template=_WholeRecords(),
        split=_split(config.data),
    )
    records = {name: whole.clients[name] for name in load_federation(config).names}
    return {name: [json.loads(row.target) for row in (*own.train, *own.test)] for name, own in records.items()}


class _WholeRecords:
    """A template that keeps a record as it is, as JSON."""

    def rows(self, fields: Fields, where: str) -> tuple[Row, ...]:
        return (self.question(fields, where),)

    def question(self, fields: Fields, where: str) -> Row:
        return Row("", json.dumps(fields, default=str), where=where)


def make_tokenization(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Tokenization:
    """Return the tokenization of a run.

    Raises:
        ModelError: The run needs a chat template, and the tokenizer has none.
    """
    if config.data.is_chat:
        check_chat_template(tokenizer, config.model.tokenizer or config.model.base)
    data = config.data
    if data.is_chat and (unread := Chat(tokenizer, data.chat_template_kwargs).unread_arguments()):
        raise ModelError(f"data.chat_template_kwargs: the chat template never reads {', '.join(unread)}; take it away")
    return Tokenization(tokenizer, data.max_length, data.long_rows, data.begin, data.end, data.chat_template_kwargs)


def _owner(config: RunConfig) -> Partitioner[Any]:
    partition = config.partition
    if partition.kind == "natural":
        return ClientField(config.data.client_field)
    if partition.kind == "sampled":
        return SharedPool()
    assert partition.clients is not None, "validated by the configuration"
    return Partition(
        partition.kind,
        partition.clients,
        config.seed,
        labels=Labels(partition.by, partition.bins) if partition.by else None,
        alpha=partition.alpha,
        shards_per_client=partition.shards_per_client,
        min_rows=partition.min_rows,
    )


def make_rendering(data: DataConfig) -> RowTemplate:
    """Return the template that turns a record's fields into rows."""
    if data.messages is not None:
        return Conversation(data.messages, data.system, data.scored, data.fold_system)
    if data.chat:
        return ChatTemplate(data.prompt, data.target, data.system, data.fold_system)
    return Template(data.prompt, data.target)


def _split(data: DataConfig) -> Split:
    return Split(data.split_field or None, tuple(map(str, data.train)), tuple(map(str, data.test)), data.test_share)


def _source(data: DataConfig, *labels: str | None) -> Source:
    if is_dataset(data.path):
        return dataset_source(data.path, subset=data.subset, revision=data.revision, fields=fields_read(data, *labels))
    for key, value in (("subset", data.subset), ("revision", data.revision)):
        if value is not None:
            raise DataError(
                f"data.{key} = {value!r} is for a data set of the Hugging Face hub, but data.path = {data.path!r} is a file; "
                "take the key away"
            )
    return file_source(data.path)


def ignored_client_field(config: RunConfig) -> list[str]:
    """Return a note where `data.client_field` is given and the partition divides the rows without it; empty elsewhere."""
    field, kind = config.data.client_field, config.partition.kind
    if kind == "natural" or field == "client":
        return []
    return [f"data.client_field = {field!r} is not read: partition.kind = {kind!r} divides the rows by itself"]


def fields_read(data: DataConfig, *labels: str | None) -> set[str]:
    """Return the columns that a run may need, or none where a template cannot be read, which the template itself reports."""
    templates = [data.system] if data.messages else [data.prompt, data.target, data.system]
    try:
        filled = set().union(*map(field_names, templates))
    except DataError:
        return set()
    filled |= {name.split(".")[0] for name in filled}  # a field may be nested by dots
    named = {data.client_field, data.split_field, data.messages, "tools" if data.messages else None, *labels} - {
        None,
        "",
        LENGTH,
    }
    return filled | {name for name in named if name is not None}
