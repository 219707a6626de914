"""The training engine: precision, gradients, optimizer, averaged weights, and their state.

The training loop calls backward and step; how weights are kept and updated is decided here alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from miro.model.transformer import FlowTransformer, Rewards
from miro.muon import MuonEMA
from miro.text import PackedText
from miro_kernels import AdamWEMA

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer with the average of the weights inside, its learning-rate law, and clipping."""

    matrices: Literal["adamw", "muon"] = "adamw"
    """What updates the matrices of the blocks; everything else is AdamW's."""
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    """Of matrices; gains, offsets and biases are never decayed."""
    warmup_images: int = 0
    """The rate rises linearly over these images."""
    decay_from: float = 1.0
    """Share of the run after which the rate falls linearly to zero; 1 keeps it constant."""
    clip: float = 1.0
    """Largest norm of all gradients together."""
    ema_images: float = 10_000.0
    """Images after which a weight's share in the average has halved."""
    ema_ramp: float = 0.05
    """The half-life is at most this share of the images seen, so that a young average is young."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "clip", "ema_images", "ema_ramp"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name} must be above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_images"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optimizer.{name} must be at least 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.decay_from <= 1:
            raise ValueError(f"optimizer.decay_from is a share of 1, got {self.decay_from}")


def rate_factor(config: OptimizerConfig, images: int, total: int) -> float:
    """What the learning rate is multiplied by for the step that begins after `images` images."""
    factor = 1.0
    if config.warmup_images:
        factor = min(1.0, (images + 1) / config.warmup_images)
    start = config.decay_from * total
    if images > start:
        factor *= (total - images) / (total - start)
    return factor


def ema_decay(config: OptimizerConfig, images: int, batch: int) -> float:
    """How much of the old average a step keeps: half-life in images, ramped (EDM2, 2312.02696)."""
    half_life = min(config.ema_images, config.ema_ramp * (images + batch))
    return 0.5 ** (batch / half_life)


def cast_parameters(model: FlowTransformer, precision: Precision) -> FlowTransformer:
    """The model with its parameters in `precision`; fixed places and angles stay fp32."""
    for param in model.parameters():
        param.data = param.data.to(DTYPES[precision])
    return model


class Engine:
    """A model under training.

    In `bf16` the parameters and activations are bf16, and the optimizer keeps fp32 masters.
    """

    def __init__(
        self,
        model: FlowTransformer,
        config: OptimizerConfig,
        *,
        batch: int,
        total_images: int,
        precision: Precision = "fp32",
        compiled: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config, self.batch, self.total_images = config, batch, total_images
        # The fp32 weights exist before the rounding to bf16, and become the masters.
        initial = {name: p.detach().clone().to(device) for name, p in model.named_parameters()}
        self.model = cast_parameters(model.to(device), precision)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.params = [p for _, p in self.model.named_parameters()]
        self.optimizer = self._make_optimizer()
        with torch.no_grad():
            for name, param in zip(self.names, self.params, strict=True):
                self.optimizer.master(param).copy_(initial[name])
                self.optimizer.ema(param).copy_(initial[name])
        self.predict = torch.compile(self._predict, dynamic=True) if compiled else self._predict

    def _make_optimizer(self) -> AdamWEMA:
        config = self.config
        of_blocks, matrices, vectors = [], [], []
        for name, param in zip(self.names, self.params, strict=True):
            # Offsets of blocks and biases of rewards are stacks of vectors.
            if param.ndim < 2 or name.endswith(("bias", "offsets")):
                vectors.append(param)
            else:
                (of_blocks if "blocks." in name else matrices).append(param)
        muon = config.matrices == "muon"
        return (MuonEMA if muon else AdamWEMA)(
            [
                {"params": of_blocks, "weight_decay": config.weight_decay, "orthogonal": muon},
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
        )

    def _predict(self, x_t: Tensor, t: Tensor, rewards: Rewards, text: PackedText) -> Tensor:
        return self.model(x_t, t, rewards, self.model.read_text(text))

    def step(self, loss: Tensor, images: int) -> Tensor:
        """Backward, clip and update, for the batch that began after `images` images.

        Returns the norm of the gradients before clipping, on the device: nothing waits for it.
        """
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.params, self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * rate_factor(
                self.config, images, self.total_images
            )
            group["ema_decay"] = ema_decay(self.config, images, self.batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def averaged(self) -> dict[str, Tensor]:
        """The fp32 averaged weights by parameter name: what sampling and evaluation use."""
        return {
            name: self.optimizer.ema(param)
            for name, param in zip(self.names, self.params, strict=True)
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a resumed run needs: tensors by name, and plain numbers."""
        tensors = {}
        for name, param in zip(self.names, self.params, strict=True):
            tensors[f"master/{name}"] = self.optimizer.master(param).detach()
            state = self.optimizer.state[param]
            tensors |= {f"{k}/{name}": v for k, v in state.items() if isinstance(v, Tensor)}
        # A parameter counts the steps at which it had a gradient: texts may all be withheld.
        named = zip(self.names, self.params, strict=True)
        return tensors, {"steps": {n: self.optimizer.state[param]["step"] for n, param in named}}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take up what `state` gave.

        Raises:
            ValueError: the state is of another network; the first difference is named.
        """
        expected = 0
        for name, param in zip(self.names, self.params, strict=True):
            own = {"master": self.optimizer.master(param), **self.optimizer.state[param]}
            kept = [key for key, value in own.items() if isinstance(value, Tensor)]
            expected += len(kept)
            for key in kept:
                saved = tensors.get(f"{key}/{name}")
                if saved is None or saved.shape != param.shape:
                    raise ValueError(
                        f"the checkpoint is of another network: {key} of {name} is "
                        f"{None if saved is None else tuple(saved.shape)}, not {tuple(param.shape)}"
                    )
                own[key].copy_(saved)
            self.optimizer.state[param]["step"] = int(numbers["steps"][name])
            param.copy_(own["master"])
        if extra := len(tensors) - expected:
            raise ValueError(f"the checkpoint is of another network: it has {extra} more tensors")
