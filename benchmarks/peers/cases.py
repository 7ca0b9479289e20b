"""The cases of the comparisons with other simulators: small models at two shapes, a size curve, real messages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.peers.work import Work, random_llama, tokenized
from hetlora.runs.process import quiet_transformers

__all__ = ["CORES", "PAIRS", "cases"]

SHARED = Path(__file__).parents[3] / "shared"
CORES = 2
"""For each side."""
PAIRS = 5


def cases(quick: bool, folder: Path) -> Iterator[tuple[Work, str]]:
    """Yield each case with its target ratio against Flower, if any; generated models go into the folder."""
    quiet_transformers()
    if quick:
        rows, pad_id = tokenized("demo", "data.max_length=64", "data.clients=4")
        yield Work("random Llama", random_llama(0.3, folder), rows, pad_id, cohort_size=2, steps=2, batch_size=2), ""
        return
    rows, pad_id = tokenized("demo", "data.max_length=64")
    short, _ = tokenized("demo", "data.max_length=32")
    random = random_llama(0.3, folder)
    yield Work("random Llama, rows of <= 64 tokens", random, rows, pad_id), ">= 10"
    yield Work("random Llama, rows of <= 32 tokens", random, short, pad_id, batch_size=1), ">= 10"
    for millions in (6, 20):
        base = random_llama(millions, folder)
        yield Work("curve, random Llama", base, rows, pad_id, steps=2, batch_size=4), ""
    if not SHARED.is_dir():
        print(f"peers: talk-6m on real messages left out: there is no {SHARED}")
        return
    talk, messages = str(SHARED / "models" / "talk-6m"), SHARED / "data" / "ubuntu_irc" / "messages.jsonl"
    rows, pad_id = tokenized(
        "ubuntu_irc", "data.max_length=128", "data.clients=30", f"data.path={messages}", f"model.base={talk}"
    )
    yield Work("talk-6m on ubuntu_irc", talk, rows, pad_id, steps=3, batch_size=4), ">= 3"
