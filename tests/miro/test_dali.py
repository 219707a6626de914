"""DaliDecoder: which files DALI decodes, that its pixels equal Pillow's, and its failures."""

from __future__ import annotations

import importlib.util
import logging
import resource
import threading
from collections.abc import Iterator
from contextlib import closing
from itertools import islice, repeat
from typing import Any

import numpy as np
import pytest
import torch
from helpers.corrupt import NOISE_PNG, bomb, encoded, noise
from PIL import Image
from torch import Tensor

from miro.images import open_decoder, pillow
from miro.images.decoder import DecodeError, prefetch_decoded
from miro.images.open_decoder import build_decoder
from miro.images.pillow import decode
from miro.prepare.annotate import AnnotateConfig

pytest.importorskip("nvidia.dali")

from miro.images import dali  # noqa: E402


def photo(width: int = 80, height: int = 60, mode: str = "RGB", **options: Any) -> bytes:
    """A JPEG of smooth blobs, as compressible as a photograph."""
    coarse = noise(height // 8 + 2, width // 8 + 2).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return encoded(coarse.convert(mode), "JPEG", **options)


def exif(orientation: int | None = None) -> Image.Exif:
    tags = Image.Exif()
    tags[0x010F] = "a maker of cameras"
    if orientation is not None:
        tags[0x0112] = orientation
    return tags


def with_thumbnail() -> bytes:
    """A JPEG with a thumbnail in its EXIF, as cameras write them."""
    small = photo(16, 16)
    tags = exif().tobytes() + small
    assert dali.EOI in tags
    return photo(exif=tags)


def with_segment(marker: int, content: bytes, **options: Any) -> bytes:
    data, head = photo(**options), bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2)
    return data[:2] + head + content + data[2:]


def as_frame(marker: int) -> bytes:
    """A JPEG whose SOF marker is not the baseline one."""
    return photo().replace(b"\xff\xc0", bytes([0xFF, marker]), 1)


XMP = b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation=%s/>"
PLAIN = {
    "baseline": photo(),
    "4:4:4": photo(subsampling=0),
    "4:2:2": photo(subsampling=1),
    "progressive": photo(progressive=True),
    "progressive and grey": photo(mode="L", progressive=True),
    "grey": photo(mode="L"),
    "restart markers": photo(restart_marker_blocks=2),
    "EXIF, upright": photo(exif=exif(1)),
    "EXIF, no orientation": photo(exif=exif()),
    "XMP, upright": with_segment(dali.APP1, XMP % b'"1"'),
    "a thumbnail": with_thumbnail(),
    "a comment and a profile": photo(comment=b"\xff\xd9", icc_profile=bytes(70000)),
    "bytes after the end": photo() + b"a trailer",
    "another image after the end": photo() + photo(mode="CMYK"),
    "one pixel": photo(1, 1),
    "odd sides": photo(33, 17),
    "recoverable corruption": photo(quality=95)[:2000] + bytes(16) + photo(quality=95)[2016:],
}
NOT_PLAIN = {
    "nothing": b"",
    "a PNG": NOISE_PNG,
    "a bomb": bomb(9000),
    "CMYK": photo(mode="CMYK"),
    "rotated by EXIF": photo(exif=exif(6)),
    "rotated by XMP": with_segment(dali.APP1, XMP % b'"6"'),
    "two EXIFs": with_segment(dali.APP1, exif(1).tobytes(), exif=exif(1)),
    "RGB, not YCbCr": photo(keep_rgb=True),
    "truncated": photo()[:-2],
    "truncated in its thumbnail": with_thumbnail()[:600],
    "truncated in its header": photo()[:100],
    "lossless": as_frame(0xC3),
    "arithmetic": as_frame(0xC9),
    "12 bits": photo().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c", 1),
    "a height after the scan": photo().replace(b"\x08\0\x3c\0\x50", b"\x08\0\0\0\x50", 1),
    "too many pixels": photo().replace(b"\x08\0\x3c\0\x50", b"\x08\xff\xff\xff\xff", 1),
    "a marker inside the scan": photo()[:-300] + b"\xff\xba" + photo()[-298:],
    "the start alone": dali.SOI + dali.EOI,
    "no scan before its end": photo()[: photo().index(b"\xff\xda")] + dali.EOI,
}


@pytest.fixture
def decoder() -> Iterator[dali.DaliDecoder]:
    made = dali.DaliDecoder(torch.device("cpu"), batch_size=len(PLAIN), workers=2)
    with closing(made):
        yield made


def assert_decoded(decoded: list[Tensor | DecodeError], files: list[bytes]) -> None:
    """Images and error messages equal those of `decode`, bit for bit."""
    for image, file in zip(decoded, files, strict=True):
        try:
            expected = decode(file)
        except DecodeError as error:
            assert str(image) == str(error)
        else:
            assert isinstance(image, Tensor) and image.dtype == torch.uint8
            assert torch.equal(image, expected)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_jpegs_are_recognized(name: str) -> None:
    assert dali.is_plain_jpeg(PLAIN[name])


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_files_that_dali_would_decode_differently_are_not_plain(name: str) -> None:
    assert not dali.is_plain_jpeg(NOT_PLAIN[name])


@pytest.mark.filterwarnings("ignore")  # Pillow's own warnings about corrupt files
def test_is_plain_jpeg_never_raises() -> None:
    generator = np.random.default_rng(0)
    files = list(PLAIN.values())
    for number in range(2000):
        data = bytearray(files[number % len(files)][:3000])
        for position in generator.integers(0, min(len(data), 700), 3):
            data[position] = generator.integers(256)
        assert dali.is_plain_jpeg(bytes(data[: generator.integers(3000)])) in (True, False)


def test_pixels_of_dali_and_pillow_are_bitwise_equal(decoder: dali.DaliDecoder) -> None:
    """Both call libjpeg-turbo with the accurate DCT and fancy upsampling."""
    files = list(PLAIN.values())

    decoded = decoder.start(files)()

    assert_decoded(decoded, files)
    assert (decoder.batches, decoder.failed) == (1, 0)
    assert len({image.shape for image in decoded if isinstance(image, Tensor)}) > 2


def test_files_that_are_not_plain_never_reach_dali(decoder: dali.DaliDecoder) -> None:
    files = list(NOT_PLAIN.values())[: len(PLAIN)]

    decoded = decoder.start(files)()

    assert_decoded(decoded, files)
    assert decoder.batches == 0


def test_images_are_in_order_whichever_decoder_they_get(decoder: dali.DaliDecoder) -> None:
    files = [
        data for pair in zip(PLAIN.values(), NOT_PLAIN.values(), strict=False) for data in pair
    ]
    items = list(enumerate(files))

    batches = prefetch_decoded(items, lambda item: item[1], len(PLAIN), decoder)

    found = [pair for batch in batches for pair in batch]
    assert [item for item, _ in found] == items
    assert_decoded([image for _, image in found if image is not None], files)


def corrupt_table() -> bytes:
    """Plain by its markers, with a Huffman table of too many codes."""
    data = bytearray(photo())
    data[data.index(b"\xff\xc4") + 5] = 255
    return bytes(data)


def test_a_batch_on_which_dali_fails_is_decoded_by_pillow_and_the_next_by_dali(
    decoder: dali.DaliDecoder, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [photo(), corrupt_table(), photo(40, 30), photo()[:900], b"<html>", bytes(900)]
    good = [photo(40, 30), photo()]
    assert dali.is_plain_jpeg(bad[1])

    first, second = decoder.start(bad), decoder.start(good)

    decoded = first()
    assert_decoded(decoded, bad)
    assert [isinstance(image, Tensor) for image in decoded] == [1, 0, 1, 0, 0, 0]
    assert_decoded(second(), good)
    assert (decoder.batches, decoder.failed) == (2, 1)
    decoder.close()
    assert "DALI failed on 1 of 2 batches" in caplog.text


def test_images_outlive_later_batches(decoder: dali.DaliDecoder) -> None:
    files = [photo(width, 48) for width in (64, 65, 66)]
    decoded = decoder.start(files)()

    for number in range(20):
        decoder.start([photo(64 + number % 3, 48, quality=20 + number)] * 3)()

    assert_decoded(decoded, files)


def test_memory_is_constant_over_a_hundred_batches(decoder: dali.DaliDecoder) -> None:
    images = [photo(512, 512)] * 8  # 6 MB decoded

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    for _ in range(10):
        decoder.start(images)()
    before = resident()
    for _ in range(100):
        decoder.start(images)()

    assert resident() - before < 200e6  # of 629 MB that went through


@pytest.mark.parametrize("failed", [False, True], ids=["ok", "failed"])
def test_all_images_are_on_the_device_whichever_decoder_they_get(failed: bool) -> None:
    images = [photo(), NOISE_PNG, b"no image", *([corrupt_table()] if failed else [])]
    # DALI treats any device that is not CUDA as the CPU.
    with closing(dali.DaliDecoder(torch.device("meta"), 4, workers=2)) as made:
        decoded = made.start(images)()

        assert made.failed == failed
    found = [getattr(image, "device", None) for image in decoded]
    assert found[:3] == [torch.device("meta"), torch.device("meta"), None]


def test_close_stops_the_threads() -> None:
    before = threading.active_count()
    made = dali.DaliDecoder(torch.device("cpu"), 4, workers=2)
    made.start([photo(), NOISE_PNG])()
    assert threading.active_count() > before

    made.close()

    assert threading.active_count() == before


def test_a_consumer_that_stops_early_can_close(decoder: dali.DaliDecoder) -> None:
    endless = repeat(photo())

    batches = prefetch_decoded(endless, lambda data: data, 4, decoder)

    assert sum(len(batch) for batch in islice(batches, 2)) == 8


def without_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "dali" in name else find(name)
    )


def test_requesting_dali_raises_if_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    without_dali(monkeypatch)

    with pytest.raises(ValueError, match=r"not installed: pip install 'miro-trainer\[dali\]'"):
        build_decoder("dali")


def test_auto_warns_once_that_dali_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_dali(monkeypatch)
    open_decoder._warn_once.cache_clear()

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with closing(build_decoder("auto")) as made:
                assert isinstance(made, pillow.PillowDecoder)

    assert caplog.text.count("pip install 'miro-trainer[dali]'") == 1


@pytest.mark.parametrize("name", ["auto", "dali", "pillow"])
def test_the_requested_decoder_is_built(name: open_decoder.DecoderName) -> None:
    expected = pillow.PillowDecoder if name == "pillow" else dali.DaliDecoder

    with closing(build_decoder(name, workers=1)) as made:
        assert isinstance(made, expected)


def test_annotate_gets_the_same_pixels_from_both_decoders() -> None:
    assert AnnotateConfig().decoder == "auto"
    images = [
        photo(),
        photo(mode="CMYK"),
        NOISE_PNG,
        b"",
        photo(exif=exif(8)),
        photo(progressive=True),
    ]
    found = []
    for name in ("pillow", "dali"):
        with closing(build_decoder(name, batch_size=2, workers=2)) as made:
            batches = list(prefetch_decoded(images, lambda data: data, 2, made))
        found.append([image for batch in batches for _, image in batch])

    for ours, theirs in zip(*found, strict=True):
        if isinstance(ours, Tensor):
            assert torch.equal(ours, theirs)
        else:
            assert str(ours) == str(theirs)
