"""Perplexity and ROUGE-L on clients' held-out rows: over all, per rank tier, per client."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hetlora.core.adapter import Adapter
from hetlora.data.templates import Row
from hetlora.data.tokenization import Example
from hetlora.data.tokenized import TokenizedFederation
from hetlora.model.lora_model import LoraModel
from hetlora.model.packing import pack_rows
from hetlora.training.generation import generate_texts
from hetlora.training.parallel import in_parallel

__all__ = [
    "Answer",
    "Score",
    "client_scores",
    "evaluate_generation",
    "rouge_l",
    "rows_to_generate",
    "tier_scores",
    "total_score",
]

TOKENS_A_PASS = 2048


@dataclass(frozen=True)
class Score:
    """Sums that add up over rows, clients and tiers.

    Attributes:
        nll: Sum of the negative log-likelihoods of the scored tokens, in nats.
        tokens: Number of scored tokens.
        rouge: Sum of the ROUGE-L F-measures of the generated answers, each in 0 ... 1.
        generated: Number of generated answers.
    """

    nll: float = 0.0
    tokens: int = 0
    rouge: float = 0.0
    generated: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(
            self.nll + other.nll,
            self.tokens + other.tokens,
            self.rouge + other.rouge,
            self.generated + other.generated,
        )

    @property
    def perplexity(self) -> float | None:
        """`exp(Σ nll / Σ tokens)`: the token-weighted mean; None without tokens, infinite where it overflows.

        Example:
            >>> Score(nll=0.0, tokens=3).perplexity
            1.0
        """
        if not self.tokens:
            return None
        try:
            return math.exp(self.nll / self.tokens)
        except OverflowError:
            return math.inf

    @property
    def rouge_l(self) -> float | None:
        """Mean ROUGE-L F-measure in 0 ... 100; None where nothing was generated."""
        return 100.0 * self.rouge / self.generated if self.generated else None


def total_score(scores: Iterable[Score]) -> Score:
    """Add up scores.

    Example:
        >>> total_score([Score(1.0, 2), Score(3.0, 2)]).tokens
        4
    """
    return sum(scores, start=Score())


def client_scores(
    model: LoraModel,
    data: TokenizedFederation,
    clients: Sequence[str],
    adapter: Adapter | None,
    folded: Mapping[str, Tensor] | None = None,
    *,
    tokens_a_pass: int = TOKENS_A_PASS,
    workers: int | None = None,
) -> dict[str, Score]:
    """Return every client's negative log-likelihood on its held-out rows, under one adapter.

    Rows of several clients share a pass, without padding.

    Args:
        model: The base with LoRA layers.
        data: The held-out rows.
        clients: The clients whose rows are scored.
        adapter: Factors `A [r, in]`, `B [out, r]`; None scores the base.
        folded: Change that is folded into the base, by module.
        tokens_a_pass: Tokens per forward pass.
        workers: Passes that run at the same time; None for one per thread.
    """
    rows = [(client, example) for client in clients for example in data.test(client)]

    def score(part: Sequence[tuple[str, Example]]) -> dict[str, Score]:
        names = list(dict.fromkeys(client for client, _ in part))
        own = [[example for client, example in part if client == name] for name in names]
        with torch.inference_mode():
            model.use(adapter, folded)
            packed = pack_rows(own)
            values = model.losses(packed).cpu().double()
            sums = torch.zeros(len(names), dtype=torch.float64).index_add(0, packed.owners, values).tolist()
        tokens = [sum(example.scored for example in examples) for examples in own]
        return {name: Score(nll=nll, tokens=count) for name, nll, count in zip(names, sums, tokens, strict=True)}

    scores = {client: Score() for client in clients}
    for part in in_parallel(
        score, list(_passes(rows, tokens_a_pass)), model.device, 1 if model.one_at_a_time else workers
    ):
        for client, value in part.items():
            scores[client] += value
    return scores


def _passes(rows: Sequence[tuple[str, Example]], limit: int) -> Iterator[list[tuple[str, Example]]]:
    """Divide rows into passes of at most `limit` tokens; a longer row has a pass of its own."""
    part: list[tuple[str, Example]] = []
    tokens = 0
    for row in rows:
        if part and tokens + len(row[1].ids) > limit:
            yield part
            part, tokens = [], 0
        part.append(row)
        tokens += len(row[1].ids)
    if part:
        yield part


def rows_to_generate(data: TokenizedFederation, clients: Sequence[str], count: int) -> list[tuple[str, Row]]:
    """Choose up to `count` held-out rows with a prompt, one per client in turn, in a fixed order."""
    queues = [
        [(client, row) for row in data.test_rows(client) if row.prompt and row.target.strip()] for client in clients
    ]
    turns = (queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue))
    return [row for _, row in zip(range(count), turns, strict=False)]


@dataclass(frozen=True)
class Answer:
    """A generated answer beside the expected one."""

    client: str
    prompt: str
    expected: str
    text: str
    rouge_l: float


def evaluate_generation(
    model: LoraModel,
    data: TokenizedFederation,
    rows: Sequence[tuple[str, Row]],
    adapter: Adapter | None,
    max_new_tokens: int,
    folded: Mapping[str, Tensor] | None = None,
) -> list[Answer]:
    """Generate an answer to every row's prompt, greedily, and score it by ROUGE-L.

    Args:
        model: The base with LoRA layers.
        data: Holds the tokenizer and the longest sequence.
        rows: Pairs of client and row.
        adapter: Factors to generate with; None for the base.
        max_new_tokens: Most tokens per answer.
        folded: Change that is folded into the base, by module.
    """
    model.use(adapter, folded)
    texts = generate_texts(model, data.tokenization, [row for _, row in rows], max_new_tokens)
    expected = [data.tokenization.expected(row) for _, row in rows]
    return [
        Answer(client, row.prompt, row.target, text, rouge_l(wanted, text))
        for (client, row), wanted, text in zip(rows, expected, texts, strict=True)
    ]


def rouge_l(expected: str, text: str) -> float:
    """Return the ROUGE-L F-measure of `text` in 0 ... 1, with stemming, by the `rouge-score` package.

    Example:
        >>> rouge_l("Return the sum.", "Returns the sum")
        1.0
    """
    return float(_rouge_scorer().score(expected, text)["rougeL"].fmeasure)


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def tier_scores(scores: Mapping[str, Score], tiers: Mapping[str, str]) -> dict[str, Score]:
    """Add up clients' scores by tier, tiers in order of their lowest rank.

    Args:
        scores: Client to score.
        tiers: Client to the name of its tier, ``"8"`` or ``"6-10"``.

    Example:
        >>> tier_scores({"a": Score(1.0, 1), "b": Score(1.0, 3)}, {"a": "8", "b": "2"})["2"].tokens
        3
    """
    names = sorted({tiers[client] for client in scores}, key=lambda name: int(name.split("-")[0]))
    return {name: total_score(scores[client] for client in scores if tiers[client] == name) for name in names}
