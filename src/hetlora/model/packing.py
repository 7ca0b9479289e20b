"""Packing: rows of several clients end to end, without computation for padding.

All layers but attention work on single tokens, and see all tokens of a pass as one row. Attention sees blocks of rows of
similar length, padded to the longest row of the block, so that no row attends to another.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

from hetlora.data.tokenization import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Block", "Pack", "attend_within_rows", "enable_packing", "forward_pack", "pack_rows"]

ATTENTION = "hetlora-packed"
"""Name of `attend_within_rows` in transformers' table of attention functions."""

WASTE = 1.25
"""Largest ratio of a block's size, with padding, to its tokens."""


class Block(NamedTuple):
    """Rows that attention computes together, padded to one length."""

    rows: int
    length: int


@dataclass(frozen=True)
class Pack:
    """Rows of G clients end to end, client after client.

    Attributes:
        input_ids: Token ids `[tokens]`.
        positions: Position of each token in its row, from 0 `[tokens]`.
        counts: Tokens of each client, G numbers; 0 for a client without rows here.
        blocks: The blocks of attention, in order.
        places: Index of each token in the concatenated blocks `[tokens]`.
        scored: Tokens whose successor is scored, ascending `[n]`.
        targets: The successor of each scored token `[n]`.
        owners: Index of the client of each scored token `[n]`.
        lengths: Tokens of each row.
        rows: Rows of each client, G numbers.
    """

    input_ids: Tensor
    positions: Tensor
    counts: tuple[int, ...]
    blocks: tuple[Block, ...]
    places: Tensor
    scored: Tensor
    targets: Tensor
    owners: Tensor
    lengths: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def is_rectangular(self) -> bool:
        """Whether the rows form one block, in order and without padding."""
        return len(self.blocks) == 1 and self.size == self.places.numel()

    @property
    def size(self) -> int:
        """Return the number of tokens in the blocks, with padding."""
        return sum(rows * length for rows, length in self.blocks)

    def padded(self) -> tuple[Tensor, Tensor]:
        """Return the rows padded on the right `[rows, length]`, and the flat index of each token in them `[tokens]`."""
        longest = max(self.lengths)
        lengths = torch.tensor(self.lengths, device=self.input_ids.device)
        row = torch.repeat_interleave(lengths, output_size=self.input_ids.numel())  # [tokens]
        places = row * longest + self.positions  # [tokens]
        padded = self.input_ids.new_zeros(len(self.lengths) * longest)  # [rows * length]
        return padded.index_copy_(0, places, self.input_ids).view(-1, longest), places

    def to(self, device: torch.device) -> Pack:
        """Return this pack on a device."""
        if self.input_ids.device == device:
            return self
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Pack(**{**vars(self), **moved})


def pack_rows(clients: Sequence[Sequence[Example]]) -> Pack:
    """Pack the rows of G clients.

    Args:
        clients: The rows of each client.

    Raises:
        ValueError: There are no tokens.

    Example:
        >>> two = pack_rows([[Example((5, 6, 7), 1)], [Example((8, 9), 1), Example((3, 4, 2), 2)]])
        >>> two.input_ids.tolist(), two.positions.tolist(), two.counts
        ([5, 6, 7, 3, 4, 2, 8, 9], [0, 1, 2, 0, 1, 2, 0, 1], (3, 5))
        >>> two.scored.tolist(), two.targets.tolist(), two.owners.tolist()
        ([0, 1, 4, 6], [6, 7, 2, 9], [0, 0, 1, 1])
    """
    # Longest first within a client: if all rows have similar lengths, their order is then that of the blocks.
    rows = [(owner, row) for owner, own in enumerate(clients) for row in sorted(own, key=lambda row: -len(row.ids))]
    lengths = [len(row.ids) for _, row in rows]
    if not sum(lengths):
        raise ValueError("there is no token to pack")
    begins = list(itertools.accumulate(lengths, initial=0))
    scored: list[int] = []
    owners: list[int] = []
    for begin, (owner, row) in zip(begins[:-1], rows, strict=True):
        first = max(row.scored_from, 1)
        scored += range(begin + first - 1, begin + len(row.ids) - 1)
        owners += [owner] * row.scored
    input_ids = torch.tensor([token for _, row in rows for token in row.ids])  # [tokens]
    scored_at = torch.tensor(scored, dtype=torch.long)  # [n]
    blocks, places = _blocks(lengths, begins)
    return Pack(
        input_ids=input_ids,
        positions=torch.tensor([place for length in lengths for place in range(length)]),
        counts=tuple(sum(len(row.ids) for row in own) for own in clients),
        blocks=blocks,
        places=places,
        scored=scored_at,
        targets=input_ids[scored_at + 1],
        owners=torch.tensor(owners, dtype=torch.long),
        lengths=tuple(lengths),
        rows=tuple(map(len, clients)),
    )


def _blocks(lengths: Sequence[int], begins: Sequence[int]) -> tuple[tuple[Block, ...], Tensor]:
    """Divide rows into blocks of similar length; return these, and each token's index in the concatenated blocks."""
    blocks: list[Block] = []
    places = [0] * sum(lengths)
    place = 0
    order = sorted((index for index, length in enumerate(lengths) if length), key=lambda index: -lengths[index])
    while order:
        longest, tokens, count = lengths[order[0]], 0, 0
        for index in order:
            if (count + 1) * longest > WASTE * (tokens + lengths[index]):
                break
            tokens, count = tokens + lengths[index], count + 1
        for index in order[:count]:
            begin, length = begins[index], lengths[index]
            places[begin : begin + length] = range(place, place + length)
            place += longest
        blocks.append(Block(count, longest))
        order = order[count:]
    return tuple(blocks), torch.tensor(places)


class _Current(threading.local):
    """Per thread: the pack in the current forward pass, and whether the mask or attention was given a sliding window.

    Attributes:
        pack: None outside a forward pass.
        window_in_mask: Whether a mask was given a window.
        window_in_attention: Whether the attention function was given a window.
    """

    pack: Pack | None = None
    window_in_mask = False
    window_in_attention = False


current = _Current()


def attend_within_rows(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention within the rows of the current pack; without a pack, transformers' own attention.

    Args:
        module: The attention module.
        query: `[1, heads, tokens, size]`.
        key: `[1, key heads, tokens, size]`.
        value: `[1, key heads, tokens, size]`.
        attention_mask: Mask without a pack; a pack needs none.
        options: Options of transformers' scaled-dot-product attention.

    Returns:
        The output `[1, tokens, heads, size]`, and None for the attention weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    packed = current.pack
    attend: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward
    if packed is None:
        return attend(module, query, key, value, attention_mask, **options)
    window = options.pop("sliding_window", None)
    current.window_in_attention |= window is not None
    options.pop("is_causal", None)
    parts = [_blocked(packed, tensor) for tensor in (query, key, value)]
    outs = []
    for block, *tensors in zip(packed.blocks, *parts, strict=True):
        mask = None if window is None or block.length <= window else _band(block.length, window, query.device)
        out = attend(module, *tensors, mask, is_causal=mask is None, **options)[0]  # [rows, length, heads, size]
        outs.append(out.flatten(0, 1))
    return _joined(packed, outs)[None], None  # [1, tokens, heads, size]


def _mask_within_rows(**options: Any) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    if current.pack is None:
        mask: Tensor | None = sdpa_mask(**options)
        return mask
    current.window_in_mask |= options.get("local_size") is not None
    return None


def enable_packing(base: PreTrainedModel) -> bool:
    """Enable packs for the base, and return whether it supports them.

    The architecture must take attention from transformers' table. A test pass checks that rows do not affect each other, since
    other layers may also mix tokens (a convolution, a recurrence).
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    config = base.config.get_text_config()
    if not base._supports_attention_backend or config._attn_implementation != "sdpa":  # noqa: SLF001
        return False
    if getattr(config, "attention_chunk_size", None) is not None:  # only masks have the chunks, and a pack has no mask
        return False
    AttentionInterface.register(ATTENTION, attend_within_rows)
    AttentionMaskInterface.register(ATTENTION, _mask_within_rows)
    base.set_attn_implementation(ATTENTION)
    if isinstance(next(base.parameters()), FakeTensor) or (_rows_are_independent(base) and _windows_are_known()):
        return True
    base.set_attn_implementation("sdpa")
    return False


def _rows_are_independent(base: PreTrainedModel) -> bool:
    """Whether packed rows get the same logits as single rows."""
    rows = [(3, 1, 2, 0, 1), (0, 2), (1, 1, 3)]
    packed = pack_rows([[Example(ids, 1) for ids in rows]]).to(base.device)
    with torch.inference_mode():
        each = [torch.tensor([ids], device=base.device) for ids in _longest_first(rows)]
        alone = torch.cat([base(input_ids=ids, use_cache=False).logits[0] for ids in each])
        try:
            with forward_pack(packed) as inputs:
                together = base(**inputs).logits[0]  # [tokens, V]
        except Exception:  # noqa: BLE001  a base that wants a mask, say, cannot do without one
            return False
    scale = float(alone.abs().max())
    tolerance = 1e-4 if alone.dtype == torch.float32 else 0.05
    return bool((alone - together).abs().max() <= tolerance * scale)


def _windows_are_known() -> bool:
    """Whether attention was given the window of the masks in the last pass: a pack has no masks."""
    return current.window_in_attention or not current.window_in_mask


def _longest_first(rows: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return sorted(rows, key=len, reverse=True)


@contextlib.contextmanager
def forward_pack(packed: Pack) -> Iterator[dict[str, Any]]:
    """Yield the inputs of a base for a pack, and set the pack of its attention meanwhile."""
    current.pack = packed
    current.window_in_mask = current.window_in_attention = False
    try:
        yield {"input_ids": packed.input_ids[None], "position_ids": packed.positions[None], "use_cache": False}
    finally:
        current.pack = None


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Return the mask of causal attention within a window `[1, 1, length, length]`."""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place[None, :]  # [length, length]
    return ((distance >= 0) & (distance < window))[None, None]


def _blocked(packed: Pack, tensor: Tensor) -> list[Tensor]:
    """Change `[1, heads, tokens, size]` to `[rows, heads, length, size]` per block."""
    flat = tensor.transpose(1, 2).squeeze(0)  # [tokens, heads, size]
    if not packed.is_rectangular:
        flat = _Spread.apply(flat, packed.places, packed.size)  # type: ignore[no-untyped-call]  # [padded, heads, size]
    parts = torch.split(flat, [rows * length for rows, length in packed.blocks])  # each [rows * length, heads, size]
    return [
        part.view(*block, *part.shape[1:]).transpose(1, 2) for part, block in zip(parts, packed.blocks, strict=True)
    ]


def _joined(packed: Pack, outs: Sequence[Tensor]) -> Tensor:
    """Change `[rows * length, heads, size]` per block to `[tokens, heads, size]`."""
    flat = outs[0] if len(outs) == 1 else torch.cat(list(outs))  # [padded, heads, size]
    if packed.is_rectangular:
        return flat
    picked: Tensor = _Pick.apply(flat, packed.places)  # type: ignore[no-untyped-call]
    return picked


class _Spread(torch.autograd.Function):
    """Copy tokens `[tokens, ...]` into blocks `[padded, ...]`. Padding is zero: tokens may hold NaN, and 0 · NaN is NaN."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return _scattered(tokens, places, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None


def _scattered(tokens: Tensor, places: Tensor, size: int) -> Tensor:
    # Every place occurs once, so that a copy is enough; autograd's own gradient of a selection would add.
    return tokens.new_zeros(size, *tokens.shape[1:]).index_copy_(0, places, tokens)


class _Pick(torch.autograd.Function):
    """Select the tokens `[tokens, ...]` from blocks `[padded, ...]`; padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, blocked: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = blocked.shape[0]
        return blocked.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return _scattered(gradient, places, ctx.size), None
