"""Rules of the source: allowed imports and forbidden code.

A test is a rule. It looks at all it is about and fails with the list of what breaks it, each with its file and line.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import hetlora

SOURCE = Path(hetlora.__file__).resolve().parent
FILES = {
    ".".join(part for part in path.relative_to(SOURCE).with_suffix("").parts if part != "__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}
"""Modules by their names in the package, e.g. "adapter" or "methods.fedavg"; the package itself is empty."""


@cache
def trees() -> dict[str, ast.Module]:
    return {module: ast.parse(path.read_text("utf8")) for module, path in FILES.items()}


def located(module: str, line: int, what: str) -> str:
    return f"{FILES[module].relative_to(SOURCE.parent)}:{line}: {what}"


class Import(NamedTuple):
    module: str  # that imports
    name: str  # dotted, `from a.b import c` is a.b.c
    at_module_level: bool
    line: int

    def __str__(self) -> str:
        return located(self.module, self.line, f"imports {self.name}")

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]

    @property
    def own(self) -> str | None:
        """The module of the package that is imported."""
        if self.top != "hetlora":
            return None
        parts = self.name.split(".")[1:]
        while ".".join(parts) not in FILES:
            parts.pop()
        return ".".join(parts)


def _imports(module: str, node: ast.AST, *, at_module_level: bool) -> Iterator[Import]:
    """Yield what a module imports when it runs; imports under TYPE_CHECKING never run."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (Import(module, alias.name, at_module_level, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            for alias in child.names:
                yield Import(module, f"{child.module}.{alias.name}", at_module_level, child.lineno)
        else:
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(module, child, at_module_level=at_module_level and not is_function)


@cache
def imports() -> list[Import]:
    return [one for module, tree in trees().items() for one in _imports(module, tree, at_module_level=True)]


def none_of(found: Iterable[str]) -> None:
    """Fail with all that was found, should there be anything."""
    assert not (found := list(found)), "\n".join(["", *found])


def within(start: str) -> set[str]:
    """Return the modules whose names begin so."""
    return {module for module in FILES if module.startswith(start)}


# Who imports whom ---------------------------------------------------------------------------------------------------

LAYERS: dict[str, set[str]] = {
    "core": set(),
    "methods": {"core"},
    "testing": {"core", "methods"},
    "data": {"core"},
    "model": {"core", "data"},
    "training": {"core", "data", "model"},
    "config": {"core", "methods", "data", "model", "training"},
    "runs": {"core", "methods", "data", "model", "training", "config"},
    "commands": {"core", "methods", "testing", "data", "model", "training", "config", "runs"},
    "flower": {"core", "methods", "data", "model", "training", "config", "runs"},
}
"""Layer to the layers that it may import; `testing` is a single file.

All may import `errors` and the version; none may import `api` and `cli`.
"""

TOP = {"", "__main__", "_version", "api", "cli", "errors"}


def layer_of(module: str) -> str:
    return module.partition(".")[0]


def test_the_package_consists_of_these_layers():
    assert {layer_of(module) for module in FILES} == LAYERS.keys() | TOP
    assert Import("methods", "hetlora.methods.fedavg.fedavg", at_module_level=True, line=0).own == "methods.fedavg"


@pytest.mark.process
@pytest.mark.skipif(not (SOURCE.parents[1] / ".git").exists(), reason="git knows what it ignores, and this is no clone")
def test_nothing_of_the_repository_is_ignored_by_git():
    """What is ignored is in no wheel, and ruff does not look at it."""
    command = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    done = subprocess.run(command, cwd=SOURCE.parents[1], capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_a_layer_imports_only_the_layers_below_it():
    def allowed(one: Import) -> bool:
        assert one.own is not None
        target = layer_of(one.own) or one.name.rpartition(".")[2]
        return target in {"errors", "_version", layer_of(one.module)} | LAYERS[layer_of(one.module)]

    none_of(
        str(one) for one in imports() if one.own is not None and layer_of(one.module) in LAYERS and not allowed(one)
    )


def test_the_table_of_layers_has_no_cycle():
    assert len(list(TopologicalSorter(LAYERS).static_order())) == len(LAYERS)


NEVER: dict[str, tuple[str, ...]] = {
    "core.ranks": ("core.types", "core.adapter"),  # torch: who has which rank is arithmetic
    "flower": ("training.simulation",),  # engines do not know each other
    "training.local": ("training.simulation",),
    "runs.runner": ("data", "runs.local_experiment"),  # it conducts any experiment
    "runs.tracking": ("core", "training", "runs.runner", "runs.local_experiment"),
    "commands.report": (
        "core",
        "methods",
        "data",
        "model",
        "training",
        "config",
        "runs.runner",
        "runs.local_experiment",
    ),
    "methods": ("core.admission", "core.robust", "core.round"),
}
"""Module or package to parts of lower layers that it must not import either."""


def test_what_a_module_does_not_know():
    def inside(module: str, package: str) -> bool:
        return f"{module}.".startswith(f"{package}.")

    none_of(
        str(one)
        for one in imports()
        for package, foreign in NEVER.items()
        if one.own is not None and inside(one.module, package) and any(inside(one.own, name) for name in foreign)
    )


def test_the_table_of_methods_has_every_method():
    beside = {"methods.listing", "methods.lookup"}
    none_of(within("methods.") - beside - {one.own for one in imports() if one.module == "methods"})


def test_a_method_needs_torch_alone():
    found = [one for one in imports() if one.module in within("methods.") and one.own is None]
    none_of(str(one) for one in found if one.top not in sys.stdlib_module_names | {"torch"})


def test_no_module_imports_the_top():
    none_of(
        str(one) for one in imports() if one.own in ("api", "cli") and one.module not in ("", "__main__", "api", "cli")
    )
    none_of(
        str(one)
        for one in imports()
        if (one.own == "cli" and one.module != "__main__") or (one.module == "errors" and one.own is not None)
    )


def test_what_a_method_does_is_declared_and_not_known_by_its_name():
    """No comparison with the name of a method outside `methods`: a method may be called as its author likes."""
    from hetlora.methods import METHODS

    found = []
    for module, tree in trees().items():
        compared = [one for one in ast.walk(tree) if isinstance(one, ast.Compare) and layer_of(module) != "methods"]
        for one in compared:
            sides = ast.unparse(one)
            named = {part.value for part in ast.walk(one) if isinstance(part, ast.Constant)} & METHODS.keys()
            if named and "method" in sides:
                found.append(located(module, one.lineno, sides))
    none_of(found)


def test_no_command_imports_another():
    """But the report, which shows the table of a comparison as the comparison formats it, and a comparison's `report`."""
    allowed = {
        ("commands.report.comparison", "commands.compare.statistics"),
        ("commands.report.comparison", "commands.compare.formats"),
        ("commands.compare.comparison", "commands.report"),
    }

    def command(module: str | None) -> str:
        return ".".join((module or "").split(".")[:2])

    within_commands = [one for one in imports() if layer_of(one.module) == layer_of(one.own or "") == "commands"]
    none_of(
        str(one)
        for one in within_commands
        if command(one.own) != command(one.module) and (one.module, one.own) not in allowed
    )


def test_no_method_imports_another():
    """But `steady`, which is HetLoRA averaged over rounds, and the table of them all."""
    found = [one for one in imports() if one.module in within("methods.") and one.own in within("methods.")]
    none_of(str(one) for one in found if (one.module, one.own) != ("methods.steady", "methods.hetlora"))


def test_the_wire_is_core_alone():
    known = within("core") | within("flower.wire") | {"errors", None}
    none_of(str(one) for one in imports() if one.module in within("flower.wire") and one.own not in known)


def test_core_and_the_wire_need_torch_and_numpy_alone():
    pure = [one for one in imports() if layer_of(one.module) == "core" or one.module.startswith("flower.wire")]
    none_of(str(one) for one in pure if one.own is None and one.top not in sys.stdlib_module_names | {"torch", "numpy"})


def test_ranks_records_and_errors_need_the_standard_library_alone():
    light = {"core.ranks", "runs.records", "errors"}
    none_of(
        str(one)
        for one in imports()
        if one.module in light and one.own is None and one.top not in sys.stdlib_module_names
    )


def test_only_a_tracker_knows_its_package():
    trackers = {"tensorboard", "trackio"}
    found = [one for one in imports() if one.top in trackers]
    none_of(str(one) for one in found if (one.module, one.top) != ("runs.tracking.trackio", "trackio"))


def test_what_flower_starts_for_every_message_loads_neither_torch_nor_a_model():
    light = {f"flower.{name}" for name in ("client_app", "client_process", "flwr_messages", "node_config", "envelope")}
    known = light | {None, "", "_version", "errors"}
    assert light <= FILES.keys()
    none_of(
        str(one)
        for one in imports()
        if one.module in light
        and one.at_module_level
        and (one.top in ("torch", "numpy", "pydantic", "transformers") or one.own not in known)
    )


def test_a_library_is_known_in_its_place_alone():
    homes = {
        "peft": {"model.peft_files", "model.peft_check", "commands.export.read_back"},
        "flwr": within("flower"),  # and Flower's simulation, which runs on Ray
        "datasets": {"data.huggingface"},
    }
    none_of(str(one) for one in imports() if one.module not in homes.get(one.top, FILES))


def test_heavy_packages_are_imported_where_they_are_used():
    heavy = {"datasets", "jinja2", "transformers", "peft", "plotly", "rouge_score", "tensorboard", "trackio"}
    none_of(str(one) for one in imports() if one.at_module_level and one.top in heavy)


def test_the_front_door_imports_nothing_heavy():
    """What these modules reach at module level, step by step, is the standard library."""
    seen: set[str] = set()
    queue = ["", "cli", "errors", "runs.records", "commands.report", "api"]
    found = []
    while queue:
        seen.add(module := queue.pop())
        for one in (one for one in imports() if one.module == module and one.at_module_level):
            if one.own is None and one.top not in sys.stdlib_module_names:
                found.append(str(one))
            elif one.own is not None:
                # A module is loaded after the packages it lies in.
                queue += [known for known in FILES if one.own.startswith(known) and known not in seen]
    none_of(found)


# What no file may contain: what could run code that arrives as data is in test_security.py ------------------------------


def test_no_file_touches_the_global_random_state():
    touching = {"random.seed", "random.random", "random.shuffle", "random.sample", "random.choice", "random.choices"}
    touching |= {"torch.manual_seed", "torch.seed", "np.random.seed", "numpy.random.seed"}
    calls = [(module, one) for module, tree in trees().items() for one in ast.walk(tree) if isinstance(one, ast.Call)]
    named = [(module, call.lineno, ast.unparse(call.func)) for module, call in calls]
    none_of(located(module, line, name) for module, line, name in named if name in touching)


# The front doors ----------------------------------------------------------------------------------------------------


class Listed(NamedTuple):
    names: list[str]
    line: int


def public_names(tree: ast.Module) -> Listed | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            assert all(isinstance(name, str) for name in names)
            return Listed(list(names), node.lineno)
    return None


def isort_order(name: str) -> tuple[int, list[tuple[int, str]]]:
    """Constants, then classes, then the rest; in each, by name with numbers compared as numbers."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    parts = [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]
    return kind, parts


@cache
def public() -> dict[str, list[str]]:
    return {module: listed for module, tree in trees().items() if (listed := public_names(tree)) is not None}


def loaded(module: str) -> ModuleType:
    return importlib.import_module(f"hetlora.{module}".rstrip("."))


def test_every_module_with_code_lists_its_public_names():
    none_of(
        located(module, 1, "no __all__")
        for module, tree in trees().items()
        if module not in public() and len(tree.body) > 1
    )


def test_public_names_are_sorted_and_unique_and_exist():
    found = []
    for module, (names, line) in public().items():
        if names != sorted(set(names), key=isort_order):
            found.append(located(module, line, f"not sorted and unique: {names}"))
        found += [located(module, line, f"no {name}") for name in names if not hasattr(loaded(module), name)]
    none_of(found)


def test_every_public_function_and_class_has_a_docstring():
    """Read from the source: a dataclass or named tuple without one would be given a made-up one."""
    found = []
    for module, (names, _) in public().items():
        for value in (getattr(loaded(module), name, None) for name in names):
            if not (inspect.isfunction(value) or inspect.isclass(value)):
                continue
            home = value.__module__.removeprefix("hetlora").removeprefix(".")
            kinds = (ast.FunctionDef, ast.ClassDef)
            definition = next(
                one for one in trees()[home].body if isinstance(one, kinds) and one.name == value.__name__
            )
            inner = definition.body if isinstance(definition, ast.ClassDef) else []
            methods = [one for one in inner if isinstance(one, ast.FunctionDef) and not one.name.startswith("_")]
            without = [one for one in (definition, *methods) if not ast.get_docstring(one)]
            found += [located(home, one.lineno, f"{one.name} has no docstring") for one in without]
    none_of(found)


def test_every_module_says_what_it_is():
    none_of(located(module, 1, "no docstring") for module, tree in trees().items() if not ast.get_docstring(tree))


def test_the_former_name_of_the_round_works_and_says_where_it_is_now():
    former = importlib.import_module("hetlora.federated")
    for name, (module, now) in former.MOVED.items():
        with pytest.warns(DeprecationWarning, match=rf"{module.__name__}\.{now}"):
            assert getattr(former, name) is getattr(module, now)
    with pytest.raises(AttributeError, match="nothing"):
        former.nothing  # noqa: B018


def test_the_version_is_one():
    root = SOURCE.parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text("utf8"))["project"]
    assert project["version"] == hetlora.__version__
    assert f"\nversion: {hetlora.__version__}\n" in (root / "CITATION.cff").read_text("utf8")


ROOT = Path(__file__).resolve().parent.parent
BESIDE = ("benchmarks", "proofs", "studies", "tools")


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [str(path.relative_to(ROOT)) for part in BESIDE for path in sorted((ROOT / part).rglob("*.py"))]
)
def test_what_stands_beside_the_package_imports_names_that_there_are(path: str):
    # Most of it runs in make test-all alone: without this, a name that has moved would stay unnoticed until then.
    try:
        importlib.import_module(path.removesuffix(".py").replace("/", "."))
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in ("hetlora", *BESIDE):
            raise
        pytest.skip(f"{error.name} is not installed")
