"""Commands on the docs pages: which ones run, which are only checked, and how."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tomllib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hetlora import cli

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]

ONLY_READ: Mapping[str, str] = {
    "hetlora report runs/stdlib": "needs a comparison, which takes minutes; tests/test_report.py writes its page",
    "hetlora compare": "takes minutes; tests/test_compare.py runs smaller ones",
    "hetlora reproduce ": "takes an hour; tests/test_reproduce.py runs the smallest study, and makes the tables of all again",
    "hetlora run mine.toml --set memory_megabytes": "traces the base for many seconds; tests/test_memory.py does the same",
    "hetlora run examples/demo.toml --set memory_megabytes": "the same",
    "hetlora doctor": "takes a minute; tests/test_doctor.py runs it",
    "hetlora plan examples/demo.toml": "is run by tests/test_readme.py, which compares what docs/costs.md shows",
    "hetlora export runs/demo --tier 4 --scores": "needs the whole demonstration; tests/test_readme.py compares what is shown",
    "hetlora generate runs/demo --tier 4": "the same",
    "hetlora demo": "takes half a minute; tests/test_new.py runs it",
    "hetlora base build/SmolLM2": "needs the network; tests/test_gguf.py runs it on files that it makes",
    "hetlora export runs/smollm2": "needs make smollm2, which needs the network; tests/test_gguf.py exports a smaller run",
    "llama-cli": "a program of llama.cpp; tests/test_gguf.py runs the same by its wheel",
    "ollama": "another program, which is not installed here",
    "uv pip install": "needs the network",
    "pip install": "needs the network: the extras are looked up",
    "tensorboard": "stays until it is killed; tests/test_tracking.py reads what it would show",
    "python -m": "makes an environment: the module is looked up",
    ". .venv/bin/activate": "is of the environment that was not made",
    "export FLWR_": "is for other processes: the variables are those that the package and the proofs set",
    "make": "takes minutes: the target is looked up",
    "hetlora flower superlink": "stays until it is killed; tests/test_flower_processes.py starts it by this very line",
    "flower-supernode": "needs a SuperLink; tests/test_flower_processes.py starts it by this very line",
    "hetlora flower local": "starts processes for minutes; tests/test_flower_first_steps.py runs it",
    "hetlora client check": "needs the run.toml of a federation; tests/test_client_check.py runs it",
    "flwr supernode register": "needs a SuperLink; tests/test_flower_processes.py gives this command",
    "flwr run": "needs a SuperLink; tests/test_flower_processes.py gives this command",
}
"""Commands, by how they begin, that the tests of the pages read and do not run, and why."""

TAKEN_BY_HAND = (
    "hetlora base build/SmolLM2",
    "make demo",
    "hetlora plan examples/demo.toml",
    "hetlora export runs/demo --tier 4 --scores",
    "hetlora generate runs/demo --tier 4",
    "hetlora run mine.toml --set memory_megabytes",
    "hetlora run examples/demo.toml --set memory_megabytes",
)
"""Of these a page shows what they have printed, though they are only read here."""

RUN_BY_A_SHELL = ("openssl", "printf", "ssh-keygen")
"""Programs that make files; where they are not installed they are not run."""


def only_read(command: str) -> str | None:
    """Return how a command begins that is only read; None for one that is run."""
    return next((begins for begins in ONLY_READ if command.startswith(begins)), None)


def check_command(command: str, words: Sequence[str], folder: Path, *, run: bool = True) -> str | None:
    """Check a command that is not hetlora's, or only read; return None for one of hetlora's that is to be run.

    Args:
        command: As it stands on the page.
        words: The same, as a shell divides it.
        folder: Where it would be run.
        run: Whether programs that make files are run.
    """
    program = words[0]
    if only_read(command) is None:
        if program == "hetlora":
            return None
        if program == "cd":
            assert not run or (folder / words[1]).is_dir(), command
            return "run"
        assert program in RUN_BY_A_SHELL, f"{command}: neither run nor listed in ONLY_READ"
        if run and shutil.which(program):
            subprocess.run(["sh", "-ec", command], cwd=folder, check=True, capture_output=True)
        return "run"
    # `...` and `…` stand for what a page leaves out.
    CHECKS[program]([word for word in words[1:] if word not in ("...", "…")])
    return "read only"


def _hetlora(arguments: Sequence[str]) -> None:
    options = cli._parser().parse_args(arguments)
    if "forwarded" in options:
        _superlink(options.forwarded)


def _make(arguments: Sequence[str]) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text("utf8"), flags=re.MULTILINE))
    assert set(arguments) <= targets, arguments


def _pip(arguments: Sequence[str]) -> None:
    assert arguments[0] == "install"
    for wanted in arguments[1:]:
        if found := re.fullmatch(r"(?:hetlora|\.)\[([\w,]+)\]", wanted):
            assert set(found[1].split(",")) <= PROJECT["optional-dependencies"].keys(), wanted
        else:
            assert wanted in ("--no-cache-dir", ".", "uv") or re.match(r"torch(==|$)", wanted), wanted


def _uv(arguments: Sequence[str]) -> None:
    assert arguments == ["pip", "install", "torch", "--torch-backend", "cpu"]


def _python(arguments: Sequence[str]) -> None:
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]) is not None, arguments


def _export(arguments: Sequence[str]) -> None:
    set_by_the_package = (ROOT / "src/hetlora/flower/simulation.py").read_text("utf8")
    for name, value in (argument.split("=") for argument in arguments):
        assert f'"{name}": "{value}"' in set_by_the_package, name


def _flwr(arguments: Sequence[str]) -> None:
    import click

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Flower 1.41's own, in the words of typer
        from flwr.cli.app import app
        from typer.main import get_command

        command: Any = get_command(app)
        context, rest = click.Context(command, info_name="flwr"), list(arguments)
        while isinstance(command, click.Group):
            name, found, rest = command.resolve_command(context, rest)
            assert found is not None, name
            command, context = found, click.Context(found, info_name=name, parent=context)
        command.make_context("flwr", rest, parent=context.parent)


def _superlink(arguments: Sequence[str]) -> None:
    from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink

    _parse_args_run_superlink().parse_args(arguments)


def _supernode(arguments: Sequence[str]) -> None:
    from flwr.common.config import parse_config_args
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    from hetlora.flower.node_config import NodeConfig

    options = _parse_args_run_supernode().parse_args(arguments)
    NodeConfig.read(parse_config_args([options.node_config]))


def _nothing(_: Sequence[str]) -> None:
    """Of another program nothing is known here."""


CHECKS: Mapping[str, Callable[[Sequence[str]], None]] = {
    "hetlora": _hetlora,
    "make": _make,
    "pip": _pip,
    "uv": _uv,
    "python": _python,
    "export": _export,
    "flwr": _flwr,
    "flower-supernode": _supernode,
    ".": _nothing,
    "tensorboard": _nothing,
    "llama-cli": _nothing,
    "ollama": _nothing,
}
