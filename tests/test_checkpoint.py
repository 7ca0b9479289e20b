"""Checkpoint files: they are read back bit for bit, and every other file is refused."""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import hetlora.runs.checkpoint
import hetlora.runs.folder
from drawn_examples import examples
from hetlora.core.adapter import LoraPair
from hetlora.core.persistent_map import updated
from hetlora.core.types import BaseDelta, ServerState
from hetlora.errors import CheckpointError, HetLoraError
from hetlora.runs.checkpoint import Checkpoint, differences, newest, read_checkpoint, write_checkpoint
from hetlora.runs.result import Measurement, RunTotals
from hetlora.training.evaluation import Answer, Score

MADE_BY = {"hetlora": "0.1.0", "torch": "2.6", "device": "cuda"}
START = len(b'{"__metadata__":{"sha256":"') + 8


def pair(rank: int, out: int, into: int, seed: int, dtype: torch.dtype = torch.float32) -> LoraPair:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, into, generator=generator)
    return LoraPair(A.to(dtype), torch.randn(out, rank, generator=generator).to(dtype))


def adapter_of(seed: int, rank: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, LoraPair]:
    """Modules in an order that is not the alphabet's."""
    return {"b.q_proj": pair(rank, 3, 2, seed, dtype), "a.v_proj": pair(rank, 1, 4, seed + 1, dtype)}


def measurement(figure: float = 1.5) -> Measurement:
    score = Score(nll=figure, tokens=7, rouge=0.1 + 0.2, generated=1)
    return Measurement({"ana": score, "bö/2": Score()}, {"2": score}, (Answer("ana", "a\n", "é", "\u2028", 0.25),))


def checkpoint(round_number: int = 3, records: int = 100, sha256: str = "", **changes: Any) -> Checkpoint:
    state = ServerState(
        adapter_of(0),
        round=round_number,
        ranks=updated({"ana": 1}, {"bö/2": {"b.q_proj": 1, "a.v_proj": 2}}),
        answered=updated({"ana": 0}, {"bö/2": 2}),
        folded=BaseDelta({"a.v_proj": torch.randn(1, 4), "b.q_proj": torch.randn(3, 2)}, {0: 40, 2: 50}),
        moments={"first": adapter_of(2), "second": adapter_of(3, dtype=torch.float64)},
        kept={"bö/2": adapter_of(4, rank=1), "ana": adapter_of(5, dtype=torch.bfloat16)},
        seed=2**62,
    )
    progress = RunTotals(replace(state, **changes), measurement(2.5), 1, 2, 3, 4, 5)
    config = {"name": "x", "federation": {"rounds": 5}, "model": {"tokenizer": None}, "ranks": {"tiers": [{"rank": 2}]}}
    return Checkpoint(
        progress, measurement(), records, sha256, 1.25, config, {"data.path": "ab", "model.base": None}, 1, MADE_BY
    )


def plain_state(state: ServerState) -> list[Any]:
    """All of a state in an order that shows the order of its mappings, its numbers as bytes."""

    def numbers(tensor: torch.Tensor) -> tuple[Any, ...]:
        return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()

    def plain(adapter: Any) -> list[Any]:
        return [(name, numbers(A), numbers(B)) for name, (A, B) in adapter.items()]

    return [
        plain(state.adapter),
        [(name, plain(adapter)) for name, adapter in state.moments.items()],
        [(name, plain(adapter)) for name, adapter in state.kept.items()],
        [(name, numbers(part)) for name, part in state.folded.delta.items()],
        dict(state.folded.sizes),
        dict(state.ranks),
        dict(state.answered),
        (state.round, state.seed),
    ]


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    assert plain_state(one.progress.state) == plain_state(other.progress.state)
    nothing = ServerState({})
    shown = [repr(replace(it, progress=replace(it.progress, state=nothing))) for it in (one, other)]
    assert shown[0] == shown[1], "repr, since not-a-number is not itself"


# What comes back ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path):
    written = checkpoint()
    path = write_checkpoint(written, tmp_path)
    assert path == tmp_path / "checkpoints" / "round-000003.safetensors"
    assert_same(read_checkpoint(path), written)


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
floats = st.floats(width=64)
scores = st.builds(Score, floats, st.integers(0, 2**40), floats, st.integers(0, 9))
measurements = st.builds(
    Measurement,
    st.dictionaries(names, scores, max_size=3),
    st.dictionaries(names, scores, max_size=2),
    st.lists(st.builds(Answer, names, names, names, names, floats), max_size=2).map(tuple),
)


@st.composite
def adapters(draw: st.DrawFn) -> dict[str, LoraPair]:
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    modules = draw(st.lists(names, unique=True, min_size=1, max_size=3))
    sizes = st.integers(1, 4)
    return {name: pair(draw(st.integers(0, 4)), draw(sizes), draw(sizes), draw(sizes), dtype) for name in modules}


@examples(60)
@given(
    adapter=adapters(),
    moments=st.dictionaries(names, adapters(), max_size=2),
    kept=st.dictionaries(names, adapters(), max_size=2),
    base=measurements,
    final=st.none() | measurements,
    ranks=st.dictionaries(names, st.integers(0, 99) | st.dictionaries(names, st.integers(0, 9)), max_size=3),
)
def test_any_state_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, adapter: Any, moments: Any, kept: Any, base: Any, final: Any, ranks: Any
):
    folder = tmp_path_factory.mktemp("run")
    written = checkpoint(adapter=adapter, moments=moments, kept=kept, ranks=ranks)
    written = replace(written, base=base, progress=replace(written.progress, final=final))
    assert_same(read_checkpoint(write_checkpoint(written, folder)), written)


def test_safetensors_itself_reads_the_tensors(tmp_path: Path):
    written = checkpoint()
    state = written.progress.state
    tensors = load_file(write_checkpoint(written, tmp_path))
    assert torch.equal(tensors["adapter.b.q_proj.A"], state.adapter["b.q_proj"].A)
    assert torch.equal(tensors["moments.1.a.v_proj.B"], state.moments["second"]["a.v_proj"].B)
    assert torch.equal(tensors["kept.1.b.q_proj.A"], state.kept["ana"]["b.q_proj"].A)
    assert torch.equal(tensors["folded.a.v_proj"], state.folded.delta["a.v_proj"])
    assert len(tensors) == 5 * 4 + 2


def test_factors_that_are_views_are_written_as_what_they_show(tmp_path: Path):
    wide = torch.arange(12.0).view(3, 4)
    odd = {"m": LoraPair(wide.T[:2], wide[:, ::2])}
    back = read_checkpoint(write_checkpoint(checkpoint(adapter=odd), tmp_path)).progress.state.adapter["m"]
    assert torch.equal(back.A, odd["m"].A)
    assert torch.equal(back.B, odd["m"].B)


def test_numbers_go_to_the_file_from_where_they_lie():
    tensor = torch.randn(5, 7)
    assert (
        torch.frombuffer(hetlora.runs.checkpoint._bytes_of(tensor), dtype=torch.uint8).data_ptr() == tensor.data_ptr()
    )


def test_a_type_that_no_checkpoint_holds_is_refused_by_name(tmp_path: Path):
    odd = {"m": LoraPair(torch.ones(1, 2, dtype=torch.complex64), torch.ones(2, 1))}
    with pytest.raises(CheckpointError, match=r"adapter\.m\.A is of torch\.complex64"):
        write_checkpoint(checkpoint(adapter=odd), tmp_path)


# Damage -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path: Path) -> tuple[Path, bytes]:
    """A small checkpoint and its bytes."""
    path = write_checkpoint(checkpoint(folded=BaseDelta(), moments={}, kept={}), tmp_path)
    return path, path.read_bytes()


def test_a_checkpoint_that_is_cut_off_or_has_more_is_refused(whole: tuple[Path, bytes]):
    path, data = whole
    lengths = {*range(0, len(data), 7), *range(12), *range(len(data) - 12, len(data))}
    for length in sorted(lengths):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    path.write_bytes(data)
    read_checkpoint(path)


def test_no_bit_changes_unnoticed(whole: tuple[Path, bytes]):
    path, data = whole
    chosen = random.Random(0).sample(range(8 * len(data)), 2000)
    for bit in chosen:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


def signed(data: bytes, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    """Return a checkpoint with another header, its SHA-256 set right: no accident, and yet to be refused."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header["__metadata__"]
    state = json.loads(metadata["state"])
    change(header, state)
    metadata["state"], metadata["sha256"] = json.dumps(state), "0" * 64
    encoded = json.dumps(header, separators=(",", ":")).encode()
    whole = len(encoded).to_bytes(8, "little") + encoded + data[8 + length :]
    return whole[:START] + hashlib.sha256(whole).hexdigest().encode() + whole[START + 64 :]


def test_what_the_tests_sign_is_taken(whole: tuple[Path, bytes]):
    path, data = whole
    path.write_bytes(signed(data, lambda _, state: state["answered"].update(eva=1)))
    assert read_checkpoint(path).progress.state.answered == {"ana": 0, "bö/2": 2, "eva": 1}


A = "adapter.b.q_proj.A"


def rename(header: dict[str, Any], new: str) -> None:
    """Call the tensor `A` otherwise, in its place."""
    items = [(new if name == A else name, entry) for name, entry in header.items()]
    header.clear()
    header.update(items)


FORGED: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "a field that is missing": lambda _, state: state.pop("ranks"),
    "a field too many": lambda _, state: state.update(more=1),
    "a rank that is text": lambda _, state: state["ranks"].update(ana="1"),
    "a rank below zero": lambda _, state: state["ranks"].update(ana=-1),
    "a count that is true": lambda _, state: state["counts"].update(prunes=True),
    "round 0": lambda _, state: state.update(round=0),
    "another round than the name's": lambda _, state: state.update(round=4),
    "a factor alone": lambda header, _: rename(header, "adapter.c.A"),
    "a third factor": lambda header, _: rename(header, "adapter.b.q_proj.C"),
    "a tensor of nobody's": lambda header, _: rename(header, "elsewhere"),
    "another version of the format": lambda header, _: header["__metadata__"].update(version="2"),
    "another format": lambda header, _: header["__metadata__"].update(format="pt"),
    "a type that is none": lambda header, _: header[A].update(dtype="X9"),
    "a shape of the same size": lambda header, _: header[A].update(shape=[4, 1]),
    "a shape below zero": lambda header, _: header[A].update(shape=[-2, -2]),
    "a shape that is huge": lambda header, _: header[A].update(shape=[2**40, 2**40]),
    "tensors that share their numbers": lambda header, _: header[A].update(data_offsets=[8, 24]),
    "a table that is a list": lambda header, _: header.update({A: [1]}),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_what_does_not_fit_together_is_refused_though_its_digest_is_right(whole: tuple[Path, bytes], forgery: str):
    path, data = whole
    path.write_bytes(signed(data, FORGED[forgery]))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert "SHA-256" not in str(caught.value), "the digest is right"


def test_another_version_says_which(whole: tuple[Path, bytes]):
    path, data = whole
    path.write_bytes(signed(data, FORGED["another version of the format"]))
    with pytest.raises(CheckpointError, match="version '2' of the format, and this hetlora reads '1'"):
        read_checkpoint(path)


# Which one is taken -------------------------------------------------------------------------------------------------


def written_rounds(folder: Path, rounds: int) -> list[Path]:
    """Write a run's records and a checkpoint after every round."""
    paths, length = [], 0
    for number in range(1, rounds + 1):
        with (folder / "records.jsonl").open("a", encoding="utf8") as file:
            file.write(json.dumps({"kind": "round", "round": number}) + "\n")
            length = file.tell()
        digest = hashlib.sha256((folder / "records.jsonl").read_bytes()).hexdigest()
        paths.append(write_checkpoint(checkpoint(number, length, digest), folder))
    return paths


def test_the_two_newest_are_kept(tmp_path: Path):
    paths = written_rounds(tmp_path, 12)
    assert sorted((tmp_path / "checkpoints").iterdir()) == paths[-2:]
    found = newest(tmp_path, pytest.fail)
    assert found is not None
    assert found.progress.state.round == 12


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path):
    written_rounds(tmp_path, 2)
    folder = tmp_path / "checkpoints"
    (folder / "round-000003.safetensors.part").write_bytes(b"half")
    (folder / "round-000009.safetensors").write_bytes(b"of a later round, and damaged: the run went on from round 2")
    (folder / "notes.txt").write_text("mine", "utf8")
    write_checkpoint(checkpoint(3), tmp_path)
    expected = ["notes.txt", "round-000002.safetensors", "round-000003.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == expected


def test_a_damaged_one_is_told_and_the_one_before_is_taken(tmp_path: Path):
    before, last = written_rounds(tmp_path, 3)[-2:]
    data = last.read_bytes()
    last.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    said: list[str] = []
    found = newest(tmp_path, said.append)
    assert found is not None
    assert found.progress.state.round == 2
    [message] = said
    assert str(last) in message
    assert "damaged" in message
    before.unlink()
    with pytest.raises(HetLoraError, match="no checkpoint is left to go on from") as caught:
        newest(tmp_path, said.append)
    assert str(last) in str(caught.value)
    assert "remove" in str(caught.value)


def test_without_any_there_is_none(tmp_path: Path):
    assert newest(tmp_path, pytest.fail) is None
    (tmp_path / "checkpoints").mkdir()
    assert newest(tmp_path, pytest.fail) is None


@pytest.mark.skipif(sys.platform == "win32", reason="links")
@pytest.mark.parametrize(
    "put",
    [Path.touch, lambda place: place.symlink_to("a disk that is away"), lambda place: place.symlink_to(place.name)],
    ids=["a file", "a link to nowhere", "a link to itself"],
)
def test_where_no_checkpoint_can_be_looked_for_a_run_does_not_begin_anew(tmp_path: Path, put: Callable[[Path], None]):
    """Its records would be cut, and all that it had done be lost."""
    put(tmp_path / "checkpoints")
    with pytest.raises(HetLoraError, match=r"no checkpoint can be looked for: .*bring the folder back, or remove"):
        newest(tmp_path, pytest.fail)


@pytest.mark.parametrize("content", [b"", b'{"kind": "round", "round": 1}\n{"kind": "rou', b"\xff" * 99, None])
def test_records_that_are_not_those_before_it_make_a_checkpoint_useless(tmp_path: Path, content: bytes | None):
    written_rounds(tmp_path, 2)
    records = tmp_path / "records.jsonl"
    records.unlink() if content is None else records.write_bytes(content)
    first_is_left = content is not None and b"}\n" in content
    said: list[str] = []
    if first_is_left:
        found = newest(tmp_path, said.append)
        assert found is not None
        assert found.progress.state.round == 1
    else:
        with pytest.raises(HetLoraError, match="records"):
            newest(tmp_path, said.append)
    assert "records" in said[0]


def test_records_that_were_edited_since_are_noticed(tmp_path: Path):
    """As long as before, and the last line is the round's: only the digest tells."""
    written_rounds(tmp_path, 3)
    records = tmp_path / "records.jsonl"
    records.write_bytes(records.read_bytes().replace(b'"round": 2', b'"round": 7'))
    said: list[str] = []
    with pytest.raises(HetLoraError, match="no longer those that were written"):
        newest(tmp_path, said.append)
    records.write_bytes(records.read_bytes().replace(b'"round": 7', b'"round": 2') + b'{"of a later round')
    found = newest(tmp_path, pytest.fail)
    assert found is not None
    assert found.progress.state.round == 3


def test_on_a_full_disk_what_was_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths = written_rounds(tmp_path, 2)
    before = {path: path.read_bytes() for path in paths}

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hetlora.runs.folder.os, "fsync", fail)
    for number in (2, 3):
        with pytest.raises(OSError, match="No space left"):
            write_checkpoint(checkpoint(number), tmp_path)
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before


# What may not differ ------------------------------------------------------------------------------------------------


def test_each_difference_is_named(tmp_path: Path):
    old = read_checkpoint(write_checkpoint(checkpoint(), tmp_path))
    config = json.loads(json.dumps(old.config))
    assert differences(old, config, old.digests, MADE_BY) == []
    config["federation"]["rounds"] = 6
    config["model"] = {"tokenizer": "t", "new": None}
    config["ranks"]["tiers"][0]["rank"] = 3
    now = {"hetlora": "0.2.0", "torch": "2.6", "device": "cpu", "peft": "0.13"}
    problems = differences(old, config, {"data.path": "cd", "model.base": None, "model.tokenizer": "x"}, now)
    starts = ["federation.rounds = 6", "model.tokenizer = 't'", "ranks.tiers = [{'rank': 3}]", "model.new = None"]
    starts += ["data.path = ", "model.tokenizer = 't' does not hold", "hetlora is 0.2.0, and the run began with 0.1.0"]
    starts += ["device is cpu, and the run began with cuda", "peft is 0.13, and the run began with none"]
    assert len(problems) == len(starts)
    for line, start in zip(problems, starts, strict=True):
        assert line.startswith(start)
    assert "the run began with 5" in problems[0]


def test_a_number_that_is_not_finite_stays_what_it_was(tmp_path: Path):
    odd = replace(checkpoint(), base=Measurement({"a": Score(math.nan, 1), "b": Score(math.inf, 2)}, {}, ()))
    back = read_checkpoint(write_checkpoint(odd, tmp_path)).base.clients
    assert math.isnan(back["a"].nll)
    assert back["b"].nll == math.inf
