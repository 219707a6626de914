"""This rank's shards of the parameters and optimizer state, in one form for all ZeRO stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from miro.training.deepspeed_internals import Zero3Internals, Zero12Internals
from miro_kernels import AdamWEMA


@dataclass(frozen=True)
class ShardSlice:
    """Elements start : start + size of a flattened parameter.

    Attributes:
        name: of the parameter.
        start: first element.
        tensors: `master`, `ema` and the moments, each fp32 (size,), as views that a step updates.
    """

    name: str
    start: int
    tensors: dict[str, Tensor]

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.tensors["master"].numel()


class Partition(Protocol):
    """How parameters and optimizer state are divided over the ranks."""

    def shards(self) -> Iterator[ShardSlice]:
        """Iterate over what this rank updates."""
        ...

    def checkpoint_shards(self) -> Iterator[ShardSlice]:
        """Iterate over what this rank saves; all ranks together save every element once."""
        ...

    def gradients(self) -> list[Tensor]:
        """Return this rank's reduced gradients of the current step."""
        ...

    def sync_params_from_master(self) -> None:
        """Copy the fp32 master weights to the parameters that forward uses."""
        ...


def _optimizer_tensors(optimizer: AdamWEMA, weights: Tensor) -> dict[str, Tensor]:
    """Master weights and state of `weights`, created at the first call."""
    optimizer.ema(weights)
    state = {k: v for k, v in optimizer.state[weights].items() if isinstance(v, Tensor)}
    return {"master": optimizer.master(weights).detach(), **state}


@dataclass
class NoShards:
    """Stage 0: every rank has the whole state, and saves an equal part of it."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: AdamWEMA
    rank: int
    world: int

    def shards(self) -> Iterator[ShardSlice]:
        """Iterate over whole parameters."""
        for name, param in self.parameters.items():
            tensors = _optimizer_tensors(self.optimizer, param)
            yield ShardSlice(name, 0, {k: v.view(-1) for k, v in tensors.items()})

    def checkpoint_shards(self) -> Iterator[ShardSlice]:
        """Iterate over this rank's part of each parameter."""
        for shard in self.shards():
            share = -(-shard.size // self.world)
            start = min(self.rank * share, shard.size)
            part = slice(start, start + share)
            yield ShardSlice(shard.name, start, {k: v[part] for k, v in shard.tensors.items()})

    def gradients(self) -> list[Tensor]:
        """Return the all-reduced gradients."""
        return [param.grad for param in self.parameters.values() if param.grad is not None]

    @torch.no_grad()
    def sync_params_from_master(self) -> None:
        """Round the fp32 master weights to the parameters."""
        for param in self.parameters.values():
            master = self.optimizer.master(param)
            if master is not param:
                param.copy_(master)


@dataclass
class ZeroShards:
    """Stages 1 to 3: each rank has a range of each parameter, or none of it."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: AdamWEMA
    internals: Zero12Internals | Zero3Internals

    def shards(self) -> Iterator[ShardSlice]:
        """Iterate over this rank's ranges."""
        for name, param in self.parameters.items():
            if (found := self.internals.locate(param)) is None:
                continue
            tensors = _optimizer_tensors(self.optimizer, found.flat)
            part = slice(found.offset, found.offset + found.size)
            yield ShardSlice(name, found.start, {k: v[part] for k, v in tensors.items()})

    checkpoint_shards = shards

    def gradients(self) -> list[Tensor]:
        """Return this rank's reduced gradients of the current step."""
        return self.internals.gradients()

    def sync_params_from_master(self) -> None:
        """Copy the fp32 master weights to the parameters."""
        self.internals.sync_params_from_master()
