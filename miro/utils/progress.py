"""Progress on the screen, by rich; where there is no screen, a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SILENCE = 10.0
"""Seconds between two lines where the output is a file."""

console = Console(stderr=True)


def _columns() -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


@contextmanager
def bar(name: str, total: int | None = None) -> Iterator[Callable[[int, int | None, str], None]]:
    """A progress display: call it with (done, total, detail)."""
    if not console.is_terminal:
        yield _lines(name)
        return
    with _columns() as progress:
        task: TaskID = progress.add_task(name, total=total, detail="")

        def show(done: int, total: int | None, detail: str) -> None:
            progress.update(task, completed=done, total=total, detail=detail)

        yield show


@contextmanager
def many() -> Iterator[Callable[[str, int, int | None, str], None]]:
    """A display of several things at once: call it with (name, done, total, detail)."""
    if not console.is_terminal:
        shows: dict[str, Callable[[int, int | None, str], None]] = {}

        def line(name: str, done: int, total: int | None, detail: str) -> None:
            shows.setdefault(name, _lines(name))(done, total, detail)

        yield line
        return
    with _columns() as progress:
        tasks: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int | None, detail: str) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=None, detail="")
            progress.update(tasks[name], completed=done, total=total, detail=detail)

        yield show


@contextmanager
def counting(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """A display for stages that count samples: call it with (done, total or None)."""
    started = time.perf_counter()
    with bar(name) as show:

        def count(done: int, total: int | None) -> None:
            rate = done / max(time.perf_counter() - started, 1e-9)
            show(done, total, f"{rate:,.0f} images/s")

        yield count


def _lines(name: str) -> Callable[[int, int | None, str], None]:
    last, finished, said = -SILENCE, False, ""

    def show(done: int, total: int | None, detail: str) -> None:
        nonlocal last, finished, said
        now = time.monotonic()
        if finished or (now - last < SILENCE and done != total):
            return
        last, finished = now, done == total
        of = f"/{total:,}" if total is not None else ""
        line = f"{name}: {done:,}{of} {detail}".rstrip()
        if line != said:
            print(line, file=sys.stderr, flush=True)
        said = line

    return show
