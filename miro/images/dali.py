"""Image decoding with NVIDIA DALI, on a GPU or a CPU.

DALI decodes plain JPEGs only (`is_plain_jpeg`); Pillow decodes the rest, so EXIF orientation,
transparency and error messages do not depend on the decoder. On a CPU neither do pixels: both call
libjpeg-turbo. On a GPU nvJPEG differs by a few grey levels.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from miro.images.decoder import DecodeError, Pending
from miro.images.pillow import DAMAGE, MAX_PIXELS, PillowDecoder

log = logging.getLogger(__name__)

SOI, EOI, SOS, COM = b"\xff\xd8", b"\xff\xd9", 0xDA, 0xFE
FRAMES = (0xC0, 0xC2)  # baseline and progressive, Huffman coded
TABLES = (0xC4, 0xDB, 0xDD)  # Huffman, quantization, restart interval
APP0, APP1, APP14, APP15 = 0xE0, 0xE1, 0xEE, 0xEF
ORIENTATION = 0x0112
# The end of a scan: any marker but a stuffed zero and the restart markers inside it.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")
_XMP_ROTATED = re.compile(rb'tiff:Orientation(?:="|>)[^1]')


def is_plain_jpeg(data: bytes) -> bool:
    """Whether DALI decodes the file to the same pixels as `miro.images.pillow.decode`.

    Parses the JPEG markers: a complete file, 8 bits, grey or YCbCr, upright, at most MAX_PIXELS.
    The entropy-coded data is not checked. Thumbnails inside segments and bytes after the end of the
    image are skipped.
    """
    if not data.startswith(SOI):
        return False
    position, components, exif, scanned = len(SOI), 0, 0, False
    while not data.startswith(EOI, position):
        head = data[position : position + 4]
        end = position + 2 + int.from_bytes(head[2:])
        if len(head) < 4 or head[0] != 0xFF or not position + 4 <= end <= len(data):
            return False
        marker, segment, position = head[1], data[position + 4 : end], end
        if marker == SOS:
            found = _MARKER.search(data, end)
            if not components or found is None:
                return False
            scanned, position = True, found.start()
        elif marker in FRAMES:
            if components or not _is_plain_frame(segment):
                return False
            components = segment[5]
        elif marker == APP1:
            exif += segment.startswith(b"Exif\0\0")
            if exif > 1 or not _is_upright(segment):
                return False
        elif marker == APP14 and segment.startswith(b"Adobe"):
            if segment[11:12] != b"\x01":  # not YCbCr
                return False
        elif marker not in TABLES and marker != COM and not APP0 <= marker <= APP15:
            return False
    return scanned


def _is_plain_frame(segment: bytes) -> bool:
    """Check SOF: precision, height (2 bytes), width (2), components, and (id, 2 bytes) of each."""
    if len(segment) < 9:
        return False
    components, ids = segment[5], segment[6::3]
    pixels = int.from_bytes(segment[1:3]) * int.from_bytes(segment[3:5])
    return (
        segment[0] == 8
        and 0 < pixels <= MAX_PIXELS
        and components in (1, 3)
        and len(segment) == 6 + 3 * components
        and ids != b"RGB"  # libjpeg decodes these ids as RGB if there is no Adobe marker
    )


def _is_upright(segment: bytes) -> bool:
    """Whether neither EXIF, parsed by Pillow as in `decode`, nor XMP rotates the image."""
    if not segment.startswith(b"Exif\0\0"):
        return _XMP_ROTATED.search(segment) is None
    exif = Image.Exif()
    try:
        exif.load(segment)
        return exif.get(ORIENTATION, 1) == 1
    except (OSError, *DAMAGE):
        return False


class DaliDecoder:
    """Decodes the plain JPEGs of a batch in one DALI pipeline and the rest with Pillow.

    All images are returned on `device`. If DALI fails on one image, Pillow decodes the whole batch
    and a new pipeline is built for the next one, so which decoder an image gets depends on its
    batch alone.

    Args:
        device: On CUDA, DALI decodes on torch's current stream at the time of decoding.
        batch_size: Largest batch.
        workers: Threads of Pillow, and as many of DALI.

    Attributes:
        batches: Batches decoded by DALI so far, failed ones included.
        failed: Batches on which DALI failed.
    """

    def __init__(self, device: torch.device, batch_size: int, workers: int) -> None:
        self._device, self._batch_size, self._workers = device, batch_size, workers
        self._pillow = PillowDecoder(workers)
        # One thread feeds the pipeline, so batches stay in order.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="miro-dali")
        self._pipeline: Any = None
        self.batches = self.failed = 0

    def start(self, images: Sequence[bytes]) -> Pending:
        """Start decoding a batch."""
        plain = [is_plain_jpeg(image) for image in images]
        batch = [image for image, is_plain in zip(images, plain, strict=True) if is_plain]
        rest = [image for image, is_plain in zip(images, plain, strict=True) if not is_plain]
        future = self._thread.submit(self._decode, batch) if batch else None
        pillow = self._pillow.start(rest)

        def finish() -> list[Tensor | DecodeError]:
            by_dali, by_pillow = iter(future.result() if future else ()), iter(pillow())
            decoded = [next(by_dali if is_plain else by_pillow) for is_plain in plain]
            return [
                image.to(self._device) if isinstance(image, Tensor) else image for image in decoded
            ]

        return finish

    def close(self) -> None:
        """Stop the threads, free the pipeline, and warn of batches on which DALI failed."""
        self._thread.shutdown(cancel_futures=True)
        self._pillow.close()
        self._pipeline = None
        if self.failed:
            log.warning(
                "DALI failed on %d of %d batches, which Pillow decoded", self.failed, self.batches
            )

    def _decode(self, images: list[bytes]) -> list[Tensor | DecodeError]:
        self.batches += 1
        if self._pipeline is None:
            self._pipeline = _build(self._device, self._batch_size, self._workers)
        try:
            return list(self._run(images))
        except RuntimeError as error:  # DALI has no narrower exception for a corrupt image
            level = logging.DEBUG if self.failed else logging.WARNING
            log.log(level, "DALI failed on a batch: %s", error)
        self.failed += 1
        self._pipeline = None
        return self._pillow.start(images)()

    def _run(self, images: list[bytes]) -> list[Tensor]:
        encoded = [np.frombuffer(image, np.uint8) for image in images]
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if on_gpu else None
        (decoded,) = self._pipeline.run(stream, encoded=encoded)
        # Views of DALI's memory, which is freed with the last tensor.
        return [torch.from_dlpack(image).permute(2, 0, 1) for image in decoded]


def _build(device: torch.device, batch_size: int, workers: int) -> Any:
    """Build a pipeline from `encoded`, 1-D uint8 per image, to uint8 (H, W, 3) on the device."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=workers,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=1,  # batches are fed and awaited one at a time
        exec_dynamic=True,  # outputs stay valid while a tensor references them
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1)
        pipeline.set_outputs(
            fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=types.DALIImageType.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,  # as libjpeg-turbo does on a CPU
            )
        )
    pipeline.build()
    return pipeline
