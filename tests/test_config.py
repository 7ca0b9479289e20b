"""Configurations are validated as a whole before anything is loaded; each message names the key and the fix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hetlora.config import RunConfig, load_config, load_run_config, parse_config, with_changes
from hetlora.errors import ConfigError

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.toml"))
KINDS = ("same", "tiers", "uniform", "power-law", "normal", "by-examples", "memory", "explicit")


def document(**sections: Any) -> dict[str, Any]:
    """Return the smallest valid run, with sections replaced."""
    smallest = {
        "data": {"target": "{target}"},
        "federation": {"rounds": 1, "clients_per_round": 2},
        "ranks": {"kind": "same", "rank": 8},
        "training": {"steps": 1},
    }
    return {**smallest, **sections}


def problems(**sections: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(document(**sections))
    return list(caught.value.problems)


def problem(**sections: Any) -> str:
    found = problems(**sections)
    assert len(found) == 1, found
    return found[0]


# What is accepted ---------------------------------------------------------------------------------------------------


def test_the_smallest_run_has_the_documented_defaults():
    config = parse_config(document())
    assert (config.name, config.seed, config.output) == ("run", 0, "runs")
    assert (config.model.base, config.method.name, config.method.arguments) == ("nano", "hetlora", {})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_parses(path: Path):
    assert load_config(path).federation.rounds >= 1


def test_there_is_an_example():
    assert EXAMPLES


@pytest.mark.parametrize(
    ("ranks", "largest"),
    [
        ({"kind": "same", "rank": 4}, 4),
        ({"kind": "tiers", "tiers": [{"rank": 4, "share": 0.5}, {"rank": 16, "share": 0.5}]}, 16),
        ({"kind": "uniform", "min": 2, "max": 9}, 9),
        ({"kind": "uniform", "min": 3, "max": 3}, 3),
        ({"kind": "power-law", "min": 5, "max": 50}, 50),
        ({"kind": "power-law", "min": 5, "max": 50, "exponent": 0.5}, 50),
        ({"kind": "normal", "min": 1, "max": 16, "mean": 8, "std": 2.5}, 16),
        ({"kind": "by-examples", "min": 2, "max": 9}, 9),
        ({"kind": "by-examples", "min": 2, "max": 9, "order": "decreasing"}, 9),
        ({"kind": "memory", "tiers": [{"megabytes": 300, "share": 1}], "max": 64}, 64),
        ({"kind": "explicit", "of": {"phone": 2, "server": 32}}, 32),
        ({"kind": "explicit", "of": {"phone": 2}, "default": 8}, 8),
        ({"kind": "explicit", "of": {}, "default": 8}, 8),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else None,
)
def test_each_kind_of_ranks_parses_and_knows_its_largest_rank(ranks: dict[str, Any], largest: int):
    assert parse_config(document(ranks=ranks)).ranks.largest == largest


def test_arguments_of_the_method_are_handed_on_as_given():
    method = {"name": "hetlora", "gamma": 0.9, "min_rank": 8, "weights": "equal", "per_module": True}
    arguments = parse_config(document(method=method)).method.arguments
    assert arguments == {"gamma": 0.9, "min_rank": 8, "weights": "equal", "per_module": True}


def test_a_whole_number_is_a_number():
    """A person writes `gamma = 1` and `scaling = 2`; TOML makes integers of them."""
    config = parse_config(document(method={"gamma": 1, "penalty": 0}, model={"scaling": 2}))
    assert config.method.arguments == {"gamma": 1, "penalty": 0}
    assert config.model.scaling == 2.0


def test_a_configuration_survives_its_own_json():
    config = parse_config(document(method={"gamma": 0.9, "min_rank": 2}))
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


# Unknown keys -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "key", "suggestion", "accepted"),
    [
        ({"sede": 1}, "sede", "seed", "federation"),
        ({"model": {"bsae": "x"}}, "model.bsae", "base", "target_modules"),
        ({"data": {"target": "{t}", "promt": "x"}}, "data.promt", "prompt", "client_field"),
        ({"federation": {"rounds": 1, "clients_per_round": 1, "round": 2}}, "federation.round", "rounds", "rounds"),
        ({"training": {"steps": 1, "learning_rat": 1.0}}, "training.learning_rat", "learning_rate", "epochs"),
        ({"evaluation": {"evry": 1}}, "evaluation.evry", "every", "generate"),
        ({"ranks": {"kind": "same", "rank": 2, "rnk": 3}}, "ranks.rnk", "rank", "rank"),
        ({"ranks": {"kind": "uniform", "min": 1, "max": 2, "mxa": 3}}, "ranks.mxa", "max", "min"),
        ({"ranks": {"kind": "power-law", "min": 1, "max": 2, "exponnt": 1}}, "ranks.exponnt", "exponent", "max"),
        ({"ranks": {"kind": "explicit", "of": {"a": 1}, "defalt": 3}}, "ranks.defalt", "default", "of"),
        (
            {"ranks": {"kind": "tiers", "tiers": [{"rank": 1, "share": 1.0}], "tier": 1}},
            "ranks.tier",
            "tiers",
            "tiers",
        ),
        (
            {"ranks": {"kind": "tiers", "tiers": [{"rank": 9, "share": 1.0, "shre": 1.0}]}},
            "ranks.tiers.0.shre",
            "share",
            "rank",
        ),
        (
            {"ranks": {"kind": "memory", "max": 4, "tiers": [{"megabytes": 9.0, "share": 1.0, "megabyte": 9.0}]}},
            "ranks.tiers.0.megabyte",
            "megabytes",
            "share",
        ),
        ({"ranks": {"kind": "normal", "min": 1, "max": 2, "mean": 1, "std": 1, "sdt": 1}}, "ranks.sdt", "std", "mean"),
        ({"ranks": {"kind": "by-examples", "min": 1, "max": 2, "ordr": 1}}, "ranks.ordr", "order", "min"),
        ({"method": {"name": "hetlora", "gama": 0.5}}, "gama", "gamma", "min_rank"),
        ({"method": {"name": "fedavg", "weight": "equal"}}, "weight", "weights", "weights"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else None,
)
def test_an_unknown_key_is_named_with_the_nearest_or_all_accepted_ones(
    sections: dict[str, Any], key: str, suggestion: str, accepted: str
):
    message = problem(**sections)
    assert f"{key} is not a key" in message
    assert message.removesuffix(f" (method {sections.get('method', {}).get('name')})").endswith(
        f"did you mean {suggestion!r}?"
    )
    message = problem(**renamed(sections, key.rpartition(".")[2]))
    assert "zzzz is not a key" in message
    assert accepted in message.partition("accepted: ")[2]


def renamed(value: Any, key: str) -> Any:
    """Return sections in which a key has a name that resembles nothing."""
    if isinstance(value, list):
        return [renamed(item, key) for item in value]
    if not isinstance(value, dict):
        return value
    return {"zzzz" if name == key else name: renamed(item, key) for name, item in value.items()}


def test_a_key_that_resembles_nothing_gets_no_suggestion_but_the_list():
    message = problem(model={"zzz": 1})
    assert "did you mean" not in message
    assert "accepted: base, tokenizer" in message


# Wrong values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "start", "accepted"),
    [
        ({"seed": "three"}, "seed = 'three'", "integer"),
        ({"seed": -1}, "seed = -1", "greater than or equal to 0"),
        ({"name": "a/b"}, "name = 'a/b'", "pattern"),
        ({"threads": 0}, "threads = 0", "greater than 0"),
        ({"model": {"dtype": "int8"}}, "model.dtype = 'int8'", "'float32', 'bfloat16' or 'float16'"),
        ({"model": {"scaling": 0.0}}, "model.scaling = 0.0", "greater than 0"),
        ({"model": {"target_modules": "q_proj"}}, "model.target_modules = 'q_proj'", "list"),
        ({"data": {"target": 3}}, "data.target = 3", "string"),
        ({"data": {"target": "{t}", "max_length": 1}}, "data.max_length = 1", "8"),
        ({"data": {"target": "{t}", "test_share": 1.0}}, "data.test_share = 1.0", "less than 1"),
        ({"data": {"target": "{t}", "long_rows": "cut"}}, "data.long_rows = 'cut'", "'truncate' or 'split'"),
        ({"federation": {"rounds": 0, "clients_per_round": 1}}, "federation.rounds = 0", "greater than 0"),
        ({"federation": {"rounds": 2.5, "clients_per_round": 1}}, "federation.rounds = 2.5", "integer"),
        ({"federation": {"rounds": "2", "clients_per_round": 1}}, "federation.rounds = '2'", "integer"),
        ({"training": {"steps": True}}, "training.steps = True", "integer"),
        ({"training": {"steps": 1, "optimizer": "adam"}}, "training.optimizer = 'adam'", "'adamw' or 'sgd'"),
        ({"training": {"steps": 1, "learning_rate": 0}}, "training.learning_rate = 0", "greater than 0"),
        ({"evaluation": {"adapter": "mine"}}, "evaluation.adapter = 'mine'", "'global' or 'received'"),
        ({"ranks": {"kind": "same", "rank": 0}}, "ranks.rank = 0", "greater than 0"),
        ({"ranks": {"kind": "same", "rank": "8"}}, "ranks.rank = '8'", "integer"),
        ({"ranks": {"kind": "tiers", "tiers": [{"rank": 0, "share": 1.0}]}}, "ranks.tiers.0.rank = 0", "than 0"),
        ({"ranks": {"kind": "explicit", "of": {"phone": 0}}}, "ranks.of.phone = 0", "greater than 0"),
        ({"ranks": {"kind": "explicit", "of": {"same": 0}}}, "ranks.of.same = 0", "greater than 0"),
        ({"ranks": {"kind": "uniform", "min": 9, "max": 2}}, "ranks.min = 9 is larger than ranks.max = 2", "exchange"),
        (
            {"ranks": {"kind": "power-law", "min": 9, "max": 2}},
            "ranks.min = 9 is larger than ranks.max = 2",
            "exchange",
        ),
        ({"ranks": {"kind": "explicit", "of": {}}}, "ranks: names no client", "'default'"),
        ({"ranks": {"kind": "normal", "min": 1, "max": 4, "mean": 9.5, "std": 1}}, "ranks.mean = 9.5", "ranks.max = 4"),
        ({"ranks": {"kind": "normal", "min": 1, "max": 4, "mean": 2, "std": 0}}, "ranks.std = 0", "greater than 0"),
        (
            {"ranks": {"kind": "by-examples", "min": 1, "max": 4, "order": "up"}},
            "ranks.order = 'up'",
            "'increasing' or 'decreasing'",
        ),
        ({"ranks": {"kind": "by-examples", "min": 9, "max": 2}}, "ranks.min = 9 is larger", "exchange"),
        (
            {"ranks": {"kind": "memory", "max": 4, "tiers": [{"megabytes": 0, "share": 1.0}]}},
            "ranks.tiers.0.megabytes = 0",
            "greater than 0",
        ),
        (
            {"ranks": {"kind": "memory", "max": 4, "tiers": [{"megabytes": 1e308, "share": 1.0}]}},
            "ranks.tiers.0.megabytes = 1e+308",
            "less than or equal to 1000000000",
        ),
        (
            {"ranks": {"kind": "tiers", "tiers": [{"rank": 1, "share": 1e308}]}},
            "ranks.tiers.0.share = 1e+308",
            "1000000",
        ),
        ({"ranks": {"kind": ["same"]}}, "ranks.kind = ['same'] is not a kind", "same, tiers"),
        (
            {"server_optimizer": {"name": "adam", "learning_rate": 1.0, "beta": 0.9}},
            "server_optimizer.beta is not a key",
            "beta2",
        ),
        (
            {"method": {"name": "flora"}, "server_optimizer": {"name": "adam", "learning_rate": 1.0}},
            "[server_optimizer] with method.name = 'flora'",
            "take it away",
        ),
        (
            {"method": {"name": "zeroshot"}, "training": {"steps": 1, "proximal": 0.1}},
            "training.proximal with method.name = 'zeroshot': nobody trains",
            "take it away",
        ),
        (
            {"method": {"name": "full"}, "model": {"dtype": "bfloat16"}},
            "model.dtype = 'bfloat16' with",
            "use 'float32'",
        ),
        ({"method": {"name": "hetlroa"}}, "method.name: 'hetlroa'", "did you mean 'hetlora'?"),
        ({"method": {"gamma": 2.0}}, "method: gamma=2.0", "(0, 1]"),
        ({"method": {"gamma": "x"}}, "method: gamma = 'x'", "number"),
        ({"method": {"min_rank": 0}}, "method: min_rank=0", "1 or more"),
        ({"method": {"min_rank": True}}, "method: min_rank = True", "integer"),
        ({"method": {"penalty": -1.0}}, "method: penalty=-1.0", "0 or more"),
        ({"method": {"weights": "foo"}}, "method: weights = 'foo'", "'norm', 'examples' or 'equal'"),
        ({"method": {"name": "fedavg", "weights": "norm"}}, "method: weights = 'norm'", "'examples' or 'equal'"),
    ],
    ids=lambda value: value if isinstance(value, str) and "=" in value else None,
)
def test_a_wrong_value_is_named_with_its_key_and_what_is_accepted(sections: dict[str, Any], start: str, accepted: str):
    message = problem(**sections)
    assert message.startswith(start)
    assert accepted in message


@pytest.mark.parametrize("ranks", [{"rank": 2}, {"kind": "gaussian", "rank": 2}, {"kind": 3}])
def test_a_missing_or_unknown_kind_of_ranks_names_the_kinds_there_are(ranks: dict[str, Any]):
    message = problem(ranks=ranks)
    assert message.startswith("ranks.kind")
    assert all(kind in message for kind in KINDS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("key", "section"),
    [
        ("training.learning_rate", lambda value: {"training": {"steps": 1, "learning_rate": value}}),
        ("ranks.exponent", lambda value: {"ranks": {"kind": "power-law", "min": 1, "max": 3, "exponent": value}}),
        ("ranks.tiers.0.share", lambda value: {"ranks": {"kind": "tiers", "tiers": [{"rank": 8, "share": value}]}}),
        ("model.scaling", lambda value: {"model": {"scaling": value}}),
    ],
    ids=["learning_rate", "exponent", "share", "scaling"],
)
def test_a_number_that_is_not_finite_is_refused(key: str, section: Any, value: float):
    """TOML has `nan` and `inf`; no quantity of a run can be either."""
    assert problem(**section(value)).startswith(key)


@pytest.mark.parametrize(
    ("tiers", "whole"),
    [
        ([{"rank": 2, "share": 1.0}, {"rank": 4, "share": 1}], "2"),
        ([{"rank": 2, "share": 0.5}, {"rank": 4, "share": 0.4}], "0.9"),
        ([{"megabytes": 9.0, "share": 0.33}], "0.33"),
    ],
)
def test_shares_of_tiers_that_are_not_all_clients_are_refused(tiers: list[dict[str, float]], whole: str):
    kind = {"kind": "memory", "max": 4} if "megabytes" in tiers[0] else {"kind": "tiers"}
    assert problem(ranks={**kind, "tiers": tiers}).startswith(f"ranks.tiers: the shares add up to {whole};")
    for ranks, share in (((2, 4, 8), 0.333), ((1, 2, 3, 4, 5, 6), 0.167)):
        even = [{"rank": rank, "share": share} for rank in ranks]
        assert parse_config(document(ranks={"kind": "tiers", "tiers": even})).ranks.largest == ranks[-1]


def test_the_rows_are_missing_where_they_are_not_named():
    whole = document()
    del whole["data"]
    with pytest.raises(ConfigError) as caught:
        parse_config(whole)
    assert caught.value.problems == ("data is missing; add it",)


def test_sections_that_are_left_out_have_defaults(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('data = { target = "{t}" }', encoding="utf8")
    config = load_config(path)
    assert config.name == "mine"
    assert (config.federation.rounds, config.federation.clients_per_round) == (10, 4)
    assert [(tier.rank, tier.share) for tier in config.ranks.tiers] == [(4, 0.5), (8, 0.3), (16, 0.2)]
    assert (config.training.steps, config.training.epochs) == (4, None)
    path.write_text(
        'training = { epochs = 2 }\ndata = { target = "{t}" }\nmethod = { name = "fedavg" }', encoding="utf8"
    )
    with pytest.raises(ConfigError, match=r"needs one rank for all, but ranks.kind = 'tiers'"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"ranks.rank is missing; add it, or change the whole section") as refused:
        load_config(path, ["ranks.kind=same", "ranks.tiers=[{rank=4, share=1.0}]"])
    [whole] = re.findall(r"--set '(.*?)'", str(refused.value))
    assert load_config(path, [whole]).ranks.largest == 8, "what the message says works when it is copied"
    with pytest.raises(ConfigError, match="gamma is not a key; accepted") as refused:
        load_config(path, [whole, "method.gamma=0.5"])
    [whole_method] = re.findall(r"--set '(.*?)'", str(refused.value))
    assert load_config(path, [whole, "method.gamma=0.5", whole_method]).method.name == "fedavg"
    config = load_config(path, ['ranks={kind="same",rank=4}'])
    assert (config.training.steps, config.training.epochs) == (None, 2)
    assert load_config(path.rename(tmp_path / "-.toml"), ["method="]).name == "run", "such a name is none"


def test_a_value_in_place_of_a_section_is_named():
    assert problem(federation=3).startswith("federation = 3")
    assert problem(ranks=3).startswith("ranks = 3")


# What must fit together ---------------------------------------------------------------------------------------------


def test_training_is_measured_in_steps_or_in_epochs_and_not_in_both():
    assert problem(training={"steps": 1, "epochs": 1}) == "training: give either steps or epochs, and not both"


def test_min_rank_above_the_largest_rank_is_refused():
    message = problem(method={"min_rank": 9})
    assert message.startswith("method.min_rank = 9")
    assert "largest rank, 8" in message
    assert parse_config(document(method={"min_rank": 8})).method.arguments == {"min_rank": 8}


@pytest.mark.parametrize(
    "ranks",
    [
        {"kind": "tiers", "tiers": [{"rank": 2, "share": 0.5}, {"rank": 4, "share": 0.5}]},
        {"kind": "uniform", "min": 2, "max": 4},
        {"kind": "power-law", "min": 2, "max": 4},
        {"kind": "normal", "min": 2, "max": 4, "mean": 3, "std": 1},
        {"kind": "by-examples", "min": 2, "max": 4},
        {"kind": "memory", "tiers": [{"megabytes": 100, "share": 1}], "max": 4},
        {"kind": "explicit", "of": {"a": 2}, "default": 4},
    ],
    ids=lambda ranks: ranks["kind"],
)
def test_fedavg_with_mixed_ranks_is_refused_with_both_ways_out(ranks: dict[str, Any]):
    message = problem(method={"name": "fedavg"}, ranks=ranks)
    assert f"ranks.kind = {ranks['kind']!r}" in message
    assert '"same"' in message
    assert "hetlora" in message


def test_fedavg_with_one_rank_is_accepted():
    assert parse_config(document(method={"name": "fedavg"})).method.name == "fedavg"


# All at once --------------------------------------------------------------------------------------------------------


def test_every_problem_of_every_section_is_reported_at_once():
    found = problems(
        sede=1,
        model={"dtype": "int8", "bsae": "nano"},
        data={"max_length": 0},
        federation={"rounds": 0},
        ranks={"kind": "uniform", "min": 9, "max": 2},
        method={"gama": 1.0, "min_rank": "a"},
        training={"steps": 1, "epochs": 1},
        evaluation={"every": -1},
    )
    beginnings = [
        "sede is not a key",
        "model.dtype = 'int8'",
        "model.bsae is not a key",
        "data.target is missing",
        "data.max_length = 0",
        "federation.rounds = 0",
        "ranks.min = 9",
        "method: gama is not a key",
        "training: give either",
        "evaluation.every = -1",
    ]
    assert len(found) == len(beginnings), found
    for beginning in beginnings:
        assert any(message.startswith(beginning) for message in found), beginning
    assert any("min_rank = 'a'" in message for message in found), "both arguments of the method are wrong"


def test_the_message_counts_the_problems_and_names_the_source():
    with pytest.raises(ConfigError, match=r"^phones\.toml has 2 problems:\n  .*\n  .*$"):
        parse_config(document(seed=-1, name=""), "phones.toml")


def test_a_wrong_value_does_not_hide_that_its_section_contradicts_itself():
    found = problems(training={"steps": 1, "epochs": 1, "batch_size": 0})
    assert any(message.startswith("training.batch_size = 0") for message in found)
    assert any("either steps or epochs" in message for message in found)


def test_a_wrong_value_does_not_hide_that_two_sections_contradict_each_other():
    found = problems(
        federation={"rounds": 0, "clients_per_round": 1},
        method={"name": "fedavg"},
        ranks={"kind": "uniform", "min": 2, "max": 4},
    )
    assert any(message.startswith("federation.rounds = 0") for message in found)
    assert any("fedavg" in message for message in found)


# Files and --set ----------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(
        'name = "phones"\n[data]\ntarget = "{t}"\n[federation]\nrounds = 3\nclients_per_round = 2\n'
        '[ranks]\nkind = "same"\nrank = 8\n[training]\nsteps = 1\n',
        encoding="utf8",
    )
    return path


def test_a_missing_file_is_named(tmp_path: Path):
    path = tmp_path / "nowhere.toml"
    with pytest.raises(ConfigError, match="no such file") as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "hetlora examples demo copies one here" in str(caught.value)


def test_rows_in_place_of_a_configuration_are_told_to_hetlora_new(tmp_path: Path):
    rows = tmp_path / "my rows.csv"
    rows.write_text("a,b\n")
    with pytest.raises(ConfigError, match=r"not TOML: .*hetlora new mine\.toml --data '.*my rows\.csv'"):
        load_config(rows)


def test_a_key_without_its_section_is_named_with_it(file: Path):
    with pytest.raises(ConfigError, match=r"learning_rate is not a key; did you mean training\.learning_rate\?"):
        load_config(file, ["learning_rate=1e-3"])


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path: Path):
    demo = EXAMPLES[0].parent / "demo.toml"
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbf" + demo.read_bytes())
    config = load_config(tmp_path / "run.toml")
    assert config == load_config(demo)
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + config.model_dump_json().encode())
    assert load_run_config(tmp_path / "config.json") == config


@pytest.mark.parametrize("content", [b"rounds = = 3", b'{"rounds": 3}', 'name = "é"'.encode("latin-1")])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes):
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not TOML") as caught:
        load_config(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "section", "key", "value"),
    [
        ("federation.rounds=5", "federation", "rounds", 5),
        ("federation.rounds = 5", "federation", "rounds", 5),
        ("training.learning_rate=4e-3", "training", "learning_rate", 0.004),
        ("model.base=nano-2", "model", "base", "nano-2"),
        ('model.base="nano 2"', "model", "base", "nano 2"),
        ("model.base=/models/a=b", "model", "base", "/models/a=b"),
        ('model.target_modules=["q_proj", "o_proj"]', "model", "target_modules", ["q_proj", "o_proj"]),
        ("data.train=[1, 2, 4]", "data", "train", [1, 2, 4]),
        ("evaluation.generate=7", "evaluation", "generate", 7),  # a section that the file does not have
    ],
)
def test_set_changes_one_key(file: Path, change: str, section: str, key: str, value: object):
    assert getattr(getattr(load_config(file, [change]), section), key) == value


def test_set_reaches_the_top_level_the_method_and_a_whole_section(file: Path):
    changes = ["seed=7", "method.gamma=0.5", 'ranks={kind = "uniform", min = 2, max = 6}']
    config = load_config(file, changes)
    assert (config.seed, config.method.arguments, config.ranks.largest) == (7, {"gamma": 0.5}, 6)


def test_the_last_of_two_changes_to_a_key_holds(file: Path):
    assert load_config(file, ["seed=1", "seed=2"]).seed == 2


def test_set_leaves_the_other_keys_alone(file: Path):
    config = load_config(file, ["federation.rounds=5"])
    assert (config.name, config.federation.clients_per_round) == ("phones", 2)


@pytest.mark.parametrize("change", ["rounds", "", "=3", "federation.=3", ".rounds=3", "federation..rounds=3"])
def test_a_malformed_change_is_named_with_the_form_it_must_have(file: Path, change: str):
    with pytest.raises(ConfigError) as caught:
        load_config(file, [change])
    assert caught.value.source == "--set"
    assert caught.value.problems == (f"{change!r} is not of the form key.key=value",)


def test_a_change_below_a_value_is_refused(file: Path):
    with pytest.raises(ConfigError, match="name is a value, not a section"):
        load_config(file, ["name.x=3"])


def test_every_malformed_change_is_reported_at_once(file: Path):
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["rounds", "seed=1", "name.x=3"])
    assert len(caught.value.problems) == 2


def test_a_change_that_holds_more_than_one_value_is_not_cut_silently(file: Path):
    with pytest.raises(ConfigError):
        load_config(file, ["seed=1\nthreads=2"])


def test_a_changed_value_is_validated_like_the_file(file: Path):
    with pytest.raises(ConfigError, match=r"ranks\.rank = 0: input should be greater than 0"):
        load_config(file, ["ranks.rank=0"])
    with pytest.raises(ConfigError, match=r"federation\.round is not a key; did you mean 'rounds'\?"):
        load_config(file, ["federation.round=5"])


@pytest.mark.parametrize("change", ["data.max_lenght=", "split_field=", "federation.round=", "modle.base="])
def test_a_key_that_is_none_cannot_be_taken_away(change: str):
    with pytest.raises(ConfigError, match=f"{change[:-1]} is not a key"):
        with_changes({"name": "x"}, [change])
    for known in ("data.max_length=", "seed=", "ranks.tiers=", "method.gamma=", "compare.jobs=", "robustness.clip="):
        assert with_changes({"name": "x"}, [known])["name"] == "x"
