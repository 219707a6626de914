"""Private names of DeepSpeed that miro uses; tests/miro/test_deepspeed_internals.py checks them.

ZeRO stages 1 and 2 concatenate the parameters of a group to one flat tensor and give each rank a
range of it; stage 3 shards each parameter by itself. Both store this rank's fp32 weights in flat
tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


def disable_op_builders() -> None:
    """Stop DeepSpeed from testing a compiler for each of its own kernels; none is used."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]


def disable_gradient_allreduce(engine: Any) -> None:
    """Turn off stage 0's all-reduce, which copies every gradient even in a world of one."""
    engine.enable_backward_allreduce = False


@contextmanager
def memory_efficient_linear() -> Iterator[None]:
    """Use DeepSpeed's linear layer, for a forward or backward pass at stage 3.

    Autograd of torch's own saves a view of the gathered weight, which keeps it allocated until
    backward. DeepSpeed would replace `torch.nn.functional.linear` of the whole process for good.
    """
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    linear, functional.linear = functional.linear, zero3_linear_wrap
    try:
        yield
    finally:
        functional.linear = linear


def full_shape(param: nn.Parameter) -> tuple[int, ...]:
    """Return a parameter's unsharded shape; stage 3 leaves an empty tensor in its place."""
    return tuple(getattr(param, "ds_shape", param.shape))


class ShardLocation(NamedTuple):
    """This rank's shard of a parameter: flat[offset : offset + size]."""

    flat: Tensor  # fp32 weights that the optimizer updates
    offset: int
    start: int  # of the shard in the flattened parameter
    size: int


class Zero12Internals:
    """Stages 1 and 2 of ZeRO."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    def locate(self, param: nn.Parameter) -> ShardLocation | None:
        """Return where this rank's shard is, or None if other ranks have all of the parameter."""
        mapping = getattr(param, "_hp_mapping", None)
        if mapping is None:
            return None
        flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
        high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
        return ShardLocation(flat, high.start, low.start, high.numel)

    def gradients(self) -> list[Tensor]:
        """Return this rank's reduced gradients of the current step."""
        if self._zero.cpu_offload:
            return _flat_gradients(self._zero.single_partition_of_fp32_groups)
        return list(itertools.chain.from_iterable(self._zero.averaged_gradients.values()))

    def sync_params_from_master(self) -> None:
        """Copy the fp32 master weights to the parameters and all-gather them."""
        self._zero.update_lp_params()


class Zero3Internals:
    """Stage 3 of ZeRO."""

    def __init__(self, zero: Any, rank: int) -> None:
        self._zero, self._rank = zero, rank

    def locate(self, param: nn.Parameter) -> ShardLocation | None:
        """Return where this rank's shard is, or None if it is padding only."""
        group, offset, size = self._zero.grad_position[self._zero.get_param_id(param)]
        start = self._rank * size
        # The last rank's shard is padded.
        size = min(size, param.ds_numel - start)  # pyright: ignore[reportAttributeAccessIssue]
        if size <= 0:
            return None
        flat = self._zero.fp32_partitioned_groups_flat[group]
        return ShardLocation(flat, offset, start, size)

    def gradients(self) -> list[Tensor]:
        """Return this rank's reduced gradients of the current step."""
        if self._zero.offload_optimizer:
            return _flat_gradients(self._zero.fp32_partitioned_groups_flat)
        return list(itertools.chain.from_iterable(self._zero.averaged_gradients.values()))

    @torch.no_grad()
    def sync_params_from_master(self) -> None:
        """Copy the fp32 master weights to this rank's shards of the parameters."""
        zero = self._zero
        for low, high in zip(
            zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True
        ):
            low.copy_(high)
        if zero.persistent_parameters:
            # Small parameters stay gathered between steps, so shard and gather them again.
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _flat_gradients(flats: list[Tensor]) -> list[Tensor]:
    return [flat.grad for flat in flats if flat.grad is not None]
