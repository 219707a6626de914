"""The training engine, and the one owner of DeepSpeed: precision, sharding, gradients and state.

The training loop calls `predict`, `backward` and `step`; how weights are kept, cut among ranks,
reduced and updated is decided here alone. Our configuration goes in, DeepSpeed's dictionary comes
out, and every run goes through it, also one of a single process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
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
)
from miro.training.optimizer import (
    GradientClipper,
    OptimizerConfig,
    ema_decay,
    lr_multiplier,
    make_optimizer,
)
from miro.training.zero_shards import NoShards, Partition, ShardSlice, Zero3Shards, Zero12Shards
from miro.utils.distributed import DistEnv, join


def cast_parameters(model: FlowTransformer, precision: Precision) -> FlowTransformer:
    """The model with its parameters in `precision`; fixed places and angles stay fp32."""
    for param in model.parameters():
        param.data = param.data.to(DTYPES[precision])
    return model


def _check(
    config: OptimizerConfig, layout: BatchPlan, precision: Precision, compiled: bool
) -> None:
    """ValueError for what does not go together, with what does."""
    if layout.stage and config.name == "muon":
        raise ValueError(
            f"optimizer.name=muon needs whole matrices, and sharding.stage={layout.stage} "
            "cuts them: choose adamw, or sharding.stage=0"
        )
    if compiled and layout.stage == 3:
        raise ValueError(
            "compile=True does not go with sharding.stage=3, which gathers weights between "
            "layers: choose compile=False, or a lower stage"
        )
    if precision == "bf16" and layout.stage == 1 and layout.accumulation > 1:
        raise ValueError(
            "sharding.stage=1 adds up the gradients of a step in bf16, which loses what they "
            f"differ in over {layout.accumulation} micro-batches: choose sharding.stage=2, "
            "which adds them up in fp32, or a larger sharding.micro_batch"
        )


class Engine:
    """A model under training, this rank's part of it.

    In `bf16` the parameters and activations are bf16, and fp32 masters are kept.
    """

    def __init__(
        self,
        model: FlowTransformer,
        config: OptimizerConfig,
        layout: BatchPlan,
        *,
        total_images: int,
        precision: Precision = "fp32",
        compiled: bool = False,
        device: str | torch.device = "cpu",
        ranks: DistEnv = DistEnv(),  # noqa: B008 frozen
    ) -> None:
        _check(config, layout, precision, compiled)
        self.config, self.layout, self.total_images = config, layout, total_images
        self.ranks, self.device = ranks, torch.device(device)
        self.guard = GradientClipper(config, self.device)
        # The fp32 weights exist before the rounding to bf16, and become the masters.
        initial = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert model.activation_checkpointing == layout.activation_checkpointing
        if not layout.stage:
            cast_parameters(model, precision)
            for param in model.parameters():
                param.grad_dtype = layout.optimized(precision)[1]
        self.model = model.to(self.device)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(config, self.parameters.items())
        self.deepspeed = _start(
            CompiledModel(self.model, compiled),
            self.optimizer,
            deepspeed_config(layout, precision, self.device.type),
            self.device.type,
        )
        self.partition = self._partition()
        self._init_master_and_ema(initial)

    def _partition(self) -> Partition:
        ranks, zero = self.ranks, self.deepspeed.optimizer
        if self.layout.stage == 0:
            return NoShards(self.parameters, self.optimizer, ranks.rank, ranks.world)
        if self.layout.stage == 3:
            return Zero3Shards(self.parameters, self.optimizer, zero, ranks.rank)
        return Zero12Shards(self.parameters, self.optimizer, zero)

    @torch.no_grad()
    def _init_master_and_ema(self, initial: Mapping[str, Tensor]) -> None:
        """Masters and averages are the given weights."""
        flat = {name: weights.view(-1) for name, weights in initial.items()}
        for piece in self.partition.pieces():
            for key in ("master", "ema"):
                own = flat[piece.name][piece.start : piece.start + piece.size]
                piece.tensors[key].copy_(own)
        self.partition.sync_params_from_master()

    def predict(self, x_t: Tensor, t: Tensor, rewards: RewardCond, text: PackedText) -> Tensor:
        """The network's output for this rank's micro-batch."""
        return self.deepspeed(x_t, t, rewards, text)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's mean loss to those of its step."""
        self.deepspeed.backward(loss)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # Only counts.

    def step(self, images: int) -> Tensor:
        """Clip, or skip, and update: the step that began after `images` images.

        Returns the norm of the gradients before clipping, on the device: nothing waits for it.
        """
        assert self.deepspeed.is_gradient_accumulation_boundary()
        norm = self._norm()
        scale = self.guard.scale(norm)
        self.optimizer.grad_scale = scale.cpu() if self.layout.offload != "none" else scale
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * lr_multiplier(
                self.config, images, self.total_images
            )
            group["ema_decay"] = ema_decay(self.config, images, self.layout.batch)
        self.deepspeed.step()
        return norm

    def _norm(self) -> Tensor:
        grads = self.partition.gradients()
        norm = nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        norm = norm.to(self.device, torch.float32)
        if self.layout.stage and self.ranks.world > 1:
            norm = norm.square()
            dist.all_reduce(norm)
            norm = norm.sqrt()
        return norm

    @torch.no_grad()
    def ema_state_dict(self) -> dict[str, Tensor]:
        """The fp32 averaged weights by parameter name: what sampling and evaluation use.

        All ranks call it together; only the first gets them.
        """
        pieces = {piece.name: piece for piece in self.partition.pieces()}
        if not self.layout.stage:
            return self._shaped({name: piece.tensors["ema"] for name, piece in pieces.items()})
        whole = {}
        for name, param in self.parameters.items():
            size = getattr(param, "ds_numel", None) or param.numel()
            full = torch.zeros(size, device=self.device)
            if (piece := pieces.get(name)) is not None:
                full[piece.start : piece.start + piece.size] = piece.tensors["ema"]
            if self.ranks.world > 1:
                dist.reduce(full, dst=0)
            if self.ranks.first:
                whole[name] = full.cpu()
        return self._shaped(whole)

    def _shaped(self, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.view(self.shapes[name]) for name, tensor in flat.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter; stage 3 leaves an empty tensor in its place."""
        return {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in self.parameters.items()}

    def state(self) -> tuple[Iterator[ShardSlice], dict[str, Any]]:
        """All that a resumed run needs: this rank's pieces, live, and plain numbers."""
        steps = {state["step"] for state in self.optimizer.state.values()}
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        numbers = {"step": max(steps, default=0), "guard": self.guard.read(), "shapes": shapes}
        return self.partition.saved(), numbers

    @torch.no_grad()
    def load_state(
        self, read: Callable[[str, ShardSlice], Tensor], numbers: Mapping[str, Any]
    ) -> None:
        """Take up what `state` gave, at whatever stage and world size it was saved.

        Args:
            read: (key, piece) to the saved values of the piece's range.
            numbers: as saved.

        Raises:
            ValueError: as `check_state`.
        """
        self.check_state(numbers)
        for piece in self.partition.pieces():
            for key, tensor in piece.tensors.items():
                tensor.copy_(read(key, piece))
        self.partition.sync_params_from_master()
        for state in self.optimizer.state.values():
            state["step"] = int(numbers["step"])
        self.guard.load(numbers["guard"])

    def check_state(self, numbers: Mapping[str, Any]) -> None:
        """ValueError where a saved state is of another network; it names the first difference."""
        ours = {name: list(shape) for name, shape in self.shapes.items()}
        theirs = numbers.get("shapes", {})
        for name in sorted(ours.keys() | theirs.keys()):
            found, wanted = theirs.get(name), ours.get(name)
            if found != wanted:
                raise ValueError(
                    f"the checkpoint is of another network: {name} is {found} there, {wanted} here"
                )


def _start(
    module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], device: str
) -> Any:
    """DeepSpeed's engine, in the process group of the run."""
    join(device)
    # Read at DeepSpeed's first import, which would take a GPU that the run does not use.
    os.environ.setdefault("DS_ACCELERATOR", device)
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    import deepspeed.ops

    # Its log says at each start what was configured, and warns of optimizers it does not know.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It would try a compiler on each of its own kernels, and on a CPU build one. None is used.
    deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config=config,
        dist_init_required=False,
    )
    if dist.get_world_size() == 1 and not config["zero_optimization"]["stage"]:
        engine.enable_backward_allreduce = False  # It would copy every gradient, for no one.
    return engine
