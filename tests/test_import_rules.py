"""Who may import whom, and what no file may contain: rules that keep the algorithm readable and input harmless."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import hetlora

SOURCE = Path(hetlora.__file__).resolve().parent
PATHS = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text("utf8")) for path in PATHS}


def module_name(path: Path) -> str:
    parts = ("hetlora", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): tree for path, tree in TREES.items()}


class Import(NamedTuple):
    name: str  # dotted, `from a.b import c` is a.b.c
    at_module_level: bool


def imports(tree: ast.Module) -> list[Import]:
    """Return what a module imports when it runs; imports under TYPE_CHECKING never run."""
    return list(_imports(tree, at_module_level=True))


def _imports(node: ast.AST, *, at_module_level: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, at_module_level) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (Import(f"{child.module}.{alias.name}", at_module_level) for alias in child.names)
        else:
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(child, at_module_level=at_module_level and not is_function)


def own(module: str) -> set[str]:
    """Return the modules of the package that a module imports, e.g. {"adapter", "methods.fedavg"}."""
    found = set()
    for name, _ in imports(MODULES[module]):
        parts = name.split(".")
        if parts[0] != "hetlora":
            continue
        while ".".join(parts) not in MODULES:
            parts.pop()
        found.add(".".join(parts[1:]))
    return found


def foreign(module: str) -> set[str]:
    """Return the top-level packages a module imports that are neither ours nor the standard library's."""
    tops = {name.split(".")[0] for name, _ in imports(MODULES[module])}
    return tops - sys.stdlib_module_names - {"hetlora"}


METHOD_FILES = [name for name in MODULES if name.startswith("hetlora.methods.")]


# Who imports whom ---------------------------------------------------------------------------------------------------


def test_the_walk_finds_the_package():
    assert {"hetlora.adapter", "hetlora.federated", "hetlora.data.text", "hetlora.methods"} <= MODULES.keys()
    assert METHOD_FILES


def test_the_algebra_knows_torch_and_nothing_else():
    assert own("hetlora.exact_sum") == set()
    assert foreign("hetlora.exact_sum") == {"numpy", "torch"}
    assert own("hetlora.adapter") <= {"errors", "exact_sum"}
    assert foreign("hetlora.adapter") == {"torch"}


def test_the_round_knows_the_algebra_and_the_admission_only():
    assert own("hetlora.federated") <= {"adapter", "admission", "errors", "versioned"}
    assert foreign("hetlora.federated") <= {"torch"}


def test_the_admission_knows_the_algebra_only():
    assert own("hetlora.admission") <= {"adapter", "errors"}


def test_the_wire_knows_the_round_and_not_where_anybody_trains():
    assert own("hetlora.compression") <= {"adapter"}
    assert own("hetlora.message") <= {"adapter", "compression", "errors", "federated"}
    assert own("hetlora.wire") <= {"adapter", "admission", "compression", "errors", "federated", "message"}
    assert foreign("hetlora.compression") | foreign("hetlora.message") | foreign("hetlora.wire") == {"torch"}


@pytest.mark.parametrize("module", METHOD_FILES)
def test_a_method_knows_the_round_and_the_algebra_and_no_other_method(module: str):
    around = {"methods.hetlora"} if module == "hetlora.methods.steady" else set()  # it is HetLoRA, averaged
    assert own(module) <= {"adapter", "aggregation", "errors", "federated"} | around
    assert foreign(module) <= {"torch"}


def test_sums_know_the_round_and_the_algebra_and_no_method():
    assert own("hetlora.aggregation") <= {"adapter", "exact_sum", "federated"}
    assert foreign("hetlora.aggregation") == {"torch"}


def test_cohorts_know_the_round_only():
    assert own("hetlora.cohort") <= {"federated"}
    assert foreign("hetlora.cohort") == set()


def test_the_catalogue_of_methods_reads_docstrings_and_knows_none():
    assert own("hetlora.catalogue") == set()
    assert foreign("hetlora.catalogue") == set()


def test_models_know_neither_the_round_nor_the_methods():
    assert own("hetlora.quantize") <= {"errors"}
    layers = {"lora_layer", "output_head", "packing"}
    assert own("hetlora.lora_layer") <= {"adapter", "errors"}
    assert own("hetlora.output_head") <= {"errors"}
    assert own("hetlora.packing") <= {"data.text"}
    assert own("hetlora.stacked") <= {"adapter", "errors"}
    assert own("hetlora.lora_model") <= {"adapter", "data.text", "errors", "quantize"} | layers
    assert own("hetlora.full_model") <= {"adapter", "errors", "lora_model", "quantize"} | layers
    assert own("hetlora.merged") <= {"adapter", "lora_model", "quantize"}


def test_the_table_of_methods_imports_every_method_and_nothing_else():
    files = {name.removeprefix("hetlora.") for name in METHOD_FILES}
    assert own("hetlora.methods") == files | {"federated"}


def test_records_need_the_standard_library_only():
    assert own("hetlora.records") == set()
    assert foreign("hetlora.records") == set()


def test_errors_need_nothing():
    assert own("hetlora.errors") == set()
    assert foreign("hetlora.errors") == set()


def test_reports_read_records_only():
    for module in MODULES:
        if module.startswith("hetlora.report"):
            parts = {name for name in own(module) if name.startswith("report")}
            assert own(module) <= {"", "errors", "records", "run_folder"} | parts, module
            assert foreign(module) <= {"plotly"}, module


def test_training_does_not_know_where_it_runs():
    assert not own("hetlora.training") & {"simulation", "experiment", "cli", "methods"}
    assert not {name for name in own("hetlora.training") if name.startswith("flower")}


def test_costs_know_the_model_and_its_training_and_no_method_or_run():
    model = {"data.text", "lora_model", "packing", "stacked", "training"}
    assert own("hetlora.costs") <= {"adapter", "errors", "quantize"} | model
    assert foreign("hetlora.costs") == {"torch", "transformers"}


def test_who_has_which_rank_is_pure_arithmetic():
    assert own("hetlora.ranks") <= {"errors", "population"}
    assert foreign("hetlora.ranks") == set()


def test_what_a_configuration_assigns_is_known_without_a_run():
    allowed = {"config", "costs", "errors", "federated", "methods", "population", "ranks", "robust", "training"}
    assert {name.partition(".")[0] for name in own("hetlora.assignment")} <= allowed


def test_what_conducts_a_run_knows_neither_its_data_nor_where_clients_train():
    shared = {"adapter", "errors", "federated", "result", "run_folder"}
    assert own("hetlora.conduct") <= shared | {
        "",
        "checkpoint",
        "config",
        "lora_model",
        "memory",
        "records",
        "tracking.fan_out",
        "tracking.figures",
        "training",
        "under_way",
    }
    assert own("hetlora.under_way") <= {"adapter", "federated"}
    assert own("hetlora.checkpoint") <= shared | {"evaluation"}
    assert own("hetlora.run_folder") <= {"errors"}
    assert foreign("hetlora.run_folder") == set()
    assert own("hetlora.local_files") <= {"config", "errors"}


def test_what_is_taken_away_is_taken_from_a_folder_and_no_run_knows_of_it():
    for module in MODULES:
        if not module.startswith("hetlora.take_away") and module not in ("hetlora.cli", "hetlora.runs", "hetlora"):
            assert not {name for name in own(module) if name.startswith("take_away")}, module
    for module in ("learned", "card", "generate"):
        assert not {
            name for name in own(f"hetlora.take_away.{module}") if name in ("experiment", "conduct", "simulation")
        }
    assert own("hetlora.start") == {"adapter", "errors", "lora_model", "peft_io"}
    assert own("hetlora.peft_io") == {"adapter", "errors"}


def test_trackers_know_records_and_not_what_runs():
    for module in MODULES:
        if module.startswith("hetlora.tracking"):
            parts = {name for name in own(module) if name.startswith("tracking")}
            assert own(module) <= {"errors", "records", "run_folder"} | parts, module
    for tracker in ("tensorboard", "trackio"):
        assert own(f"hetlora.tracking.{tracker}") == {"tracking.base"}, "not each other"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_a_tracker_knows_its_package(module: str):
    allowed = {"trackio"} if module == "hetlora.tracking.trackio" else set()
    assert foreign(module) & {"tensorboard", "trackio"} <= allowed


def test_bounds_on_influence_are_arithmetic_on_updates():
    assert own("hetlora.robust") <= {"adapter", "exact_sum", "federated"}
    assert foreign("hetlora.robust") <= {"torch"}


def test_engines_do_not_know_each_other():
    assert not {name for name in own("hetlora.simulation") if name.startswith("flower")}
    for module in MODULES:
        if module.startswith("hetlora.flower"):
            assert "simulation" not in own(module)


def test_what_flower_starts_for_every_message_loads_neither_torch_nor_a_model():
    light = {"hetlora.flower.client_app", "hetlora.flower.worker", "hetlora.flower.messages", "hetlora.flower.node"}
    for module in light | {"hetlora.flower.parcel"}:
        top = {name for name, at_module_level in imports(MODULES[module]) if at_module_level}
        assert not {name for name in top if name.split(".")[0] in ("torch", "numpy", "pydantic", "transformers")}, (
            module
        )
        named = {name.rpartition(".")[0] for name in top if name.startswith("hetlora.")}
        assert named <= light | {"hetlora", "hetlora.errors", "hetlora.flower.parcel"}, module


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nobody_imports_the_command_line(module: str):
    assert "cli" not in own(module)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_the_exporter_knows_peft_and_only_flower_knows_flwr(module: str):
    allowed = {"hetlora.peft_io": {"peft"}}.get(module, set())
    if module.startswith("hetlora.flower"):
        allowed = {"flwr"}  # and its simulation, which runs on Ray
    assert foreign(module) & {"peft", "flwr"} <= allowed


@pytest.mark.parametrize("module", sorted(MODULES))
def test_heavy_packages_are_imported_where_they_are_used(module: str):
    at_top = {name.split(".")[0] for name, at_module_level in imports(MODULES[module]) if at_module_level}
    heavy = {"datasets", "flwr_datasets", "transformers", "peft", "plotly", "rouge_score"}
    assert not at_top & (heavy | {"tensorboard", "trackio"})
    if module.startswith("hetlora.tracking"):
        assert "torch" not in at_top, "a configuration that is checked loads none of it"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_the_data_know_the_libraries_of_data(module: str):
    allowed = {"hetlora.data.huggingface": {"datasets"}, "hetlora.data.partition": {"datasets", "flwr_datasets"}}
    assert foreign(module) & {"datasets", "flwr_datasets"} <= allowed.get(module, set())


@pytest.mark.parametrize(
    "module", ["hetlora", "hetlora.cli", "hetlora.errors", "hetlora.records", "hetlora.report", "hetlora.runs"]
)
def test_the_front_door_imports_nothing_heavy(module: str):
    """What these modules reach at module level, step by step, is the standard library."""
    seen, queue = set(), [module]
    while queue:
        name = queue.pop()
        seen.add(name)
        for target, at_module_level in imports(MODULES[name]):
            if not at_module_level:
                continue
            top = target.split(".")[0]
            assert top == "hetlora" or top in sys.stdlib_module_names, f"{name} imports {target}"
            queue += [known for known in MODULES if target.startswith(known) and known not in seen]


# What no file may contain -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS, ids=module_name)
def test_no_file_can_run_code_that_arrives_as_data(path: Path):
    names = {name.split(".")[0] for name, _ in imports(TREES[path])}
    assert not names & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}
    for call in (node for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)):
        function = ast.unparse(call.func)
        where = f"{path.name}:{call.lineno}: {function}"
        assert function not in {"eval", "exec", "compile", "__import__", "torch.load", "torch.save"}, where
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("trust_remote_code", "False") == "False", where
        # In zip it means another thing; everywhere else it would let keys that fit nothing pass.
        assert keywords.get("strict") != "False" or function == "zip", where


@pytest.mark.parametrize("path", PATHS, ids=module_name)
def test_no_file_touches_the_global_random_state(path: Path):
    touching = {"random.seed", "random.random", "random.shuffle", "random.sample", "random.choice", "random.choices"}
    touching |= {"torch.manual_seed", "torch.seed", "np.random.seed", "numpy.random.seed"}
    calls = {ast.unparse(node.func) for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)}
    assert not calls & touching


# The front doors ----------------------------------------------------------------------------------------------------


def public_names(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            assert all(isinstance(name, str) for name in names)
            return list(names)
    return None


def isort_order(name: str) -> tuple[int, list[tuple[int, str]]]:
    """Constants, then classes, then the rest; in each, by name with numbers compared as numbers."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    parts = [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]
    return kind, parts


WITH_PUBLIC_NAMES = sorted(name for name, tree in MODULES.items() if public_names(tree) is not None)


def test_every_module_with_code_lists_its_public_names():
    without = {name for name, tree in MODULES.items() if name not in WITH_PUBLIC_NAMES and len(tree.body) > 1}
    assert not without


@pytest.mark.parametrize("module", WITH_PUBLIC_NAMES)
def test_public_names_are_sorted_and_unique_and_exist(module: str):
    names = public_names(MODULES[module]) or []
    assert names == sorted(names, key=isort_order)
    assert len(names) == len(set(names))
    loaded = importlib.import_module(module)
    assert not [name for name in names if not hasattr(loaded, name)]


@pytest.mark.parametrize("module", WITH_PUBLIC_NAMES)
def test_every_public_function_and_class_has_a_docstring(module: str):
    """Read from the source: a dataclass or named tuple without one would be given a made-up one."""
    loaded = importlib.import_module(module)
    for name in public_names(MODULES[module]) or []:
        value = getattr(loaded, name)
        if not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        home = MODULES[value.__module__]
        kinds = (ast.FunctionDef, ast.ClassDef)
        definition = next(node for node in home.body if isinstance(node, kinds) and node.name == value.__name__)
        assert ast.get_docstring(definition), f"{value.__module__}.{name}"
        methods = definition.body if isinstance(definition, ast.ClassDef) else []
        for method in methods:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                assert ast.get_docstring(method), f"{value.__module__}.{name}.{method.name}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_says_what_it_is(module: str):
    assert ast.get_docstring(MODULES[module])
