"""Estimated device memory of a rank.

The formulas follow what the engine and DeepSpeed 0.19 allocate; `tests/miro/test_memory.py`
compares them with the measured memory of processes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields

import torch

from miro.model.transformer import FlowTransformer, ModelConfig
from miro.training.batch_plan import BUCKET, BatchPlan, Precision

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

    A block saves 12 tensors of the model's width (residual stream, its norm and the branch of both
    sub-layers; q, k and v; q and k after RoPE; the attention output) and 3 of the MLP's width.
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


def capacity(device: torch.device) -> float:
    """Return the bytes of a rank's GPU, or of host memory divided by the ranks of this machine."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    local_world = int(
        os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1
    )
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / local_world
