"""Prove that whatever a file holds that hetlora reads, the outcome is a run or one message that says what is wrong.

Every trial takes one kind of file, valid or made up, changes it at random, and hands it to the code that reads it:

- ``document``: a configuration as plain data, to `parse_config`;
- ``toml``: its text, and ``--set`` changes, to `load_config`;
- ``comparison``: one with a ``[compare]``, to `plan`;
- ``rows``: a JSON Lines file, packed or not, to `load_federation` and the tokenizer;
- ``folder``: a folder of CSV or JSON files, as a data set;
- ``data``: both at once, to the command ``hetlora data``;
- ``resume``: a run's folder of which a file was changed, to the command ``hetlora resume``.

A trial fails on any exception but a `HetLoraError`, on one whose message a terminal would obey, on more than `SECONDS`, and,
through the commands, on another exit code than 0, 1 or 2, on more than one message, and on output beside it.

    python -m proofs.inputs            # or --kind rows --trials 1 --seed 17 for one trial alone
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from proofs.outcome import Outcome, arguments

SECONDS = 20.0
"""The longest that a trial may take; most take milliseconds."""

WEIGHTS = {"document": 40, "toml": 20, "comparison": 5, "rows": 20, "folder": 2, "data": 8, "resume": 5}
"""How often which kind is tried."""

CHUNK = 200
"""Trials that a process is handed at once."""

ROWS = 6
CLIENTS = ("ana", "ben", "größe")

DOCUMENTS: tuple[dict[str, Any], ...] = (
    {
        "name": "small",
        "seed": 3,
        "output": "runs",
        "model": {"base": "nano", "scaling": 2.0, "target_modules": ["q_proj"]},
        "data": {"path": "rows.jsonl", "prompt": "{prompt}", "target": "{target}", "max_length": 64},
        "federation": {"rounds": 2, "clients_per_round": 2, "dropout": 0.1},
        "ranks": {"kind": "tiers", "tiers": [{"rank": 2, "share": 0.5}, {"rank": 4, "share": 0.5}]},
        "method": {"name": "hetlora", "gamma": 0.5, "penalty": 0.1, "min_rank": 1},
        "training": {"steps": 1, "batch_size": 2, "learning_rate": 1e-2},
        "server_optimizer": {"name": "adam", "learning_rate": 0.1},
        "evaluation": {"every": 1, "generate": 2},
        "flower": {"clients": "config", "deadline": 10.0},
    },
    {
        "data": {"path": "rows.jsonl", "messages": "messages", "split_field": ""},
        "partition": {"kind": "dirichlet", "clients": 2, "by": "split", "alpha": 0.3},
        "federation": {"rounds": 1, "clients_per_round": 1},
        "ranks": {"kind": "memory", "max": 8, "tiers": [{"megabytes": 900.0, "share": 1.0}]},
        "training": {"epochs": 1},
    },
    {
        "data": {"path": "rows.jsonl", "target": "{target}"},
        "partition": {"kind": "sampled", "clients": 5, "rows_per_client": 2},
        "federation": {"rounds": 1, "clients_per_round": 1},
        "ranks": {"kind": "explicit", "of": {"client-000": 2}, "default": 1},
        "training": {"steps": 1},
    },
)

SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 255, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400,
    0.0, -0.0, 0.5, 1.0, 1e-300, 1e308, -1.5, float("nan"), float("inf"), float("-inf"),
    "", " ", "a", "nano", "hetlora", "tiers", "0", "null", "\x1b[2J\x1b]0;owned\x07", "\r\n", "\x00", "\u2028", "\u202e",
    "\ud800", "größe", "../../x", "/etc/x", "~nobody/x", "{prompt}", "{", "{a.b}", "{0}", "{prompt!r:>9}", "x" * 3000, "𝕏" * 40,
    "owner/name", "http://user:word@host/x", [], {}, [[]], [None], [{}], {"": {}}, {"kind": "same"}, {"rank": 1}, ["train"],
)  # fmt: skip
"""What a value is replaced by: the ends of every type, and what has a meaning somewhere."""

WORDS = (
    "name", "seed", "model", "data", "path", "ranks", "kind", "rank", "of", "method", "training", "steps", "epochs", "tiers",
    "client", "prompt", "target", "split", "role", "content", "compare", "__class__", "",
)  # fmt: skip

BYTES = (
    b"", b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b"\r", b'"', b"{", b"}", b"[", b"]", b"=", b"\\", b"'''",
    b"\\u0000", b"\\ud800", b"\x1b[2J",
    b"nan", b"1e999", b"9" * 5000, b"0x" + b"f" * 5000, b"[" * 3000, b'{"a":' * 3000, b"1979-05-27", b"#", b",",
)  # fmt: skip


# Changing -----------------------------------------------------------------------------------------------------------


def made_up(draw: random.Random, depth: int = 3) -> Any:
    """Return plain data that nobody has thought of."""
    if not depth or draw.random() < 0.4:
        return copy.deepcopy(draw.choice(SCALARS))
    if draw.random() < 0.4:
        return [made_up(draw, depth - 1) for _ in range(draw.randrange(4))]
    return {draw.choice(WORDS): made_up(draw, depth - 1) for _ in range(draw.randrange(5))}


def deep(levels: int) -> list[Any]:
    """Return lists within lists."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def changed(value: Any, draw: random.Random) -> Any:
    """Return a copy of plain data in which one to three places are others."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        value = _changed_once(value, draw)
    return value


def _changed_once(value: Any, draw: random.Random) -> Any:
    if isinstance(value, (dict, list)) and value and draw.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = draw.choice(keys)
        what = draw.randrange(8)
        if what == 0:
            del value[key]
        elif what == 1 and isinstance(value, dict):
            value[draw.choice(WORDS) + draw.choice(("", "x", "\x1b[2J\n"))] = made_up(draw, 2)
        elif what == 1:
            value.append(copy.deepcopy(value[key]))
        else:
            value[key] = _changed_once(value[key], draw)
        return value
    if draw.random() < 0.02:
        return deep(draw.choice((50, 120)))
    if isinstance(value, str) and draw.random() < 0.3:
        at = draw.randrange(len(value) + 1)
        return value[:at] + str(draw.choice(SCALARS))[:20] + value[at:]
    return made_up(draw, 1)


def changed_bytes(data: bytes, draw: random.Random) -> bytes:
    """Return bytes with one to four changes: of a byte, a piece that is gone, twice there, or something put in."""
    held = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(held) + 1)
        end = min(len(held), at + draw.choice((1, 1, 4, 30, 500)))
        what = draw.randrange(5)
        if what == 0 and at < len(held):
            held[at] ^= 1 << draw.randrange(8)
        elif what == 1:
            del held[at:end]
        elif what == 2:
            held[at:at] = held[at:end]
        elif what == 3:
            held[at:at] = draw.choice(BYTES)
        else:
            del held[at:]
    return bytes(held)


def toml(document: Any) -> str:
    """Return a document as TOML, as far as it can be; what TOML cannot say is left out."""
    if not isinstance(document, Mapping):
        return f"data = {_toml(document)}\n"
    return "".join(
        f"{_toml_key(key)} = {text}\n" for key, value in document.items() if (text := _toml(value)) is not None
    )


def _toml_key(key: str) -> str:
    return json.dumps(key)


def _toml(value: Any) -> str | None:
    if isinstance(value, Mapping):
        parts = {key: _toml(item) for key, item in value.items()}
        return "{" + ", ".join(f"{_toml_key(key)} = {text}" for key, text in parts.items() if text is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(text for item in value if (text := _toml(item)) is not None) + "]"
    if value is None:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return hex(value) if value > 2**100 else str(value)  # Python writes no number of thousands of decimal digits
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)


# What is changed ----------------------------------------------------------------------------------------------------


def rows() -> list[dict[str, Any]]:
    """Return the rows of three clients, each with a conversation, too."""
    return [
        {
            "client": client,
            "prompt": f"what is {number}?",
            "target": f" the number {number} of {client}",
            "split": "train" if number < ROWS - 2 else "test",
            "messages": [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": f"{number}!"}],
        }
        for client in CLIENTS
        for number in range(ROWS)
    ]


def lines(held: Sequence[Any]) -> bytes:
    """Return plain data as JSON Lines."""
    return "".join(json.dumps(item) + "\n" for item in held).encode()


def changed_rows(draw: random.Random) -> bytes:
    """Return a file of rows, changed as data, as bytes, or both."""
    held: list[Any] = rows()
    if draw.random() < 0.6:
        for _ in range(draw.choice((1, 1, 3))):
            index = draw.randrange(len(held))
            held[index] = changed(held[index], draw)
    data = lines(held)
    return changed_bytes(data, draw) if draw.random() < 0.5 else data


class Bench:
    """A folder in which trials are done, with a small base and a run that was stopped after its rounds.

    Args:
        folder: An empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = tiny_base(folder / "base")
        self._run: Path | None = None
        self._tokenizer: Any = None

    def document(self) -> dict[str, Any]:
        """Return a small run with this base."""
        document = copy.deepcopy(DOCUMENTS[0])
        del document["server_optimizer"]
        document["model"] = {"base": self.base, "device": "cpu"}
        document["evaluation"] = {"every": 0}
        return document

    @property
    def tokenizer(self) -> Any:
        """The base's."""
        if self._tokenizer is None:
            from hetlora.model.lora_model import load_tokenizer

            self._tokenizer = load_tokenizer(self.base)
        return self._tokenizer

    @property
    def run(self) -> Path:
        """The folder of a run that was killed between its last checkpoint and its result."""
        if self._run is None:
            (self.folder / "rows.jsonl").write_bytes(lines(rows()))
            (self.folder / "run.toml").write_text(toml(self.document()), encoding="utf8")
            code, out, err = command(["run", "run.toml", "--quiet", "--json"])
            assert code == 0, err
            self._run = Path(json.loads(out)["records"]).parent.resolve()
            (self._run / "summary.json").unlink()
            shutil.rmtree(self._run / "adapter")
            self._run = self._run.rename(self.folder / "killed")
        return self._run


def tiny_base(folder: Path) -> str:
    """Make a random Llama of one layer with a tokenizer of bytes, and return its folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(["<end>", "<pad>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}"
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def command(options: Sequence[str]) -> tuple[int, str, str]:
    """Run the command line in this process, with streams as a terminal's; return its exit code and what it wrote."""
    from hetlora.cli import main

    out = io.TextIOWrapper(io.BytesIO(), encoding="utf8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf8", errors="backslashreplace", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(options))
    return code, *(stream.buffer.getvalue().decode("utf8") for stream in (out, err))  # type: ignore[attr-defined]


# Trials -------------------------------------------------------------------------------------------------------------


def document_trial(draw: random.Random, _: Bench) -> None:
    """Hand plain data to `parse_config`; what it accepts must come back from its own JSON."""
    from hetlora.config import RunConfig, parse_config, parse_run_config

    document = changed(draw.choice(DOCUMENTS), draw) if draw.random() < 0.8 else made_up(draw, 5)
    if draw.random() < 0.02 and isinstance(document, dict):
        document[draw.choice(WORDS)] = {draw.choice(WORDS): 16**5000}  # Python writes no number of so many digits
    config = parse_config(document if isinstance(document, Mapping) else {"data": document})
    assert isinstance(config, RunConfig)
    assert parse_run_config(config.model_dump_json(), "itself") == config, "what was accepted is not read again"


def toml_trial(draw: random.Random, bench: Bench) -> None:
    """Hand a file, and changes to it, to `load_config`."""
    from hetlora.config import RunConfig, load_config

    document = draw.choice(DOCUMENTS)
    text = toml(changed(document, draw) if draw.random() < 0.3 else document).encode(errors="surrogatepass")
    path = bench.folder / "changed.toml"
    path.write_bytes(changed_bytes(text, draw) if draw.random() < 0.8 else text)
    words = (*WORDS[:12], 'ranks.of."a"', "a.b", "model.base", "=", "[x]\na", '"\x1b[2J"', "data.\x00")
    changes = [
        f"{draw.choice(words)}{draw.choice(('.', ''))}{draw.choice(words)}={_said(draw)}"
        for _ in range(draw.randrange(3))
    ]
    assert isinstance(load_config(path, changes), RunConfig)


def comparison_trial(draw: random.Random, _: Bench) -> None:
    """Hand a run with methods to compare to `plan`."""
    from hetlora.commands.compare.grid import Comparison, plan

    compared = {
        "seeds": [0, 1],
        "learning_rates": [1e-3, 1e-2],
        "validation_share": 0.2,
        "methods": [
            {"name": "fedavg", "set": {"ranks": {"kind": "same", "rank": 4}}},
            {"name": "hetlora", "gamma": 0.9},
        ],
    }
    document = changed({**DOCUMENTS[0], "compare": changed(compared, draw)}, draw)
    assert isinstance(plan(document if isinstance(document, dict) else {"compare": document}), Comparison)


def _said(draw: random.Random) -> str:
    return str(_toml(draw.choice(SCALARS))) if draw.random() < 0.6 else draw.choice(BYTES[:24]).decode(errors="replace")


def rows_trial(draw: random.Random, bench: Bench) -> None:
    """Read a file of rows, divide it, and make tokens of it."""
    from hetlora.config import parse_config
    from hetlora.config.build_data import load_federation, make_tokenization
    from hetlora.data import TokenizedFederation

    data = changed_rows(draw)
    path = bench.folder / f"changed-{os.getpid()}.jsonl"
    if draw.random() < 0.2:
        path = path.with_suffix(".jsonl.gz")
        data = gzip.compress(data, mtime=0)
        data = changed_bytes(data, draw) if draw.random() < 0.5 else data
    path.write_bytes(data)
    config = parse_config(_divided(draw, bench, str(path)))
    federation = load_federation(config)
    tokens = TokenizedFederation(federation, make_tokenization(config, bench.tokenizer))
    for name in list(federation.names)[:5]:
        tokens.train(name)
        tokens.test(name)
    assert tokens.counts.tokens >= 0


def _divided(draw: random.Random, bench: Bench, path: str) -> dict[str, Any]:
    """Return a run over a file, with one of the ways to make text of it and to divide it."""
    document = bench.document()
    document["data"]["path"] = path
    if draw.random() < 0.3:
        document["data"] = {"path": path, "messages": "messages", "max_length": 64}
    if draw.random() < 0.2:
        document["data"]["split_field"] = ""
    document["partition"] = draw.choice(
        (
            {"kind": "natural"},
            {"kind": "natural"},
            {"kind": "iid", "clients": 2},
            {"kind": "dirichlet", "clients": 2, "by": draw.choice(("client", "split", "messages", "length"))},
            {"kind": "shards", "clients": 2, "by": draw.choice(("client", "target", "length"))},
            {"kind": "quantity", "clients": 2},
            {"kind": "sampled", "clients": 4, "rows_per_client": 3},
        )
    )
    return document


def folder_trial(draw: random.Random, bench: Bench) -> None:
    """Read a folder as a data set of the Hugging Face library."""
    from hetlora.config import parse_config
    from hetlora.config.build_data import load_federation

    folder = bench.folder / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if draw.random() < 0.5:
        held = "client,prompt,target\n" + "".join(
            f"{row['client']},{row['prompt']},{row['target']}\n" for row in rows()
        )
        files = {"train.csv": held.encode(), "test.csv": held.encode()}
    else:
        files = {"train.jsonl": changed_rows(draw), "test.jsonl": lines(rows())}
    spoiled = draw.choice(list(files))
    files[spoiled] = changed_bytes(files[spoiled], draw)
    if draw.random() < 0.2:
        files["README.md"] = changed_bytes(
            b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: 'train*'\n---\n# hello\n",
            draw,
        )
    for name, data in files.items():
        (folder / name).write_bytes(data)
    document = bench.document()
    document["data"] |= {"path": str(folder), "split_field": draw.choice(("split", ""))}
    load_federation(parse_config(document))


def data_trial(draw: random.Random, bench: Bench) -> None:
    """Give a file of a run, whose rows are changed or not, to ``hetlora data``."""
    (bench.folder / "rows.jsonl").write_bytes(changed_rows(draw) if draw.random() < 0.7 else lines(rows()))
    document = toml(_divided(draw, bench, "rows.jsonl")).encode()
    (bench.folder / "run.toml").write_bytes(changed_bytes(document, draw) if draw.random() < 0.5 else document)
    shown = draw.choice(([], ["--json"], ["--all"]))
    judge(command(["data", "run.toml", *shown]), json_wanted="--json" in shown)


def resume_trial(draw: random.Random, bench: Bench) -> None:
    """Change a file of a run's folder, and go on."""
    folder = bench.folder / "again"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bench.run, folder)
    (bench.folder / "rows.jsonl").write_bytes(lines(rows()))
    name = draw.choice(("config.json", "records.jsonl", "summary.json", "checkpoints"))
    if name == "summary.json":
        summary = {"rounds": 2, "updates": 2, "prunes": 0, "base": {"perplexity": 3.0}, "final": {"perplexity": 2.0}}
        spoiled = json.dumps(changed(summary, draw)).encode()
        (folder / name).write_bytes(changed_bytes(spoiled, draw) if draw.random() < 0.5 else spoiled)
    elif name == "config.json" and draw.random() < 0.7:
        held = json.loads((folder / name).read_bytes())
        (folder / name).write_text(json.dumps(changed(held, draw)), encoding="utf8")
    else:
        paths = sorted((folder / name).iterdir()) if name == "checkpoints" else [folder / name]
        for path in paths:
            path.write_bytes(changed_bytes(path.read_bytes(), draw))
    shown = draw.choice(([], ["--json"]))
    judge(command(["resume", "again", *shown]), json_wanted=bool(shown), progress=True)


TRIALS: Mapping[str, Callable[[random.Random, Bench], None]] = {
    "document": document_trial,
    "toml": toml_trial,
    "comparison": comparison_trial,
    "rows": rows_trial,
    "folder": folder_trial,
    "data": data_trial,
    "resume": resume_trial,
}


def judge(outcome: tuple[int, str, str], *, json_wanted: bool, progress: bool = False) -> None:
    """Check what a command came to.

    Args:
        outcome: Of `command`.
        json_wanted: Whether it was to print one JSON object.
        progress: Whether it may tell how far it is on standard error.
    """
    code, out, err = outcome
    assert code in (0, 1, 2), f"exit code {code}"
    messages = err.count("hetlora: ")
    if code == 2:
        assert not out, "a refusal printed something"
        assert messages == 1, f"{messages} messages: {err!r}"
    else:
        assert out, "nothing was printed"
        assert progress or err.startswith("hetlora: ") or not err, f"beside the result: {err!r}"
        if json_wanted:
            assert isinstance(json.loads(out), dict)
    obeyed(err if code == 2 or json_wanted else err + out)


def obeyed(text: str) -> None:
    """Refuse text that holds what a terminal would obey: any sign but printable ones and the ends of lines."""
    signs = sorted({sign for sign in text if not (sign.isprintable() or sign == "\n")})
    assert not signs, f"signs that a terminal would obey: {signs!r}"


def failure_of(kind: str, seed: int, bench: Bench) -> str | None:
    """Do one trial; return what went wrong."""
    from hetlora.errors import HetLoraError

    draw = random.Random(f"{kind}:{seed}")
    began = time.monotonic()
    try:
        with within(SECONDS):
            try:
                TRIALS[kind](draw, bench)
            except HetLoraError as error:
                text = str(error)
                assert text.strip(), "an empty message"
                obeyed(text)
    except Exception as error:  # noqa: BLE001  that is what is looked for
        place = traceback.extract_tb(error.__traceback__)[-1]
        return (
            f"{type(error).__name__}: {str(error)[:300]!r} at {Path(place.filename).name}:{place.lineno} after "
            f"{time.monotonic() - began:.1f} s; repeat it by --kind {kind} --trials 1 --seed {seed}"
        )
    return None


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` where it takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError(f"over {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def kind_of(seed: int) -> str:
    """Return what kind of file a trial changes."""
    draw = random.Random(f"kind:{seed}")
    return draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]


def chunk(first: int, count: int, kind: str | None) -> tuple[Counter[str], list[str]]:
    """Do some trials in a folder of their own; return how many of which kind, and what failed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    from hetlora.runs.process import quiet_transformers

    torch.set_num_threads(1)
    quiet_transformers()
    tried: Counter[str] = Counter()
    failures = []
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        os.environ["HF_DATASETS_CACHE"] = f"{place}/cache"
        os.chdir(place)
        try:
            bench = Bench(Path(place).resolve())
            for seed in range(first, first + count):
                chosen = kind or kind_of(seed)
                tried[chosen] += 1
                if (failure := failure_of(chosen, seed, bench)) is not None:
                    failures.append(failure)
        finally:
            os.chdir(before)
    return tried, failures


def main(options: Sequence[str] | None = None) -> int:
    """Try, with a process a core."""
    parser = arguments(__doc__ or "", 25_000)
    parser.add_argument("--kind", choices=list(TRIALS), help="one kind of file alone")
    chosen = parser.parse_args(options)
    outcome = Outcome("inputs", chosen.seed)
    parts = [
        (first, min(CHUNK, chosen.seed + chosen.trials - first))
        for first in range(chosen.seed, chosen.seed + chosen.trials, CHUNK)
    ]
    kinds: Counter[str] = Counter()
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(parts)), multiprocessing.get_context("spawn")) as pool:
        for tried, failures in pool.map(chunk, *zip(*parts, strict=True), [chosen.kind] * len(parts)):
            kinds.update(tried)
            outcome.tried(failures, trials=tried.total(), of=chosen.trials)
    outcome.figures["kinds"] = dict(sorted(kinds.items()))
    return outcome.end()


if __name__ == "__main__":
    sys.exit(main())
