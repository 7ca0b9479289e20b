"""Parallel passes: one thread per pass, each with its share of the processor."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["in_parallel"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    work: Callable[[Item], Result], items: Sequence[Item], device: torch.device, max_concurrency: int | None = None
) -> Iterator[Result]:
    """Yield `work(item)` of every item, in order.

    On a CPU one item per PyTorch thread runs at the same time: a small matrix product does not gain from a second thread. On a
    GPU the items run one after the other.

    Args:
        work: Is called in a thread of its own, so its shared state must be thread-safe.
        items: The items; put the most expensive ones first, so that none runs alone at the end.
        device: Where the work is done.
        max_concurrency: Most items at the same time; None for one per thread.

    Example:
        >>> list(in_parallel(abs, [-1, 2], torch.device("cpu")))
        [1, 2]
    """
    threads = torch.get_num_threads()
    workers = min(threads if max_concurrency is None else min(threads, max_concurrency), len(items))
    if workers < 2 or device.type != "cpu":
        yield from map(work, items)
        return
    torch.set_num_threads(threads // workers)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="hetlora")
    running: deque[Future[Result]] = deque()
    try:
        for item in items:
            if len(running) > workers:  # finished results wait for earlier ones, so bound them
                yield running.popleft().result()
            running.append(pool.submit(work, item))
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
