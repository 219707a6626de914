"""What a reward is, which ones exist, and the one order in which every room lists them.

A reward gives a picture (and perhaps its caption) one number on a scale of its own. Nothing here
normalises it: scores are stored raw and binned later over the whole dataset (miro.conditioning).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from miro.images.transforms import check_picture


class Reward(Protocol):
    """A score of (image, caption) pairs.

    name: column name of the score; one of REWARD_ORDER, or a name of its own.
    model: what computes it, as the dataset's manifest records it: an architecture and its weights.
    reads_caption: False if the score depends on the image alone.
    range: nominal lowest and highest raw score, for the axes of plots; not a clamp.
    """

    name: str
    model: str
    reads_caption: bool
    range: tuple[float, float]

    def score(self, images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """Raw scores, float32 (B,), on the reward's device; NaN where a score is not known.

        images: B tensors uint8 (3, H, W), whose sizes may differ; where they are Pictures, squares
        made of them are shared with other rewards. captions: B strings. The score of a pair does
        not depend on what else is in the batch.
        """
        ...


@dataclass(frozen=True)
class RewardOptions:
    """How rewards compute; `device` may be a torch.device or its name."""

    device: torch.device | str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"  # of the networks' weights and arithmetic
    compile: bool = False  # the networks by torch.compile
    batch_size: int = 64  # pairs, or pictures, of one forward pass; less where memory ends
    allow_code: bool = False  # run Python code that comes with a model's weights

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def same_sized(
    images: Sequence[Tensor], captions: Sequence[str], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batch in stacks of one size: (indices int64 (b,), pixels uint8 (b, 3, H, W)) on `device`.

    Checks what every reward expects; ValueError names the offending image.
    """
    if len(images) != len(captions):
        raise ValueError(f"got {len(images)} images but {len(captions)} captions")
    by_size: dict[torch.Size, list[int]] = {}
    for index, image in enumerate(images):
        check_picture(index, image)
        by_size.setdefault(image.shape, []).append(index)
    for indices in by_size.values():
        pixels = torch.stack([images[i] for i in indices]).to(device, non_blocking=True)
        yield torch.tensor(indices, device=device), pixels
