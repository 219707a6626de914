"""Synthetic photographs, and image files of unusual or invalid formats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from helpers.corrupt import bomb, encoded
from PIL import Image
from torch import Tensor


def smooth_image(height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 (3, H, W) of smooth areas and edges, as a photograph."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 9, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    smooth[:, height // 3 : height // 2, width // 4 : width // 2] *= 0.3
    return (smooth.clamp(0, 1) * 255).byte()


def photograph(number: int) -> Image.Image:
    coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC)


def jpeg(number: int, **options: object) -> bytes:
    return encoded(photograph(number), "JPEG", **options)


def _cmyk(number: int) -> bytes:
    return encoded(photograph(number).convert("CMYK"), "JPEG")


def _sixteen_bits(number: int) -> bytes:
    grey = np.asarray(photograph(number).convert("L")).astype(np.uint16) * 257
    return encoded(Image.fromarray(grey), "PNG")


def _animated(number: int) -> bytes:
    more = [photograph(number + 1), photograph(number + 2)]
    return encoded(photograph(number), "GIF", save_all=True, append_images=more)


def _rotated(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(number, exif=exif.tobytes())


def _alpha(number: int) -> bytes:
    image = photograph(number)
    image.putalpha(128)
    return encoded(image, "PNG")


CAPTION = b"an image"
# (extension, image file of a number, caption, reason in rejected.jsonl or None if it is valid)
OddSample = tuple[str, Callable[[int], bytes], bytes, str | None]
ODD_SAMPLES: dict[str, OddSample] = {
    "truncated": ("jpg", lambda n: jpeg(n)[:-200], CAPTION, "cut short"),
    "zero bytes": ("jpg", lambda n: bytes(3000), CAPTION, "zero bytes"),
    "a web page": ("jpg", lambda n: b"<!DOCTYPE html><p>404", CAPTION, "HTML page"),
    "huge": ("png", lambda n: bomb(100_000), CAPTION, "more than 64,000,000 pixels"),
    "empty caption": ("jpg", jpeg, b"  \n", "caption is empty"),
    "not UTF-8": ("jpg", jpeg, b"caf\xe9", "not UTF-8"),
    "CMYK": ("jpg", _cmyk, CAPTION, None),
    "16 bits": ("png", _sixteen_bits, CAPTION, None),
    "animated": ("gif", _animated, CAPTION, None),
    "rotated": ("jpg", _rotated, CAPTION, None),
    "grey": ("jpg", lambda n: encoded(photograph(n).convert("L"), "JPEG"), CAPTION, None),
    "alpha": ("png", _alpha, CAPTION, None),
}
