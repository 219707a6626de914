"""How a global batch is divided among ranks and micro-batches, and DeepSpeed's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Stage = Literal[0, 1, 2, 3]
# Elements that are reduced, or gathered ahead, at a time. DeepSpeed allocates as many at once.
BUCKET = 2**26


@dataclass(frozen=True)
class ShardingConfig:
    """How a run is cut among its processes. None of it changes what is learned."""

    stage: Literal["auto", "0", "1", "2", "3"] = "auto"
    """Stage of ZeRO: 1 cuts the optimizer's state among the ranks, 2 the gradients as well, 3 the
    weights too. auto takes the lowest that fits the device's memory by `miro.training.memory`'s estimate."""
    micro_batch: int | None = None
    """Images a process computes at a time; its share of a step is accumulated from as many as it
    takes. None takes the whole share at once."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What is kept in the host's memory: the optimizer's state (stages 1 to 3), or that and the
    weights (stage 3)."""
    activation_checkpointing: bool = False
    """Keep only the input of each block, and compute the rest again in backward."""

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"sharding.micro_batch must be at least 1, got {self.micro_batch}")
        needs = {"none": "0123", "optimizer": "123", "parameters": "3"}[self.offload]
        if self.stage != "auto" and self.stage not in needs:
            raise ValueError(
                f"sharding.offload={self.offload} works with sharding.stage "
                f"{' or '.join(needs)}, got {self.stage}"
            )


@dataclass(frozen=True)
class BatchPlan:
    """A resolved ShardingConfig: how one step of the run is computed."""

    stage: Stage
    world: int
    micro_batch: int
    accumulation: int
    offload: Literal["none", "optimizer", "parameters"] = "none"
    activation_checkpointing: bool = False

    @property
    def batch(self) -> int:
        """Images of an optimizer step."""
        return self.micro_batch * self.accumulation * self.world

    def optimized(self, precision: Precision) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of the parameters and of the gradients that the optimizer updates by."""
        low = DTYPES[precision]
        if self.stage:
            return torch.float32, torch.float32
        return low, torch.float32 if self.accumulation > 1 else low

    def positions(self, rank: int, images: int) -> list[int]:
        """Where each of a rank's micro-batches begins, of the step after `images` images."""
        return [
            images + (k * self.world + rank) * self.micro_batch for k in range(self.accumulation)
        ]


def plan_batch(config: ShardingConfig, *, batch: int, world: int, stage: Stage) -> BatchPlan:
    """The micro-batches of a step of `batch` images on `world` ranks.

    Raises:
        ValueError: they do not make up the batch.
    """
    if batch % world:
        raise ValueError(f"batch={batch} does not divide among {world} processes")
    micro = batch // world if config.micro_batch is None else config.micro_batch
    if batch % (world * micro):
        raise ValueError(
            f"batch={batch} is no multiple of sharding.micro_batch={micro} times {world} processes"
        )
    return BatchPlan(
        stage,
        world,
        micro,
        batch // (world * micro),
        config.offload,
        config.activation_checkpointing,
    )


def deepspeed_config(layout: BatchPlan, precision: Precision, device: str) -> dict[str, Any]:
    """DeepSpeed's dictionary; clipping is not in it, it happens inside our optimizer's kernel."""
    on_host = {"device": "cpu", "pin_memory": device == "cuda"}
    zero: dict[str, Any] = {"stage": layout.stage}
    if layout.stage:
        zero |= {"contiguous_gradients": True, "overlap_comm": device == "cuda"}
        zero |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if layout.stage == 3:
        zero |= {"stage3_prefetch_bucket_size": BUCKET, "stage3_max_live_parameters": 2 * BUCKET}
        zero["stage3_max_reuse_distance"] = BUCKET
    if layout.stage in (1, 2) and layout.offload == "none":
        # Ours is computed anyway, and DeepSpeed's would wait for the device.
        zero["compute_grad_norm"] = False
    if layout.offload != "none":
        zero["offload_optimizer"] = on_host
    if layout.offload == "parameters":
        zero["offload_param"] = on_host
    low_gradients = precision == "bf16" and (
        layout.stage or layout.optimized(precision)[1] == torch.bfloat16
    )
    found = {
        "train_batch_size": layout.batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": 0.0,
        # As the gradients are: DeepSpeed's default at stage 0 is fp32, twice the bytes of bf16.
        "communication_data_type": "bf16" if low_gradients else "fp32",
        "steps_per_print": None,
        # AdamWEMA, also on the host: DeepSpeed's own optimizers keep no average.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if precision == "bf16" and layout.stage:
        # At stage 0 our optimizer keeps the masters itself: DeepSpeed's way there loses accuracy.
        # A step that is not a number is skipped by our guard, which does not wait for the device.
        found["bf16"] = {"enabled": True, "check_grad_overflow": False}
        if layout.stage > 1:
            found["data_types"] = {"grad_accum_dtype": "fp32"}
    return found
