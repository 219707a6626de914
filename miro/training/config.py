"""TrainConfig: the configuration of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from miro.conditioning import ConditioningConfig
from miro.encoders.encoder import EncodingConfig
from miro.flow import FlowConfig
from miro.model.transformer import ModelConfig
from miro.training.async_checkpoint import OnFailure
from miro.training.batch_plan import Precision, ShardingConfig
from miro.training.optimizer import OptimizerConfig
from miro_kernels.backend import Backend


@dataclass(frozen=True)
class TrainConfig:
    """All that decides a run. Progress, and every interval, is counted in images."""

    model: ModelConfig
    data: Path | None = None
    """The encoded dataset folder (`miro encode` makes it), or a .json that mixes several by weight:
    {"sources": [{"folder": "a", "weight": 2.0}, {"folder": "b", "weight": 1.0}]}."""
    on_the_fly: bool = False
    """`data` are images, which `miro annotate` made, and encoded as `encode` says at each visit."""
    encode: EncodingConfig = field(default_factory=EncodingConfig)
    mirror: bool = False
    """Half of the visits see the image in a mirror; of live data only. Not where words say which
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
        if self.mirror and not self.on_the_fly:
            raise ValueError(
                "mirror=True needs on_the_fly=True: a stored latent cannot be mirrored"
            )
        if self.peak_flops is not None and not self.peak_flops > 0:
            raise ValueError(f"peak_flops must be above 0, got {self.peak_flops}")
        for mark in self.weights_at:
            if mark % self.batch or not 0 < mark <= self.images:
                raise ValueError(
                    f"weights_at: {mark} must be a multiple of batch={self.batch} up to "
                    f"images={self.images}"
                )
