"""Processes of a distributed run: environment, process group, CPU collectives, stop requests.

torchrun, DeepSpeed's launcher and SLURM set the rank in environment variables; without any, a
run is one process.
"""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from miro.utils import stop_request

log = logging.getLogger(__name__)

T = TypeVar("T")

# A collective that waits longer fails, and the launcher ends the run.
TIMEOUT = datetime.timedelta(minutes=30)
# SLURM numbers job steps from 0; batch scripts and interactive shells have numbers from here on.
SLURM_SPECIAL_STEPS = 2**32 - 16


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
            ValueError: there is no GPU, or the machine has fewer than processes.
        """
        if kind != "cuda":
            return torch.device(kind)
        if not torch.cuda.is_available():
            raise ValueError(
                "device=cuda, but torch finds no GPU on this machine; choose device=cpu, or see "
                "whether nvidia-smi lists it and torch.version.cuda is not None"
            )
        count = torch.cuda.device_count()
        if count == 1 and _in_job_step(os.environ):
            return torch.device("cuda", 0)  # srun --gpus-per-task=1: each task sees its own only.
        if self.local >= count:
            raise ValueError(
                f"process {self.local} of this machine has no GPU: there are {count}; start one "
                "process per GPU"
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

    def check_equal(self, values: Mapping[str, str]) -> None:
        """Compare values by name over all ranks.

        Raises:
            ValueError: on all ranks, naming what differs on which ranks from rank 0.
        """
        if self.world == 1:
            return
        gathered: list[Mapping[str, str]] = [{}] * self.world
        dist.all_gather_object(gathered, values)
        for name, expected in gathered[0].items():
            others = [rank for rank, found in enumerate(gathered) if found[name] != expected]
            if others:
                raise ValueError(
                    f"ranks {', '.join(map(str, others))} have another {name} than rank 0; start "
                    "all ranks with the same options, on the same data"
                )

    def all_true(self, value: bool) -> bool:
        """All-reduce a boolean with AND."""
        if self.world == 1:
            return value
        flag = torch.tensor(int(value))
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)


def dist_env(environment: Mapping[str, str]) -> DistEnv:
    """Read the rank from the variables of torchrun, DeepSpeed or SLURM's srun.

    The shell of a batch script has SLURM_PROCID and SLURM_NTASKS too, but is one process: only a
    job step, which srun starts, has several.

    Raises:
        ValueError: some of the variables are missing or out of range.
    """
    for rank, world, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ):
        values = [environment.get(name) for name in (rank, world, local)]
        if values[0] is None or (rank == "SLURM_PROCID" and not _in_job_step(environment)):
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


def _in_job_step(environment: Mapping[str, str]) -> bool:
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < SLURM_SPECIAL_STEPS


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
    """A request to stop any rank, seen by all ranks after the same step.

    The flag of each step is all-reduced on the host while the next step is computed, so that it
    never waits for the device; all ranks stop one step after the signal.
    """

    def __init__(self, env: DistEnv) -> None:
        self.env = env
        self._flag = torch.zeros((), dtype=torch.int32)
        self._work: dist.Work | None = None
        self._group = cpu_process_group(env)

    def __enter__(self) -> StopSignal:
        self._restore = stop_request.listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._restore()
        if self._work is not None and kind in (None, stop_request.Stopped):
            # A rank that exits first would close the connection of the others' last all-reduce.
            self._work.wait()

    def should_stop(self) -> bool:
        """Return whether to stop now; every rank calls it once a step and gets the same answer."""
        if self.env.world == 1:
            return stop_request.requested()
        if self._work is not None:
            self._work.wait()
        stop = bool(self._flag)
        self._flag = torch.tensor(int(stop_request.requested()), dtype=torch.int32)
        self._work = dist.all_reduce(
            self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return stop
