"""The wire format of tasks and updates: versioned, without pickle, strictly validated, in a chosen precision.

**The bytes** have the layout of safetensors: the length of the header (8 bytes, little-endian), the header as
JSON, the numbers. M modules of equal shapes and rank are one *stack* and travel as one tensor a factor: stack 0 is
`0.A [M, r, in]` and `0.B [M, out, r]`, the next one `1.A`. The header's `__metadata__` has the version of the format, the kind
of message ("task" or "update"), and as JSON its *value*: the fields of the record, the names and shapes of the stacks, the
precision, and which factors travel. The receiver already has the others.

**The precision** is the same for all tensors of a message:

- float32 (F32): a task's factors, or an update's, bit for bit.
- bfloat16 (BF16): rounded to 16 bits.
- int8 (I8): rounded to 8 bits with one float32 scale per slot, a row `A[i, :]` or a column `B[:, i]` of a module
  (`hetlora.core.codecs`, which is extensible). The scales of `0.A` are the tensor `0.A.scale [M, r]`; all scales precede all
  values.

**A compressed update is a change.** The difference of the trained `A_k`, at the client's rank r', to the received factor is
much smaller than `A_k`, and so is its rounding error. With the client's residual e of earlier rounds (error feedback: Seide et
al., Interspeech 2014; Karimireddy et al., ICML 2019), for A and likewise for B::

    client:  meant  = A_k - A_received[:r'] + e[:r'],    sent = round(meant),    e' = meant - sent
    server:  A_k^   = A_server[:r'] + sent

So no error is lost: over T rounds, reconstructed and trained factors differ by the last residual. The server adds to its own
copy, so the rounding of a compressed task never enters the average. An update in float32 is absolute and would contain the
rounding of a compressed task, so answer such a task in bfloat16 or int8.

**Bytes are untrusted.** Reading gives a value or a `WireError`, and no arithmetic is done before everything fits the task.
Compare their length with `max_update_bytes` first. `hetlora.core.admission` checks that the numbers are finite and plausible.

Example:
    >>> from hetlora.core.adapter import LoraPair
    >>> task = TrainTask("ana", 3, 1, {"q": LoraPair(torch.ones(1, 2), torch.zeros(3, 1))}, sends="B")
    >>> sent = ClientUpdate("ana", 3, 1, {"q": LoraPair(torch.ones(1, 2), torch.full((3, 1), 0.5))}, 40, 5, loss=1.5)
    >>> data, residual = pack_update(sent, task, precision="int8")
    >>> came = parse_update(data, task)
    >>> came.client, came.loss, came.adapter["q"]
    ('ana', 1.5, LoraPair(A=tensor([[1., 1.]]), B=tensor([[0.5000],
            [0.5000],
            [0.5000]])))
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor

from hetlora.core.adapter import Adapter, Factors, FlatAdapter, Stack, pad, rank_of, truncate
from hetlora.core.admission import MOST_EXAMPLES, MOST_STEPS
from hetlora.core.codecs import CODECS
from hetlora.core.types import ClientUpdate, TrainTask
from hetlora.errors import WireError
from hetlora.flower.wire.header import Header, encode, longest, read_header, read_numbers, refusal
from hetlora.flower.wire.numbers import compress, decompress, places

__all__ = [
    "PackedUpdate",
    "max_update_bytes",
    "pack_task",
    "pack_update",
    "parse_task",
    "parse_update",
]

Bytes = bytes | bytearray | memoryview


class PackedUpdate(NamedTuple):
    """An update as bytes.

    Attributes:
        data: The message.
        residual: The rounding error at the update's rank, for `pack_update` of the client's next answer.
    """

    data: bytes
    residual: Adapter | None


def pack_task(task: TrainTask, *, precision: str = "float32", factors: Factors = "AB") -> bytes:
    """Return a task as bytes.

    Args:
        task: The task.
        precision: Of its factors, which are absolute values, not changes.
        factors: The factors to send: `task.receives` for a client that has the others.

    Raises:
        WireError: The factors are no float32 matrices of the task's rank, compressed ones are not finite, or changes are folded
            into the base, which do not travel yet.
    """
    if task.folded.delta:
        raise WireError("what is folded into the base does not travel yet")
    part = compress(_stacked(task), precision, factors)
    if not CODECS[precision].exact:
        _refuse_infinite(decompress(part), f"the task of client {task.client!r}", precision)
    return encode(task, part)


def parse_task(data: Bytes, known: Adapter | None = None) -> TrainTask:
    """Return the task that `data` holds.

    In float32 and with both factors the tensors are views of `data`, which must not change any more.

    Args:
        data: A message of `pack_task`.
        known: The adapter with the factors that do not travel, with the same modules and at least the task's rank.

    Raises:
        WireError: With the problem, such as a missing factor.
    """
    with _only_wire_errors("task"):
        view = memoryview(data).cast("B")
        header = read_header(view, "task")
        numbers = decompress(read_numbers(header, view))
        if header.factors == "AB":
            adapter = FlatAdapter(numbers, header.layout)
        else:
            adapter = _replaced(_taken(_checked(known, header), header.layout), numbers, header.factors)
        return TrainTask(**header.fields, adapter=adapter)


def pack_update(
    update: ClientUpdate, task: TrainTask, *, precision: str = "float32", residual: Adapter | None = None
) -> PackedUpdate:
    """Return an update as bytes, of the factors that `task.sends` names.

    Args:
        update: The trained and pruned update.
        task: The task as the client received it, including its rounding.
        precision: Of the factors; absolute in float32, otherwise changes (see the module).
        residual: The residual of the client's last answer, of any rank, or None. The part of a frozen factor waits, because a
            changed frozen factor is refused.

    Returns:
        The bytes, and the residual for the next answer. It is unchanged in float32, and for factors that do not travel or are
        frozen, at the update's rank.

    Raises:
        WireError: The update does not fit the task, the factors are no float32 matrices of its rank, or the loss or a
            compressed number is not finite.
    """
    mine = _stacked(update)
    _answers(task, update.client, update.round, task.sends, mine.layout)
    if CODECS[precision].exact:
        return PackedUpdate(encode(update, compress(mine, precision, task.sends)), residual)
    owed = _owed(residual, mine.layout, update.client)
    meant = FlatAdapter(mine.numbers - _taken(task.adapter, mine.layout).numbers, mine.layout)
    due = cast("Factors", "".join(letter for letter in task.sends if letter in task.trains))
    for place, debt in _beside(meant, compress(owed, "float32", due).values, due):
        place.add_(debt)
    part = compress(meant, precision, task.sends)
    sent = decompress(part)
    _refuse_infinite(sent, f"the update of client {update.client!r}", precision)
    for place, said in _beside(meant, sent, task.sends):
        place.sub_(said)
    return PackedUpdate(encode(update, part), _replaced(owed, compress(meant, "float32", due).values, due))


def parse_update(data: Bytes, task: TrainTask, precision: str | None = None) -> ClientUpdate:
    """Return the update that `data` holds, in float32.

    Factors that did not travel are those of the task, and changes are added to the task's factors. In float32 and with both
    factors the tensors are views of `data`, which must not change any more.

    Args:
        data: A message of `pack_update`.
        task: The task it answers, as the server has it.
        precision: The requested precision; None accepts any.

    Raises:
        WireError: With the problem; if it does not fit the task, with client, module and both values.
    """
    with _only_wire_errors("update"):
        view = memoryview(data).cast("B")
        header = read_header(view, "update")
        if precision not in (None, header.precision):
            raise refusal(f"client {task.client!r} answered in {header.precision}, asked was {precision}")
        part = read_numbers(header, view)
        _answers(task, header.fields["client"], header.fields["round"], header.factors, header.layout)
        numbers = decompress(part)
        if not CODECS[header.precision].exact:
            adapter = _taken(task.adapter, header.layout)
            for place, change in _beside(adapter, numbers, header.factors):
                place.add_(change)
        elif header.factors == "AB":
            adapter = FlatAdapter(numbers, header.layout)
        else:
            adapter = _replaced(_taken(task.adapter, header.layout), numbers, header.factors)
        return ClientUpdate(**header.fields, adapter=adapter)


def max_update_bytes(task: TrainTask, precision: str = "float32") -> int:
    """Return the length of the longest valid answer to a task: without pruning, and with one stack per module.

    Example:
        >>> from hetlora.core.adapter import LoraPair
        >>> task = TrainTask("ana", 0, 4, {"q": LoraPair(torch.ones(4, 256), torch.zeros(256, 4))})
        >>> max_update_bytes(task) - 4 * (4 * 256 + 256 * 4) <= 1024  # the header
        True
    """
    ranks = {name: rank_of(task.rank, name) for name in task.adapter}
    loss = -sys.float_info.max
    return longest(
        ClientUpdate(task.client, task.round, ranks, task.adapter, MOST_EXAMPLES, MOST_STEPS, loss),
        precision,
        task.sends,
    )


# Stacks -------------------------------------------------------------------------------------------------------------


def _stacked(record: ClientUpdate | TrainTask) -> FlatAdapter:
    """Return a copy of a record's adapter with modules of equal shapes stacked, after validating its factors."""
    ranked = record.rank.keys() if isinstance(record.rank, Mapping) else record.adapter.keys()
    if not record.adapter or ranked != record.adapter.keys():
        raise refusal(f"client {record.client!r}: ranks of {sorted(ranked)}, modules {sorted(record.adapter)}")
    alike: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for name, (A, B) in record.adapter.items():
        if not all(factor.dtype == torch.float32 and factor.dim() == 2 for factor in (A, B)):
            raise WireError(f"client {record.client!r}, {name}: not two matrices in float32")
        rank, slots = rank_of(record.rank, name), (A.shape[0], B.shape[1])
        if slots != (rank, rank):
            raise WireError(
                f"client {record.client!r}, {name}: rank {rank}, and {slots[0]} slots of A and {slots[1]} of B"
            )
        alike.setdefault((A.shape, B.shape), []).append(name)
    layout: list[Stack] = []
    for names in alike.values():
        A, B = record.adapter[names[0]]
        layout.append((tuple(names), (len(names), A.shape[0], A.shape[1]), (len(names), B.shape[0], B.shape[1])))
    return _taken(record.adapter, tuple(layout))


@torch.no_grad()
def _taken(adapter: Adapter, layout: tuple[Stack, ...]) -> FlatAdapter:
    """Return a copy of the first slots of an adapter in a layout."""
    if isinstance(adapter, FlatAdapter) and adapter.layout == layout:
        return FlatAdapter(adapter.numbers.detach().to("cpu", copy=True), layout)
    taken = FlatAdapter(torch.empty(sum(math.prod(shape) for _, *shapes in layout for shape in shapes)), layout)
    for names, (A, B) in taken.stacks:
        rank = A.shape[1]
        torch.stack([adapter[name].A[:rank].cpu() for name in names], out=A)
        torch.stack([adapter[name].B[:, :rank].cpu() for name in names], out=B)
    return taken


def _beside(adapter: FlatAdapter, numbers: Tensor, factors: Factors) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each travelling factor of an adapter with its part of `numbers` (from `decompress`)."""
    travel = places(adapter.layout, factors)
    parts = torch.split(numbers, [math.prod(shape) for *_, shape in travel])
    for (index, letter, shape), part in zip(travel, parts, strict=True):
        yield getattr(adapter.stacks[index][1], letter), part.view(shape)


def _replaced(adapter: FlatAdapter, numbers: Tensor, factors: Factors) -> FlatAdapter:
    """Write the received numbers into the adapter and return it."""
    for place, values in _beside(adapter, numbers, factors):
        place.copy_(values)
    return adapter


# Validation ---------------------------------------------------------------------------------------------------------


def _answers(task: TrainTask, client: str, round_number: int, factors: Factors, layout: tuple[Stack, ...]) -> None:
    """Refuse an update that does not answer the task. Messages are built on failure only: this runs for every module."""
    sender = f"client {task.client!r}"
    if client != task.client:
        raise refusal(f"{sender} was asked, and client {client!r} answered")
    if round_number != task.round:
        raise refusal(f"{sender} answered round {round_number}, asked was round {task.round}")
    if factors != task.sends:
        raise refusal(f"{sender} sent the factors {factors!r}, the task asks for {task.sends!r}")
    different = task.adapter.keys() ^ set().union(*(names for names, *_ in layout))
    if different:
        raise refusal(f"{sender} sent other modules than it received: {', '.join(sorted(different))}")
    ranks = task.rank if isinstance(task.rank, Mapping) else dict.fromkeys(task.adapter, task.rank)
    for names, (_, rank, width), (_, out, _) in layout:
        for name in names:
            A, B = task.adapter[name]
            if not 1 <= rank <= ranks[name]:
                raise refusal(f"{sender}, {name}: rank {rank} is not within 1 ... {ranks[name]}, its assigned rank")
            if A.size(1) != width or B.size(0) != out:
                raise refusal(
                    f"{sender}, {name}: factors of a weight {out} x {width} arrived, expected {B.size(0)} x {A.size(1)}"
                )


def _checked(known: Adapter | None, header: Header) -> Adapter:
    """Return the known adapter if it has the factors that are missing in a task."""
    missing = " and ".join(letter for letter in "AB" if letter not in header.factors)
    where = f"the task of client {header.fields['client']!r} comes without {missing}"
    if known is None:
        raise refusal(f"{where}, and no known adapter is given to take it from")
    misfit = _misfit(known, header.layout)
    for names, (_, rank, _), _ in header.layout if misfit is None else ():
        narrow = next((name for name in names if known[name].A.shape[0] < rank), None)
        if narrow is not None:
            misfit = f"{narrow} of rank {known[narrow].A.shape[0]}, the task has rank {rank}"
    if misfit is not None:
        raise refusal(f"{where}, and the known adapter does not fit: {misfit}")
    return known


def _owed(residual: Adapter | None, layout: tuple[Stack, ...], client: str) -> FlatAdapter:
    """Return the residual at the ranks of the layout, padded with zeros."""
    ranks = {name: shape[1] for names, shape, _ in layout for name in names}
    if residual is None:
        count = sum(math.prod(shape) for _, *shapes in layout for shape in shapes)
        return FlatAdapter(torch.zeros(count), layout)
    misfit = _misfit(residual, layout)
    if misfit is not None:
        raise refusal(f"the residual of client {client!r} does not fit its update: {misfit}")
    kept = truncate(residual, {name: min(rank, residual[name].A.shape[0]) for name, rank in ranks.items()})
    return _taken(pad(kept, ranks), layout)


def _misfit(adapter: Adapter, layout: tuple[Stack, ...]) -> str | None:
    """Return why an adapter does not fit the modules and shapes of a layout, at any rank; None if it fits."""
    different = adapter.keys() ^ {name for names, *_ in layout for name in names}
    if different:
        return f"only one side has {', '.join(sorted(different))}"
    for names, (_, _, width), (_, out, _) in layout:
        for name in names:
            A, B = (tuple(factor.shape) if factor.dtype == torch.float32 else factor.dtype for factor in adapter[name])
            if not (isinstance(A, tuple) and isinstance(B, tuple) and (A[1:], B) == ((width,), (out, *A[:1]))):
                return f"{name} has A {A} and B {B}, the weight is {out} x {width}"
    return None


def _refuse_infinite(numbers: Tensor, what: str, precision: str) -> None:
    if not bool(torch.isfinite(numbers).all()):
        raise refusal(f"{what} holds a number that is not finite, or not in {precision}")


@contextmanager
def _only_wire_errors(kind: str) -> Iterator[None]:
    """Turn any error of the parser into a `WireError`, since bytes are untrusted."""
    try:
        yield
    except WireError:
        raise
    except Exception as error:
        raise refusal(f"malformed {kind}: {error!r}") from error
