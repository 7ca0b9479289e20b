"""The sections of a run's file, as validated models."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from hetlora.config.trackers import TRACKERS

__all__ = [
    "RANK_KINDS",
    "RUN_NAME",
    "TIER_KINDS",
    "DataConfig",
    "MemoryRanks",
    "PartitionConfig",
    "RanksConfig",
    "RunConfig",
    "unknown_key",
]

RUN_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")

Share = Annotated[float, Field(gt=0.0, le=1e6)]
RankNumber = Annotated[int, Field(gt=0, le=16_384)]


def _no_address(place: str) -> str:
    if "://" in place:
        raise ValueError(
            f"{place!r} is an address; get its files, and give their folder, or a name on the Hugging Face hub"
        )
    return place


Place = Annotated[str, AfterValidator(_no_address)]
"""A file, a folder or a name. Addresses are refused: they may hold a password, which must not reach logs or records."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _all_linear(names: object) -> object:
    return [names] if names == "all-linear" else names


class ModelConfig(_Section):
    """`[model]`: the base and what is adapted in it."""

    base: Place = "nano"
    tokenizer: Place | None = None
    adapter: Place | None = Field(default=None, min_length=1)
    target_modules: Annotated[list[str], BeforeValidator(_all_linear)] | None = Field(default=None, min_length=1)
    layers: Annotated[str, Field(pattern=r"^(last|first) [1-9]\d{0,3}$")] | list[NonNegativeInt] | None = Field(
        default=None, min_length=1
    )
    scaling: PositiveFloat = 2.0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Literal["none", "bfloat16", "int8", "nf4"] = "none"
    device: str = "auto"


class DataConfig(_Section):
    """`[data]`: the rows, and how to make prompts and targets of them."""

    path: Place = "stdlib"
    subset: str | None = None
    revision: str | None = None
    client_field: str = "client"
    prompt: str = ""
    target: str = ""
    chat: bool = False
    system: str = ""
    fold_system: bool = False
    messages: str | None = Field(default=None, min_length=1)
    scored: Literal["all", "last"] = "all"
    chat_template: Place | None = Field(default=None, min_length=1)
    chat_template_kwargs: dict[str, Any] = {}
    begin: Literal["tokenizer", "always", "never"] = "tokenizer"
    end: bool = True
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
        """Return whether the text is made by the tokenizer's chat template."""
        return self.chat or self.messages is not None


class PartitionConfig(_Section):
    """`[partition]`: which client holds which row, where the data do not say; see `hetlora.data.partition.Partition`."""

    kind: Literal["natural", "iid", "dirichlet", "shards", "quantity", "sampled"] = "natural"
    clients: PositiveInt | None = Field(default=None, le=1_000_000)
    by: str | None = Field(default=None, min_length=1)
    bins: int = Field(default=5, ge=2)
    alpha: float = Field(default=0.5, ge=1e-3, le=1e6)
    shards_per_client: PositiveInt = 2
    min_rows: PositiveInt = 1
    rows_per_client: PositiveInt | None = None


PARTITION_KEYS: dict[str, tuple[str, ...]] = {
    "natural": ("by", "bins"),
    "iid": ("clients", "by", "bins", "min_rows"),
    "dirichlet": ("clients", "by", "bins", "alpha", "min_rows"),
    "shards": ("clients", "by", "bins", "shards_per_client", "min_rows"),
    "quantity": ("clients", "by", "bins", "alpha", "min_rows"),
    "sampled": ("clients", "rows_per_client"),
}
"""Keys that each kind of partition accepts. All but natural need `clients`; dirichlet and shards need `by`, sampled needs
`rows_per_client`."""


class SameRanks(_Section):
    """One rank for all clients."""

    kind: Literal["same"]
    rank: RankNumber

    @property
    def largest(self) -> int:
        """Return the rank of the global adapter."""
        return self.rank


class Tier(_Section):
    """A class of devices and its share of the clients."""

    rank: RankNumber
    share: Share


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
    """Ranks between the bounds, all equally likely."""

    kind: Literal["uniform"]


class PowerLawRanks(DrawnRanks):
    """Ranks of which small ones are common and large ones rare."""

    kind: Literal["power-law"]
    exponent: float = Field(default=0.1, ge=-10.0, le=10.0)


class NormalRanks(DrawnRanks):
    """Ranks around a mean, rounded; those outside the bounds are drawn again."""

    kind: Literal["normal"]
    mean: PositiveFloat
    std: PositiveFloat


class RanksByExamples(DrawnRanks):
    """Ranks by the quantile of a client's number of training rows, increasing or decreasing."""

    kind: Literal["by-examples"]
    order: Literal["increasing", "decreasing"] = "increasing"


class MemoryTier(_Section):
    """A class of devices: the memory per device for training, in 10⁶ bytes, and the share of the clients."""

    megabytes: float = Field(gt=0.0, le=1e9)
    share: Share


class MemoryRanks(_Section):
    """Classes of devices in given shares; each client has the largest rank up to `max` whose training fits its memory."""

    kind: Literal["memory"]
    tiers: list[MemoryTier] = Field(min_length=1)
    max: RankNumber

    @property
    def largest(self) -> int:
        """Return a bound of the rank of the global adapter; the actual ranks depend on the base."""
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


ONE_RANK = 'ranks={kind="same", rank=8}'
"""A change that gives all clients one rank, whatever kind of ranks stood there: as it is written after --set."""

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

    rounds: PositiveInt = 10
    clients_per_round: PositiveInt = 4
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="share of every cohort that fails")
    dropout_when: Literal["before", "after"] = "before"
    same_weights: bool = True


def _method_name(name: str, info: ValidationInfo) -> str:
    from hetlora.methods.lookup import find_method

    find_method(name, (info.context or {}).get("admit"))
    return name


class MethodConfig(BaseModel):
    """`[method]`: a name for `hetlora.methods.lookup.find_method`; every other key is an argument of the factory."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    name: Annotated[str, AfterValidator(_method_name)] = "hetlora"

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments for the method's factory."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _known(self) -> MethodConfig:
        from hetlora.core.method import Method
        from hetlora.methods.lookup import argument_types, find_method

        factory = find_method(self.name)
        accepted = argument_types(factory)
        found = {argument: _argument_problem(argument, value, accepted) for argument, value in self.arguments.items()}
        problems = [problem for problem in found.values() if problem]
        try:
            made = factory(**{argument: value for argument, value in self.arguments.items() if not found[argument]})
        except ValueError as error:  # a value is out of its range
            problems.append(str(error))
        except (Exception, SystemExit) as error:  # noqa: BLE001  a user's code may raise anything
            problems.append(f"its factory raises {type(error).__name__}: {error}; mend it")
        else:
            if not isinstance(made, Method):
                problems.append(f"its factory returns {type(made).__name__}; make it return a hetlora.Method")
        if problems:
            of_another = any("is not a key" in problem and "did you mean" not in problem for problem in problems)
            alone = f"; with no other keys: --set 'method={{name=\"{self.name}\"}}'" if of_another else ""
            raise ValueError("; ".join(problems) + f" (method {self.name}){alone}")
        return self


def _argument_problem(argument: str, value: object, accepted: Mapping[str, Any]) -> str | None:
    if argument not in accepted:
        return unknown_key(argument, accepted)
    try:
        TypeAdapter(accepted[argument], config=ConfigDict(allow_inf_nan=False)).validate_python(value, strict=True)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        return f"{argument} = {value!r}: {message[0].lower()}{message[1:]}"
    except PydanticUserError:
        return f"{argument}: no value of a configuration is a {accepted[argument]}; give the argument another type"
    return None


class ServerOptimizerConfig(_Section):
    """`[server_optimizer]`: FedAvgM, FedAdam or FedYogi around the method; see `hetlora.methods.fedopt`."""

    name: Literal["momentum", "adam", "yogi"]
    learning_rate: PositiveFloat
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.99, ge=0.0, lt=1.0)
    tau: PositiveFloat = 1e-3


class TrainingConfig(_Section):
    """`[training]`: local training; see `hetlora.training.local.LocalTraining`. Without steps and epochs it takes 4 steps."""

    learning_rate: PositiveFloat = 1e-3
    batch_size: PositiveInt = 8
    steps: PositiveInt | None = None
    epochs: PositiveInt | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = Field(default=0.0, ge=0.0)
    clip_norm: float = Field(default=1.0, ge=0.0, description="0 clips nothing")
    proximal: float = Field(default=0.0, ge=0.0, description="FedProx's μ; 0 adds nothing")
    recompute: bool = False

    @model_validator(mode="before")
    @classmethod
    def _some_steps(cls, values: Any) -> Any:
        neither = isinstance(values, Mapping) and values.get("steps") is None and values.get("epochs") is None
        return {**values, "steps": 4} if neither else values


class RobustnessConfig(_Section):
    """`[robustness]`: bounds on the influence of one client; see `hetlora.core.robust.Robustness`."""

    clip: float | None = Field(default=None, ge=1.0)
    weight_cap: float | None = Field(default=None, ge=1.0)
    largest_share: float | None = Field(default=None, gt=0.0, le=1.0)
    aggregation: Literal["mean", "median", "trimmed_mean", "krum", "multi_krum"] = "mean"
    byzantine: float = Field(default=0.2, ge=0.0, lt=0.5)


class EvaluationConfig(_Section):
    """`[evaluation]`: measurements on held-out rows."""

    every: int = Field(default=1, ge=0)
    adapter: Literal["global", "received"] = "global"
    clients: PositiveInt | None = None
    rows_per_client: PositiveInt | None = None
    generate: int = Field(default=0, ge=0)
    max_new_tokens: PositiveInt = 48


def _codec(name: str) -> str:
    from hetlora.core.codecs import CODECS  # imports torch, which most configurations do not need

    if name not in CODECS:
        raise ValueError(f"{name!r} is not a codec; use one of {', '.join(CODECS)}")
    return name


class FlowerConfig(_Section):
    """`[flower]`: settings of a run over Flower; an in-process run ignores them."""

    clients: Literal["config", "nodes"] = "config"
    precision: Annotated[str, AfterValidator(_codec)] = "float32"
    deadline: PositiveFloat = 3600.0
    answers: PositiveInt | None = None
    wait: PositiveFloat = 600.0
    min_clients: PositiveInt | None = None
    supernodes: PositiveInt | None = None


def _trackers(names: list[str]) -> list[str]:
    for name in names:
        if name not in TRACKERS:
            close = difflib.get_close_matches(name, TRACKERS, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"{name!r} is not a tracker; {hint}use some of {', '.join(TRACKERS)}")
    return list(dict.fromkeys(names))


class TrackingConfig(_Section):
    """`[tracking]`: trackers that log the figures besides the records; see `hetlora.runs.tracking`."""

    to: Annotated[list[str], AfterValidator(_trackers)] = []
    project: str = Field(default="hetlora", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")


def _usual_ranks() -> TieredRanks:
    shares = ((4, 0.5), (8, 0.3), (16, 0.2))
    return TieredRanks(kind="tiers", tiers=[Tier(rank=rank, share=share) for rank, share in shares])


class RunConfig(_Section):
    """A whole run. Paths are relative to the working directory."""

    name: str = Field(default="run", pattern=RUN_NAME.pattern)
    seed: int = Field(default=0, ge=0, lt=2**63)
    threads: PositiveInt | None = None
    memory_megabytes: PositiveFloat | None = None
    output: str = "runs"
    checkpoint_every: int = Field(default=1, ge=0)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig
    partition: PartitionConfig = Field(default_factory=PartitionConfig)
    federation: FederationConfig = Field(default_factory=FederationConfig)
    ranks: RanksConfig = Field(default_factory=_usual_ranks)
    method: MethodConfig = Field(default_factory=MethodConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    server_optimizer: ServerOptimizerConfig | None = None
    robustness: RobustnessConfig | None = None
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    flower: FlowerConfig = Field(default_factory=FlowerConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)


def keys_called(name: str) -> list[str]:
    """Return the keys of a run whose last part is `name`.

    Example:
        >>> keys_called("rounds"), keys_called("seed"), keys_called("nothing")
        (['federation.rounds'], [], [])
    """
    sections = {key: field.annotation for key, field in RunConfig.model_fields.items()}
    return [
        f"{key}.{name}"
        for key, section in sections.items()
        if isinstance(section, type) and issubclass(section, BaseModel) and name in section.model_fields
    ]


def unknown_key(key: str, accepted: Sequence[str] | Mapping[str, Any], last: str | None = None) -> str:
    """Return the message for an unknown key: the closest known key, or all accepted keys where none is close."""
    close = difflib.get_close_matches(last or key, list(accepted), n=1)
    if close:
        return f"{key} is not a key; did you mean {close[0]!r}?"
    known = f"accepted: {', '.join(accepted)}" if accepted else "none is accepted here"
    return f"{key} is not a key; {known}"
