"""One function over many items, on all cores of this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

MOST = 16
"""Threads, on machines with more cores: a process has others to do for, and other processes."""


def threads() -> int:
    """How many threads are worth their while here."""
    return min(len(os.sched_getaffinity(0)), MOST)


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """What `function` gives for each item, in their order.

    It should let go of Python's lock while it works, as torch's operations do. What it raises for
    the first item that fails is raised here. The threads are ended with the call, so that a process
    which forks or ends has none of them.
    """
    workers = min(threads(), len(items))
    if workers < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, items))
