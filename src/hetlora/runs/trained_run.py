"""Opens what a run has learned, complete or not, from its folder, and selects the part to export or use."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hetlora.config import RunConfig
from hetlora.config.build import assign_ranks, make_method
from hetlora.config.build_data import load_federation
from hetlora.core.adapter import Adapter, Rank, pad, trained, truncate
from hetlora.core.client_list import ClientList
from hetlora.core.types import Client, ServerState
from hetlora.errors import HetLoraError, ModelError, expand_path
from hetlora.model.peft_files import read_adapter
from hetlora.runs.checkpoint import Checkpoint, newest
from hetlora.runs.fingerprints import FileFingerprints, downloaded
from hetlora.runs.folder import read_summary
from hetlora.runs.reader import read_config
from hetlora.runs.text import several

__all__ = ["AdapterSelection", "TrainedRun", "open_run"]


@dataclass(frozen=True)
class AdapterSelection:
    """A part of what a run has learned: at most one of the attributes, none for the whole global adapter.

    Attributes:
        rank: The first `rank` slots of the global adapter.
        tier: The slots that every device of a tier affords, by the tier's name in the results.
        client: The adapter that this client would receive; with a personal method its own.

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
        """Return the name for a folder of this part, without the client's name, which can be anything."""
        if self.client is not None:
            return "client"
        if self.rank is not None:
            return f"rank-{self.rank}"
        return "adapter" if self.tier is None else f"tier-{self.tier}"


class TrainedRun:
    """A run that has learned something.

    Args:
        folder: The run's folder.
        config: Its configuration.
        records: Its records, in order.
        checkpoint: The newest checkpoint; None to use the run's results instead.

    Raises:
        HetLoraError: The run has learned nothing, or nothing of it is here.

    Attributes:
        config: The configuration, with its local files where they are.
        named: The configuration as it was given, with the names that others may read.
        method: The method of the run.
        round: The round of the checkpoint or the result.
        source: The place of what was learned, as text.
        written_model: The whole model that the run has written; None if there is a checkpoint or an adapter.
    """

    def __init__(
        self, folder: Path, config: RunConfig, records: list[Mapping[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        self.folder, self.records, self.checkpoint = folder, records, checkpoint
        self.config, self.named = _located(config, folder), config
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
        """Whether each client has its own adapter."""
        return self.method.keep is not None

    @property
    def folded(self) -> Mapping[str, Any]:
        """The change folded into the base, by module; may be empty."""
        return {} if self._state is None else self._state.folded.delta

    @property
    def in_weights(self) -> bool:
        """Whether the base's weights hold some of what was learned, so that no adapter holds all of it."""
        return self.method.trains == "weights" or bool(self.folded) or self.written_model is not None

    @property
    def largest(self) -> int:
        """The number of slots of the global adapter."""
        assert self._state is not None, "asked for after a check"
        return max(pair.A.shape[0] for pair in self._state.adapter.values())

    @property
    def tiers(self) -> Mapping[str, int]:
        """The tiers of the results, ascending, with the rank that every device of the tier affords."""
        names = {name for record in self._of("evaluation") for name in _mapping(record, "tiers")}
        ranks = {name: int(name.partition("-")[0]) for name in names if re.fullmatch(r"[1-9]\d{0,5}(-\d{1,6})?", name)}
        return dict(sorted(ranks.items(), key=lambda item: item[1]))

    def adapter(self, part: AdapterSelection) -> Adapter:
        """Return factors `A [r, in]`, `B [out, r]` of a part; modules may differ in rank.

        Raises:
            HetLoraError: There is no such part; lists the existing ones.
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
        """Yield the names of the known clients."""
        if self._own:
            yield from self._own
        elif self.method.clients == "pooled":
            yield "everyone"
        elif self.config.flower.clients == "nodes":
            yield from sorted({name for record in self._rounds() for name in _mapping(record, "ranks")})
        else:
            yield from self._members.ranks.names

    def sends(self) -> bool:
        """Return whether any client has sent an update."""
        return any(record.get("bytes_up") for record in self._rounds())

    def start(self) -> Mapping[str, Any] | None:
        """Return the record of the measurement of the adapter that the run started from; None without one."""
        if self.config.model.adapter is None:
            return None
        found = [record for record in self._of("evaluation") if record.get("round") == 0]
        return found[1] if len(found) > 1 else None

    def evaluation(self, *, last: bool) -> Mapping[str, Any] | None:
        """Return the record of the base's measurement, or of the `last` one, after this round; None if there is none."""
        found = list(self._of("evaluation"))
        if not last:
            return found[0] if found else None
        return next((record for record in reversed(found) if record.get("round") == self.round), None)

    def perplexity(self) -> float | None:
        """Return the last measured held-out perplexity up to this round."""
        measured = [record.get("perplexity") for record in self._rounds()]
        return next((value for value in reversed(measured) if isinstance(value, (int, float))), None)

    def run_record(self) -> Mapping[str, Any]:
        """Return the first record; empty if there is none."""
        return next(iter(self._of("run")), {})

    def check_unchanged(self, *keys: str) -> None:
        """Refuse local files that have changed since the run was trained.

        Args:
            *keys: Keys of the configuration that name the files.

        Raises:
            HetLoraError: A file has changed.
        """
        before = {} if self.checkpoint is None else self.checkpoint.digests
        if not any(key in before for key in keys):
            return
        now = FileFingerprints().digests(self.config) | downloaded(self.config)
        changed = [key for key in keys if key in before and before[key] != now.get(key)]
        if changed:
            gone = [key for key in changed if now.get(key) is None]
            if gone:
                raise HetLoraError(
                    f"{self._places(gone)} is not here; call from the folder in which the run was started, or bring it back"
                )
            raise HetLoraError(
                f"{self._places(changed)} does not hold what it held when the run began; bring back what it was trained with"
            )

    def _places(self, keys: Iterable[str]) -> str:
        config = self.config.model_dump()
        return ", ".join(f"{key} = {config[section][name]!r}" for key in keys for section, name in [key.split(".")])

    # Where it lies ------------------------------------------------------------------------------------------------------

    def _find_written(self) -> Path:
        """Find the results of the run; return their place."""
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
        """Return the slots that some client still has, which the run measures and writes."""
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
            # The result has the number of slots, so the data of the run need not be here any more.
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
            return min(self.tiers[part.tier], self.largest)  # the result lacks slots that all clients have pruned
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
        if self._written is not None:  # it lacks the slots that all clients have pruned
            rank = {
                module: min(width, rank if isinstance(rank, int) else rank[module]) for module, width in widest.items()
            }
        try:
            return self.method.distribute(self._state.serving_state, Client(name, rank, 0)).adapter
        except (KeyError, HetLoraError) as error:
            raise HetLoraError(f"the records give client {name!r} a rank that it cannot have: {error}") from error

    def _rank_of(self, name: str) -> Rank:
        """Return the rank of a client after its last round, or its first rank."""
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
        """Yield the records of rounds up to this one; a killed run may have more."""
        return (record for record in self._all_rounds() if record["round"] <= self.round)

    def _all_rounds(self) -> Iterator[Mapping[str, Any]]:
        return (record for record in self._of("round") if isinstance(record.get("round"), int))


def open_run(folder: os.PathLike[str] | str, say: Callable[[str], None] = lambda _: None) -> TrainedRun:
    """Read what a run has learned, from its newest checkpoint, or from its results without one.

    Args:
        folder: The run's folder.
        say: Gets a message about every checkpoint that cannot be used.

    Raises:
        HetLoraError: There is no run, it has learned nothing, or its files are damaged.
    """
    folder = expand_path(folder)
    config = read_config(folder)
    return TrainedRun(folder, config, _records(folder / "records.jsonl"), newest(folder, say))


LOCAL_FILES = (
    ("model", "base"),
    ("model", "tokenizer"),
    ("model", "adapter"),
    ("data", "path"),
    ("data", "chat_template"),
)
"""Keys that name files or folders."""


def _located(config: RunConfig, folder: Path) -> RunConfig:
    """Return a configuration whose local files are found from here: their paths begin where the run was started."""
    start = _started_in(config, folder)
    if start is None or start == Path.cwd():
        return config
    changes: dict[str, dict[str, str]] = {}
    for section, key in LOCAL_FILES:
        place = getattr(getattr(config, section), key)
        if (
            place
            and place not in ("nano", "stdlib")
            and not expand_path(place).is_absolute()
            and (start / place).exists()
        ):
            changes.setdefault(section, {})[key] = str(start / place)
    sections = {section: getattr(config, section).model_copy(update=keys) for section, keys in changes.items()}
    return config.model_copy(update=sections)


def _started_in(config: RunConfig, folder: Path) -> Path | None:
    """Return the working directory of the run, where its folder's path tells it: the folder is in `output` there."""
    within, place = expand_path(config.output), Path(os.path.abspath(folder)).parent  # noqa: PTH100  links stay
    tail = Path(os.path.normpath(within)).parts
    if within.is_absolute() or ".." in tail or place.parts[len(place.parts) - len(tail) :] != tail:
        return None
    return Path(*place.parts[: len(place.parts) - len(tail)])


def _records(path: Path) -> list[Mapping[str, Any]]:
    """Return the records, without an incomplete last line of a killed run."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
        found = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise HetLoraError(f"{str(path)!r} cannot be read: {error}") from error
    return [record for record in found if isinstance(record, dict)]


def _index(folder: Path) -> dict[str, Path]:
    """Return the folders of the clients' adapters, by client."""
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


def _few(names: Iterable[str]) -> str:
    return several([repr(name) for name in names], 10) or "none"
