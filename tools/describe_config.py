"""Write docs/configuration.md from the model of a run, so that the page cannot differ from what is accepted.

python tools/describe_config.py > docs/configuration.md
"""

from __future__ import annotations

import inspect
import re
import typing

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hetlora.commands.compare.grid import CompareConfig, MethodEntry
from hetlora.config import RANK_KINDS, TIER_KINDS, RunConfig
from hetlora.methods import METHODS

HEAD = """# Configuration

A run is one TOML file. This page has every key, in groups by what one wants. A key without a default must be given. `--set key=value` changes a key on the
command line, `--set key=` takes it away. Paths are relative to the working directory. An unknown key, a wrong type or a value out of its range is refused before
anything is loaded, all at once.
"""
END = "<!-- Written by `python tools/describe_config.py > docs/configuration.md`; tests/test_readme.py compares the two. -->"
GROUPS = {
    "Name a run, and limit what it uses": (
        ["top"],
        """name = "mine"
seed = 1
memory_megabytes = 4000""",
    ),
    "Choose the base and the rows": (
        ["model", "data"],
        """[model]
base = "nano"

[data]
path = "rows.jsonl"
client_field = "user"
prompt = "Question: {question}\\nAnswer:"
target = " {answer}"
split_field = ""
test_share = 0.2""",
    ),
    "Divide rows that have no client": (
        ["partition"],
        """[partition]
kind = "dirichlet"
by = "topic"
clients = 20
alpha = 0.3""",
    ),
    "Say how many rounds and clients, and which ranks": (
        ["federation", "ranks"],
        """[federation]
rounds = 20
clients_per_round = 5

[ranks]
kind = "tiers"
tiers = [{ rank = 8, share = 0.7 }, { rank = 32, share = 0.3 }]""",
    ),
    "Choose the method and the local training": (
        ["method", "training", "server_optimizer"],
        """[method]
name = "hetlora"
gamma = 0.95

[training]
learning_rate = 4e-3
steps = 5
batch_size = 8

[server_optimizer]
name = "momentum"
learning_rate = 1.0""",
    ),
    "Bound what one client can do": (
        ["robustness"],
        """[robustness]
clip = 2.0
largest_share = 0.3""",
    ),
    "Measure and track": (
        ["evaluation", "tracking"],
        """[evaluation]
every = 5
rows_per_client = 16
generate = 20

[tracking]
to = ["tensorboard"]""",
    ),
    "Run on several machines": (
        ["flower"],
        """[flower]
clients = "nodes"
min_clients = 5
deadline = 600.0""",
    ),
    "Compare methods": (
        ["compare"],
        """[compare]
seeds = [0, 1, 2]
learning_rates = [2e-3, 4e-3]

[[compare.methods]]
name = "hetlora"

[[compare.methods]]
name = "fedavg"
label = "rank 8 for all"
set.ranks = { kind = "same", rank = 8 }""",
    ),
}
"""What one wants, to the sections for it and an example; `top` stands for the keys above all sections."""
MEANINGS = {
    "name": "folder of the run within `output`; a second run of the name goes to `name-2`",
    "seed": "of ranks, cohorts, order of rows and the first adapter",
    "threads": "threads of PyTorch, and as many groups of clients train at once; by default it decides",
    "memory_megabytes": "the most that base, server and training may hold in tensors, in 10⁶ bytes; less is then done at once, to the "
    "same result",
    "output": "where runs are written",
    "checkpoint_every": "rounds between two checkpoints, from which `hetlora resume` goes on; 0 keeps none. One holds the whole state of the server, with what is kept for clients by a personal method, and is written anew every time: make it larger where that takes long",
    "model.base": "`nano`, a folder, or a name on the Hugging Face hub",
    "model.tokenizer": "where the tokenizer is, if not with the base",
    "model.adapter": "folder of a PEFT adapter (safetensors), or GGUF file of one of llama.cpp, that the federation starts from; its first slots count, up to the largest rank ([export.md](export.md))",
    "model.target_modules": "names of linear modules, or all of them; by default the attention projections usual for the architecture",
    "model.layers": "layers in which they are adapted: the last or first ones, or their numbers from 0; by default all. Below the lowest nothing is kept for the backward pass",
    "model.scaling": "the factor of B A, one for the whole federation",
    "model.dtype": "of the base; adapters, gradients, optimiser and sums are float32 (`docs/precision.md`)",
    "model.quantize": "how the base's linear layers are stored: `bfloat16` in 16 bits, `int8` in 8, `nf4` in 4, computed with in `dtype`; the last two need `pip install 'hetlora[quantize]'`",
    "model.device": "`auto`, `cpu`, `cuda`, `cuda:1`, `mps`",
    "data.path": "`stdlib`, a file (JSON Lines, a JSON array, CSV, TSV, Parquet; `.gz` and `.zst` allowed), a folder of such files or one saved by `save_to_disk`, or a data set's name on the Hugging Face hub (`owner/name`)",
    "data.subset": "the configuration of a data set that has several",
    "data.revision": "branch, tag or commit of a data set on the hub",
    "data.client_field": "the field that says whose row it is; in a folder, `file` is the name of the row's file, where rows have no such field",
    "data.prompt": "template of what the model sees and is not scored on, fields in braces; `{?name}` … `{/name}` is there only where the field is not blank",
    "data.target": "template of what it is to say; must be given unless `messages` is",
    "data.chat": "the tokenizer's chat template makes a user's turn of `prompt` and the assistant's of `target`, whose end is scored, too",
    "data.system": "template of a system turn before a chat",
    "data.messages": "a field that holds a list of turns, each with `role` and `content`, or ShareGPT's `from` and `value`: every turn of the assistant is an example, the turns before it its prompt",
    "data.fold_system": "put the system turn's text at the beginning of the first user turn, for chat templates without that role",
    "data.scored": "which answers of a conversation are examples; a turn with `weight = 0` or `train = false` never is",
    "data.chat_template": "a file with a chat template, instead of the tokenizer's",
    "data.chat_template_kwargs": "further arguments of the chat template, such as `{ enable_thinking = false }`",
    "data.begin": "whether the begin-of-text token stands before a prompt: as the tokenizer sets it, or as said",
    "data.end": "whether the end-of-text token is scored after a target that is no chat",
    "data.split_field": 'the field that divides training from held-out rows; `""` holds rows out by a hash of their text',
    "data.train": "its values that train",
    "data.test": "its values that are held out",
    "data.test_share": "the share held out where there is no such field; a client of two texts or more has at least one on either side",
    "data.validation_share": "when tuning: hold out this share of every client's training rows instead of the test rows",
    "data.max_length": "longest sequence in tokens",
    "data.long_rows": "`truncate`, or `split` a long row without a prompt into several",
    "data.clients": "how many clients, drawn by the seed; by default all",
    "data.min_rows": "a client with fewer training rows is left out",
    "partition.kind": "`natural`: by `data.client_field`; `sampled`: each of `clients` draws its own from all rows, independently of the others, so that a population may be larger than the data; the others divide all rows, of both sides of the split, among `clients`",
    "partition.clients": "how many clients, `client-000` and on; needed by all but `natural`",
    "partition.by": "the label: a field, or `length` for the target's length in characters; needed by `dirichlet` and `shards`, and what `hetlora data` counts",
    "partition.bins": "of `length`, with about as many rows each",
    "partition.alpha": "of `dirichlet` (shares of each label) and `quantity` (sizes): small is uneven",
    "partition.shards_per_client": "of `shards`: blocks of rows sorted by label",
    "partition.min_rows": "rows that each client holds at least, of both sides of the split together",
    "partition.rows_per_client": "of `sampled`, and needed by it: training rows that each client draws; held-out ones in the proportion of the data, at least one",
    "federation.rounds": "number of rounds",
    "federation.clients_per_round": "clients in a round's cohort",
    "federation.dropout": "share of every cohort that fails, drawn by the seed",
    "federation.same_weights": "whether every node's base must be the server's, file for file; `false` takes one of the same architecture and tokenizer with other weights, with `flower.clients = \"nodes\"`",
    "federation.dropout_when": "whether it fails before or after it has trained",
    "server_optimizer.name": "around the method, on the server: FedAvgM, FedAdam or FedYogi; without the section none",
    "server_optimizer.learning_rate": "η of the server's step",
    "server_optimizer.beta1": "of the first moment",
    "server_optimizer.beta2": "of the second moment; adam and yogi",
    "server_optimizer.tau": "degree of adaptivity; adam and yogi",
    "training.proximal": "FedProx's μ: clients pay μ/2 of the squared distance to what they received; 0 adds nothing",
    "method.name": 'the method, one of those below or `"package.module:factory"` of a package of your own ([methods](methods.md#adding-one)); its other keys are its arguments',
    "training.learning_rate": "of the clients' optimiser",
    "training.recompute": "keep only the inputs of layers for the backward pass and compute the rest again: less memory, a third more work, the same bits ([costs](costs.md))",
    "training.batch_size": "rows a step",
    "training.steps": "local steps a round; give this or `epochs`",
    "training.epochs": "passes over a client's rows a round",
    "training.optimizer": "of the clients; fresh every round",
    "training.weight_decay": "decoupled, of A and B",
    "training.clip_norm": "largest norm of a client's gradient; 0 clips nothing",
    "evaluation.every": "measure perplexity after every so many rounds; 0 only before and after",
    "evaluation.adapter": "`global` scores all rows under the whole adapter, `received` each client's under its own slots",
    "evaluation.clients": "how many clients are measured, and listed one by one in the results, drawn by the seed; by default all",
    "evaluation.rows_per_client": "held-out rows a client at most",
    "evaluation.generate": "answers to generate for ROUGE-L, spread over the clients",
    "evaluation.max_new_tokens": "longest answer",
    "robustness.clip": "the largest change of a client's A, and of its B, by root mean square, in medians of the round; larger ones are scaled down",
    "robustness.weight_cap": "the largest weight, in medians of the round's positive ones",
    "robustness.largest_share": "the largest share of the average that one client may have",
    "robustness.aggregation": "`mean` is the method's own; `median` and `trimmed_mean` take each number over the clients that own its slot, `krum` the one update nearest to the others by the product B A, `multi_krum` all but the furthest",
    "robustness.byzantine": "the share of a round's answers that may be hostile: so many are trimmed on either side, or left out by Krum",
    "flower.clients": "`config`: those of this file, hosted by nodes that have its data; `nodes`: they announce themselves (but in Flower's simulation)",
    "flower.precision": "of the numbers that travel, for training and to be measured; see performance.md",
    "flower.deadline": "seconds that a round waits for answers",
    "flower.answers": "updates after which a round ends; by default it waits for all",
    "flower.wait": "seconds to wait for enough clients before a round, and for a new node to answer",
    "flower.min_clients": "how many must be there for a round, with `nodes`; by default `federation.clients_per_round`",
    "flower.supernodes": "processes of `--engine flower-sim`; by default as many as cores",
    "tracking.to": "trackers that the figures of the rounds are logged to, besides the records: `tensorboard`, `trackio`; `--track` adds one ([tracking.md](tracking.md))",
    "tracking.project": "what the runs belong to, for trackers that put them together",
}
COMPARE_MEANINGS = {
    "compare.seeds": "a run of every method for each; they take the place of `seed`",
    "compare.learning_rates": "tried by every method with the first seed; by default `training.learning_rate` and no tuning",
    "compare.validation_share": "share of each client's training rows that judges a learning rate; test rows are never seen then",
    "compare.metric": "`rougeL` needs `evaluation.generate`, and is not measured after every round",
    "compare.tuning_rounds": "rounds of the runs that judge a learning rate; without it as many as of those that count",
    "compare.target": "perplexity whose rounds and megabytes are counted",
    "compare.reference": "label of the method that the others are tested against; by default the best mean",
    "compare.jobs": "runs at a time, each in a process of its own with one thread unless `threads` says another number",
    "compare.methods.name": "the method, as in `[method]`; keys that are not in this table are its arguments",
    "compare.methods.label": "what the table calls it; by default its name, of a package's method the factory's alone",
    "compare.methods.learning_rates": "a grid of its own",
    "compare.methods.rate_of": "label of the method whose tuned rate it takes instead of being tuned: for variants of one method",
    "compare.methods.changes": 'other keys of its runs, `set.ranks = { kind = "same", rank = 4 }` or '
    '`set = { "federation.rounds" = 5 }`; a section given with a `kind` replaces the whole section',
}


def main() -> None:
    """Print the page."""
    print(HEAD)
    for want, (names, example) in GROUPS.items():
        print(f"## {want}\n\n```toml\n{example}\n```\n")
        for name in names:
            print(section(name))
    print("## Arguments of the methods\n\n[Methods](methods.md) says what they mean.\n")
    for method, factory in sorted(METHODS.items()):
        print(f"**`{method}`**\n\n{arguments(factory)}")
    print(END)


def section(name: str) -> str:
    """Return the heading of a section with its keys."""
    if name == "top":
        return "### At the top of the file\n\n" + table(RunConfig, "")
    if name == "compare":
        text = "### `[compare]`\n\n`hetlora compare` reads it; other commands pass it over.\n\n" + table(
            CompareConfig, "compare."
        )
        return text + "\nKeys of each of `compare.methods`:\n\n" + table(MethodEntry, "compare.methods.")
    if name == "ranks":
        kinds = [
            f'**`kind = "{kind}"`**: {inspect.getdoc(model)}\n\n{ranks_table(kind, model)}'
            for kind, model in RANK_KINDS.items()
        ]
        return "\n".join(["### `[ranks]`\n\nOne of these kinds; ranks are whole numbers from 1.\n", *kinds])
    annotation = RunConfig.model_fields[name].annotation
    model = next((part for part in typing.get_args(annotation) if part is not type(None)), annotation)
    return f"### `[{name}]`\n\n{table(model, name + '.')}"


KINDS = {
    "model.target_modules": '`"all-linear"` or list of text',
    "model.layers": '`"last 10"`, `"first 4"` or list of integers',
}
"""Types that a validator makes wider than their annotation."""


def table(model: type[BaseModel], prefix: str) -> str:
    """Return the keys of a section that are values."""
    meanings = MEANINGS | COMPARE_MEANINGS
    rows = [
        f"| `{info.alias or name}` | {KINDS.get(prefix + name) or kind(info)} | {default(info)} | {meanings[prefix + name]} |"
        for name, info in model.model_fields.items()
        if prefix + name in meanings
    ]
    return "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows]) + "\n"


def ranks_table(kind: str, model: type[BaseModel]) -> str:
    """Return the keys of one kind of ranks."""
    names = [name for name in model.model_fields if name != "kind"]
    told = {name: f"`{name}` ({default(model.model_fields[name])})" for name in names}
    if kind in TIER_KINDS:
        told["tiers"] += f", each with {' and '.join(f'`{name}`' for name in TIER_KINDS[kind].model_fields)}"
    return f"Keys: {', '.join(told.values())}.\n"


def arguments(factory: typing.Callable[..., object]) -> str:
    """Return the arguments of a method."""
    hints = typing.get_type_hints(factory)
    rows = [
        f"| `{name}` | {spell(hints[name])} | `{parameter.default!r}` |"
        for name, parameter in inspect.signature(factory).parameters.items()
    ]
    return "\n".join(["| argument | type | default |", "| --- | --- | --- |", *rows]) + "\n" if rows else "None.\n"


def kind(info: FieldInfo) -> str:
    """Return a key's type and bounds."""
    bounds = [re.sub(r"^(\w+)\((\w+)=(.*)\)$", r"\2 \3", repr(bound)) for bound in info.metadata if "=" in repr(bound)]
    words = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
    told = [f"{words[part.split()[0]]} {part.split()[1]}" for part in bounds if part.split()[0] in words]
    return ", ".join([spell(info.annotation), *told])


def spell(annotation: object) -> str:
    """Return a type as TOML knows it."""
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Annotated:
        return spell(typing.get_args(annotation)[0])
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "nothing"}
    if annotation in names:
        return names[annotation]  # type: ignore[index]
    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    if typing.get_origin(annotation) is dict:
        return "keys and values"
    if typing.get_origin(annotation) is list:
        return f"list of {' or '.join(map(spell, parts))}"
    return " or ".join(dict.fromkeys(map(spell, parts)))


def default(info: FieldInfo) -> str:
    """Return a key's default, or that there is none."""
    if info.is_required():
        return "must be given"
    if isinstance(info.default, bool):
        return f"`{info.default}`".lower()  # as TOML writes it
    return "not set" if info.default is None or info.default_factory else f"`{info.default!r}`".replace("'", '"')


if __name__ == "__main__":
    main()
