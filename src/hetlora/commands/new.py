"""Write a commented configuration for a person's own rows: `hetlora new`."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hetlora.data.federation import Source
from hetlora.data.fields import field_names
from hetlora.data.files import STDLIB, file_source
from hetlora.data.huggingface import FILE, SPLIT, dataset_source, is_dataset
from hetlora.errors import DataError, HetLoraError, printable
from hetlora.runs.folder import atomic_write_text
from hetlora.runs.text import many

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
CLIENT_WORDS = {*CLIENTS, "userid", "clientid", "who"}
SPLITS = ("split", "subset", "fold", "set")
TRAIN, TEST = ("train", "training"), ("test", "validation", "valid", "val", "dev", "eval", "heldout")
PLAIN_CHAT = (
    "{% for message in messages %}{{ '' if loop.first else '\\n' }}{{ message['role'] }}: {{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{% endfor %}"
    "{{ '\\nassistant:' if add_generation_prompt else '' }}\n"
)
"""A chat template for a base without one: a line for each turn, an answer ended by the end-of-text token."""
PAIRS = (
    ("instruction", "output"), ("instruction", "response"), ("prompt", "completion"), ("prompt", "response"),
    ("prompt", "target"), ("question", "answer"), ("q", "a"), ("input", "output"), ("source", "target"), ("post", "summary"),
    ("document", "summary"), ("article", "highlights"),
)  # fmt: skip
"""Names of a prompt and its target, the usual ones first."""
OPTIONAL = ("input", "context")
"""Fields that an instruction may have beside it, and that are often empty."""
TEXTS = ("text", "content", "message", "body", "completion", "target")
ASKED = ("question", "prompt", "instruction", "query", "asked", "input", "text", "review", "sentence", "content", "message",
         "comment", "post", "body", "document")  # fmt: skip
ANSWERED = ("answer", "reply", "response", "completion", "output", "target", "label", "class", "sentiment")
WORDS = ((("q",), ("a",)), (ASKED, ANSWERED))
"""Words within the names of a prompt and its target, where the names are not usual ones."""
NOT_TEXT = {
    "who",
    "by",
    "id",
    "ids",
    "nr",
    "no",
    "number",
    "index",
    "date",
    "time",
    "timestamp",
    "url",
    "lang",
    "language",
}
"""Words of a name whose field is about the text: "who asked", "answer_id"."""
USUAL = 0.9
"""The share of rows that must have a field that is used. A run names each row that lacks it; a few bad rows change nothing."""
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

    @property
    def used(self) -> set[str]:
        """Return the names of the fields that are read."""
        named = [
            self.messages,
            "tools" if self.messages else None,
            *(one[0] for one in (self.client, self.split) if one),
        ]
        filled = {name for template in self.text or () for name in field_names(template)}
        return {name for name in named if name} | filled | {name.split(".")[0] for name in filled}

    def described(self) -> list[str]:
        """Return what the configuration takes from the rows, one line each."""
        after = f", after {self.text[0]!r}" if self.text and self.text[0] else ""
        held_out = f"{self.split[0]!r} = {', '.join(self.split[2])}" if self.split else "a tenth, by a hash of the text"
        return [
            f"conversations: {self.messages!r}"
            if self.messages
            else f"trained: {self.text[1].strip()}{after}"
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


def write_new(
    path: Path,
    data: str = STDLIB,
    base: str = "nano",
    *,
    prompt: str | None = None,
    target: str | None = None,
    client: str | None = None,
) -> NewRun:
    """Look at rows and write a configuration that runs on them.

    Args:
        path: The file to write; it must not exist.
        data: What `data.path` takes.
        base: What `model.base` takes.
        prompt: The field of the prompt, or a template; by default both are looked for.
        target: The same for what is trained; without `prompt` all that is seen.
        client: The field that names clients.

    Raises:
        HetLoraError: The file exists, the rows cannot be read, a field that is named is not there, or no field of theirs is
            text that could be trained on.
    """
    template = path.with_name(f"{path.stem}-chat.jinja")
    for file in (path, template):
        if file.exists():
            raise HetLoraError(f"{str(file)!r} exists already; give another name, or remove it")
    if prompt is not None and target is None:
        raise HetLoraError(f"--prompt {prompt!r} needs --target, the field that is trained; give both")
    rows = _look(data, client)
    text, guessed = None, ""
    messages = _messages(rows) if target is None else None
    if target is not None:
        text = _given(rows, data, prompt, target)
    elif messages is None:
        text = _text_keys(rows)
        if text is None and (text := _by_words(rows)):
            guessed = "names"
        text = text or _text_alone(rows)
    layout = _Layout(messages, text, None, _split_field(rows.marks))
    layout = layout._replace(client=_client_field(rows, data, client, layout.used))
    if messages is None and text is None:
        text, guessed = _by_order(rows, layout.used), "order"
        layout = layout._replace(text=text)
    if messages is None and text is None:
        raise DataError(
            f"{data}: no field holds a conversation or text; its fields are {', '.join(map(printable, rows.names))}. Name one "
            "with --target, and with --prompt what comes before it"
        )
    chat = str(template) if messages and not _chats(base) else None
    count = sum(one.rows for one in rows.marks)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if chat:
            atomic_write_text(template, PLAIN_CHAT)
        atomic_write_text(path, "\n".join(_lines(path.stem, base, data, layout, count, chat)) + "\n")
    except OSError as error:
        raise HetLoraError(f"cannot write {str(path)!r}: {error.strerror}; give another name") from error
    bundled = ", the bundled ones; give --data for your own" if data == STDLIB else ""
    seen = [f"rows: {count}{bundled}", *layout.described()]
    virtual = {SPLIT, FILE} if is_dataset(data) else set()
    if unused := [repr(name) for name in rows.names if name not in layout.used | virtual]:
        seen.append(f"not used: {', '.join(unused)}")
    seen += _lacking(rows, layout)
    if chat:
        seen.append(
            f"the tokenizer of {base!r} has no chat template: a plain one is written to {chat}; an instruction-tuned base "
            "(--base) has its own"
        )
    if layout.client and layout.client[0] in virtual:
        seen.append("guessed that each file holds the rows of one client; give --client where a field names it")
    if guessed:
        seen.append(
            f"guessed from the {guessed} of the fields; where that is wrong, give --prompt and --target, or change data.prompt "
            "and data.target"
        )
    return NewRun(path, tuple(map(printable, seen)))


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


class _Rows(NamedTuple):
    """What was looked at.

    Attributes:
        first: The first rows, with their places.
        names: The fields that they have.
        marks: What all rows have in the fields by which rows are divided.
        nameless: The place of the first row without a value in such a field, by the field.
    """

    first: Sequence[tuple[str, Mapping[str, Any]]]
    names: Sequence[str]
    marks: Sequence[_Marks]
    nameless: Mapping[str, str]


def _look(data: str, client: str | None) -> _Rows:
    """Read a source: its first rows, and what all of them have in the fields by which rows are divided."""
    source: Source = dataset_source(data) if is_dataset(data) else file_source(data)
    records = iter(source.records)
    first = list(itertools.islice(records, LOOKED_AT))
    if not first:
        raise DataError(f"{data} holds no rows; give a file or a data set with some")
    if source.none_is_empty:
        first = [(where, {name: "" if value is None else value for name, value in row.items()}) for where, row in first]
    names = list(dict.fromkeys(name for _, row in first for name in row))
    dividing = [name for name in names if _divides(name) or name == client]
    if is_dataset(data) and f"{first[0][1].get(FILE)}." in first[0][0]:
        dividing.append(FILE)
    found: Counter[tuple[str | int | None, ...]] = Counter()
    nameless: dict[str, str] = {}
    for where, row in itertools.chain(first, records):
        values = tuple(
            value if isinstance(value := row.get(name), int) or (isinstance(value, str) and value.strip()) else None
            for name in dividing
        )
        found[values] += 1
        for name, value in zip(dividing, values, strict=True):
            if value is None:
                nameless.setdefault(name, where)
    marks = [_Marks(dict(zip(dividing, values, strict=True)), count) for values, count in found.items()]
    return _Rows(first, names, marks, nameless)


def _words(name: str) -> list[str]:
    """Return the words of a field's name: "userId" and "User ID" have the same."""
    return re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())


def _divides(name: str) -> bool:
    """Whether a field's name says that it may name clients or the side of the split."""
    words = {*_words(name)}
    text = words & {*ASKED, *ANSWERED} and not words & NOT_TEXT
    return _plain_name(name) in (*CLIENTS, *SPLITS) or bool(words & CLIENT_WORDS and not text)


def _are_turns(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, Mapping) and ({"role", "content"} <= set(turn) or {"from", "value"} <= set(turn))
            for turn in value
        )
    )


def _are_words(value: object) -> bool:
    return isinstance(value, (str, int, float))


def _usual(rows: _Rows, name: str, suits: Callable[[object], bool]) -> bool:
    """Whether nearly all rows have a value that suits."""
    return sum(suits(row.get(name)) for _, row in rows.first) >= USUAL * len(rows.first)


def _lacking(rows: _Rows, layout: _Layout) -> list[str]:
    """Return a note for each field that a few rows lack: a run names the first of them and ends."""
    suits = _are_turns if layout.messages else _are_words
    optional = {name for template in layout.text or () for name in re.findall(r"\{\?([^{}]*)\}", template)}
    notes = []
    for name in sorted({name for name in layout.used if name in rows.names} - optional - {"tools"}):
        if layout.split and name == layout.split[0]:
            continue
        if layout.client and name == layout.client[0]:
            where, count = rows.nameless.get(name), sum(one.rows for one in rows.marks if one.values[name] is None)
        else:
            bad = [where for where, row in rows.first if not suits(row.get(name))]
            where, count = (bad[0] if bad else None), len(bad)
        if where is not None:
            found = (
                f"{where} has no {name!r}"
                if count == 1
                else f"{many(count, 'row')} have no {name!r}, the first is {where}"
            )
            notes.append(f"note: {found}; a run refuses that: mend it or take it out")
    return notes


def _messages(rows: _Rows) -> str | None:
    """Return the field that holds a list of turns."""
    return next((name for name in rows.names if _usual(rows, name, _are_turns)), None)


def _plain_name(name: str) -> str:
    """Return how a field's name is written plainly: "User ID" is "user_id"."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _plain_names(names: Collection[str]) -> dict[str, str]:
    return {_plain_name(name): name for name in names}


def _is_text(rows: _Rows, name: str) -> bool:
    return _usual(rows, name, _are_words) and any(str(row.get(name, "")).strip() for _, row in rows.first)


def _field(name: str) -> str:
    """Return a field as a template names it.

    Raises:
        DataError: No template can name it.
    """
    if "{" in name or "}" in name or name.startswith(("?", "/")):
        raise DataError(
            f"the field {name!r} cannot stand in a template, where braces enclose a name and ? and / mark an optional part; "
            "rename the field, or name others with --prompt and --target"
        )
    return f"{{{name}}}"


def _pair(asked: str, answered: str, between: str = "") -> tuple[str, str]:
    return f"{_field(asked)}{between}\n\nAnswer:", f" {_field(answered)}"


def _given(rows: _Rows, data: str, prompt: str | None, target: str) -> tuple[str, str]:
    """Return templates of the prompt and the target that a person named, as fields or as templates."""
    filled = {}
    for option, value in (("--prompt", prompt), ("--target", target)):
        whole = value is not None and value not in rows.names and "{" in value
        named = field_names(value) if value and whole else {value} if value else set()
        for name in named:
            if name not in rows.names and name.split(".")[0] not in rows.names:
                have = ", ".join(map(printable, rows.names))
                raise DataError(f"{option} {value!r}: {data} has no field {name!r}; its fields are {have}")
        filled[option] = value if whole else _field(value) if value else ""
    asked, answered = filled["--prompt"] or "", filled["--target"] or ""
    if prompt in rows.names:
        asked += "\n\nAnswer:"
    return asked, f" {answered}" if asked and target in rows.names else answered


def _text_keys(rows: _Rows) -> tuple[str, str] | None:
    """Return templates of a prompt and a target, by the usual names of fields."""
    names = _plain_names(rows.names)
    for asked, answered in PAIRS:
        if asked in names and answered in names and _is_text(rows, names[asked]) and _is_text(rows, names[answered]):
            parts = [
                f"{{?{names[key]}}}\n{{{names[key]}}}{{/{names[key]}}}"
                for key in OPTIONAL
                if key in names and key != asked
            ]
            return _pair(names[asked], names[answered], "".join(parts))
    return None


def _by_words(rows: _Rows) -> tuple[str, str] | None:
    """Return templates of a prompt and a target, by words within the names of fields."""
    fields = {name: _words(name) for name in rows.names if _is_text(rows, name)}
    fields = {name: words for name, words in fields.items() if not NOT_TEXT & {*words}}
    for asks, answers in WORDS:
        asked = next((name for word in asks for name, words in fields.items() if word in words), None)
        rest = {name: words for name, words in fields.items() if name != asked}
        answered = next((name for word in answers for name, words in rest.items() if word in words), None)
        if asked and answered:
            return _pair(asked, answered)
    return None


def _text_alone(rows: _Rows) -> tuple[str, str] | None:
    names = _plain_names(rows.names)
    return next((("", _field(names[name])) for name in TEXTS if name in names and _is_text(rows, names[name])), None)


def _by_order(rows: _Rows, taken: Collection[str]) -> tuple[str, str] | None:
    """Return templates for fields whose names say nothing: the first that holds words is asked, one after it answered."""
    fields = [name for name in rows.names if name not in taken and _is_text(rows, name)]
    worded = [name for name in fields if _has_words(rows, name)]
    if not worded:
        return None
    after = [name for name in fields[fields.index(worded[0]) + 1 :] if not NOT_TEXT & {*_words(name)}]
    answers = worded[1:] or after  # an answer may be a word or a number
    return _pair(worded[0], answers[0]) if answers else ("", _field(worded[0]))


def _has_words(rows: _Rows, name: str) -> bool:
    """Whether most values of a field are several words."""
    return 2 * sum(len(str(row.get(name, "")).split()) > 1 for _, row in rows.first) > len(rows.first)


def _client_field(rows: _Rows, data: str, given: str | None, taken: Collection[str]) -> tuple[str, int] | None:
    """Return the field that names clients, and how many of them have two rows or more."""
    dividing = rows.marks[0].values
    names = [name for name in CLIENTS if name in _plain_names(dividing)]
    found = [_plain_names(dividing)[name] for name in names]
    found += [name for name in dividing if CLIENT_WORDS & {*_words(name)} and name not in found]
    if FILE in dividing and _files_are_clients(rows.marks):
        found.append(FILE)
    total = sum(one.rows for one in rows.marks)
    if given is not None and given not in dividing:
        have = ", ".join(map(printable, rows.names))
        raise DataError(f"--client {given!r}: {data} has no field of that name; its fields are {have}")
    for name in [given] if given is not None else found:
        sizes = _sizes(rows.marks, name)
        usable = sum(size >= 2 for size in sizes.values())
        if usable >= 2 and name not in taken and (sizes.total() >= USUAL * total or given):
            return name, usable
        if given is not None:
            raise DataError(
                f"--client {given!r}: the field names {many(usable, 'client')} of two rows or more; name another field, "
                "or give no --client, and the rows are divided"
            )
    return None


def _sizes(marks: Sequence[_Marks], name: str) -> Counter[str]:
    """Return how many rows have which value."""
    sizes: Counter[str] = Counter()
    for one in marks:
        if (value := one.values[name]) is not None:
            sizes[str(value)] += one.rows
    return sizes


def _files_are_clients(marks: Sequence[_Marks]) -> bool:
    """Whether a folder's files may be a client's each: several rows in all of them, and no names of sides or shards."""
    sizes = _sizes(marks, FILE)
    return all(
        size > 1 and name.lower() not in (*TRAIN, *TEST) and not re.search(r"\d-of-\d", name)
        for name, size in sizes.items()
    )


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


def _lines(name: str, base: str, data: str, layout: _Layout, rows: int, chat: str | None) -> list[str]:
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
        *_data_lines(data, layout, chat),
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
        "min_rank = 2  # no client prunes below it; the default, 5, would leave those of rank 4 as they are",
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


def _data_lines(data: str, layout: _Layout, chat: str | None) -> list[str]:
    lines = ["[data]", f"path = {_toml(data)}"]
    if layout.client:
        lines.append(f"client_field = {_toml(layout.client[0])}  # whose row it is")
    if layout.messages:
        lines.append(f"messages = {_toml(layout.messages)}  # every answer is trained, after the turns before it")
        if chat:
            lines.append(f"chat_template = {_toml(chat)}  # the base has none")
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
