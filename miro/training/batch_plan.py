"""Split of a global batch over ranks and micro-batches, and DeepSpeed's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Stage = Literal[0, 1, 2, 3]
# Elements per reduction or prefetched all-gather. DeepSpeed allocates buffers of this size.
BUCKET = 2**26


@dataclass(frozen=True)
class ShardingConfig:
    """How a run is sharded over its processes. It changes memory and speed, not what is learned."""

    stage: Literal["auto", "0", "1", "2", "3"] = "auto"
    """ZeRO stage: 1 shards the optimizer state, 2 also the gradients, 3 also the weights.
    `miro.training.planner` chooses what is auto or None: the fastest plan that fits."""
    micro_batch: int | None = None
    """Images per forward pass of a process; gradients of a step are accumulated over as many passes
    as its share of the batch needs."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """State in host memory: the optimizer's (stages 1 to 3), or also the weights (stage 3)."""
    activation_checkpointing: bool | None = None
    """Save only the input of each block and recompute its activations in backward."""

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"sharding.micro_batch must be at least 1, got {self.micro_batch}")
        needs = {"none": "0123", "optimizer": "123", "parameters": "3"}[self.offload]
        if self.stage != "auto" and self.stage not in needs:
            raise ValueError(
                f"sharding.offload={self.offload} needs sharding.stage "
                f"{' or '.join(needs)}, got {self.stage}"
            )


@dataclass(frozen=True)
class BatchPlan:
    """A resolved ShardingConfig: ZeRO stage, micro-batch and gradient accumulation of a step."""

    stage: Stage
    world: int
    micro_batch: int
    accumulation: int
    offload: Literal["none", "optimizer", "parameters"] = "none"
    activation_checkpointing: bool = False

    @property
    def batch(self) -> int:
        """Images per optimizer step."""
        return self.micro_batch * self.accumulation * self.world

    def optimizer_dtypes(self, precision: Precision) -> tuple[torch.dtype, torch.dtype]:
        """Return the dtypes of the parameters and of the gradients that the optimizer is given."""
        low = DTYPES[precision]
        if self.stage:
            return torch.float32, torch.float32
        return low, torch.float32 if self.accumulation > 1 else low

    def positions(self, rank: int, images: int) -> list[int]:
        """Return where the micro-batches of `rank` begin in the step after `images` images."""
        return [
            images + (k * self.world + rank) * self.micro_batch for k in range(self.accumulation)
        ]


def unsupported(plan: BatchPlan, optimizer: str, precision: Precision, compiled: bool) -> str:
    """Return why the engine does not support a combination, with the alternatives, or ""."""
    if plan.stage and optimizer == "muon":
        return (
            f"optimizer.name=muon needs whole matrices, and sharding.stage={plan.stage} "
            "shards them: choose adamw, or sharding.stage=0"
        )
    if compiled and plan.stage == 3:
        return (
            "compile=True does not work with sharding.stage=3, which gathers weights between "
            "layers: choose compile=False, or a lower stage"
        )
    if precision == "bf16" and plan.stage == 1 and plan.accumulation > 1:
        return (
            "sharding.stage=1 accumulates gradients in bf16, which loses precision over "
            f"{plan.accumulation} micro-batches: choose sharding.stage=2, "
            "which accumulates in fp32, or a larger sharding.micro_batch"
        )
    return ""


def deepspeed_config(plan: BatchPlan, precision: Precision, device: str) -> dict[str, Any]:
    """Return DeepSpeed's configuration; gradient clipping is done by our optimizer's kernel."""
    host = {"device": "cpu", "pin_memory": device == "cuda"}
    zero: dict[str, Any] = {"stage": plan.stage}
    if plan.stage:
        zero |= {"contiguous_gradients": True, "overlap_comm": device == "cuda"}
        zero |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if plan.stage == 3:
        zero |= {"stage3_prefetch_bucket_size": BUCKET, "stage3_max_live_parameters": 2 * BUCKET}
        zero["stage3_max_reuse_distance"] = BUCKET
        zero["memory_efficient_linear"] = False  # The engine does that, in its own passes only.
    if plan.stage in (1, 2) and plan.offload == "none":
        # The engine computes the gradient norm; DeepSpeed's `compute_grad_norm` adds a host sync.
        zero["compute_grad_norm"] = False
    if plan.offload != "none":
        zero["offload_optimizer"] = host
    if plan.offload == "parameters":
        zero["offload_param"] = host
    low_gradients = precision == "bf16" and (
        plan.stage or plan.optimizer_dtypes(precision)[1] == torch.bfloat16
    )
    config = {
        "train_batch_size": plan.batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": 0.0,
        # The dtype of the gradients: the default at stage 0 is fp32, twice the bytes of bf16.
        "communication_data_type": "bf16" if low_gradients else "fp32",
        "steps_per_print": None,
        # AdamWEMA also when offloaded: DeepSpeed's CPU optimizers have no EMA.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if precision == "bf16" and plan.stage:
        # At stage 0 AdamWEMA has the fp32 master weights, since DeepSpeed's bf16 mode is less
        # accurate. GradientClipper skips NaN steps without the host sync of `check_grad_overflow`.
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}
        if plan.stage > 1:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
