"""Refuses native kernels in a process that was forked while their threads existed.

The pool of OpenMP does not survive a fork: the child has its records but not its threads, and would wait for them for
ever. Torch's operations share the pool, so there is nothing to fall back to. A region of one thread does not touch the
pool, so a child with `torch.set_num_threads` (1), as in every worker of a DataLoader, computes.
"""

from __future__ import annotations

import os

import torch

from moesys.errors import KernelError

_has_threads = False
_has_lost_threads = False


def require_threads() -> None:
    """Notes that native kernels run in this process from now on. Raises `KernelError` for several threads in a forked
    child of one where they have run on several."""
    global _has_threads
    if torch.get_num_threads() == 1:
        return
    if _has_lost_threads:
        raise KernelError(
            "native kernels have run on several threads before this process was forked from its parent, and threads do "
            "not survive a fork; call torch.set_num_threads(1) in this process, or start it with the method 'spawn' or "
            "'forkserver' instead of 'fork'"
        )
    _has_threads = True


def _note_fork() -> None:
    global _has_lost_threads
    _has_lost_threads = _has_threads


if os.name == "posix":
    os.register_at_fork(after_in_child=_note_fork)
