"""Is this machine fit for a run: versions, processor, memory, disk."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from hetlora.commands.doctor.findings import Notes
from hetlora.config.preconditions import emulation_note
from hetlora.errors import HetLoraError
from hetlora.model.lora_model import NANO, load_base
from hetlora.runs.folder import alone_in, replacing

__all__ = ["VERSIONS", "Version", "available_memory", "look_at_bundled_base", "look_at_machine"]


class Version(NamedTuple):
    """Of a package: the versions that hetlora takes, and the one that this release was tested with."""

    accepted: str
    tested: str


VERSIONS = {
    "python": Version(">=3.10", "3.11"),
    "torch": Version(">=2.6", "2.13.0"),
    "transformers": Version(">=5,<6", "5.23.0"),
    "peft": Version(">=0.21,<0.22", "0.21.2"),
    "safetensors": Version(">=0.5", "0.8.0"),
    "flwr": Version(">=1.41,<1.43", "1.41.0"),
    "datasets": Version(">=4,<5", "4.8.5"),
}
"""A test holds them to pyproject.toml and constraints.txt, which are not installed."""

EXTRAS = {"flwr": "flower", "datasets": "data"}
"""Packages that only some runs need, with the extra that brings them."""

LITTLE_DISK, HARDLY_ANY_DISK = 2e9, 1e8
LITTLE_MEMORY = 1e9
"""Bytes: a process with torch and transformers holds some 0.4 · 10⁹ before it has loaded anything."""
SLOW_FSYNC = 1.0
"""Seconds. Every round waits for a few."""


def look_at_machine(notes: Notes, output: Path, dtype: torch.dtype | None = None, threads: int | None = None) -> None:
    """Look at versions, processor, memory and disk.

    Args:
        notes: Take what is found.
        output: Where runs are written.
        dtype: Of the base, where there is a configuration: one that is only emulated is then worth a warning.
        threads: Of the configuration.
    """
    _versions(notes)
    _processor(notes, threads)
    _accelerators(notes)
    _half_precision(notes, dtype)
    _memory(notes)
    _disk(notes, output)
    _cache(notes)


def look_at_bundled_base(notes: Notes) -> None:
    """Load the base that comes with the package."""
    base = notes.attempt("bundled base", NANO, lambda: load_base(NANO))
    if base is not None:
        notes.ok("bundled base", f"{base.num_parameters():,} parameters", NANO)


# Versions -----------------------------------------------------------------------------------------------------------


def _versions(notes: Notes) -> None:
    from packaging.specifiers import SpecifierSet  # transformers needs it, too

    for name, (accepted, tested) in VERSIONS.items():
        way_out = f"pip install 'hetlora[{EXTRAS[name]}]'" if name in EXTRAS else "pip install --upgrade hetlora"
        try:
            version = platform.python_version() if name == "python" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in EXTRAS:
                notes.ok(name, f"not installed; {way_out}, should a run need it", name)
            else:
                notes.fail(name, "not installed", name, way_out)
            continue
        if SpecifierSet(accepted).contains(version, prereleases=True):
            notes.ok(name, version if version.startswith(tested) else f"{version} (tested with {tested})", name)
        elif name == "python":
            notes.fail(name, f"{version}, and hetlora takes {accepted}", name, "use such a Python")
        else:
            note = notes.warn if name in EXTRAS else notes.fail
            note(name, f"{version}, and hetlora takes {accepted} (tested with {tested})", name, way_out)


# Processors and memory ----------------------------------------------------------------------------------------------


def _processor(notes: Notes, threads: int | None) -> None:
    # A container or a batch system may leave a process fewer cores than the machine has.
    own = getattr(os, "sched_getaffinity", None)
    cores = len(own(0)) if own is not None else os.cpu_count() or 1
    used = threads or torch.get_num_threads()
    value = f"{cores} cores, {used} threads"
    if used > cores:
        place = "threads" if threads else "OMP_NUM_THREADS"
        notes.warn("processor", value, place, f"more threads than cores slow a run down; set {place} to {cores}")
    else:
        notes.ok("processor", value, "threads")


def _accelerators(notes: Notes) -> None:
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(f"cuda:{index} {torch.cuda.get_device_name(index)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    if torch.backends.mps.is_available():
        found.append("mps")
    notes.ok("accelerators", "; ".join(found) or "none: runs are on the processor", "model.device")


def _half_precision(notes: Notes, dtype: torch.dtype | None) -> None:
    if dtype == torch.float32:
        notes.ok("half precision", "not used: model.dtype = 'float32'", "model.dtype")
        return
    note = emulation_note(dtype or torch.bfloat16, torch.device("cpu"))
    if note is None:
        notes.ok("half precision", "nothing is known against it", "model.dtype")
    elif dtype is None:
        notes.ok("half precision", note, "model.dtype")
    else:
        value, _, way_out = note.partition("; ")
        notes.warn("half precision", value, "model.dtype", way_out)


def _memory(notes: Notes) -> None:
    free = available_memory()
    if free is None:
        notes.ok("free memory", "the system does not say", "memory_megabytes")
    elif free < LITTLE_MEMORY:
        notes.warn(
            "free memory", f"{free / 1e6:.0f} MB", "memory_megabytes", "end other processes, or choose a small base"
        )
    else:
        notes.ok("free memory", f"{free / 1e9:.1f} GB", "memory_megabytes")


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process may still take: the least of what the system has free and what limits leave.

    Args:
        root: Where ``proc`` and ``sys`` are.

    Returns:
        None where the system does not say.
    """
    figures: list[int] = []
    information = _fields(root / "proc/meminfo")
    if "MemAvailable:" in information:
        figures.append(int(information["MemAvailable:"]) * 1024)
    group = root / "sys/fs/cgroup"
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, taken = _number(group / most), _number(group / used)
        if limit is not None and taken is not None:
            figures.append(limit - taken)
    if sys.platform != "win32":
        import resource

        held = int(_fields(root / "proc/self/status").get("VmSize:", "0")) * 1024
        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            figures.append(soft - held)
        if not figures and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            figures.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(figures)) if figures else None


def _fields(path: Path) -> dict[str, str]:
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: words[1] for words in lines if len(words) > 1}


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max" where there is no limit
        return None


# Disk ---------------------------------------------------------------------------------------------------------------


def _disk(notes: Notes, output: Path) -> None:
    """Try in the folder itself, or where it would be made, what a run does in it; nothing is left there."""
    shown = str(output)
    try:
        output = output.expanduser()
        there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
        with tempfile.TemporaryDirectory(prefix=".hetlora-doctor-", dir=there) as name:
            state = "can be written" if there == output else f"can be made in {str(there)!r}"
            notes.ok("output folder", f"{shown!r} {state}", "output")
            _space(notes, there)
            _locks(notes, Path(name))
            _fsync(notes, Path(name))
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~ of an unknown user
        reason = getattr(error, "strerror", None) or error
        notes.fail(
            "output folder", f"{shown!r} cannot be written: {reason}", "output", "set output to a folder you own"
        )
        notes.skip("the output folder cannot be written", "disk", "locks", "fsync")


def _space(notes: Notes, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    value, way_out = f"{free / 1e9:.1f} GB free", "free some space, or set output to a folder with more"
    if free < HARDLY_ANY_DISK:
        notes.fail("disk", value, "output", way_out)
    elif free < LITTLE_DISK:
        notes.warn("disk", value, "output", way_out)
    else:
        notes.ok("disk", value, "output")


def _locks(notes: Notes, folder: Path) -> None:
    with alone_in(folder):
        try:
            # A lock belongs to who opened the file, so that this is kept out as another process would be.
            with alone_in(folder):
                kept_out = False
        except HetLoraError:
            kept_out = True
    if kept_out:
        notes.ok("locks", "a second process is kept out", "output")
    else:
        way_out = "take care that two processes never go on with one run, or set output to a local disk"
        notes.warn("locks", "this file system has none", "output", way_out)


def _fsync(notes: Notes, folder: Path) -> None:
    began = time.monotonic()
    with replacing(folder / "file") as file:
        file.write(bytes(2**20))
    seconds = time.monotonic() - began
    if seconds > SLOW_FSYNC:
        way_out = "set output to a local disk, or raise checkpoint_every"
        notes.warn("fsync", f"{seconds:.1f} s for a megabyte", "output", way_out)
    else:
        notes.ok("fsync", f"{seconds * 1000:.0f} ms for a megabyte", "output")


def _cache(notes: Notes) -> None:
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE)
    there = next((folder for folder in (place, *place.absolute().parents) if folder.exists()), place)
    offline = ", offline: only what is in it can be used" if constants.HF_HUB_OFFLINE else ""
    if constants.HF_HUB_OFFLINE or os.access(there, os.W_OK):
        state = "" if there == place else ", not made yet"
        notes.ok("model cache", f"{str(place)!r}{state}{offline}", "HF_HOME")
    else:
        way_out = "set HF_HOME to a folder you own, should a run take a model of the hub"
        notes.warn("model cache", f"{str(place)!r} cannot be written", "HF_HOME", way_out)
