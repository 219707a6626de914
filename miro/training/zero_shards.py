"""Where a rank's part of each parameter lies, at each stage of ZeRO.

DeepSpeed lays parameters end to end and cuts the row among the ranks (stages 1 and 2), or cuts each
parameter by itself (stage 3). What a checkpoint and the gradients' norm need is the same in all:
the pieces of this rank, each a range of a parameter's elements, with its fp32 weights, average and
moments. Only this file knows where DeepSpeed keeps them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from miro_kernels import AdamWEMA


@dataclass(frozen=True)
class ShardSlice:
    """Elements start : start + size of a flattened parameter, as views of what a step updates.

    tensors: `master`, `ema` and the moments, each fp32 (size,).
    """

    name: str
    start: int
    tensors: dict[str, Tensor]

    @property
    def size(self) -> int:
        return self.tensors["master"].numel()


class Partition(Protocol):
    """What of the parameters this rank holds."""

    def pieces(self) -> Iterator[ShardSlice]:
        """All that this rank updates."""
        ...

    def saved(self) -> Iterator[ShardSlice]:
        """This rank's share of a checkpoint: those of all ranks are the parameters, once."""
        ...

    def gradients(self) -> list[Tensor]:
        """Of the step that is due, reduced; together those of all ranks, or the same on each."""
        ...

    def sync_params_from_master(self) -> None:
        """Make the weights that are computed with those of the fp32 masters."""
        ...


def _state(optimizer: AdamWEMA, weights: Tensor) -> dict[str, Tensor]:
    """The fp32 tensors behind optimized weights, which exist from here on."""
    optimizer.ema(weights)
    kept = {k: v for k, v in optimizer.state[weights].items() if isinstance(v, Tensor)}
    return {"master": optimizer.master(weights).detach(), **kept}


@dataclass
class NoShards:
    """Stage 0: every rank holds everything, and saves an even share."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: AdamWEMA
    rank: int
    world: int

    sharded = False

    def pieces(self) -> Iterator[ShardSlice]:
        for name, param in self.parameters.items():
            flat = {k: v.view(-1) for k, v in _state(self.optimizer, param).items()}
            yield ShardSlice(name, 0, flat)

    def saved(self) -> Iterator[ShardSlice]:
        for piece in self.pieces():
            share = -(-piece.size // self.world)
            start = min(self.rank * share, piece.size)
            part = slice(start, start + share)
            yield ShardSlice(piece.name, start, {k: v[part] for k, v in piece.tensors.items()})

    def gradients(self) -> list[Tensor]:
        return [param.grad for param in self.parameters.values() if param.grad is not None]

    @torch.no_grad()
    def sync_params_from_master(self) -> None:
        for param in self.parameters.values():
            master = self.optimizer.master(param)
            if master is not param:
                param.copy_(master)


@dataclass
class Zero12Shards:
    """Stages 1 and 2: a group's parameters end to end, cut into one range a rank."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: AdamWEMA
    zero: Any

    sharded = True

    def pieces(self) -> Iterator[ShardSlice]:
        for name, param in self.parameters.items():
            place = getattr(param, "_hp_mapping", None)
            if place is None:
                continue  # All of it is other ranks'.
            flat = self.zero.single_partition_of_fp32_groups[place.param_group_index]
            inside, own = place.hp_fragment_address, place.lp_fragment_address
            tensors = {
                key: tensor.narrow(0, inside.start, inside.numel)
                for key, tensor in _state(self.optimizer, flat).items()
            }
            yield ShardSlice(name, own.start, tensors)

    saved = pieces

    def gradients(self) -> list[Tensor]:
        if self.zero.cpu_offload:
            flats = self.zero.single_partition_of_fp32_groups
            return [flat.grad for flat in flats if flat.grad is not None]
        return list(itertools.chain.from_iterable(self.zero.averaged_gradients.values()))

    def sync_params_from_master(self) -> None:
        self.zero.update_lp_params()


@dataclass
class Zero3Shards:
    """Stage 3: each parameter cut into one range a rank, the last one padded."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: AdamWEMA
    zero: Any
    rank: int

    sharded = True

    def pieces(self) -> Iterator[ShardSlice]:
        for name, param in self.parameters.items():
            group, inside, size = self.zero.grad_position[self.zero.get_param_id(param)]
            start = self.rank * size
            size = min(size, param.ds_numel - start)  # pyright: ignore[reportAttributeAccessIssue]
            if size <= 0:
                continue  # Only padding.
            flat = self.zero.fp32_partitioned_groups_flat[group]
            tensors = _state(self.optimizer, flat)
            yield ShardSlice(
                name, start, {k: v.narrow(0, inside, size) for k, v in tensors.items()}
            )

    saved = pieces

    def gradients(self) -> list[Tensor]:
        if self.zero.offload_optimizer:
            flats = self.zero.fp32_partitioned_groups_flat
            return [flat.grad for flat in flats if flat.grad is not None]
        return list(itertools.chain.from_iterable(self.zero.averaged_gradients.values()))

    @torch.no_grad()
    def sync_params_from_master(self) -> None:
        zero = self.zero
        for low, high in zip(
            zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True
        ):
            low.copy_(high)
        if zero.persistent_parameters:
            # Small ones are kept whole between steps: cut and gather them anew.
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
