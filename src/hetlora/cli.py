"""The command line: ``hetlora run CONFIG``. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hetlora.errors import HetLoraError

if TYPE_CHECKING:
    from hetlora.experiment import RunResult

__all__ = ["main"]

BAD_INPUT, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except HetLoraError as error:
        print(f"hetlora: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("hetlora: interrupted before the first round; there is nothing to keep", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hetlora",
        description="HetLoRA: federated fine-tuning of language models with a LoRA rank for every device.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="run a federation from its TOML file",
        description="Run a federation: measure the base, do the rounds, measure the result, write the adapter as PEFT files.",
    )
    run.add_argument("config", type=Path, metavar="CONFIG", help="the run's TOML file; examples/demo.toml shows one")
    run.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
        help="change a key of the file, e.g. --set federation.rounds=5 (again for more)",
    )  # fmt: skip
    run.add_argument("--json", action="store_true", help="print one JSON object with the result, and nothing else")
    run.add_argument("--quiet", action="store_true", help="show no progress")
    run.set_defaults(command=_run)
    return parser


def _run(options: argparse.Namespace) -> int:
    from hetlora.config import load_config

    config = load_config(options.config, options.changes)
    _keep_freed_memory()
    from transformers.utils import logging

    from hetlora.display import choose_display
    from hetlora.experiment import Experiment

    logging.disable_progress_bar()  # a bar of its own would break ours
    logging.set_verbosity_error()
    result = Experiment(config, choose_display(quiet=options.quiet)).run()
    if options.json:
        print(json.dumps(result.summary(), ensure_ascii=False))
    else:
        print(_describe(result))
    return INTERRUPTED if result.interrupted else 0


def _describe(result: RunResult) -> str:
    """Say a result for a person: the two measurements, one answer before and after, and where things are."""
    before, after = result.base, result.final
    lines = []
    if after is not None and after.overall.perplexity and before.overall.perplexity:
        change = 1 - after.overall.perplexity / before.overall.perplexity
        lines += [
            "",
            f"held-out perplexity {before.overall.perplexity:.2f} -> {after.overall.perplexity:.2f} ({-change:+.1%})",
        ]
        if after.overall.rouge_l is not None and before.overall.rouge_l is not None:
            lines.append(f"ROUGE-L {before.overall.rouge_l:.1f} -> {after.overall.rouge_l:.1f}")
        for tier, score in after.tiers.items():
            was = before.tiers[tier].perplexity or float("nan")
            lines.append(f"  tier of rank {tier}: perplexity {was:.2f} -> {score.perplexity or float('nan'):.2f}")
        if after.answers:
            first, last = before.answers[0], after.answers[0]
            lines += ["", f"one prompt ({first.client}):", *_indent(first.prompt)]
            lines += [f"  expected: {first.expected}", f"  before:   {first.text}", f"  after:    {last.text}"]
    ranks = sorted({json.dumps(rank) for rank in result.ranks.values()}, key=len)
    lines += [
        "",
        f"{result.rounds} rounds, {result.prunes} prunes, ranks now {', '.join(ranks)}",
        f"{result.bytes_up / 1e6:.1f} MB up, {result.bytes_down / 1e6:.1f} MB down, {result.seconds:.0f} s",
        f"adapter (PEFT): {result.adapter}",
        f"records:        {result.records}",
    ]
    return "\n".join(lines)


def _indent(text: str) -> list[str]:
    return [f"  | {line}" for line in text.splitlines()]


def _keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for itself.

    Otherwise it maps every block over 32 MiB afresh and each page is faulted in anew, which costs a training step up to a
    third of its time. Elsewhere than on glibc there is nothing to do.
    """
    if not sys.platform.startswith("linux"):
        return
    trim_threshold, mmap_threshold, large = -1, -3, 2**31 - 1
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(mmap_threshold, large)
        libc.mallopt(trim_threshold, large)


if __name__ == "__main__":
    sys.exit(main())
