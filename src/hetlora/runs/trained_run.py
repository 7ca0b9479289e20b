"""What a run has learned, complete or not, as its folder holds it; and the parts of it that can be taken away."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hetlora.config import RunConfig, load_run_config
from hetlora.config.build import assign_ranks, make_method
from hetlora.config.build_data import load_federation
from hetlora.core.adapter import Adapter, Rank, pad, trained, truncate
from hetlora.core.client_list import ClientList
from hetlora.core.types import Client, ServerState
from hetlora.errors import HetLoraError, ModelError
from hetlora.model.peft_files import read_adapter
from hetlora.runs.checkpoint import Checkpoint, newest
from hetlora.runs.fingerprints import FileFingerprints, downloaded
from hetlora.runs.folder import expand_path, read_summary

__all__ = ["AdapterSelection", "TrainedRun", "open_run"]


@dataclass(frozen=True)
class AdapterSelection:
    """Which part of what a run has learned is meant: one of these, or none of them for the whole global adapter.

    Attributes:
        rank: The first slots of the global adapter, so many.
        tier: The slots that every device of a tier affords, as many as there are, by the tier's name in the results.
        client: What this client would be served with; of a personal method its own adapter.

    Raises:
        HetLoraError: More than one is given.

    Example:
        >>> AdapterSelection(tier="6-10").name
        'tier-6-10'
    """

    rank: int | None = None
    tier: str | None = None
    client: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "tier", "client") if getattr(self, name) is not None]
        if len(given) > 1:
            raise HetLoraError(f"{' and '.join(given)} are given; one part is taken at a time, so give one of them")

    @property
    def name(self) -> str:
        """Return what a folder of this part is called; a client's name can be anything, so it names none."""
        if self.client is not None:
            return "client"
        if self.rank is not None:
            return f"rank-{self.rank}"
        return "adapter" if self.tier is None else f"tier-{self.tier}"


class TrainedRun:
    """A run that has learned something.

    Args:
        folder: Of the run.
        config: Its configuration.
        records: Its records, in order.
        checkpoint: The newest; None where there is none, and what the run has written at its end counts.

    Raises:
        HetLoraError: The run has learned nothing, or nothing of it is here.

    Attributes:
        method: What was run.
        round: The round after which it was so.
        source: Where it is read from, in words.
        written_model: The whole model that the run has written, where there is no checkpoint and nothing else; else None.
    """

    def __init__(
        self, folder: Path, config: RunConfig, records: list[Mapping[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        self.folder, self.config, self.records, self.checkpoint = folder, config, records, checkpoint
        self.method = make_method(config)
        if self.method.clients == "nobody":
            raise HetLoraError(
                f"{str(folder)!r}: method {config.method.name} trains nobody, so there is nothing to take away"
            )
        self.written_model: Path | None = None
        self._written: Adapter | None = None
        self._own: Mapping[str, Path] = {}
        self._state: ServerState | None = None if checkpoint is None else checkpoint.progress.state
        if self._state is not None:
            self.round = self._state.round
            self.source = f"the checkpoint of round {self.round}"
        else:
            self.round = max((record["round"] for record in self._all_rounds()), default=0)
            self.source = f"{self._find_written()}, as of round {self.round}"

    @property
    def personal(self) -> bool:
        """Whether each client is served by an adapter of its own."""
        return self.method.keep is not None

    @property
    def folded(self) -> Mapping[str, Any]:
        """What was folded into the base, by module; empty where nothing was."""
        return {} if self._state is None else self._state.folded.delta

    @property
    def in_weights(self) -> bool:
        """Whether what was learned is, in whole or in part, in the base's weights, where no adapter can hold it."""
        return self.method.trains == "weights" or bool(self.folded) or self.written_model is not None

    @property
    def largest(self) -> int:
        """The slots of the global adapter."""
        assert self._state is not None, "asked for after a check"
        return max(pair.A.shape[0] for pair in self._state.adapter.values())

    @property
    def tiers(self) -> Mapping[str, int]:
        """The tiers that the results list, in order, and the rank that every device of each affords."""
        names = {name for record in self._of("evaluation") for name in _mapping(record, "tiers")}
        ranks = {name: int(name.partition("-")[0]) for name in names if re.fullmatch(r"[1-9]\d{0,5}(-\d{1,6})?", name)}
        return dict(sorted(ranks.items(), key=lambda item: item[1]))

    def adapter(self, part: AdapterSelection) -> Adapter:
        """Return factors `A [r, in]`, `B [out, r]` of a part; modules may differ in rank.

        Raises:
            HetLoraError: There is no such part; says which there are.
        """
        if self._state is None and not self._own:
            raise HetLoraError(
                f"{str(self.folder)!r} holds {self.source}, and no adapter: only the whole model can be taken"
            )
        if part.client is not None:
            return self._of_client(part.client)
        if self.personal:
            raise HetLoraError(
                f"method {self.config.method.name} keeps an adapter on every client, and a global one serves nobody; name a "
                f"client, one of {_few(self.clients())}"
            )
        if part.rank is None and part.tier is None:
            return self._whole()
        if self.method.trains == "weights":
            raise HetLoraError(
                f"method {self.config.method.name} trains whole weights, which have no ranks; take the whole model"
            )
        assert self._state is not None
        return self._state.truncated(self._rank(part))

    def clients(self) -> Iterator[str]:
        """Yield the names of the clients that there are, as far as they are known here."""
        if self._own:
            yield from self._own
        elif self.method.clients == "pooled":
            yield "everyone"
        elif self.config.flower.clients == "nodes":
            yield from sorted({name for record in self._rounds() for name in _mapping(record, "ranks")})
        else:
            yield from self._members.ranks.names

    def sends(self) -> bool:
        """Return whether any client has sent what it trained to a server."""
        return any(record.get("bytes_up") for record in self._rounds())

    def start(self) -> Mapping[str, Any] | None:
        """Return the record of what the adapter that the run started from does; None where it started from none."""
        if self.config.model.adapter is None:
            return None
        found = [record for record in self._of("evaluation") if record.get("round") == 0]
        return found[1] if len(found) > 1 else None

    def evaluation(self, *, last: bool) -> Mapping[str, Any] | None:
        """Return the record of the first measurement, the base's, or of that after this round; None if there is none."""
        found = list(self._of("evaluation"))
        if not last:
            return found[0] if found else None
        return next((record for record in reversed(found) if record.get("round") == self.round), None)

    def perplexity(self) -> float | None:
        """Return the last held-out perplexity that was measured after a round up to this one."""
        measured = [record.get("perplexity") for record in self._rounds()]
        return next((value for value in reversed(measured) if isinstance(value, (int, float))), None)

    def run_record(self) -> Mapping[str, Any]:
        """Return the first record; empty where there is none."""
        return next(iter(self._of("run")), {})

    def check_unchanged(self, *keys: str) -> None:
        """Refuse local files that are no longer those that the run was trained with.

        Args:
            *keys: What is about to be read, by its key of the configuration.

        Raises:
            HetLoraError: One of them is another.
        """
        before = {} if self.checkpoint is None else self.checkpoint.digests
        if not any(key in before for key in keys):
            return
        now = FileFingerprints().digests(self.config) | downloaded(self.config)
        changed = [key for key in keys if key in before and before[key] != now.get(key)]
        if changed:
            config = self.config.model_dump()
            places = ", ".join(
                f"{key} = {config[section][name]!r}" for key in changed for section, name in [key.split(".")]
            )
            raise HetLoraError(
                f"{places} does not hold what it held when the run began; bring back what it was trained with"
            )

    # Where it lies ------------------------------------------------------------------------------------------------------

    def _find_written(self) -> Path:
        """Find what the run has written at its end; return where."""
        adapter, adapters, model = (self.folder / name for name in ("adapter", "adapters", "model"))
        if adapter.is_dir():
            self._written = read_adapter(adapter).adapter
            widest = max(pair.A.shape[0] for pair in self._written.values())
            self._state = ServerState(pad(self._written, widest), round=self.round, seed=self.config.seed)
            return adapter
        if adapters.is_dir():
            self._own = _index(adapters)
            return adapters
        if model.is_dir():
            self.written_model = model
            return model
        raise HetLoraError(
            f"{str(self.folder)!r} has learned nothing that is here: it has no checkpoint, and no adapter or model; hetlora "
            "resume goes on with it"
        )

    def _whole(self) -> Adapter:
        """Return the slots that some client still has: what the run measures and writes."""
        if self._written is not None:
            return self._written
        assert self._state is not None
        adapter = self._state.adapter
        if self.method.trains == "weights" or self.folded or self.method.clients == "pooled":
            return adapter
        if self.config.flower.clients == "nodes":
            return trained(adapter)
        summary = read_summary(self.folder)
        if summary is not None and summary.get("rounds") == self.round and (self.folder / "adapter").is_dir():
            # Which slots these are stands in what the run has written, so that its data need not be here any more.
            return truncate(adapter, self._widths(read_adapter(self.folder / "adapter").adapter))
        return self._state.owned_slots(self._members)

    def _widths(self, written: Adapter) -> dict[str, int]:
        assert self._state is not None
        if written.keys() != self._state.adapter.keys():
            raise HetLoraError(
                f"{str(self.folder / 'adapter')!r} is not of the run that the checkpoint beside it is of"
            )
        return {module: pair.A.shape[0] for module, pair in written.items()}

    # Which part ---------------------------------------------------------------------------------------------------------

    def _rank(self, part: AdapterSelection) -> int:
        rank = part.rank
        if part.tier is not None:
            if part.tier not in self.tiers:
                raise HetLoraError(
                    f"there is no tier {part.tier!r}; the results list {', '.join(self.tiers) or 'none'}"
                )
            return min(self.tiers[part.tier], self.largest)  # what was written has no slots that all have pruned away
        assert rank is not None
        if not 1 <= rank <= self.largest:
            raise HetLoraError(
                f"rank {rank} is not of this run: its global adapter has {self.largest} slots; give 1 … {self.largest}"
            )
        return rank

    def _of_client(self, name: str) -> Adapter:
        if self._own:
            if name not in self._own:
                raise self._unknown(name)
            return read_adapter(self._own[name]).adapter
        assert self._state is not None
        widest = {module: pair.A.shape[0] for module, pair in self._state.adapter.items()}
        rank = self._rank_of(name)
        if self._written is not None:  # the slots that all had pruned away are not there, and are nobody's
            rank = {
                module: min(most, rank if isinstance(rank, int) else rank[module]) for module, most in widest.items()
            }
        try:
            return self.method.distribute(self._state.serving_state, Client(name, rank, 0)).adapter
        except (KeyError, HetLoraError) as error:
            raise HetLoraError(f"the records give client {name!r} a rank that it cannot have: {error}") from error

    def _rank_of(self, name: str) -> Rank:
        """Return the rank of a client after the last round that it took part in, or its first one."""
        for record in reversed(list(self._rounds())):
            ranks = _mapping(record, "ranks")
            if name in ranks:
                return _as_rank(_mapping(record, "prunes").get(name, ranks[name]), name)
        if self.method.clients == "pooled" or self.config.flower.clients == "nodes" or name not in self._members.ranks:
            raise self._unknown(name)
        return 1 if self.method.trains == "weights" else self._members.named(name).rank

    def _unknown(self, name: str) -> HetLoraError:
        return HetLoraError(f"there is no client {name!r} in this run; there are {_few(self.clients())}")

    @cached_property
    def _members(self) -> ClientList:
        rows = load_federation(self.config).counts("train")
        return ClientList(assign_ranks(self.config, rows), rows)

    # Records ------------------------------------------------------------------------------------------------------------

    def _of(self, kind: str) -> Iterator[Mapping[str, Any]]:
        return (record for record in self.records if record.get("kind") == kind)

    def _rounds(self) -> Iterator[Mapping[str, Any]]:
        """Yield the records of rounds up to this one: a killed run may have begun another."""
        return (record for record in self._all_rounds() if record["round"] <= self.round)

    def _all_rounds(self) -> Iterator[Mapping[str, Any]]:
        return (record for record in self._of("round") if isinstance(record.get("round"), int))


def open_run(folder: os.PathLike[str] | str, say: Callable[[str], None] = lambda _: None) -> TrainedRun:
    """Read what a run has learned: its newest checkpoint, or, where it keeps none, what it has written at its end.

    Args:
        folder: Of the run.
        say: Is told of a checkpoint that cannot be used.

    Raises:
        HetLoraError: There is no run, or it has learned nothing, or its files are damaged.
    """
    folder = expand_path(folder)
    config = load_run_config(folder / "config.json")
    return TrainedRun(folder, config, _records(folder / "records.jsonl"), newest(folder, say))


def _records(path: Path) -> list[Mapping[str, Any]]:
    """Return the whole lines of the records; what a killed run has left of one is none."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
        found = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise HetLoraError(f"{str(path)!r} cannot be read: {error}") from error
    return [record for record in found if isinstance(record, dict)]


def _index(folder: Path) -> dict[str, Path]:
    """Return the folders of the clients' own adapters, by client."""
    try:
        index = json.loads((folder / "index.json").read_text("utf8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HetLoraError(f"{str(folder / 'index.json')!r} cannot be read: {error}") from error
    if not isinstance(index, dict) or not all(re.fullmatch(r"\d{5,}", str(place)) for place in index.values()):
        raise ModelError(f"{str(folder / 'index.json')!r} is no index of adapters")
    return {name: folder / place for name, place in index.items()}


def _mapping(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def _as_rank(value: object, name: str) -> Rank:
    ranks = list(value.values()) if isinstance(value, dict) else [value]
    if not ranks or not all(isinstance(rank, int) and rank >= 0 for rank in ranks):
        raise HetLoraError(f"the records give client {name!r} the rank {value!r}, which is none")
    return value  # type: ignore[return-value]


def _few(names: Iterable[str], most: int = 10) -> str:
    """List some names, and say how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more if names else "none"
