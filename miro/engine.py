"""The training engine, and the one owner of DeepSpeed: precision, sharding, gradients and state.

The training loop calls `predict`, `backward` and `step`; how weights are kept, cut among ranks,
reduced and updated is decided here alone. Our configuration goes in, DeepSpeed's dictionary comes
out, and every run goes through it, also one of a single process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from miro.model.predictor import Predictor
from miro.model.transformer import FlowTransformer, Rewards
from miro.optimizer import Guard, OptimizerConfig, ema_decay, make_optimizer, rate_factor
from miro.partition import EachParameter, FlatGroups, Partition, Piece, Replicated
from miro.ranks import Ranks, join
from miro.text import PackedText

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
    weights too. auto takes the lowest that fits the device's memory by `miro.memory`'s estimate."""
    micro_batch: int | None = None
    """Images a process computes at a time; its share of a step is accumulated from as many as it
    takes. None takes the whole share at once."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What is kept in the host's memory: the optimizer's state (stages 1 to 3), or that and the
    weights (stage 3)."""
    recompute: bool = False
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
class Layout:
    """A resolved ShardingConfig: how one step of the run is computed."""

    stage: Stage
    world: int
    micro_batch: int
    accumulation: int
    offload: Literal["none", "optimizer", "parameters"] = "none"
    recompute: bool = False

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


def lay_out(config: ShardingConfig, *, batch: int, world: int, stage: Stage) -> Layout:
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
    return Layout(stage, world, micro, batch // (world * micro), config.offload, config.recompute)


def deepspeed_config(layout: Layout, precision: Precision, device: str) -> dict[str, Any]:
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


def cast_parameters(model: FlowTransformer, precision: Precision) -> FlowTransformer:
    """The model with its parameters in `precision`; fixed places and angles stay fp32."""
    for param in model.parameters():
        param.data = param.data.to(DTYPES[precision])
    return model


def _check(config: OptimizerConfig, layout: Layout, precision: Precision, compiled: bool) -> None:
    """ValueError for what does not go together, with what does."""
    if layout.stage and config.matrices == "muon":
        raise ValueError(
            f"optimizer.matrices=muon needs whole matrices, and sharding.stage={layout.stage} "
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
        layout: Layout,
        *,
        total_images: int,
        precision: Precision = "fp32",
        compiled: bool = False,
        device: str | torch.device = "cpu",
        ranks: Ranks = Ranks(),  # noqa: B008 frozen
    ) -> None:
        _check(config, layout, precision, compiled)
        self.config, self.layout, self.total_images = config, layout, total_images
        self.ranks, self.device = ranks, torch.device(device)
        self.guard = Guard(config, self.device)
        # The fp32 weights exist before the rounding to bf16, and become the masters.
        initial = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.recompute = layout.recompute
        if not layout.stage:
            cast_parameters(model, precision)
            for param in model.parameters():
                param.grad_dtype = layout.optimized(precision)[1]
        self.model = model.to(self.device)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(config, self.parameters.items())
        self.deepspeed = _start(
            Predictor(self.model, compiled),
            self.optimizer,
            deepspeed_config(layout, precision, self.device.type),
            self.device.type,
        )
        self.partition = self._partition()
        self._begin(initial)

    def _partition(self) -> Partition:
        ranks, zero = self.ranks, self.deepspeed.optimizer
        if self.layout.stage == 0:
            return Replicated(self.parameters, self.optimizer, ranks.rank, ranks.world)
        if self.layout.stage == 3:
            return EachParameter(self.parameters, self.optimizer, zero, ranks.rank)
        return FlatGroups(self.parameters, self.optimizer, zero)

    @torch.no_grad()
    def _begin(self, initial: Mapping[str, Tensor]) -> None:
        """Masters and averages are the given weights."""
        flat = {name: weights.view(-1) for name, weights in initial.items()}
        for piece in self.partition.pieces():
            for key in ("master", "ema"):
                own = flat[piece.name][piece.start : piece.start + piece.size]
                piece.tensors[key].copy_(own)
        self.partition.publish()

    def predict(self, x_t: Tensor, t: Tensor, rewards: Rewards, text: PackedText) -> Tensor:
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
            group["lr"] = self.config.learning_rate * rate_factor(
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
    def averaged(self) -> dict[str, Tensor]:
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

    def state(self) -> tuple[Iterator[Piece], dict[str, Any]]:
        """All that a resumed run needs: this rank's pieces, live, and plain numbers."""
        steps = {state["step"] for state in self.optimizer.state.values()}
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        numbers = {"step": max(steps, default=0), "guard": self.guard.read(), "shapes": shapes}
        return self.partition.saved(), numbers

    @torch.no_grad()
    def load_state(self, read: Callable[[str, Piece], Tensor], numbers: Mapping[str, Any]) -> None:
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
        self.partition.publish()
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
