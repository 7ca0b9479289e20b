"""Methods from a user's package: naming, refusals, and every command that takes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hetlora import cli
from hetlora.commands.compare.grid import plan
from hetlora.config import RunConfig, parse_config
from hetlora.config.build import make_method
from hetlora.errors import ConfigError
from hetlora.methods.lookup import find_method
from hetlora.runs.fingerprints import FileFingerprints, changed_file
from processes import HANGS
from proofs.small_run import write_rows
from small_federations import PHONES, phones

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

ODD = """
from hetlora import Method
from hetlora.methods import fedavg

number = 3
def fair(*, q: float = 1.0, weights: str = "examples") -> Method: return fedavg(weights=weights)
def needs(q: float) -> Method: ...
def untyped(q=1.0) -> Method: ...
def many(*q: float) -> Method: ...
def unread(q: "Nowhere" = 1.0) -> Method: ...
def strange(q: "type(fedavg)" = fedavg) -> Method: return fedavg()
def breaks(q: float = 1.0) -> Method: raise TypeError("no such thing")
def other() -> Method: return {}
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that Python finds, with a package of methods of all kinds."""
    folder = tmp_path / "oddpkg"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "odd.py").write_text(ODD)
    (folder / "broken.py").write_text("raise OSError('the sensor is off')")
    (folder / "leaves.py").write_text("raise SystemExit(0)")
    (folder / "lacks.py").write_text("import oddpkg.nothing")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "oddpkg"]:
        del sys.modules[name]


def document(**method: Any) -> dict[str, Any]:
    return {
        "data": {"target": "{target}"},
        "federation": {"rounds": 1, "clients_per_round": 2},
        "ranks": {"kind": "same", "rank": 8},
        "training": {"steps": 1},
        "method": method,
    }


def config(**method: Any) -> RunConfig:
    return parse_config(document(**method))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.fair:fair", ["No module named 'nowhere'", "is nowhere installed here, or on PYTHONPATH?"]),
        ("oddpkg.fare:fair", ["No module named 'oddpkg.fare'", "oddpkg is here; mend the name"]),
        ("oddpkg.broken:fair", ["importing oddpkg.broken raises OSError: the sensor is off"]),
        ("oddpkg.leaves:fair", ["importing oddpkg.leaves raises SystemExit: 0"]),
        ("oddpkg.lacks:fair", ["importing oddpkg.lacks raises ModuleNotFoundError: No module named 'oddpkg.nothing'"]),
        ("oddpkg.odd:fare", ["oddpkg.odd has no 'fare'; did you mean 'fair'?"]),
        ("oddpkg.odd:zzz", ["oddpkg.odd has no 'zzz'; there are Method, fedavg, number, fair"]),
        ("oddpkg.odd:number", ["it is 3 and cannot be called", "a function that returns a hetlora.Method"]),
        ("oddpkg.odd:needs", ["its argument q has no default"]),
        ("oddpkg.odd:untyped", ["its argument q has no type"]),
        ("oddpkg.odd:many", ["cannot give the argument *q"]),
        ("oddpkg.odd:unread", ["types of its arguments cannot be read: NameError: name 'Nowhere' is not defined"]),
        ("a:b:c", ["names no factory", "as in 'mypkg.fair:fair'"]),
        (":fair", ["names no factory"]),
        ("oddpkg.odd:", ["names no factory"]),
        (".odd:fair", ["names no factory"]),
        ("hetlroa", ["is not a method; did you mean 'hetlora'?", "or 'package.module:factory'"]),
    ],
)
@pytest.mark.usefixtures("package")
def test_a_name_without_a_factory_is_refused_with_the_reason(name: str, said: list[str]):
    with pytest.raises(ConfigError) as caught:
        config(name=name)
    [problem] = caught.value.problems
    assert problem.startswith(f"method.name: {name!r}")
    assert all(part in problem for part in said), problem


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "oddpkg.odd:other"}, "its factory returns dict; make it return a hetlora.Method"),
        ({"name": "oddpkg.odd:breaks"}, "its factory raises TypeError: no such thing"),
        ({"name": "oddpkg.odd:strange", "q": 1}, "q: no value of a configuration is a <class 'function'>"),
        ({"name": "oddpkg.odd:fair", "q": "x"}, "q = 'x': input should be a valid number"),
        ({"name": "oddpkg.odd:fair", "weight": "equal"}, "weight is not a key; did you mean 'weights'?"),
        ({"name": "oddpkg.odd:fair", "weights": "norm"}, "weights='norm' is not allowed"),
    ],
)
@pytest.mark.usefixtures("package")
def test_arguments_are_checked_as_those_of_the_table_are(method: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as caught:
        config(**method)
    [problem] = caught.value.problems
    assert said in problem
    assert problem.endswith(f"(method {method['name']})")


@pytest.mark.usefixtures("package")
def test_what_it_declares_is_respected():
    """FedAvg within a function of one's own needs one rank for all, too."""
    wanted = document(name="oddpkg.odd:fair")
    wanted["ranks"] = {"kind": "uniform", "min": 2, "max": 8}
    with pytest.raises(ConfigError, match=r"'oddpkg\.odd:fair' needs one rank for all"):
        parse_config(wanted)
    assert make_method(config(name="oddpkg.odd:fair", weights="equal")).ranks == "equal"


@pytest.mark.usefixtures("package")
def test_nothing_is_imported_that_is_not_admitted():
    def never(module: str) -> None:
        raise ValueError(f"{module} stays out")

    with pytest.raises(ValueError, match=r"'oddpkg\.odd:fair': oddpkg\.odd stays out"):
        find_method("oddpkg.odd:fair", never)
    assert "oddpkg" not in sys.modules
    assert find_method("hetlora", never), "the table is our own"


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["oddpkg.odd:fair", "hetlora"], ["fair", "hetlora"]),
        (["oddpkg.odd:fedavg", "fedavg"], ["oddpkg.odd:fedavg", "fedavg"]),
    ],
)
@pytest.mark.usefixtures("package")
def test_a_comparison_calls_it_by_its_factory_where_no_other_is_called_so(names: list[str], labels: list[str]):
    comparison = plan({**document(), "compare": {"methods": [{"name": name} for name in names]}})
    assert [method.label for method in comparison.methods] == labels
    assert [method.name for method in comparison.methods] == names
    for method in comparison.methods:
        [[run]] = method.final.values()
        assert not set(run.folder.name) & set(":.")


def test_other_code_is_another_run(package: Path):
    first = config(name="oddpkg.odd:fair")
    before, stamps = FileFingerprints().digests(first), FileFingerprints().stamps(first)
    assert changed_file(first, stamps) is None
    (package / "odd.py").write_text(ODD + "# and more\n")
    assert FileFingerprints().digests(first)["method.name"] != before["method.name"]
    assert "odd.py' changed while the comparison ran" in str(changed_file(first, stamps))
    assert "method.name" not in FileFingerprints().digests(config(name="hetlora"))


@pytest.mark.process
def test_every_command_takes_it(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """In a process of its own it is run, and compared by a worker; what that left is then read in this one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "fair", raising=False)  # of another test
    write_rows(tmp_path / "rows.jsonl", PHONES)
    sections = {
        "method": {"name": "fair:fair", "q": 2.0},
        "federation": {"rounds": 1, "clients_per_round": 2},
        "compare": {"methods": [{"name": "fair:fair", "q": 0.0}], "jobs": 2},
    }
    (tmp_path / "run.toml").write_text(phones(tiny, **sections), encoding="utf8")
    both = "import sys; from hetlora.cli import main; sys.exit(any(main([c, 'run.toml']) for c in ('run', 'compare')))"
    path = os.pathsep.join([str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", both],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=HANGS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "runs/phones/results.json").read_text("utf8"))
    assert [(run["label"], run["failed"]) for run in results["runs"]] == [("fair", None)]
    assert results["methods"][0]["method"] == "fair:fair"

    def said(*command: str, code: int = 0) -> str:
        assert cli.main(list(command)) == code, capsys.readouterr().err
        out, err = capsys.readouterr()
        return err if code else out

    refusal = said("generate", "runs/phones", "--prompt", "1", code=2)
    assert "'fair:fair': No module named 'fair'; is fair installed here" in refusal
    said("report", "runs/phones")
    assert "fair" not in sys.modules, "a report runs no code of a package"
    assert "<span>method fair</span>" in (tmp_path / "runs/phones/report.html").read_text("utf8")

    monkeypatch.syspath_prepend(EXAMPLES)
    said("generate", "runs/phones", "--prompt", "what is 1?", "--max-new-tokens", "2")
    said("export", "runs/phones", "--output", "taken", "--no-check")
    assert "`fair:fair`: Weigh a client by its examples" in (tmp_path / "taken/README.md").read_text("utf8")
    said("plan", "run.toml")
    said("data", "run.toml")
    said("resume", "runs/phones", "--quiet")
