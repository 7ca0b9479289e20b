"""Messages over Flower's grid: one array each, bounded answers, and a SuperLink that answers with errors."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs hetlora[flower]")

import httpx
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.superlink.grid.http_grid import HttpGrid

from hetlora.errors import HetLoraError, WireError
from hetlora.flower import transport as transport_module
from hetlora.flower.answer_limit import answer_limit
from hetlora.flower.envelope import (
    MOST_CLIENTS,
    MOST_REASON,
    Envelope,
    join_parts,
    most_answer_text,
    quoted,
    split_parts,
)
from hetlora.flower.flwr_messages import STYPE_2, adapters_size, from_record_dict, to_record_dict
from hetlora.flower.transport import DeliveryFailure, Transport
from proofs.grid import LocalGrid, VirtualClock


def objects(envelope: Envelope) -> int:
    """Return how many objects Flower stores and fetches one by one."""
    return len(get_all_nested_objects(to_record_dict(envelope)))


def test_a_message_of_a_thousand_clients_has_as_many_objects_as_one_of_one():
    blobs = [number.to_bytes(8, "little") * 100 for number in range(1000)]
    assert objects(Envelope("train", {}, blobs)) == objects(Envelope("train", {}, blobs[:1])) <= 5
    assert from_record_dict(to_record_dict(Envelope("train", {"a": 1}, blobs))).blobs == blobs


def test_version_2_is_read_and_written_with_an_array_a_client():
    envelope = Envelope("train", {"wire": "2"}, [b"ab", b"", b"c"])
    old = to_record_dict(envelope, "2")
    assert {name: array.data for name, array in old["adapters"].items()} == {  # type: ignore[union-attr]
        "000000": b"ab", "000001": b"", "000002": b"c",
    }  # fmt: skip
    assert {array.stype for array in old["adapters"].values()} == {"hetlora.flower.wire.codec"}  # type: ignore[union-attr]
    assert from_record_dict(old) == envelope


def test_a_text_alone_has_the_form_of_both_versions_and_no_object_that_another_node_could_guess():
    hello = Envelope("hello", {"wire": "3"})
    one, other = to_record_dict(hello), to_record_dict(hello, "2")
    assert from_record_dict(one) == from_record_dict(other) == hello
    assert one["adapters"].object_id == other["adapters"].object_id
    assert one["text"].object_id != other["text"].object_id
    blobs = Envelope("train", {}, [b"ab"])
    assert to_record_dict(blobs)["adapters"].object_id != to_record_dict(blobs)["adapters"].object_id


@pytest.mark.parametrize(
    "data",
    [b"", b"\x01", (2**40).to_bytes(8, "little"), join_parts([b"ab"]) + b"x", join_parts([b"ab"])[:-1], b"\xff" * 64],
)
def test_bytes_that_are_no_parts_are_refused(data: bytes):
    with pytest.raises(WireError):
        split_parts(data, 10)


def test_more_parts_than_may_be_are_refused_before_their_lengths_are_read():
    with pytest.raises(WireError, match="not up to 3 parts"):
        split_parts(join_parts([b""] * 4), 3)
    with pytest.raises(WireError, match=f"not up to {MOST_CLIENTS + 1} parts"):
        from_record_dict(to_record_dict(Envelope("train", {}, [b""] * (MOST_CLIENTS + 1))))


def test_too_many_arrays_and_arrays_of_both_versions_are_refused():
    def content(arrays: dict[str, Array]) -> RecordDict:
        text = ConfigRecord({"json": Envelope("train", {}).text()})
        return RecordDict({"text": text, "adapters": ArrayRecord(arrays)})

    one = Array(dtype="uint8", shape=(1,), stype=STYPE_2, data=b"x")
    with pytest.raises(WireError, match="too many"):
        from_record_dict(content({f"{index:06d}": one for index in range(MOST_CLIENTS + 1)}))
    joined = to_record_dict(Envelope("train", {}, [b"y"]))["adapters"]["000000"]  # type: ignore[index]
    with pytest.raises(WireError, match="its arrays are not"):
        from_record_dict(content({"000000": joined, "000001": one}))


class OneNode(LocalGrid):
    """A grid with a node that answers at once; its SuperLink may answer with errors.

    Args:
        answer: What the node answers.
        errors: Calls that end with HTTP 500, one after another.
        unstored: Messages of which the SuperLink does not store an object.
    """

    def __init__(self, answer: Envelope, errors: int = 0, unstored: int = 0) -> None:
        super().__init__()
        self.answer, self.errors, self.unstored = answer, errors, unstored
        self.pushed: list[Message] = []

    def _may_fail(self) -> None:
        if self.errors:
            self.errors -= 1
            request = httpx.Request("POST", "https://superlink/v1/runtime/x")
            raise httpx.HTTPStatusError("locked", request=request, response=httpx.Response(500, request=request))

    def get_node_ids(self) -> Iterable[int]:
        raise NotImplementedError

    def get_nodes(self) -> Any:
        self._may_fail()
        return []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self.pushed += messages
        self._may_fail()
        if self.unstored:
            self.unstored -= 1
            raise ObjectPushError("f" * 64, 1, "session")
        return [self.named(self.pushed[-1])]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:  # noqa: ARG002
        self._may_fail()
        return [Message(to_record_dict(self.answer), reply_to=self.pushed[-1])]


def answered(answer: Envelope, **sent: Any) -> Envelope | DeliveryFailure | None:
    transport = Transport(OneNode(answer), clock=VirtualClock())
    name = transport.send(Envelope("train", {}), 7, 60.0, **sent)
    assert isinstance(name, str)
    return transport.poll(name)


def test_an_answer_of_the_largest_honest_size_is_taken_and_one_byte_more_is_not():
    empty = to_record_dict(Envelope("train", {"reason": ""}))["text"]["json"]
    reason = "x" * (most_answer_text(["ana"]) - len(str(empty)))
    honest = Envelope("train", {"reason": reason}, [b"12345678"])
    assert answered(honest, clients=["ana"], adapters=adapters_size([8])) == honest
    longer = answered(Envelope("train", {"reason": reason + "x"}), clients=["ana"])
    assert longer == DeliveryFailure(f"a text of {most_answer_text(['ana']) + 1} bytes is over the limit of "
                                     f"{most_answer_text(['ana'])}")  # fmt: skip
    assert answered(honest, clients=["ana"], adapters=47) == DeliveryFailure(
        "adapters of 48 bytes, where 47 is the most"
    )


def test_seven_megabytes_of_a_reason_are_no_reason():
    found = answered(Envelope("refused", {"reason": "x" * 7_000_000}), clients=["ana"])
    assert isinstance(found, DeliveryFailure)
    assert "over the limit of" in found.reason


def test_a_message_says_how_large_its_answer_may_be():
    grid = OneNode(Envelope("noted"))
    Transport(grid).send(Envelope("train", {}), 7, 60.0, clients=["ana"], adapters=1000)
    assert answer_limit(grid.pushed[0].metadata.group_id) == most_answer_text(["ana"]) + 1000


def in_trouble(errors: int) -> tuple[Transport, OneNode, VirtualClock, list[str]]:
    said: list[str] = []
    grid, clock = OneNode(Envelope("train", {}), errors), VirtualClock()
    return Transport(grid, clock=clock, say=said.append), grid, clock, said


def test_a_superlink_that_answers_with_errors_is_asked_again_with_growing_pauses():
    transport, grid, clock, said = in_trouble(3)
    assert transport.nodes(60.0) == {}
    assert clock.now() == 1 + 2 + 4
    assert said == [
        "the SuperLink answers HTTP 500 to /v1/runtime/x; it is asked again", "the SuperLink answers again, after 7 s",
    ]  # fmt: skip
    grid.errors = 2
    assert isinstance(transport.send(Envelope("train", {}), 7, 60.0), str)
    assert grid.pushed == [grid.pushed[0]] * 3, "the same message, which a SuperLink that has it keeps once"
    assert clock.now() == 7 + 1 + 2


def test_an_answer_is_pulled_again_after_errors_and_nobody_waits_for_it_meanwhile():
    transport, grid, clock, _ = in_trouble(0)
    name = transport.send(Envelope("train", {}), 7, 60.0)
    assert isinstance(name, str)
    grid.errors = 2
    assert transport.poll(name) is None
    assert transport.poll(name) is None, "within the pause it is not asked"
    assert grid.errors == 1
    clock.sleep(1.0)
    assert transport.poll(name) is None
    assert (grid.errors, clock.now()) == (0, 1.0)
    clock.sleep(2.0)
    assert transport.poll(name) == grid.answer


def test_errors_beyond_the_deadline_cost_the_message_and_the_list_of_nodes_ends_the_run():
    transport, _, clock, _ = in_trouble(10**6)
    failed = transport.send(Envelope("train", {}), 7, 60.0)
    assert failed == DeliveryFailure("the message could not be sent: the SuperLink answers HTTP 500 to /v1/runtime/x")
    assert clock.now() == 60.0
    with pytest.raises(
        HetLoraError, match="for 30 s the SuperLink has answered HTTP 500 to /v1/runtime/x only; its log says why"
    ):
        transport.nodes(30.0)


def test_a_message_whose_object_was_not_stored_is_sent_again():
    """Flower's SuperLink says so where its database was locked while it stored the object."""
    transport, grid, clock, said = in_trouble(0)
    grid.unstored = 2
    assert isinstance(transport.send(Envelope("train", {}), 7, 60.0), str)
    assert grid.pushed == [grid.pushed[0]] * 3
    assert clock.now() == 1 + 2
    assert said == [
        "the SuperLink answers that it has not stored an object of the message; it is asked again",
        "the SuperLink answers again, after 3 s",
    ]
    grid.unstored = 10**6
    assert transport.send(Envelope("train", {}), 7, 60.0) == DeliveryFailure(
        "the message could not be sent: the SuperLink answers that it has not stored an object of the message"
    )


def test_flowers_own_repetitions_end_where_a_superlink_is_gone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transport_module, "GIVES_UP", 0.3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # nobody listens
        grid = HttpGrid(f"127.0.0.1:{free.getsockname()[1]}", insecure=True, token="any")
        with pytest.raises(httpx.ConnectError):
            Transport(grid).nodes(3600.0)
    assert grid._retry_invoker.max_time == transport_module.GIVES_UP


def test_a_reason_of_the_widest_signs_fits_what_an_answer_may_say():
    entries = [{"client": name, "failure": quoted("\U0001f600" * 9000, MOST_REASON)} for name in ("ana", "ben")]
    answer = Envelope("train", {"answers": entries})
    assert len(entries[0]["failure"]) == MOST_REASON
    assert answered(answer, clients=["ana", "ben"]) == answer
    assert most_answer_text(["ana", "ben"]) - most_answer_text() > 2 * 12 * MOST_REASON


def test_a_refusal_of_the_superlink_is_no_error_that_passes():
    transport, grid, _, _ = in_trouble(0)

    def refuse() -> None:
        request = httpx.Request("POST", "https://superlink/v1/runtime/x")
        raise httpx.HTTPStatusError("no", request=request, response=httpx.Response(404, request=request))

    grid._may_fail = refuse  # type: ignore[method-assign]
    with pytest.raises(httpx.HTTPStatusError):
        transport.nodes(60.0)
