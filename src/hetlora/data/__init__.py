"""Federated data sets: who holds which text, and the text as tokens."""

from __future__ import annotations

from hetlora.data.federation import STDLIB, ClientRows, Federation, Split, TokenizedFederation, read_jsonl
from hetlora.data.text import Example, Row, Template, Tokenization, collate

__all__ = [
    "STDLIB",
    "ClientRows",
    "Example",
    "Federation",
    "Row",
    "Split",
    "Template",
    "Tokenization",
    "TokenizedFederation",
    "collate",
    "read_jsonl",
]
