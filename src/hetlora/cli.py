"""The command line: ``hetlora run CONFIG`` and others. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetlora import __version__
from hetlora.errors import HetLoraError

if TYPE_CHECKING:
    from hetlora.adapter import Rank
    from hetlora.config import RunConfig
    from hetlora.result import Measurement, RunResult

__all__ = ["main"]

NOTHING_LEARNED, SOME_FAILED, BAD_INPUT, INTERRUPTED = 1, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0, 1 if nothing was learned or a run failed, 2 for bad input, 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a character that its encoding lacks is no reason to lose the result
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except HetLoraError as error:
        print(f"hetlora: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("hetlora: interrupted before there was a result", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hetlora",
        description="HetLoRA: federated fine-tuning of language models with a LoRA rank for every client.",
    )
    parser.add_argument("--version", action="version", version=f"hetlora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = _on_a_file(
        commands, "run", _run, "run a federation from its TOML file",
        "Measure the base, do the rounds, measure the result, write the adapter as PEFT files. Every key of the file is in "
        "docs/configuration.md.",
    )  # fmt: skip
    run.add_argument("--quiet", action="store_true", help="show no progress")

    resume = commands.add_parser(
        "resume", help="go on with a run that was killed or interrupted",
        description="Go on with a run from its newest checkpoint. It ends with the same adapter, bit for bit, as if nothing "
        "had happened. Its configuration, base and data must be those it began with. A complete run is told again.",
    )  # fmt: skip
    resume.add_argument("run", type=Path, metavar="RUN", help="the run's folder, which is where its records.jsonl is")
    resume.add_argument("--json", action="store_true", help="print what run --json prints")
    resume.add_argument("--quiet", action="store_true", help="show no progress")
    resume.set_defaults(command=_resume)

    compare = _on_a_file(
        commands, "compare", _compare, "run several methods over several seeds and write one table",
        "Tune each method of [compare] on a validation split, run it over the seeds, and write one table as Markdown, CSV and "
        "LaTeX. Called again, it goes on where it was stopped. Exits with 1 if a run failed. examples/compare_stdlib.toml "
        "shows a file.",
    )  # fmt: skip
    compare.add_argument("--jobs", type=int, metavar="N", help="runs at a time, instead of compare.jobs")
    compare.add_argument("--quiet", action="store_true", help="show no progress")

    data = _on_a_file(
        commands, "data", _data, "show what each client would hold, before anything is trained",
        "Read and divide the data of a run, and show what each client would hold: rows, tokens, labels. Needs the model's "
        "tokenizer, not its weights.",
    )  # fmt: skip
    by = "count rows by this field, or by their 'length'; by default what partition.by names"
    data.add_argument("--by", metavar="FIELD", help=by)
    data.add_argument("--all", action="store_true", help="show every client, however many they are")
    data.add_argument("--svg", type=Path, metavar="FILE", help="write the picture to this file, too")

    plan = _on_a_file(
        commands, "plan", _plan, "say what a run will cost, tier by tier, before it runs",
        "Say what a run will cost a client of each tier and in all: parameters, bytes, FLOPs and peak training memory, beside "
        "full fine-tuning. Nothing is trained, and the base's weights are not read; see docs/costs.md.",
    )  # fmt: skip
    bound = "take every row as data.max_length long and all its tokens as scored, instead of tokenizing the rows"
    plan.add_argument("--bound", action="store_true", help=bound)

    methods = commands.add_parser(
        "methods", help="list the methods", description="List the methods with their references."
    )
    methods.add_argument("--json", action="store_true", help="print a list of objects")
    methods.set_defaults(command=_methods)
    return parser


def _on_a_file(
    commands: Any, name: str, command: Callable[[argparse.Namespace], int], summary: str, description: str
) -> argparse.ArgumentParser:
    """Add a command that takes a run's file, changes to it, and can print JSON."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=description)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the run's TOML file; examples/ shows some")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
        help="change a key of the file, e.g. --set federation.rounds=5; KEY= takes a key away; repeat for more",
    )  # fmt: skip
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on standard output, and nothing else there"
    )
    parser.set_defaults(command=command)
    return parser


def _prepare(options: argparse.Namespace) -> RunConfig:
    """Set this process up before torch is imported, and read the run."""
    from hetlora.process import prepare_process, quiet_transformers

    prepare_process()
    from hetlora.config import load_config

    config = load_config(options.config, options.changes)
    quiet_transformers()
    return config


def _run(options: argparse.Namespace) -> int:
    config = _prepare(options)
    from hetlora.display import choose_display
    from hetlora.experiment import Experiment

    with _writing(config.output):
        result = Experiment(config, choose_display(quiet=options.quiet)).run()
    return _tell(result, options)


def _resume(options: argparse.Namespace) -> int:
    from hetlora.run_folder import finished

    if (summary := finished(options.run)) is not None:
        if options.json and not options.quiet:
            print(f"{options.run} is complete", file=sys.stderr)
        print(json.dumps(summary) if options.json else _describe_finished(options.run, summary))
        return 0
    from hetlora.process import prepare_process, quiet_transformers

    prepare_process()
    from hetlora.display import choose_display
    from hetlora.experiment import resume

    quiet_transformers()
    with _writing(str(options.run)):
        result = resume(options.run, choose_display(quiet=options.quiet))
    return _tell(result, options)


def _tell(result: RunResult, options: argparse.Namespace) -> int:
    """Print a result; return the exit code."""
    if options.json:
        print(json.dumps(result.summary()))
    else:
        print(_describe(result))
    if result.interrupted:
        return INTERRUPTED
    if result.rounds and not result.updates:
        print("hetlora: no client ever gave an update; the records say why, client by client", file=sys.stderr)
        return NOTHING_LEARNED
    return 0


@contextlib.contextmanager
def _writing(output: str) -> Iterator[None]:
    """Turn what a full disk or a lost folder raises, from Python or from safetensors, into an error that says so."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise HetLoraError(
            f"cannot write to {output!r}: {error}; free some space, or set output to a folder with enough"
        ) from error


_KINDS = {"adapter": "adapter (PEFT):", "adapters": "PEFT, by client:", "model": "merged model:"}


def _data(options: argparse.Namespace) -> int:
    config = _prepare(options)
    from hetlora.preview import preview
    from hetlora.preview_picture import print_preview, svg

    shown = preview(config, options.by)
    if options.svg is not None:
        try:
            options.svg.write_text(svg(shown, every=options.all), encoding="utf8")
        except OSError as error:
            raise HetLoraError(
                f"cannot write --svg {options.svg}: {error.strerror}; give a file you may write"
            ) from error
    if options.json:
        print(json.dumps(shown.summary()))
    else:
        print_preview(shown, sys.stdout, every=options.all)
    return 0


def _plan(options: argparse.Namespace) -> int:
    config = _prepare(options)
    from hetlora.plan import make_plan

    plan = make_plan(config, bound=options.bound)
    print(json.dumps(plan.summary()) if options.json else plan.table())
    return 0


def _compare(options: argparse.Namespace) -> int:
    from hetlora.process import prepare_process, quiet_transformers

    prepare_process()
    from hetlora.compare.plan import load_comparison

    comparison = load_comparison(options.config, options.changes, options.jobs)
    from hetlora.compare.comparison import compare
    from hetlora.compare.display import CompareDisplay
    from hetlora.compare.forms import print_table

    quiet_transformers()
    try:
        with _writing(str(comparison.folder)):
            result = compare(comparison, CompareDisplay(quiet=options.quiet))
    except KeyboardInterrupt:
        print("hetlora: interrupted; finished runs are kept, and the same command goes on", file=sys.stderr)
        return INTERRUPTED
    if options.json:
        print(json.dumps(result.summary()))
    else:
        print_table(result.rows, result.notes, result.results, sys.stdout)
        print(f"tables and raw figures: {result.folder}")
    return SOME_FAILED if result.failed else 0


def _describe(result: RunResult) -> str:
    """Say a result for a person: the two measurements, one answer before and after, and where things are."""
    scores = _describe_scores(result.base, result.final) if result.final is not None else []
    ranks = f"; clients by rank now: {_rank_counts(result.ranks.values())}" if result.ranks else ""
    peak = f", {result.peak_megabytes:.0f} MB of memory at most" if result.peak_megabytes else ""
    ending = [
        f"{result.rounds} rounds, {result.prunes} prunes{ranks}",
        f"{result.bytes_up / 1e6:.1f} MB up, {result.bytes_down / 1e6:.1f} MB down, {result.seconds:.0f} s{peak}",
        *([f"{_KINDS[result.adapter.name]:<15} {result.adapter}"] if result.adapter else []),
        f"{'records:':<15} {result.records}",
    ]
    return "\n".join([*scores, *ending])


def _describe_finished(folder: Path, summary: Mapping[str, Any]) -> str:
    """Say the result of a run that was complete already, as far as its summary has it."""
    before, after = (summary.get(key) or {} for key in ("base", "final"))
    lines = [f"{folder} is complete: {summary.get('rounds')} rounds, {summary.get('prunes')} prunes"]
    lines.append(f"held-out perplexity {_change(before.get('perplexity'), after.get('perplexity'))}")
    adapter = summary.get("adapter")
    if adapter:
        lines.append(f"{_KINDS[Path(adapter).name]:<15} {adapter}")
    return "\n".join([*lines, f"{'records:':<15} {summary.get('records')}"])


def _methods(options: argparse.Namespace) -> int:
    from hetlora.catalogue import catalogue
    from hetlora.methods import METHODS

    entries = catalogue(METHODS)
    if options.json:
        print(json.dumps([entry._asdict() for entry in entries], ensure_ascii=False))
        return 0
    for entry in entries:
        print(f"{entry.name:<12} {entry.line}")
        print(f"{'':<12} {entry.reference}")
    return 0


def _describe_scores(before: Measurement, after: Measurement) -> list[str]:
    was, now = before.overall, after.overall
    lines = [f"held-out perplexity {_change(was.perplexity, now.perplexity)}"]
    if now.rouge_l is not None:
        lines.append(f"ROUGE-L {_change(was.rouge_l, now.rouge_l)}")
    lines += [
        f"  tier of rank {tier}: perplexity {_change(before.tiers[tier].perplexity, score.perplexity)}"
        for tier, score in after.tiers.items()
    ]
    if after.answers:
        first, last = before.answers[0], after.answers[0]
        told = {"expected": first.expected, "before": first.text, "after": last.text}
        lines += ["", f"one prompt ({first.client}):", *(f"  | {line}".rstrip() for line in first.prompt.splitlines())]
        lines += [f"  {name + ':':<9} {' '.join(text.split()) or '(nothing)'}" for name, text in told.items()]
    return [*lines, ""]


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "not measured"
    return f"{before:.2f} -> {after:.2f}" + (f" ({after / before - 1:+.1%})" if before else "")


def _rank_counts(ranks: Iterable[Rank]) -> str:
    """Say how many clients have which rank, widest last; a client with a rank a module counts by its largest."""
    counts = Counter(rank if isinstance(rank, int) else max(rank.values()) for rank in ranks)
    return ", ".join(f"{count} at {rank}" for rank, count in sorted(counts.items()))


if __name__ == "__main__":
    sys.exit(main())
