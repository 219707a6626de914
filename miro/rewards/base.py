"""The protocol of a reward and the options that all rewards share.

Scores are raw: normalization to quantile bins happens later, over the whole dataset
(miro.conditioning).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from miro.images.transforms import check_image


class Reward(Protocol):
    """A model that scores (image, caption) pairs.

    Attributes:
        name: Column name of the score: one of REWARD_ORDER, or a name of its own.
        model: Architecture and weights, as the dataset's manifest records them.
        reads_caption: False if the score depends on the image alone.
    """

    name: str
    model: str
    reads_caption: bool

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """Score each pair independently of the rest of the batch.

        Args:
            images: B tensors uint8 (3, H, W) of any sizes. If they are an ImageBatch, its
                preprocessed images are shared with other rewards.
            captions: B strings.

        Returns:
            Raw scores, float32 (B,), on the reward's device; NaN where a score is undefined.
        """
        ...


@dataclass(frozen=True)
class RewardOptions:
    """Device, precision and batch size of rewards."""

    device: torch.device | str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"  # of weights and activations
    compile: bool = False  # with torch.compile
    batch_size: int = 64  # pairs or images per forward pass; halved on out-of-memory
    allow_code: bool = False  # run Python code that comes with the weights (trust_remote_code)

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of `precision`."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def check_lengths(images: Sequence[Tensor], captions: Sequence[str]) -> None:
    """Raise ValueError unless there are as many captions as images."""
    if len(images) != len(captions):
        raise ValueError(f"got {len(images)} images but {len(captions)} captions")


def batches_by_size(
    images: Sequence[Tensor], captions: Sequence[str], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Group the images of a batch by size.

    Yields:
        Indices int64 (b,) into the batch and pixels uint8 (b, 3, H, W), both on `device`.

    Raises:
        ValueError: An image is not uint8 (3, H, W), or the lengths differ.
    """
    check_lengths(images, captions)
    by_size: dict[torch.Size, list[int]] = {}
    for index, image in enumerate(images):
        check_image(index, image)
        by_size.setdefault(image.shape, []).append(index)
    for indices in by_size.values():
        pixels = torch.stack([images[i] for i in indices]).to(device, non_blocking=True)
        yield torch.tensor(indices, device=device), pixels
