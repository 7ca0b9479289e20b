"""Several passes at once: a thread a pass, each with its share of the processor."""

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
    work: Callable[[Item], Result], items: Sequence[Item], device: torch.device, at_once: int | None = None
) -> Iterator[Result]:
    """Yield `work(item)` of every item, in order.

    On a CPU as many items are worked on at once as PyTorch has threads: a small matrix product does not gain from a second
    thread, a second product does. A graphics processor is shared by one.

    Args:
        work: Is called in a thread of its own; what it touches beside its item must be safe to share.
        items: In the order of the results; the most expensive first, so that none ends alone.
        device: Where the work is done.
        at_once: The most items at once; None for as many as there are threads.

    Example:
        >>> list(in_parallel(abs, [-1, 2], torch.device("cpu")))
        [1, 2]
    """
    threads = torch.get_num_threads()
    workers = min(threads if at_once is None else min(threads, at_once), len(items))
    if workers < 2 or device.type != "cpu":
        yield from map(work, items)
        return
    torch.set_num_threads(threads // workers)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="hetlora")
    running: deque[Future[Result]] = deque()
    try:
        for item in items:
            if len(running) > workers:  # results wait for those before them, but never pile up
                yield running.popleft().result()
            running.append(pool.submit(work, item))
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
