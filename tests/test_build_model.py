"""Every builder gives the same model: loaded or traced, LoRA or full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hetlora.config import RunConfig, parse_config
from hetlora.config.build_model import build_model, build_outline, build_tokenizer, load_fitting_model
from hetlora.errors import ConfigError, ModelError
from hetlora.model.full_model import FullModel
from proofs.small_bases import write_base_of
from proofs.small_run import document

LORA: dict[str, Any] = {"target_modules": ["q_proj", "up_proj"], "scaling": 1.7, "dtype": "bfloat16"}


def config_of(base: str, *, method: str = "hetlora", max_length: int = 48, **model: Any) -> RunConfig:
    whole = document("runs", method={"name": method}, model={"base": base, "device": "cpu", **model})
    whole["data"]["max_length"] = max_length
    return parse_config(whole)


@pytest.mark.parametrize(("method", "model"), [("hetlora", LORA), ("full", {})])
def test_an_outline_says_of_the_model_what_the_model_says(tiny: str, method: str, model: dict[str, Any]):
    config = config_of(tiny, method=method, **model)
    loaded, outline = build_model(config), build_outline(config)
    assert isinstance(loaded, FullModel) is isinstance(outline, FullModel) is (method == "full")
    for key in ("shapes", "scaling", "target_modules", "fan_in_fan_out"):
        assert getattr(loaded, key) == getattr(outline, key), key
    assert next(loaded.base.parameters()).dtype == getattr(torch, config.model.dtype)


def test_what_does_not_fit_is_refused_before_there_is_a_model(tiny: str):
    with pytest.raises(ConfigError, match=r"data.max_length = 1000: the base .* takes 512 tokens at most"):
        load_fitting_model(config_of(tiny, max_length=1000))
    with pytest.raises(ModelError, match="knows 258"):
        load_fitting_model(config_of(tiny, tokenizer="nano"))
    assert len(build_tokenizer(config_of(tiny, tokenizer="nano"))) > 258


@pytest.mark.parametrize("method", ["hetlora", "full"])
def test_a_base_whose_rows_depend_on_each_other_is_refused_when_a_run_starts(tiny: str, tmp_path: Path, method: str):
    """XLM takes a token that a text may hold for padding."""
    write_base_of("xlm", "", Path(tiny), tmp_path / "xlm")
    targets = {"target_modules": ["q_lin"]} if method == "hetlora" else {}
    with pytest.raises(ModelError, match="depends on the rows beside it"):
        load_fitting_model(config_of(str(tmp_path / "xlm"), method=method, **targets))
