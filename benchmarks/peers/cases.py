"""What the comparisons with other simulators train: small models at two shapes, a curve over sizes, and real messages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.peers.work import Work, random_llama, tokenized
from hetlora.lora_model import load_base
from hetlora.process import quiet_transformers

__all__ = ["CORES", "PAIRS", "cases"]

SHARED = Path(__file__).parents[3] / "shared"
CORES = 2
"""For each side."""
PAIRS = 5


def cases(quick: bool, folder: Path) -> Iterator[tuple[Work, str]]:
    """Yield what is compared and the ratio to reach against Flower, if any; models made for it go into the folder."""
    quiet_transformers()
    rows, pad_id = tokenized("demo", "data.max_length=64")
    if quick:
        few = dict(list(rows.items())[:4])
        yield Work("random Llama", random_llama(0.3, folder), few, pad_id, cohort_size=2, steps=2, batch_size=2), ""
        return
    short, _ = tokenized("demo", "data.max_length=32")
    random = random_llama(0.3, folder)
    yield Work("random Llama, rows of <= 64 tokens", random, rows, pad_id), ">= 10"
    yield Work("random Llama, rows of <= 32 tokens", random, short, pad_id, batch_size=1), ">= 10"
    for base in (random, random_llama(1, folder), "nano", random_llama(6, folder), random_llama(20, folder)):
        name = "curve, nano" if base == "nano" else "curve, random Llama"
        yield Work(name, str(load_base(base).name_or_path), rows, pad_id, steps=3, batch_size=4), ""
    if not SHARED.is_dir():
        print(f"peers: stories260K, and talk-6m on real messages, left out: there is no {SHARED}")
        return
    stories, talk = str(SHARED / "models" / "stories260K"), str(SHARED / "models" / "talk-6m")
    for length, batch_size in ((64, 8), (32, 1)):
        rows, pad_id = tokenized("demo", f"data.max_length={length}", f"model.base={stories}")
        yield Work(f"stories260K, rows of <= {length} tokens", stories, rows, pad_id, batch_size=batch_size), ">= 10"
    for data, file in (("ubuntu_irc", "messages"), ("msc", "sessions")):
        place = f"data.path={SHARED / 'data' / data / file}.jsonl"
        rows, pad_id = tokenized(data, "data.max_length=128", "data.clients=30", place, f"model.base={talk}")
        yield Work(f"talk-6m on {data}", talk, rows, pad_id, steps=3, batch_size=4), ">= 3"
