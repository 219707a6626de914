"""Decoding by Pillow: the reference decoder, in threads."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from miro.images.decoder import DecodeError, Pending

# Formats are listed because Pillow would also open some (EPS) by running other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
MAX_PIXELS = 64_000_000  # 192 MB as RGB; a larger image is a mistake or an attack

# What Pillow's readers raise on damaged bytes (found by fuzzing), beside OSError.
DAMAGE = (
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


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The image in `data` as uint8 (3, H, W), sRGB as stored: a view of rows of RGB pixels.

    The EXIF rotation is applied, transparency is laid on white, 16 bits become 8, and of an
    animation the first frame is taken. DecodeError for anything that is not a whole image.
    """
    if not data:
        raise DecodeError("the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DecodeError(
                    f"the image has {width} x {height} pixels, more than {max_pixels:,}"
                )
            image.load()
            # A copy of the metadata is needed to turn an image, and few images are turned.
            if image.getexif().get(0x0112, 1) != 1:
                image = ImageOps.exif_transpose(image)
            pixels = np.array(_to_rgb(image))
    except DecodeError:
        raise
    except UnidentifiedImageError:
        raise DecodeError(_what_else(data)) from None
    except Image.DecompressionBombError:
        raise DecodeError(f"the image has more than {max_pixels:,} pixels") from None
    except OSError as error:
        cut = "truncated" in str(error) or "unrecognized data" in str(error)
        raise DecodeError(f"the image is {'cut short' if cut else 'damaged'}: {error}") from None
    except DAMAGE as error:
        raise DecodeError(f"the image is damaged: {error or type(error).__name__}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def image_size(data: bytes, upright: bool = False) -> tuple[int, int]:
    """(width, height) as stored, from the image's header alone; DecodeError where it has none.

    upright: as `decode` turns it, by its EXIF rotation.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            turned = upright and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (height, width) if turned else (width, height)
    except (OSError, Image.DecompressionBombError, *DAMAGE) as error:
        raise DecodeError(f"the image has no header: {error or type(error).__name__}") from None


class PillowDecoder:
    """`decode` in threads, which Pillow does not keep from running at once."""

    def __init__(self, workers: int) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="miro-decode")

    def start(self, images: Sequence[bytes]) -> Pending:
        """Begin to decode a batch."""
        begun = [self._pool.submit(_decode_or_reason, image) for image in images]
        return lambda: [one.result() for one in begun]

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)


def _decode_or_reason(data: bytes) -> Tensor | DecodeError:
    try:
        return decode(data)
    except DecodeError as error:
        return error


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DecodeError("the image has 32-bit pixels, whose white is not defined")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DecodeError("the image has floating-point pixels, whose white is not defined")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _what_else(data: bytes) -> str:
    """What bytes that are no image look like, for a person who wonders how they came there."""
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "this is an HTML page, not an image; the download failed"
    if start.startswith((b"<?xml", b"<svg", b"<!doctype svg")):
        return "this is XML or SVG, not an image made of pixels"
    if not any(data):
        return f"the file is {len(data):,} zero bytes"
    return f"this is not an image of a known format, or its start is damaged ({data[:8]!r}…)"
