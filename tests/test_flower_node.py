"""Flower's client side: node settings, messages, and the worker process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetlora.errors import HetLoraError, WireError
from hetlora.flower.client_process import _folder, ask
from hetlora.flower.envelope import Envelope
from hetlora.flower.node_config import NodeConfig
from processes import has_ended, wait_until

pytestmark = pytest.mark.process

# Parcels ------------------------------------------------------------------------------------------------------------

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.text(), st.dictionaries(st.text(max_size=8), plain, max_size=3), st.lists(st.binary(), max_size=4))
def test_a_parcel_comes_back_as_it_was(kind: str, value: dict[str, Any], blobs: list[bytes]):
    envelope = Envelope(kind, value, blobs)
    assert Envelope.read(envelope.packed()) == envelope


@given(st.binary(max_size=200))
def test_bytes_that_are_no_parcel_are_a_wire_error(data: bytes):
    with pytest.raises(WireError):
        Envelope.read(data)


@given(st.data())
def test_every_truncation_and_every_changed_byte_is_a_parcel_or_a_wire_error(data: st.DataObject):
    packed = Envelope("train", {"clients": ["ana", "ben"]}, [b"one", b"twelve"]).packed()
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(WireError):
        Envelope.read(packed[:cut])
    changed = bytearray(packed)
    changed[cut] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(WireError):
        Envelope.read(bytes(changed))


@pytest.mark.parametrize(
    "text", ["", "17", "[]", '{"kind": 3, "value": {}}', '{"kind": "x"}', '{"kind": "x", "value": []}', "[" * 10**5]
)
def test_a_text_of_another_form_is_refused(text: str):
    with pytest.raises(WireError, match="no message of hetlora's"):
        Envelope.of(text, [])


# Settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({}, 'give data="FILE" name="NAME" rank=R, or partition-id=I num-partitions=N'),
        ({"data": "rows.jsonl", "rank": 4}, 'data needs name="..."'),
        ({"data": "rows.jsonl", "name": "ana"}, "either rank=R or memory=MEGABYTES"),
        ({"data": "rows.jsonl", "name": "ana", "rank": 4, "memory": 100.0}, "and not both"),
        ({"data": "rows.jsonl", "name": "ana", "rnk": 4}, "rnk is not a key; did you mean 'rank'?"),
        ({"data": 3, "name": "ana", "rank": 4}, "data=3 is no text"),
        ({"data": "rows.jsonl", "name": "ana", "rank": "4"}, "rank='4' is no whole number"),
        ({"data": "rows.jsonl", "name": "ana", "rank": 0}, "rank=0 is too small"),
        ({"data": "rows.jsonl", "name": "ana", "rank": True}, "rank=True is no whole number"),
        ({"partition-id": 2, "num-partitions": 2}, "partition-id=2 is not within 0 ... 1"),
        ({"partition-id": 0, "num-partitions": 1, "methods": "a.b,mypkg:fair"}, "'mypkg:fair' is no module"),
        ({"partition-id": -1, "num-partitions": 2}, "place=-1 is too small"),
    ],
)
def test_settings_that_make_no_sense_are_told_with_the_way_out(config: dict[str, Any], problem: str):
    with pytest.raises(HetLoraError) as error:
        NodeConfig.read(config)
    assert problem in str(error.value)


# The worker ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NodeConfig:
    monkeypatch.setenv("HETLORA_STATE", str(tmp_path / "s"))
    return NodeConfig(data=str(tmp_path / "rows.jsonl"), name="ana", rank=4, idle=20.0)


def pid_of(folder: Path) -> int:
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in entry.read_bytes().split(b"\0"):
                return int(entry.parent.name)
        except OSError:
            continue
    raise AssertionError("no worker runs")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at /proc")
def test_one_worker_answers_many_messages_and_is_started_again_after_its_death(settings: NodeConfig):
    hello = Envelope("hello", {"wire": "0"})
    first = ask(hello, settings, node=7)
    assert first.kind == "refused"
    assert "version '0' of the wire format" in first.value["reason"]
    worker = pid_of(_folder(settings, 7))
    assert ask(hello, settings, node=7) == first
    assert pid_of(_folder(settings, 7)) == worker, "it stays"
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: has_ended(worker))
    assert ask(hello, settings, node=7) == first
    another = pid_of(_folder(settings, 7))
    assert another != worker
    with socket.socket(socket.AF_UNIX) as visitor:
        visitor.connect(str(_folder(settings, 7) / "socket"))
        visitor.sendall(b"\xff" * 3)  # a process of Flower's that is killed while it sends
    assert ask(hello, settings, node=7) == first, "who hangs up costs nobody else"
    os.kill(another, signal.SIGKILL)


def test_a_folder_of_a_long_name_will_do(settings: NodeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HETLORA_STATE", str(tmp_path / ("long" * 50)))
    assert ask(Envelope("hello", {"wire": "0"}), settings, node=7).kind == "refused"
    os.kill(pid_of(_folder(settings, 7)), signal.SIGKILL)


def test_a_worker_that_has_nothing_to_do_ends(settings: NodeConfig):
    from dataclasses import replace

    brief = replace(settings, idle=0.5)
    ask(Envelope("hello", {"wire": "0"}), brief, node=8)
    place = _folder(brief, 8) / "socket"
    wait_until(lambda: not place.exists())


def test_a_folder_that_others_may_enter_is_not_used(settings: NodeConfig, tmp_path: Path):
    (tmp_path / "s").mkdir(mode=0o755)
    (tmp_path / "s").chmod(0o755)
    with pytest.raises(HetLoraError, match="is open to others"):
        ask(Envelope("hello", {}), settings, node=9)
