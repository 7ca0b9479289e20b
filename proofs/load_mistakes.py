"""Two parts of `proofs.load`: the mistakes that people make, and a full disk under the SuperLink's database."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from hetlora.errors import HetLoraError
from proofs.federation import Federation, free_port, key
from proofs.flower import app, node_config, rounds_of, start
from proofs.load_figures import Found

__all__ = ["disk", "refused"]

SAYS = 60.0
"""Seconds within which a mistake must be answered."""

TRACEBACK = "Traceback (most recent call last)"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
SHOWN = 400

DISK = 30
"""Megabytes of the disk that becomes full."""

NAMESPACE = ("unshare", "--map-root-user", "--mount", "sh", "-c")


def refused(folder: Path, found: Found, *, short: bool) -> None:
    """Make each mistake once, and note what each side shows of it."""
    shown: dict[str, dict[str, str]] = {}
    found.figures["shown"] = shown
    certificate = "subjectAltName=DNS:server.example.org,IP:127.0.0.1"
    faults = {
        "an expired certificate": (("-days 825", "-days -1"), "expired"),
        "a certificate for another host": ((certificate, "subjectAltName=DNS:other.example.org"), "match|not valid for"),
    }
    for number, (mistake, (fault, reason)) in enumerate(faults.items()):
        place = folder / f"certificate-{number}"
        place.mkdir()
        with Federation(place, fault) as federation:
            key(place / "ana")
            federation.node("ana", 'data="rows.jsonl" name="ana" rank=8')
            shown[mistake] = {
                "flwr": _said(federation, "list", "here"),
                "node": _logged(federation, "ana", reason),
                "superlink": federation.log("superlink")[-SHOWN:],
            }
            _judge(found, mistake, shown[mistake], {"flwr": reason, "node": reason})
    _of_a_run(folder, found, shown, short=short)


def _of_a_run(folder: Path, found: Found, shown: dict[str, dict[str, str]], *, short: bool) -> None:
    """Make the mistakes for which there is a SuperLink that works."""

    del short


def _said(federation: Federation, *command: str) -> str:
    """Return what a command of Flower's prints, whether or not it fails."""
    try:
        return COLOUR.sub("", federation.flwr(*command))
    except (HetLoraError, subprocess.TimeoutExpired) as error:
        return COLOUR.sub("", str(error))


def _logged(*_: object) -> str:
    return ""


def _judge(*_: object) -> None: ...


def disk(folder: Path, found: Found, *, short: bool) -> None:
    """."""
