"""Checks between the keys of a run, which no section can do alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from hetlora.config.sections import ONE_RANK, PARTITION_KEYS, RANK_KINDS, PartitionConfig, RanksConfig

if TYPE_CHECKING:
    from hetlora.core.method import Method

__all__ = ["cross_section_problems"]


def cross_section_problems(document: Mapping[str, Any]) -> list[str]:
    """Return the conflicts between keys. It reads plain data, so that an invalid key elsewhere does not hide a conflict."""
    method, ranks, data, training, evaluation = (
        section if isinstance(section := document.get(name), Mapping) else {}
        for name in ("method", "ranks", "data", "training", "evaluation")
    )
    problems = []
    made = _made(method)
    if "steps" in training and "epochs" in training:
        problems.append("training: give either steps or epochs, and not both")
    low, high, mean = (ranks.get(key) for key in ("min", "max", "mean"))
    kind = ranks.get("kind") if "ranks" in document else "tiers"
    if isinstance(low, int) and isinstance(high, int) and low > high:
        problems.append(f"ranks.min = {low} is larger than ranks.max = {high}; exchange them")
    elif all(isinstance(value, (int, float)) for value in (low, high, mean)) and not low <= mean <= high:  # type: ignore[operator]
        problems.append(f"ranks.mean = {mean} is not within ranks.min = {low} and ranks.max = {high}; move it there")
    if made and made.ranks == "equal" and isinstance(kind, str) and kind in RANK_KINDS and kind != "same":
        problems.append(
            f"method.name = {method['name']!r} needs one rank for all, but ranks.kind = {kind!r}; give it one, e.g. --set "
            f"'{ONE_RANK}' (in [compare]: set.{ONE_RANK} for this method), or take the method hetlora"
        )
    problems += _shares_of_tiers(ranks)
    problems += _useless_floor(method, ranks)
    problems += _coarse_weights(made, method, document.get("model", {}))
    problems += _stored_twice(document.get("model"))
    problems += _other_weights(document)
    robustness = document.get("robustness")
    model = document.get("model")
    wrappers = {
        "adapter": isinstance(model, Mapping) and model.get("adapter") is not None,
        "server_optimizer": "server_optimizer" in document,
        "proximal": bool(training.get("proximal")),
        "robustness": "robustness" in document,
        "over_slots": isinstance(robustness, Mapping) and robustness.get("aggregation") in ("median", "trimmed_mean"),
        "product": isinstance(robustness, Mapping) and robustness.get("aggregation") in ("krum", "multi_krum"),
    }
    problems += _refused_wrappers(made, method, [name for name, wanted in wrappers.items() if wanted])
    problems += _useless_bounds(robustness)
    problems += (
        [*_text_conflicts(data, document.get("flower")), *_partition_conflicts(document)] if "data" in document else []
    )
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


def _shares_of_tiers(ranks: Mapping[str, Any]) -> list[str]:
    """Return the problem of tiers that are not all clients, or more."""
    tiers = ranks.get("tiers")
    shares: list[Any] = (
        [tier.get("share") for tier in tiers if isinstance(tier, Mapping)] if isinstance(tiers, list) else []
    )
    if not shares or not all(isinstance(share, (int, float)) and 0 < share <= 1e6 for share in shares):
        return []  # a section says what is wrong with each
    whole = sum(shares)
    if abs(whole - 1) <= 1e-3 * max(2, len(shares)):  # thirds may be written as 0.333, sixths as 0.167
        return []
    return [f"ranks.tiers: the shares add up to {whole:.4g}; give each tier its share of the clients, 1 in all"]


def _useless_bounds(section: object) -> list[str]:
    """Return keys of `[robustness]` without effect, which would suggest a protection that is not there."""
    if not isinstance(section, Mapping):
        return []
    aggregation = section.get("aggregation", "mean")
    problems = []
    bounds = [key for key in ("clip", "weight_cap", "largest_share") if section.get(key) is not None]
    if aggregation == "mean" and not bounds:
        problems.append(
            "robustness bounds nothing; set clip, weight_cap, largest_share or aggregation, or take it away"
        )
    if aggregation in ("mean", "median") and section.get("byzantine", 0.2) != 0.2:
        problems.append(
            f"robustness.byzantine has no meaning with robustness.aggregation = {aggregation!r}; take it away"
        )
    if aggregation in ("median", "trimmed_mean", "krum"):
        problems += [
            f"robustness.{key} has no meaning with robustness.aggregation = {aggregation!r}, where weights are alike; drop it"
            for key in bounds
            if key != "clip"
        ]
    return problems


def _refused_wrappers(made: Method[Any] | None, method: Mapping[str, Any], wanted: Sequence[str]) -> list[str]:
    """Return wrappers, or an adapter to start from, that the method refuses."""
    name, refuses = method.get("name", "hetlora"), made.refuses if made else {}
    keys = {
        "adapter": "model.adapter",
        "server_optimizer": "[server_optimizer]",
        "proximal": "training.proximal",
        "robustness": "[robustness]",
        "over_slots": "robustness.aggregation = 'median' or 'trimmed_mean'",
        "product": "robustness.aggregation = 'krum' or 'multi_krum'",
    }
    return [f"{keys[w]} with method.name = {name!r}: {refuses[w]}; take it away" for w in wanted if w in refuses]


def _made(method: Mapping[str, Any]) -> Method[Any] | None:
    """Return the method of a configuration; None if it is unknown."""
    from hetlora.methods.lookup import made_of

    arguments = {key: value for key, value in method.items() if key != "name"}
    return made_of(method.get("name", "hetlora"), arguments)


def _coarse_weights(made: Method[Any] | None, method: Mapping[str, Any], model: object) -> list[str]:
    """Return settings that round trained weights so coarsely that small changes vanish."""
    if made is None or made.trains != "weights" or not isinstance(model, Mapping):
        return []
    return [
        f"model.{key} = {model[key]!r} with method.name = {method['name']!r}: small changes of such weights vanish; "
        f"use {fine!r}"
        for key, fine in (("dtype", "float32"), ("quantize", "none"))
        if model.get(key, fine) != fine
    ]


def _other_weights(document: Mapping[str, Any]) -> list[str]:
    """Return the problem of bases that may differ where there is one base only."""
    federation, flower = document.get("federation"), document.get("flower")
    if not isinstance(federation, Mapping) or federation.get("same_weights", True):
        return []
    if isinstance(flower, Mapping) and flower.get("clients") == "nodes":
        return []
    return [
        "federation.same_weights = false is for nodes with data of their own; set flower.clients = 'nodes', or drop it"
    ]


def _stored_twice(model: object) -> list[str]:
    """Return the problem of weights that are stored in 16 bits to be computed with in 16 bits."""
    if (
        not isinstance(model, Mapping)
        or model.get("quantize") != "bfloat16"
        or model.get("dtype", "float32") == "float32"
    ):
        return []
    dtype = model["dtype"]
    problem = (
        f"model.quantize = 'bfloat16' is for a base that computes in float32, and model.dtype = {dtype!r} has 16 bits "
        "already; take one of them away"
    )
    return [problem]


def _useless_floor(method: Mapping[str, Any], ranks: Mapping[str, Any]) -> list[str]:
    """Return the problem of a `min_rank` above every rank, with which self-pruning can never happen."""
    try:
        largest = TypeAdapter(RanksConfig).validate_python(ranks).largest
    except ValidationError:
        return []
    floor = method.get("min_rank")
    if not isinstance(floor, int) or floor <= largest or method.get("gamma") == 1:
        return []
    return [f"method.min_rank = {floor} is larger than the largest rank, {largest}; lower it, or set gamma = 1"]


def _text_conflicts(data: Mapping[str, Any], flower: object) -> list[str]:
    """Return the conflicts between the keys that make a row's text."""
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
    is_chat = messages is not None or chat is True
    chats = {"fold_system": False, "scored": "all", "chat_template": None, "chat_template_kwargs": {}}
    for key, default in ({"begin": "tokenizer", "end": True} if is_chat else chats).items():
        if data.get(key, default) != default:
            reason = "the chat template sets its own" if is_chat else "only chats have templates and turns"
            problems.append(f"data.{key} = {data[key]!r}: {reason}; take the key away")
    if data.get("scored", "all") != "all" and messages is None and is_chat:
        problems.append("data.scored chooses among the answers of data.messages; take the key away")
    if data.get("chat_template") is not None and isinstance(flower, Mapping) and flower.get("clients") == "nodes":
        problems.append(
            "data.chat_template is a file of this machine, which no client of flower.clients = 'nodes' can read; put the "
            "template into the base's folder, as chat_template.jinja"
        )
    reserved = {
        "messages", "conversation", "documents", "tools", "tokenize", "add_generation_prompt", "chat_template", "return_dict",
        "continue_final_message", "padding", "truncation", "max_length", "tokenizer_kwargs", "return_tensors",
    }  # fmt: skip
    arguments = data.get("chat_template_kwargs")
    for key in sorted(reserved & set(arguments)) if isinstance(arguments, Mapping) else ():
        problems.append(f"data.chat_template_kwargs.{key} is set by hetlora; take it away")
    return problems


def _partition_conflicts(document: Mapping[str, Any]) -> list[str]:
    """Return the conflicts between the keys of `[partition]`, and with those of `[data]`."""
    partition, data = (
        section if isinstance(section := document.get(name), Mapping) else {} for name in ("partition", "data")
    )
    kind = partition.get("kind", "natural")
    if not isinstance(kind, str) or kind not in PARTITION_KEYS:
        return []
    # A key at its default is not a conflict: the configuration that a run writes holds every key.
    fields = PartitionConfig.model_fields
    given = {key for key in set(partition) & set(fields) - {"kind"} if partition[key] != fields[key].default}
    problems = [
        f"partition.{key} has no meaning with partition.kind = {kind!r}, which takes {', '.join(PARTITION_KEYS[kind])}; "
        "take it away, or choose another kind"
        for key in sorted(given - set(PARTITION_KEYS[kind]))
    ]
    needed = [] if kind == "natural" else ["clients"]
    needed += ["by"] if kind in ("dirichlet", "shards") else ["rows_per_client"] if kind == "sampled" else []
    problems += [
        f"partition.kind = {kind!r} needs partition.{key}; add it" for key in needed if partition.get(key) is None
    ]
    if "bins" in given and partition.get("by") != "length":
        problems.append("partition.bins is of partition.by = 'length'; take it away, or set partition.by")
    problems += [
        f"data.{key} has no meaning with partition.kind = 'sampled', whose clients all have as many rows; take it away, or set "
        f"partition.{instead}"
        for key, default, instead in (("clients", None, "clients"), ("min_rows", 1, "rows_per_client"))
        if kind == "sampled" and data.get(key, default) != default
    ]
    made, drawn = partition.get("clients"), data.get("clients")
    if kind not in ("natural", "sampled") and isinstance(made, int) and isinstance(drawn, int) and drawn > made:
        problems.append(f"data.clients = {drawn} is more than partition.clients = {made}; lower it, or take it away")
    return problems
