"""Training in a process that is killed at a chosen moment."""

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

# The fork server imports this module, and so torch, once; each run is a fork of it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["helpers.kill", "torch.utils.tensorboard"])

AuditEvent = tuple[str, str]
"""An audit event of Python and the end of its path: ("os.mkdir", "run")."""


def train_until(config: TrainConfig, folder: Path, last: AuditEvent) -> None:
    """Train, and kill this process just before the first such event."""

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == last[0] and str(args[0]).endswith(last[1]):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    train(config, folder)


def run_killed_before(config: TrainConfig, folder: Path, last: AuditEvent) -> int | None:
    """Exit code of `train_until` in a process: -9 if killed, 0 if it finished."""
    process = PROCESSES.Process(target=train_until, args=(config, folder, last))
    process.start()
    process.join()
    return process.exitcode


def run_killed_when(config: TrainConfig, folder: Path, moment: Callable[[], bool]) -> int | None:
    """Exit code of a training process that is killed once `moment()` is true."""
    process = PROCESSES.Process(target=train, args=(config, folder))
    process.start()
    while process.is_alive() and not moment():
        time.sleep(0.0002)
    process.kill()
    process.join()
    return process.exitcode
