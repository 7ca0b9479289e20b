"""A sampled population equals a stored one, and unasked clients cost no memory and no time."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawn_examples import examples
from hetlora.config import parse_config
from hetlora.config.build_data import load_federation
from hetlora.core.client_list import sample_evaluated_clients
from hetlora.core.persistent_map import PersistentMap, updated
from hetlora.core.population import LazyClientMap, NumberedNames, finder
from hetlora.core.ranks import Ranks, explicit_ranks, ranks_by_examples, same_ranks, tiered_ranks, uniform_ranks
from hetlora.data import Example, Federation, Tokenization, TokenizedFederation
from hetlora.errors import ConfigError, DataError, HetLoraError
from hetlora.model.lora_model import load_tokenizer
from hetlora.runs.display import QuietDisplay
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.runs.records import read_records

laws = examples(100)
MILLION = NumberedNames(1_000_000)

# Names --------------------------------------------------------------------------------------------------------------


@laws
@given(st.integers(1, 12_000), st.data())
def test_numbered_names_are_a_list_of_names(count: int, data: st.DataObject):
    names, place = NumberedNames(count), data.draw(st.integers(0, count - 1))
    assert names[place] == names[place - count] == f"client-{place:0{max(3, len(str(count - 1)))}}"
    assert names.index(names[place]) == finder(names)(names[place]) == place
    assert names[place : place + 3] == list(names)[place : place + 3]
    assert len(list(names)) == len(names) == count


@pytest.mark.parametrize(
    "name", ["client-1", "client-0001", "client-100", "client-+01", "client-00١", "001", "", None, 1, "client--01"]
)
def test_a_name_has_one_spelling(name: Any):
    names = NumberedNames(100)
    assert name not in names
    with pytest.raises(KeyError):
        finder(names)(name)
    assert name not in LazyClientMap(names, lambda place: place)


# Ranks --------------------------------------------------------------------------------------------------------------


def test_tiers_are_dealt_as_one_sample_of_all_clients():
    """The deal that results of earlier versions were made with."""
    people, tiers = [str(n) for n in range(100)], [(2, 0.5), (4, 0.3), (8, 0.2)]
    order = random.Random("ranks:7").sample(people, 100)
    ranks = {name: 2 if place < 50 else 4 if place < 80 else 8 for place, name in enumerate(order)}
    assert tiered_ranks(people, tiers, seed=7) == ranks


def test_a_drawn_rank_is_that_of_the_name_in_any_population():
    few = uniform_ranks(["client-000017", "x"], 2, 64, seed=3)
    assert uniform_ranks(MILLION, 2, 64, seed=3)["client-000017"] == few["client-000017"]


@pytest.mark.large
def test_the_ranks_of_a_million_clients_take_two_bytes_each_and_no_draw_before_it_is_asked_for():
    asked: list[str] = []
    sized = NumberedNames(100_000)  # not a million: it asks for all sizes, and what watches memory makes that slow

    class Names(NumberedNames):
        def __getitem__(self, index: Any) -> Any:
            asked.append(index)
            return super().__getitem__(index)

    tracemalloc.start()
    try:
        held = [
            same_ranks(MILLION, 4),
            explicit_ranks(MILLION, {"client-000003": 8}, default=2),
            uniform_ranks(Names(1_000_000), 2, 8, seed=0),
            ranks_by_examples(LazyClientMap(sized, lambda _: 5), 2, 8),
        ]
        assert [ranks["client-000003"] for ranks in held[:2]] == [4, 8]
        assert tracemalloc.get_traced_memory()[0] < 2.3e6
    finally:
        tracemalloc.stop()
    assert not asked
    assert held[2].largest == 8
    assert [held[3].at(place) for place in (0, 99_999)] == [5, 5]


def test_the_largest_rank_is_one_that_a_client_has_unless_there_are_too_many_to_look():
    assert uniform_ranks(["a"], 2, 2_000, seed=0).largest < 2_000
    assert uniform_ranks(MILLION, 2, 2_000, seed=0).largest == 2_000
    assert repr(same_ranks(MILLION, 4)) == "<ranks of 1000000 clients, 4 at most>"


def test_a_rank_for_a_client_beyond_the_population_is_refused():
    with pytest.raises(HetLoraError, match="clients that the data do not have: client-1000000"):
        explicit_ranks(MILLION, {"client-1000000": 2}, default=4)


# The state ----------------------------------------------------------------------------------------------------------

changes = st.dictionaries(st.integers(0, 9), st.integers(), max_size=4)


@laws
@given(changes, st.lists(st.tuples(st.integers(0, 20), changes), max_size=12))
def test_every_version_of_a_mapping_stays_what_it_was(first: dict[int, int], steps: list[tuple[int, dict[int, int]]]):
    """Whichever version the next one is made of, as where two runs go on from one state."""
    versions, plain = [PersistentMap(first)], [dict(first)]
    for chosen, change in steps:
        parent = chosen % len(versions)
        versions.append(updated(versions[parent], change))
        plain.append({**plain[parent], **change})
    for version, expected in zip(versions, plain, strict=True):
        assert version == expected
        assert (list(version), len(version)) == (list(expected), len(expected))
        assert all((key in version) == (key in expected) for key in range(10))


def test_the_next_version_does_not_copy_the_items():
    before: PersistentMap[int, int] = PersistentMap(dict.fromkeys(range(100_000), 0))
    tracemalloc.start()
    try:
        for number in range(50):
            before = before.updated({number: 1})
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


# Rows ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Thirty training rows and ten held out, of three clients in the file."""
    fields = [
        {"client": n % 3, "q": f"{n}?", "a": f" it is {n}.", "split": "test" if n % 4 == 0 else "train"}
        for n in range(40)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, fields)), encoding="utf8")
    return path


def document(path: Path, base: str = "nano", *, each: int = 3, clients: int = 1_000_000, **more: Any) -> dict[str, Any]:
    return {
        "output": str(path.parent / "runs"),
        "model": {"base": base},
        "data": {"path": str(path), "prompt": "{q}", "target": "{a}", "max_length": 32, **more.pop("data", {})},
        "partition": {"kind": "sampled", "clients": clients, "rows_per_client": each, **more.pop("partition", {})},
        "federation": {"rounds": 2, "clients_per_round": 3},
        "ranks": {"kind": "tiers", "tiers": [{"rank": 2, "share": 0.5}, {"rank": 4, "share": 0.5}]},
        "training": {"steps": 1, "batch_size": 2},
        "evaluation": {"clients": 5},
        **more,
    }


def sampled(path: Path, **more: Any) -> Federation:
    return load_federation(parse_config(document(path, **more)))


def test_a_client_draws_different_rows_of_its_own_by_seed_and_name_alone(rows: Path):
    federation, other = sampled(rows), sampled(rows, seed=1)
    again = sampled(rows, clients=999_999)  # as wide a name
    names = [federation.names[place] for place in range(0, 1_000_000, 20_011)]
    for name in names:
        own = federation.clients[name]
        assert (len(set(own.train)), len(set(own.test))) == (3, 1)
        assert own == federation.clients[name] == again.clients[name]
    assert len({federation.clients[name] for name in names}) > 40, "clients draw for themselves"
    assert sum(federation.clients[name] == other.clients[name] for name in names) < 5


def test_all_rows_are_drawn_alike_and_never_across_the_split(rows: Path):
    federation = sampled(rows, clients=3_000)
    drawn: dict[str, list[str]] = {"train": [], "test": []}
    for own in federation.clients.values():
        drawn["train"] += [row.prompt for row in own.train]
        drawn["test"] += [row.prompt for row in own.test]
    assert {int(prompt[:-1]) % 4 == 0 for prompt in drawn["train"]} == {False}
    assert {int(prompt[:-1]) % 4 == 0 for prompt in drawn["test"]} == {True}
    for side, kinds in (("train", 30), ("test", 10)):
        mean = len(drawn[side]) / kinds
        counts = [drawn[side].count(prompt) for prompt in set(drawn[side])]
        assert len(counts) == kinds
        assert all(abs(count - mean) < 5 * mean**0.5 for count in counts)


def test_held_out_rows_are_in_proportion_and_bounded(rows: Path):
    assert {len(sampled(rows, each=each).clients["client-000000"].test) for each in (8, 9, 10)} == {3}
    assert len(sampled(rows, each=30, evaluation={"rows_per_client": 4}).clients["client-000000"].test) == 4
    federation = sampled(rows, each=30)
    assert (federation.total("train"), federation.total("test")) == (30_000_000, 10_000_000)
    assert federation.counts("test")["client-000077"] == 10 == len(federation.clients["client-000077"].test)


def test_validation_rows_are_of_the_training_side(rows: Path):
    federation = sampled(rows, data={"validation_share": 0.3})
    for place in range(50):
        own = federation.clients[federation.names[place]]
        assert not any(int(row.prompt[:-1]) % 4 == 0 for row in own.train + own.test)
        assert not set(own.train) & set(own.test)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"partition": {"rows_per_client": None}}, "partition.kind = 'sampled' needs partition.rows_per_client"),
        ({"partition": {"clients": None}}, "partition.kind = 'sampled' needs partition.clients"),
        ({"partition": {"by": "client"}}, "partition.by has no meaning with partition.kind = 'sampled'"),
        ({"partition": {"kind": "iid"}}, "partition.rows_per_client has no meaning with partition.kind = 'iid'"),
        ({"data": {"clients": 3}}, "data.clients has no meaning with partition.kind = 'sampled'"),
        ({"data": {"min_rows": 3}}, "data.min_rows has no meaning with partition.kind = 'sampled'"),
    ],
)
def test_keys_that_contradict_a_sampled_population_are_named(rows: Path, changes: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as caught:
        parse_config(document(rows, **changes))
    assert len(caught.value.problems) == 1
    assert said in caught.value.problems[0]


def test_more_rows_than_there_are_and_labels_are_refused(rows: Path):
    with pytest.raises(DataError, match=r"rows_per_client = 31, but there are 30 training rows to draw from; lower it"):
        sampled(rows, each=31)
    with pytest.raises(DataError, match=r"not counted by label with partition\.kind = 'sampled'"):
        load_federation(parse_config(document(rows)), "client")


# Tokens -------------------------------------------------------------------------------------------------------------


def test_tokens_that_are_forgotten_come_back_the_same_and_are_counted_once(rows: Path, tiny: str):
    federation = sampled(rows, clients=50)
    tokenizer = load_tokenizer(tiny)
    whole = TokenizedFederation(federation, Tokenization(tokenizer, 9))
    small = TokenizedFederation(federation, Tokenization(tokenizer, 9), kept=200)
    assert small.counts == whole.counts
    assert (small.counts.clients, small.counts.truncated) == (50, 200), "every row is too long"
    for name in [*federation.names, *federation.names]:
        assert list(small.train(name)) == list(whole.train(name))
        assert small.train(name) is small.train(name), "what was used last is kept"
        assert held(small) <= 200
    assert small.counts == whole.counts
    assert held(whole) > 2_000


def held(data: TokenizedFederation) -> int:
    return data._cache._size


def test_rows_of_a_pool_are_pooled_once(rows: Path, tiny: str):
    data = TokenizedFederation(sampled(rows), Tokenization(load_tokenizer(tiny), 32))
    pooled = list(data.pooled())
    assert len(pooled) == len(set(pooled)) == 30
    assert isinstance(pooled[0], Example)


# A run --------------------------------------------------------------------------------------------------------------


@pytest.mark.large
def test_a_run_of_a_million_clients_lists_those_it_measures(rows: Path, tiny: str):
    experiment = LocalExperiment(parse_config(document(rows, tiny)), QuietDisplay())
    result = experiment.run()
    records = read_records(result.records)
    assert records[0]["clients"] == 1_000_000
    assert (records[0]["train_rows"], records[0]["counted_clients"]) == (3_000_000, 1_000)
    listed = list(sample_evaluated_clients(MILLION, 5, seed=0))
    assert listed == sorted(listed) == list(result.base.clients) == list(result.final.clients) == list(result.ranks)
    assert listed == list(records[0]["trainable_parameters"])
    cohorts = {name for record in records if record["kind"] == "round" for name in record["ranks"]}
    assert len(cohorts) == 6 == len(result.state.answered)
    assert all(result.state.answered[name] in (0, 1) for name in cohorts)


def test_measuring_some_clients_scores_them_as_measuring_all(rows: Path, tiny: str):
    few, everyone = (
        LocalExperiment(parse_config(document(rows, tiny, clients=40, evaluation=evaluation)), QuietDisplay()).measure(
            None
        )
        for evaluation in ({"clients": 5}, {})
    )
    assert len(few.clients) == 5 < len(everyone.clients) == 40
    for name, score in few.clients.items():
        assert score.tokens == everyone.clients[name].tokens
        assert score.nll == pytest.approx(everyone.clients[name].nll, rel=1e-5)


def test_what_all_have_pruned_away_is_found_in_a_large_population(rows: Path, tiny: str):
    experiment = LocalExperiment(parse_config(document(rows, tiny, clients=50_000)), QuietDisplay())
    asked: list[str] = []

    class Watched(Ranks):
        def __getitem__(self, name: str) -> int:
            asked.append(name)
            return super().__getitem__(name)

    ranks = experiment.clients.ranks
    experiment.clients.ranks = Watched(ranks.names, ranks.at, ranks.bound)
    state = experiment.first_state()
    assert all(pair.A.shape[0] == 4 for pair in state.owned_slots(experiment.trainers).values())
    assert len(asked) < 100, "the first client of the largest rank ends the search"
