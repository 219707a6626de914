"""Training in a process of its own that is killed at a chosen moment. Imported by test_train."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from miro.training.config import TrainConfig
from miro.training.loop import train

# The server imports this file, and torch with it, once; each run is a fork of it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["helpers.kill", "torch.utils.tensorboard"])

Touch = tuple[str, str]
"""A name of Python's audit events and the end of the path it is about: ("os.mkdir", "run")."""


def train_until(config: TrainConfig, folder: Path, last: Touch) -> None:
    """Train, but die just before the first such touch of a file."""

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == last[0] and str(args[0]).endswith(last[1]):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    train(config, folder)


def run_killed_before(config: TrainConfig, folder: Path, last: Touch) -> int | None:
    """The exit code of `train_until`: -9 where it was killed, 0 where it came to its end."""
    process = PROCESSES.Process(target=train_until, args=(config, folder, last))
    process.start()
    process.join()
    return process.exitcode


def run_killed_when(config: TrainConfig, folder: Path, moment: Callable[[], bool]) -> int | None:
    """The exit code of a training that is killed as soon as `moment` is seen from outside."""
    process = PROCESSES.Process(target=train, args=(config, folder))
    process.start()
    while process.is_alive() and not moment():
        time.sleep(0.0002)
    process.kill()
    process.join()
    return process.exitcode
