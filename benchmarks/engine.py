"""Local training: batched against one client at a time, against a PEFT loop, and against the machine's peak.

python -m benchmarks.engine            # or --quick
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.peers.plain import PlainClient
from benchmarks.peers.work import Answer, Ours, Work, check_same, random_llama, tokenized
from benchmarks.table import Row, paired, row
from hetlora.model.lora_model import locate_base
from hetlora.runs.process import quiet_transformers

SHARED = Path(__file__).parents[2] / "shared"


def rows(quick: bool) -> Iterable[Row]:
    """Yield the rows of local training, and of the start of the command."""
    quiet_transformers()
    threads = torch.get_num_threads()
    pairs = 1 if quick else 5
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        try:
            torch.set_num_threads(1)
            yield from _one_pass(quick, place, pairs)
            yield from _share_of_peak(quick, place, pairs)
        finally:
            torch.set_num_threads(threads)
        yield from _one_by_one(quick, place, pairs)
        yield from _plain_loop(quick, pairs)
    yield from _start(pairs)


def _demo(base: str, length: int, quick: bool = False, **changes: int) -> Work:
    """Return work on the bundled rows, cut to a length; for a quick look those of as many clients as a cohort has."""
    rows_of, pad_id = tokenized("demo", f"data.max_length={length}", *(["data.clients=10"] if quick else []))
    return replace(Work(f"rows of <= {length} tokens", locate_base(base), rows_of, pad_id), **changes)


def _one_pass(quick: bool, folder: Path, pairs: int) -> Iterator[Row]:
    """A cohort in one pass against one client at a time, in one thread, at most 32 tokens a client's step."""
    sizes = {0.3: ">= 2.5"} if quick else {0.3: ">= 2.5", 6: ">= 1.7", 50: ">= 1.4"}
    for millions, target in sizes.items():
        work = _demo(random_llama(millions, folder), 32, quick, batch_size=1, steps=2 if quick else 5)
        together, apart = _both(work, apart={"group_size": 1, "workers": 1}, together={"workers": 1})
        ratios = paired(apart.round, together.round, pairs)
        name = (
            f"a cohort of 10 in one pass against one client at a time, one row of <= 32 tokens, {millions} M parameters"
        )
        yield row(name, ratios, target, judge=not quick, note="one thread")


def _one_by_one(quick: bool, folder: Path, pairs: int) -> Iterator[Row]:
    """The engine's own grouping against one client at a time, with the same threads, at several shapes."""
    shapes = [(0.3, 32, 1), (0.3, 256, 8), (6, 32, 8), (6, 256, 8), (50, 256, 4)]
    for millions, length, batch_size in shapes[:1] if quick else shapes:
        few = {"cohort_size": 3, "steps": 1} if millions > 6 else {"cohort_size": 6, "steps": 1 if length > 32 else 2}
        work = _demo(random_llama(millions, folder), length, quick, batch_size=batch_size, **few)
        chosen, apart = _both(work, apart={"group_size": 1, "workers": 1}, together={})
        ratios = paired(apart.round, chosen.round, pairs)
        name = (
            f"the engine against one client at a time, {batch_size} rows of <= {length} tokens, {millions} M parameters"
        )
        yield row(name, ratios, ">= 0.98", judge=not quick, note=f"{torch.get_num_threads()} threads each")


def _both(work: Work, *, apart: dict[str, int], together: dict[str, int]) -> tuple[Ours, Ours]:
    """Return the work done in two ways that come to the same result."""
    sides = Ours(work), Ours(work)
    for side, options in zip(sides, (together, apart), strict=True):
        for name, value in options.items():
            setattr(side.engine, name, value)
    first = sides[0].adapter()
    check_same(first, sides[1].round(), sides[0].round())
    return sides


def _share_of_peak(quick: bool, folder: Path, pairs: int) -> Iterator[Row]:
    """The training's matrix products as a share of the machine's peak rate, measured in the same run."""
    cases = {256: (6, ">= 0.65"), 512: (50, ">= 0.8")}
    for hidden, (millions, target) in list(cases.items())[: 1 if quick else 2]:
        work = _demo(random_llama(millions, folder), 64, quick, batch_size=2 if quick else 16, steps=2, cohort_size=2)
        ours = Ours(work)
        ours.engine.workers = 1
        parameters = sum(parameter.numel() for parameter in ours.model.base.parameters())
        adapter = sum(factor.numel() for factor in ours.adapter().values())
        shares = []
        ours.round()
        for _ in range(pairs):
            tokens = sum(
                len(row.ids)
                for client in work.cohort(ours.state.round)
                for batch in work.batches(ours.state.round, client)
                for row in batch
            )
            peak = _gemm_rate(hidden)
            seconds = _seconds(ours.round)
            shares.append((4 * parameters + 6 * adapter) * tokens / seconds / peak)
        name = f"share of the machine's matrix products while training, hidden {hidden}"
        note = f"4 N + 6 P operations a token, {millions} M parameters, float32, one thread"
        yield row(name, shares, target, judge=not quick, note=note)


def _gemm_rate(hidden: int) -> float:
    """Return the peak FLOP/s of one matrix product of a layer's size."""
    left, right = torch.randn(1024, hidden), torch.randn(hidden, 4 * hidden)
    out = torch.empty(1024, 4 * hidden)
    best = min(_seconds(lambda: torch.mm(left, right, out=out)) for _ in range(20))
    return 2 * left.numel() * 4 * hidden / best


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _plain_loop(quick: bool, pairs: int) -> Iterator[Row]:
    """The engine against the loop that a user of PEFT would write."""
    if quick:
        yield _against_plain(_demo("nano", 64, quick, batch_size=2, steps=2, cohort_size=2), pairs, "", judge=False)
        return
    if not SHARED.is_dir():
        print(f"engine: the plain loop on real text is left out: there is no {SHARED}")
        yield _against_plain(_demo("nano", 256), pairs, "", judge=False)
        return
    talk = str(SHARED / "models" / "talk-6m")
    for data, file, split, steps in (("msc", "sessions", "split", 2), ("ubuntu_irc", "messages", "split", 5)):
        rows_of, pad_id = tokenized(
            data,
            f"data.path={SHARED / 'data' / data / file}.jsonl",
            f"data.split_field={split}",
            'data.train=["train"]',
            'data.test=["test"]',
            "data.max_length=1024",
            "data.clients=30",
            f"model.base={talk}",
        )
        work = Work(f"talk-6m on {data}, whole rows", talk, rows_of, pad_id, steps=steps, rank=16, cohort_size=5)
        yield _against_plain(work, pairs, ">= 3", judge=True)


def _against_plain(work: Work, pairs: int, target: str, *, judge: bool) -> Row:
    plain, ours = _Plain(work), Ours(work)
    first = ours.adapter()
    check_same(first, plain.round(first, 0), ours.round())

    def theirs() -> None:
        plain.round(ours.adapter(), ours.state.round - 1)

    tokens = [row.ids for own in work.rows.values() for row in own]
    mean, longest = sum(map(len, tokens)) / len(tokens), max(map(len, tokens))
    note = f"rows of {mean:.0f} tokens on average, {longest} at most, 8 a step; {torch.get_num_threads()} threads each"
    return row(
        f"the engine against a loop with PEFT, {work.name}",
        paired(theirs, ours.round, pairs),
        target,
        judge=judge,
        note=note,
    )


class _Plain:
    """FedAvg over plain clients, one after another."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.client = PlainClient(work)

    def round(self, adapter: dict[str, torch.Tensor], round_number: int) -> Answer:
        """Train the round's cohort from an adapter and average by examples."""
        cohort = self.work.cohort(round_number)
        weights = {name: len(self.work.rows[name]) for name in cohort}
        total, losses = dict.fromkeys(adapter, 0.0), {}
        for name in cohort:
            trained, losses[name] = self.client.fit(adapter, self.work.batches(round_number, name))
            for key, value in trained.items():
                total[key] = total[key] + value.double() * (weights[name] / sum(weights.values()))
        return {key: value.float() for key, value in total.items()}, losses  # type: ignore[union-attr]


def _start(pairs: int) -> Iterator[Row]:
    """Seconds for the help and for the import: the one row that is no ratio."""
    loaded = subprocess.run(
        [sys.executable, "-c", "import hetlora, sys; print(*{'transformers', 'peft', 'flwr'} & set(sys.modules))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    if loaded:
        raise AssertionError(f"import hetlora loads {', '.join(loaded)}")
    for name, command in (
        ("hetlora --help, seconds", [sys.executable, "-m", "hetlora.cli", "--help"]),
        ("import hetlora, seconds", [sys.executable, "-c", "import hetlora"]),
    ):
        seconds = [_seconds(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(pairs + 1)]  # noqa: B023
        yield row(
            name, seconds[1:], "<= 0.3", judge=pairs > 1, note="not a ratio; no transformers, peft or flwr is loaded"
        )


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing is judged")
    for line in rows(parser.parse_args().quick):
        print(line)


if __name__ == "__main__":
    main()
