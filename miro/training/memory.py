"""Estimated device memory of a rank, and the lowest ZeRO stage that fits.

The formulas follow what the engine and DeepSpeed 0.19 allocate; `tests/miro/test_memory.py`
compares them with the measured memory of processes.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, fields

import torch

from miro.model.transformer import FlowTransformer, ModelConfig
from miro.training.batch_plan import BUCKET, BatchPlan, Precision, Stage, plan_batch
from miro.training.config import TrainConfig
from miro.utils.distributed import DistEnv

log = logging.getLogger(__name__)

# The rest is for fragmentation of the allocator, NCCL, and workspaces of libraries.
USABLE = 0.9


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one rank, by purpose."""

    weights: float
    gradients: float
    masters: float
    """fp32 master weights, where the weights of forward are another copy."""
    moments: float
    average: float
    """EMA weights."""
    buffers: float
    """Buckets of reductions and all-gathers."""
    activations: float

    @property
    def total(self) -> float:
        """Sum over all purposes."""
        return sum(getattr(self, field.name) for field in fields(self))


def parameter_count(
    config: ModelConfig, latent: tuple[int, int, int], text: int, rewards: int
) -> int:
    """Count parameters for latents (C, H, W), `text` channels and `rewards`; allocates nothing."""
    with torch.device("meta"):
        model = FlowTransformer(config, latent, text, rewards)
    return sum(param.numel() for param in model.parameters())


def activation_bytes(
    config: ModelConfig, latent: tuple[int, int, int], plan: BatchPlan, precision: Precision
) -> float:
    """Estimate the activations that a micro-batch saves for backward, with the fused kernels.

    A block saves 12 tensors of the model's width (residual stream, its norm and the branch
    of both sub-layers; q, k and v; q and k after RoPE; the attention output) and 3 of the MLP's
    width.
    """
    _, height, width = latent
    tokens = plan.micro_batch * (height // config.patch) * (width // config.patch)
    size = 2 if precision == "bf16" else 4
    block = size * tokens * (12 * config.channels + 3 * config.hidden)
    if plan.activation_checkpointing:
        return block + config.depth * size * tokens * 2 * config.channels
    return config.depth * block


def estimate(
    parameters: int, plan: BatchPlan, precision: Precision, *, activations: float = 0.0
) -> Memory:
    """Estimate the device memory of one rank; `activations` are bytes by `activation_bytes`."""
    stage, world = plan.stage, plan.world
    low = 2 if precision == "bf16" else 4
    # Stage 1 shards the optimizer state, 2 also the gradients, 3 also the weights.
    state = parameters / world if stage >= 1 else parameters
    weights = parameters / world if stage >= 3 else parameters
    offloaded = plan.offload != "none"
    own_masters = precision == "bf16" or stage in (1, 2)
    if stage == 0:
        gradients = (4 if plan.accumulation > 1 else low) * parameters
    elif stage == 1:
        # Unsharded during backward, which is the peak.
        gradients = low * parameters
    else:
        # This rank's shard in fp32 for accumulation and, separately, as reduced.
        reduced = low if stage == 3 or precision == "bf16" else 0
        gradients = (reduced + 4) * state if not offloaded else 0.0
    bucket = low * min(BUCKET, parameters)
    if stage == 0:
        # DeepSpeed all-reduces a flat copy of all gradients.
        buffers = gradients if world > 1 else 0.0
    elif stage < 3:
        # The bucket being filled and, at stage 2, its flat copy.
        buffers = stage * bucket
    else:
        # Those two, and the all-gathered weights not yet released.
        buffers = 3 * bucket
    return Memory(
        weights=0.0 if plan.offload == "parameters" else low * weights,
        gradients=gradients,
        masters=4 * state if own_masters and not offloaded else 0.0,
        moments=0.0 if offloaded else 8 * state,
        average=0.0 if offloaded else 4 * state,
        buffers=buffers,
        activations=activations,
    )


def capacity(device: torch.device, local_world: int) -> float:
    """Return the bytes of a rank's GPU, or of host memory divided by `local_world` ranks."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / local_world


def choose_stage(
    config: TrainConfig,
    latent: tuple[int, int, int],
    text: int,
    rewards: int,
    env: DistEnv,
    device: torch.device,
) -> Stage:
    """Return the configured ZeRO stage or, for auto, the lowest that fits; logs the estimates.

    `latent` (C, H, W) is the largest shape of the dataset; `text`, the channels of its states.
    """
    sharding = config.sharding
    if sharding.stage != "auto":
        return int(sharding.stage)  # pyright: ignore[reportReturnType]
    if config.optimizer.name == "muon" or (env.world == 1 and sharding.offload == "none"):
        return 0
    parameters = parameter_count(config.model, latent, text, rewards)
    local_world = int(
        os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1
    )
    available = USABLE * capacity(device, local_world)
    lowest: Stage = {"none": 0, "optimizer": 1, "parameters": 3}[sharding.offload]  # pyright: ignore
    stages: list[Stage] = [0, 1, 2, 3]
    lines = []
    for stage in stages[lowest:]:
        plan = plan_batch(sharding, batch=config.batch, world=env.world, stage=stage)
        if stage == 1 and config.precision == "bf16" and plan.accumulation > 1:
            continue  # Stage 1 would accumulate in bf16, which the engine refuses.
        activations = activation_bytes(config.model, latent, plan, config.precision)
        memory = estimate(parameters, plan, config.precision, activations=activations)
        parts = ", ".join(f"{f.name} {getattr(memory, f.name) / 2**30:.2f}" for f in fields(memory))
        lines.append(f"stage {stage}: {memory.total / 2**30:.2f} GiB ({parts})")
        if memory.total <= available or stage == 3:
            lines.append(
                f"sharding.stage=auto takes {stage}; a rank has {available / 2**30:.1f} GiB"
            )
            if env.first:
                log.info("\n".join(lines))
            if memory.total > available:
                log.warning("by this estimate even stage 3 does not fit: try a smaller micro_batch")
            return stage
    raise AssertionError("stage 3 is always returned")
