"""Partitions: every row has one client, the seed decides which, and each kind has its stated skew."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawn_examples import examples
from hetlora.config import RunConfig, parse_config
from hetlora.config.build_data import load_federation
from hetlora.data import ClientField, Federation, Labels, Partition, Source, Split, Template, federate
from hetlora.errors import ConfigError, DataError

KINDS = ("iid", "dirichlet", "shards", "quantity")
laws = examples(40)


def partition(kind: Any, clients: int = 4, seed: int = 0, **arguments: Any) -> Partition:
    labels = arguments.pop("labels", Labels("topic") if kind in ("dirichlet", "shards") else None)
    return Partition(kind, clients, seed, labels=labels, **arguments)


# Laws of every kind -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@laws
@given(
    keys=st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=40, max_size=120),
    clients=st.integers(1, 8),
    seed=st.integers(0, 2**63 - 1),
    alpha=st.sampled_from([0.5, 1.0, 100.0]),
)
def test_every_row_has_one_client_and_the_seed_decides_which(
    kind: str, keys: list[str], clients: int, seed: int, alpha: float
):
    if kind == "dirichlet" and alpha < 1.0:
        clients = min(clients, 3)  # of more, one may draw no row ten times over, which is refused
    assigned = partition(kind, clients, seed, alpha=alpha).assign(keys)
    assert list(assigned) == [f"client-{number:03}" for number in range(clients)]
    assert sorted(index for own in assigned.values() for index in own) == list(range(len(keys)))
    assert all(own and list(own) == sorted(own) for own in assigned.values())
    assert partition(kind, clients, seed, alpha=alpha).assign(keys) == assigned


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_gives_another_partition(kind: str):
    keys = ["a", "b", "c"] * 30
    draws = [json.dumps(partition(kind, seed=seed).assign(keys)) for seed in range(5)]
    assert len(set(draws)) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_every_client_holds_the_rows_asked_for(kind: str):
    assigned = partition(kind, 5, alpha=0.5, min_rows=9).assign(["a", "b", "c"] * 30)
    assert min(map(len, assigned.values())) >= 9


@pytest.mark.parametrize("kind", KINDS)
def test_too_few_rows_are_refused_with_the_numbers_and_the_way_out(kind: str):
    with pytest.raises(DataError, match=r"4 with 10 rows each.*need 40 rows.*there are 39; lower partition\.clients"):
        partition(kind, 4, min_rows=10).assign(["a"] * 39)


def test_the_seed_draws_the_shares_and_not_the_order_alone():
    keys = ["a", "b", "c"] * 30
    sizes = [sorted(map(len, partition("dirichlet", seed=seed).assign(keys).values())) for seed in range(5)]
    assert len(set(map(tuple, sizes))) == 5


@pytest.mark.parametrize(
    ("kind", "arguments", "owned"),
    [
        ("iid", {"clients": 5}, [[3, 4, 5], [0, 2, 9], [1, 6], [7, 8], [10, 11]]),
        ("iid", {"clients": 5, "seed": 7}, [[6, 7, 9], [2, 4, 11], [3, 10], [0, 8], [1, 5]]),
        ("dirichlet", {"alpha": 5.0}, [[2, 4, 5, 6], [0, 1, 3, 7, 11], [8, 9, 10]]),
        ("shards", {}, [[0, 3, 6, 9], [1, 2, 4, 5], [7, 8, 10, 11]]),
        ("quantity", {}, [[0, 1, 2, 3, 4, 5, 6, 8, 9], [7], [10, 11]]),
        ("quantity", {"seed": 7}, [[7], [2, 4, 6, 9, 10, 11], [0, 1, 3, 5, 8]]),
        ("quantity", {"min_rows": 2}, [[0, 1, 2, 3, 4, 5, 9], [6, 8], [7, 10, 11]]),
    ],
)
def test_a_seed_gives_the_partition_that_it_always_gave(kind: str, arguments: dict[str, Any], owned: list[list[int]]):
    """A run with a partition of its own is repeated by its configuration, so the draws stay what they were."""
    assigned = partition(kind, **{"clients": 3, **arguments}).assign(["a", "b", "c"] * 4)
    assert list(assigned.values()) == owned


# What each kind is for ----------------------------------------------------------------------------------------------


def test_iid_sizes_differ_by_one_at_most_and_every_client_has_every_label():
    keys = ["a", "b"] * 201
    sizes = [len(own) for own in partition("iid", 4).assign(keys).values()]
    assert sorted(sizes) == [100, 100, 101, 101]
    assert all(30 < Counter(keys[i] for i in own)["a"] < 70 for own in partition("iid", 4).assign(keys).values())


def evenness(alpha: float) -> float:
    """Mean share of a client's most frequent label; 0.25 is even, 1 is one label only."""
    keys = ["a", "b", "c", "d"] * 100
    shares = []
    for seed in range(5):
        for own in partition("dirichlet", 8, seed, alpha=alpha).assign(keys).values():
            shares.append(max(Counter(keys[index] for index in own).values()) / len(own))
    return sum(shares) / len(shares)


def test_a_small_alpha_gives_a_client_nearly_one_label_and_a_large_one_all():
    assert evenness(1000.0) < 0.35 < 0.6 < evenness(0.1)


def test_dirichlet_clients_do_not_take_the_rows_of_a_label_in_the_order_of_the_file():
    """A file's held-out rows often stand at its beginning; they must not all go to the first clients."""
    assigned = partition("dirichlet", 4, alpha=1000.0).assign(["a"] * 400)
    first_hundred = [sum(index < 100 for index in own) for own in assigned.values()]
    assert all(10 <= count <= 40 for count in first_hundred), first_hundred


@pytest.mark.parametrize(("rows_a_label", "alpha"), [(1, 100.0), (2, 1.0), (10, 0.1)])
def test_no_client_is_given_what_is_left_over_of_small_labels(rows_a_label: int, alpha: float):
    keys = [str(index // rows_a_label) for index in range(400)]
    sizes: Counter[str] = Counter()
    for seed in range(5):
        owned = partition("dirichlet", 10, seed, alpha=alpha).assign(keys)
        sizes.update({name: len(own) for name, own in owned.items()})
    assert all(28 <= size / 5 <= 55 for size in sizes.values()), sizes


def test_a_share_of_a_label_is_rounded_by_less_than_a_row():
    keys = ["a", "b"] * 50
    for own in partition("dirichlet", 10, alpha=1e6).assign(keys).values():
        assert all(4 <= count <= 6 for count in Counter(keys[index] for index in own).values())


def test_a_larger_alpha_is_advised_only_where_it_helps():
    with pytest.raises(DataError, match=r"gave each of 20 clients 5 rows; lower partition\.clients or"):
        partition("dirichlet", 20, alpha=100.0, min_rows=5).assign([str(index) for index in range(100)])


def test_a_draw_that_never_suffices_is_refused_with_the_ways_out():
    with pytest.raises(DataError, match=r"alpha = 0\.001.*20 clients 1 rows; raise partition\.alpha, or lower"):
        partition("dirichlet", 20, alpha=0.001).assign(["a"] * 100)


def test_shards_are_even_hold_few_labels_and_leave_nothing_out():
    keys = [str(index % 10) for index in range(1003)]
    assigned = partition("shards", 10, shards_per_client=2).assign(keys)
    assert {len(own) for own in assigned.values()} <= {100, 101, 102}
    assert max(len({keys[index] for index in own}) for own in assigned.values()) <= 4
    assert sum(map(len, assigned.values())) == 1003


def test_quantity_is_skewed_in_size_by_alpha_and_in_nothing_else():
    keys = ["a", "b"] * 500
    sizes = {
        alpha: [len(own) for own in partition("quantity", 10, alpha=alpha).assign(keys).values()]
        for alpha in (0.3, 1e4)
    }
    assert max(sizes[1e4]) - min(sizes[1e4]) <= 10
    assert max(sizes[0.3]) > 250
    largest = max(partition("quantity", 10, alpha=0.3).assign(keys).values(), key=len)
    assert 0.4 < Counter(keys[index] for index in largest)["a"] / len(largest) < 0.6


# Labels -------------------------------------------------------------------------------------------------------------


@laws
@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=80), bins=st.integers(2, 6))
def test_bins_hold_each_length_once_and_in_order(lengths: list[int], bins: int):
    codes, names = Labels("length", bins).codes(lengths)
    assert len(names) <= bins
    assert set(codes) == set(range(len(names))), "no bin is empty"
    assert [code for _, code in sorted(zip(lengths, codes, strict=True))] == sorted(codes)
    for length, code in zip(lengths, codes, strict=True):
        low, high = map(int, names[code].split("-"))
        assert low <= length <= high


def test_bins_of_different_lengths_are_even():
    codes, _ = Labels("length", 4).codes(list(range(100)))
    assert Counter(codes) == {0: 25, 1: 25, 2: 25, 3: 25}


def test_labels_that_are_numbers_are_in_their_order():
    assert Labels("x").codes([10, 9, 10, 2])[1] == ["2", "9", "10"]


def test_labels_that_are_equal_as_numbers_and_differ_as_text_are_kept_apart_but_for_whole_numbers():
    codes, names = Labels("x").codes([1, 1.0, True, "1", 0.5, "a", 1.0])
    assert names == ["0.5", "1", "True", "a"]
    assert codes == [1, 1, 2, 1, 0, 3, 1]


# In a federation ----------------------------------------------------------------------------------------------------


def source(count: int = 60) -> Source:
    fields = (
        {"q": f"{n}?", "a": "x" * (n % 7 + 1), "topic": n % 3, "split": "test" if n % 4 == 0 else "train"}
        for n in range(count)
    )
    return Source("made", ((f"line {n}", row) for n, row in enumerate(fields)))


def test_both_sides_are_divided_together_and_keep_their_side():
    labels = Labels("topic")
    federation = federate(
        source(240),
        owner=partition("dirichlet", 4, alpha=0.1),
        template=Template("{q}", "{a}"),
        split=Split(),
        labels=labels,
    )
    rows = [
        (side, row) for own in federation.clients.values() for side in ("train", "test") for row in getattr(own, side)
    ]
    assert len(rows) == len(set(rows)) == 240
    assert all((int(row.prompt[:-1]) % 4 == 0) == (side == "test") for side, row in rows)
    for name, own in federation.clients.items():
        counted = Counter(str(int(row.prompt[:-1]) % 3) for row in own.train + own.test)
        assert federation.labels[name] == counted
        assert len(own.test) == pytest.approx(len(own.train + own.test) / 4, abs=15), "its own share of held-out rows"


def test_rows_on_neither_side_are_nobodys_and_counted():
    split = Split(train=("train",), test=("nothing",))
    federation = federate(source(), owner=partition("iid", 3), template=Template("{q}", "{a}"), split=split)
    assert [len(own.train) for own in federation.clients.values()] == [15, 15, 15], "they are not divided first"
    assert federation.left_out_rows == {"test": 15}


def test_a_row_without_its_label_is_named():
    with pytest.raises(
        DataError, match=r"line 0: field 'kind', the label, is missing; the row has a, q.*partition\.by"
    ):
        federate(
            source(), owner=partition("shards", labels=Labels("kind")), template=Template("{q}", "{a}"), split=Split()
        )


def test_length_is_that_of_the_target():
    one = federate(
        source(63),
        owner=ClientField("topic"),
        template=Template("{q}", "{a}"),
        split=Split(),
        labels=Labels("length", 7),
    )
    assert sum((Counter(own) for own in one.labels.values()), Counter()).keys() == {f"{n}-{n}" for n in range(1, 8)}


# In a configuration -------------------------------------------------------------------------------------------------


def document(partition: Any = None, **data: Any) -> dict[str, Any]:
    return {
        "data": {"prompt": "{q}", "target": "{a}", **data},
        **({"partition": partition} if partition is not None else {}),
        "federation": {"rounds": 1, "clients_per_round": 2},
        "ranks": {"kind": "same", "rank": 8},
        "training": {"steps": 1},
    }


def federation_of(config: RunConfig) -> Federation:
    return load_federation(config)


def test_a_run_divides_by_its_seed_without_a_client_field(tmp_path: Path):
    rows = [{"q": str(n), "a": "x" * (n % 9 + 1), "split": "test" if n % 3 == 0 else "train"} for n in range(120)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    section = {"kind": "dirichlet", "by": "length", "bins": 3, "alpha": 5.0, "clients": 6, "min_rows": 4}
    whole = document(section, path=str(path))
    one, same, other = (federation_of(parse_config({**whole, "seed": seed})) for seed in (1, 1, 2))
    assert one == same != other
    drawn = federation_of(parse_config({**document(section, path=str(path), clients=2), "seed": 1}))
    assert len(drawn.clients) == 2
    assert drawn.clients.items() <= one.clients.items()


@pytest.mark.parametrize(
    ("section", "data", "said"),
    [
        ({"kind": "iid"}, {}, "partition.kind = 'iid' needs partition.clients"),
        ({"kind": "dirichlet", "clients": 3}, {}, "needs partition.by"),
        ({"kind": "shards", "clients": 3}, {}, "needs partition.by"),
        ({"kind": "iid", "clients": 3, "alpha": 1.0}, {}, "partition.alpha has no meaning with partition.kind = 'iid'"),
        ({"clients": 3}, {}, "partition.clients has no meaning with partition.kind = 'natural'"),
        ({"kind": "quantity", "clients": 3, "shards_per_client": 4}, {}, "partition.shards_per_client has no meaning"),
        (
            {"kind": "dirichlet", "clients": 3, "by": "topic", "bins": 9},
            {},
            "partition.bins is of partition.by = 'length'",
        ),
        ({"kind": "iid", "clients": 3}, {"clients": 4}, "data.clients = 4 is more than partition.clients = 3"),
        ({"kind": "even", "clients": 3}, {}, "partition.kind = 'even'"),
        ({"kind": "iid", "clients": 3, "alpah": 1.0}, {}, "partition.alpah is not a key; did you mean 'alpha'?"),
        ({"kind": "quantity", "clients": 3, "alpha": 0}, {}, "partition.alpha = 0"),
        ({"kind": "quantity", "clients": 3, "alpha": 1e308}, {}, "partition.alpha = 1e+308"),
    ],
)
def test_a_contradiction_is_named_by_its_keys(section: dict[str, Any], data: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as caught:
        parse_config(document(section, **data))
    assert len(caught.value.problems) == 1
    assert said in caught.value.problems[0]


@pytest.mark.parametrize("section", [None, {"kind": "dirichlet", "by": "length", "clients": 5, "bins": 9}])
def test_a_configuration_with_every_default_written_out_is_the_same(section: Any):
    config = parse_config(document(section))
    assert parse_config(json.loads(config.model_dump_json(exclude_none=True))) == config
