"""Who may import whom, and what no file may contain: rules that keep the algorithm readable and input harmless.

A test is a rule. It looks at all it is about and fails with the list of what breaks it, each with its file and line.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Set
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

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


def told(module: str, line: int, what: str) -> str:
    return f"{FILES[module].relative_to(SOURCE.parent)}:{line}: {what}"


class Import(NamedTuple):
    module: str  # that imports
    name: str  # dotted, `from a.b import c` is a.b.c
    at_module_level: bool
    line: int

    def __str__(self) -> str:
        return told(self.module, self.line, f"imports {self.name}")

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


def beyond(module: str, own: Set[str] | None = None, foreign: Set[str] | None = None) -> list[str]:
    """Return what a module imports beyond what it may.

    Args:
        module: Who imports.
        own: Modules of the package that it may import; None: any.
        foreign: Packages that are neither ours nor the standard library's that it may import; None: any.
    """
    assert module in FILES, f"there is no {module}"
    return [
        str(one)
        for one in imports()
        if one.module == module
        and (
            (own is not None and one.own is not None and one.own not in own)
            or (foreign is not None and one.own is None and one.top not in sys.stdlib_module_names | foreign)
        )
    ]


def none_of(found: Iterable[str]) -> None:
    """Fail with all that was found, should there be anything."""
    assert not (found := list(found)), "\n".join(["", *found])


def within(start: str) -> set[str]:
    """Return the modules whose names begin so."""
    return {module for module in FILES if module.startswith(start)}


METHODS = within("methods.")


# Who imports whom ---------------------------------------------------------------------------------------------------


def test_the_walk_finds_the_package():
    assert {"", "adapter", "federated", "data.text", "methods"} <= FILES.keys()
    assert METHODS
    assert Import("methods", "hetlora.methods.fedavg.fedavg", at_module_level=True, line=0).own == "methods.fedavg"
    assert [one.own for one in imports() if one.module == "ranks" and one.own]


def test_the_algebra_knows_torch_and_nothing_else():
    none_of(beyond("exact_sum", set(), {"numpy", "torch"}) + beyond("adapter", {"errors", "exact_sum"}, {"torch"}))


def test_the_round_knows_the_algebra_and_the_admission_only():
    none_of(beyond("federated", {"adapter", "admission", "errors", "versioned"}, {"torch"}))


def test_the_admission_knows_the_algebra_only():
    none_of(beyond("admission", {"adapter", "errors"}))


def test_the_wire_knows_the_round_and_not_where_anybody_trains():
    found = beyond("compression", {"adapter"}, {"torch"})
    found += beyond("message", {"adapter", "compression", "errors", "federated"}, {"torch"})
    found += beyond("wire", {"adapter", "admission", "compression", "errors", "federated", "message"}, {"torch"})
    none_of(found)


def test_a_method_knows_the_round_and_the_algebra_and_no_other_method():
    known, around = {"adapter", "aggregation", "errors", "federated"}, {"methods.hetlora"}
    found = beyond("methods.steady", known | around, {"torch"})  # it is HetLoRA, averaged
    found += [fault for one in METHODS - {"methods.steady"} for fault in beyond(one, known, {"torch"})]
    none_of(found)


def test_sums_know_the_round_and_the_algebra_and_no_method():
    none_of(beyond("aggregation", {"adapter", "exact_sum", "federated"}, {"torch"}))


def test_cohorts_know_the_round_only():
    none_of(beyond("cohort", {"federated"}, set()))


def test_the_catalogue_of_methods_reads_docstrings_and_knows_none():
    none_of(beyond("catalogue", set(), set()))


def test_models_know_neither_the_round_nor_the_methods():
    layers = {"lora_layer", "output_head", "packing"}
    found = beyond("quantize", {"errors"})
    found += beyond("lora_layer", {"adapter", "errors"})
    found += beyond("output_head", {"errors"})
    found += beyond("packing", {"data.text"})
    found += beyond("stacked", {"adapter", "errors"})
    found += beyond("lora_model", {"adapter", "data.text", "errors", "quantize"} | layers)
    found += beyond("full_model", {"adapter", "errors", "lora_model", "quantize"} | layers)
    found += beyond("merged", {"adapter", "lora_model", "quantize"})
    none_of(found)


def test_the_table_of_methods_imports_every_method_and_nothing_else():
    assert {one.own for one in imports() if one.module == "methods" and one.own is not None} == METHODS | {"federated"}


def test_records_need_the_standard_library_only():
    none_of(beyond("records", set(), set()))


def test_errors_need_nothing():
    none_of(beyond("errors", set(), set()))


def test_reports_read_records_only():
    known = {"", "errors", "records", "run_folder"} | within("report")
    none_of(fault for module in within("report") for fault in beyond(module, known, {"plotly"}))


def test_training_does_not_know_where_it_runs():
    none_of(
        beyond("training", FILES.keys() - {"simulation", "experiment", "cli"} - within("methods") - within("flower"))
    )


def test_costs_know_the_model_and_its_training_and_no_method_or_run():
    model = {"data.text", "lora_model", "packing", "stacked", "training"}
    none_of(beyond("costs", {"adapter", "errors", "quantize"} | model, {"torch", "transformers"}))


def test_who_has_which_rank_is_pure_arithmetic():
    none_of(beyond("ranks", {"errors", "population"}, set()))


def test_what_a_configuration_assigns_is_known_without_a_run():
    allowed = {"costs", "errors", "federated", "population", "ranks", "robust", "training"}
    none_of(beyond("assignment", allowed | within("config") | within("methods")))


def test_what_conducts_a_run_knows_neither_its_data_nor_where_clients_train():
    shared = {"adapter", "errors", "federated", "result", "run_folder"}
    run = {"", "checkpoint", "config", "lora_model", "memory", "records", "training", "under_way"}
    found = beyond("conduct", shared | run | {"tracking.fan_out", "tracking.figures"})
    found += beyond("under_way", {"adapter", "federated"})
    found += beyond("checkpoint", shared | {"evaluation"})
    found += beyond("run_folder", {"errors"}, set())
    found += beyond("local_files", {"config", "errors"})
    none_of(found)


def test_what_is_taken_away_is_taken_from_a_folder_and_no_run_knows_of_it():
    parts = within("take_away")
    others = FILES.keys() - parts - {"", "cli", "runs"}
    found = [fault for module in others for fault in beyond(module, FILES.keys() - parts)]
    for part in ("learned", "card", "generate"):
        found += beyond(f"take_away.{part}", FILES.keys() - {"experiment", "conduct", "simulation"})
    found += beyond("start", {"adapter", "errors", "lora_model", "peft_io"})
    found += beyond("peft_io", {"adapter", "errors"})
    none_of(found)


def test_trackers_know_records_and_not_what_runs():
    known = {"errors", "records", "run_folder"} | within("tracking")
    found = [fault for module in within("tracking") for fault in beyond(module, known)]
    for tracker in ("tensorboard", "trackio"):
        found += beyond(f"tracking.{tracker}", {"tracking.base"})  # not each other
    none_of(found)


def test_only_a_tracker_knows_its_package():
    trackers = {"tensorboard", "trackio"}
    none_of(
        str(one)
        for one in imports()
        if one.top in trackers and (one.module, one.top) != ("tracking.trackio", "trackio")
    )


def test_bounds_on_influence_are_arithmetic_on_updates():
    none_of(beyond("robust", {"adapter", "exact_sum", "federated"}, {"torch"}))


def test_engines_do_not_know_each_other():
    flower = within("flower")
    found = beyond("simulation", FILES.keys() - flower)
    none_of(found + [fault for module in flower for fault in beyond(module, FILES.keys() - {"simulation"})])


def test_what_flower_starts_for_every_message_loads_neither_torch_nor_a_model():
    light = {f"flower.{name}" for name in ("client_app", "worker", "messages", "node", "parcel")}
    none_of(
        str(one)
        for one in imports()
        if one.module in light
        and one.at_module_level
        and (one.top in ("torch", "numpy", "pydantic", "transformers") or one.own not in {None, "", "errors"} | light)
    )


def test_nobody_imports_the_command_line():
    none_of(str(one) for one in imports() if one.own == "cli")


def test_only_the_exporter_knows_peft_and_only_flower_knows_flwr():
    homes = {"peft": {"peft_io"}, "flwr": within("flower")}  # and Flower's simulation, which runs on Ray
    none_of(str(one) for one in imports() if one.module not in homes.get(one.top, FILES))


def test_heavy_packages_are_imported_where_they_are_used():
    heavy = {"datasets", "flwr_datasets", "transformers", "peft", "plotly", "rouge_score", "tensorboard", "trackio"}
    none_of(
        str(one)
        for one in imports()
        if one.at_module_level
        # A configuration that is checked knows the trackers, and loads no torch.
        and (one.top in heavy or (one.top == "torch" and one.module in within("tracking")))
    )


def test_only_the_data_know_the_libraries_of_data():
    homes = {"datasets": {"data.huggingface", "data.partition"}, "flwr_datasets": {"data.partition"}}
    none_of(str(one) for one in imports() if one.module not in homes.get(one.top, FILES))


def test_the_front_door_imports_nothing_heavy():
    """What these modules reach at module level, step by step, is the standard library."""
    seen: set[str] = set()
    queue = ["", "cli", "errors", "records", "report", "runs"]
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
    none_of(told(module, line, name) for module, line, name in named if name in touching)


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
        told(module, 1, "no __all__")
        for module, tree in trees().items()
        if module not in public() and len(tree.body) > 1
    )


def test_public_names_are_sorted_and_unique_and_exist():
    found = []
    for module, (names, line) in public().items():
        if names != sorted(set(names), key=isort_order):
            found.append(told(module, line, f"not sorted and unique: {names}"))
        found += [told(module, line, f"no {name}") for name in names if not hasattr(loaded(module), name)]
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
            found += [told(home, one.lineno, f"{one.name} has no docstring") for one in without]
    none_of(found)


def test_every_module_says_what_it_is():
    none_of(told(module, 1, "no docstring") for module, tree in trees().items() if not ast.get_docstring(tree))
