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
    """Configuration of a run. Progress and all intervals are counted in images."""

    model: ModelConfig
    data: Path | None = None
    """The encoded dataset folder (`miro encode` writes it), or a .json of several with weights:
    {"sources": [{"folder": "a", "weight": 2.0}, {"folder": "b", "weight": 1.0}]}."""
    init: str | None = None
    """Begin from the EMA weights of a run's folder, a weights folder or a hub id: what fits this
    network is taken, the rest is listed. A resumed run does not read it."""
    on_the_fly: bool = False
    """`data` holds images (a folder of `miro annotate`), which are encoded during training as
    `encode` says."""
    encode: EncodingConfig = field(default_factory=EncodingConfig)
    horizontal_flip: bool = False
    """Flip an image left to right with probability 1/2; needs on_the_fly. Do not use it where
    captions say left or right, or where images contain text."""
    images: int = 1_000_000
    """Images to train on; repetitions count."""
    batch: int = 64
    """Images per optimizer step, of all processes together."""
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
    """Backend of the fused kernels. auto follows the environment variable MIRO_KERNELS, then the
    device: Triton on a GPU, torch elsewhere."""
    device: str = "cpu"
    threads: int | None = None
    """CPU threads per process; None for torch's default."""
    report_every: int = 6_400
    """Images between reports to metrics.jsonl, TensorBoard and the screen."""
    peak_flops: float | None = None
    """Peak FLOP/s of a device in `precision`, for MFU. None looks it up in miro/training/flops.py
    by the device's name; MFU is not reported for a device that is not listed."""
    checkpoint_every: int = 32_000
    """Images between checkpoints."""
    keep_checkpoints: int = 2
    """Number of recent checkpoints to keep."""
    keep_every: int | None = None
    """Keep also the checkpoints at multiples of this number of images."""
    on_failed_save: OnFailure = "stop"
    """If a checkpoint cannot be written, as on a full disk: stop the run, or continue to the next
    checkpoint. Earlier checkpoints are untouched in both cases."""
    ema_weights_at: tuple[int, ...] = ()
    """Images after which to save EMA weights for evaluation, besides those at the end."""

    def __post_init__(self) -> None:
        for name in ("images", "batch", "report_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self._check_multiples()
        if self.horizontal_flip and not self.on_the_fly:
            raise ValueError(
                "horizontal_flip=True needs on_the_fly=True: a stored latent cannot be flipped"
            )
        if self.peak_flops is not None and not self.peak_flops > 0:
            raise ValueError(f"peak_flops must be above 0, got {self.peak_flops}")
        for images in self.ema_weights_at:
            if not 0 < images <= self.images:
                raise ValueError(f"ema_weights_at: {images} must be from 1 to images={self.images}")

    def _check_multiples(self) -> None:
        """Raise one ValueError for all numbers of images that are no multiple of the batch."""
        names = ("report_every", "checkpoint_every", "images", "keep_every")
        counts = [(name, getattr(self, name) or 0) for name in names]
        counts += [("ema_weights_at", images) for images in self.ema_weights_at]
        found = [
            f"{name}={count} (nearest: {max(1, round(count / self.batch)) * self.batch})"
            for name, count in counts
            if count % self.batch
        ]
        if found:
            raise ValueError(f"no multiple of batch={self.batch}: {', '.join(found)}")
