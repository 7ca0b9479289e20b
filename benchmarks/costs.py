"""Predicted costs of local training against measured ones.

Memory is measured twice, on the CPU. Held: every tensor that an operation gives in a real run of training, from when it is
made until it is freed, on top of what was there before (weights, received factors). Allocated: PyTorch's profiler notes every
allocation of such a run. What it finds beyond the tensors is what kernels take for themselves, and that is another amount on
every processor: oneDNN packs what it multiplies, attention what it looks at block by block. So tests compare what is held, and
what is allocated is measured here. FLOPs: PyTorch's own counter over the same run. `--rss` asks the operating system instead,
in a process of its own: how far the peak of resident memory rises above what the process held before it trained.

    OMP_NUM_THREADS=1 python benchmarks/costs.py
    OMP_NUM_THREADS=1 python benchmarks/costs.py --rss
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from hetlora.core.types import TrainTask
from hetlora.data.tokenization import Example
from hetlora.model.lora_model import LoraModel, load_base
from hetlora.model.packing import pack_rows
from hetlora.model.quantize import Quantization, quantized_layers
from hetlora.training.cost_model import Cost, CostModel, LocalWork
from hetlora.training.local import LocalTraining, client_losses, train_clients


class Shape(NamedTuple):
    """One comparison; `rank` None is full fine-tuning."""

    base: str
    rank: int | None
    rows: int
    length: int
    prompt: int = 1
    steps: int = 2
    dtype: torch.dtype = torch.float32
    optimizer: str = "adamw"
    quantize: Quantization = "none"
    recompute: bool = False

    @property
    def work(self) -> LocalWork:
        """The work of a client whose rows are all of this length, with a prompt that is not scored."""
        return LocalWork(self.rows, self.length, self.rows * (self.length - self.prompt), self.steps)

    @property
    def settings(self) -> LocalTraining:
        """How it trains."""
        optimizer: Any = self.optimizer
        return LocalTraining(steps=self.steps, batch_size=self.rows, optimizer=optimizer)


class Measured(NamedTuple):
    """Measured costs of a real run.

    Attributes:
        peak_bytes: Peak bytes of tensors.
        before_bytes: Bytes before training: weights and received factors.
        flops: Total FLOPs.
    """

    peak_bytes: int
    before_bytes: int
    flops: int


SHAPES = (
    Shape("nano", 1, rows=4, length=64),
    Shape("nano", 4, rows=4, length=224, prompt=100),
    Shape("nano", 16, rows=4, length=224, prompt=100),
    Shape("nano", 64, rows=1, length=32),
    Shape("nano", 256, rows=1, length=8),
    Shape("nano", 8, rows=8, length=224),
    Shape("nano", 8, rows=4, length=128, steps=1),
    Shape("nano", 8, rows=4, length=128, optimizer="sgd"),
    Shape("nano", 8, rows=4, length=128, dtype=torch.bfloat16),
    Shape("nano", 8, rows=8, length=224, recompute=True),
    Shape("nano", None, rows=4, length=128),
    Shape("nano", None, rows=1, length=32),
    Shape("nano", None, rows=4, length=128, optimizer="sgd"),
    Shape("gpt2", 4, rows=2, length=96),
    Shape("gpt2", 32, rows=8, length=32, prompt=16),
    Shape("gpt2", None, rows=4, length=64),
)


def predict(shape: Shape) -> Cost:
    """Return the cost model's figures."""
    costs = CostModel(shape.base, shape.settings, dtype=shape.dtype, quantize=shape.quantize, recompute=shape.recompute)
    return costs.full(shape.work) if shape.rank is None else costs.lora(shape.rank, shape.work)


class Held(TorchDispatchMode):
    """Counts the bytes of tensors that operations give, for as long as they live; which kernel does an operation is no matter.

    Args:
        before: Tensors that are there already.

    Attributes:
        before: Bytes of those.
        most: Peak bytes, those included.

    Example:
        >>> there = torch.zeros(8)
        >>> with Held([there]) as held:
        ...     given = (there + 1.0).view(2, 4)
        ...     del given
        ...     more = there.to(torch.float64)
        >>> held.before, held.most
        (32, 96)
    """

    def __init__(self, before: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._known: set[int] = set()
        self._now = 0
        self._note(before)
        self.before = self.most = self._now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do an operation, and note what it gives."""
        given = func(*args, **(kwargs or {}))
        self._note(leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor))
        self.most = max(self.most, self._now)
        return given

    def _note(self, tensors: Iterable[torch.Tensor]) -> None:
        for storage in (tensor.untyped_storage() for tensor in tensors):
            key, size = storage._cdata, storage.nbytes()  # noqa: SLF001  the same for all views
            if key not in self._known:
                self._known.add(key)
                self._now += size
                weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def measure(shape: Shape) -> Measured:
    """Train for real: once for the FLOPs, once for the tensors that are held."""
    train, before = prepare(shape)
    counter: Any = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
    with counter:
        train()
    gc.collect()
    with Held(before) as held:
        train()
    return Measured(held.most, held.before, counter.get_total_flops())


def allocated(shape: Shape) -> int:
    """Train for real, and return the most bytes that were allocated at once, weights and received factors included.

    Once before, for what libraries allocate at their first use.
    """
    train, before = prepare(shape)
    train()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train()
    results: Any = profiler.profiler
    events = sorted(
        (event for event in results.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    return size_of(before) + highest(event.nbytes() for event in events)


def prepare(shape: Shape) -> tuple[Callable[[], object], list[torch.Tensor]]:
    """Return a function that trains, and the tensors that are there before it does."""
    base = load_base(shape.base, dtype=shape.dtype, quantize=shape.quantize)
    before = [*base.parameters(), *base.buffers(), *scales(base)]
    # Tokens repeat from 2 on; which they are costs nothing.
    example = Example(tuple(2 + index % 40 for index in range(shape.length)), shape.prompt)
    model = LoraModel(base, recompute=shape.recompute)
    if shape.rank is None:
        return lambda: train_weights(model, example, shape), before
    task = TrainTask("client", 0, shape.rank, model.initial_adapter(shape.rank, seed=0))
    before += [factor for pair in task.adapter.values() for factor in pair]
    examples = [[example] * shape.rows]
    return lambda: train_clients(model, [task], examples, shape.settings), before


def size_of(tensors: Sequence[torch.Tensor]) -> int:
    """Return their bytes."""
    return sum(tensor.nbytes for tensor in tensors)


def scales(base: Any) -> list[torch.Tensor]:
    """Return bitsandbytes' scales, which are no parameters."""
    weights = [layer.weight for layer in quantized_layers(base).values()]
    found = [getattr(weight, "SCB", None) for weight in weights]
    found += [weight.quant_state.absmax for weight in weights if hasattr(weight, "quant_state")]
    return [scales for scales in found if scales is not None]


def train_weights(model: LoraModel, example: Example, shape: Shape) -> None:
    """Do the loop over every weight that a user of PyTorch would write."""
    weights = list(model.base.parameters())
    for weight in weights:
        weight.requires_grad_()
    optimizer = shape.settings.make_optimizer(weights)
    for _ in range(shape.steps):
        optimizer.zero_grad()
        client_losses(model, pack_rows([[example] * shape.rows])).sum().div(shape.work.scored).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    for weight in weights:
        weight.requires_grad_(False).grad = None


def highest(changes: Iterable[int]) -> int:
    """Return the highest running sum.

    Example:
        >>> highest([3, 4, -5, 1])
        7
    """
    live = top = 0
    for change in changes:
        live += change
        top = max(top, live)
    return top


def attention(query: Any, key: Any, value: Any, *_: object, **__: object) -> int:
    """Count the FLOPs of attention, which PyTorch's counter knows on CUDA only."""
    return int(sdpa_flop_count(query, key, value))


def attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: object, **__: object) -> int:
    """Count those of its gradient."""
    return int(sdpa_backward_flop_count(gradient, query, key, value))


def addmm(_: Any, left: Any, right: Any, **__: object) -> int:
    """Count those of a product that is added in place."""
    return int(2 * left[0] * left[1] * right[1])


UNCOUNTED: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,  # noqa: SLF001
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,  # noqa: SLF001
    torch.ops.aten.addmm_: addmm,
}


def resident_growth(shape: Shape) -> int:
    """Return how many bytes the peak of this process's resident memory grows while it trains."""
    train, _ = prepare(shape)
    small = shape._replace(rows=1, length=8, prompt=1)
    prepare(small)[0]()  # what libraries allocate at their first use
    gc.collect()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    train()
    # Not ru_maxrss, which a process inherits from the one that started it.
    [peak] = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    return int(peak) * 1024 - before


def measure_resident(shape: Shape, *, returned: bool = True) -> int:
    """Return the same from a process of its own; on Linux only.

    Args:
        shape: What is trained.
        returned: Whether the allocator gives freed blocks back at once. By default glibc keeps them for later, in pieces that
            do not fit the next need, and the process holds more than its tensors take.
    """
    fields = json.dumps([shape.base, shape.rank, shape.rows, shape.length, shape.prompt, shape.steps])
    command = [sys.executable, __file__, "--resident", fields]
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536"} if returned else {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **allocator}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def growth(shape: Shape) -> int:
    """Return what the cost model says is added to weights and received factors."""
    _, before = prepare(shape)
    return predict(shape).peak_bytes - size_of(before)


def gpt2(folder: str) -> str:
    """Write a small GPT-2, whose linear layers are stored the other way round, and return its folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=128, n_embd=96, n_layer=3, n_head=4)).save_pretrained(
            folder
        )
    return folder


def main() -> None:
    """Print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rss", action="store_true", help="ask the operating system for the memory")
    parser.add_argument("--resident", help=argparse.SUPPRESS)
    options = parser.parse_args()
    from transformers.utils import logging

    logging.disable_progress_bar()
    if options.resident:
        print(resident_growth(Shape(*json.loads(options.resident))))
        return
    if options.rss:
        head = "| base | rank | rows x length | steps | growth predicted, MB | measured | ratio | glibc's default | ratio |"
        print(head + "\n" + "| --- " * 9 + "|")
        for shape in (Shape("nano", 8, 24, 256), Shape("nano", 64, 16, 256, 128), Shape("nano", None, 24, 256)):
            said, was, kept = growth(shape), measure_resident(shape), measure_resident(shape, returned=False)
            print(
                f"{row(shape)} {said / 1e6:.1f} | {was / 1e6:.1f} | {said / was:.3f} | {kept / 1e6:.1f} | {said / kept:.3f} |"
            )
        return
    print(
        "| base | rank | rows x length | steps | peak MB predicted | held | allocated | predicted / allocated "
        "| MFLOP predicted | ratio |"
    )
    print("| --- " * 10 + "|")
    with tempfile.TemporaryDirectory() as folder:
        small = gpt2(folder)
        for shape in SHAPES:
            real = shape._replace(base=small) if shape.base == "gpt2" else shape
            said, was, taken = predict(real), measure(real), allocated(real)
            memory = " | ".join(f"{size / 1e6:.2f}" for size in (said.peak_bytes, was.peak_bytes, taken))
            flops = f"{said.flops / 1e6:.1f} | {said.flops / was.flops:.3f}"
            print(f"{row(shape)} {memory} | {said.peak_bytes / taken:.3f} | {flops} |", flush=True)


def row(shape: Shape) -> str:
    """Return the cells that say what was run."""
    rank = "all weights" if shape.rank is None else str(shape.rank)
    extra = "".join(
        f", {value}"
        for value, usual in ((shape.optimizer, "adamw"), (str(shape.dtype)[6:], "float32"))
        if value != usual
    )
    prompt = f" ({shape.prompt} unscored)" if shape.prompt > 1 else ""
    return f"| {shape.base} | {rank}{extra} | {shape.rows} x {shape.length}{prompt} | {shape.steps} |"


if __name__ == "__main__":
    main()
