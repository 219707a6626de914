"""Resizing, cropping and normalization of decoded images, in torch on the images' device.

Results match Pillow's bicubic resize with antialiasing to one grey level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from miro.utils.threads import parallel_map

# The normalization of OpenAI's CLIP, which BLIP and most vision-language models share.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageTransform:
    """Resize of an image, uint8 (3, H, W), to the square input of a model, (3, size, size).

    crop: resize the shorter side to size, then center-crop;
    pad: pad to a square with the mean color, then resize;
    letterbox: resize the longer side to size, then pad to a square with black;
    stretch: resize both sides to size.
    """

    size: int
    resize_mode: Literal["crop", "pad", "letterbox", "stretch"] = "crop"
    # Rounding of an odd crop margin: torchvision rounds to the nearest, transformers down.
    crop_rounding: Literal["nearest", "down"] = "nearest"

    def __call__(self, image: Tensor) -> Tensor:
        """Transform one image."""
        height, width = image.shape[1:]
        if self.resize_mode == "stretch":
            return resize(image, self.size, self.size)
        if self.resize_mode == "pad":
            return resize(_pad_with_mean(image), self.size, self.size)
        if self.resize_mode == "letterbox":
            scale = self.size / max(height, width)
            inside = (max(1, round(side * scale)) for side in (height, width))
            black = torch.zeros(3, self.size, self.size, dtype=torch.uint8, device=image.device)
            return _paste_centered(resize(image, *inside), black)
        short = min(height, width)
        height, width = height * self.size // short, width * self.size // short
        resized = resize(image, height, width)
        top, left = (self._margin(side) for side in (height, width))
        return resized[:, top : top + self.size, left : left + self.size]

    def _margin(self, side: int) -> int:
        excess = side - self.size
        return excess // 2 if self.crop_rounding == "down" else round(excess / 2)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 (3, H, W) to (3, height, width), bicubic with antialiasing."""
    if image.shape[1:] == (height, width):
        return image
    size = (height, width)
    if image.device.type == "cpu":
        return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0]
    # CUDA interpolates floats only; round and clamp as the uint8 kernel and Pillow do.
    resized = F.interpolate(image[None].float(), size, mode="bicubic", antialias=True)[0]
    return resized.round_().clamp_(0, 255).byte()


def map_images(images: Sequence[Tensor], transform: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Apply `transform` to each image, on the CPU with a thread per core."""
    # torch resizes uint8 in one thread.
    if any(image.device.type != "cpu" for image in images):
        return [transform(image) for image in images]
    return parallel_map(transform, images)


def center_crop_resize(image: Tensor, height: int, width: int) -> Tensor:
    """Center-crop uint8 (3, H, W) to the aspect ratio of (height, width) and resize it to that."""
    tall, wide = image.shape[1:]
    if wide * height > tall * width:
        rows, columns = tall, max(1, round(tall * width / height))
    else:
        rows, columns = max(1, round(wide * height / width)), wide
    top, left = (tall - rows) // 2, (wide - columns) // 2
    crop = image[:, top : top + rows, left : left + columns]
    return resize(crop, height, width).contiguous()


def normalize(
    images: Tensor,
    dtype: torch.dtype,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Tensor:
    """Normalize uint8 (B, 3, H, W) per channel: (x / 255 - mean) / std in fp32, cast to `dtype`."""
    offset, scale = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (mean, std))
    return ((images.float() / 255 - offset) / scale).to(dtype)


def check_image(index: int, image: Tensor) -> None:
    """Raise ValueError unless the image is uint8 (3, H, W) and not empty."""
    valid = image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3
    if not valid or not image.numel():
        raise ValueError(
            f"image {index}: expected uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}"
        )


def _pad_with_mean(image: Tensor) -> Tensor:
    """Pad to a square with CLIP's mean color, as LLaVA does."""
    height, width = image.shape[1:]
    if height == width:
        return image
    side = max(height, width)
    color = torch.tensor([int(255 * mean) for mean in CLIP_MEAN], dtype=torch.uint8)
    square = color.to(image.device)[:, None, None].expand(3, side, side).clone()
    return _paste_centered(image, square)


def _paste_centered(image: Tensor, canvas: Tensor) -> Tensor:
    """Copy the image into the middle of `canvas`, in place."""
    height, width = image.shape[1:]
    top, left = (
        (outer - inner) // 2 for outer, inner in zip(canvas.shape[1:], (height, width), strict=True)
    )
    canvas[:, top : top + height, left : left + width] = image
    return canvas
