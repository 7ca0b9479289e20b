"""Run a proof's trials in one process per core, each with one thread of PyTorch."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

import torch

__all__ = ["chunks", "in_processes"]

Result = TypeVar("Result")


def chunks(first: int, count: int, size: int) -> list[range]:
    """Return the trials `first … first + count - 1` in ranges that end where a multiple of `size` does.

    Example:
        >>> chunks(3, 7, 5)
        [range(3, 5), range(5, 10)]
    """
    ends = [first, *range(first + size - first % size, first + count, size), first + count] if count else []
    return [range(begin, end) for begin, end in itertools.pairwise(ends)]


def in_processes(
    work: Callable[..., Result], items: Sequence[Sequence[Any]], processes: int | None = None
) -> Iterator[Result]:
    """Yield `work(*item)` for every item as it is done; one process for one item, or where one is asked for, is this one.

    Args:
        work: A function of a module, which new processes can find.
        items: Its arguments.
        processes: Maximum number of processes; None for the number of cores.
    """
    many = min(len(items), processes or os.cpu_count() or 1)
    if many <= 1:
        for item in items:
            yield work(*item)
        return
    # Not forked: a process that has used PyTorch's threads cannot be copied safely.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(many, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done in as_completed([pool.submit(work, *item) for item in items]):
            yield done.result()
