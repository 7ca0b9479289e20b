"""Every causal language model of the installed transformers, made small, goes through all that hetlora does with a base.

For each one, in a process of its own with a time limit: its default targets; a run; the base's perplexity against
transformers; a cohort of two ranks against PEFT and AdamW, one client and one row at a time; the same with all linear layers;
the adapter read back by PEFT; the merged model; greedy answers against transformers' own; the plan; bfloat16; and training all
weights.

A refusal before anything is trained is a right answer where its reason is true; a person reads the reasons in `docs/models.md`.
A number that is not that of the reference, or any other exception, is a failure.

    python -m proofs.architectures                     # all of them, and writes docs/models.md and its record
    python -m proofs.architectures llama mamba/        # these types, to the screen; "type/variant" is one of them
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from proofs.architecture_checks import COLUMNS, Cell, Examination
from proofs.architecture_table import Row, models_page
from proofs.small_bases import architectures, kinds_and_variants

LIMIT = 600.0
"""Seconds that one architecture may take."""

RECORD, PAGE = Path("benchmarks/results/architectures.json"), Path("docs/models.md")


@dataclass
class Examined:
    """What came out for one architecture.

    Attributes:
        kind: Its type.
        variant: Its variant; empty for the usual one.
        cells: Column to what came out.
        unbuilt: Why it could not be built small; empty where it could.
        seconds: How long it took.
    """

    kind: str
    variant: str
    cells: dict[str, Cell] = field(default_factory=dict)
    unbuilt: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """Return type and variant."""
        return f"{self.kind}/{self.variant}" if self.variant else self.kind


def examine(kind: str, variant: str, folder: Path, columns: Sequence[str] = COLUMNS) -> Examined:
    """Examine one architecture in this process.

    Args:
        kind: Its type.
        variant: Its variant.
        folder: An empty one.
        columns: What is looked at.
    """
    began = time.monotonic()
    examined = Examined(kind, variant)
    try:
        examination = Examination(kind, variant, folder)
    except Exception as error:  # noqa: BLE001  whatever transformers or its configuration says
        examined.unbuilt = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    else:
        examined.cells = {column: examination.cell(column) for column in columns}
    examined.seconds = round(time.monotonic() - began, 1)
    return examined


def _work(kind: str, variant: str, send: Callable[[Examined], None]) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        send(examine(kind, variant, Path(folder)))


def examine_apart(kind: str, variant: str) -> Examined:
    """Examine one architecture in a process of its own, which ends when it takes too long."""
    context = multiprocessing.get_context("fork")  # what is imported here need not be again
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(kind, variant, theirs.send))
    process.start()
    theirs.close()
    try:
        if ours.poll(LIMIT):
            return ours.recv()  # type: ignore[no-any-return]
        problem = Cell("error", f"it took longer than {LIMIT:.0f} seconds")
    except EOFError:
        problem = Cell("error", "the process ended")
    finally:
        process.kill()
        process.join()
    return Examined(kind, variant, dict.fromkeys(COLUMNS, problem), seconds=LIMIT)


def main(options: Sequence[str] | None = None) -> int:
    """Examine them, write what came out, and return the exit code: 0 where nothing is wrong and nothing broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="types, or type/variant; by default all, which are written down")
    parser.add_argument("--jobs", type=int, default=1, help="how many are examined at once")
    parser.add_argument("--record", type=Path, help="where the record goes, instead of beside the others")
    chosen = parser.parse_args(options)
    _prepare()
    wanted = kinds_and_variants(
        [kind for kind in architectures() if kind in {name.split("/")[0] for name in chosen.kinds}]
    )
    if chosen.kinds:
        wanted = [(k, v) for k, v in wanted if k in chosen.kinds or f"{k}/{v}" in chosen.kinds]
    else:
        wanted = kinds_and_variants(architectures())
    found = []
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for examined in pool.map(lambda one: examine_apart(*one), wanted):
            found.append(examined)
            print(_told(examined), flush=True)
    record = chosen.record or (None if chosen.kinds else RECORD)
    if record is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf8")
    if not chosen.kinds:
        rows = [Row(one.name, one.cells, one.unbuilt) for one in found]
        PAGE.write_text(models_page(rows, COLUMNS), encoding="utf8")
    states = [cell.state for one in found for cell in one.cells.values()]
    print(
        json.dumps({"proof": "architectures", "trials": len(found)} | {s: states.count(s) for s in sorted(set(states))})
    )
    return int(any(state in ("wrong", "error") for state in states))


def _told(examined: Examined) -> str:
    cells: Mapping[str, Cell] = examined.cells
    if examined.unbuilt:
        return f"{examined.name}: not built: {examined.unbuilt}"
    lines = [f"{examined.name}: {examined.seconds} s, {sum(cell.state == 'ok' for cell in cells.values())} right"]
    lines += [f"  {column}: {cell.state}: {cell.detail}" for column, cell in cells.items() if cell.state != "ok"]
    return "\n".join(lines)


def _prepare() -> None:
    """Load what every process needs, once, by examining one architecture here."""
    import torch

    from hetlora.runs.process import quiet_transformers

    torch.set_num_threads(1)
    quiet_transformers()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        examine("llama", "", Path(folder))


if __name__ == "__main__":
    sys.exit(main())
