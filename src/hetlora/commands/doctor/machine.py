"""Checks of this machine: versions, processor, memory, disk."""

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

from hetlora.commands.doctor.findings import Diagnosis
from hetlora.config.preconditions import slow_dtype_warning
from hetlora.errors import HetLoraError, expand_path
from hetlora.model.lora_model import NANO, load_base
from hetlora.runs.folder import atomic_write, run_lock

__all__ = ["VERSIONS", "Version", "available_memory", "check_bundled_base", "check_machine"]


class Version(NamedTuple):
    """The versions of a package that hetlora accepts, and the one that this release was tested with."""

    accepted: str
    tested: str


VERSIONS = {
    "python": Version(">=3.11", "3.11"),
    "torch": Version(">=2.6", "2.13.0"),
    "transformers": Version(">=5,<6", "5.23.0"),
    "peft": Version(">=0.21,<0.22", "0.21.2"),
    "safetensors": Version(">=0.5", "0.8.0"),
    "flwr": Version(">=1.41,<1.43", "1.41.0"),
    "datasets": Version(">=4,<5", "4.8.5"),
}
"""A test compares them with pyproject.toml and constraints.txt, which are not installed."""

EXTRAS = {"flwr": "flower", "datasets": "data"}
"""Optional packages, with the extra that installs them."""

LITTLE_DISK, HARDLY_ANY_DISK = 2e9, 1e8
LITTLE_MEMORY = 1e9
"""Bytes; a process with torch and transformers holds about 0.4 · 10⁹ before it loads a model."""
SLOW_FSYNC = 1.0
"""Seconds. Every round waits for several fsyncs."""


def check_machine(found: Diagnosis, output: Path, dtype: torch.dtype | None = None, threads: int | None = None) -> None:
    """Check versions, processor, memory and disk.

    Args:
        found: Receives the findings.
        output: Folder of the runs.
        dtype: Of the base, if there is a configuration; a warning if this machine only emulates it.
        threads: Of the configuration.
    """
    for name in VERSIONS:
        _version(found, name)
    _processor(found, threads)
    devices = [f"cuda:{index} {_free(index)}" for index in range(torch.cuda.device_count())]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    found.note("accelerators", "; ".join(devices) or "none: runs are on the processor", "model.device")
    if dtype == torch.float32:
        found.note("half precision", "not used: model.dtype = 'float32'", "model.dtype")
    else:
        note = slow_dtype_warning(dtype or torch.bfloat16, torch.device("cpu"))
        value, _, way_out = (note or "nothing is known against it").partition("; ")
        found.note("half precision", value, "model.dtype", way_out, warn=note is not None and dtype is not None)
    free = available_memory()
    value = "the system does not say" if free is None else f"{free / 1e9:.1f} GB"
    little = free is not None and free < LITTLE_MEMORY
    way_out = "end other processes, or choose a small base"
    found.note("free memory", value, "memory_megabytes", way_out, warn=little)
    _disk(found, output)
    _cache(found)


def check_bundled_base(found: Diagnosis) -> None:
    """Load the base that comes with the package."""
    found.attempt("bundled base", NANO, lambda: load_base(NANO).num_parameters(), "{:,} parameters".format)


def _version(found: Diagnosis, name: str) -> None:
    from packaging.specifiers import SpecifierSet  # transformers needs it, too

    accepted, tested = VERSIONS[name]
    extra = name in EXTRAS
    way_out = f"pip install 'hetlora[{EXTRAS[name]}]'" if extra else "pip install --upgrade hetlora"
    if name == "python":
        way_out = "use such a Python"
    try:
        version = platform.python_version() if name == "python" else importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        value = f"not installed; {way_out}, should a run need it" if extra else "not installed"
        found.note(name, value, name, way_out, fail=not extra)
        return
    fits = SpecifierSet(accepted).contains(version, prereleases=True)
    value = version if fits else f"{version}, and hetlora takes {accepted}"
    value += "" if version.startswith(tested) else f" (tested with {tested})"
    found.note(name, value, name, way_out, warn=not fits, fail=not fits and not extra)


def _processor(found: Diagnosis, threads: int | None) -> None:
    # A container or a batch system may limit a process to some of the cores.
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    used, place = threads or torch.get_num_threads(), "threads" if threads else "OMP_NUM_THREADS"
    way_out = f"more threads than cores slow a run down; set {place} to {cores}"
    found.note("processor", f"{cores} cores, {used} threads", place, way_out, warn=used > cores)


def _free(index: int) -> str:
    free, total = torch.cuda.mem_get_info(index)
    return f"{torch.cuda.get_device_name(index)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process may still allocate: the minimum of free memory and all limits; None if unknown.

    Args:
        root: Folder of ``proc`` and ``sys``.
    """
    figures: list[int] = []
    information = _fields(root / "proc/meminfo")
    if "MemAvailable:" in information:
        figures.append(int(information["MemAvailable:"]) * 1024)
    group = root / "sys/fs/cgroup"
    for maximum, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, taken = _number(group / maximum), _number(group / used)
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


def _disk(found: Diagnosis, output: Path) -> None:
    """Try the file operations of a run in its folder, or in the closest existing parent; leave no files."""
    shown = str(output)
    try:
        output = expand_path(output, strict=True)
        there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
        with tempfile.TemporaryDirectory(prefix=".hetlora-doctor-", dir=there) as name:
            state = "can be written" if there == output else f"can be made in {str(there)!r}"
            found.note("output folder", f"{shown!r} {state}", "output")
            free = shutil.disk_usage(there).free
            way_out = "free some space, or set output to a folder with more"
            little, none = free < LITTLE_DISK, free < HARDLY_ANY_DISK
            found.note("disk", f"{free / 1e9:.1f} GB free", "output", way_out, warn=little, fail=none)
            _locks_and_fsync(found, Path(name))
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~ of an unknown user
        value = f"{shown!r} cannot be written: {getattr(error, 'strerror', None) or error}"
        found.note("output folder", value, "output", "set output to a folder you own", fail=True)
        found.skip("the output folder cannot be written", "disk", "locks", "fsync")


def _locks_and_fsync(found: Diagnosis, folder: Path) -> None:
    with run_lock(folder):
        try:
            # A lock belongs to an open file, so a second lock of this process is refused like one of another process.
            with run_lock(folder):
                kept_out = False
        except HetLoraError:
            kept_out = True
    value = "a second process is kept out" if kept_out else "this file system has none"
    way_out = "take care that two processes never go on with one run, or set output to a local disk"
    found.note("locks", value, "output", way_out, warn=not kept_out)
    began = time.monotonic()
    with atomic_write(folder / "file") as file:
        file.write(bytes(2**20))
    seconds = time.monotonic() - began
    way_out = "set output to a local disk, or raise checkpoint_every"
    found.note("fsync", f"{seconds * 1000:.0f} ms for a megabyte", "output", way_out, warn=seconds > SLOW_FSYNC)


def _cache(found: Diagnosis) -> None:
    from huggingface_hub import constants

    place, offline = Path(constants.HF_HUB_CACHE), constants.HF_HUB_OFFLINE
    there = next((folder for folder in (place, *place.absolute().parents) if folder.exists()), place)
    writable = offline or os.access(there, os.W_OK)
    state = ("" if there == place else ", not made yet") if writable else " cannot be written"
    value = f"{str(place)!r}{state}" + (", offline: only what is in it can be used" if offline else "")
    way_out = "set HF_HOME to a folder you own, should a run take a model of the hub"
    found.note("model cache", value, "HF_HOME", way_out, warn=not writable)
