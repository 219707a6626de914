"""Images decoded by NVIDIA's DALI: on a GPU, where they stay, or by its CPU operators.

DALI is for the ordinary: whole, upright, grey or RGB JPEGs (`plain` says which). All else is
Pillow's, so that rotation, transparency and the reasons of what is refused are the same whichever
decoder is used. On a CPU so are the pixels, since both call libjpeg-turbo; on a GPU nvJPEG rounds
otherwise by a few levels.
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
# After a scan: not a stuffed zero, and not a restart, which belong to it.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")
_XMP_TURNED = re.compile(rb'tiff:Orientation(?:="|>)[^1]')


def plain(data: bytes) -> bool:
    """Whether the bytes are a JPEG of which DALI makes what `miro.images.pillow.decode` makes.

    Its markers are walked from start to end: whole, 8 bits, one component or three (YCbCr),
    upright, at most MAX_PIXELS pixels. Whether what lies between them can be decoded is not looked
    at. A thumbnail lies inside a segment and is skipped with it, as is what follows the end.
    """
    if not data.startswith(SOI):
        return False
    at, components, exif, scanned = len(SOI), 0, 0, False
    while not data.startswith(EOI, at):
        head = data[at : at + 4]
        end = at + 2 + int.from_bytes(head[2:])
        if len(head) < 4 or head[0] != 0xFF or not at + 4 <= end <= len(data):
            return False
        marker, segment, at = head[1], data[at + 4 : end], end
        if marker == SOS:
            found = _MARKER.search(data, end)
            if not components or found is None:
                return False
            scanned, at = True, found.start()
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
    """Of SOF: precision, height (2), width (2), components, and 3 bytes of each, its name first."""
    if len(segment) < 9:
        return False
    components, names = segment[5], segment[6::3]
    pixels = int.from_bytes(segment[1:3]) * int.from_bytes(segment[3:5])
    return (
        segment[0] == 8
        and 0 < pixels <= MAX_PIXELS
        and components in (1, 3)
        and len(segment) == 6 + 3 * components
        and names != b"RGB"  # what libjpeg takes for RGB where nothing else is said
    )


def _is_upright(segment: bytes) -> bool:
    """Whether neither EXIF nor XMP turns the image. Pillow reads the EXIF, as it does itself."""
    if not segment.startswith(b"Exif\0\0"):
        return _XMP_TURNED.search(segment) is None
    exif = Image.Exif()
    try:
        exif.load(segment)
        return exif.get(ORIENTATION, 1) == 1
    except (OSError, *DAMAGE):
        return False


class DaliDecoder:
    """Decodes batches of at most `batch_size` images: the plain ones in one DALI pipeline.

    The images lie on the device, whichever decoded them: what DALI decodes on a CUDA device on
    the stream that is torch's own when it is decoded. DALI loses a batch in which it cannot decode
    an image: Pillow then decodes that batch, and a new pipeline the next one. Which decoder a
    image goes to thus depends on the bytes of its batch alone.
    """

    def __init__(self, device: torch.device, batch_size: int, workers: int) -> None:
        """workers: threads of Pillow, and as many of DALI."""
        self._device, self._batch_size, self._workers = device, batch_size, workers
        self._pillow = PillowDecoder(workers)
        # One thread that feeds the pipeline, and so one batch after another.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="miro-dali")
        self._pipeline: Any = None
        self.batches = self.lost = 0

    def start(self, images: Sequence[bytes]) -> Pending:
        """Begin to decode a batch."""
        ours = [plain(image) for image in images]
        batch = [image for image, is_ours in zip(images, ours, strict=True) if is_ours]
        rest = [image for image, is_ours in zip(images, ours, strict=True) if not is_ours]
        begun = self._thread.submit(self._decode, batch) if batch else None
        pillow = self._pillow.start(rest)

        def finish() -> list[Tensor | DecodeError]:
            decoded_by_dali, others = iter(begun.result() if begun else ()), iter(pillow())
            decoded = [next(decoded_by_dali if is_ours else others) for is_ours in ours]
            return [
                image.to(self._device) if isinstance(image, Tensor) else image for image in decoded
            ]

        return finish

    def close(self) -> None:
        """End the threads and the pipeline; says how many batches DALI lost."""
        self._thread.shutdown(cancel_futures=True)
        self._pillow.close()
        self._pipeline = None
        if self.lost:
            log.warning(
                "DALI lost %d of %d batches, which Pillow decoded instead", self.lost, self.batches
            )

    def _decode(self, images: list[bytes]) -> list[Tensor | DecodeError]:
        self.batches += 1
        if self._pipeline is None:
            self._pipeline = _build(self._device, self._batch_size, self._workers)
        try:
            return list(self._run(images))
        except RuntimeError as error:  # what DALI raises for an image, and for much else
            log.log(logging.DEBUG if self.lost else logging.WARNING, "DALI lost a batch: %s", error)
        self.lost += 1
        self._pipeline = None
        return self._pillow.start(images)()

    def _run(self, images: list[bytes]) -> list[Tensor]:
        encoded = [np.frombuffer(image, np.uint8) for image in images]
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if on_gpu else None
        (decoded_by_dali,) = self._pipeline.run(stream, encoded=encoded)
        # DALI's memory, seen as (3, H, W); it is free when the tensors are gone.
        return [torch.from_dlpack(image).permute(2, 0, 1) for image in decoded_by_dali]


def _build(device: torch.device, batch_size: int, workers: int) -> Any:
    """A pipeline from `encoded`, 1-D uint8 of each image, to uint8 (H, W, 3) on the device."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=workers,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=1,  # every batch is fed by hand, and waited for
        exec_dynamic=True,  # outputs stay valid while a tensor refers to them
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1)
        pipeline.set_outputs(
            fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=types.DALIImageType.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,  # as libjpeg-turbo on a CPU always does
            )
        )
    pipeline.build()
    return pipeline
