"""Image bytes to pixels: one function, one error, so that another decoder can take its place."""

from __future__ import annotations

import io
import itertools
import os
import struct
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# Formats are listed because Pillow would also open some (EPS) by running other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
MAX_PIXELS = 64_000_000  # 192 MB as RGB; a larger picture is a mistake or an attack

# `decode` refuses earlier and with a reason; Pillow's own warning would only repeat it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

T = TypeVar("T")

# What Pillow's readers raise on damaged bytes (found by fuzzing), beside OSError.
_DAMAGE = (
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)


class DecodeError(ValueError):
    """Bytes that are no picture we can use; the message is a reason a person understands."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The picture in `data` as uint8 (3, H, W), contiguous, sRGB as stored.

    The EXIF rotation is applied, transparency is laid on white, 16 bits become 8, and of an
    animation the first frame is taken. DecodeError for anything that is not a whole picture.
    """
    if not data:
        raise DecodeError("the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DecodeError(
                    f"the picture has {width} x {height} pixels, more than {max_pixels:,}"
                )
            image.load()
            # A copy of the metadata is needed to turn a picture, and few pictures are turned.
            if image.getexif().get(0x0112, 1) != 1:
                image = ImageOps.exif_transpose(image)
            pixels = np.asarray(_to_rgb(image))
    except DecodeError:
        raise
    except UnidentifiedImageError:
        raise DecodeError(_what_else(data)) from None
    except Image.DecompressionBombError:
        raise DecodeError(f"the picture has more than {max_pixels:,} pixels") from None
    except OSError as error:
        cut = "truncated" in str(error) or "unrecognized data" in str(error)
        raise DecodeError(f"the picture is {'cut short' if cut else 'damaged'}: {error}") from None
    except _DAMAGE as error:
        raise DecodeError(f"the picture is damaged: {error or type(error).__name__}") from None
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def picture_size(data: bytes) -> tuple[int, int]:
    """(width, height) as stored, from the picture's header alone; DecodeError where it has none."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.size
    except (OSError, Image.DecompressionBombError, *_DAMAGE) as error:
        raise DecodeError(f"the picture has no header: {error or type(error).__name__}") from None


def resize_crop(image: Tensor, size: int) -> Tensor:
    """The central square of an image, uint8 (3, H, W), resized to (3, size, size), antialiased."""
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[:, top : top + side, left : left + side]
    if side == size:
        return square.contiguous()
    return F.interpolate(square[None], size=(size, size), mode="bicubic", antialias=True)[0]


def decode_ahead(
    items: Iterable[T], image_of: Callable[[T], bytes | None], batch_size: int, workers: int = 0
) -> Iterator[list[tuple[T, Tensor | DecodeError | None]]]:
    """Batches of (item, its image, or why it has none), in order; None where `image_of` gives None.

    `workers` threads (0: one per core, at most 16) decode that many batches ahead of the reader.
    """

    def decode_batch(batch: list[T]) -> list[tuple[T, Tensor | DecodeError | None]]:
        return [(item, _decode_or_reason(image_of(item))) for item in batch]

    source = iter(items)
    batches = iter(lambda: list(itertools.islice(source, batch_size)), [])
    workers = workers or min(len(os.sched_getaffinity(0)), 16)
    if workers == 1:
        yield from map(decode_batch, batches)
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[list[tuple[T, Tensor | DecodeError | None]]]] = deque()
        for batch in batches:
            ahead.append(pool.submit(decode_batch, batch))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _decode_or_reason(data: bytes | None) -> Tensor | DecodeError | None:
    try:
        return None if data is None else decode(data)
    except DecodeError as error:
        return error


def _to_rgb(image: Image.Image) -> Image.Image:
    """The picture as 8-bit RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DecodeError("the picture has 32-bit pixels, whose white is not defined")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DecodeError("the picture has floating-point pixels, whose white is not defined")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _what_else(data: bytes) -> str:
    """What bytes that are no picture look like, for a person who wonders how they came there."""
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "this is an HTML page, not a picture; the download failed"
    if start.startswith((b"<?xml", b"<svg", b"<!doctype svg")):
        return "this is XML or SVG, not a picture made of pixels"
    if not any(data):
        return f"the file is {len(data):,} zero bytes"
    return f"this is not a picture of a known format, or its start is damaged ({data[:8]!r}…)"
