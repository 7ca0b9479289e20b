"""Write a commented configuration for a person's own rows: `hetlora new`."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hetlora.data.federation import Source
from hetlora.data.files import STDLIB, file_source
from hetlora.data.huggingface import dataset_source, is_dataset
from hetlora.errors import DataError, HetLoraError, printable
from hetlora.runs.folder import atomic_write_text

__all__ = ["NewRun", "write_new"]

LOOKED_AT = 2_000
"""Rows whose texts are looked at; clients and sides of the split are counted over all, which may be sorted by them."""

CLIENTS = (
    "client",
    "client_id",
    "user",
    "user_id",
    "username",
    "author",
    "speaker",
    "owner",
    "device",
    "site",
    "hospital",
    "account",
)
SPLITS = ("split", "subset", "fold", "set")
TRAIN, TEST = ("train", "training"), ("test", "validation", "valid", "val", "dev", "eval", "heldout")
PAIRS = (
    ("instruction", "output"), ("instruction", "response"), ("prompt", "completion"), ("prompt", "response"),
    ("prompt", "target"), ("question", "answer"), ("q", "a"), ("input", "output"), ("source", "target"), ("post", "summary"),
    ("document", "summary"), ("article", "highlights"),
)  # fmt: skip
"""Names of a prompt and its target, the usual ones first."""
OPTIONAL = ("input", "context")
"""Fields that an instruction may have beside it, and that are often empty."""
TEXTS = ("text", "content", "message", "body", "completion", "target")
MADE = 10
"""Clients that rows are divided among where no field names any."""


class _Layout(NamedTuple):
    """What the fields of some rows hold.

    Attributes:
        messages: The field of a conversation; None without one.
        text: Templates of prompt and target; None without them.
        client: The field that names clients, and how many; None without one.
        split: The field that divides rows, and its values that train and that are held out; None without one.
    """

    messages: str | None
    text: tuple[str, str] | None
    client: tuple[str, int] | None
    split: tuple[str, list[str], list[str]] | None

    def described(self) -> list[str]:
        """Return what the configuration takes from the rows, one line each."""
        held_out = f"{self.split[0]!r} = {', '.join(self.split[2])}" if self.split else "a tenth, by a hash of the text"
        return [
            f"conversations: {self.messages!r}"
            if self.messages
            else f"trained: {self.text[1].strip()}"
            if self.text
            else "",
            f"clients: {self.client[1]}, by {self.client[0]!r}"
            if self.client
            else "clients: rows are divided, no field names any",
            f"held out: {held_out}",
        ]


@dataclass(frozen=True)
class NewRun:
    """What was written, and what was seen in the rows.

    Attributes:
        path: The configuration.
        seen: What was concluded from the rows, one line each, for people.
    """

    path: Path
    seen: tuple[str, ...]


def write_new(path: Path, data: str = STDLIB, base: str = "nano") -> NewRun:
    """Look at rows and write a configuration that runs on them.

    Args:
        path: The file to write; it must not exist.
        data: What `data.path` takes.
        base: What `model.base` takes.

    Raises:
        HetLoraError: The file exists, the rows cannot be read, or no field of theirs is text that could be trained on.
    """
    if path.exists():
        raise HetLoraError(f"{str(path)!r} exists already; give another name, or remove it")
    rows, marks = _look(data)
    layout = _Layout(_messages(rows), _text_keys(rows), _client_field(marks), _split_field(marks))
    guess = None
    if layout.messages is None and layout.text is None:
        taken = {layout.client[0]} if layout.client else set()
        guess = _guessed(rows, taken | ({layout.split[0]} if layout.split else set()))
        layout = layout._replace(text=guess)
    if layout.messages is None and layout.text is None:
        raise DataError(
            f"{data}: no field holds a conversation or text; its fields are {', '.join(map(printable, rows[0]))}. Copy an "
            "example with `hetlora examples`, and name fields in its data.prompt and data.target, in braces"
        )
    count = sum(one.rows for one in marks)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, "\n".join(_lines(path.stem, base, data, layout, count)) + "\n")
    except OSError as error:
        raise HetLoraError(f"cannot write {str(path)!r}: {error.strerror}; give another name") from error
    bundled = ", the bundled ones; give --data for your own" if data == STDLIB else ""
    seen = [f"rows: {count}{bundled}", *layout.described()]
    if guess:
        seen.append("guessed from the order of the fields; change data.prompt and data.target where that is wrong")
    if layout.messages and not _chats(base):
        seen.append(
            f"the tokenizer of {base!r} has no chat template, which conversations need: give --base with an instruction-tuned "
            "model, or data.chat_template"
        )
    return NewRun(path, tuple(seen))


def _chats(base: str) -> bool:
    """Return whether a base has a chat template; one that is not here yet may have."""
    from hetlora.model.lora_model import load_tokenizer

    try:
        return bool(load_tokenizer(base).chat_template)
    except HetLoraError:
        return True


class _Marks(NamedTuple):
    """Values that rows have in fields that may name their client or their side of a split, and how many rows have them."""

    values: Mapping[str, str | int | None]
    rows: int


def _look(data: str) -> tuple[list[Mapping[str, Any]], list[_Marks]]:
    """Return the first rows of a source, and what all of them have in the fields by which rows are divided."""
    source: Source = dataset_source(data) if is_dataset(data) else file_source(data)
    records = (fields for _, fields in source.records)
    rows = list(itertools.islice(records, LOOKED_AT))
    if not rows:
        raise DataError(f"{data} holds no rows; give a file or a data set with some")
    names = [name for plain, name in _plain_names(rows[0]).items() if plain in (*CLIENTS, *SPLITS)]
    found = Counter(
        tuple(value if isinstance(value := fields.get(name), (str, int)) else None for name in names)
        for fields in itertools.chain(rows, records)
    )
    return rows, [_Marks(dict(zip(names, values, strict=True)), count) for values, count in found.items()]


def _messages(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the field that holds a list of turns in the first row."""
    for name, value in rows[0].items():
        turns = value if isinstance(value, list) else []
        if turns and all(
            isinstance(turn, Mapping) and ({"role", "content"} <= set(turn) or {"from", "value"} <= set(turn))
            for turn in turns
        ):
            return name
    return None


def _plain_names(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of fields by how they are written plainly: "User ID" by "user_id"."""
    return {name.strip().lower().replace(" ", "_").replace("-", "_"): name for name in fields}


def _is_text(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return all(isinstance(row.get(name), (str, int, float)) for row in rows) and any(
        str(row[name]).strip() for row in rows
    )


def _text_keys(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """Return templates of a prompt and a target, by the usual names of fields."""
    names = _plain_names(rows[0])
    for asked, answered in PAIRS:
        if asked in names and answered in names and _is_text(rows, names[asked]) and _is_text(rows, names[answered]):
            parts = [
                f"{{?{names[key]}}}\n{{{names[key]}}}{{/{names[key]}}}"
                for key in OPTIONAL
                if key in names and key != asked
            ]
            return f"{{{names[asked]}}}{''.join(parts)}\n\nAnswer:", f" {{{names[answered]}}}"
    for name in TEXTS:
        if name in names and _is_text(rows, names[name]):
            return "", f"{{{names[name]}}}"
    return None


def _guessed(rows: Sequence[Mapping[str, Any]], taken: Set[str]) -> tuple[str, str] | None:
    """Return templates of the first two fields that hold words, for fields whose names say nothing: asked and answered."""
    fields = [name for name in rows[0] if name not in taken and _is_text(rows, name) and _has_words(rows, name)]
    if not fields:
        return None
    return ("", f"{{{fields[0]}}}") if len(fields) == 1 else (f"{{{fields[0]}}}\n\nAnswer:", f" {{{fields[1]}}}")


def _has_words(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether most values of a field are several words."""
    return 2 * sum(len(str(row[name]).split()) > 1 for row in rows) > len(rows)


def _client_field(marks: Sequence[_Marks]) -> tuple[str, int] | None:
    """Return the field that names clients, and how many of them have two rows or more."""
    names = _plain_names(marks[0].values)
    for name in CLIENTS:
        if name in names and all(one.values[names[name]] is not None for one in marks):
            sizes: Counter[str] = Counter()
            for one in marks:
                sizes[str(one.values[names[name]])] += one.rows
            usable = sum(size >= 2 for size in sizes.values())
            if usable >= 2:
                return names[name], usable
    return None


def _split_field(marks: Sequence[_Marks]) -> tuple[str, list[str], list[str]] | None:
    """Return the field that divides training from held-out rows, and its values for both."""
    names = _plain_names(marks[0].values)
    for name in SPLITS:
        values = {str(one.values[names[name]]) for one in marks} if name in names else set()
        train = sorted(value for value in values if value.lower() in TRAIN)
        test = sorted(value for value in values if value.lower() in TEST)
        if train and test:
            return names[name], train, test
    return None


def _lines(name: str, base: str, data: str, layout: _Layout, rows: int) -> list[str]:
    """Return the configuration, line by line."""
    clients = layout.client[1] if layout.client else min(MADE, max(2, rows // 4))
    prompted = layout.messages is not None or bool(layout.text and layout.text[0])
    return [
        f"# Before it trains: hetlora data {name}.toml --show 3; hetlora plan {name}.toml; hetlora doctor {name}.toml",
        "# Every key: docs/configuration.md",
        f"name = {_toml(name)}",
        "seed = 0",
        "",
        "[model]",
        f"base = {_toml(base)}  # a folder, or a name on the Hugging Face hub",
        "",
        *_data_lines(data, layout),
        *(
            []
            if layout.client
            else ["[partition]  # no field names a client", 'kind = "iid"', f"clients = {clients}", ""]
        ),
        "[federation]",
        "rounds = 10",
        f"clients_per_round = {min(8, clients)}",
        "",
        "[ranks]  # the rank that each class of devices affords, and its share of the clients",
        'kind = "tiers"',
        "tiers = [{ rank = 4, share = 0.5 }, { rank = 8, share = 0.3 }, { rank = 16, share = 0.2 }]",
        "",
        "[method]",
        'name = "hetlora"  # `hetlora methods` lists the others',
        "",
        "[training]  # of one client in one round",
        "learning_rate = 2e-3",
        "batch_size = 4",
        "steps = 4",
        "",
        "[evaluation]",
        "every = 5",
        "rows_per_client = 16",
        f"generate = {8 if prompted else 0}  # answers to held-out prompts, scored by ROUGE-L",
    ]


def _data_lines(data: str, layout: _Layout) -> list[str]:
    lines = ["[data]", f"path = {_toml(data)}"]
    if layout.client:
        lines.append(f"client_field = {_toml(layout.client[0])}  # whose row it is")
    if layout.messages:
        lines.append(f"messages = {_toml(layout.messages)}  # every answer is trained, after the turns before it")
    elif layout.text:
        prompt, target = layout.text
        lines.append(
            f"prompt = {_toml(prompt)}  # seen, and not trained" if prompt else "# no prompt: every token is trained"
        )
        lines.append(f"target = {_toml(target)}  # trained")
    if layout.split:
        name, train, test = layout.split
        lines += [
            f"split_field = {_toml(name)}",
            f"train = {_toml(train)}",
            f"test = {_toml(test)}  # held out: never trained",
        ]
    else:
        lines += ['split_field = ""  # no field says what is held out: a hash of the text does', "test_share = 0.1"]
    return [*lines, "max_length = 256  # tokens; longer rows are cut", ""]


def _toml(value: str | list[str]) -> str:
    """Return text, or a list of texts, as TOML: a JSON string is one, but for half a surrogate pair."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else f"[{', '.join(map(_toml, value))}]"
