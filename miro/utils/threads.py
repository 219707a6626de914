"""One function over many items, on all cores of this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain, zip_longest
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

MOST = 16
"""Threads, on machines with more cores: a process has others to do for, and other processes."""
_NOTHING: Any = object()


def threads() -> int:
    """How many threads are worth their while here."""
    return min(len(os.sched_getaffinity(0)), MOST)


def parallel_map(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """What `function` gives for each item, in their order; an error of one of them is raised.

    It should let go of Python's lock while it works, as torch's operations do.
    """
    workers = min(threads(), len(items))
    if workers < 2:
        return [function(item) for item in items]

    def every(first: int) -> list[R]:
        # A task for each thread, and not for each item, which may be small.
        return [function(item) for item in items[first::workers]]

    parts = list(_pool().map(every, range(workers)))
    turns = chain.from_iterable(zip_longest(*parts, fillvalue=_NOTHING))
    return [found for found in turns if found is not _NOTHING]


@cache
def _pool() -> ThreadPoolExecutor:
    """Kept: what torch sets up in a new thread takes as long as resizing a small image."""
    return ThreadPoolExecutor(threads(), thread_name_prefix="miro-threads")


# A fork has none of the threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
