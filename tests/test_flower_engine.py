"""The engine over Flower's grid: adapters equal in-process ones, and a faulty node costs only its own clients."""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs hetlora[flower]")

import httpx
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.error import Error

from fake_grid import FakeGrid, by_flower, hosting, many_loaded
from hetlora import __version__, export_run
from hetlora.cli import main
from hetlora.config import RunConfig, parse_config
from hetlora.core.adapter import truncate
from hetlora.core.admission import AdmissionRule
from hetlora.core.codecs import CODECS, by_slots
from hetlora.core.round import run_round, run_rounds
from hetlora.core.types import ClientFailure, ServerState
from hetlora.errors import ConfigError, HetLoraError
from hetlora.flower import client_app
from hetlora.flower import client_runtime as local
from hetlora.flower import membership as roll_module
from hetlora.flower import transport as transport_module
from hetlora.flower.clock import Clock
from hetlora.flower.engine import check_method
from hetlora.flower.envelope import WIRE, Envelope
from hetlora.flower.flwr_messages import from_record_dict, to_record_dict
from hetlora.flower.hosted_experiment import HostedExperiment
from hetlora.flower.launch import resume_run, start_run
from hetlora.flower.node_config import NodeConfig
from hetlora.flower.remote_experiment import RemoteExperiment
from hetlora.flower.server_app import serve
from hetlora.flower.transport import DeliveryFailure, Transport
from hetlora.flower.wire.codec import pack_update, parse_update
from hetlora.methods import METHODS
from hetlora.model.peft_files import read_adapter
from hetlora.runs.display import QuietDisplay
from hetlora.runs.identity import identity
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.runs.records import Records, read_records
from hetlora.runs.result import round_record
from processes import HANGS
from proofs.grid import VirtualClock
from proofs.small_run import write_rows

pytestmark = pytest.mark.run

RUN: dict[str, Any] = {
    "threads": 1,
    "data": {"prompt": "{prompt}", "target": "{target}", "max_length": 32},
    "partition": {"kind": "sampled", "clients": 10, "rows_per_client": 6},
    "federation": {"rounds": 3, "clients_per_round": 4},
    "ranks": {"kind": "uniform", "min": 2, "max": 8},
    "method": {"name": "hetlora", "gamma": 0.6, "min_rank": 2, "penalty": 30.0},
    "training": {"steps": 2, "batch_size": 2, "learning_rate": 0.03},
    "evaluation": {"every": 0, "rows_per_client": 1},
    "flower": {"deadline": 600.0, "wait": 600.0},
}


def config(**changes: Any) -> RunConfig:
    return parse_config({**RUN, **{key: {**RUN.get(key, {}), **value} for key, value in changes.items()}})


@pytest.fixture(autouse=True)
def _small(tiny: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base and rows as small as real ones can be: what is tested here is the way between server and clients."""
    rows = tmp_path_factory.getbasetemp() / "rows.jsonl"
    if not rows.is_file():
        write_rows(rows)
    monkeypatch.setitem(RUN, "model", {"base": tiny})
    fields = {"path": str(rows), "prompt": "{question}", "target": "{answer}", "split_field": "split"}
    monkeypatch.setitem(RUN, "data", {**RUN["data"], **fields})


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    monkeypatch.setattr(transport_module, "POLL", 0.01)
    monkeypatch.setattr(roll_module, "AGAIN", 0.2)
    return many_loaded(monkeypatch)


class Saying(QuietDisplay):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def shares(count: int) -> dict[int, Any]:
    return {
        100 + place: hosting({"partition-id": place, "num-partitions": count}, keeps=True) for place in range(count)
    }


def rounds(undertaking: Any) -> tuple[ServerState, list[Any]]:
    reports = []
    state = undertaking.first_state()
    for after, report in run_rounds(
        state, undertaking.method, undertaking.engine, undertaking.cohort, undertaking.rounds
    ):
        state = after
        reports.append(report)
    return state, reports


def one_by_one(settings: RunConfig) -> tuple[ServerState, list[Any]]:
    here = LocalExperiment(settings, QuietDisplay())
    here.engine.group_size, here.engine.workers = 1, 1  # type: ignore[attr-defined]
    return rounds(here)


def assert_same(one: ServerState, other: ServerState) -> None:
    assert one.adapter.keys() == other.adapter.keys()
    for module, pair in one.adapter.items():
        assert torch.equal(pair.A, other.adapter[module].A), module
        assert torch.equal(pair.B, other.adapter[module].B), module
    assert one.ranks == other.ranks


# The same as in-process ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        "hetlora",
        "flexlora",
        "rolora",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("zeropad", "rbla", "ffa_lora")),
    ],
)
def test_two_nodes_that_host_ten_clients_give_the_adapters_of_one_process(method: str):
    settings = config() if method == "hetlora" else parse_config({**RUN, "method": {"name": method}})
    grid = FakeGrid(shares(2))
    state, reports = rounds(HostedExperiment(settings, QuietDisplay(), Transport(grid)))
    expected, theirs = one_by_one(settings)
    assert_same(state, expected)
    assert [report.clients for report in reports] == [report.clients for report in theirs]
    assert not any(report.failures for report in reports)
    assert len(grid.sent("train")) <= 2 * 3, "the tasks of a node travel in one message"
    if method == "hetlora":
        assert any(client.pruned for report in reports for client in report.clients)


def test_a_frozen_factor_is_sent_once():
    settings = parse_config(
        {**RUN, "method": {"name": "ffa_lora"}, "federation": {"rounds": 3, "clients_per_round": 10}}
    )
    grid = FakeGrid(shares(1))
    rounds(HostedExperiment(settings, QuietDisplay(), Transport(grid)))
    first, second, third = [sum(map(len, envelope.blobs)) for envelope in grid.sent("train")]
    assert second == third < 0.7 * first


def test_a_process_that_was_restarted_gets_again_what_it_has_lost(forget: Callable[[], None]):
    settings = parse_config(
        {**RUN, "method": {"name": "ffa_lora"}, "federation": {"rounds": 3, "clients_per_round": 10}}
    )
    node = hosting({"partition-id": 0, "num-partitions": 1})
    trained = []

    def forgetful(message: Message) -> Message:
        if message.metadata.message_type == "train":
            trained.append(message)
            if len(trained) == 2:
                forget()
        return node(message)

    state, reports = rounds(HostedExperiment(settings, QuietDisplay(), Transport(FakeGrid({1: forgetful}))))
    assert not any(report.failures for report in reports)
    assert len(trained) == 3 + 10, "each client says what it lacks, and is sent it"
    assert_same(state, one_by_one(settings)[0])


def test_a_message_that_comes_again_after_a_later_one_changes_nobodys_factors():
    # RoLoRA sends one factor; the other is that of the round before, and not of the round whose message came last.
    settings = parse_config({**RUN, "method": {"name": "rolora"}, "federation": {"rounds": 4, "clients_per_round": 10}})
    node = hosting({"partition-id": 0, "num-partitions": 1})
    trained = []

    def repeating(message: Message) -> Message:
        reply = node(message)
        if message.metadata.message_type == "train":
            trained.append(message)
            if len(trained) == 2:
                node(trained[0])
        return reply

    state, reports = rounds(HostedExperiment(settings, QuietDisplay(), Transport(FakeGrid({1: repeating}))))
    assert not any(report.failures for report in reports)
    assert len(trained) == 4 + 10, "each client says that it lacks what is meant, and is sent it"
    assert_same(state, one_by_one(settings)[0])


@pytest.mark.parametrize(
    ("precision", "share", "apart"),
    [
        pytest.param("bfloat16", 0.65, 0.2, marks=pytest.mark.slow),
        pytest.param("int8", 0.45, 0.2, marks=pytest.mark.slow),
        ("int3", 0.45, 1.0),
    ],
)
def test_fewer_bits_travel_and_the_adapters_stay_close(
    precision: str, share: float, apart: float, monkeypatch: pytest.MonkeyPatch
):
    """In the codecs there are and in a coarse one that is added: the clients are honest, and none is refused."""
    monkeypatch.setitem(CODECS, "int3", by_slots("int3", levels=3))
    exact, few = FakeGrid(shares(2)), FakeGrid(shares(2))
    # By SGD: where a gradient is next to nothing, AdamW makes a whole step of the sign that rounding gave it.
    training = {"steps": 2, "batch_size": 2, "optimizer": "sgd", "learning_rate": 1.0}
    base = {**RUN, "ranks": {"kind": "same", "rank": 64}, "method": {"name": "fedavg"}, "training": training}
    state, _ = rounds(HostedExperiment(parse_config(base), QuietDisplay(), Transport(exact)))
    flower = {**RUN["flower"], "precision": precision}
    other, reports = rounds(HostedExperiment(parse_config({**base, "flower": flower}), QuietDisplay(), Transport(few)))
    assert not any(report.failures for report in reports)

    def size(grid: FakeGrid) -> int:
        return sum(len(blob) for answer in grid.answers for blob in from_record_dict(answer.content).blobs)

    assert size(few) < share * size(exact)
    for module, (A, B) in state.adapter.items():
        exact_delta = B.double() @ A.double()
        few_delta = other.adapter[module].B.double() @ other.adapter[module].A.double()
        assert 0 < (few_delta - exact_delta).norm() < apart * exact_delta.norm()


# Nodes that go wrong ------------------------------------------------------------------------------------------------


def lying(answer: Callable[[Envelope, Message], Any]) -> Any:
    """Return a node that says honestly who it is and lies when it should train."""
    honest = hosting({"partition-id": 0, "num-partitions": 2})
    replies: dict[str, Message] = {}

    def handle(message: Message) -> Any:
        name = message.metadata.message_id
        if name not in replies:  # who hears nothing asks again
            replies[name] = honest(message)
        reply = replies[name]
        return answer(from_record_dict(reply.content), message) if message.metadata.message_type == "train" else reply

    return handle


def replied(message: Message, envelope: Envelope) -> Message:
    return Message(to_record_dict(envelope), reply_to=message)


def raising(error: Exception) -> Any:
    def answer(_: Envelope, __: Message) -> Any:
        raise error

    return answer


def swapped(envelope: Envelope, message: Message) -> Message:
    """Each client's answer holds another's update."""
    return replied(message, Envelope("train", envelope.value, envelope.blobs[1:] + envelope.blobs[:1]))


def not_finite(envelope: Envelope, message: Message) -> Message:
    blobs = [blob[:-4] + b"\x00\x00\xc0\x7f" for blob in envelope.blobs]
    return replied(message, Envelope("train", envelope.value, blobs))


LIES: dict[str, tuple[Any, str]] = {
    "nothing": (lambda _, __: None, "no answer within"),
    "what cannot be unpacked": (raising(ValueError("bad object")), "cannot be read"),
    "Flower's error 5": (lambda _, m: Message(Error(5, "gone"), reply_to=m), "the node went away: gone"),
    "Flower's error 8": (lambda _, m: Message(Error(8, ""), reply_to=m), "its process died"),
    "a refusal": (lambda _, m: replied(m, Envelope("refused", {"reason": "no memory"})), "no memory"),
    "an empty content": (lambda _, m: Message(RecordDict(), reply_to=m), "no message of hetlora's"),
    "arrays of another kind": (
        lambda p, m: Message(
            RecordDict(
                {
                    "text": ConfigRecord({"json": p.text()}),
                    "adapters": ArrayRecord({"000000": Array(torch.ones(3).numpy())}),
                }
            ),
            reply_to=m,
        ),
        "its arrays are not",
    ),
    "no JSON": (
        lambda _, m: Message(
            RecordDict({"text": ConfigRecord({"json": "{" * 10_000}), "adapters": ArrayRecord({})}), reply_to=m
        ),
        "no message of hetlora's",
    ),
    "no answers": (lambda p, m: replied(m, Envelope("train", {"answers": 17}, p.blobs)), "leaves it out"),
    "foreign clients": (
        lambda p, m: replied(m, Envelope("train", {"answers": [{"client": "eve"}, {"client": [1]}, 3]}, p.blobs)),
        "leaves it out",
    ),
    "no bytes": (lambda p, m: replied(m, Envelope("train", p.value, [])), "refused: 0 bytes"),
    "garbage": (lambda p, m: replied(m, Envelope("train", p.value, [b"\xff" * len(b) for b in p.blobs])), "refused"),
    "too much": (
        lambda p, m: replied(m, Envelope("train", p.value, [b + bytes(2**22) for b in p.blobs])),
        "is the most",
    ),
    "seven megabytes of text": (
        lambda p, m: replied(
            m,
            Envelope("train", {"answers": [{**e, "failure": "x" * 7_000_000} for e in p.value["answers"][:1]]}, []),
        ),
        "over the limit of",
    ),
    "a thousand arrays": (
        lambda _, m: Message(to_record_dict(Envelope("train", {}, [b""] * 1001), "2"), reply_to=m),
        "too many",
    ),
    "updates of each other": (swapped, "refused: "),
    "NaN": (not_finite, "infinity or NaN"),
}


USUAL = ("nothing", "no answers", "garbage", "NaN")
"""Checked in every run of the tests; the others differ only in an earlier field."""


@pytest.mark.parametrize("lie", [lie if lie in USUAL else pytest.param(lie, marks=pytest.mark.slow) for lie in LIES])
def test_what_a_node_does_costs_its_own_clients_only(lie: str):
    answer, reason = LIES[lie]
    flower = {**RUN["flower"], "deadline": 3.0 if lie == "nothing" else 600.0}
    federation = {"rounds": 2, "clients_per_round": 10}
    settings = parse_config({**RUN, "flower": flower, "federation": federation})
    nodes = {1: lying(answer), 2: hosting({"partition-id": 1, "num-partitions": 2})}
    hosted = HostedExperiment(settings, Saying(), Transport(FakeGrid(nodes), clock=VirtualClock()))
    state, reports = rounds(hosted)
    assert state.round == 2
    names = hosted.data.federation.names
    for report in reports:
        assert {client.client for client in report.clients} == set(names[1::2]), "the honest ones are all there"
        assert {failure.client for failure in report.failures} == set(names[0::2]), (
            "each of the others is accounted for"
        )
        assert all(reason in failure.reason for failure in report.failures), report.failures
        hosted.annotate(round_record(report, state.adapter, 1.0))
    lines = [line for line in hosted.display.said if "gave nothing" in line]
    assert len(lines) == 10
    assert all(reason in line for line in lines)


def test_a_second_answer_of_a_client_is_not_looked_at():
    def twice(envelope: Envelope, message: Message) -> Message:
        answers = [each for each in envelope.value["answers"] for _ in range(2)]
        return replied(message, Envelope("train", {"answers": answers}, envelope.blobs))

    settings = parse_config({**RUN, "federation": {"rounds": 1, "clients_per_round": 10}})
    nodes = {1: lying(twice), 2: hosting({"partition-id": 1, "num-partitions": 2})}
    _, [report] = rounds(HostedExperiment(settings, QuietDisplay(), Transport(FakeGrid(nodes))))
    assert len({client.client for client in report.clients}) == len(report.clients) == 5 + 3
    assert [failure.reason for failure in report.failures] == ["its node's answer leaves it out"] * 2, (
        "no more entries are read than clients were asked"
    )


def test_a_round_ends_when_enough_have_answered():
    slow = hosting({"partition-id": 0, "num-partitions": 2})
    nodes = {
        1: lambda m: None if m.metadata.message_type == "train" else slow(m),
        2: hosting({"partition-id": 1, "num-partitions": 2}),
    }
    federation = {"rounds": 1, "clients_per_round": 10}
    settings = parse_config(
        {**RUN, "federation": federation, "flower": {"deadline": 600.0, "wait": 600.0, "answers": 5}}
    )
    _, [report] = rounds(HostedExperiment(settings, QuietDisplay(), Transport(FakeGrid(nodes))))
    assert len(report.clients) == 5
    assert {failure.reason for failure in report.failures} == {"not awaited: 5 others had answered"}


def test_a_superlink_that_is_lost_is_no_clients_fault():
    def lost(_: Message) -> Any:
        raise httpx.ConnectError("gone")

    grid = FakeGrid(shares(1))
    hosted = HostedExperiment(config(), QuietDisplay(), Transport(grid))
    hosted.cohort(0)
    grid.handlers = {100: lost}
    with pytest.raises(httpx.ConnectError):
        rounds(hosted)


def test_a_run_that_is_stopped_ends_at_the_next_message():
    stopped = threading.Event()
    hosted = HostedExperiment(config(), QuietDisplay(), Transport(FakeGrid(shares(1)), stopped))
    hosted.cohort(0)
    stopped.set()
    with pytest.raises(KeyboardInterrupt):
        rounds(hosted)


def test_a_run_that_ends_early_says_how_it_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("tomli_w")
    import tomli_w

    class Lost(FakeGrid):
        trained = 0

        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            found = super().pull_messages(message_ids)
            self.trained += sum(answer.metadata.message_type == "train" for answer in found)
            if self.trained > 1:
                raise httpx.ConnectError("gone")
            return found

    document = own_data(federation={"rounds": 2, "clients_per_round": 1}, ranks={"kind": "same", "rank": 4})
    document |= {"name": "mine", "output": str(tmp_path / "my runs")}
    (tmp_path / "run.toml").write_text(tomli_w.dumps(document))
    nodes = {1: hosting(own(tmp_path, "ana", 30))}
    with pytest.raises(HetLoraError) as lost:
        serve(Lost(nodes), {"config": str(tmp_path / "run.toml")})
    folder = tmp_path / "my runs" / "mine"
    way_on = f"start it again with --run-config 'resume=\"{folder}\"'"
    assert str(lost.value) == f"the connection to the SuperLink is lost: gone; {way_on}"
    assert f"records are in {folder}; if the run ends early, {way_on}\n" in capsys.readouterr().err
    serve(FakeGrid(nodes), {"resume": str(folder)})
    assert (folder / "summary.json").is_file()
    with pytest.raises(HetLoraError, match="nowhere"):
        serve(FakeGrid(nodes), {"resume": str(tmp_path / "nowhere")})


# Methods ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_a_method_that_changes_the_base_is_refused_whatever_it_is_called(name):
    with pytest.raises(ConfigError, match="'mine' does not run over Flower: it changes the base"):
        check_method(replace(METHODS[name](), name="mine"))


def test_a_method_whose_clients_keep_or_fold_something_is_refused():
    refused = {}
    for name in METHODS:
        try:
            check_method(METHODS[name]())
        except ConfigError as error:
            refused[name] = str(error)
    assert all(f"method.name = {name!r} does not run over Flower" in why for name, why in refused.items())
    assert {"flora", "fedex_lora", "fedsa_lora", "full"} <= refused.keys()
    assert {
        "hetlora",
        "fedavg",
        "zeropad",
        "rbla",
        "replication",
        "flexlora",
        "ffa_lora",
        "rolora",
    } & refused.keys() == set()


# Methods of a person's own package ----------------------------------------------------------------------------------

EXAMPLES = str(Path(__file__).resolve().parent.parent / "examples")


def test_nodes_that_allow_its_module_train_with_a_method_of_a_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    settings = parse_config({**RUN, "method": {"name": "fair:fair", "q": 2.0}})
    node = {"partition-id": 0, "num-partitions": 1, "methods": "mypkg.other, fair"}
    state, reports = rounds(HostedExperiment(settings, QuietDisplay(), Transport(FakeGrid({1: hosting(node)}))))
    expected, _ = one_by_one(settings)
    assert_same(state, expected)
    assert not any(report.failures for report in reports)


@pytest.fixture
def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Envelope:
    """A server's first message, which names a method of a module that is here."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "strangepkg.py").write_text("from hetlora.methods import zeropad")
    known = config()
    text = json.dumps({**known.model_dump(mode="json"), "method": {"name": "strangepkg:zeropad"}})
    return Envelope("hello", {"wire": WIRE, "config": text, "identity": identity(known.model.base)})


@pytest.mark.parametrize("methods", [None, "mypkg,strangepkg.zeropad"])
@pytest.mark.parametrize("twice", [False, True])
def test_no_module_that_a_server_names_is_imported_without_its_owners_word(
    strange: Envelope, methods: str | None, twice: bool
):
    if twice:  # of a key that stands twice, one reader of JSON takes the first, another the last
        text = strange.value["config"].replace('"name": "strangepkg', '"name": "hetlora", "name": "strangepkg')
        strange = Envelope("hello", {**strange.value, "config": text})
    settings = {"partition-id": 0, "num-partitions": 1} | ({"methods": methods} if methods else {})
    answer = local.answer(strange, NodeConfig.read(settings), keeps=True)
    assert answer.kind == "refused"
    assert "method.name: 'strangepkg:zeropad': the server names a method of the module" in answer.value["reason"]
    allowed = f"{methods},strangepkg" if methods else "strangepkg"
    assert f'add methods="{allowed}" to --node-config' in answer.value["reason"]
    assert "strangepkg" not in sys.modules


def test_in_a_simulation_server_and_nodes_are_one_persons(strange: Envelope, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client_app, "_within_ray", lambda: True)
    transport = Transport(FakeGrid({7: by_flower({"partition-id": 0, "num-partitions": 1})}))
    answer = transport.poll(transport.send(strange, 7, 10.0))
    assert isinstance(answer, Envelope)
    assert answer.kind == "hello"
    del sys.modules["strangepkg"]


# Who is there -------------------------------------------------------------------------------------------------------


def own(folder: Path, name: str, rows: int = 40, **settings: Any) -> dict[str, Any]:
    """Write a client's own file and return the settings of its node."""
    path = folder / f"{name}.jsonl"
    lines = [{"prompt": f"secret-{name}-{row}", "target": f"answer {row} of {name}"} for row in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"data": str(path), "name": name, "rank": 4, **settings}


def own_data(**sections: Any) -> dict[str, Any]:
    """Return the configuration of clients with data of their own: on the bundled base, for nobody opens a server's folder."""
    document = {key: value for key, value in RUN.items() if key != "partition"}
    data = {"prompt": "{prompt}", "target": "{target}", "split_field": "", "max_length": 32}
    flower = {**RUN["flower"], "clients": "nodes"}
    return {**document, "model": {"base": "nano"}, "data": data, "flower": flower, **sections}


def deployed(*nodes: Any, clock: Clock | None = None, **changes: Any) -> tuple[RemoteExperiment, FakeGrid, Saying]:
    document = own_data(ranks={"kind": "same", "rank": 8}, federation={"rounds": 2, "clients_per_round": 2})
    document["flower"] |= changes
    grid, display = FakeGrid(dict(enumerate(nodes, 1))), Saying()
    return RemoteExperiment(parse_config(document), display, Transport(grid, clock=clock)), grid, display


def test_clients_with_data_of_their_own_train_and_no_row_reaches_the_server(tmp_path: Path):
    deployment, grid, _ = deployed(
        hosting(own(tmp_path, "ana", 30)), hosting(own(tmp_path, "ben", 30, rank=None, memory=2000.0))
    )
    before = deployment.measure(None)
    state, reports = rounds(deployment)
    after = deployment.measure(state)
    assert set(before.clients) == set(after.clients) == {"ana", "ben"}
    assert before.overall.tokens > 0
    assert after.overall.perplexity < before.overall.perplexity
    assert reports[0].ranks == {"ana": 4, "ben": 8}, "the rank of ben follows from its memory"
    for answer in grid.answers:
        envelope = from_record_dict(answer.content)
        for part in (envelope.text().encode(), *envelope.blobs):
            assert b"secret-" not in part
            assert b"answer " not in part
    assert deployment.run_record().train_rows == sum(
        node.client.train for node in deployment.network.registry.nodes.values()
    )
    folder = deployment.write_result(state, tmp_path / "result")
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_the_written_adapter_scales_as_the_clients_did(tmp_path: Path):
    document = own_data(ranks={"kind": "same", "rank": 4}, model={"base": "nano", "scaling": 0.75})
    deployment = RemoteExperiment(parse_config(document), Saying(), Transport(FakeGrid({})))
    folder = deployment.write_result(deployment.first_state(), tmp_path / "result")
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["lora_alpha"] / written["r"] == 0.75


def test_a_client_does_not_train_more_than_it_affords(tmp_path: Path):
    deployment, _, _ = deployed(hosting(own(tmp_path, "ana")), hosting(own(tmp_path, "ben")))
    deployment.cohort(0)
    greedy = deployment.method.distribute(deployment.first_state(), deployment._members()[0])
    from dataclasses import replace

    larger = replace(greedy, rank=8, adapter=deployment.first_state().truncated(8))
    [failure] = list(deployment.engine.train([larger], deployment.method))
    assert "rank 8 was sent, and this client affords 4" in failure.reason


def test_a_base_with_other_files_is_refused_on_both_sides(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HETLORA_STATE", str(tmp_path / "s"))
    import shutil

    from hetlora.model.lora_model import locate_base

    other = tmp_path / "base"
    shutil.copytree(locate_base("nano"), other)
    with (other / "config.json").open("a") as file:
        file.write(" ")
    deployment, _, display = deployed(
        hosting(own(tmp_path, "ana")), by_flower(own(tmp_path, "ben", base=str(other), idle=5.0)), wait=60.0
    )
    gather = deployment.network.registry.gather
    gather(lambda: any("was refused" in line for line in display.said), HANGS, lambda: "a refusal")
    with pytest.raises(HetLoraError, match=r"(?s)waited .* for 2 clients.*the base here .* is not the server's"):
        gather(lambda: False, 0.0, lambda: "2 clients")
    assert any("was refused: client 'ben': " in line and "the base here" in line for line in display.said)
    assert "the base here" in capfd.readouterr().err, "the client's own log says it, too"


def test_bases_may_differ_where_it_is_allowed_and_what_each_is_stands_in_the_records(tmp_path: Path):
    from hetlora.model.lora_model import load_base, locate_base

    tuned, wider = tmp_path / "tuned", tmp_path / "wider"
    base = load_base("nano")
    for parameter in base.parameters():
        parameter.data *= 1.01
    for folder in (tuned, wider):
        base.save_pretrained(folder)
        for file in Path(locate_base("nano")).glob("*token*"):
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    document = own_data(
        ranks={"kind": "same", "rank": 8}, federation={"rounds": 2, "clients_per_round": 2, "same_weights": False}
    )
    nodes = {
        1: hosting(own(tmp_path, "ana")),
        2: hosting(own(tmp_path, "ben", base=str(tuned), quantize="bfloat16")),
        3: hosting(own(tmp_path, "cleo", base=str(wider))),
    }
    display = Saying()
    deployment = RemoteExperiment(parse_config(document), display, Transport(FakeGrid(nodes)))
    before = deployment.measure(None)
    state, reports = rounds(deployment)
    assert deployment.measure(state).overall.perplexity < before.overall.perplexity
    assert set(reports[0].ranks) == {"ana", "ben"}
    assert any(re.search("was refused.*the architecture here .* is not the server's", line) for line in display.said)
    assert any(
        re.match(r"client 'ben' \(rank 4, 3. rows, base in bfloat16, node 2\) is there", line) for line in display.said
    )
    record = deployment.annotate(round_record(reports[0], state.adapter, 1.0))
    digest = identity(str(tuned))["base"]
    assert record.network["bases"] == {"ben": {"quantize": "bfloat16", "weights": digest}}


@pytest.mark.parametrize(
    ("node", "problem"),
    [
        (
            {"data": "x", "name": "ana", "rank": 4, "quantize": "int7"},
            "quantize='int7' is none of none, bfloat16, int8",
        ),
        ({"partition-id": 0, "num-partitions": 1, "quantize": "int8"}, "quantize is for a node with data of its own"),
    ],
)
def test_a_nodes_storage_is_one_that_there_is_and_stands_in_the_records(node: dict[str, Any], problem: str):
    with pytest.raises(HetLoraError, match=problem):
        NodeConfig.read(node)


@pytest.mark.parametrize("flower", [{}, {"flower": {"clients": "config"}}])
def test_bases_differ_between_machines_alone(flower: dict[str, Any]):
    document = own_data(federation={"same_weights": False}) | flower
    with pytest.raises(ConfigError, match=r"federation\.same_weights = false is for nodes with data of their own"):
        parse_config({key: value for key, value in document.items() if flower or key != "flower"})


def test_clients_come_and_go_between_rounds(tmp_path: Path):
    deployment, grid, display = deployed(hosting(own(tmp_path, "ana")), hosting(own(tmp_path, "ben")))
    assert {client.name for client in deployment.cohort(0)} == {"ana", "ben"}
    del grid.handlers[2]
    grid.handlers[3] = hosting(own(tmp_path, "cleo"))
    assert {client.name for client in deployment.cohort(1)} == {"ana", "cleo"}
    assert any("'ben'" in line and "went away" in line for line in display.said)
    assert any("'cleo'" in line and "is there" in line for line in display.said)


def test_too_few_clients_are_waited_for_so_long_and_no_longer(tmp_path: Path):
    deployment, _, _ = deployed(hosting(own(tmp_path, "ana")), clock=VirtualClock(), wait=3.0)
    deployment.network.registry.patience = 60.0
    with pytest.raises(
        HetLoraError, match=r"waited 3 s for 1 more client: here is ana \(rank 4, 3. rows\); start more"
    ):
        deployment.cohort(0)


def test_while_clients_are_missing_a_line_a_minute_says_who_is_there_and_who_was_refused(tmp_path: Path):
    clock = VirtualClock()
    deployment, grid, display = deployed(
        hosting(own(tmp_path, "ana")), hosting(own(tmp_path, "ben", 0)), clock=clock, wait=130.0, min_clients=3
    )
    grid.handlers[3] = hosting(own(tmp_path, "cleo"))
    clock.later(70.0, lambda: grid.handlers.pop(3))
    with pytest.raises(HetLoraError, match="waited 130 s for 2 more clients"):
        deployment.cohort(0)
    first, second, third = [line for line in display.said if line.startswith("waiting for ")]
    assert re.fullmatch(
        r"waiting for 1 more client: here are ana \(rank 4, 3. rows\), cleo \(rank 4, 3. rows\); "
        r"refused was node 2 \(.*ben\.jsonl.* holds no rows.*\)",
        first,
    )
    assert second == first
    assert re.match(
        r"waiting for 2 more clients: here is ana .*; gone is cleo \(last seen ..:..:.. UTC\); refused", third
    )


def test_a_client_without_a_held_out_row_trains_and_is_not_measured(tmp_path: Path):
    deployment, grid, _ = deployed(hosting(own(tmp_path, "ana")), hosting(own(tmp_path, "ben", 1)))
    state, [report, _] = rounds(deployment)
    assert sorted(client.client for client in report.clients) == ["ana", "ben"]
    assert list(deployment.measure(state).clients) == ["ana"]
    assert len(grid.sent("evaluate")) == 1


def test_a_round_says_once_a_minute_who_has_not_answered(tmp_path: Path):
    clock = VirtualClock()
    silent = hosting(own(tmp_path, "ben"))
    deployment, grid, display = deployed(hosting(own(tmp_path, "ana")), silent, clock=clock, deadline=150.0)
    cohort = deployment.cohort(0)
    grid.handlers[2] = lambda _: None
    tasks = [deployment.method.distribute(deployment.first_state(), client) for client in cohort]
    answers = list(deployment.engine.train(tasks, deployment.method))
    assert {type(answer).__name__ for answer in answers} == {"ClientUpdate", "ClientFailure"}
    said = [line for line in display.said if "no answer yet" in line]
    assert [line.partition(", after ")[0] for line in said] == ["round 1: no answer yet from ben"] * 2


@pytest.mark.parametrize(
    ("settings", "clients", "said"),
    [
        ({"partition-id": 0, "num-partitions": 1}, "nodes", "this run takes clients with rows of their own"),
        ({"data": "stdlib", "name": "ana", "rank": 4}, "config", "start this node with partition-id=I"),
    ],
)
def test_a_node_of_the_other_kind_is_refused_and_not_waited_for(settings: dict[str, Any], clients: str, said: str):
    document = own_data()
    document["data"] |= {"clients": 1}
    document["federation"] |= {"clients_per_round": 1}
    document["flower"] |= {"clients": clients}
    terms = {"wire": WIRE, "config": parse_config(document).model_dump_json(), "identity": identity("nano", None)}
    answer = local.answer(Envelope("hello", terms), NodeConfig.read(settings), keeps=False)
    assert answer.kind == "refused"
    assert said in answer.value["reason"]


def test_two_nodes_cannot_speak_for_one_client(tmp_path: Path):
    deployment, grid, display = deployed(hosting(own(tmp_path, "ana")), hosting(own(tmp_path, "ana")), min_clients=1)
    assert [client.name for client in deployment.cohort(0)] == ["ana"]
    assert any("another node speaks for client 'ana' already" in line for line in display.said)
    [notice] = grid.sent("refused")
    assert "another node speaks for client 'ana' already" in notice.value["reason"], "its own log says it, too"


def test_a_client_that_the_server_refuses_reads_why_in_its_own_log(capfd: pytest.CaptureFixture[str]):
    transport = Transport(FakeGrid({1: by_flower({"data": "rows.jsonl", "name": "ana", "rank": 4})}))
    reply = transport.poll(transport.send(Envelope("refused", {"reason": "a name\nthat is taken"}), 1, 60.0))
    assert reply == Envelope("noted")
    assert "hetlora: the server refused this client: a name\\nthat is taken\n" in capfd.readouterr().err


def test_an_error_that_was_explained_has_no_traceback_in_flowers_log():
    from hetlora.flower.server_app import _without_traceback

    def record(error: BaseException) -> logging.LogRecord:
        return logging.LogRecord("flwr", logging.ERROR, "", 0, "", (), (type(error), error, None))

    assert not _without_traceback(record(HetLoraError("waited 600 s")))
    assert _without_traceback(record(KeyError("a bug")))


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"keeps": True},
        {"keeps": 1, "share": [0, 1]},
        {"keeps": True, "share": [2, 2]},
        {"keeps": True, "share": [0.0, 1]},
        {"keeps": True, "share": "01"},
        {"keeps": True, "name": "", "rank": 1, "train": 1, "test": 1},
        {"keeps": True, "name": "a\x1b[2J", "rank": 1, "train": 1, "test": 1},
        {"keeps": True, "name": "x" * 1000, "rank": 1, "train": 1, "test": 1},
        {"keeps": True, "name": "eve", "rank": 0, "train": 1, "test": 1},
        {"keeps": True, "name": "eve", "rank": True, "train": 1, "test": 1},
        {"keeps": True, "name": "eve", "rank": 1, "train": 10**13, "test": 1},
        {"keeps": True, "name": "eve", "rank": 1, "train": 1, "test": -1},
    ],
)
def test_an_announcement_that_makes_no_sense_is_refused(value: dict[str, Any], tmp_path: Path):
    deployment, _, display = deployed(
        hosting(own(tmp_path, "ana")), lambda m: replied(m, Envelope("hello", value)), min_clients=1
    )
    deployment.cohort(0)
    deployment.cohort(1)
    assert list(deployment.network.registry.nodes) == [1]
    assert sum("node 2 was refused" in line for line in display.said) == 1, "once, though it is asked again"


def test_a_server_that_names_a_folder_of_its_own_opens_none_here(tmp_path: Path):
    from hetlora.flower.client_runtime import ClientRuntime

    settings = parse_config({**RUN, "model": {"base": str(tmp_path)}})
    with pytest.raises(ConfigError, match="is a folder of the server's; add base="):
        ClientRuntime(settings, NodeConfig.read(own(tmp_path, "ana")))


def test_an_error_that_nobody_foresaw_tells_the_server_its_kind_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def broken(*_: Any, **__: Any) -> Any:
        raise KeyError("what ana wrote in a row")

    monkeypatch.setattr(local, "_answered", broken)
    envelope = local.answer(Envelope("train", {}), NodeConfig.read(own(tmp_path, "ana")), keeps=False)
    assert envelope.kind == "refused"
    assert envelope.value == {"reason": "KeyError; the client's own log has its text"}
    assert "what ana wrote in a row" in capsys.readouterr().err


def test_a_client_of_another_version_of_the_wire_is_told(tmp_path: Path):
    deployment, _, display = deployed(hosting(own(tmp_path, "ana")), clock=VirtualClock(), min_clients=1, wait=2.0)
    deployment.network.registry.hello.value["wire"] = "0"  # type: ignore[index]
    assert deployment.config.flower.wait < 5
    with pytest.raises(HetLoraError, match="version '0' of the wire format"):
        deployment.cohort(0)
    assert any("version '0' of the wire format" in line for line in display.said)


def test_scores_are_read_with_suspicion(tmp_path: Path):
    honest = hosting(own(tmp_path, "ana", 30))
    for value in (
        {"nll": 0.0, "tokens": 10**15},
        {"nll": 1.0, "tokens": 0},
        {"nll": 1e7, "tokens": 3},
        {"nll": "x" * 10**6, "tokens": 3},
        {"nll": "much", "tokens": 3},
        {"nll": -1.0, "tokens": 3},
        {"nll": 1.0, "tokens": -3},
        {"nll": 1e13, "tokens": 1},
        {},
    ):

        def lie(message: Message, value: Any = value) -> Message:
            if message.metadata.message_type == "evaluate":
                return replied(message, Envelope("evaluate", value))
            return honest(message)

        deployment, _, display = deployed(lie, min_clients=1)
        assert deployment.measure(None).clients == {}
        assert any("was not measured" in line for line in display.said)


def test_an_update_is_what_the_client_packed():
    grid = FakeGrid(shares(1))
    settings = parse_config({**RUN, "federation": {"rounds": 1, "clients_per_round": 2}})
    hosted = HostedExperiment(settings, QuietDisplay(), Transport(grid))
    _, [report] = rounds(hosted)
    [answer] = [from_record_dict(a.content) for a in grid.answers if a.metadata.message_type == "train"]
    state = hosted.first_state()
    for entry, blob, client in zip(answer.value["answers"], answer.blobs, report.clients, strict=True):
        task = hosted.method.distribute(state, hosted.clients.named(entry["client"]))
        update = parse_update(blob, task)
        assert (update.client, update.loss) == (client.client, client.loss)


# What hostile reading found -----------------------------------------------------------------------------------------


def test_what_a_client_says_can_be_written_down_and_forges_no_log(tmp_path: Path):
    def odd(envelope: Envelope, message: Message) -> Message:
        answers = [
            {"client": entry["client"], "failure": "\ud800\x1b[2J\nround 2: all fine"}
            for entry in envelope.value["answers"]
        ]
        return replied(message, Envelope("train", {"answers": answers}))

    settings = parse_config({**RUN, "federation": {"rounds": 1, "clients_per_round": 10}})
    nodes = {1: lying(odd), 2: hosting({"partition-id": 1, "num-partitions": 2})}
    hosted = HostedExperiment(settings, Saying(), Transport(FakeGrid(nodes)))
    state, [report] = rounds(hosted)
    record = hosted.annotate(round_record(report, state.adapter, 1.0))
    Records(tmp_path / "records.jsonl").append(record)
    assert set(record.failures.values()) == {r"\ud800\x1b[2J\nround 2: all fine"}
    assert all(line.isprintable() for line in hosted.display.said)


def test_what_is_refused_does_not_end_a_round_early():
    federation, flower = {"rounds": 1, "clients_per_round": 10}, {"deadline": 600.0, "wait": 600.0, "answers": 5}
    settings = parse_config({**RUN, "federation": federation, "flower": flower})
    nodes = {1: lying(not_finite), 2: hosting({"partition-id": 1, "num-partitions": 2})}
    _, [report] = rounds(HostedExperiment(settings, QuietDisplay(), Transport(FakeGrid(nodes))))
    assert len(report.clients) == 5
    assert all("infinity or NaN" in failure.reason for failure in report.failures)


def test_an_answer_that_is_announced_and_not_delivered_holds_nobody_else_up(monkeypatch: pytest.MonkeyPatch):
    from hetlora.flower import engine

    monkeypatch.setattr(engine, "PATIENCE", 0.2)
    answered, held, given_up = threading.Event(), threading.Event(), []

    def stalls(_: Envelope, __: Message) -> None:
        if not held.wait(HANGS):
            given_up.append("it was waited for")

    class SinceAnswered(Clock):
        """However long the others take, time passes when they have answered."""

        seconds = 0.0

        def now(self) -> float:
            return self.seconds

        def sleep(self, seconds: float) -> None:
            super().sleep(0.01)
            self.seconds += seconds * answered.is_set()

    honest = hosting({"partition-id": 1, "num-partitions": 2})

    def answers(message: Message) -> Any:
        answer = honest(message)
        if message.metadata.message_type == "train":
            answered.set()
        return answer

    settings = parse_config(
        {**RUN, "federation": {"rounds": 1, "clients_per_round": 10}, "flower": {"deadline": 6.0, "wait": 600.0}}
    )
    nodes = {1: lying(stalls), 2: answers}
    try:
        _, [report] = rounds(
            HostedExperiment(settings, QuietDisplay(), Transport(FakeGrid(nodes), clock=SinceAnswered()))
        )
    finally:
        held.set()
    assert not given_up
    assert len(report.clients) == 5
    assert {failure.reason for failure in report.failures} == {"no answer within 6 s"}


def test_answers_that_come_too_late_are_thrown_away_and_not_kept(tmp_path: Path):
    late = {"train": True}
    honest = hosting(own(tmp_path, "ana"))

    def slow(message: Message) -> Any:
        return None if late.get(message.metadata.message_type) else honest(message)

    # Time that passes only where somebody waits: a look for an answer lasts as long as the work behind it.
    deployment, _, _ = deployed(slow, clock=VirtualClock(), min_clients=1, deadline=1.0)
    task = deployment.method.distribute(deployment.first_state(), deployment.cohort(0)[0])
    [failure] = list(deployment.engine.train([task], deployment.method))
    assert failure.reason == "no answer within 1 s"
    transport = deployment.network.transport
    assert len(transport._left) == 1
    transport.discard_late()
    assert len(transport._left) == 1, "it has not come yet"
    late.clear()
    transport.discard_late()
    assert not transport._left


def test_more_examples_than_were_announced_are_refused(tmp_path: Path):
    from dataclasses import replace

    honest = hosting(own(tmp_path, "ana", 40))
    deployment, _, _ = deployed(honest, min_clients=1)
    task = deployment.method.distribute(deployment.first_state(), deployment.cohort(0)[0])
    node = deployment.network.registry.clients()["ana"]
    [update] = list(deployment.engine.train([task], deployment.method))
    assert update.examples == node.client.train
    for examples, refused in ((node.client.train, False), (node.client.train + 1, True), (10**12, True)):
        blob = pack_update(replace(update, examples=examples), task).data
        answer = deployment.engine._update(task, blob, node, AdmissionRule())
        assert isinstance(answer, ClientFailure) == refused
        assert not refused or f"{examples} examples, where its node announced" in answer.reason


def test_a_node_that_affords_less_than_before_is_asked_anew(tmp_path: Path):
    rank = {"now": 8}

    def changing(message: Message) -> Message:
        return hosting(own(tmp_path, "ana", rank=rank["now"]))(message)

    deployment, _, display = deployed(changing, min_clients=1)
    assert deployment.cohort(0)[0].rank == 8
    rank["now"] = 2
    state = deployment.first_state()
    state, report = run_round(state, deployment.method, deployment.engine, deployment.cohort(0))
    assert "rank 8 was sent, and this client affords 2" in report.failures[0].reason
    deployment.annotate(round_record(report, state.adapter, 1.0))
    state, report = run_round(state, deployment.method, deployment.engine, deployment.cohort(1))
    assert report.ranks == {"ana": 2}
    assert not report.failures
    assert sum("is there" in line for line in display.said) == 2


def test_another_key_cannot_take_a_name_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    deployment, grid, display = deployed(hosting(own(tmp_path, "ana")), clock=VirtualClock(), min_clients=1, wait=1.0)
    keys = {1: b"hers", 2: b"another"}
    monkeypatch.setattr(
        deployment.network.transport, "nodes", lambda _: {number: keys[number] for number in grid.handlers}
    )
    deployment.cohort(0)
    grid.handlers = {2: grid.handlers[1]}
    with pytest.raises(HetLoraError, match="client 'ana' has another key"):
        deployment.cohort(1)
    assert any("has another key" in line for line in display.said)


@pytest.mark.parametrize("key", ["base", "tokenizer"])
def test_no_folder_that_a_server_names_is_opened(key: str, tmp_path: Path):
    from hetlora.flower.client_runtime import ClientRuntime

    model = {"base": "nano", key: str(tmp_path)}
    with pytest.raises(ConfigError, match="is a folder of the server's; add base="):
        ClientRuntime(parse_config({**RUN, "model": model}), NodeConfig.read(own(tmp_path, "ana")))


def test_a_base_that_cannot_be_the_servers_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local, "load_fitting_model", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ConfigError, match=r"the base here .* is not the server's"):
        local.ClientRuntime(
            config(model={"base": "nano"}), NodeConfig.read(own(tmp_path, "ana")), identity={"base": "00"}
        )


def test_a_host_of_the_configurations_clients_affords_what_its_own_base_leaves(tiny: str):
    node = {"partition-id": 0, "num-partitions": 1, "base": tiny, "device": "cpu", "memory": 2000.0}
    here = local.ClientRuntime(config(model={"base": "/folder/of/the/server"}), NodeConfig.read(node))
    assert here.rank == 8


def test_rows_that_their_owner_changes_are_read_anew(tmp_path: Path):
    node = hosting(own(tmp_path, "ana", 40))
    first, _, _ = deployed(node, min_clients=1)
    before = first.cohort(0)[0].examples
    own(tmp_path, "ana", 20)
    second, _, _ = deployed(node, min_clients=1)
    assert second.cohort(0)[0].examples < before


def test_one_base_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local, "SESSIONS", 1)
    for name in ("ana", "ben"):
        deployment, _, _ = deployed(hosting(own(tmp_path, name)), min_clients=1)
        deployment.cohort(0)
        assert len(local._sessions) == 1


@pytest.mark.parametrize("seed", [0, 1])
def test_two_runs_on_a_node_keep_what_rounding_owes_each(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also two of the same configuration."""
    forget = many_loaded(monkeypatch)
    monkeypatch.setattr(local, "SESSIONS", 1)
    node = hosting(own(tmp_path, "ana"))

    def state_after(*, with_another: bool) -> ServerState:
        forget()
        runs = [deployed(node, min_clients=1, precision="int8")[0] for _ in range(1 + with_another)]
        runs[-1].config = runs[-1].config.model_copy(update={"seed": seed}) if with_another else runs[-1].config
        for run in runs:
            run.network.terms["config"] = run.config.model_dump_json()
        states = [run.first_state() for run in runs]
        for number in range(3):
            for place, run in enumerate(runs):
                states[place], _ = run_round(states[place], run.method, run.engine, run.cohort(number))
        return states[0]

    assert_same(state_after(with_another=True), state_after(with_another=False))


def test_messages_that_cannot_be_sent_share_one_deadline(tmp_path: Path):
    class Overloaded(FakeGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            sent = list(messages)
            if sent[0].metadata.message_type == "evaluate":
                request = httpx.Request("POST", "https://superlink/v1/runtime/push-messages")
                raise httpx.HTTPStatusError("locked", request=request, response=httpx.Response(500, request=request))
            return super().push_messages(sent)

    clock = VirtualClock()
    deployment, grid, display = deployed(
        hosting(own(tmp_path, "ana")), hosting(own(tmp_path, "ben")), clock=clock, deadline=50.0
    )
    deployment.network.transport.grid = Overloaded(grid.handlers)
    deployment.cohort(0)
    began = clock.now()
    assert deployment.measure(None).clients == {}
    assert clock.now() - began <= 51.0
    assert sum("was not measured: the message could not be sent" in line for line in display.said) == 2


def test_a_refusal_names_both_versions_where_they_differ(tmp_path: Path):
    deployment, _, _ = deployed(hosting(own(tmp_path, "ana")), clock=VirtualClock(), min_clients=1, wait=2.0)
    deployment.network.registry.hello.value["hetlora"] = "9.9"  # type: ignore[index]
    changed = json.loads(deployment.network.registry.hello.value["config"]) | {"newer_key": 1}
    deployment.network.registry.hello.value["config"] = json.dumps(changed)  # type: ignore[index]
    with pytest.raises(
        HetLoraError, match=rf"newer_key.* \(hetlora {re.escape(__version__)} here, 9\.9 on the server\)"
    ):
        deployment.cohort(0)


@pytest.mark.parametrize(
    "value", [{"clients": 3}, {"clients": []}, {"clients": [["x"]]}, {"clients": ["ana"], "precision": "float1"}, {}]
)
def test_whatever_a_server_sends_the_answer_is_one(value: dict[str, Any], tmp_path: Path):
    deployment, _, _ = deployed(hosting(own(tmp_path, "ana")), min_clients=1)
    deployment.cohort(0)
    asked = deployment.network.transport.send(Envelope("train", {**deployment.network.terms, **value}, [b"x"]), 1, 10.0)
    answer = deployment.network.transport.poll(asked)
    assert isinstance(answer, DeliveryFailure)


def test_a_score_that_is_no_number_is_an_answer_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from hetlora.training.evaluation import Score

    monkeypatch.setattr(local, "client_scores", lambda *_, **__: {local.ONE: Score(float("nan"), 3)})
    deployment, _, display = deployed(hosting(own(tmp_path, "ana")), min_clients=1)
    assert deployment.measure(None).clients == {}
    assert any("was not measured: a score of nll = None" in line for line in display.said)


def test_a_deployment_equals_the_simulation_of_the_same_rows(tmp_path: Path):
    nodes = [hosting(own(tmp_path, name, 30 + 10 * index)) for index, name in enumerate(("ana", "ben", "cleo"))]
    document = own_data(federation={"rounds": 3, "clients_per_round": 3}, ranks={"kind": "same", "rank": 4})
    over = parse_config(document)
    state, reports = rounds(RemoteExperiment(over, QuietDisplay(), Transport(FakeGrid(dict(enumerate(nodes, 1))))))

    with (tmp_path / "joined.jsonl").open("w") as joined:
        for name in ("ana", "ben", "cleo"):
            for line in (tmp_path / f"{name}.jsonl").read_text().splitlines():
                joined.write(json.dumps({**json.loads(line), "who": name}) + "\n")
    data = {**document["data"], "path": str(tmp_path / "joined.jsonl"), "client_field": "who"}
    expected, theirs = one_by_one(parse_config({**document, "data": data, "flower": RUN["flower"]}))
    assert_same(state, expected)
    assert [report.clients for report in reports] == [report.clients for report in theirs]


class StopsAfter(Saying):
    """Ends a run as Ctrl-C does, after some rounds."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self.left = rounds

    def round_ended(self, _: Any) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_what_machines_of_their_own_have_learned_is_taken_away_without_their_rows(tmp_path: Path):
    nodes = {1: hosting(own(tmp_path, "ana", 30)), 2: hosting(own(tmp_path, "ben", 40, rank=2))}
    document = own_data(federation={"rounds": 2, "clients_per_round": 2}, ranks={"kind": "same", "rank": 4})
    settings = parse_config({**document, "output": str(tmp_path / "runs")})
    result = start_run(settings, QuietDisplay(), Transport(FakeGrid(nodes)))
    folder = result.records.parent
    assert result.ranks == {"ana": 4, "ben": 2}
    wanted = {"client": "ben"}, {"rank": 2}, {"tier": "2"}
    for part in wanted:
        adapter = read_adapter(export_run(folder, check=False, **part).folder).adapter
        for module, pair in truncate(result.state.adapter, 2).items():
            assert torch.equal(adapter[module].A, pair.A)
            assert torch.equal(adapter[module].B, pair.B)
    weights = (export_run(folder, check=False).folder / "adapter_model.safetensors").read_bytes()
    assert result.adapter is not None
    assert weights == (result.adapter / "adapter_model.safetensors").read_bytes()
    with pytest.raises(HetLoraError, match="no client 'eve' in this run; there are 'ana', 'ben'"):
        export_run(folder, client="eve")
    with pytest.raises(HetLoraError, match="held-out rows of this run are its clients' own"):
        export_run(folder, scores=True)


def test_an_operator_sees_one_object_a_round_also_while_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    nodes = {1: hosting(own(tmp_path, "ana", 30)), 2: hosting(own(tmp_path, "ben")), 3: hosting({"data": "x"})}
    document = own_data(federation={"rounds": 2, "clients_per_round": 2}, ranks={"kind": "same", "rank": 4})
    settings = parse_config({**document, "output": str(tmp_path / "runs")})
    result = start_run(settings, QuietDisplay(), Transport(FakeGrid(nodes)))
    records = result.records.read_text()
    result.records.write_text(records + '{"round": 3, "los')
    capsys.readouterr()
    assert main(["flower", "health", str(result.records.parent)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["round"] for line in lines] == [1, 2]
    kept = [json.loads(line) for line in records.splitlines()]
    first = next(record for record in kept if record["kind"] == "round")
    assert {key: lines[0][key] for key in ("nodes", "refused", "asked", "answers", "failures")} == {
        "nodes": 2, "refused": 1, "asked": 2, "answers": 2, "failures": 0,
    }  # fmt: skip
    assert (lines[0]["bytes_up"], lines[0]["seconds"]) == (first["network"]["bytes_up"], first["seconds"])
    assert lines[0]["memory"] is None or lines[0]["memory"] > 100
    result.records.write_text(records.replace('"network"', '"net"'))
    assert main(["flower", "health", str(result.records.parent)]) == 2
    assert "is a run in one process, which has no nodes" in capsys.readouterr().err
    assert main(["flower", "health", str(tmp_path)]) == 2
    assert "holds no records.jsonl" in capsys.readouterr().err


def test_a_deployment_that_was_stopped_goes_on_to_the_same_adapter(tmp_path: Path):
    nodes = {1: hosting(own(tmp_path, "ana", 30)), 2: hosting(own(tmp_path, "ben", 40))}
    document = own_data(federation={"rounds": 4, "clients_per_round": 2}, ranks={"kind": "same", "rank": 4})

    def settings(name: str) -> RunConfig:
        return parse_config({**document, "name": name, "output": str(tmp_path / "runs")})

    whole = start_run(settings("whole"), QuietDisplay(), Transport(FakeGrid(nodes)))
    stopped = start_run(settings("stopped"), StopsAfter(2), Transport(FakeGrid(nodes)))
    assert (stopped.interrupted, stopped.rounds) == (True, 2)
    again = resume_run(tmp_path / "runs" / "stopped", QuietDisplay(), Transport(FakeGrid(nodes)))
    assert (again.rounds, again.updates, again.prunes) == (whole.rounds, whole.updates, whole.prunes)
    assert_same(again.state, whole.state)
    files = [result.adapter / "adapter_model.safetensors" for result in (whole, again)]  # type: ignore[operator]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert whole.final is not None
    assert again.final is not None
    assert again.final.summary() == whole.final.summary()
    assert again.base.summary() == whole.base.summary()
    records = read_records(again.records)
    assert [record["kind"] for record in records] == [record["kind"] for record in read_records(whole.records)]
    assert all(
        record["network"]["last_seen"].keys() == {"ana", "ben"} for record in records if record["kind"] == "round"
    )
