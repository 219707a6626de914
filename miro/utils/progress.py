"""Progress bars by rich; where stderr is no terminal, a line every few seconds."""

from __future__ import annotations

import logging
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

LINE_INTERVAL = 10.0  # seconds between two lines where the output is a file

# No markup, which would read a path such as sweep[lr] as a style; no line breaks inside paths.
console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


class ConsoleHandler(logging.Handler):
    """Log records as lines of the console, above a progress bar if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record; those below WARNING without their level."""
        level = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        console.print(level + self.format(record))


ProgressCallback = Callable[[int, int | None], None]
"""Receives the number of samples done and of all samples, None if that is unknown."""


def _progress() -> Progress:
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
    """Show one progress bar; yields a function of (done, total, detail)."""
    with many() as show:
        if console.is_terminal:
            show(name, 0, total, "")
        yield lambda done, total, detail: show(name, done, total, detail)


@contextmanager
def many() -> Iterator[Callable[[str, int, int | None, str], None]]:
    """Show several progress bars at once; yields a function of (name, done, total, detail)."""
    if not console.is_terminal:
        writers: dict[str, Callable[[int, int | None, str], None]] = {}

        def write_line(name: str, done: int, total: int | None, detail: str) -> None:
            writers.setdefault(name, _line_writer(name))(done, total, detail)

        yield write_line
        return
    with _progress() as progress:
        tasks: dict[str, TaskID] = {}

        def update_bar(name: str, done: int, total: int | None, detail: str) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=None, detail="")
            progress.update(tasks[name], completed=done, total=total, detail=detail)

        yield update_bar


@contextmanager
def counting(name: str) -> Iterator[ProgressCallback]:
    """Show progress over images with its rate; yields a function of (done, total or None)."""
    started = time.perf_counter()
    with bar(name) as show:

        def count(done: int, total: int | None) -> None:
            rate = done / max(time.perf_counter() - started, 1e-9)
            show(done, total, f"{rate:,.0f} images/s")

        yield count


def _line_writer(name: str) -> Callable[[int, int | None, str], None]:
    last, finished, previous = -LINE_INTERVAL, False, ""

    def write_line(done: int, total: int | None, detail: str) -> None:
        nonlocal last, finished, previous
        now = time.monotonic()
        if finished or (now - last < LINE_INTERVAL and done != total):
            return
        last, finished = now, done == total
        of = f"/{total:,}" if total is not None else ""
        line = f"{name}: {done:,}{of} {detail}".rstrip()
        if line != previous:
            print(line, file=sys.stderr, flush=True)
        previous = line

    return write_line
