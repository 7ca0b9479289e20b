"""Prove that every damaged checkpoint is detected and reported, and that the run resumes from the one before.

A small real run, to its end; then its newest checkpoint is damaged in one way after the other, and
`hetlora.runs.checkpoint.newest` must refuse it by name, return the older one as it was, and raise nothing but what it
documents. Parts:

truncations   every length
flips         `--trials` seeded bits, one at a time
zeros         every byte of the header, and of its length, set to zero
ranges        a tenth as many seeded ranges, overwritten with noise
appended      bytes behind its end: zeros, noise, itself
replaced      by an empty file, a folder, links to nowhere and to itself, the older one, another run's; both swapped; the folder
              of both, too
both          the older one damaged, too: refused with the way out
disk          another one is written, and at each of its primitives the disk is full or can only be read; every size at which
              the system itself refuses to write on; a folder that this process may not write in: what was there still is

    python -m proofs.checkpoints            # --only PART
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hetlora.core.types import ServerState
from hetlora.errors import HetLoraError
from hetlora.runs.checkpoint import Checkpoint, newest, read_checkpoint, write_checkpoint
from hetlora.runs.display import QuietDisplay
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.runs.process import quiet_transformers
from proofs.outcome import Outcome, arguments
from proofs.primitives import Death, Files
from proofs.small_run import config_of, write_base, write_rows

TRIALS = 10_000
NOBODY = 65534
"""A user of a system who owns nothing."""


class Damaged:
    """A run's folder whose newest checkpoint is damaged and restored.

    Args:
        folder: Of the run.

    Attributes:
        older: The file of the one before.
        path: The file of the newest.
        data: Its bytes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.older, self.path = sorted((folder / "checkpoints").iterdir())
        self.older_data, self.data = self.older.read_bytes(), self.path.read_bytes()
        self.before, self.last = read_checkpoint(self.older), read_checkpoint(self.path)

    @property
    def header(self) -> int:
        """Return the offset of the header's end."""
        return 8 + int.from_bytes(self.data[:8], "little")

    def restore(self) -> None:
        """Restore all files."""
        place = self.path.parent
        if place.is_symlink() or not place.is_dir():
            place.unlink(missing_ok=True)
        else:
            shutil.rmtree(place)
        place.mkdir()
        self.older.write_bytes(self.older_data)
        self.path.write_bytes(self.data)

    def problems(self) -> list[str]:
        """Return the problems in handling the damage."""
        said: list[str] = []
        try:
            found = newest(self.folder, said.append)
        except HetLoraError as error:
            return [f"the older one is not used: {error}"]
        except Exception as error:  # noqa: BLE001  what is documented is no other
            return [f"it raises {error!r}"]
        if found is None:
            return ["it is as if there were no checkpoint"]
        if not _same(found, self.before):
            return [f"the one of round {found.progress.state.round} is used, and not the older one as it was"]
        if len(said) != 1 or str(self.path) not in said[0]:
            return [f"the messages are {said}"]
        return []

    def refusal(self) -> list[str]:
        """Return the problems where no checkpoint is usable."""
        try:
            found = newest(self.folder, lambda _: None)
        except HetLoraError as error:
            return [] if "remove" in str(error) else [f"no way out in {error}"]
        except Exception as error:  # noqa: BLE001
            return [f"it raises {error!r}"]
        return [f"it returns {'nothing' if found is None else f'round {found.progress.state.round}'}"]


def _same(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints are bit for bit the same."""
    nothing = ServerState({})
    rest = [replace(it, progress=replace(it.progress, state=nothing)) for it in (one, other)]
    a, b = one.progress.state, other.progress.state
    return (
        rest[0] == rest[1]
        and (a.round, a.seed, dict(a.ranks), dict(a.answered)) == (b.round, b.seed, dict(b.ranks), dict(b.answered))
        and a.adapter.keys() == b.adapter.keys()
        and all(torch.equal(x, y) for m in a.adapter for x, y in zip(a.adapter[m], b.adapter[m], strict=True))
        and list(a.moments) == list(b.moments)
        and all(
            torch.equal(x, y)
            for name in a.moments
            for m in a.moments[name]
            for x, y in zip(a.moments[name][m], b.moments[name][m], strict=True)
        )
    )


# The parts ----------------------------------------------------------------------------------------------------------


def truncations(damaged: Damaged, _: range) -> Iterator[list[str]]:
    """Truncate it at every length."""
    for length in range(len(damaged.data)):
        damaged.path.write_bytes(damaged.data[:length])
        yield [f"cut to {length} bytes: {problem}" for problem in damaged.problems()]


def flips(damaged: Damaged, seeds: range) -> Iterator[list[str]]:
    """Flip one bit per seed."""
    for seed in seeds:
        bit = random.Random(f"flips:{seed}").randrange(8 * len(damaged.data))
        data = bytearray(damaged.data)
        data[bit // 8] ^= 1 << bit % 8
        damaged.path.write_bytes(data)
        again = f"--only flips --trials 1 --seed {seed} repeats it"
        yield [f"bit {bit} flipped: {problem}; {again}" for problem in damaged.problems()]


def zeros(damaged: Damaged, _: range) -> Iterator[list[str]]:
    """Set every nonzero byte of the header to zero."""
    for place in range(damaged.header):
        if damaged.data[place]:
            damaged.path.write_bytes(damaged.data[:place] + b"\0" + damaged.data[place + 1 :])
            yield [f"byte {place} zeroed: {problem}" for problem in damaged.problems()]


def ranges(damaged: Damaged, seeds: range) -> Iterator[list[str]]:
    """Overwrite one range per seed."""
    for seed in seeds[: max(1, len(seeds) // 10)]:
        rng = random.Random(f"ranges:{seed}")
        begin = rng.randrange(len(damaged.data))
        length = min(len(damaged.data) - begin, 1 + int(4096 ** rng.random()))
        data = damaged.data[:begin] + rng.randbytes(length) + damaged.data[begin + length :]
        if data == damaged.data:
            continue  # noise that is what was there
        damaged.path.write_bytes(data)
        again = f"--only ranges --trials 1 --seed {seed} repeats it"
        yield [f"{length} bytes from {begin} overwritten: {problem}; {again}" for problem in damaged.problems()]


def appended(damaged: Damaged, seeds: range) -> Iterator[list[str]]:
    """Append bytes."""
    rng = random.Random(f"appended:{seeds.start}")
    tails = [b"\0" * size for size in (1, 2, 7, 8, 64, 4096)] + [rng.randbytes(size) for size in range(1, 65)]
    for tail in [*tails, damaged.data, damaged.older_data]:
        damaged.path.write_bytes(damaged.data + tail)
        yield [f"{len(tail)} bytes appended: {problem}" for problem in damaged.problems()]


def replaced(damaged: Damaged, _: range) -> Iterator[list[str]]:
    """Replace the file."""
    path, place = damaged.path, damaged.path.parent
    other = write_checkpoint(damaged.last, _folder(damaged.folder.parent / "other"))
    renamed = replace(damaged.last.progress, state=replace(damaged.last.progress.state, round=9))
    another = write_checkpoint(replace(damaged.last, progress=renamed, records=1), other.parents[1])
    instead: dict[str, Callable[[], Any]] = {
        "an empty file": path.touch,
        "a folder": path.mkdir,
        "a link to nowhere": lambda: path.symlink_to("nowhere"),
        "a link to itself": lambda: path.symlink_to(path.name),
        "a link to a folder": lambda: path.symlink_to(place),
        "the older one": lambda: path.write_bytes(damaged.older_data),
        "a link to the older one": lambda: path.symlink_to(damaged.older.name),
        "one of another round": lambda: path.write_bytes(another.read_bytes()),
    }
    for what, put in instead.items():
        path.unlink()
        put()
        yield [f"replaced by {what}: {problem}" for problem in damaged.problems()]
        damaged.restore()
    path.write_bytes(damaged.older_data)
    damaged.older.write_bytes(damaged.data)
    yield [f"both swapped: {problem}" for problem in damaged.refusal()]
    of_both: dict[str, Callable[[], Any]] = {
        "a file": place.touch,
        "a link to nowhere": lambda: place.symlink_to("nowhere"),
        "a link to itself": lambda: place.symlink_to(place.name),
    }
    for what, put in of_both.items():
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        put()
        yield [f"their folder replaced by {what}: {problem}" for problem in damaged.refusal()]
    damaged.restore()


def both(damaged: Damaged, seeds: range) -> Iterator[list[str]]:
    """Damage the older one, too."""
    for seed in seeds[: max(1, len(seeds) // 50)]:
        rng = random.Random(f"both:{seed}")
        for path, data in ((damaged.path, damaged.data), (damaged.older, damaged.older_data)):
            bit = rng.randrange(8 * len(data))
            path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        again = f"--only both --trials 1 --seed {seed} repeats it"
        yield [f"both damaged: {problem}; {again}" for problem in damaged.refusal()]


def disk(damaged: Damaged, _: range) -> Iterator[list[str]]:
    """Write another checkpoint without space or permission."""
    state = damaged.last.progress.state
    later = replace(damaged.last, progress=replace(damaged.last.progress, state=replace(state, round=state.round + 1)))
    with Files(damaged.folder).watched() as files:
        written = write_checkpoint(later, damaged.folder)
    size, primitives = written.stat().st_size, files.done
    damaged.restore()
    for how, number in ((how, number) for how in "fr" for number in range(1, primitives + 1)):
        death = Death(number, how)  # type: ignore[arg-type]
        with Files(damaged.folder, death).watched() as refusing:
            problems = _not_written(damaged, later, errno.ENOSPC if how == "f" else errno.EROFS, refusing)
        yield [f"from primitive {number} on the disk is {how}: {problem}" for problem in problems]
        damaged.restore()
    with _without_permission(damaged.path.parent) as possible:
        problems = _not_written(damaged, later, errno.EACCES) if possible else []
    if possible:
        yield [f"a folder that may not be written in: {problem}" for problem in problems]
    for limit in range(size):
        with _largest_file(limit):
            problems = _not_written(damaged, later, errno.EFBIG)
        yield [f"no file beyond {limit} bytes: {problem}" for problem in problems]
    damaged.restore()


def _not_written(damaged: Damaged, later: Checkpoint, number: int, files: Files | None = None) -> list[str]:
    """Try to write a checkpoint; return what changed."""
    try:
        write_checkpoint(later, damaged.folder)
    except OSError as error:
        problems = [] if error.errno == number else [f"it raises {error!r}"]
    except Exception as error:  # noqa: BLE001
        problems = [f"it raises {error!r}"]
    else:
        # Of a full disk old files can be removed: what comes last is not refused.
        problems = ["nothing is said"] if files is None or files.refused else []
        if not problems:
            return []
    for path, data in ((damaged.path, damaged.data), (damaged.older, damaged.older_data)):
        if not path.is_file() or path.read_bytes() != data:
            problems.append(f"{path.name} is no longer what it was")
    left = {path.name for path in damaged.path.parent.glob("*.part")}
    if left and number != errno.EROFS:
        problems.append(f"{', '.join(left)} is left over")
    return problems


@contextlib.contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """Limit the size of written files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def _without_permission(folder: Path) -> Iterator[bool]:
    """Make a folder read-only; yield whether that applies to this process."""
    mode = folder.stat().st_mode
    administrator = os.geteuid() == 0
    folder.chmod(0o555)
    try:
        if administrator:
            os.seteuid(NOBODY)  # an administrator may write anywhere
        yield not os.access(folder, os.W_OK, effective_ids=True)
    finally:
        if administrator:
            os.seteuid(0)
        folder.chmod(mode)


PARTS: dict[str, Callable[[Damaged, range], Iterator[list[str]]]] = {
    "truncations": truncations,
    "flips": flips,
    "zeros": zeros,
    "ranges": ranges,
    "appended": appended,
    "replaced": replaced,
    "both": both,
    "disk": disk,
}


# All of it ----------------------------------------------------------------------------------------------------------


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


@contextlib.contextmanager
def a_run() -> Iterator[Path]:
    """Yield the folder of a small run."""
    before = Path.cwd()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name).resolve()
        place.chmod(0o755)
        write_base(place / "base", layers=1)
        write_rows(place / "rows.jsonl")
        os.chdir(place)
        try:
            federation = {"rounds": 3, "clients_per_round": 3, "dropout": 0.2}
            moments = {"name": "momentum", "learning_rate": 0.5}
            config = config_of(str(place / "runs"), federation=federation, server_optimizer=moments)
            yield LocalExperiment(config, QuietDisplay()).run().records.parent
        finally:
            os.chdir(before)


def prove(outcome: Outcome, parts: Sequence[str], trials: int) -> None:
    """Run the parts and count their trials."""
    seeds = range(outcome.seed, outcome.seed + trials)
    with a_run() as folder:
        damaged = Damaged(folder)
        assert damaged.problems(), "what is whole is not refused"
        outcome.figures["bytes"] = len(damaged.data)
        for part in parts:
            before = outcome.trials
            for problems in PARTS[part](damaged, seeds):
                outcome.tried([f"{part}: {problem}" for problem in problems])
            damaged.restore()
            outcome.figures[part] = outcome.trials - before


def main(options: Sequence[str] | None = None) -> int:
    """Run the proof; return the exit code."""
    parser = arguments(__doc__ or "", TRIALS)
    parser.add_argument("--only", choices=list(PARTS), help="one part")
    chosen = parser.parse_args(options)
    quiet_transformers()
    outcome = Outcome("checkpoints", chosen.seed)
    prove(outcome, list(PARTS) if chosen.only is None else [chosen.only], chosen.trials)
    return outcome.end()


if __name__ == "__main__":
    sys.exit(main())
