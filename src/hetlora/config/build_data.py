"""The federation and the tokens of a run, as its configuration says."""

from __future__ import annotations

import string
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hetlora.data.chat import check_chat_template
from hetlora.data.client_rows import ClientRows
from hetlora.data.federation import ClientField, Federation, Partitioner, Source, Split, federate
from hetlora.data.huggingface import dataset_source, is_dataset
from hetlora.data.jsonl import jsonl_source
from hetlora.data.partition import LENGTH, Labels, Partition, SharedPool
from hetlora.data.templates import ChatTemplate, Conversation, RowTemplate, Template
from hetlora.data.tokenization import Tokenization
from hetlora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hetlora.config import DataConfig, RunConfig

__all__ = ["load_federation", "make_rendering", "make_tokenization", "read_federation"]


def load_federation(config: RunConfig, count_by: str | None = None) -> Federation:
    """Read the rows, divide them, and choose the clients of a run.

    Args:
        config: The run.
        count_by: A field, or "length", to count each client's records by; by default that of the partition.

    Raises:
        HetLoraError: The data cannot be used as the configuration says.
    """
    data, partition = config.data, config.partition
    federation = read_federation(config, count_by).select(data.clients, data.min_rows, config.seed)
    if data.validation_share:
        federation = federation.hold_out_validation(data.validation_share)
    most = config.evaluation.rows_per_client
    if partition.kind == "sampled":
        assert partition.clients is not None
        assert partition.rows_per_client is not None, "both validated by the configuration"
        return federation.sample(partition.clients, partition.rows_per_client, most, config.seed)
    clients = {name: ClientRows(rows.train, rows.test[:most]) for name, rows in federation.clients.items()}
    return replace(federation, clients=clients)


def read_federation(config: RunConfig, count_by: str | None = None) -> Federation:
    """Read the rows and divide them, before any client is left out of the run.

    Args:
        config: The run.
        count_by: As `load_federation` takes it.

    Raises:
        HetLoraError: The data cannot be used as the configuration says.
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
        split=Split(data.split_field or None, tuple(map(str, data.train)), tuple(map(str, data.test)), data.test_share),
        labels=labels,
    )


def make_tokenization(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Tokenization:
    """Return how a run turns rows into tokens.

    Raises:
        ModelError: A chat is asked for, and the tokenizer has no chat template.
    """
    if config.data.is_chat:
        check_chat_template(tokenizer, config.model.tokenizer or config.model.base)
    return Tokenization(tokenizer, config.data.max_length, config.data.long_rows)


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
    """Return how a run turns a record's fields into rows."""
    if data.messages is not None:
        return Conversation(data.messages, data.system)
    if data.chat:
        return ChatTemplate(data.prompt, data.target, data.system)
    return Template(data.prompt, data.target)


def _source(data: DataConfig, *labels: str | None) -> Source:
    if is_dataset(data.path):
        return dataset_source(data.path, subset=data.subset, revision=data.revision, fields=_used(data, labels))
    for key, value in (("subset", data.subset), ("revision", data.revision)):
        if value is not None:
            raise DataError(
                f"data.{key} = {value!r} is for a data set of the Hugging Face hub, but data.path = {data.path!r} is a file; "
                "take the key away"
            )
    return jsonl_source(data.path)


def _used(data: DataConfig, labels: tuple[str | None, ...]) -> set[str]:
    """Return the fields a run needs, or none where a template cannot be read, which the template itself will tell."""
    templates = [data.system] if data.messages else [data.prompt, data.target, data.system]
    try:
        filled = {name for text in templates for _, name, _, _ in string.Formatter().parse(text) if name}
    except ValueError:
        return set()
    named = {data.client_field, data.split_field, data.messages, *labels} - {None, "", LENGTH}
    return filled | {name for name in named if name is not None}
