"""A training run's configuration, and the presets, each a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from miro.conditioning import ConditioningConfig
from miro.config import unknown_name
from miro.encoding import Encoding
from miro.engine import Precision, ShardingConfig
from miro.flow import FlowConfig
from miro.model.transformer import ModelConfig
from miro.optimizer import OptimizerConfig
from miro.saving import OnFailure
from miro_kernels.backend import Backend


@dataclass(frozen=True)
class TrainConfig:
    """All that decides a run. Progress, and every interval, is counted in images."""

    model: ModelConfig
    data: Path | None = None
    """The encoded dataset folder (`miro encode` makes it), or a .json that mixes several by weight:
    {"sources": [{"folder": "a", "weight": 2.0}, {"folder": "b", "weight": 1.0}]}."""
    live: bool = False
    """`data` are images, which `miro annotate` made, and encoded as `encode` says at each visit."""
    encode: Encoding = field(default_factory=Encoding)
    mirror: bool = False
    """Half of the visits see the picture in a mirror; of live data only. Not where words say which
    side is left."""
    images: int = 1_000_000
    """Images to train on, the same image counted each time it is seen."""
    batch: int = 64
    """Images of an optimizer step."""
    seed: int = 0
    flow: FlowConfig = field(default_factory=FlowConfig)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    precision: Precision = "fp32"
    compile: bool = False
    """Compile the network with torch.compile; worth its start-up time on long runs. On a CPU this
    needs a C++ compiler."""
    kernels: Backend = "auto"
    """What computes the fused operations. auto leaves it to the variable MIRO_KERNELS and then to
    the device: Triton on a GPU, torch elsewhere."""
    device: str = "cpu"
    threads: int | None = None
    """CPU threads of this process; None leaves it to torch."""
    report_every: int = 6_400
    """Images between reports to the metrics file, TensorBoard and the screen."""
    peak_flops: float | None = None
    """FLOP/s that a device reaches at most in `precision`, of which MFU is the share. None takes it
    from miro/peaks.py by the device's name; where that has none, MFU is not reported."""
    checkpoint_every: int = 32_000
    """Images between checkpoints to resume from."""
    keep_checkpoints: int = 2
    """The last ones, to resume from."""
    keep_every: int | None = None
    """Checkpoints at multiples of as many images are kept for good."""
    on_failed_save: OnFailure = "stop"
    """What a run does that cannot write a checkpoint, its disk being full: stop, or continue to the
    next one. Checkpoints before are untouched in both."""
    weights_at: tuple[int, ...] = ()
    """Images after which the averaged weights are kept for evaluation, beside those of the end."""

    def __post_init__(self) -> None:
        for name in ("images", "batch", "report_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("report_every", "checkpoint_every", "images", "keep_every"):
            if (getattr(self, name) or 0) % self.batch:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be a multiple of batch={self.batch}"
                )
        if self.mirror and not self.live:
            raise ValueError("mirror=True needs live=True: a stored latent cannot be mirrored")
        if self.peak_flops is not None and not self.peak_flops > 0:
            raise ValueError(f"peak_flops must be above 0, got {self.peak_flops}")
        for mark in self.weights_at:
            if mark % self.batch or not 0 < mark <= self.images:
                raise ValueError(
                    f"weights_at: {mark} must be a multiple of batch={self.batch} up to "
                    f"images={self.images}"
                )


def demo() -> TrainConfig:
    """Pictures of 32 x 32 pixels on two CPU cores, in minutes: shows the effect of MIRO."""
    return TrainConfig(
        model=ModelConfig(channels=192, depth=6, heads=3, hidden=512, patch=8),
        images=131_200,
        batch=64,
        flow=FlowConfig(predicts="sample", times="logit_normal", times_mean=1.0, weight_cap=0.3),
        optimizer=OptimizerConfig(
            matrices="muon",
            learning_rate=2e-3,
            beta2=0.95,
            warmup_images=6_400,
            decay_from=0.8,
            ema_images=4_500,
        ),
        precision="bf16",
        compile=True,
        threads=1,
        report_every=1_280,
        checkpoint_every=12_800,
    )


def small() -> TrainConfig:
    """0.36 B parameters on 32 x 32 x 4 latents, the size of the paper's model, in 256 tokens."""
    return TrainConfig(
        model=ModelConfig(channels=1024, depth=21, heads=16, hidden=3072, patch=2),
        images=512_000_000,
        batch=1024,
        optimizer=OptimizerConfig(
            learning_rate=3e-4, warmup_images=5_120_000, weight_decay=0.01, ema_images=2_000_000
        ),
        precision="bf16",
        compile=True,
        device="cuda",
        report_every=102_400,
        checkpoint_every=5_120_000,
    )


def large() -> TrainConfig:
    """About 2 B parameters on 32 x 32 x 4 latents, for sharded training."""
    return TrainConfig(
        model=ModelConfig(channels=2048, depth=34, heads=16, hidden=5632, patch=2),
        images=512_000_000,
        batch=2048,
        optimizer=OptimizerConfig(
            learning_rate=2e-4, warmup_images=10_240_000, weight_decay=0.01, ema_images=4_000_000
        ),
        precision="bf16",
        compile=True,
        device="cuda",
        report_every=204_800,
        checkpoint_every=10_240_000,
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {"demo": demo, "small": small, "large": large}


def preset(name: str) -> TrainConfig:
    """The configuration of a preset; ValueError offers the nearest name."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]()
