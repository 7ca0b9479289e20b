"""Prove that a run that is killed anywhere, interrupted, or finds a full disk, and is resumed, ends as the run that was not.

Every trial is a real command in a process of its own: ``hetlora run``, then ``hetlora resume`` until it ends. What it leaves
is compared with what an uninterrupted run leaves, bit for bit: the adapter's files, and records and summary but for seconds,
memory and places. Parts:

moments      `--trials` runs, each killed by SIGKILL at a random moment; what goes on is killed again, up to three times
primitives   killed before, in the middle of and after every open, write, fsync, rename, unlink … of a run's files, and of a
             resumed run's
interrupts   Ctrl-C at a random moment
disk         from a primitive on the disk is full, or can only be read: one message and exit code 2, and nothing is lost
power        each rename stands between the fsync of its file and that of its folder; and from what a power cut would leave at
             any primitive, by the least that POSIX promises, the run goes on from the round that it had come to

    python -m proofs.resume            # --only PART, --jobs N; --deaths 'hetlora 12m 7b' repeats a trial
"""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from unittest import mock

import peft  # noqa: F401  what a run imports when it comes to it: children find it imported
import rouge_score.rouge_scorer  # noqa: F401
import tomli_w
import torch
import transformers  # noqa: F401

import hetlora.runs.local_experiment
import hetlora.runs.runner
from hetlora.cli import INTERRUPTED
from hetlora.cli import main as hetlora_main
from hetlora.runs.checkpoint import Checkpoint
from proofs.outcome import Outcome, arguments
from proofs.primitives import Death, Durable, Files, Primitive
from proofs.small_run import Ended, document, ended, write_base, write_rows

TRIALS = 300
PARTS = ("moments", "primitives", "interrupts", "disk", "power")
RUNS: dict[str, dict[str, Any]] = {
    "hetlora": {},
    "per_module": {"method": {"name": "hetlora", "gamma": 0.5, "penalty": 5.0, "min_rank": 1, "per_module": True}},
    "adam": {"server_optimizer": {"name": "adam", "learning_rate": 0.01}},
    "fedsa_lora": {"method": {"name": "fedsa_lora"}},
    "flora": {"method": {"name": "flora"}},
}
"""HetLoRA that prunes, and what else carries state from round to round: ranks a module, moments, what clients keep, what is
folded into the base."""
PAST = ("tokenizer.json",)
"""Written by the tokenizer's own library, into a folder that is written anew when its run is resumed."""
OTHERS = 6
"""One in so many primitives is died of in the runs that are not HetLoRA's."""
AGAIN = 3
"""How often at most what goes on is killed again."""
LONG = 600.0
"""Seconds after which a process hangs; on a loaded machine one takes a minute."""


class Whole(NamedTuple):
    """An uninterrupted run."""

    ended: Ended
    seconds: float
    primitives: list[Primitive]


class Status(NamedTuple):
    """The end of a process."""

    code: int
    """Negative: the signal that killed it."""
    said: str
    """On standard error."""
    done: int
    """Primitives that it began."""


@dataclass(frozen=True)
class Trial:
    """A run and the deaths of its processes, in order; the last process is undisturbed.

    Attributes:
        run: A name of `RUNS`.
        deaths: One per process.
        again: The options that repeat it.
        cut: The files after a power cut, if the trial starts there.
        promised: The round that it had come to by then, "complete", or None before the first one.
    """

    run: str
    deaths: tuple[Death, ...] = ()
    again: str = ""
    cut: dict[str, bytes | None] | None = None
    promised: int | str | None = None


@dataclass
class Tried:
    """The result of a trial.

    Attributes:
        problems: Errors.
        kills: Processes that were killed.
        interrupts: Processes that Ctrl-C ended.
        refusals: Processes that the disk ended.
    """

    problems: list[str] = field(default_factory=list)
    kills: int = 0
    interrupts: int = 0
    refusals: int = 0


# A process of its own ----------------------------------------------------------------------------------------------


def command(words: Sequence[str], folder: Path, death: Death | None = None, **watch: Callable[..., None]) -> Status:
    """Run a hetlora command in a forked process that dies as given.

    Args:
        words: The command.
        folder: The folder whose primitives are counted.
        death: Its death.
        **watch: `note` and `after` of `Files`, called in the process.
    """
    counter, said = mmap.mmap(-1, 16), folder.with_suffix(".said")
    pid = os.fork()
    if not pid:
        _be(words, folder, death, counter, said, watch)
    began = time.monotonic()
    if death is not None and death.timed:
        while not counter[8] and time.monotonic() - began < LONG:
            time.sleep(0.001)
        time.sleep(death.at)
        os.kill(pid, signal.SIGKILL if death.how == "s" else signal.SIGINT)
    while not (ended_pid := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() - began > LONG:
            os.kill(pid, signal.SIGKILL)
            ended_pid = os.waitpid(pid, 0)
            break
        time.sleep(0.005)
    text = said.read_text("utf8", errors="replace")
    said.unlink()
    return Status(os.waitstatus_to_exitcode(ended_pid[1]), text, int.from_bytes(counter[:8], "little"))


def _be(
    words: Sequence[str],
    folder: Path,
    death: Death | None,
    counter: mmap.mmap,
    said: Path,
    watch: dict[str, Callable[..., None]],
) -> NoReturn:
    """Body of the forked process."""
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # What it says is counted nowhere, so it goes past the watched `open`.
        sys.stderr = io.TextIOWrapper(io.FileIO(said, "w"), "utf8", write_through=True)
        sys.stdout = io.StringIO()
        note = watch.get("note", lambda *_: None)

        def count(number: int, primitive: Primitive) -> None:
            counter[:8] = number.to_bytes(8, "little")
            note(number, primitive)

        files = Files(folder, death, count, watch.get("after", lambda _: None))
        with files.watched():
            counter[8] = 1  # now it can be interrupted
            code = hetlora_main(words)
    except KeyboardInterrupt:  # in the moment before the command begins or after it has ended
        code = INTERRUPTED if code == 99 and files.done == 0 else code
    except BaseException as error:  # noqa: BLE001  reported to the parent
        print(f"Traceback: {error!r}", file=sys.stderr)
    os._exit(code)


def run_folder(folder: Path) -> Path | None:
    """Return the newest folder of a run under `folder` that can go on; None where none has come so far."""
    found = [path.parent for path in folder.glob("runs/*/config.json")]
    return max(found, key=lambda path: (len(path.name), path.name), default=None)


def next_command(run: str, folder: Path) -> list[str]:
    """Return the next command: run or resume."""
    here = run_folder(folder)
    if here is None:
        return ["run", f"{run}.toml", "--set", f"output={json.dumps(str(folder / 'runs'))}"]
    return ["resume", str(here)]


# A trial ------------------------------------------------------------------------------------------------------------


def attempt(trial: Trial, whole: Whole, folder: Path) -> Tried:
    """Kill a run as given, resume it, and compare its end.

    Args:
        trial: The trial.
        whole: The uninterrupted run to compare with.
        folder: Absolute; is made, and removed.
    """
    folder.mkdir()
    tried, exact = Tried(), [trial.run]
    try:
        _restore(trial.cut, folder)
        for death in trial.deaths:
            status = command(next_command(trial.run, folder), folder, death)
            exact.append(f"{status.done}a" if status.code == -signal.SIGKILL and death.timed else str(death))
            tried.problems += _judge(death, status, tried)
            if status.code == 0 or tried.problems:
                break
        else:
            status = command(next_command(trial.run, folder), folder)
        if not tried.problems:
            tried.problems += _compare(status, folder, whole)
            tried.problems += _kept_its_word(trial, status)
    finally:
        shutil.rmtree(folder)
    exactly = f"--deaths '{' '.join(exact)}'"
    again = trial.again if trial.cut is not None else " or ".join(filter(None, (trial.again, exactly)))
    tried.problems = [f"{trial.run}: {problem}; {again} repeats it" for problem in tried.problems]
    return tried


def _judge(death: Death, status: Status, tried: Tried) -> list[str]:
    """Count the end of a process; return its problems."""
    lines = status.said.strip().splitlines()
    if status.code == 0:
        return []  # it was too late
    if death.how in "bmas" and status.code == -signal.SIGKILL:
        tried.kills += 1
        return []
    if death.how == "i" and status.code == INTERRUPTED and "Traceback" not in status.said:
        tried.interrupts += 1
        return []
    if death.how in "fr" and status.code == 2 and "Traceback" not in status.said:
        tried.refusals += 1
        last = lines[-1] if lines else ""
        reason = "No space left on device" if death.how == "f" else "Read-only file system"
        ways_out = ("hetlora resume", "set output to a folder")
        if last.startswith("hetlora: ") and reason in last and any(way in last for way in ways_out):
            return []
        return [f"{death} is reported as {last!r}, without the reason or the way out"]
    return [f"{death} ended it with {status.code} and {lines[-3:]}"]


def _compare(status: Status, folder: Path, whole: Whole) -> list[str]:
    """Return the differences from an uninterrupted run."""
    here = run_folder(folder)
    if status.code != 0 or here is None:
        return [f"it ended with {status.code} and {status.said.strip().splitlines()[-3:]}"]
    left = ended(here)
    problems = [f"another {name}" for name in Ended._fields if getattr(left, name) != getattr(whole.ended, name)]
    return problems + [f"{path.name} is left over" for path in here.rglob("*.part")]


def _kept_its_word(trial: Trial, status: Status) -> list[str]:
    """Return a problem if a run resumed from an earlier round than it had promised."""
    if trial.promised == "complete":
        return [] if not status.said else [f"it was complete, and goes on: {status.said.splitlines()[0]}"]
    if trial.promised is None:
        return []
    rounds = [int(line.rpartition(" ")[2]) for line in status.said.splitlines() if line.startswith("going on from")]
    if rounds and rounds[0] >= int(trial.promised):
        return []
    return [f"it had said that it goes on from round {trial.promised}, and begins at {rounds or 'its beginning'}"]


def _restore(cut: dict[str, bytes | None] | None, folder: Path) -> None:
    for name, content in (cut or {}).items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)


# What trials there are ---------------------------------------------------------------------------------------------


def uninterrupted(run: str, place: Path) -> Whole:
    """Run without interruption and record the primitives."""
    folder, log = place / f"whole-{run}", place / f"whole-{run}.primitives"
    folder.mkdir()
    with log.open("w", encoding="utf8", buffering=1) as file:
        began = time.monotonic()
        status = command(
            next_command(run, folder), folder, note=lambda _, primitive: file.write(json.dumps(primitive) + "\n")
        )
        seconds = time.monotonic() - began
    here = run_folder(folder)
    assert status.code == 0, status.said
    assert here is not None
    primitives = [Primitive(*json.loads(line)) for line in log.read_text("utf8").splitlines()]
    return Whole(ended(here), seconds, primitives)


def uncounted(run: str, primitives: Sequence[Primitive], place: Path) -> list[str]:
    """Return the files that no counted primitive made; the proof would miss them."""
    counted = {primitive.to or primitive.path for primitive in primitives}
    files = [path for path in (place / f"whole-{run}").rglob("*") if path.is_file() and path.name not in PAST]
    return [f"{run}: {path} is written past what is counted" for path in files if str(path) not in counted]


def moments(wholes: dict[str, Whole], seeds: Sequence[int], how: str = "s") -> Iterator[Trial]:
    """Yield a trial a seed: killed at a random moment, and again while it goes on, at a moment or a primitive."""
    part = "moments" if how == "s" else "interrupts"
    for seed in seeds:
        rng = random.Random(f"{part}:{seed}")
        # Every other one is of HetLoRA: the others share the rest.
        run = "hetlora" if seed % 2 == 0 else list(RUNS)[seed // 2 % len(RUNS)]
        whole = wholes[run]
        deaths = [Death(round(whole.seconds * rng.uniform(0.0, 0.9), 4), how)]  # type: ignore[arg-type]
        for _ in range(rng.choice((0, 0, 1, 1, 2, AGAIN)) if how == "s" else rng.choice((0, 1))):
            if rng.random() < 0.5:
                deaths.append(Death(round(whole.seconds * rng.uniform(0.0, 0.6), 4), how))  # type: ignore[arg-type]
            else:
                deaths.append(Death(rng.randrange(1, len(whole.primitives)), rng.choice("bma")))  # type: ignore[arg-type]
        yield Trial(run, tuple(deaths), f"--only {part} --trials 1 --seed {seed}")


def every_primitive(run: str, whole: Whole, hows: str, before: tuple[Death, ...] = ()) -> Iterator[Trial]:
    """Yield a trial a primitive and way to die of it; the middle only of what has one.

    Args:
        run: A name of `RUNS`.
        whole: The same, with its primitives.
        hows: Ways to die.
        before: Deaths of the earlier processes.
    """
    for number, primitive in enumerate(whole.primitives, 1):
        for how in hows:
            if how != "m" or primitive.kind in ("write", "save"):
                yield Trial(run, (*before, Death(number, how)))  # type: ignore[arg-type]


def resumed(run: str, whole: Whole, death: Death, place: Path) -> Whole:
    """Return the primitives of a run that resumes after a death."""
    folder = place / "resumed"
    folder.mkdir()
    command(next_command(run, folder), folder, death)
    with (place / "resumed.primitives").open("w", encoding="utf8", buffering=1) as file:
        command(next_command(run, folder), folder, note=lambda _, primitive: file.write(json.dumps(primitive) + "\n"))
    shutil.rmtree(folder)
    lines = (place / "resumed.primitives").read_text("utf8").splitlines()
    return whole._replace(primitives=[Primitive(*json.loads(line)) for line in lines])


# A power cut --------------------------------------------------------------------------------------------------------


def out_of_order(primitives: Sequence[Primitive]) -> list[str]:
    """Return each rename whose file was not on the disk before it, or whose folder is not synchronised next."""
    problems = []
    for place, primitive in enumerate(primitives):
        if primitive.kind not in ("rename", "replace"):
            continue
        written = max((i for i in range(place) if primitives[i][:2] == ("write", primitive.path)), default=-1)
        if Primitive("fsync", primitive.path) not in primitives[written + 1 : place]:
            problems.append(f"{primitive.path} is renamed (primitive {place + 1}) before it is on the disk")
        if primitives[place + 1 : place + 2] != [Primitive("fsync", str(Path(primitive.to).parent))]:
            problems.append(f"the name {primitive.to} (primitive {place + 1}) is not put on the disk next")
    return problems


def power_cuts(run: str, place: Path) -> list[Trial]:
    """Do a whole run and return a trial for whatever a power cut would leave of it at any primitive.

    Two disks: one that keeps nothing but what it was asked to, and one whose names are all there at once.
    """
    folder, found = place / "cuts", place / "cuts.found"
    folder.mkdir()
    durable = Durable(folder)
    cuts: dict[str, list[Trial]] = {"nothing else is kept": [], "names are kept": []}
    promised: list[int | str | None] = [None]

    def look(_: Primitive | None = None) -> None:
        """Record the remaining files if they changed."""
        for disk, trials in cuts.items():
            left = durable.left(folder if disk == "names are kept" else None)
            if not trials or trials[-1].cut != left:
                trials.append(Trial(run, (), f"--only power (cut {len(trials)}, {disk})", left, promised[0]))
            elif trials[-1].promised != promised[0]:
                trials[-1] = Trial(run, (), trials[-1].again, left, promised[0])

    def after(primitive: Primitive) -> None:
        durable.after(primitive)
        look()

    def keep(checkpoint: Checkpoint, where: Path) -> Path:
        written = write(checkpoint, where)
        promised[0] = checkpoint.progress.state.round
        look()
        return written

    def complete(where: Path, summary: Any) -> None:
        conclude(where, summary)
        promised[0] = "complete"
        look()
        _hand_over(cuts, found)

    write, conclude = hetlora.runs.runner.write_checkpoint, hetlora.runs.runner.write_summary
    with (
        mock.patch.object(hetlora.runs.runner, "write_checkpoint", keep),
        mock.patch.object(hetlora.runs.runner, "write_summary", complete),
    ):
        status = command(next_command(run, folder), folder, after=after)
    assert status.code == 0, status.said
    shutil.rmtree(folder)
    return [
        Trial(run, (), one["again"], _from_hex(one["cut"]), one["promised"])
        for one in json.loads(found.read_text("utf8"))
    ]


def _hand_over(cuts: dict[str, list[Trial]], path: Path) -> None:
    """Write the process's result for its parent."""
    plain = [
        {
            "again": trial.again,
            "promised": trial.promised,
            "cut": {name: None if content is None else content.hex() for name, content in (trial.cut or {}).items()},
        }
        for trials in cuts.values()
        for trial in trials
    ]
    path.write_text(json.dumps(plain), encoding="utf8")


def _from_hex(cut: dict[str, str | None]) -> dict[str, bytes | None]:
    return {name: None if content is None else bytes.fromhex(content) for name, content in cut.items()}


# All of it ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """Make a folder with a base, rows and configurations, and work in it."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name).resolve()
        write_base(place / "base")
        write_rows(place / "rows.jsonl")
        for run, changes in RUNS.items():
            text = tomli_w.dumps(document("runs", threads=1, **changes))
            (place / f"{run}.toml").write_text(text, encoding="utf8")
        os.chdir(place)
        try:
            yield place
        finally:
            os.chdir(before)


def _work(job: tuple[int, Trial, Whole, Path]) -> Tried:
    number, trial, whole, place = job
    tried = attempt(trial, whole, place / f"trial-{number}")
    if tried.problems or tried.kills or not trial.deaths or trial.deaths[0].how != "s":
        return tried
    # This time the run was quicker than the moment: it dies earlier.
    earlier = Trial(trial.run, (Death(round(trial.deaths[0].at / 2, 4), "s"), *trial.deaths[1:]), trial.again)
    return attempt(earlier, whole, place / f"trial-{number}")


def _trials(parts: Sequence[str], wholes: dict[str, Whole], chosen: Any, place: Path) -> Iterator[Trial]:
    """Yield the trials of the parts."""
    seeds = range(chosen.seed, chosen.seed + chosen.trials)
    hetlora = wholes["hetlora"]
    total = len(hetlora.primitives)
    if "moments" in parts:
        yield from moments(wholes, seeds)
    some = random.Random(f"share:{chosen.seed}")

    def shared(trials: Iterable[Trial]) -> list[Trial]:
        found = list(trials)
        return some.sample(found, max(1, round(chosen.share * len(found))))

    if "primitives" in parts:
        yield from shared(every_primitive("hetlora", hetlora, "bma"))
        for death in (Death(total // 2, "b"), Death(total - 1, "b")):  # amid the rounds; all but the summary written
            yield from shared(every_primitive("hetlora", resumed("hetlora", hetlora, death, place), "bm", (death,)))
        for run, whole in wholes.items():
            if run != "hetlora":
                yield from shared(every_primitive(run, whole, "bma"))[::OTHERS]
    if "interrupts" in parts:
        yield from moments(wholes, seeds[: max(1, chosen.trials // 3)], "i")
    if "disk" in parts:
        yield from shared(every_primitive("hetlora", hetlora, "fr"))
        death = Death(total - 1, "b")
        yield from shared(every_primitive("hetlora", resumed("hetlora", hetlora, death, place), "fr", (death,)))
    if "power" in parts:
        yield from shared(power_cuts("hetlora", place))


def prove(outcome: Outcome, chosen: Any) -> None:
    """Run all selected trials."""
    parts = chosen.only
    # Children compute with one thread: nothing is computed in threads here, which they would not have.
    torch.set_num_threads(1)
    with workplace() as place:
        named = [] if chosen.deaths is None else chosen.deaths.split()
        wholes = {run: uninterrupted(run, place) for run in (named[:1] or RUNS)}
        for run, whole in wholes.items():
            outcome.tried(uncounted(run, whole.primitives, place), trials=0)
        if named:
            trials = [Trial(named[0], tuple(map(Death.read, named[1:])))]
        else:
            assert wholes["hetlora"].ended.summary["prunes"] > 0
            assert wholes["hetlora"].ended.summary["failures"] > 0
            trials = list(_trials(parts, wholes, chosen, place))
            if "power" in parts:
                for run, whole in wholes.items():
                    outcome.tried([f"{run}: {problem}" for problem in out_of_order(whole.primitives)])
        total = Tried()
        jobs = [(number, trial, wholes[trial.run], place) for number, trial in enumerate(trials)]
        with multiprocessing.get_context("fork").Pool(min(chosen.jobs, len(jobs))) as pool:
            for tried in pool.imap_unordered(_work, jobs):
                outcome.tried(tried.problems, of=len(trials))
                total.kills += tried.kills
                total.interrupts += tried.interrupts
                total.refusals += tried.refusals
        outcome.figures |= {
            "kills": total.kills,
            "interrupts": total.interrupts,
            "refusals": total.refusals,
            "primitives": {run: len(whole.primitives) for run, whole in wholes.items()},
        }


def main(options: Sequence[str] | None = None) -> int:
    """Run the proof; return the exit code."""
    parser = arguments(__doc__ or "", TRIALS)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="some parts")
    parser.add_argument("--share", type=float, default=1.0, help="of the trials at every primitive, drawn by the seed")
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    parser.add_argument("--deaths", help="a run and what befalls its processes, as a failure tells it")
    chosen = parser.parse_args(options)
    outcome = Outcome("resume", chosen.seed)
    prove(outcome, chosen)
    return outcome.end()


if __name__ == "__main__":
    sys.exit(main())
