"""Federated data sets: who holds which text, and the text as tokens."""

from __future__ import annotations

from hetlora.data.federation import ClientField, ClientRows, Federation, Source, Split, TokenizedFederation, federate
from hetlora.data.huggingface import dataset_source
from hetlora.data.jsonl import STDLIB, jsonl_source, read_jsonl
from hetlora.data.partition import Labels, Partition
from hetlora.data.rows import ChatTemplate, Conversation, Row, Template, Turn
from hetlora.data.text import Example, Tokenization, collate

__all__ = [
    "STDLIB",
    "ChatTemplate",
    "ClientField",
    "ClientRows",
    "Conversation",
    "Example",
    "Federation",
    "Labels",
    "Partition",
    "Row",
    "Source",
    "Split",
    "Template",
    "Tokenization",
    "TokenizedFederation",
    "Turn",
    "collate",
    "dataset_source",
    "federate",
    "jsonl_source",
    "read_jsonl",
]
