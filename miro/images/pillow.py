"""Image decoding with Pillow in threads: the reference that other decoders must match."""

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

# An allow-list: Pillow opens some other formats (EPS) by running external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
MAX_PIXELS = 64_000_000  # 192 MB as RGB; a larger image is an error or a decompression bomb

# Exceptions besides OSError that Pillow's readers raise on corrupt bytes, found by fuzzing.
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
    """Decode an image file.

    The EXIF orientation is applied, transparency is composited on white, 16 bits are scaled to 8,
    and an animation is its first frame. Color profiles are ignored.

    Returns:
        uint8 (3, H, W), a view of (H, W, 3).

    Raises:
        DecodeError: The file is corrupt, truncated, too large, or not an image.
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
            # exif_transpose copies the metadata even of upright images, which most are.
            if image.getexif().get(0x0112, 1) != 1:
                image = ImageOps.exif_transpose(image)
            pixels = np.array(_to_rgb(image))
    except DecodeError:
        raise
    except UnidentifiedImageError:
        raise DecodeError(_describe(data)) from None
    except Image.DecompressionBombError:
        raise DecodeError(f"the image has more than {max_pixels:,} pixels") from None
    except OSError as error:
        cut = "truncated" in str(error) or "unrecognized data" in str(error)
        raise DecodeError(f"the image is {'cut short' if cut else 'damaged'}: {error}") from None
    except DAMAGE as error:
        raise DecodeError(f"the image is damaged: {error or type(error).__name__}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def image_size(data: bytes, upright: bool = False) -> tuple[int, int]:
    """Read (width, height) from the header of an image file; DecodeError if it has none.

    Args:
        data: The file.
        upright: Whether to apply the EXIF orientation, as `decode` does.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            swapped = upright and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (height, width) if swapped else (width, height)
    except (OSError, Image.DecompressionBombError, *DAMAGE) as error:
        raise DecodeError(f"the image has no header: {error or type(error).__name__}") from None


class PillowDecoder:
    """`decode` in a thread pool: Pillow releases the GIL."""

    def __init__(self, workers: int) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="miro-decode")

    def start(self, images: Sequence[bytes]) -> Pending:
        """Start decoding a batch."""
        futures = [self._pool.submit(_decode_or_error, image) for image in images]
        return lambda: [future.result() for future in futures]

    def close(self) -> None:
        """Cancel pending images and stop the threads."""
        self._pool.shutdown(cancel_futures=True)


def _decode_or_error(data: bytes) -> Tensor | DecodeError:
    try:
        return decode(data)
    except DecodeError as error:
        return error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips at 255
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


def _describe(data: bytes) -> str:
    """A guess of what a file is that is not an image."""
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "this is an HTML page, not an image; the download failed"
    if start.startswith((b"<?xml", b"<svg", b"<!doctype svg")):
        return "this is XML or SVG, not an image made of pixels"
    if not any(data):
        return f"the file is {len(data):,} zero bytes"
    return f"this is not an image of a known format, or its start is damaged ({data[:8]!r}…)"
