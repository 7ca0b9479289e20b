"""How a process that trains is set up, before torch is first imported: the command's own, and its workers."""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["prepare_process", "quiet_transformers"]


def prepare_process() -> None:
    """Make threads wait without spinning, and keep freed memory."""
    # Before the first import of torch: by default a waiting thread spins, and on a machine that is busy with anything else a
    # round then takes ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _keep_freed_memory()


def quiet_transformers() -> None:
    """Silence the bars and warnings of transformers: a bar of its own would break ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _keep_freed_memory() -> None:
    """Let glibc keep large freed blocks for itself.

    Otherwise it maps every block over 32 MiB afresh, and each page of it is faulted in anew at every use.
    Elsewhere than on glibc there is nothing to do.
    """
    if not sys.platform.startswith("linux"):
        return
    trim_threshold, mmap_threshold, large = -1, -3, 2**31 - 1
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(mmap_threshold, large)
        libc.mallopt(trim_threshold, large)
