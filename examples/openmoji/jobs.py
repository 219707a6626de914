"""A process pool for jobs with dependencies, one thread per process."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from miro.utils.progress import many

Report = Callable[[int, "int | None", str], None]
"""Progress callback of a job: (done, total, detail)."""
_Board = MutableMapping[str, tuple[int, "int | None", str]]


@dataclass(frozen=True)
class Job:
    """A call of `function(*arguments, report)` in a process of its own.

    Function and arguments must be picklable. A job must return at once if its output exists.

    Attributes:
        name: Unique among the jobs.
        function: What to call.
        arguments: Before the progress callback.
        needs: Names of the jobs that must be complete before it starts.
    """

    name: str
    function: Callable[..., object]
    arguments: tuple[Any, ...] = ()
    needs: tuple[str, ...] = ()


def run_jobs(jobs: Sequence[Job], workers: int) -> dict[str, float]:
    """Run all jobs, at most `workers` at a time, in the order listed as dependencies allow.

    Returns:
        Seconds of each job by name.

    Raises:
        Exception: The first error of a job. Running jobs end first, others are not started.
    """
    names = [job.name for job in jobs]
    for job in jobs:
        assert set(job.needs) <= set(names) - {job.name}, f"{job.name} needs an unknown job"
    context = multiprocessing.get_context("spawn")
    waiting, running = list(jobs), {}
    seconds: dict[str, float] = {}
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(workers, context, _initialize, (os.getpid(),)) as pool,
        _display(manager.dict()) as board,
    ):
        while waiting or running:
            for job in [job for job in waiting if set(job.needs) <= seconds.keys()]:
                if len(running) == workers:
                    break
                waiting.remove(job)
                running[pool.submit(_run, job, board)] = job
            finished: set[Future[float]] = wait(running, return_when=FIRST_COMPLETED).done
            for future in finished:
                try:
                    seconds[running.pop(future).name] = future.result()
                except BaseException:
                    for other in running:
                        other.cancel()
                    raise
    return seconds


def _initialize(parent: int) -> None:
    """Limit the process to one thread, and end it with its parent."""
    import torch

    torch.set_num_threads(1)

    def watch() -> None:
        # A killed parent cannot stop its workers; a worker that survives would write to the folder
        # at the same time as those of the next call.
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(job: Job, board: _Board) -> float:
    started, last = time.perf_counter(), 0.0

    def report(done: int, total: int | None, detail: str) -> None:
        nonlocal last
        now = time.perf_counter()
        # A message to another process takes longer than a step of a small job.
        if now - last > 0.5 or done == total:
            last = now
            board[job.name] = (done, total, detail)

    board[job.name] = (0, None, "")
    job.function(*job.arguments, report)
    taken = time.perf_counter() - started
    board[job.name] = (1, 1, f"{taken:.0f} s")
    return taken


@contextmanager
def _display(board: _Board) -> Iterator[_Board]:
    """Show the progress of all jobs in a thread."""
    stop = threading.Event()

    def follow() -> None:
        with many() as show:
            while not stop.wait(0.5):
                for name, (done, total, detail) in dict(board).items():
                    show(name, done, total, detail)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        stop.set()
        thread.join()
