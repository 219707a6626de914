"""Parallel map over a thread pool."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

MAX_WORKERS = 16  # leaves cores of a large machine to the rest of the process and to other ranks


def default_num_workers() -> int:
    """Return the number of CPU cores this process may use, at most MAX_WORKERS."""
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS)


def parallel_map(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Apply `function` to each item in threads and return the results in order.

    `function` should release the GIL, as torch's operations do. An exception of any item is raised.
    """
    workers = min(default_num_workers(), len(items))
    if workers < 2:
        return [function(item) for item in items]

    def run_stride(first: int) -> list[R]:
        # One task per thread: an item alone may be cheaper than its submission.
        return [function(item) for item in items[first::workers]]

    strides = list(_pool().map(run_stride, range(workers)))
    return [strides[index % workers][index // workers] for index in range(len(items))]


@cache
def _pool() -> ThreadPoolExecutor:
    """One pool per process: torch's start-up in a new thread takes as long as a small resize."""
    return ThreadPoolExecutor(default_num_workers(), thread_name_prefix="miro-threads")


# A forked child inherits the pool object but none of its threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
