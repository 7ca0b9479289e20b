"""What the fields of a person's rows hold, for `hetlora new`: the prompt, the answer, the client, the side of the split."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from hetlora.data.federation import Source
from hetlora.data.fields import field_names
from hetlora.data.files import file_source
from hetlora.data.huggingface import FILE, SPLIT, dataset_source, is_dataset
from hetlora.errors import DataError, printable
from hetlora.runs.text import many

__all__ = ["Layout", "Rows", "find_layout", "look", "notes_on_fields"]

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


class Layout(NamedTuple):
    """What the fields of some rows hold.

    Attributes:
        messages: The field of a conversation; None without one.
        text: Templates of prompt and target; None without them.
        client: The field that names clients, and how many; None without one.
        split: The field that divides rows, and its values that train and that are held out; None without one.
        guessed: From what the templates were guessed; empty where the fields have usual names, or a person named them.
    """

    messages: str | None
    text: tuple[str, str] | None
    client: tuple[str, int] | None
    split: tuple[str, list[str], list[str]] | None
    guessed: str = ""

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


class _Marks(NamedTuple):
    """Values that rows have in fields that may name their client or their side of a split, and how many rows have them."""

    values: Mapping[str, str | int | None]
    rows: int


class Rows(NamedTuple):
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

    @property
    def total(self) -> int:
        """Return how many rows there are."""
        return sum(one.rows for one in self.marks)


def look(data: str, client: str | None) -> Rows:
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
    return Rows(first, names, marks, nameless)


def find_layout(rows: Rows, data: str, prompt: str | None, target: str | None, client: str | None) -> Layout:
    """Return what the fields of some rows hold.

    Args:
        rows: The rows.
        data: Where they are from, for messages.
        prompt: The field of the prompt, or a template, where a person names it.
        target: The same for what is trained; without `prompt` all that is seen.
        client: The field that names clients, where a person names it.

    Raises:
        DataError: A field that is named is not there, or none is text that could be trained on.
    """
    if prompt is not None and target is None:
        raise DataError(f"--prompt {prompt!r} needs --target, the field that is trained; give both")
    messages = _messages(rows) if target is None else None
    text, guessed = None, ""
    if target is not None:
        text = _given(rows, data, prompt, target)
    elif messages is None and (text := _text_keys(rows)) is None:
        text = _by_words(rows)
        guessed, text = "names" if text else "", text or _text_alone(rows)
    layout = Layout(messages, text, None, _split_field(rows.marks), guessed)
    layout = layout._replace(client=_client_field(rows, data, client, layout.used))
    if messages is None and text is None:
        layout = layout._replace(text=_by_order(rows, layout.used), guessed="order")
        if layout.text is None:
            raise DataError(
                f"{data}: no field holds a conversation or text; its fields are {', '.join(map(printable, rows.names))}. Name "
                "one with --target, and with --prompt what comes before it"
            )
    return layout


def notes_on_fields(rows: Rows, layout: Layout, is_dataset: bool) -> list[str]:
    """Return which fields are not used, which rows lack one, and what was guessed, one line each."""
    virtual = {SPLIT, FILE} if is_dataset else set()
    unused = [repr(name) for name in rows.names if name not in layout.used | virtual]
    notes = [f"not used: {', '.join(unused)}"] if unused else []
    notes += _lacking(rows, layout)
    if layout.client and layout.client[0] == FILE and is_dataset:
        notes.append("guessed that each file holds the rows of one client; give --client where a field names it")
    if layout.guessed:
        notes.append(
            f"guessed from the {layout.guessed} of the fields; where that is wrong, give --prompt and --target, or change "
            "data.prompt and data.target"
        )
    return notes


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


def _usual(rows: Rows, name: str, suits: Callable[[object], bool]) -> bool:
    """Whether nearly all rows have a value that suits."""
    return sum(suits(row.get(name)) for _, row in rows.first) >= USUAL * len(rows.first)


def _lacking(rows: Rows, layout: Layout) -> list[str]:
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


def _messages(rows: Rows) -> str | None:
    """Return the field that holds a list of turns."""
    return next((name for name in rows.names if _usual(rows, name, _are_turns)), None)


def _plain_name(name: str) -> str:
    """Return how a field's name is written plainly: "User ID" is "user_id"."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _plain_names(names: Collection[str]) -> dict[str, str]:
    return {_plain_name(name): name for name in names}


def _is_text(rows: Rows, name: str) -> bool:
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


def _given(rows: Rows, data: str, prompt: str | None, target: str) -> tuple[str, str]:
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


def _text_keys(rows: Rows) -> tuple[str, str] | None:
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


def _by_words(rows: Rows) -> tuple[str, str] | None:
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


def _text_alone(rows: Rows) -> tuple[str, str] | None:
    names = _plain_names(rows.names)
    return next((("", _field(names[name])) for name in TEXTS if name in names and _is_text(rows, names[name])), None)


def _by_order(rows: Rows, taken: Collection[str]) -> tuple[str, str] | None:
    """Return templates for fields whose names say nothing: the first that holds words is asked, one after it answered."""
    fields = [name for name in rows.names if name not in taken and _is_text(rows, name)]
    worded = [name for name in fields if _has_words(rows, name)]
    if not worded:
        return None
    after = [name for name in fields[fields.index(worded[0]) + 1 :] if not NOT_TEXT & {*_words(name)}]
    answers = worded[1:] or after  # an answer may be a word or a number
    return _pair(worded[0], answers[0]) if answers else ("", _field(worded[0]))


def _has_words(rows: Rows, name: str) -> bool:
    """Whether most values of a field are several words."""
    return 2 * sum(len(str(row.get(name, "")).split()) > 1 for _, row in rows.first) > len(rows.first)


def _client_field(rows: Rows, data: str, given: str | None, taken: Collection[str]) -> tuple[str, int] | None:
    """Return the field that names clients, and how many of them have two rows or more."""
    dividing = rows.marks[0].values
    names = [name for name in CLIENTS if name in _plain_names(dividing)]
    found = [_plain_names(dividing)[name] for name in names]
    found += [name for name in dividing if CLIENT_WORDS & {*_words(name)} and name not in found]
    if FILE in dividing and _files_are_clients(rows.marks):
        found.append(FILE)
    if given is not None and given not in dividing:
        have = ", ".join(map(printable, rows.names))
        raise DataError(f"--client {given!r}: {data} has no field of that name; its fields are {have}")
    for name in [given] if given is not None else found:
        sizes = _sizes(rows.marks, name)
        usable = sum(size >= 2 for size in sizes.values())
        if usable >= 2 and name not in taken and (sizes.total() >= USUAL * rows.total or given):
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
