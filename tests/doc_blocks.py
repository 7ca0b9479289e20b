"""Find the code blocks of the docs pages, run them, and compare their output with what the page shows."""

from __future__ import annotations

import configparser
import contextlib
import doctest
import io
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from doc_commands import TAKEN_BY_HAND, check_command
from hetlora import cli
from hetlora.commands.compare.grid import plan
from hetlora.config import parse_config
from studies.study import load_study

ROOT = Path(__file__).resolve().parent.parent

ELSEWHERE: Mapping[tuple[str, str], str] = {("docs/export.md", "python"): "tests/test_export.py"}
"""Blocks by page and language that another file of tests runs, on something smaller."""

FENCE = re.compile(r"^( *)(```+)([^\n`]*)\n(.*?)^\1\2 *$", flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: where it begins, its language, its text."""

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text("utf8")
    found = [
        Block(page, text.count("\n", 0, fence.start()) + 1, fence[3].strip(), fence[4])
        for fence in FENCE.finditer(text)
    ]
    assert 2 * len(found) == len(re.findall(r"^ *```", text, flags=re.MULTILINE)), f"{page}: a block is not closed"
    return found


def commands_of(block: Block) -> Iterator[tuple[str, str]]:
    """Yield each command with what the page shows of its output; a script shows none."""
    joined = block.text.replace("\\\n", " ")
    if block.language == "sh":
        yield from ((line, "") for line in joined.splitlines() if line.strip())
        return
    assert joined.startswith("$ "), f"{block.place}: a console begins with a command"
    for part in re.split(r"^\$ ", joined, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown


# What is shown against what there is --------------------------------------------------------------------------------

NUMBER = re.compile(r"-?\d[\d,]*\.\d+")
TOLERANCE = 0.03
"""Of a number with a fraction: processors round differently. A whole number is the same everywhere."""


def agrees(shown: str, there: str) -> bool:
    """Whether an output is the one shown: `...` stands for anything, alone on a line for any number of lines.

    >>> agrees("loss 4.60  ... s\\n...\\ndone\\n", "loss 4.61  0.3 s\\nmore\\nand more\\ndone\\n")
    True
    >>> agrees("loss 4.60\\n", "loss 5.60\\n"), agrees("8 rounds\\n", "9 rounds\\n"), agrees("a\\n", "a\\nb\\n")
    (False, False, False)
    """
    pattern, numbers = "", []
    for line in shown.splitlines():
        if line.strip() == "...":
            pattern += r"(?:[^\n]*\n)*?"
            continue
        for part in re.split(rf"(\.\.\.|{NUMBER.pattern})", line.rstrip()):
            if part == "...":
                pattern += r"[^\n]*?"
            elif NUMBER.fullmatch(part):
                numbers.append(float(part.replace(",", "")))
                pattern += rf"({NUMBER.pattern})"
            else:
                pattern += re.escape(part)
        pattern += r" *\n"
    found = re.fullmatch(pattern, there if there.endswith("\n") or not there else there + "\n")
    return found is not None and [float(number.replace(",", "")) for number in found.groups()] == pytest.approx(
        numbers, rel=TOLERANCE, abs=0.02
    )


# A page ------------------------------------------------------------------------------------------------------------

MINIMUM: Mapping[str, Any] = {
    "data": {"target": "{target}"},
    "federation": {"rounds": 1, "clients_per_round": 2},
    "ranks": {"kind": "same", "rank": 4},
    "training": {"steps": 1},
}
"""What a configuration must say, for blocks that show a part of one."""


def whole(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part of a configuration with what else there must be; a section that chooses a kind is whole already."""
    result: dict[str, Any] = {**MINIMUM, **document}
    for name in ("federation", "training"):
        result[name] = {**MINIMUM[name], **document.get(name, {})}
    if "messages" not in result["data"]:
        result["data"] = {**MINIMUM["data"], **result["data"]}
    return result


@dataclass
class Page:
    """A page that is run from top to bottom in a folder of its own: one namespace, files that stay, runs that go on."""

    folder: Path
    namespace: dict[str, Any] = field(default_factory=dict)

    def run(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            assert block.language in LANGUAGES, f"{block.place}: a block of language {block.language!r}"
            if other := ELSEWHERE.get((block.page, block.language)):
                assert f'"{block.page}"' in (ROOT / other).read_text("utf8")
                continue
            try:
                LANGUAGES[block.language](self, block)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{block.place}: {error!r}") from error

    def python(self, block: Block) -> None:
        if name := re.match(r"# (\w+\.py)\n", block.text):  # a module, which a later block imports
            (self.folder / name[1]).write_text(block.text, encoding="utf8")
            return
        exec(compile(block.text, block.place, "exec"), self.namespace)

    def session(self, block: Block) -> None:
        test = doctest.DocTestParser().get_doctest(block.text, self.namespace, block.place, block.page, block.line)
        assert test.examples, "no >>> in it"
        output = io.StringIO()
        options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        runner = doctest.DocTestRunner(verbose=False, optionflags=options)
        runner.run(test, out=output.write, clear_globs=False)
        assert not runner.failures, output.getvalue()
        self.namespace.update(test.globs)

    def toml(self, block: Block) -> None:
        document = tomllib.loads(block.text)
        if name := re.match(r"# (\S+\.toml)\n", block.text):
            (self.folder / name[1]).write_text(block.text, encoding="utf8")
        if "superlink" in document:
            connections_of_flower(document["superlink"])
        elif "study" in document:
            assert name, "a study is shown as a whole file"
            load_study(str(self.folder / name[1]))
        elif "compare" in document:
            plan(whole(document), block.place)
        else:
            parse_config(whole(document), block.place)

    def json(self, block: Block) -> None:
        json.loads(block.text)

    def commands(self, block: Block) -> None:
        for command, shown in commands_of(block):
            words = shlex.split(command, comments=True)
            if check_command(command, words, self.folder) is not None:
                assert not shown or command.startswith(TAKEN_BY_HAND), f"nothing holds what is shown of `{command}`"
                continue
            code, there = run_command(words[1:])
            # Where a page shows nothing after a command, it speaks of what the command does, and not of what it prints.
            assert not shown or agrees(shown, there), f"`{command}` prints\n{there}\nand the page shows\n{shown}"
            assert (code != 0) == bool(re.search("^hetlora: ", shown, flags=re.MULTILINE)), (
                f"`{command}` exits with {code}"
            )

    def unit(self, block: Block) -> None:
        """A unit of systemd: its commands are checked like any."""
        unit = configparser.ConfigParser(strict=False, interpolation=None)
        unit.optionxform = str  # type: ignore[assignment,method-assign]
        unit.read_string(block.text.replace("\\\n", " "))
        assert set(unit.sections()) == {"Unit", "Service", "Install"}
        command = unit["Service"]["ExecStart"]
        words = shlex.split(command)
        assert check_command(Path(words[0]).name, [Path(words[0]).name, *words[1:]], self.folder) == "read only"

    def image(self, block: Block) -> None:
        """A container: its first word and its entry point are programs that Flower and pip install."""
        lines = dict(line.split(" ", 1) for line in block.text.splitlines())
        assert lines.keys() == {"FROM", "RUN", "ENV", "USER", "WORKDIR", "ENTRYPOINT"}
        for command in lines["RUN"].split(" && "):
            assert check_command(command, shlex.split(command), self.folder) == "read only"
        assert check_command(f"export {lines['ENV']}", ["export", *lines["ENV"].split()], self.folder) == "read only"
        assert json.loads(lines["ENTRYPOINT"]) == ["flower-supernode"]

    def text(self, block: Block) -> None:
        """A formula, or what a command accepts: the options that it names are those there are."""
        assert not block.text.startswith(("$ ", ">>> ")), "a console or a session"
        if (synopsis := re.match(r"hetlora (\w+) ", block.text)) is not None:
            out = io.StringIO()
            with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
                cli.main([synopsis[1], "--help"])
            options = r"--[a-z][a-z-]*"
            assert set(re.findall(options, out.getvalue())) - {"--help"} == set(re.findall(options, block.text))

    def of_the_site(self, block: Block) -> None:
        """A directive of the site, which its build reads."""


LANGUAGES: dict[str, Callable[[Page, Block], None]] = {
    "python": Page.python,
    "pycon": Page.session,
    "toml": Page.toml,
    "json": Page.json,
    "console": Page.commands,
    "sh": Page.commands,
    "ini": Page.unit,
    "dockerfile": Page.image,
    "text": Page.text,
    "{toctree}": Page.of_the_site,
}
"""How a block of each language is run; of another there is none."""


def run_command(arguments: Sequence[str]) -> tuple[int, str]:
    """Run a command of hetlora in this process; return its exit code and all that it prints, as a person sees it."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = cli.main(arguments)
    return code, out.getvalue()


def connections_of_flower(section: Mapping[str, Any]) -> None:
    """Read a `[superlink]` of Flower's configuration by Flower's own reader, and its keys by their names."""
    from flwr.cli.constant import SuperLinkConnectionTomlKey as Key
    from flwr.cli.flower_config import parse_superlink_connection

    known = {value for name, value in vars(Key).items() if name.isupper()}
    names = {name for name, value in section.items() if isinstance(value, dict)}
    assert section["default"] in names
    for name in names:
        assert set(section[name]) <= known
        parse_superlink_connection(section[name], name)
