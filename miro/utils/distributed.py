"""Processes of a distributed run: environment, process group, CPU collectives and SIGTERM.

torchrun, DeepSpeed's launcher and SLURM set the rank in environment variables; without any, a
run is one process.
"""

from __future__ import annotations

import datetime
import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

T = TypeVar("T")

# A collective that waits longer fails, and the launcher ends the run.
TIMEOUT = datetime.timedelta(minutes=30)
# sysexits.h, EX_TEMPFAIL: "the user is invited to retry". Schedulers requeue on it.
EXIT_STOPPED = 75


class Stopped(RuntimeError):
    """SIGTERM was received and the run saved a checkpoint."""


@dataclass(frozen=True)
class DistEnv:
    """Rank of this process and number of processes of the run."""

    rank: int = 0
    world: int = 1
    local: int = 0
    """Rank among the processes of this machine; also the index of this process's GPU."""

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes what only one process may write."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's items: every `world`-th one, from `rank` on."""
        return items[self.rank :: self.world]

    def device(self, kind: str) -> torch.device:
        """Return this process's device: its own GPU where `kind` is cuda.

        Raises:
            ValueError: the machine has fewer GPUs than processes.
        """
        if kind != "cuda":
            return torch.device(kind)
        if torch.cuda.is_available() and self.local >= torch.cuda.device_count():
            raise ValueError(
                f"process {self.local} of this machine has no GPU: there are "
                f"{torch.cuda.device_count()}; start one process per GPU"
            )
        return torch.device("cuda", self.local)

    def on_first(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0 while the others wait; its error is raised on all ranks."""
        error = None
        if self.first:
            try:
                action()
            except (ValueError, OSError) as raised:
                error = raised
        if self.world > 1:
            message: list[str | None] = [None if error is None else str(error)]
            dist.broadcast_object_list(message, src=0)
            if not self.first and message[0] is not None:
                raise ValueError(message[0])
        if error is not None:
            raise error

    def all_true(self, value: bool) -> bool:
        """All-reduce a boolean with AND."""
        if self.world == 1:
            return value
        flag = torch.tensor(int(value))
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)


def dist_env(environment: Mapping[str, str]) -> DistEnv:
    """Read the rank from the variables of torchrun, DeepSpeed or SLURM.

    Raises:
        ValueError: some of the variables are missing or out of range.
    """
    for rank, world, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ):
        values = [environment.get(name) for name in (rank, world, local)]
        # An interactive shell in a SLURM allocation has SLURM_NTASKS but no SLURM_PROCID.
        if values[0] is None:
            continue
        try:
            env = DistEnv(*(int(value or "") for value in values))
        except ValueError:
            raise ValueError(
                f"{rank}, {world} and {local} must all be numbers, got {values}: start the run "
                "with torchrun, deepspeed or srun, or with none of these variables set"
            ) from None
        if not (0 <= env.rank < env.world and 0 <= env.local <= env.rank):
            raise ValueError(
                f"{rank}={env.rank}, {world}={env.world} and {local}={env.local} must satisfy "
                f"0 <= {local} <= {rank} < {world}"
            )
        return env
    return DistEnv()


def init_distributed(kind: str) -> DistEnv:
    """Initialize the default process group once; `kind` is the device type that the ranks use.

    Raises:
        ValueError: MASTER_ADDR or MASTER_PORT is missing in a run of several processes.
    """
    env = dist_env(os.environ)
    if dist.is_initialized():
        return env
    # Collectives on CPU tensors use gloo, so that agreeing on a flag never waits for a GPU.
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if env.world == 1:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
    else:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise ValueError(
                    f"{name} is not set: the processes of a run connect to that address; "
                    "launch/slurm.sh shows how to set it"
                )
        dist.init_process_group(backend, rank=env.rank, world_size=env.world, timeout=TIMEOUT)
    return env


def shutdown() -> None:
    """Destroy the process group of a run of several processes."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()


def cpu_process_group(env: DistEnv) -> dist.ProcessGroup | None:
    """Create a gloo group of all ranks for collectives that overlap with those of training."""
    if env.world == 1:
        return None
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


class StopSignal:
    """SIGTERM or SIGHUP to any rank, seen by all ranks after the same step.

    The flag of each step is all-reduced on the host while the next step is computed, so that it
    never waits for the device; all ranks stop one step after the signal.
    """

    def __init__(self, env: DistEnv) -> None:
        self.env, self.requested = env, False
        self._flag = torch.zeros((), dtype=torch.int32)
        self._work: dist.Work | None = None
        self._group = cpu_process_group(env)

    def __enter__(self) -> StopSignal:
        self._handlers = {}
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._work is not None and kind in (None, Stopped):
            # A rank that exits first would close the connection of the others' last all-reduce.
            self._work.wait()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def should_stop(self) -> bool:
        """Return whether to stop now; every rank calls it once a step and gets the same answer."""
        if self.env.world == 1:
            return self.requested
        if self._work is not None:
            self._work.wait()
        stop = bool(self._flag)
        self._flag = torch.tensor(int(self.requested), dtype=torch.int32)
        self._work = dist.all_reduce(
            self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return stop
