"""Measurements equal those of plain transformers and rouge-score, and sums over clients are consistent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drawn_examples import examples
from hetlora.core.adapter import LoraPair
from hetlora.data import ClientRows, Federation, Row, Tokenization, TokenizedFederation
from hetlora.model.lora_model import LoraModel, load_base
from hetlora.training.evaluation import (
    Score,
    client_scores,
    evaluate_generation,
    rouge_l,
    rows_to_generate,
    tier_scores,
    total_score,
)

pytestmark = pytest.mark.run

END, PAD = 0, 1
SCALING = 2.0
ROWS = {
    "phone": [Row("say 1?", " one"), Row("", "words without a prompt"), Row("say a long one, please?", " no")],
    "tablet": [Row("q", " " + "a long answer " * 4)],
    "server": [Row(f"number {index}?", f" it is {index}") for index in range(7)],
}


@pytest.fixture(scope="module")
def data(tiny_tokenizer: Any) -> TokenizedFederation:
    clients = {name: ClientRows((), tuple(rows)) for name, rows in ROWS.items()}
    return TokenizedFederation(Federation("rows", clients), Tokenization(tiny_tokenizer, 64))


@pytest.fixture(scope="module")
def plain_base(tiny: str) -> Any:
    """The base as transformers gives it, without any of our layers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


def random_adapter(model: LoraModel, rank: int) -> dict[str, LoraPair]:
    generator = torch.Generator().manual_seed(3)
    return {
        path: LoraPair(
            torch.randn(rank, in_features, generator=generator) * 0.2,
            torch.randn(out_features, rank, generator=generator) * 0.2,
        )
        for path, (out_features, in_features) in model.shapes.items()
    }


def merged(tiny: str, adapter: dict[str, LoraPair]) -> Any:
    """Return a plain base with `scaling * B A` added into its weights."""
    base = load_base(tiny)
    with torch.no_grad():
        for path, (A, B) in adapter.items():
            base.get_submodule(path).weight.add_(SCALING * B @ A)
    return base.eval()


def plain_nll(base: Any, tokenizer: Any, row: Row) -> tuple[float, int]:
    """Score one row by itself: full logits, no padding, no batch, in float64 from the logits on."""
    prompt = tokenizer(row.prompt, add_special_tokens=False)["input_ids"] or [END]
    target = [*tokenizer(row.target, add_special_tokens=False)["input_ids"], END]
    with torch.inference_mode():
        logits = base(torch.tensor([[*prompt, *target]])).logits[0].double()
    scored = logits[len(prompt) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(scored, torch.tensor(target), reduction="sum")), len(target)


# Scores -------------------------------------------------------------------------------------------------------------

SCORES = st.builds(
    Score,
    nll=st.floats(0, 1e6).map(round),  # whole numbers add up exactly in any order
    tokens=st.integers(0, 1000),
    rouge=st.integers(0, 10),
    generated=st.integers(0, 10),
)


@examples(100)
@given(scores=st.lists(SCORES, max_size=6), order=st.randoms(use_true_random=False))
def test_scores_add_up_in_any_order_and_grouping(scores: list[Score], order: Any):
    whole = total_score(scores)
    cut = order.randint(0, len(scores))
    assert total_score(scores[:cut]) + total_score(scores[cut:]) == whole
    order.shuffle(scores)
    assert total_score(scores) == whole
    assert whole + Score() == whole


def test_perplexity_weighs_tokens_and_not_rows_or_clients():
    short, long = Score(nll=2.0, tokens=1), Score(nll=3.0, tokens=9)
    assert (short + long).perplexity == pytest.approx(math.exp(5.0 / 10))
    assert (short + long).perplexity != pytest.approx((math.exp(2.0) + math.exp(3.0 / 9)) / 2)


def test_what_was_not_measured_is_none_and_what_overflows_is_infinite():
    assert Score().perplexity is None
    assert Score().rouge_l is None
    assert Score(nll=1e9, tokens=1).perplexity == math.inf
    assert math.isnan(Score(nll=math.nan, tokens=1).perplexity or 0.0)


def test_rouge_is_a_mean_in_percent():
    assert (Score(rouge=0.5, generated=1) + Score(rouge=1.0, generated=3)).rouge_l == pytest.approx(37.5)


def test_tiers_add_up_to_the_whole_and_stand_in_order_of_rank():
    scores = {"a": Score(1.0, 2), "b": Score(3.0, 4, 0.5, 1), "c": Score(5.0, 6), "d": Score(7.0, 8)}
    tiers = tier_scores(scores, {"a": "16", "b": "2", "c": "16", "d": "4-8", "elsewhere": "1"})
    assert list(tiers) == ["2", "4-8", "16"]
    assert tiers["16"] == Score(6.0, 8)
    assert total_score(tiers.values()) == total_score(scores.values())


# Perplexity ---------------------------------------------------------------------------------------------------------


def check_scores(found: dict[str, Score], base: Any, tokenizer: Any) -> None:
    assert list(found) == list(ROWS)
    for client, rows in ROWS.items():
        expected = [plain_nll(base, tokenizer, row) for row in rows]
        assert found[client].tokens == sum(tokens for _, tokens in expected)
        assert found[client].nll == pytest.approx(sum(nll for nll, _ in expected), rel=1e-5)


def test_perplexity_of_the_base_equals_plain_transformers_row_by_row(
    tiny_model: LoraModel, data: TokenizedFederation, plain_base: Any, tiny_tokenizer: Any
):
    check_scores(client_scores(tiny_model, data, ROWS, None), plain_base, tiny_tokenizer)


def test_perplexity_under_an_adapter_equals_that_of_merged_weights(
    tiny: str, tiny_model: LoraModel, data: TokenizedFederation, tiny_tokenizer: Any
):
    adapter = random_adapter(tiny_model, rank=3)
    found = client_scores(tiny_model, data, ROWS, adapter)
    check_scores(found, merged(tiny, adapter), tiny_tokenizer)
    assert found["server"].nll != pytest.approx(client_scores(tiny_model, data, ROWS, None)["server"].nll)


def test_overall_perplexity_is_that_of_all_rows_together(
    tiny_model: LoraModel, data: TokenizedFederation, plain_base: Any, tiny_tokenizer: Any
):
    expected = [plain_nll(plain_base, tiny_tokenizer, row) for rows in ROWS.values() for row in rows]
    nll, tokens = (sum(values) for values in zip(*expected, strict=True))
    overall = total_score(client_scores(tiny_model, data, ROWS, None).values())
    assert overall.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-5)


@pytest.mark.parametrize("tokens_a_pass", [1, 40, 100])
def test_how_rows_are_packed_does_not_change_a_score(
    tiny_model: LoraModel, data: TokenizedFederation, tokens_a_pass: int
):
    whole = client_scores(tiny_model, data, ROWS, None)
    packed = client_scores(tiny_model, data, ROWS, None, tokens_a_pass=tokens_a_pass)
    for client in ROWS:
        assert packed[client].tokens == whole[client].tokens
        assert packed[client].nll == pytest.approx(whole[client].nll, rel=1e-5)


def test_only_the_clients_asked_for_are_scored(tiny_model: LoraModel, data: TokenizedFederation):
    assert list(client_scores(tiny_model, data, ["tablet"], None)) == ["tablet"]


# ROUGE-L ------------------------------------------------------------------------------------------------------------

SENTENCES = st.lists(st.sampled_from(["return", "returns", "the", "sum", "Of", "two,", "numbers.", ""]), max_size=8)


@examples(100)
@given(expected=SENTENCES.map(" ".join), text=SENTENCES.map(" ".join))
def test_rouge_l_is_that_of_the_rouge_score_package(expected: str, text: str):
    from rouge_score.rouge_scorer import RougeScorer  # imports scipy: seconds for who does not run this test

    reference = RougeScorer(["rougeL"], use_stemmer=True).score(target=expected, prediction=text)
    assert rouge_l(expected, text) == reference["rougeL"].fmeasure
    assert 0.0 <= rouge_l(expected, text) <= 1.0


def test_rouge_l_of_nothing_is_zero():
    assert rouge_l("Return the sum.", "") == 0.0


# Generation ---------------------------------------------------------------------------------------------------------


def one_by_one(base: Any, tokenizer: Any, rows: Sequence[Row], max_new_tokens: int) -> list[str]:
    texts = []
    for row in rows:
        ids = torch.tensor([tokenizer(row.prompt, add_special_tokens=False)["input_ids"]])
        out = base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=PAD,
            eos_token_id=END,
        )
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return texts


WITH_PROMPT = [(client, row) for client, rows in ROWS.items() for row in rows if row.prompt]


def test_answers_in_a_batch_equal_answers_one_by_one(
    tiny_model: LoraModel, data: TokenizedFederation, plain_base: Any, tiny_tokenizer: Any
):
    found = evaluate_generation(tiny_model, data, WITH_PROMPT, None, max_new_tokens=12)
    assert [answer.text for answer in found] == one_by_one(
        plain_base, tiny_tokenizer, [row for _, row in WITH_PROMPT], 12
    )
    assert [(answer.client, answer.prompt, answer.expected) for answer in found] == [
        (client, row.prompt, row.target) for client, row in WITH_PROMPT
    ], "answers come in the order of the rows, whatever their lengths"
    assert len({answer.text for answer in found}) > 1


def test_answers_under_an_adapter_equal_those_of_merged_weights(
    tiny: str, tiny_model: LoraModel, data: TokenizedFederation, tiny_tokenizer: Any
):
    adapter = random_adapter(tiny_model, rank=3)
    found = [answer.text for answer in evaluate_generation(tiny_model, data, WITH_PROMPT, adapter, max_new_tokens=12)]
    rows = [row for _, row in WITH_PROMPT]
    assert found == one_by_one(merged(tiny, adapter), tiny_tokenizer, rows, 12)
    assert found != [
        answer.text for answer in evaluate_generation(tiny_model, data, WITH_PROMPT, None, max_new_tokens=12)
    ]


def test_an_answer_carries_its_own_rouge_l(tiny_model: LoraModel, data: TokenizedFederation):
    for answer in evaluate_generation(tiny_model, data, WITH_PROMPT[:2], None, max_new_tokens=4):
        assert answer.rouge_l == rouge_l(answer.expected, answer.text)


def test_no_rows_give_no_answers(tiny_model: LoraModel, data: TokenizedFederation):
    assert evaluate_generation(tiny_model, data, [], None, max_new_tokens=4) == []


def test_rows_to_answer_are_taken_from_clients_in_turn(data: TokenizedFederation):
    chosen = rows_to_generate(data, ["server", "phone", "tablet"], 6)
    assert [client for client, _ in chosen] == ["server", "phone", "tablet", "server", "phone", "server"]
    assert [row for client, row in chosen if client == "server"] == ROWS["server"][:3]
    assert rows_to_generate(data, ["server", "phone", "tablet"], 6) == chosen


def test_a_row_without_a_prompt_is_not_answered_and_none_is_taken_twice(data: TokenizedFederation):
    chosen = rows_to_generate(data, list(ROWS), 100)
    assert len(chosen) == len(set(chosen)) == len(WITH_PROMPT)
    assert all(row.prompt for _, row in chosen)


def test_asking_for_no_answers_gives_none(data: TokenizedFederation):
    assert rows_to_generate(data, list(ROWS), 0) == []
    assert rows_to_generate(data, [], 5) == []
