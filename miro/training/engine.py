"""The training engine, the one user of DeepSpeed: precision, sharding, gradients and state.

The training loop calls `predict`, `backward` and `step`. Every run uses DeepSpeed, also one of a
single process.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from miro.model.compiled import CompiledModel
from miro.model.packed_text import PackedText
from miro.model.transformer import FlowTransformer, RewardCond
from miro.training.batch_plan import (
    DTYPES,
    BatchPlan,
    Precision,
    deepspeed_config,
    unsupported,
)
from miro.training.deepspeed_internals import (
    Zero3Internals,
    Zero12Internals,
    disable_gradient_allreduce,
    disable_op_builders,
    full_shape,
    memory_efficient_linear,
)
from miro.training.optimizer import (
    GradientClipper,
    OptimizerConfig,
    ema_decay,
    lr_multiplier,
    make_optimizer,
)
from miro.training.zero_shards import NoShards, Partition, ShardSlice, ZeroShards
from miro.utils.distributed import DistEnv, init_distributed


def cast_parameters(model: FlowTransformer, precision: Precision) -> FlowTransformer:
    """Cast the parameters to `precision` in place; buffers (position embedding, RoPE) stay fp32."""
    for param in model.parameters():
        param.data = param.data.to(DTYPES[precision])
    return model


class Engine:
    """A model in training: this rank's part of its weights, gradients and optimizer state.

    In bf16 parameters and activations are bf16, with fp32 master weights.
    """

    def __init__(
        self,
        model: FlowTransformer,
        config: OptimizerConfig,
        plan: BatchPlan,
        *,
        total_images: int,
        precision: Precision = "fp32",
        compiled: bool = False,
        device: str | torch.device = "cpu",
        env: DistEnv = DistEnv(),  # noqa: B008 frozen
    ) -> None:
        if problem := unsupported(plan, config.name, precision, compiled):
            raise ValueError(problem)
        self.config, self.plan, self.total_images = config, plan, total_images
        self.env, self.device = env, torch.device(device)
        self.gradient_clipper = GradientClipper(config, self.device)
        # The fp32 weights before rounding to bf16 become the master weights.
        initial = {name: p.detach().clone() for name, p in model.named_parameters()}
        if not plan.stage:
            cast_parameters(model, precision)
            for param in model.parameters():
                param.grad_dtype = plan.optimizer_dtypes(precision)[1]
        self.model = model.to(self.device)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(config, self.parameters.items())
        self.deepspeed = _initialize_deepspeed(
            CompiledModel(self.model, compiled),
            self.optimizer,
            deepspeed_config(plan, precision, self.device.type),
            self.device.type,
        )
        self._linear = memory_efficient_linear if plan.stage == 3 else nullcontext
        self.partition = self._make_partition()
        self._init_master_and_ema(initial)

    def _make_partition(self) -> Partition:
        if self.plan.stage == 0:
            return NoShards(self.parameters, self.optimizer, self.env.rank, self.env.world)
        zero = self.deepspeed.optimizer
        internals = (
            Zero3Internals(zero, self.env.rank) if self.plan.stage == 3 else Zero12Internals(zero)
        )
        return ZeroShards(self.parameters, self.optimizer, internals)

    @torch.no_grad()
    def _init_master_and_ema(self, initial: Mapping[str, Tensor]) -> None:
        """Set master and EMA weights to the given fp32 weights."""
        flat = {name: weights.view(-1) for name, weights in initial.items()}
        for shard in self.partition.shards():
            for key in ("master", "ema"):
                values = flat[shard.name][shard.start : shard.start + shard.size]
                shard.tensors[key].copy_(values)
        self.partition.sync_params_from_master()

    def predict(self, x_t: Tensor, t: Tensor, rewards: RewardCond, text: PackedText) -> Tensor:
        """Predict (B, C, H, W) from this rank's noised latents x_t (B, C, H, W) at t (B,)."""
        with self._linear():
            return self.deepspeed(x_t, t, rewards, text)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a micro-batch's mean loss."""
        with self._linear():
            self.deepspeed.backward(loss)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # Advances DeepSpeed's micro-step counter only.

    def step(self, images: int) -> Tensor:
        """Clip the gradients and update the weights, or skip the step after `images` images.

        Returns:
            The gradient norm before clipping, on the device: there is no host sync.
        """
        assert self.deepspeed.is_gradient_accumulation_boundary()
        norm = self._gradient_norm()
        scale = self.gradient_clipper.scale(norm)
        self.optimizer.grad_scale = scale.cpu() if self.plan.offload != "none" else scale
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * lr_multiplier(
                self.config, images, self.total_images
            )
            group["ema_decay"] = ema_decay(self.config, images, self.plan.batch)
        self.deepspeed.step()
        return norm

    def _gradient_norm(self) -> Tensor:
        grads = self.partition.gradients()
        norm = nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        norm = norm.to(self.device, torch.float32)
        if self.plan.stage and self.env.world > 1:
            norm = norm.square()
            dist.all_reduce(norm)
            norm = norm.sqrt()
        return norm

    @torch.no_grad()
    def ema_state_dict(self) -> dict[str, Tensor]:
        """Return the fp32 EMA weights by parameter name, on rank 0; a collective of all ranks."""
        shards = {shard.name: shard for shard in self.partition.shards()}
        if not self.plan.stage:
            return self._unflatten({name: shard.tensors["ema"] for name, shard in shards.items()})
        whole = {}
        for name, param in self.parameters.items():
            full = torch.zeros(math.prod(full_shape(param)), device=self.device)
            if (shard := shards.get(name)) is not None:
                full[shard.start : shard.start + shard.size] = shard.tensors["ema"]
            if self.env.world > 1:
                dist.reduce(full, dst=0)
            if self.env.first:
                whole[name] = full.cpu()
        return self._unflatten(whole)

    def _unflatten(self, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.view(self.shapes[name]) for name, tensor in flat.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Unsharded shape of each parameter."""
        return {name: full_shape(param) for name, param in self.parameters.items()}

    def checkpoint_state(self) -> tuple[Iterator[ShardSlice], dict[str, Any]]:
        """Return this rank's shards, as views, and the state of all ranks as plain numbers."""
        steps = {state["step"] for state in self.optimizer.state.values()}
        state = {
            "step": max(steps, default=0),
            "gradient_clipper": self.gradient_clipper.state_dict(),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }
        return self.partition.checkpoint_shards(), state

    @torch.no_grad()
    def load_state(
        self, read: Callable[[str, ShardSlice], Tensor], state: Mapping[str, Any]
    ) -> None:
        """Restore what `checkpoint_state` returned, at any ZeRO stage and world size.

        `read` maps (key, shard) to the saved values; raises ValueError as `check_state`.
        """
        self.check_state(state)
        for shard in self.partition.shards():
            for key, tensor in shard.tensors.items():
                tensor.copy_(read(key, shard))
        self.partition.sync_params_from_master()
        for param_state in self.optimizer.state.values():
            param_state["step"] = int(state["step"])
        self.gradient_clipper.load_state_dict(state["gradient_clipper"])

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError with the first difference if a saved state is of another network."""
        ours = {name: list(shape) for name, shape in self.shapes.items()}
        theirs = state.get("shapes", {})
        for name in sorted(ours.keys() | theirs.keys()):
            found, expected = theirs.get(name), ours.get(name)
            if found != expected:
                raise ValueError(
                    f"the checkpoint is of another network: {name} has shape {found}, this network "
                    f"{expected}"
                )


def _initialize_deepspeed(
    module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], device: str
) -> Any:
    """Build DeepSpeed's engine in the run's process group."""
    init_distributed(device)
    # Read at DeepSpeed's first import, which would otherwise choose any GPU of the machine.
    os.environ.setdefault("DS_ACCELERATOR", device)
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    # It logs its whole configuration at INFO and warns of optimizers that are not its own.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    disable_op_builders()
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    if dist.get_world_size() == 1 and not config["zero_optimization"]["stage"]:
        disable_gradient_allreduce(engine)
    return engine
