"""What a rank's part of a run takes of its device's memory, and the stage of ZeRO that fits.

Counted from what the engine and DeepSpeed 0.19 keep, in bytes; `tests/miro/test_memory.py` holds it
against measured processes.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, fields

import torch

from miro.model.transformer import FlowTransformer, ModelConfig
from miro.training.batch_plan import BUCKET, BatchPlan, Precision, ShardingConfig, Stage, plan_batch
from miro.training.config import TrainConfig
from miro.utils.distributed import DistEnv

log = logging.getLogger(__name__)

# What is left to the allocator's gaps, NCCL and the libraries' own workspaces.
USABLE = 0.9


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one rank."""

    weights: float
    gradients: float
    masters: float
    """fp32 weights, where they are not those computed with."""
    moments: float
    average: float
    buffers: float
    """Of reductions and gathers."""
    activations: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def parameter_count(
    config: ModelConfig, latent: tuple[int, int, int], text: int, rewards: int
) -> int:
    """Parameters of the network, without making it."""
    with torch.device("meta"):
        model = FlowTransformer(config, latent, text, rewards)
    return sum(param.numel() for param in model.parameters())


def activation_bytes(
    config: ModelConfig, latent: tuple[int, int, int], layout: BatchPlan, precision: Precision
) -> float:
    """What forward keeps for backward, of one micro-batch, with the fused kernels.

    A block keeps 12 tensors as wide as the tokens (the residual stream, the normed, the branch, of
    both halves; q, k and v, and q and k turned; what attention read) and three as wide as the MLP.
    """
    _, height, width = latent
    tokens = layout.micro_batch * (height // config.patch) * (width // config.patch)
    size = 2 if precision == "bf16" else 4
    block = size * tokens * (12 * config.channels + 3 * config.hidden)
    if layout.activation_checkpointing:
        return block + config.depth * size * tokens * 2 * config.channels
    return config.depth * block


def estimate(
    parameters: int, layout: BatchPlan, precision: Precision, *, activations: float = 0.0
) -> Memory:
    """The memory of one rank of a layout, on its device."""
    stage, world = layout.stage, layout.world
    low = 2 if precision == "bf16" else 4
    # What each stage cuts: 1 the optimizer's state, 2 the gradients as well, 3 the weights too.
    state = parameters / world if stage >= 1 else parameters
    weights = parameters / world if stage >= 3 else parameters
    on_host = layout.offload != "none"
    own_masters = precision == "bf16" or stage in (1, 2)
    if stage == 0:
        gradients = (4 if layout.accumulation > 1 else low) * parameters
    elif stage == 1:
        # Whole as they come; what remains at the step is less.
        gradients = low * parameters
    else:
        # This rank's part in the fp32 they add up in and, apart from that, as reduced.
        reduced = low if stage == 3 or precision == "bf16" else 0
        gradients = (reduced + 4) * state if not on_host else 0.0
    bucket = low * min(BUCKET, parameters)
    if stage == 0:
        # All-reduced as one flat copy, where there is anyone to reduce with.
        buffers = gradients if world > 1 else 0.0
    elif stage < 3:
        # The bucket that is filled and, where gradients are not kept whole, its flat copy.
        buffers = stage * bucket
    else:
        # Those two, and weights gathered ahead and not yet let go.
        buffers = 3 * bucket
    return Memory(
        weights=0.0 if layout.offload == "parameters" else low * weights,
        gradients=gradients,
        masters=4 * state if own_masters and not on_host else 0.0,
        moments=0.0 if on_host else 8 * state,
        average=0.0 if on_host else 4 * state,
        buffers=buffers,
        activations=activations,
    )


def capacity(device: torch.device, on_this_machine: int) -> float:
    """Bytes that one rank may use of its device, `on_this_machine` ranks sharing a host's."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / on_this_machine


def choose_stage(
    config: TrainConfig,
    latent: tuple[int, int, int],
    text: int,
    rewards: int,
    ranks: DistEnv,
    device: torch.device,
) -> Stage:
    """The configured stage of ZeRO or, where it says auto, the lowest that fits; says which."""
    sharding: ShardingConfig = config.sharding
    if sharding.stage != "auto":
        return int(sharding.stage)  # pyright: ignore[reportReturnType]
    if config.optimizer.name == "muon" or (ranks.world == 1 and sharding.offload == "none"):
        return 0
    parameters = parameter_count(config.model, latent, text, rewards)
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1)
    room = USABLE * capacity(device, here)
    least: Stage = {"none": 0, "optimizer": 1, "parameters": 3}[sharding.offload]  # pyright: ignore
    stages: list[Stage] = [0, 1, 2, 3]
    lines = []
    for stage in stages[least:]:
        layout = plan_batch(sharding, batch=config.batch, world=ranks.world, stage=stage)
        if stage == 1 and config.precision == "bf16" and layout.accumulation > 1:
            continue  # The engine refuses it: it would add up in bf16.
        kept = activation_bytes(config.model, latent, layout, config.precision)
        memory = estimate(parameters, layout, config.precision, activations=kept)
        parts = ", ".join(f"{f.name} {getattr(memory, f.name) / 2**30:.2f}" for f in fields(memory))
        lines.append(f"stage {stage}: {memory.total / 2**30:.2f} GiB ({parts})")
        if memory.total <= room or stage == 3:
            lines.append(f"sharding.stage=auto takes {stage}; a rank has {room / 2**30:.1f} GiB")
            if ranks.first:
                log.info("\n".join(lines))
            if memory.total > room:
                log.warning("by this estimate even stage 3 does not fit: try a smaller micro_batch")
            return stage
    raise AssertionError("stage 3 is always returned")
