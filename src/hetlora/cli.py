# PYTHON_ARGCOMPLETE_OK
"""The command line: ``hetlora run CONFIG`` and others. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import codecs
import difflib
import errno
import importlib.util
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hetlora._version import __version__
from hetlora.errors import ConfigError, HetLoraError

if TYPE_CHECKING:
    from hetlora.config import RunConfig
    from hetlora.runs.result import RunResult

__all__ = ["main"]

NOTHING_LEARNED, SOME_FAILED, BAD_INPUT, INTERRUPTED, CLOSED_PIPE = 1, 1, 2, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0, 1 if nothing was learned or a run failed, 2 for bad input, 130 after Ctrl-C."""
    _make_writable()
    try:
        code = _execute(arguments)
    except HetLoraError as error:
        print(f"hetlora: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as interrupt:
        return _interrupted(str(interrupt))
    except BrokenPipeError:
        # The reader has closed the pipe, e.g. `| head`; the flush at exit goes to devnull.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return CLOSED_PIPE
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:  # what writes files explains its own errors
            raise
        print(f"hetlora: standard output cannot be written: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return BAD_INPUT
    except Exception as error:
        # Pydantic's core builds validators when the configuration is imported; there Ctrl-C becomes an error of its own.
        if type(error).__name__ == "SchemaError" and "KeyboardInterrupt" in str(error):
            return _interrupted()
        raise
    else:
        return code


def _execute(arguments: Sequence[str] | None) -> int:
    """Run one command; return its exit code."""
    try:
        parser = _parser()
        arguments = _habitual(sys.argv[1:] if arguments is None else arguments)
        if "_ARGCOMPLETE" in os.environ:  # a shell asks what could come next
            import argcomplete

            argcomplete.autocomplete(parser)
        options = parser.parse_args(arguments)
        return int(options.command(options))
    finally:
        sys.stdout.flush()  # here, where a reader that has gone is no traceback; --help ends here, too


def _habitual(arguments: Sequence[str]) -> Sequence[str]:
    """Return the arguments with what other programs call `help COMMAND` and `version` as the options they are here.

    Example:
        >>> _habitual(["help", "run"]), _habitual(["version"]), _habitual(["run", "help"])
        (['run', '--help'], ['--version'], ['run', 'help'])
    """
    match list(arguments):
        case ["help", *command]:
            return [*command, "--help"]
        case ["version"]:
            return ["--version"]
    return arguments


def _make_writable() -> None:
    """Let standard output and error take whatever is printed: where they are closed, or their encoding lacks a character."""
    if sys.stdout is None:  # closed by whoever started this process
        sys.stdout = Path(os.devnull).open("w", encoding="utf8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf8")  # noqa: SIM115
    codecs.register_error("hetlora", _spell_out)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape", "backslashreplace"):
            stream.reconfigure(errors="hetlora")


SPELLED = {
    "…": "...", "—": "-", "–": "-", "−": "-", "·": "*", "×": "x", "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "±": "+/-",
    "‖": "||", "√": "sqrt", "Σ": "Sum", "Δ": "Delta", "α": "alpha", "β": "beta", "γ": "gamma", "η": "eta", "λ": "lambda",
    "μ": "mu", "ρ": "rho", "σ": "sigma", "τ": "tau", "▚": "+", "▞": "+", "░": ".", "▒": "+", "▓": "*", "█": "#",
    "━": "-", "─": "-", "│": "|", "╸": "-", "╺": "-", "•": "*", "’": "'", "‘": "'", "“": '"', "”": '"',
}  # fmt: skip
"""Characters of our own texts that an encoding such as ASCII lacks, in words or signs that it has."""


def _spell_out(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that an encoding lacks by signs that say the same, and others by their escapes: names stay exact."""
    assert isinstance(error, UnicodeEncodeError)
    missing = error.object[error.start : error.end]
    return "".join(SPELLED.get(sign) or ascii(sign)[1:-1] for sign in missing), error.end


def _interrupted(how: str = "") -> int:
    print(f"hetlora: {how or 'interrupted before there was a result'}", file=sys.stderr)
    return INTERRUPTED


class _Parser(argparse.ArgumentParser):
    """Says which command was meant by one that there is not, and how what it does not take is given.

    Args:
        forwards: For a command that starts another program: what that program is given, in `forwarded`, is all that is not
            the command's own, and the function prints that program's help below the command's.
        **settings: Of `argparse.ArgumentParser`.
    """

    def __init__(self, *, forwards: Callable[[], None] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self._forwards = forwards

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is left over here, where the error names the command, and not the program alone."""
        if self._forwards:
            args, forwarded = self._divided(args)
        found, left = super().parse_known_args(args, namespace)
        if self._forwards:
            found.forwarded = forwarded
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}{self._meant(*left)}")
        return found, left

    def _divided(self, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return the arguments of this command, whose options have one value at most, and those of the other program."""
        own: list[str] = []
        other: list[str] = []
        left = list(arguments)
        while left:
            name, equals, _ = (argument := left.pop(0)).partition("=")
            action = self._option_string_actions.get(name)
            (other if action is None else own).append(argument)
            if action is not None and action.nargs != 0 and not equals and left:
                own.append(left.pop(0))
        return own, other

    def print_help(self, file: Any = None) -> None:
        """Print the help of this command, and that of the program that it starts."""
        super().print_help(file)
        if self._forwards:
            self._forwards()

    def _meant(self, argument: str, *after: str) -> str:
        """Return how an argument is given that has no place in this command: a key of the run, or rows."""
        if not argument.startswith("-"):
            return f"; give rows as --data {argument}" if "--data" in self._option_string_actions else ""
        if "--set" not in self._option_string_actions:
            return ""
        from hetlora.config.sections import keys_called

        name, _, value = argument.removeprefix("--").replace("-", "_").partition("=")
        keys = keys_called(name)
        return f"; did you mean --set {keys[0]}={value or next(iter(after), 'VALUE')}?" if keys else ""

    def error(self, message: str) -> NoReturn:
        """Print the problem in one line, and how to look further; exit with 2."""
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            known = [name.strip().strip("'") for name in found[2].split(",")]
            close = difflib.get_close_matches(found[1], known, n=1)
            option = f"{of[1]}: " if (of := re.match(r"argument (-[^:]*): ", message)) else ""
            message = f"{option}{found[1]!r} is none of {', '.join(known)}" + (
                f"; did you mean {close[0]!r}?" if close else ""
            )
        self.exit(BAD_INPUT, f"{self.prog}: {message}\n{self.prog} --help says what there is\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hetlora",
        description="HetLoRA: federated fine-tuning of language models with a LoRA rank for every client.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"hetlora {__version__}")
    parser.set_defaults(command=_begin)
    commands = parser.add_subparsers(metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="run the demonstration, which comes with the package",
        description="Run the demonstration on the bundled model and rows, offline, and write its report; half a minute.",
    )  # fmt: skip
    demo.add_argument("--quiet", action="store_true", help="show no progress")
    demo.add_argument("--engine", default="in-process", help=argparse.SUPPRESS)
    _with_changes(demo)
    demo.set_defaults(command=_demo, report=True)

    new = commands.add_parser(
        "new", help="write a configuration for your own rows",
        description="Look at rows and write a commented configuration that runs on them. Nothing is asked or trained.",
    )  # fmt: skip
    new.add_argument("config", type=Path, metavar="CONFIG", help="the TOML file to write")
    rows = "the rows: JSON Lines, a JSON array, CSV, TSV, Parquet, a folder or a data set of the hub; by default stdlib"
    new.add_argument("--data", default="stdlib", metavar="PATH", help=rows)
    new.add_argument(
        "--base", default="nano", metavar="MODEL", help="the base: a folder or a name on the hub; by default nano"
    )
    field = "a field of the rows, or a template with fields in braces"
    new.add_argument("--prompt", metavar="FIELD", help=f"what comes before the answer: {field}; by default looked for")
    new.add_argument("--target", metavar="FIELD", help=f"what is trained: {field}")
    new.add_argument("--client", metavar="FIELD", help="the field that says whose row it is")
    new.set_defaults(command=_new)

    base = commands.add_parser(
        "base", help="make a base of a GGUF file",
        description="Write a model of llama.cpp's format GGUF as a folder that model.base takes, with its own tokens, and "
        "compare each number with what llama.cpp's package reads. Needs pip install 'hetlora[gguf]'. See docs/on-device.md.",
    )  # fmt: skip
    base.add_argument("file", type=Path, metavar="FILE.gguf", help="the model")
    base.add_argument("folder", type=Path, metavar="DIR", help="the folder to write, which is not there yet")
    base.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the numbers; by default bfloat16"
    )
    base.set_defaults(command=_base)

    examples = commands.add_parser(
        "examples", help="list the examples, or copy them",
        description="List the configurations that come with the package, or copy those that are named.",
    )  # fmt: skip
    examples.add_argument("names", nargs="*", metavar="NAME", help="the examples to copy; without one, all are listed")
    examples.add_argument(
        "--to", type=Path, default=Path(), metavar="DIR", help="where they are copied to; by default here"
    )
    examples.set_defaults(command=_examples)

    run = _on_a_file(
        commands, "run", _run, "run a federation from its TOML file",
        "Measure the base, do the rounds, measure the result, write the adapter as PEFT files. Every key of the file is in "
        "docs/configuration.md.",
    )  # fmt: skip
    run.add_argument("--quiet", action="store_true", help="show no progress")
    _with_report(run)
    tracker = (
        "log the rounds to a tracker, too: tensorboard, trackio, wandb or mlflow (docs/tracking.md); repeat for more"
    )
    run.add_argument("--track", action="append", default=[], metavar="NAME", help=tracker)
    _with_engine(run)

    resume = commands.add_parser(
        "resume", help="go on with a run that was killed or interrupted",
        description="Go on with a run from its newest checkpoint. It ends with the same adapter, bit for bit, as if nothing "
        "had happened. Its configuration, base and data must be those it began with. A complete run is printed again.",
    )  # fmt: skip
    resume.add_argument("run", type=Path, metavar="RUN", help="the run's folder, which is where its records.jsonl is")
    resume.add_argument("--json", action="store_true", help="print what run --json prints")
    resume.add_argument("--quiet", action="store_true", help="show no progress")
    _with_report(resume)
    _with_engine(resume)
    resume.set_defaults(command=_resume)

    compare = _on_a_file(
        commands, "compare", _compare, "run several methods over several seeds and write one table",
        "Tune each method of [compare] on a validation split, run it over the seeds, and write one table as Markdown, CSV and "
        "LaTeX. Called again, it goes on where it was stopped. Exits with 1 if a run failed. `hetlora examples "
        "compare_stdlib` copies a file that shows how.",
    )  # fmt: skip
    compare.add_argument("--jobs", type=int, metavar="N", help="runs at a time, instead of compare.jobs")
    compare.add_argument("--quiet", action="store_true", help="show no progress")

    reproduce = commands.add_parser(
        "reproduce", help="run a study of the repository, and write its tables and figures",
        description="Run every method of a study over its seeds, and write the records of all runs, tables and figures. "
        "Called again, it goes on where it was stopped. Without NAME, list the studies. See docs/results.md.",
    )  # fmt: skip
    reproduce.add_argument("study", metavar="NAME", nargs="?", help="a study, or a TOML file of your own")
    where = "where records, tables and figures go; by default results/NAME"
    reproduce.add_argument("--output", type=Path, metavar="DIR", help=where)
    reproduce.add_argument("--jobs", type=int, metavar="N", help="runs at a time, instead of compare.jobs")
    shown = "run nothing: write tables and figures again, from the records in --output"
    reproduce.add_argument("--show", action="store_true", help=shown)
    _with_changes(reproduce)
    reproduce.add_argument("--quiet", action="store_true", help="show no progress")
    reproduce.set_defaults(command=_reproduce)

    report = commands.add_parser(
        "report", help="write one HTML page about a run, or several side by side",
        description="Write one HTML page about a run, complete or not, or several side by side, from their records alone. It "
        "needs no network and no other file; docs/report.md says what it shows.",
    )  # fmt: skip
    folders = "a run's folder, which is where its records.jsonl is, or a comparison's, which stands for its runs"
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=folders)
    where = "the page; by default report.html, in the folder where one is given"
    report.add_argument("--output", type=Path, metavar="FILE.html", help=where)
    report.set_defaults(command=_report)

    data = _on_a_file(
        commands, "data", _data, "show what each client would hold, before anything is trained",
        "Read and divide the data of a run, and show what each client would hold: rows, tokens, labels. Needs the model's "
        "tokenizer, not its weights.",
    )  # fmt: skip
    by = "count rows by this field, or by their 'length'; by default what partition.by names"
    data.add_argument("--by", metavar="FIELD", help=by)
    data.add_argument("--all", action="store_true", help="show every client, however many they are")
    data.add_argument(
        "--show", type=int, metavar="N", default=0, help="show N training examples with their scored tokens"
    )

    plan = _on_a_file(
        commands, "plan", _plan, "say what a run will cost, tier by tier, before it runs",
        "Say what a run will cost a client of each tier and in all: parameters, bytes, FLOPs and peak training memory, beside "
        "full fine-tuning. Nothing is trained, and the base's weights are not read; see docs/costs.md.",
    )  # fmt: skip
    bound = "take every row as data.max_length long and all its tokens as scored, instead of tokenizing the rows"
    plan.add_argument("--bound", action="store_true", help=bound)
    timed = "load the base, too, and time a step, to say how long this machine will train"
    plan.add_argument("--time", action="store_true", help=timed)
    memory = "instead, a client's memory with recomputed layers and without, and the largest rank in 2, 4 and 8 GB"
    plan.add_argument("--memory", action="store_true", help=memory)

    doctor = _on_a_file(
        commands, "doctor", _doctor, "look at this machine, and at a run before it runs",
        "Look at this machine, and with CONFIG at the run: its base, rows, ranks and memory and, in two tiny rounds of its own "
        "method, base and data, at what a run relies on. Exits with 1 if a check failed. See docs/doctor.md.",
        optional=True,
    )  # fmt: skip
    doctor.add_argument("--laws", action="store_true", help="check the run's method against every law of methods, too")

    flower = commands.add_parser("flower", help="a federation over real machines", description="See docs/deploy.md.")
    within = flower.add_subparsers(required=True, metavar="COMMAND")
    new = within.add_parser(
        "new",
        help="write a Flower App",
        description="Write a Flower App: the run's file, and what Flower wants to know of it.",
    )
    new.add_argument("folder", type=Path, metavar="DIR", help="where; made if it is not there")
    new.set_defaults(command=_flower_new)
    local = within.add_parser(
        "local", help="rehearse a Flower App on this machine with real processes, TLS and keys",
        description="Start a SuperLink with TLS and SuperNodes with keys of their own, each with a file of rows, run the app "
        "over them, and end them. Keys, logs and rows go to DIR/local, the results to DIR/runs. See docs/deploy.md.",
    )  # fmt: skip
    local.add_argument("folder", type=Path, metavar="DIR", help="the app, which hetlora flower new wrote")
    local.add_argument("--clients", type=int, metavar="N", default=3, help="how many SuperNodes; by default 3")
    local.set_defaults(command=_flower_local)
    health = within.add_parser(
        "health", help="print what an operator watches: one JSON object a round",
        description="Print one JSON object for every round of a run over Flower, also of one that goes on: nodes, clients "
        "asked and admitted, failures, bytes, seconds, the server's memory. See docs/deploy.md.",
    )  # fmt: skip
    health.add_argument("run", type=Path, metavar="RUN", help="the run's folder on the server")
    health.set_defaults(command=_flower_health)
    superlink = within.add_parser(
        "superlink", help="start Flower's SuperLink with limits on what clients send",
        description="Start flower-superlink, with its options, and with limits on what clients send: answers that are larger "
        "than their round can need are refused before they are stored. See docs/deploy.md.",
        usage="hetlora flower superlink [--largest-answer MB] [option of flower-superlink ...]",
        forwards=_flower_superlink_help,
    )  # fmt: skip
    limit = "the largest answer where its message says no limit; by default 512"
    superlink.add_argument("--largest-answer", metavar="MB", default="512", help=limit)
    superlink.set_defaults(command=_flower_superlink)

    client = commands.add_parser("client", help="one client of a federation", description="See docs/deploy.md.")
    check = client.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "check", help="look at a client's rows on its own machine before it joins",
        description="Look at the rows, the base and the memory of this machine as a client of a federation: what it would "
        "train on, what is odd about the rows, which rank it affords. Nothing is sent. Exits with 2 if it cannot take part.",
    )  # fmt: skip
    check.add_argument("rows", metavar="ROWS", help="the client's rows: JSON Lines, or what else data.path takes")
    check.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="the run.toml of the federation's Flower App"
    )
    check.add_argument("--base", metavar="DIR", help="where the base lies here, if it is a folder of the server's")
    check.add_argument("--memory", type=float, metavar="MB", help="memory for training; say which rank fits it")
    check.add_argument("--quantize", metavar="KIND", help="how this machine is to store the base, as model.quantize")
    _with_changes(check)
    check.set_defaults(command=_client_check)

    export, part = _on_a_run(
        commands, "export", _export, "write what a run has learned for other programs, with a model card",
        "Write the global adapter of a run, complete or not, as a PEFT folder: whole, cut to a rank, or as a client would "
        "receive it; or the whole model with the adapter merged into it. Nothing is written over. See docs/export.md.",
    )  # fmt: skip
    whole = "the base with the whole adapter added to its weights, as a model of transformers"
    part.add_argument("--merged", action="store_true", help=whole)
    export.add_argument("--output", type=Path, metavar="DIR", help="where; by default a new folder in RUN/exports")
    export.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of the numbers; by default float32",
    )
    export.add_argument(
        "--format",
        choices=["peft", "gguf"],
        default="peft",
        help="gguf: also a file for llama.cpp, and Ollama's Modelfile",
    )
    pads = "pad modules of smaller rank with zeros: vLLM takes one rank for all"
    export.add_argument("--pad", action="store_true", help=pads)
    export.add_argument("--scores", action="store_true", help="measure what a device of each tier gets, too")
    no_check = "do not load what was written in another process to compare logits with the run's"
    export.add_argument("--no-check", action="store_true", help=no_check)
    export.add_argument("--json", action="store_true", help="print one JSON object")

    generate, _ = _on_a_run(
        commands, "generate", _generate, "ask what a run has learned",
        "Say what the result of a run, complete or not, says after a prompt, greedily. The run's template makes the prompt: of "
        "a JSON object with the fields of a row, or of text where the template needs one field.",
    )  # fmt: skip
    asked = generate.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT", help="text, or a row as a JSON object")
    lines = "JSON Lines, each a row as an object, or text as a string; prints a JSON object for each"
    asked.add_argument("--file", type=Path, metavar="FILE", help=lines)
    generate.add_argument("--compare", choices=["base"], help="say what the base alone says, too")
    generate.add_argument(
        "--raw", action="store_true", help="give text to the model as it is, without the run's template"
    )
    generate.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer; by default the run's own")
    generate.add_argument("--json", action="store_true", help="print a JSON object for --prompt, too")

    methods = commands.add_parser(
        "methods", help="list the methods", description="List the methods with their references."
    )
    methods.add_argument("--json", action="store_true", help="print a list of objects")
    methods.set_defaults(command=_methods)
    return parser


def _on_a_file(
    commands: Any,
    name: str,
    command: Callable[[argparse.Namespace], int],
    summary: str,
    description: str,
    *,
    optional: bool = False,
) -> argparse.ArgumentParser:
    """Add a command with the arguments CONFIG, --set and --json."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=description)
    parser.add_argument(
        "config", type=Path, metavar="CONFIG", nargs="?" if optional else None,
        help="the run's TOML file; hetlora examples lists some, hetlora new writes one",
    )  # fmt: skip
    _with_changes(parser)
    parser.set_defaults(command=command)
    return parser


def _with_changes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
        help="change a key of the file, e.g. --set federation.rounds=5; KEY= takes a key away; repeat for more",
    )  # fmt: skip
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on standard output, and nothing else there"
    )


def _on_a_run(
    commands: Any, name: str, command: Callable[[argparse.Namespace], int], summary: str, description: str
) -> tuple[argparse.ArgumentParser, argparse._MutuallyExclusiveGroup]:
    """Add a command on a part of what a run has learned; return it and the group of options that select the part."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=description)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder, which is where its records.jsonl is")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--rank", type=int, metavar="R", help="the first slots of the global adapter, so many")
    part.add_argument(
        "--tier", metavar="T", help="what every device of a tier affords, by its name in the results: 8, 6-10"
    )
    part.add_argument(
        "--client", metavar="C", help="what a client would be served with, or its own adapter if it has one"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(command=command)
    return parser, part


def _prepare(options: argparse.Namespace) -> RunConfig:
    """Set the process up before it imports torch, and read the run."""
    from hetlora.runs.process import prepare_process, quiet_transformers

    prepare_process()
    from hetlora.config import load_config

    config = load_config(options.config, options.changes, getattr(options, "track", ()))
    quiet_transformers()
    return config


def _begin(_: argparse.Namespace) -> int:
    print(
        "hetlora demo                               run the demonstration, offline, in half a minute\n"
        "hetlora new mine.toml --data rows.jsonl    write a configuration for your own rows\n"
        "hetlora run mine.toml --report             run it, and look at the page it writes\n\n"
        "hetlora --help lists all commands."
    )
    return 0


def _demo(options: argparse.Namespace) -> int:
    from hetlora.commands.examples import example

    options.config = example("demo")
    try:
        return _run(options)
    except ConfigError as error:  # of a file in the package, which nobody has seen
        raise ConfigError("the demonstration with --set", error.problems) from error


def _new(options: argparse.Namespace) -> int:
    from hetlora.commands.new.new import write_new
    from hetlora.data.files import format_of

    if format_of(options.config):
        rows = shlex.quote(str(options.config))
        raise HetLoraError(
            f"{rows} is a name for rows; name the file to write first: hetlora new mine.toml --data {rows}"
        )
    made = write_new(
        options.config,
        options.data,
        options.base,
        prompt=options.prompt,
        target=options.target,
        client=options.client,
    )
    print("\n".join(made.seen))
    print(f"written: {made.path}\nnext: hetlora data {made.path} --show 3, then hetlora run {made.path} --report")
    return 0


def _base(options: argparse.Namespace) -> int:
    from hetlora.runs.process import prepare_process, quiet_transformers

    prepare_process()
    import torch

    from hetlora.model.gguf_base import convert_gguf

    quiet_transformers()
    made = convert_gguf(options.file, options.folder, dtype=getattr(torch, options.dtype))
    print(
        f"base: {made.folder}\n      {made.architecture}, {made.parameters / 1e6:.1f} million parameters in {made.dtype}, "
        f"stored as {', '.join(made.stored)}\n      each number compared with what llama.cpp's package reads\n"
        f"next: hetlora new mine.toml --base {made.folder}"
    )
    return 0


def _examples(options: argparse.Namespace) -> int:
    from hetlora.commands.examples import copy_examples, example_names, first_sentence
    from hetlora.runs.text import indented

    if options.names:
        for path in copy_examples(options.names, options.to):
            print(path)
    else:
        print("\n".join(indented([(name, first_sentence(name)) for name in example_names()])))
    return 0


def _run(options: argparse.Namespace) -> int:
    config = _prepare(options)
    from hetlora.api import start_run
    from hetlora.runs.display import choose_display

    result = start_run(config, choose_display(quiet=options.quiet), options.engine)
    code = _print_result(result, options)
    _write_report(result.records.parent, options)
    return code


def _resume(options: argparse.Namespace) -> int:
    from hetlora.runs.folder import read_summary

    if (summary := read_summary(options.run)) is not None:
        if options.json and not options.quiet:
            print(f"{options.run} is complete", file=sys.stderr)
        from hetlora.runs.summary_text import describe_finished

        print(json.dumps(summary) if options.json else describe_finished(options.run, summary))
        _write_report(options.run, options)
        return _learned(options.run, summary.get("rounds"), summary.get("updates"))
    from hetlora.runs.process import prepare_process, quiet_transformers

    prepare_process()
    from hetlora.api import resume_run
    from hetlora.runs.display import choose_display

    quiet_transformers()
    code = _print_result(resume_run(options.run, choose_display(quiet=options.quiet), options.engine), options)
    _write_report(options.run, options)
    return code


def _with_report(parser: argparse.ArgumentParser) -> None:
    page = "write RUN/report.html when it has ended, as hetlora report does, and name it in the last line"
    parser.add_argument("--report", action="store_true", help=page)


def _write_report(folder: Path, options: argparse.Namespace) -> None:
    if options.report:
        from hetlora.commands.report import write_report

        page = write_report([folder], folder / "report.html")
        # With --json, standard output holds one JSON object and nothing else; --quiet leaves the result.
        print(f"{'report:':<15} {page}", file=sys.stderr if options.json else sys.stdout)


def _with_engine(parser: argparse.ArgumentParser) -> None:
    from hetlora.api import ENGINES

    parser.add_argument(
        "--engine", choices=list(ENGINES), default="in-process",
        help="where clients train: many in one pass in this process, or over Flower's simulation, one at a time a node",
    )  # fmt: skip


def _flower_new(options: argparse.Namespace) -> int:
    from hetlora.flower.new_app import new_app, next_steps

    for path in new_app(options.folder):
        print(path)
    print(next_steps(options.folder))
    return 0


def _flower_local(options: argparse.Namespace) -> int:
    _need_flower()
    from hetlora.runs.process import prepare_process

    prepare_process()
    from hetlora.flower.rehearsal import rehearse
    from hetlora.runs.display import PlainDisplay
    from hetlora.runs.summary_text import describe_finished

    done = rehearse(options.folder, options.clients, PlainDisplay().say)
    code = _learned(done.run, done.summary.get("rounds"), done.summary.get("updates"))
    if not code:
        print(describe_finished(done.run, done.summary))
    return code


def _flower_health(options: argparse.Namespace) -> int:
    from hetlora.flower.health import round_health

    for line in round_health(options.run):
        print(json.dumps(line), flush=True)
    return 0


def _flower_superlink(options: argparse.Namespace) -> int:
    _need_flower()
    try:
        from hetlora.flower.guarded_superlink import run_superlink
    except ImportError as error:  # another Flower has other modules
        raise HetLoraError(f"{error}; start flower-superlink, which then has no limits on answers") from error
    return run_superlink(options.forwarded, options.largest_answer)


def _flower_superlink_help() -> None:
    _need_flower()
    from hetlora.flower.guarded_superlink import print_flower_help

    print_flower_help()


def _need_flower() -> None:
    if importlib.util.find_spec("flwr") is None:
        raise HetLoraError("Flower is not installed; pip install 'hetlora[flower]'")


def _print_result(result: RunResult, options: argparse.Namespace) -> int:
    """Print a result; return the exit code."""
    if options.json:
        print(json.dumps(result.summary()))
    elif result.interrupted or result.updates or not result.rounds:  # else nothing was learned that could be shown
        from hetlora.runs.summary_text import print_result

        print_result(result, sys.stdout)
    if result.interrupted:
        return INTERRUPTED
    return _learned(result.records.parent, result.rounds, result.updates)


def _learned(folder: Path, rounds: object, updates: object) -> int:
    """Return the exit code of a complete run; if no client ever gave an update, print why, and the way out."""
    if not rounds or updates:
        return 0
    from hetlora.errors import printable
    from hetlora.runs.reader import RECORDS, read_run, section

    run = read_run(folder)
    client, why = next(
        ((name, why) for done in run.rounds for name, why in done.failures.items()), ("nobody", "no record")
    )
    rate = section(run.config, "training").get("learning_rate")
    cure = f"; lower training.learning_rate = {rate} (1e-3 is usual)" if "training broke down" in why else ""
    said = f"no client ever gave an update; the first failure ({client}): {why}{cure}; all are in {folder / RECORDS}"
    print(f"hetlora: {printable(said)}", file=sys.stderr)
    return NOTHING_LEARNED


def _data(options: argparse.Namespace) -> int:
    config = _prepare(options)
    from hetlora.commands.preview.picture import print_preview
    from hetlora.commands.preview.preview import preview

    if options.show < 0:
        raise HetLoraError(f"--show {options.show}: give how many examples to show, 0 or more")
    shown = preview(config, options.by, options.show)
    if options.json:
        print(json.dumps(shown.summary()))
    else:
        print_preview(shown, sys.stdout, every=options.all)
    return 0


def _client_check(options: argparse.Namespace) -> int:
    config = _prepare(options)
    from hetlora.commands.preview.client import check_client

    checked = check_client(config, options.rows, options.base, options.memory, options.quantize)
    print(json.dumps(checked.summary()) if options.json else checked.describe())
    return 0


def _plan(options: argparse.Namespace) -> int:
    config = _prepare(options)
    from hetlora.runs.display import PlainDisplay

    say = PlainDisplay().say
    if options.memory:
        if options.bound or options.time:
            raise HetLoraError(
                "--memory takes rows of data.max_length, and trains nothing; leave --bound and --time away"
            )
        say(f"reading the configuration of {config.model.base}")
        from hetlora.commands.plan_memory import plan_memory

        memory = plan_memory(config, say)
        print(json.dumps(memory.summary()) if options.json else memory.table())
        return 0
    say(f"reading the rows of {config.data.path}")  # before the next import, which takes seconds
    from hetlora.commands.plan import make_plan

    plan = make_plan(config, bound=options.bound, timed=options.time, say=say)
    print(json.dumps(plan.summary()) if options.json else plan.table())
    return 0


def _doctor(options: argparse.Namespace) -> int:
    if options.changes and options.config is None:
        raise HetLoraError("--set changes a key of CONFIG; give the run's file, too")
    if options.laws and options.config is None:
        raise HetLoraError("--laws checks the method of CONFIG; give the run's file, too")
    from hetlora.runs.process import prepare_process, quiet_transformers

    prepare_process()
    from hetlora.commands.doctor.diagnose import examine

    quiet_transformers()
    show = None if options.json else lambda finding: print(finding, flush=True)
    diagnosis = examine(options.config, options.changes, laws=options.laws, show=show)
    print(json.dumps(diagnosis.summary()) if options.json else diagnosis.conclusion())
    return SOME_FAILED if diagnosis.failed else 0


def _export(options: argparse.Namespace) -> int:
    from hetlora.runs.process import prepare_process, quiet_transformers

    prepare_process()
    from hetlora.commands.export.export import describe_export, export_run
    from hetlora.runs.display import choose_display

    quiet_transformers()
    done = export_run(
        options.run,
        options.output,
        rank=options.rank,
        tier=options.tier,
        client=options.client,
        merged=options.merged,
        dtype=options.dtype,
        file_format=options.format,
        equal_ranks=options.pad,
        scores=options.scores,
        check=not options.no_check,
        display=choose_display(quiet=options.quiet),
    )
    print(json.dumps(done.summary()) if options.json else describe_export(done))
    return 0


def _as_utf8(text: str) -> str:
    r"""Return an argument as UTF-8, which a locale such as C leaves undecoded; what is none is refused where it is used.

    Example:
        >>> _as_utf8("w\udcc3\udcb6rld"), _as_utf8("wörld")
        ('wörld', 'wörld')
    """
    try:
        return text.encode("utf8", "surrogateescape").decode("utf8", "surrogateescape")
    except UnicodeEncodeError:
        return text


def _generate(options: argparse.Namespace) -> int:
    from hetlora.runs.process import prepare_process, quiet_transformers

    prepare_process()
    from hetlora.commands.generate import as_prompt, describe_generated, generate, read_prompts
    from hetlora.runs.display import choose_display

    quiet_transformers()
    answers = generate(
        options.run,
        [as_prompt(_as_utf8(options.prompt))] if options.file is None else read_prompts(options.file),
        rank=options.rank,
        tier=options.tier,
        client=options.client,
        compare_base=options.compare == "base",
        max_new_tokens=options.max_new_tokens,
        raw=options.raw,
        display=choose_display(quiet=options.quiet),
    )
    for answer in answers:
        as_json = options.json or options.file is not None
        print(json.dumps(answer.summary()) if as_json else describe_generated(answer), flush=True)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from hetlora.runs.process import prepare_process, quiet_transformers

    prepare_process()
    from hetlora.commands.compare.grid import load_comparison

    comparison = load_comparison(options.config, options.changes, options.jobs)
    from hetlora.commands.compare.comparison import compare
    from hetlora.commands.compare.display import CompareDisplay
    from hetlora.commands.compare.formats import print_table
    from hetlora.runs.runner import explain_write_errors

    quiet_transformers()
    try:
        with explain_write_errors(str(comparison.folder)):
            result = compare(comparison, CompareDisplay(quiet=options.quiet))
    except KeyboardInterrupt:
        print("hetlora: interrupted; finished runs are kept, and the same command goes on", file=sys.stderr)
        return INTERRUPTED
    if options.json:
        print(json.dumps(result.summary()))
    else:
        print_table(result.rows, result.notes, result.results, sys.stdout)  # drawn on a terminal
        print(f"tables and raw figures: {result.folder}\nas a page: hetlora report {result.folder}")
    return SOME_FAILED if result.failed else 0


def _find_studies() -> None:
    """Make `studies` importable, which is beside `src` in the repository and not part of the package.

    Raises:
        HetLoraError: The package was installed without the repository.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "studies" / "study.py").is_file():
        raise HetLoraError(
            "hetlora reproduce needs the studies, which are in the project's repository and not in the package; clone it, "
            "and there: pip install -e '.[reproduce]'"
        )
    if str(root) not in sys.path:
        sys.path.append(str(root))


def _reproduce(options: argparse.Namespace) -> int:
    from hetlora.runs.process import prepare_process, quiet_transformers

    prepare_process()
    _find_studies()
    from hetlora.runs.text import aligned
    from studies.study import load_study, questions

    if options.study is None:
        listed = questions()
        print(json.dumps(listed) if options.json else "\n".join(aligned(list(listed.items()), left=(0, 1))))
        return 0
    study = load_study(options.study, options.changes, options.jobs)
    from hetlora.commands.compare.display import CompareDisplay
    from hetlora.runs.runner import explain_write_errors
    from studies.reproduction import reproduce, shown_again

    quiet_transformers()
    folder = options.output or Path("results") / study.name
    try:
        with explain_write_errors(str(folder)):
            result = (
                shown_again(study, folder)
                if options.show
                else reproduce(study, folder, CompareDisplay(quiet=options.quiet))
            )
    except KeyboardInterrupt:
        print("hetlora: interrupted; finished runs are kept, and the same command goes on", file=sys.stderr)
        return INTERRUPTED
    print(
        json.dumps(result.summary()) if options.json else f"{result.text}\nrecords, tables and figures: {result.folder}"
    )
    return SOME_FAILED if result.failed else 0


def _report(options: argparse.Namespace) -> int:
    from hetlora.commands.report import write_report

    within = options.runs[0] if len(options.runs) == 1 else Path()
    print(f"report: {write_report(options.runs, options.output or within / 'report.html')}")
    return 0


def _methods(options: argparse.Namespace) -> int:
    from hetlora.methods import METHODS
    from hetlora.methods.listing import GROUPS, list_methods
    from hetlora.runs.text import indented

    entries = list_methods(METHODS)
    if options.json:
        print(json.dumps([entry._asdict() for entry in entries]))
        return 0
    known = {entry.name: entry for entry in entries}
    for title, names in GROUPS.items():
        lines = [part for name in names for part in ((name, known[name].line), ("", f"{known[name].reference}"))]
        print("\n".join([f"{title}:", *indented(lines), ""]))
    print("docs/methods.md has their formulas; --json their arguments with defaults")
    return 0


if __name__ == "__main__":
    sys.exit(main())
