"""Federated data sets: who holds which text, and the text as tokens."""

from __future__ import annotations

from hetlora.data.client_rows import ClientRows, SampledRows
from hetlora.data.federation import ClientField, Federation, Source, Split, federate
from hetlora.data.files import STDLIB, file_source, read_jsonl
from hetlora.data.huggingface import dataset_source
from hetlora.data.partition import Labels, Partition
from hetlora.data.templates import ChatTemplate, Conversation, Message, Row, Template
from hetlora.data.tokenization import Example, Tokenization
from hetlora.data.tokenized import TokenizedFederation

__all__ = [
    "STDLIB",
    "ChatTemplate",
    "ClientField",
    "ClientRows",
    "Conversation",
    "Example",
    "Federation",
    "Labels",
    "Message",
    "Partition",
    "Row",
    "SampledRows",
    "Source",
    "Split",
    "Template",
    "Tokenization",
    "TokenizedFederation",
    "dataset_source",
    "federate",
    "file_source",
    "read_jsonl",
]
