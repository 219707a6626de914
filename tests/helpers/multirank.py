"""Runs of several ranks over gloo, each rank a process."""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from helpers.kill import PROCESSES

from miro.training.config import TrainConfig
from miro.training.loop import train
from miro.utils.stop_request import EXIT_STOPPED, Stopped

PROCESSES.set_forkserver_preload(["helpers.kill", "helpers.multirank", "torch.utils.tensorboard"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def as_rank(
    rank: int, world: int, port: int, log: Path, action: Callable[..., Any], arguments: Any
) -> None:
    """Set the launcher's variables in this process and run `action`."""
    variables = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logging.basicConfig(filename=log, level=logging.WARNING, force=True)
    try:
        action(*arguments)
    except Stopped:
        sys.exit(EXIT_STOPPED)
    except (ValueError, OSError, FloatingPointError) as error:
        logging.error("%s: %s", type(error).__name__, error)
        sys.exit(1)


class MultiRank:
    """`world` processes that run one action; as by a launcher, all end when one fails."""

    def __init__(
        self, world: int, folder: Path, *arguments: Any, action: Callable[..., Any] = train
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(world)]
        port = free_port()
        self.ranks: list[BaseProcess] = [
            PROCESSES.Process(
                target=as_rank, args=(rank, world, port, self.logs[rank], action, arguments)
            )
            for rank in range(world)
        ]
        for process in self.ranks:
            process.start()

    def wait(
        self, moment: Callable[[], bool] = lambda: False, kill: int | None = None
    ) -> list[Any]:
        """Wait for the exit codes; SIGKILL rank `kill` once `moment()` is true."""
        while any(process.is_alive() for process in self.ranks):
            if kill is not None and moment():
                os.kill(self.ranks[kill].pid or 0, signal.SIGKILL)
                kill = None
            if any(process.exitcode not in (None, 0, EXIT_STOPPED) for process in self.ranks):
                for process in self.ranks:
                    process.kill()
            time.sleep(0.002)
        return [process.exitcode for process in self.ranks]

    def terminate(self) -> None:
        """Send SIGTERM to all ranks, as a scheduler does."""
        for process in self.ranks:
            process.terminate()

    def log_text(self) -> str:
        """Return the logs of all ranks."""
        return "".join(log.read_text() for log in self.logs if log.exists())


def train_multirank(world: int, config: TrainConfig, folder: Path) -> None:
    """Train with `world` ranks to the end of the run."""
    processes = MultiRank(world, folder.with_name(f"{folder.name}-logs"), config, folder)
    codes = processes.wait()
    assert codes == [0] * world, processes.log_text()
