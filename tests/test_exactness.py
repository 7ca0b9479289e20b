"""Which methods give the mean of the products, the effect of idle rounds, and the generated page."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from hetlora.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
TOOL = runpy.run_path(str(ROOT / "tools/describe_exactness.py"))

EXACT = {"flora", "fedex_lora", "ffa_lora", "rolora", "full", "central"}
INEXACT = {"hetlora", "zeropad", "replication", "rbla", "carryover", "principal", "steady", "fedavg", "fedit"}
UP_TO_RANK = {"flexlora", "recon_svd"}
UNAGGREGATED = {"fedsa_lora", "local", "zeroshot"}


def test_every_method_is_on_one_side():
    assert METHODS.keys() == EXACT | INEXACT | UP_TO_RANK | UNAGGREGATED
    assert TOOL["UNAGGREGATED"].keys() == UNAGGREGATED


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(EXACT))
def test_exact_methods_give_the_mean_of_the_products_of_clients_of_different_ranks(name, rounds):
    # Later rounds have something folded into the base, and of RoLoRA the other factor.
    assert TOOL["error"](name, rounds=rounds) < 1e-6


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("name", sorted(INEXACT))
def test_the_mean_of_the_factors_is_not_the_mean_of_the_products(name, rounds):
    assert TOOL["error"](name, rounds=rounds) > 0.05


@pytest.mark.parametrize("name", sorted(UP_TO_RANK))
def test_redistribution_by_svd_is_exact_up_to_the_global_rank(name):
    assert TOOL["error"](name) > 0.05
    assert TOOL["error"](name, rank=TOOL["WIDE_RANK"]) < 1e-6
    assert TOOL["error"](name, rank=TOOL["WIDE_RANK"], rounds=2) < 1e-6


ONCE = 0.2**5  # thick clients' share of a slot is 2 in 10, once a round
IDLE = {
    "zeropad": ONCE**2,  # of A and of B
    "replication": 1.0,
    "rbla": 1.0,
    "carryover": 1.0,
    "principal": 1.0,
    "flexlora": ONCE,
    "recon_svd": ONCE,
    "flora": 1.0,
    "ffa_lora": ONCE,
    "rolora": ONCE,
    "fedavg": 1.0,
    "fedit": 1.0,
    "full": 1.0,
    "central": 1.0,
}


@pytest.mark.parametrize("name", IDLE)
def test_what_idle_rounds_leave_of_slots_that_few_clients_have(name):
    assert TOOL["idle_factor"](name) == pytest.approx(IDLE[name], rel=1e-5)


def test_fedex_lora_keeps_in_the_base_what_its_factors_lose():
    # x is the product in the factors, y what is folded: x = x / 25 and y = y + x / 5 - x / 25, round by round from 1 and 0.
    x, y = 1.0, 0.0
    for _ in range(5):
        x, y = x / 25, y + x / 5 - x / 25
    assert TOOL["idle_factor"]("fedex_lora") == pytest.approx(x + y, rel=1e-5)


def test_hetlora_loses_slots_that_few_clients_have_by_their_share_of_the_norms():
    # The head has sizes 8 and 7 and the tail 6 ... 1: norms sqrt(113) and sqrt(113 + 91 s²), s what is left of the tail,
    # which is multiplied by the square of the thick clients' share of the norms.
    s, mean = 1.0, 1.0
    for number in range(2, 7):  # the first round has brought what is there
        thin, thick = 113**0.5, (113 + 91 * s * s) ** 0.5
        s *= (2 * thick / (8 * thin + 2 * thick)) ** 2
        share = 4 / (number + 3)
        mean = (1 - share) * mean + share * s**0.5  # of A and of B, whose product is s
    assert TOOL["idle_factor"]("hetlora") == pytest.approx(s, rel=1e-5)
    assert TOOL["idle_factor"]("steady") == pytest.approx(mean**2, rel=1e-5)


def test_the_idle_table_has_every_method_with_a_common_product():
    assert {*IDLE, "fedex_lora", "hetlora", "steady"} == METHODS.keys() - UNAGGREGATED


def test_the_page_is_what_the_tool_prints(capsys: pytest.CaptureFixture[str]):
    TOOL["main"]()
    assert capsys.readouterr().out == (ROOT / "docs/exactness.md").read_text("utf8")
