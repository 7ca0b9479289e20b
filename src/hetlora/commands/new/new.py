"""Write a commented configuration for a person's own rows: `hetlora new`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from hetlora.commands.new.layout import Layout, find_layout, look, notes_on_fields
from hetlora.data.files import STDLIB
from hetlora.data.huggingface import is_dataset
from hetlora.errors import HetLoraError, printable
from hetlora.runs.folder import atomic_write_text

__all__ = ["NewRun", "write_new"]

MADE = 10
"""Clients that rows are divided among where no field names any."""
PLAIN_CHAT = (
    "{% for message in messages %}{{ '' if loop.first else '\\n' }}{{ message['role'] }}: {{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{% endfor %}"
    "{{ '\\nassistant:' if add_generation_prompt else '' }}\n"
)
"""A chat template for a base without one: a line for each turn, an answer ended by the end-of-text token."""


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
    if path.exists():
        raise HetLoraError(f"{str(path)!r} exists already; give another name, or remove it")
    rows = look(data, client)
    layout = find_layout(rows, data, prompt, target, client)
    chat = path.with_name(f"{path.stem}-chat.jinja") if layout.messages and not _chats(base) else None
    if chat and chat.exists():
        raise HetLoraError(f"{str(chat)!r}, a chat template, would be written and exists already; remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if chat:
            atomic_write_text(chat, PLAIN_CHAT)
        atomic_write_text(path, "\n".join(_lines(path.stem, base, data, layout, rows.total, chat)) + "\n")
    except OSError as error:
        raise HetLoraError(f"cannot write {str(path)!r}: {error.strerror}; give another name") from error
    bundled = ", the bundled ones; give --data for your own" if data == STDLIB else ""
    seen = [f"rows: {rows.total}{bundled}", *layout.described(), *notes_on_fields(rows, layout, is_dataset(data))]
    if chat:
        seen.append(
            f"the tokenizer of {base!r} has no chat template: a plain one is written to {chat}; an instruction-tuned base "
            "(--base) has its own"
        )
    return NewRun(path, tuple(map(printable, seen)))


def _chats(base: str) -> bool:
    """Return whether a base has a chat template; one that is not here yet may have."""
    from hetlora.model.lora_model import load_tokenizer

    try:
        return bool(load_tokenizer(base).chat_template)
    except HetLoraError:
        return True


def _lines(name: str, base: str, data: str, layout: Layout, rows: int, chat: Path | None) -> list[str]:
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


def _data_lines(data: str, layout: Layout, chat: Path | None) -> list[str]:
    lines = ["[data]", f"path = {_toml(data)}"]
    if layout.client:
        lines.append(f"client_field = {_toml(layout.client[0])}  # whose row it is")
    if layout.messages:
        lines.append(f"messages = {_toml(layout.messages)}  # every answer is trained, after the turns before it")
        if chat:
            lines.append(f"chat_template = {_toml(str(chat))}  # the base has none")
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
