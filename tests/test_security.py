"""Input never executes, writes outside the run's folder, or controls a terminal: see SECURITY.md."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file

from hetlora.cli import main
from hetlora.config import parse_config
from hetlora.config.build_data import load_federation
from hetlora.errors import ConfigError, DataError, HetLoraError, ModelError
from hetlora.model.lora_model import build_base, load_base, load_tokenizer
from hetlora.runs.display import LiveDisplay, PlainDisplay, QuietDisplay, describe
from hetlora.runs.folder import run_lock
from hetlora.runs.local_experiment import LocalExperiment, resume
from hetlora.runs.records import RoundRecord, read_records

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("src/hetlora", "studies", "benchmarks", "proofs", "tools", "examples", "templates")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


# What no source may do ----------------------------------------------------------------------------------------------

UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve"}
LOADERS_OF_OBJECTS = {"yaml", "ruamel", "oyaml"}
CALLS = {
    "eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__",
    "torch.load", "torch.save", "torch.jit.load", "torch.package.PackageImporter", "torch.hub.load", "numpy.load", "numpy.save",
    "numpy.savez", "numpy.fromfile", "pandas.read_pickle", "os.system", "os.popen", "os.posix_spawn", "os.posix_spawnp",
    "tempfile.mktemp", "hashlib.md5", "hashlib.sha1", "ssl._create_unverified_context", "runpy.run_path", "runpy.run_module",
    "importlib.util.spec_from_file_location", "code.interact",
}  # fmt: skip
RUNS_PROGRAMS = re.compile(r"os\.(exec|spawn)[lv]p?e?")
KEYWORDS = {"shell": "True", "allow_pickle": "True", "verify": "False", "weights_only": "False"}
"""Keywords that no call may have at this value, whatever it calls."""

ALLOWED = {
    ("src/hetlora/__init__.py", "importlib.import_module"): "of a table of our own modules, in that file",
    ("src/hetlora/api.py", "importlib.import_module"): "of the table of engines, in that file",
    ("benchmarks/__main__.py", "importlib.import_module"): "of a table of the benchmarks, in that file",
    ("src/hetlora/flower/guarded_superlink.py", "importlib.import_module"): "of modules of Flower, named in that file",
    (
        "src/hetlora/runs/tracking/__init__.py",
        "importlib.import_module",
    ): "of tables of packages and of trackers",
    (
        "src/hetlora/methods/lookup.py",
        "importlib.import_module",
    ): "a person's own method, as `method.name` says; a Flower client first asks its own settings",
    (
        "src/hetlora/flower/client_process.py",
        "os.posix_spawn",
    ): "our own interpreter and module, no shell; subprocess minds its outliving",
}
"""What may stand where, and why."""


def faults(text: str) -> list[tuple[int, str]]:
    """Return the calls and imports of a source that could run what arrives as data, or would not see that it was changed.

    Each with its line.
    """
    tree = ast.parse(text)
    full: dict[str, str] = {}
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                full[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                found += [(node.lineno, fault) for fault in _of_imports(alias.name)]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                named = _of_imports(node.module) or _of_imports(f"{node.module}.{alias.name}")
                found += [(node.lineno, fault) for fault in named]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += [(node.lineno, fault) for fault in _of_call(node, full)]
    return found


def _of_imports(name: str) -> list[str]:
    return [name] if name.split(".")[0] in UNPICKLERS | LOADERS_OF_OBJECTS else []


def _name(node: ast.expr, full: dict[str, str]) -> str:
    first, dot, rest = ast.unparse(node).partition(".")
    return full.get(first, first) + dot + rest


def _of_call(call: ast.Call, full: dict[str, str]) -> Iterator[str]:
    name = _name(call.func, full)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name in CALLS or RUNS_PROGRAMS.fullmatch(name):
        yield name
    if name in ("importlib.import_module", "importlib.reload") and not _is_text(call.args[:1]):
        yield name
    if name == "hashlib.new" and not (_is_text(call.args[:1]) and ast.literal_eval(call.args[0]) == "sha256"):
        yield name
    for keyword, value in KEYWORDS.items():
        if keywords.get(keyword) == value:
            yield f"{name}({keyword}={value})"
    if keywords.get("trust_remote_code", "False") != "False":
        yield f"{name}(trust_remote_code)"
    # In zip it means another thing; everywhere else it would let keys that fit nothing pass.
    if keywords.get("strict") == "False" and name != "zip":
        yield f"{name}(strict=False)"
    # Whoever loads by a name says that no code of the name's is run; a partial call names what it calls first.
    called = [name, *(_name(argument, full) for argument in call.args[:1])]
    loaders = [one for one in called if re.search(r"(^|\.)Auto\w+\.from_(pretrained|config)$", one)]
    if loaders and "trust_remote_code" not in keywords:
        yield f"{loaders[0]} without trust_remote_code=False"
    weights = any("AutoModel" in one and one.endswith("from_pretrained") for one in loaders)
    if weights and keywords.get("use_safetensors") != "True":
        yield f"{loaders[0]} without use_safetensors=True"


def _is_text(arguments: list[ast.expr]) -> bool:
    return bool(arguments) and isinstance(arguments[0], ast.Constant) and isinstance(arguments[0].value, str)


@pytest.fixture(scope="module")
def found_in_sources() -> list[tuple[str, int, str]]:
    """The faults of all sources, each with its file and line."""
    return [
        (str(path.relative_to(ROOT)), line, fault) for path in SOURCES for line, fault in faults(path.read_text("utf8"))
    ]


def test_no_source_can_run_what_arrives_as_data(found_in_sources):
    found = [f"{place}:{line}: {fault}" for place, line, fault in found_in_sources if (place, fault) not in ALLOWED]
    assert not found, "\n".join(["", *found])


def test_the_walk_sees_the_sources_and_every_exception_is_one(found_in_sources):
    assert len(SOURCES) > 100
    assert {(place, fault) for place, _, fault in found_in_sources} == ALLOWED.keys()


@pytest.mark.parametrize(
    "snippet",
    [
        "import pickle",
        "import cPickle",
        "import _pickle as fast",
        "from pickle import loads",
        "import dill",
        "import cloudpickle",
        "from joblib import load",
        "import marshal",
        "import shelve",
        "import yaml",
        "from ruamel.yaml import YAML",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path, weights_only=True)",
        "from torch import load\nload(path)",
        "from torch import load as read\nread(path)",
        "import torch\ntorch.save(x, path)",
        "import torch\ntorch.jit.load(path)",
        "from torch import jit\njit.load(path)",
        "import torch\ntorch.hub.load('a/b', 'c')",
        "import numpy as np\nnp.load(path)",
        "from numpy import load\nload(path, allow_pickle=True)",
        "import numpy\nnumpy.save(path, x)",
        "anything.load(path, allow_pickle=True)",
        "import pandas as pd\npd.read_pickle(path)",
        "eval(text)",
        "exec(text)",
        "compile(text, 'a', 'exec')",
        "import builtins\nbuiltins.eval(text)",
        "__import__(name)",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module\nimport_module(record['module'])",
        "import importlib.util\nimportlib.util.spec_from_file_location('a', path)",
        "import runpy\nrunpy.run_path(path)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import os\nos.system(text)",
        "from os import popen\npopen(text)",
        "import os\nos.execvp(text, [])",
        "import tempfile\ntempfile.mktemp()",
        "load(name, trust_remote_code=True)",
        "load(name, trust_remote_code=options.trust)",
        "model.load_state_dict(x, strict=False)",
        "import hashlib\nhashlib.md5(data)",
        "from hashlib import sha1\nsha1(data)",
        "import hashlib\nhashlib.new('md5', data)",
        "import requests\nrequests.get(address, verify=False)",
        "import ssl\nssl._create_unverified_context()",
        "from transformers import AutoTokenizer\nAutoTokenizer.from_pretrained(name)",
        "import transformers\ntransformers.AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)",
        "import functools\nfunctools.partial(AutoModelForCausalLM.from_pretrained, trust_remote_code=False)",
    ],
)
def test_the_walk_finds_what_is_planted(snippet: str):
    assert len(faults(snippet)) >= 1


@pytest.mark.parametrize(
    "snippet",
    [
        "import re\nre.compile(text)",
        "model.eval()",
        "zip(a, b, strict=False)",
        "import importlib\nimportlib.import_module('torch')",
        "import hashlib\nhashlib.sha256(data)",
        "import json\njson.load(file)",
        "load(name, trust_remote_code=False)",
    ],
)
def test_the_walk_leaves_alone_what_is_harmless(snippet: str):
    assert faults(snippet) == []


# A whole run, watched -----------------------------------------------------------------------------------------------

WATCHED = """
import json, os, sys
from pathlib import Path

events, WRITES = [], os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
strict = False

def watch(name, arguments):
    if name == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & WRITES and not isinstance(path, int):
            events.append(["writes", os.path.abspath(os.fsdecode(path))])
    elif name in ("os.mkdir", "os.remove", "os.truncate", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.chmod"):
        # Within a folder that is being removed, a name is of that folder, which the event of its removal named.
        if not (name in ("os.remove", "os.rmdir") and isinstance(arguments[1], int) and arguments[1] >= 0):
            paths = arguments[:2] if name in ("os.rename", "os.link", "os.symlink") else arguments[:1]
            events.extend(["writes", os.path.abspath(os.fsdecode(path))] for path in paths)
    elif name == "shutil.rmtree":
        events.append(["writes", os.path.abspath(arguments[0])])
    elif name == "compile" and strict:
        events.append(["compiles", arguments[0].decode() if isinstance(arguments[0], bytes) else str(arguments[0])])
    elif name == "exec" and strict and arguments[0].co_filename != "<string>":
        events.append(["executes", arguments[0].co_filename])
    elif name in ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty",
                  "subprocess.Popen", "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "pty.spawn"):
        events.append([name, repr(arguments)[:300]])

# What importing a library does is its own affair: it is installed. All after it is the run's.
import datasets, peft, rouge_score, safetensors.torch, torch, transformers
import transformers.models.llama.modeling_llama
import hetlora.runs.local_experiment
from hetlora.cli import main

sys.addaudithook(watch)
assert main(["run", "run.toml", "--quiet", "--json"]) == 0
strict = True  # by now all is imported that a run imports
assert main(["run", "run.toml", "--quiet", "--json", "--set", "name=again"]) == 0
os.unlink("runs/again/summary.json")
assert main(["resume", "runs/again", "--quiet", "--json"]) == 0
strict = False
Path("events.json").write_text(json.dumps(events))
events.clear()
PLANTED
Path("planted.json").write_text(json.dumps(events))
"""
PLANTED = """
import pickle, socket, subprocess
pickle.loads(pickle.dumps(print))
os.system("true")
subprocess.run(["true"])
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError:
    pass
Path("../outside").write_text("x")
strict = True
exec(compile("1 + 1", "planted.py", "exec"))
"""


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:
    """Run, run again and resume in a process of their own, then do what is planted; return the folder with what was seen."""
    place = tmp_path_factory.mktemp("watched") / "work"
    place.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        furnish(tiny)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED.replace("PLANTED", PLANTED)],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return place


def annotations() -> set[str]:
    """Return every annotation in the package's source, which a configuration is checked against."""
    nodes = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text("utf8")))]
    held = [node.annotation for node in nodes if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation]
    return {
        ast.unparse(node)
        for node in [*held, *(node.returns for node in nodes if isinstance(node, ast.FunctionDef) and node.returns)]
    }


@pytest.mark.process
def test_a_whole_run_runs_no_code_of_its_files_and_writes_into_its_folder_alone(watched: Path):
    events = json.loads((watched / "events.json").read_text("utf8"))
    allowed = annotations()
    runs = watched / "runs"
    other = [
        (kind, what)
        for kind, what in events
        if not (kind == "writes" and (Path(what) == runs or runs in Path(what).parents))
        if not (kind == "compiles" and ast.unparse(ast.parse(what)) in allowed)
    ]
    assert other == []
    assert len({what for kind, what in events if kind == "writes"}) > 10, "the watch sees what is written"


@pytest.mark.process
def test_the_watch_sees_what_is_planted(watched: Path):
    events = json.loads((watched / "planted.json").read_text("utf8"))
    kinds = {kind for kind, _ in events}
    assert kinds >= {"pickle.find_class", "os.system", "subprocess.Popen", "socket.connect", "executes", "compiles"}
    assert ["writes", str(watched.parent / "outside")] in events


# A small federation -------------------------------------------------------------------------------------------------

HOSTILE = (
    "../../escaped",
    "/etc/hetlora-escaped",
    "nul\x00byte",
    "x" * 300,
    "\x1b[2J\x1b]0;owned\x07",
    "two\nlines",
    "\u202eesrever",
    "CON",
    ".",
    "..",
)
"""Names of clients that no path, terminal or log may believe."""


def document(base: str, **changes: Any) -> dict[str, Any]:
    """Return a small run as plain data."""
    return {
        "name": "phones",
        "model": {"base": base, "device": "cpu"},
        "data": {"path": "rows.jsonl", "prompt": "{prompt}", "target": "{target}", "max_length": 48},
        "federation": {"rounds": 2, "clients_per_round": 3},
        "ranks": {"kind": "same", "rank": 2},
        "training": {"steps": 1, "batch_size": 2},
        "evaluation": {"every": 0},
        **changes,
    }


def write_rows(clients: tuple[str, ...]) -> None:
    """Write four rows a client."""
    rows = [
        {"client": client, "prompt": f"{number}?", "target": f" {number}", "split": "train" if number < 3 else "test"}
        for client in clients
        for number in range(4)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")


@pytest.fixture
def place(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a small federation, two levels down, so that one level up is seen as well."""
    folder = tmp_path / "two" / "down"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    furnish(tiny)
    return folder


def furnish(base: str) -> None:
    """Write the federation into the working directory."""
    write_rows(("ana", "ben", "cleo"))
    Path("run.toml").write_text(tomli_w.dumps(document(base)), encoding="utf8")


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# Bases and adapters of others ---------------------------------------------------------------------------------------


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that a planted payload creates, after it was seen to."""
    path = tmp_path / "owned"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists(), "the payload works"
    path.unlink()
    return path


@pytest.fixture
def copied(tiny: str, tmp_path: Path) -> Path:
    """A copy of the tiny base to spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "copied"))


def refused_by_all(base: Path) -> str:
    """Check that a base is refused as a whole, by the function and by the command; return what is said."""
    with pytest.raises(ModelError) as caught:
        load_base(str(base))
    assert main(["run", "run.toml", "--quiet", "--set", f"model.base={str(base)!r}"]) == 2
    assert not Path("runs").exists()
    return str(caught.value)


@pytest.mark.usefixtures("place")
def test_a_base_of_pickles_is_refused_and_not_opened(copied: Path, marker: Path):
    (copied / "model.safetensors").unlink()
    (copied / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    assert "safetensors" in refused_by_all(copied)
    assert not marker.exists()


@pytest.mark.usefixtures("place")
def test_a_pickle_beside_safetensors_is_not_opened(copied: Path, marker: Path):
    (copied / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    load_base(str(copied))
    assert not marker.exists()


@pytest.mark.usefixtures("place")
def test_an_index_that_names_pickles_is_refused(copied: Path, marker: Path):
    names = list(load_file(copied / "model.safetensors"))
    (copied / "model.safetensors").unlink()
    (copied / "weights.bin").write_bytes(pickle.dumps(Payload(marker)))
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "weights.bin")}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf8")
    refused_by_all(copied)
    assert not marker.exists()


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("whole", [True, False], ids=["within a base", "alone"])
def test_a_folder_with_an_adapter_of_pickles_is_refused_and_not_opened(
    copied: Path, marker: Path, tiny: str, whole: bool
):
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": tiny,
        "r": 2,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    (copied / "adapter_config.json").write_text(json.dumps(config), encoding="utf8")
    (copied / "adapter_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    if not whole:
        (copied / "config.json").unlink()
        (copied / "model.safetensors").unlink()
    assert ("adapter_config.json" if whole else "config.json") in refused_by_all(copied)
    assert not marker.exists()


CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "theirs"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_code(copied: Path, marker: Path) -> Path:
    """A base that brings code for its configuration, model and tokenizer."""
    (copied / "theirs.py").write_text(CODE.format(marker=str(marker)), encoding="utf8")
    for name, mapped in (
        ("config.json", {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["theirs.Tokenizer", "theirs.Tokenizer"]}),
    ):
        path = copied / name
        path.write_text(json.dumps({**json.loads(path.read_text("utf8")), "auto_map": mapped}), encoding="utf8")
    return copied


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("model_type", ["llama", "theirs"])
def test_code_that_a_base_brings_is_not_run(with_code: Path, marker: Path, model_type: str):
    path = with_code / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf8")), "model_type": model_type}), encoding="utf8")
    for load in (load_base, build_base, load_tokenizer):
        with contextlib.suppress(ModelError):  # where transformers has no code of its own for it
            load(str(with_code))
    main(["run", "run.toml", "--quiet", "--set", f"model.base={str(with_code)!r}", "--set", "federation.rounds=1"])
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.process
def test_transformers_would_run_it_if_it_were_told_to(with_code: Path, marker: Path, tmp_path: Path):
    """The planted code is what is not run above: with `trust_remote_code` it is."""
    load = f"AutoTokenizer.from_pretrained({str(with_code)!r}, trust_remote_code=True)"
    script = f"from transformers import AutoTokenizer; {load}"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    assert marker.exists()


@pytest.mark.usefixtures("place")
def test_a_base_that_asks_for_a_compiled_kernel_is_refused(copied: Path):
    path = copied / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text("utf8")), "attn_implementation": "someone/kernel"}), encoding="utf8"
    )
    assert "someone/kernel" in refused_by_all(copied)


def test_no_key_of_a_configuration_trusts_code():
    with pytest.raises(ConfigError, match="trust_remote_code is not a key"):
        parse_config(document("nano", model={"base": "nano", "trust_remote_code": True}))


def test_a_chat_template_cannot_reach_out(copied: Path, marker: Path):
    reaching = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = load_tokenizer(str(copied))
    tokenizer.chat_template = reaching
    tokenizer.save_pretrained(copied)
    from hetlora.data.chat import Chat
    from hetlora.data.templates import Message, Row

    with pytest.raises(DataError, match="chat template refuses"):
        Chat(load_tokenizer(str(copied))).end(Row("a", "", (Message("user", "a"),)))
    assert not marker.exists()


# Data of others -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside rows"])
def test_code_and_pickles_that_come_with_data_are_not_run(tiny: str, marker: Path, beside: bool):
    folder = Path("theirs")
    folder.mkdir()
    # A script that is named like its folder is one that the library once ran.
    script = folder / ("helper.py" if beside else "theirs.py")
    script.write_text(CODE.format(marker=str(marker)), encoding="utf8")
    (folder / "rows.pkl").write_bytes(pickle.dumps(Payload(marker)))
    if beside:
        shutil.copy("rows.jsonl", folder / "train.jsonl")
    config = parse_config(document(tiny, data={"path": "./theirs", "target": "{target}"}))
    if beside:
        assert len(load_federation(config).clients) == 3
    else:
        with pytest.raises(DataError):
            load_federation(config)
    assert not marker.exists()


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("name", ["rows.pkl", "rows.pickle", "rows.pt", "rows.npy", "rows.py", "rows.yaml"])
def test_a_data_file_of_another_kind_is_refused_as_text(tiny: str, marker: Path, name: str):
    Path(name).write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(DataError):
        load_federation(parse_config(document(tiny, data={"path": name, "target": "{target}"})))
    assert not marker.exists()


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("where", ["../rows.jsonl", "{place}/rows.jsonl", "sub/../../rows.jsonl", "../*.jsonl"])
def test_a_data_set_cannot_name_files_beyond_its_folder(place: Path, tiny: str, where: str):
    folder = place / "theirs"
    (folder / "sub").mkdir(parents=True)
    shutil.copy("rows.jsonl", folder / "train.jsonl")
    config = parse_config(document(tiny, data={"path": "./theirs", "target": "{target}"}))

    def card(path: str) -> None:
        files = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: '{path}'\n"
        (folder / "README.md").write_text(f"---\n{files}---\n", encoding="utf8")

    card(where.format(place=place))
    with pytest.raises(DataError, match="beyond its folder"):
        load_federation(config)
    card("train.jsonl")
    assert len(load_federation(config).clients) == 3
    (place / "link").symlink_to(folder)
    linked = parse_config(document(tiny, data={"path": "./link", "target": "{target}"}))
    assert len(load_federation(linked).clients) == 3, "the folder itself may be reached through a link"


# Paths --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/x",
        "..",
        ".",
        "",
        "a/b",
        "a\\b",
        "a\x00b",
        "a\nb",
        "x\n",
        "~",
        "-rf",
        ".hidden",
        "\x1b[2J",
        "größe",
    ],
)
def test_the_name_of_a_run_is_no_path(name: str):
    with pytest.raises(ConfigError, match="name"):
        parse_config(document("nano", name=name))


def test_a_name_too_long_for_a_folder_is_said(place: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["run", "run.toml", "--quiet", "--set", f"name={'x' * 300}"]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert not list(place.glob("runs/*"))


@pytest.mark.parametrize("method", ["hetlora", "local", "fedsa_lora"])
def test_clients_with_hostile_names_write_nothing_elsewhere(
    place: Path, tiny: str, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
):
    write_rows(HOSTILE)
    before = everything_below(tmp_path)
    config = parse_config(
        document(tiny, method={"name": method}, federation={"rounds": 1, "clients_per_round": len(HOSTILE)})
    )
    result = LocalExperiment(config, PlainDisplay()).run()
    new = everything_below(tmp_path) - before
    run = place / "runs"
    assert new
    assert all(tmp_path / path == run or run in (tmp_path / path).parents for path in new)
    assert all(part.isascii() and len(part) < 100 for path in new for part in Path(path).parts)
    assert not Path("/etc/hetlora-escaped").exists()
    [measured] = [record for record in read_records(result.records) if record["kind"] == "round"]
    assert set(measured["clients"]) == set(HOSTILE), "all took part, under their names"
    only_lines(capsys.readouterr().err)


@pytest.mark.usefixtures("place")
def test_a_checkpoint_whose_modules_and_clients_are_paths_writes_nothing_elsewhere(tiny: str, tmp_path: Path):
    """It is sealed anew, as who may write into the folder can."""
    from hetlora.runs.checkpoint import newest, write_checkpoint

    folder = run_once(tiny)
    checkpoint = newest(folder, lambda _: None)
    assert checkpoint is not None
    state = checkpoint.progress.state
    adapter = {f"../../{name}/escaped": pair for name, pair in state.adapter.items()}
    from dataclasses import replace

    spoiled = replace(checkpoint.progress, state=replace(state, adapter=adapter, ranks={"../../escaped": 1}))
    write_checkpoint(replace(checkpoint, progress=spoiled), folder)
    before = everything_below(tmp_path)
    with pytest.raises(HetLoraError, match="other modules"):
        resume(folder, QuietDisplay())
    assert everything_below(tmp_path) - before <= {str((folder / ".lock").resolve().relative_to(tmp_path))}


def run_once(base: str) -> Path:
    """Do a run, and take away what says that it is complete."""
    folder = LocalExperiment(parse_config(document(base)), QuietDisplay()).run().records.parent
    (folder / "summary.json").unlink()
    return folder


WRITTEN = (
    ".lock", "config.json", "config.json.part", "records.jsonl", "summary.json", "summary.json.part", "adapter", "checkpoints",
    "checkpoints/round-000001.safetensors", "checkpoints/round-000003.safetensors.part", "model", "adapters",
)  # fmt: skip


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("name", WRITTEN)
def test_a_run_folder_with_a_link_in_it_is_refused_and_nothing_is_written_through_it(
    tiny: str, tmp_path: Path, name: str
):
    folder = run_once(tiny)
    link, outside = folder / name, tmp_path / "outside"
    if link.exists():
        shutil.move(link, outside)
    else:
        outside.write_text("theirs", encoding="utf8")
    link.symlink_to(outside)
    before = {path: path.read_bytes() for path in [outside, *outside.rglob("*")] if path.is_file()}
    with pytest.raises(HetLoraError, match=re.escape(link.name)):
        resume(folder, QuietDisplay())
    assert before
    assert {path: path.read_bytes() for path in [outside, *outside.rglob("*")] if path.is_file()} == before
    assert link.is_symlink()


def test_a_run_folder_with_a_pipe_in_it_is_refused_and_does_not_hang(tmp_path: Path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(HetLoraError, match="no file"), run_lock(tmp_path):
        pass


@pytest.mark.usefixtures("place")
def test_a_run_folder_that_is_reached_through_a_link_is_taken(tiny: str, tmp_path: Path):
    folder = run_once(tiny)
    (tmp_path / "link").symlink_to(folder.resolve())
    assert resume(tmp_path / "link", QuietDisplay()).rounds == 2


# Terminals ----------------------------------------------------------------------------------------------------------

ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\b\u202e"


def only_lines(text: str) -> None:
    """Check that a terminal would show a text and obey none of it."""
    assert [sign for sign in text if not (sign.isprintable() or sign == "\n")] == []


def failed_round() -> RoundRecord:
    """Return the record of a round in which a client with a hostile name failed, and said something hostile."""
    return RoundRecord(
        round=1,
        loss=1.0,
        perplexity=None,
        ranks={ESCAPES: 2},
        weights={},
        prunes={},
        failures={f"ana{ESCAPES}\nround 2  loss 0.000": f"no memory{ESCAPES}\nround 3  loss 0.000"},
        bytes_up=1,
        bytes_down=1,
        live_slots=2,
        seconds=0.0,
        clients={},
    )


def test_a_round_is_one_plain_line_whatever_its_clients_are_called(capsys: pytest.CaptureFixture[str]):
    assert "\x1b" in describe(failed_round()), "the message is hostile"
    display = PlainDisplay()
    display.rounds_started(2, 0)
    display.round_ended(failed_round())
    display.say(f"client {ESCAPES}\nround 9")
    err = capsys.readouterr().err
    only_lines(err)
    assert len(err.splitlines()) == 2
    assert "ana" in err


def test_a_live_display_obeys_no_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", "300")
    display = LiveDisplay()
    display.round_ended(failed_round())
    display.say(f"[bold]client[/bold] {ESCAPES}")
    err = capsys.readouterr().err
    only_lines(err)
    assert len(err.splitlines()) == 2
    assert "[bold]" in err, "a name is no markup either"


@pytest.mark.parametrize(
    "error",
    [
        DataError(f"client {ESCAPES} is odd"),
        ModelError(f"{ESCAPES}"),
        ConfigError(f"run{ESCAPES}.toml", [f"key{ESCAPES}\nhetlora: all is well"]),
    ],
)
def test_an_error_is_text_that_no_terminal_obeys(error: HetLoraError):
    only_lines(str(error))
    assert "\nhetlora:" not in str(error)


@pytest.mark.usefixtures("place")
def test_commands_show_hostile_rows_as_text(capsys: pytest.CaptureFixture[str]):
    rows = [
        {"client": f"{who}{ESCAPES}", "prompt": f"{number}{ESCAPES}\n?", "target": f" {ESCAPES}", "split": split}
        for who in ("ana", "ben", "cleo")
        for number, split in enumerate(["train", "train", "test"])
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    for command in (
        ["run", "run.toml", "--set", "evaluation={every=0,generate=2,max_new_tokens=8}"],
        ["data", "run.toml"],
        ["resume", "runs/phones"],
    ):
        assert main(command) == 0
        out, err = capsys.readouterr()
        only_lines(out + err)
        assert out
    field = json.dumps({f"prom{ESCAPES}\nhetlora: fine": 1, "client": "a"})
    Path("rows.jsonl").write_text(field + "\n", encoding="utf8")
    assert main(["data", "run.toml"]) == 2
    err = capsys.readouterr().err
    only_lines(err)
    assert err.count("hetlora: ") == 2, "the name within the message, on the same line"
    assert len(err.splitlines()) == 1


# Secrets ------------------------------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": "hf_planted0token",
    "HUGGING_FACE_HUB_TOKEN": "hf_planted1token",
    "WANDB_API_KEY": "planted2key",
    "AWS_SECRET_ACCESS_KEY": "planted3key",
    "FLWR_PRIVATE_KEY": "-----BEGIN PRIVATE KEY-----planted4key",
    "HTTPS_PROXY": "http://planted5user:planted5word@127.0.0.1:9",
}


@pytest.mark.process
def test_what_is_secret_in_the_environment_reaches_no_file_and_no_output(place: Path):
    environment = {**os.environ, **SECRETS, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    commands = [
        ["run", "run.toml", "--set", "evaluation={every=0,generate=1,max_new_tokens=8}"],
        ["resume", "runs/phones"],
        ["run", "run.toml", "--set", "model.base=planted/gated"],
    ]
    code = f"from hetlora.cli import main; raise SystemExit([main(command) for command in {commands}] != [0, 0, 2])"
    done = subprocess.run([sys.executable, "-c", code], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert re.findall(r"planted\d", done.stdout + done.stderr) == []
    held = {path: path.read_bytes() for path in (place / "runs").rglob("*") if path.is_file()}
    assert len(held) > 5
    assert [path for path, data in held.items() if re.search(rb"planted\d", data)] == []


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("key", ["data.path", "model.base", "model.tokenizer"])
def test_a_password_in_an_address_is_neither_shown_nor_kept(key: str, capsys: pytest.CaptureFixture[str]):
    assert main(["run", "run.toml", "--set", f"{key}=https://ana:planted6@host.example/x/rows.jsonl"]) == 2
    out, err = capsys.readouterr()
    assert "planted6" not in out + err
    assert "//***@host.example" in err
    assert not Path("runs").exists()


def test_only_what_is_named_here_is_read_from_the_environment():
    """Who reads no secret can tell none: what the package asks the environment for is a list."""
    asked = set()
    for path in (ROOT / "src/hetlora").rglob("*.py"):
        source = path.read_text("utf8")
        for node in ast.walk(ast.parse(source)) if "environ" in source or "getenv" in source else ():
            text = ast.unparse(node) if isinstance(node, (ast.Call, ast.Subscript)) else ""
            if match := re.match(r"os\.(?:environ(?:\.\w+\(|\[)|getenv\()(\S+?)[,)\]]", text):
                asked.add((str(path.relative_to(ROOT / "src/hetlora")), match.group(1)))
    assert asked == {
        ("runs/process.py", "'OMP_WAIT_POLICY'"),
        ("flower/client_process.py", "'HETLORA_STATE'"),
        ("flower/guarded_superlink.py", "'FLWR_INTERNAL_GRPC_FLEET_API'"),  # set, not read
        ("flower/local_federation.py", "'PATH'"),
        ("flower/simulation.py", "_name"),
        ("runs/tracking/wandb.py", "'WANDB_MODE'"),
    }


# Dependencies -------------------------------------------------------------------------------------------------------

PINS = {
    name.lower().replace("_", "-"): version
    for line in (ROOT / "constraints.txt").read_text("utf8").splitlines()
    if line and not line.startswith("#")
    for name, _, version in [line.partition("==")]
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
REQUIRED = [*PROJECT["dependencies"], *(item for extra in PROJECT["optional-dependencies"].values() for item in extra)]


def test_every_constraint_is_an_exact_version():
    assert len(PINS) > 100
    assert all(re.fullmatch(r"[0-9][0-9a-zA-Z.+!]*", version) for version in PINS.values())


ELSEWHERE = {"bitsandbytes", "trackio", "wandb", "mlflow"}
"""Needs a graphics processor, is large or wants older packages than others: `make setup` does without, see docs/tracking.md."""


def test_the_pins_are_within_what_the_project_asks_for():
    needed = [(item.name.lower().replace("_", "-"), item.specifier) for item in map(Requirement, REQUIRED)]
    found = [
        f"{name} is pinned to {PINS.get(name)}, and has to be {specifier}"
        for name, specifier in needed
        if name not in ELSEWHERE | {"hetlora"} and not (name in PINS and specifier.contains(PINS[name]))
    ]
    assert not found, "\n".join(["", *found])


def installed_for(extras: tuple[str, ...]) -> set[str]:
    """Return what the project needs here, step by step, by the metadata of what is installed."""
    needed: set[str] = set()
    waiting = [
        Requirement(item)
        for extra in ("", *extras)
        for item in (PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"])
    ]
    seen: set[tuple[str, tuple[str, ...]]] = set()
    while waiting:
        requirement = waiting.pop()
        name = requirement.name.lower().replace("_", "-")
        key = (name, tuple(sorted(requirement.extras)))
        if key in seen or name == "hetlora":
            continue
        seen.add(key)
        try:
            items = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        needed.add(name)
        wanted = ["", *requirement.extras]
        waiting += [
            one
            for one in map(Requirement, items)
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in wanted)
        ]
    return needed


def test_every_installed_dependency_is_pinned():
    # What PyTorch brings for graphics processors is of its own version, and not of every machine.
    needed = {name for name in installed_for(("data", "flower", "dev")) if not re.match(r"nvidia-|cuda-|triton", name)}
    assert {"torch", "numpy", "pydantic", "safetensors", "ray"} <= needed
    assert needed - PINS.keys() - {"setuptools", "pip", "wheel"} == set()


# The document -------------------------------------------------------------------------------------------------------


def test_every_test_that_the_document_names_is_there():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text("utf8")))
    tests = "\n".join(path.read_text("utf8") for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 20
    assert named - set(re.findall(r"^def (test_\w+)", tests, flags=re.MULTILINE)) == set()
    for path in re.findall(r"`((?:tests|docs)/\w+\.\w+|constraints\.txt)`", (ROOT / "SECURITY.md").read_text("utf8")):
        assert path == "docs/reliability.md" or (ROOT / path).is_file(), path


def test_safetensors_that_lie_are_refused_by_the_library(tmp_path: Path):
    """What the rest relies on: a file whose header promises more than there is, is not read."""
    import torch

    save_file({"a": torch.zeros(4)}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[:-4])
    with pytest.raises(Exception, match=r"(?i)header|incomplete|invalid"):
        load_file(tmp_path / "a.safetensors")
