"""Sets up a process that trains, before it imports torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

__all__ = ["prepare_process", "quiet_transformers", "set_up"]


def prepare_process() -> None:
    """Make threads wait without spinning, and keep freed memory."""
    # OpenMP reads it when torch is imported. On a busy machine, spinning threads make a round take ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _keep_freed_memory()


def quiet_transformers() -> None:
    """Silence the progress bars and warnings of transformers, which would break ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextlib.contextmanager
def set_up() -> Iterator[None]:
    """Set the process up as the command line does; restore the settings of a notebook at the end."""
    prepare_process()  # before torch is imported
    import torch
    from transformers.utils import logging

    threads, verbosity, bars = torch.get_num_threads(), logging.get_verbosity(), logging.is_progress_bar_enabled()
    quiet_transformers()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _keep_freed_memory() -> None:
    """Let glibc keep large freed blocks.

    Otherwise it maps every block over 32 MiB anew, and each of its pages faults at every use.
    """
    if not sys.platform.startswith("linux"):
        return
    trim_threshold, mmap_threshold, large = -1, -3, 2**31 - 1
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(mmap_threshold, large)
        libc.mallopt(trim_threshold, large)
