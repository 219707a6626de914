"""The processes of a run: which one this is, and what they do together.

torchrun, DeepSpeed's launcher and SLURM each say it in variables of the environment. Without any,
the run is this one process.
"""

from __future__ import annotations

import datetime
import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

# A rank that waits longer than this for another gives up, and the launcher ends the run.
TIMEOUT = datetime.timedelta(minutes=30)
# sysexits.h, EX_TEMPFAIL: "the user is invited to retry". Schedulers requeue on it.
EXIT_STOPPED = 75


def part() -> None:
    """Let go of the other processes, if there are any, once all is done."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()


class Stopped(RuntimeError):
    """The run was told to stop, and saved before it did."""


@dataclass(frozen=True)
class DistEnv:
    """This process among those of the run."""

    rank: int = 0
    world: int = 1
    local: int = 0
    """Which of its machine's processes it is; its GPU has the same number."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what only one may write."""
        return self.rank == 0

    def device(self, kind: str) -> torch.device:
        """This process's device: its own GPU where `kind` is cuda."""
        if kind != "cuda":
            return torch.device(kind)
        if torch.cuda.is_available() and self.local >= torch.cuda.device_count():
            raise ValueError(
                f"process {self.local} of this machine has no GPU: there are "
                f"{torch.cuda.device_count()}; start one process a GPU"
            )
        return torch.device("cuda", self.local)

    def on_first(self, action: Callable[[], None]) -> None:
        """Do it on the first rank, and let the others wait; an error is raised on all of them."""
        error = None
        if self.first:
            try:
                action()
            except (ValueError, OSError) as raised:
                error = raised
        if self.world > 1:
            told: list[str | None] = [None if error is None else str(error)]
            dist.broadcast_object_list(told, src=0)
            if not self.first and told[0] is not None:
                raise ValueError(told[0])
        if error is not None:
            raise error

    def all_true(self, mine: bool) -> bool:
        """Whether it is so on every rank."""
        if self.world == 1:
            return mine
        flag = torch.tensor(int(mine))
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)


def dist_env(environment: Mapping[str, str]) -> DistEnv:
    """What the launcher said.

    Raises:
        ValueError: it said only part of it, or nonsense.
    """
    for rank, world, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ):
        given = [environment.get(name) for name in (rank, world, local)]
        # A shell inside a SLURM allocation has SLURM_NTASKS, but is no task.
        if given[0] is None:
            continue
        try:
            found = DistEnv(*(int(value or "") for value in given))
        except ValueError:
            raise ValueError(
                f"{rank}, {world} and {local} must all be numbers, got {given}: start the run "
                "with torchrun, deepspeed or srun, or with none of these variables set"
            ) from None
        if not (0 <= found.rank < found.world and 0 <= found.local <= found.rank):
            raise ValueError(f"{rank}={found.rank} and {local}={found.local} of {found.world}")
        return found
    return DistEnv()


def join(kind: str) -> DistEnv:
    """Meet the other processes of the run, once a process; `kind` is of the device they use."""
    ranks = dist_env(os.environ)
    if dist.is_initialized():
        return ranks
    # What is on the host travels by gloo, so that no agreement waits for a GPU.
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if ranks.world == 1:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
    else:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise ValueError(
                    f"{name} is not set: processes of several machines meet at that address; "
                    "launch/slurm.sh shows how"
                )
        dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.world, timeout=TIMEOUT)
    return ranks


def cpu_process_group(ranks: DistEnv) -> dist.ProcessGroup | None:
    """A group of all ranks beside the one of the training, for what may overlap with it."""
    if ranks.world == 1:
        return None
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


class StopSignal:
    """A scheduler's warning (SIGTERM) or a lost terminal, as all ranks see it: after the same step.

    Each step's answer is reduced on the host while the next step is computed, so nothing waits for
    a device and little for the network; all ranks stop one step after the first one was told.
    """

    def __init__(self, ranks: DistEnv) -> None:
        self.ranks, self.told = ranks, False
        self._flag = torch.zeros((), dtype=torch.int32)
        self._work: dist.Work | None = None
        self._group = cpu_process_group(ranks)

    def __enter__(self) -> StopSignal:
        self._before = {}
        # Python lets only the main thread hear signals: a caller in another one stops itself.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if self._work is not None and kind in (None, Stopped):
            # A rank that left before would break the connection under the others' last answer.
            self._work.wait()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.told = True

    def should_stop(self) -> bool:
        """Whether to stop now; every rank calls it once a step and gets the same answer."""
        if self.ranks.world == 1:
            return self.told
        if self._work is not None:
            self._work.wait()
        stop = bool(self._flag)
        self._flag = torch.tensor(int(self.told), dtype=torch.int32)
        self._work = dist.all_reduce(
            self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return stop
