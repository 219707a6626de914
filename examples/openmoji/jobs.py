"""A few jobs that depend on one another, run side by side in processes of one thread each."""

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
"""What a job calls with (done, total, detail) as it goes."""


@dataclass(frozen=True)
class Job:
    """`function(*arguments, report)` in a process of its own, once the jobs it needs are done.

    Jobs are started in the order they are listed, as far as their needs allow. Functions and
    arguments must be picklable. A job that was done in an earlier call must return at once.
    """

    name: str
    function: Callable[..., object]
    arguments: tuple[Any, ...] = ()
    needs: tuple[str, ...] = ()


def run_jobs(jobs: Sequence[Job], workers: int) -> dict[str, float]:
    """Run all jobs, at most `workers` at a time; the seconds each took, by name.

    Raises:
        Exception: the first error of a job, once the jobs that were running have ended; those not
            started are left.
    """
    names = [job.name for job in jobs]
    for job in jobs:
        assert set(job.needs) <= set(names) - {job.name}, f"{job.name} needs what is not listed"
    context = multiprocessing.get_context("spawn")
    waiting, running = list(jobs), {}
    seconds: dict[str, float] = {}
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(workers, context, _begin, (os.getpid(),)) as pool,
        _display(manager.dict(), names) as board,
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


def _begin(parent: int) -> None:
    """Prepare a worker: one thread, and no life beyond its parent's."""
    import torch

    torch.set_num_threads(1)

    def watch() -> None:
        # A parent that is killed cannot stop its workers, and two of them must not share a folder.
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(job: Job, board: MutableMapping[str, tuple[int, int | None, str]]) -> float:
    started, last = time.perf_counter(), 0.0

    def report(done: int, total: int | None, detail: str) -> None:
        nonlocal last
        now = time.perf_counter()
        # A message to another process costs more than a step of a small job.
        if now - last > 0.5 or done == total:
            last = now
            board[job.name] = (done, total, detail)

    board[job.name] = (0, None, "")
    job.function(*job.arguments, report)
    taken = time.perf_counter() - started
    board[job.name] = (1, 1, f"{taken:.0f} s")
    return taken


@contextmanager
def _display(
    board: MutableMapping[str, tuple[int, int | None, str]], names: Sequence[str]
) -> Iterator[MutableMapping[str, tuple[int, int | None, str]]]:
    """Show the board while the jobs run."""
    over = threading.Event()

    def follow() -> None:
        with many() as show:
            while not over.wait(0.5):
                for name, (done, total, detail) in dict(board).items():
                    show(name, done, total, detail)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        over.set()
        thread.join()
