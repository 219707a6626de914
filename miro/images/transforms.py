"""The decoded images of a batch, and the squares of them that models look at.

Several models look at the same square of an image, so a square is made once and kept while the
batch lives. What PIL would make of an image is made here with torch, on the device it is on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from miro.utils.threads import parallel_map

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of OpenAI's CLIP, which BLIP, SigLIP's predecessors and most vision-language models took over."""


@dataclass(frozen=True)
class ImageTransform:
    """How an image of any shape becomes the square of size x size pixels that a model sees.

    crop: the shorter side resized to size, bicubic and antialiased, then the central square;
    pad: the image laid on a square of the mean colour, then that resized;
    letterbox: the longer side resized to size, then the image laid on a black square;
    stretch: both sides resized to size.
    """

    size: int
    resize_mode: Literal["crop", "pad", "letterbox", "stretch"] = "crop"
    crop_rounding: Literal["nearest", "down"] = "nearest"
    """Where half a pixel is left over by a crop: torchvision takes the nearest, transformers the
    lower."""

    def of(self, image: Tensor) -> Tensor:
        """uint8 (3, H, W) to uint8 (3, size, size)."""
        height, width = image.shape[1:]
        if self.resize_mode == "stretch":
            return resized(image, self.size, self.size)
        if self.resize_mode == "pad":
            return resized(_on_mean_square(image), self.size, self.size)
        if self.resize_mode == "letterbox":
            scale = self.size / max(height, width)
            inside = (max(1, round(side * scale)) for side in (height, width))
            black = torch.zeros(3, self.size, self.size, dtype=torch.uint8, device=image.device)
            return _in_the_middle(resized(image, *inside), black)
        short = min(height, width)
        height, width = height * self.size // short, width * self.size // short
        whole = resized(image, height, width)
        top, left = (self._margin(side) for side in (height, width))
        return whole[:, top : top + self.size, left : left + self.size]

    def _margin(self, side: int) -> int:
        spare = side - self.size
        return spare // 2 if self.crop_rounding == "down" else round(spare / 2)


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """uint8 (3, H, W) to uint8 (3, height, width): bicubic, antialiased, on the same device."""
    if image.shape[1:] == (height, width):
        return image
    size = (height, width)
    if image.device.type == "cpu":
        return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0]
    # Only the CPU resizes bytes; PIL rounds and clamps them, so both are done here.
    made = F.interpolate(image[None].float(), size, mode="bicubic", antialias=True)[0]
    return made.round_().clamp_(0, 255).byte()


def for_each(images: Sequence[Tensor], change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """`change` of each image; on a CPU by all cores, as torch resizes bytes in one thread."""
    if any(image.device.type != "cpu" for image in images):
        return [change(image) for image in images]
    return parallel_map(change, images)


def _on_mean_square(image: Tensor) -> Tensor:
    """The image in the middle of a square of CLIP's mean colour, as LLaVA pads."""
    height, width = image.shape[1:]
    if height == width:
        return image
    side = max(height, width)
    colour = torch.tensor([int(255 * mean) for mean in CLIP_MEAN], dtype=torch.uint8)
    square = colour.to(image.device)[:, None, None].expand(3, side, side).clone()
    return _in_the_middle(image, square)


def _in_the_middle(image: Tensor, square: Tensor) -> Tensor:
    """The square, with the image laid on it."""
    height, width = image.shape[1:]
    top, left = (
        (whole - side) // 2 for whole, side in zip(square.shape[1:], (height, width), strict=True)
    )
    square[:, top : top + height, left : left + width] = image
    return square


def check_image(number: int, image: Tensor) -> None:
    """ValueError unless the image is uint8 (3, H, W) with pixels in it."""
    right = image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3
    if not right or not image.numel():
        raise ValueError(
            f"image {number}: expected uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}"
        )


def normalised(
    squares: Tensor,
    dtype: torch.dtype,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Tensor:
    """uint8 (b, 3, H, W) as a model takes them: (x / 255 − mean) / std per channel, in `dtype`."""
    offset, scale = (torch.tensor(v, device=squares.device).view(3, 1, 1) for v in (mean, std))
    return ((squares.float() / 255 - offset) / scale).to(dtype)


def center_crop_resize(image: Tensor, height: int, width: int) -> Tensor:
    """The centre of an image, uint8 (3, H, W), as (3, height, width), antialiased."""
    tall, wide = image.shape[1:]
    if wide * height > tall * width:
        rows, columns = tall, max(1, round(tall * width / height))
    else:
        rows, columns = max(1, round(wide * height / width)), wide
    top, left = (tall - rows) // 2, (wide - columns) // 2
    part = image[:, top : top + rows, left : left + columns]
    return resized(part, height, width).contiguous()
