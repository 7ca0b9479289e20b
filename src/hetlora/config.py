"""One validated model of a run, read from TOML; every problem is reported at once, each naming its key."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from hetlora.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "DataConfig",
    "PartitionConfig",
    "RunConfig",
    "key_path",
    "load_config",
    "parse_config",
    "problems_in",
    "read_document",
]

RankNumber = Annotated[int, Field(gt=0, le=16_384)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """`[model]`: the base and what is adapted in it."""

    base: str = "nano"
    tokenizer: str | None = None
    target_modules: list[str] | None = Field(default=None, min_length=1)
    scaling: PositiveFloat = 2.0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"


class DataConfig(_Section):
    """`[data]`: the rows, and how they become prompts and targets."""

    path: str = "stdlib"
    subset: str | None = None
    revision: str | None = None
    client_field: str = "client"
    prompt: str = ""
    target: str = ""
    chat: bool = False
    system: str = ""
    messages: str | None = Field(default=None, min_length=1)
    split_field: str = Field(default="split", description="empty holds rows out by a hash of their text")
    train: list[str | int] = ["train"]
    test: list[str | int] = ["test"]
    test_share: float = Field(default=0.1, gt=0.0, lt=1.0)
    validation_share: float = Field(default=0.0, ge=0.0, lt=1.0)
    max_length: int = Field(default=256, ge=8)
    long_rows: Literal["truncate", "split"] = "truncate"
    clients: PositiveInt | None = None
    min_rows: PositiveInt = 1

    @property
    def is_chat(self) -> bool:
        """Return whether the tokenizer's chat template makes the text."""
        return self.chat or self.messages is not None


class PartitionConfig(_Section):
    """`[partition]`: which client holds which row, where the data do not say; see `hetlora.data.partition.Partition`."""

    kind: Literal["natural", "iid", "dirichlet", "shards", "quantity"] = "natural"
    clients: PositiveInt | None = Field(default=None, le=1_000_000)
    by: str | None = Field(default=None, min_length=1)
    bins: int = Field(default=5, ge=2)
    alpha: float = Field(default=0.5, ge=1e-3)
    shards_per_client: PositiveInt = 2
    min_rows: PositiveInt = 1


PARTITION_KEYS: dict[str, tuple[str, ...]] = {
    "natural": ("by", "bins"),
    "iid": ("clients", "by", "bins", "min_rows"),
    "dirichlet": ("clients", "by", "bins", "alpha", "min_rows"),
    "shards": ("clients", "by", "bins", "shards_per_client", "min_rows"),
    "quantity": ("clients", "by", "bins", "alpha", "min_rows"),
}
"""What each kind of partition takes; all need `clients` but the natural one, and dirichlet and shards need `by`."""


class SameRanks(_Section):
    """One rank for all."""

    kind: Literal["same"]
    rank: RankNumber

    @property
    def largest(self) -> int:
        """Return the rank of the global adapter."""
        return self.rank


class Tier(_Section):
    """A class of devices and its share of the clients."""

    rank: RankNumber
    share: PositiveFloat


class TieredRanks(_Section):
    """Classes of devices in given shares."""

    kind: Literal["tiers"]
    tiers: list[Tier] = Field(min_length=1)

    @property
    def largest(self) -> int:
        """Return the rank of the global adapter."""
        return max(tier.rank for tier in self.tiers)


class DrawnRanks(_Section):
    """Ranks drawn between two bounds."""

    min: RankNumber
    max: RankNumber

    @property
    def largest(self) -> int:
        """Return the rank of the global adapter."""
        return self.max


class UniformRanks(DrawnRanks):
    """Every rank between the bounds with equal probability."""

    kind: Literal["uniform"]


class PowerLawRanks(DrawnRanks):
    """Small ranks are common, large ones rare."""

    kind: Literal["power-law"]
    exponent: float = Field(default=0.1, ge=-10.0, le=10.0)


class NormalRanks(DrawnRanks):
    """Ranks around a mean, rounded; drawn again where outside the bounds."""

    kind: Literal["normal"]
    mean: PositiveFloat
    std: PositiveFloat


class RanksByExamples(DrawnRanks):
    """By the quantile of a client's number of training rows: more rows, a larger rank, or the other way round."""

    kind: Literal["by-examples"]
    order: Literal["increasing", "decreasing"] = "increasing"


class MemoryTier(_Section):
    """A class of devices: the memory each has for training, in 10⁶ bytes, and its share of the clients."""

    megabytes: PositiveFloat
    share: PositiveFloat


class MemoryRanks(_Section):
    """Classes of devices in given shares; each client has the largest rank up to `max` whose training fits its memory."""

    kind: Literal["memory"]
    tiers: list[MemoryTier] = Field(min_length=1)
    max: RankNumber

    @property
    def largest(self) -> int:
        """Return a bound of the rank of the global adapter; what fits is known once the base is."""
        return self.max


class ExplicitRanks(_Section):
    """Ranks by client name."""

    kind: Literal["explicit"]
    of: dict[str, RankNumber]
    default: RankNumber | None = None

    @model_validator(mode="after")
    def _some(self) -> ExplicitRanks:
        if not self.of and self.default is None:
            raise ValueError("names no client; give ranks by name in 'of', or a 'default'")
        return self

    @property
    def largest(self) -> int:
        """Return the rank of the global adapter."""
        return max([*self.of.values(), *([self.default] if self.default else [])])


RANK_KINDS: dict[str, type[BaseModel]] = {
    "same": SameRanks,
    "tiers": TieredRanks,
    "uniform": UniformRanks,
    "power-law": PowerLawRanks,
    "normal": NormalRanks,
    "by-examples": RanksByExamples,
    "memory": MemoryRanks,
    "explicit": ExplicitRanks,
}
RanksConfig = Annotated[
    SameRanks
    | TieredRanks
    | UniformRanks
    | PowerLawRanks
    | NormalRanks
    | RanksByExamples
    | MemoryRanks
    | ExplicitRanks,
    Field(discriminator="kind"),
]
TIER_KINDS: dict[str, type[BaseModel]] = {"tiers": Tier, "memory": MemoryTier}


class FederationConfig(_Section):
    """`[federation]`: rounds and cohorts."""

    rounds: PositiveInt
    clients_per_round: PositiveInt
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="share of every cohort that fails")
    dropout_when: Literal["before", "after"] = "before"


class MethodConfig(BaseModel):
    """`[method]`: a name of `hetlora.methods.METHODS`; every other key is an argument of its factory."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    name: str = "hetlora"

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments for the method's factory."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _known(self) -> MethodConfig:
        from hetlora.methods import METHODS

        if self.name not in METHODS:
            raise ValueError(f"name = {self.name!r} is not a method; use one of {', '.join(sorted(METHODS))}")
        types = get_type_hints(METHODS[self.name])
        accepted = {argument: types[argument] for argument in inspect.signature(METHODS[self.name]).parameters}
        found = {argument: _argument_problem(argument, value, accepted) for argument, value in self.arguments.items()}
        problems = [problem for problem in found.values() if problem]
        try:
            METHODS[self.name](**{argument: value for argument, value in self.arguments.items() if not found[argument]})
        except ValueError as error:  # where a value is out of its range
            problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems) + f" (method {self.name})")
        return self


def _argument_problem(argument: str, value: object, accepted: Mapping[str, Any]) -> str | None:
    if argument not in accepted:
        return _unknown(argument, accepted)
    try:
        TypeAdapter(accepted[argument], config=ConfigDict(allow_inf_nan=False)).validate_python(value, strict=True)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        return f"{argument} = {value!r}: {message[0].lower()}{message[1:]}"
    return None


class ServerOptimizerConfig(_Section):
    """`[server_optimizer]`: FedAvgM, FedAdam or FedYogi around the method; see `hetlora.methods.fedopt`."""

    name: Literal["momentum", "adam", "yogi"]
    learning_rate: PositiveFloat
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.99, ge=0.0, lt=1.0)
    tau: PositiveFloat = 1e-3


class TrainingConfig(_Section):
    """`[training]`: what a client does in a round; see `hetlora.training.LocalTraining`."""

    learning_rate: PositiveFloat = 1e-3
    batch_size: PositiveInt = 8
    steps: PositiveInt | None = None
    epochs: PositiveInt | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = Field(default=0.0, ge=0.0)
    clip_norm: float = Field(default=1.0, ge=0.0, description="0 clips nothing")
    proximal: float = Field(default=0.0, ge=0.0, description="FedProx's μ; 0 adds nothing")


class EvaluationConfig(_Section):
    """`[evaluation]`: what is measured on held-out rows, and how often."""

    every: int = Field(default=1, ge=0)
    adapter: Literal["global", "received"] = "global"
    rows_per_client: PositiveInt | None = None
    generate: int = Field(default=0, ge=0)
    max_new_tokens: PositiveInt = 48


class RunConfig(_Section):
    """A whole run. Paths are relative to the working directory, like any path on the command line."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    threads: PositiveInt | None = None
    output: str = "runs"
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig
    partition: PartitionConfig = Field(default_factory=PartitionConfig)
    federation: FederationConfig
    ranks: RanksConfig
    method: MethodConfig = Field(default_factory=MethodConfig)
    training: TrainingConfig
    server_optimizer: ServerOptimizerConfig | None = None
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)


def load_config(path: Path, changes: Sequence[str] = ()) -> RunConfig:
    """Read a run from a TOML file, with changes as `read_document` takes them; its `[compare]` is for others.

    Raises:
        ConfigError: With every problem found.
    """
    document = read_document(path, changes)
    document.pop("compare", None)  # hetlora.compare_plan reads it; one file serves a run and its comparison
    return parse_config(document, str(path))


def read_document(path: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Read a TOML file, with changes in the form ``key.key=value`` on top; ``key.key=`` takes a key away.

    Raises:
        ConfigError: The file cannot be read, or a change has another form.
    """
    if not path.is_file():
        raise ConfigError(str(path), ["there is no such file; examples/demo.toml shows a whole run"])
    try:
        document: dict[str, Any] = tomllib.loads(path.read_text("utf8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(str(path), [f"not TOML: {error}"]) from error
    problems = [problem for change in changes if (problem := _apply(document, change)) is not None]
    if problems:
        raise ConfigError("--set", problems)
    return document


def parse_config(document: Mapping[str, Any], source: str = "the configuration") -> RunConfig:
    """Validate a run given as plain data.

    Raises:
        ConfigError: With every problem found, each naming its key and what is accepted.

    Example:
        >>> parse_config({"federation": {"rounds": 1, "clients_per_round": 2}, "data": {"target": "{target}"},
        ...               "ranks": {"kind": "same", "rank": 0}, "training": {"steps": 1}})
        Traceback (most recent call last):
        hetlora.errors.ConfigError: the configuration has 1 problem:
          ranks.rank = 0: input should be greater than 0
    """
    conflicts = _conflicts(document)
    try:
        config = RunConfig.model_validate(document)
    except ValidationError as error:
        raise ConfigError(source, [*problems_in(error), *conflicts]) from error
    if conflicts:
        raise ConfigError(source, conflicts)
    return config


def _conflicts(document: Mapping[str, Any]) -> list[str]:
    """Return what is wrong between keys. Works on the plain data, so that a wrong key elsewhere does not hide it."""
    method, ranks, data, training, evaluation = (
        section if isinstance(section := document.get(name), Mapping) else {}
        for name in ("method", "ranks", "data", "training", "evaluation")
    )
    problems = []
    if "training" in document and ("steps" in training) == ("epochs" in training):
        problems.append("training: give either steps or epochs, and not both")
    low, high, mean, kind = (ranks.get(key) for key in ("min", "max", "mean", "kind"))
    if isinstance(low, int) and isinstance(high, int) and low > high:
        problems.append(f"ranks.min = {low} is larger than ranks.max = {high}; exchange them")
    elif all(isinstance(value, (int, float)) for value in (low, high, mean)) and not low <= mean <= high:  # type: ignore[operator]
        problems.append(f"ranks.mean = {mean} is not within ranks.min = {low} and ranks.max = {high}; move it there")
    if method.get("name") in ("fedavg", "fedit") and kind in RANK_KINDS and kind != "same":
        problems.append(
            f"method.name = {method['name']!r} needs one rank for all, but ranks.kind = {kind!r}; use ranks.kind = 'same', "
            "or the method hetlora"
        )
    problems += _useless_floor(method, ranks)
    wrappers = {"server_optimizer": "server_optimizer" in document, "proximal": bool(training.get("proximal"))}
    problems += _refused_wrappers(method, [name for name, wanted in wrappers.items() if wanted])
    problems += [*_text_conflicts(data), *_partition_conflicts(document)] if "data" in document else []
    sides = [data.get("train", ["train"]), data.get("test", ["test"])]
    if all(isinstance(side, list) for side in sides) and data.get("split_field", "split") != "":
        both = sorted(set(map(str, sides[0])) & set(map(str, sides[1])))
        if both:
            problems.append(f"data.train and data.test both name {', '.join(both)}; a row is on one side of the split")
    longest, answer = data.get("max_length", 256), evaluation.get("max_new_tokens", 48)
    if evaluation.get("generate") and isinstance(longest, int) and isinstance(answer, int) and answer >= longest:
        problems.append(
            f"evaluation.max_new_tokens = {answer} leaves no room for a prompt within data.max_length = {longest}; lower it"
        )
    return problems


def _refused_wrappers(method: Mapping[str, Any], wanted: Sequence[str]) -> list[str]:
    """Wrappers that make no sense around the method."""
    from hetlora.methods import METHODS

    name = method.get("name", "hetlora")
    refuses = METHODS[name]().refuses if isinstance(name, str) and name in METHODS else {}
    keys = {"server_optimizer": "[server_optimizer]", "proximal": "training.proximal"}
    return [f"{keys[w]} with method.name = {name!r}: {refuses[w]}; take it away" for w in wanted if w in refuses]


def _useless_floor(method: Mapping[str, Any], ranks: Mapping[str, Any]) -> list[str]:
    """A floor above every rank: self-pruning is asked for and could never happen, which nobody means."""
    try:
        largest = TypeAdapter(RanksConfig).validate_python(ranks).largest
    except ValidationError:
        return []
    floor = method.get("min_rank")
    if not isinstance(floor, int) or floor <= largest or method.get("gamma") == 1:
        return []
    return [f"method.min_rank = {floor} is larger than the largest rank, {largest}; lower it, or set gamma = 1"]


def _text_conflicts(data: Mapping[str, Any]) -> list[str]:
    """Return what is wrong between the keys that make a row's text."""
    messages, chat = data.get("messages"), data.get("chat")
    problems = []
    if messages is None:
        if not data.get("target"):
            problems.append("data.target is missing; add it")
        if chat is True and not data.get("prompt"):
            problems.append(
                "data.chat = true needs the user's turn; set data.prompt, or data.messages for whole conversations"
            )
    else:
        problems += [
            f"data.messages = {messages!r} takes whole conversations, so data.{key} has no place; take one of them away"
            for key in ("prompt", "target")
            if data.get(key)
        ]
    if data.get("system") and messages is None and chat is not True:
        problems.append("data.system is a turn of a chat; set data.chat = true, or write it into data.prompt")
    return problems


def _partition_conflicts(document: Mapping[str, Any]) -> list[str]:
    """Return what is wrong between the keys of `[partition]`, and with those of `[data]`."""
    partition, data = (
        section if isinstance(section := document.get(name), Mapping) else {} for name in ("partition", "data")
    )
    kind = partition.get("kind", "natural")
    if not isinstance(kind, str) or kind not in PARTITION_KEYS:
        return []
    # At its default a key changes nothing: the record of a run, which holds every key, is a configuration, too.
    fields = PartitionConfig.model_fields
    given = {key for key in set(partition) & set(fields) - {"kind"} if partition[key] != fields[key].default}
    problems = [
        f"partition.{key} has no meaning with partition.kind = {kind!r}, which takes {', '.join(PARTITION_KEYS[kind])}; "
        "take it away, or choose another kind"
        for key in sorted(given - set(PARTITION_KEYS[kind]))
    ]
    needed = [] if kind == "natural" else ["clients"]
    needed += ["by"] if kind in ("dirichlet", "shards") else []
    problems += [
        f"partition.kind = {kind!r} needs partition.{key}; add it" for key in needed if partition.get(key) is None
    ]
    if "bins" in given and partition.get("by") != "length":
        problems.append("partition.bins is of partition.by = 'length'; take it away, or set partition.by")
    made, drawn = partition.get("clients"), data.get("clients")
    if kind != "natural" and isinstance(made, int) and isinstance(drawn, int) and drawn > made:
        problems.append(f"data.clients = {drawn} is more than partition.clients = {made}; lower it, or take it away")
    return problems


def problems_in(error: ValidationError, model: type[BaseModel] = RunConfig) -> list[str]:
    """Say what is wrong with data that `model` refused, one line a problem."""
    return [_problem(details, model) for details in error.errors()]


def _problem(details: ErrorDetails, model: type[BaseModel]) -> str:
    """Say one problem as ``key = value: what is wrong, and what is accepted``."""
    # The tag of a chosen kind of ranks stands in the path too, and is no key of the file.
    path = [str(part) for index, part in enumerate(details["loc"]) if not (index == 1 and part in RANK_KINDS)]
    key, value = ".".join(path), details["input"]
    if details["type"] == "extra_forbidden":
        return _unknown(key, _accepted(details["loc"], model), last=path[-1])
    if details["type"] == "missing":
        return f"{key} is missing; add it"
    if details["type"] == "value_error":
        message = details["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    message = details["msg"][0].lower() + details["msg"][1:]
    if details["type"].startswith("union_tag"):
        given = value.get("kind") if isinstance(value, Mapping) else None
        state = "is missing" if given is None else f"= {given!r} is not a kind of ranks"
        return f"{key}.kind {state}; use one of {', '.join(RANK_KINDS)}"
    if details["type"] in ("model_type", "model_attributes_type"):
        return f"{key} = {value!r} is a value; make it a section, [{key}]"
    shown = f" = {value!r}" if not isinstance(value, (Mapping, list)) else ""
    return f"{key}{shown}: {message}"


def _accepted(location: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    """Return the keys of the section that an unknown key was found in."""
    if location[0] == "ranks":
        kind = str(location[1])
        is_tier = kind in TIER_KINDS and location[2] == "tiers" and len(location) > 3
        return list((TIER_KINDS if is_tier else RANK_KINDS)[kind].model_fields)
    section = model
    for part in location[:-1]:
        annotation = section.model_fields[str(part)].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)  # noqa: PT018
        section = annotation
    return list(section.model_fields)


def _unknown(key: str, accepted: Sequence[str] | Mapping[str, Any], last: str | None = None) -> str:
    close = difflib.get_close_matches(last or key, list(accepted), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{key} is not a key; {hint}accepted: {', '.join(accepted)}"


def _apply(document: dict[str, Any], change: str) -> str | None:
    """Apply one ``key.key=value`` to the document, or take ``key.key=`` away; return what is wrong with it, if anything."""
    key, equals, text = change.partition("=")
    path = key_path(key)
    if not equals or path is None:
        return f"{change!r} is not of the form key.key=value"
    value: Any = text  # a bare word is a string: --set model.base=nano
    with contextlib.suppress(tomllib.TOMLDecodeError):
        parsed = tomllib.loads(f"value = {text}")
        if parsed.keys() != {"value"}:
            return f"{change!r} holds more than one value; give each key a --set of its own"
        value = parsed["value"]
    *sections, last = path
    table = document
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            return f"{change!r}: {section} is a value, not a section"
    if text.strip():
        table[last] = value
    else:
        table.pop(last, None)
    return None


def key_path(key: str) -> list[str] | None:
    """Return the parts of a dotted TOML key (``ranks.of."a.b"`` has three), or None where it is none."""
    try:
        node: Any = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        return None
    path: list[str] = []
    while isinstance(node, dict):
        if len(node) != 1:
            return None
        [(name, node)] = node.items()
        path.append(name)
    return path
