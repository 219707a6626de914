"""Pictures decoded by DALI: which are its own, what it makes of them, what is left to Pillow."""

from __future__ import annotations

import importlib.util
import logging
import resource
import threading
from collections.abc import Iterator
from contextlib import closing
from itertools import islice, repeat

import numpy as np
import pytest
import torch
from helpers.corrupt import IMAGE, bomb, encoded, noise
from PIL import Image
from torch import Tensor

from miro.images import open_decoder, pillow
from miro.images.decoder import DecodeError, decode_ahead
from miro.images.open_decoder import build_decoder
from miro.images.pillow import decode
from miro.prepare.annotate import AnnotateConfig

dali = pytest.importorskip("miro.images.dali")
if importlib.util.find_spec("nvidia.dali") is None:
    pytest.skip("DALI is not installed", allow_module_level=True)


def photo(width: int = 80, height: int = 60, mode: str = "RGB", **options: object) -> bytes:
    """A JPEG of smooth blots, as compressible as a photograph."""
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
    """Its EXIF holds a whole small JPEG, as cameras write them."""
    small = photo(16, 16)
    tags = exif().tobytes() + small
    assert dali.EOI in tags
    return photo(exif=tags)


def with_segment(marker: int, content: bytes, **options: object) -> bytes:
    data, head = photo(**options), bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2)
    return data[:2] + head + content + data[2:]


def as_frame(marker: int) -> bytes:
    """Said to be of another kind than baseline, or cut to 12 bits."""
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
    "EXIF, not said": photo(exif=exif()),
    "XMP, upright": with_segment(dali.APP1, XMP % b'"1"'),
    "a thumbnail": with_thumbnail(),
    "a comment and a profile": photo(comment=b"\xff\xd9", icc_profile=bytes(70000)),
    "bytes after the end": photo() + b"a trailer",
    "another picture after the end": photo() + photo(mode="CMYK"),
    "one pixel": photo(1, 1),
    "odd sides": photo(33, 17),
    "damage that libjpeg bridges": photo(quality=95)[:2000] + bytes(16) + photo(quality=95)[2016:],
}
NOT_PLAIN = {
    "nothing": b"",
    "a PNG": IMAGE,
    "a bomb": bomb(9000),
    "CMYK": photo(mode="CMYK"),
    "turned by EXIF": photo(exif=exif(6)),
    "turned by XMP": with_segment(dali.APP1, XMP % b'"6"'),
    "two EXIFs": with_segment(dali.APP1, exif(1).tobytes(), exif=exif(1)),
    "RGB, not YCbCr": photo(keep_rgb=True),
    "cut short": photo()[:-2],
    "cut in its thumbnail": with_thumbnail()[:600],
    "cut in its header": photo()[:100],
    "lossless": as_frame(0xC3),
    "arithmetic": as_frame(0xC9),
    "12 bits": photo().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c", 1),
    "a height that comes later": photo().replace(b"\x08\0\x3c\0\x50", b"\x08\0\0\0\x50", 1),
    "too many pixels": photo().replace(b"\x08\0\x3c\0\x50", b"\x08\xff\xff\xff\xff", 1),
    "a marker inside the scan": photo()[:-300] + b"\xff\xba" + photo()[-298:],
    "the start alone": dali.SOI + dali.EOI,
    "no picture before its end": photo()[: photo().index(b"\xff\xda")] + dali.EOI,
}


@pytest.fixture
def decoder() -> Iterator[dali.DaliDecoder]:
    made = dali.DaliDecoder(torch.device("cpu"), batch_size=len(PLAIN), workers=2)
    with closing(made):
        yield made


def same(pictures: list[Tensor | DecodeError], images: list[bytes]) -> None:
    """Each picture, or its reason, is what `decode` gives, to the last bit."""
    for picture, image in zip(pictures, images, strict=True):
        try:
            expected = decode(image)
        except DecodeError as error:
            assert str(picture) == str(error)
        else:
            assert isinstance(picture, Tensor) and picture.dtype == torch.uint8
            assert torch.equal(picture, expected)


@pytest.mark.parametrize("name", PLAIN)
def test_an_ordinary_jpeg_is_plain(name: str) -> None:
    assert dali.plain(PLAIN[name])


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_dali_would_not_do_alike_is_not_plain(name: str) -> None:
    assert not dali.plain(NOT_PLAIN[name])


@pytest.mark.filterwarnings("ignore")  # Pillow's own remarks about damage
def test_plain_never_fails_on_damage() -> None:
    generator = np.random.default_rng(0)
    pictures = list(PLAIN.values())
    for number in range(2000):
        data = bytearray(pictures[number % len(pictures)][:3000])
        for at in generator.integers(0, min(len(data), 700), 3):
            data[at] = generator.integers(256)
        assert dali.plain(bytes(data[: generator.integers(3000)])) in (True, False)


def test_dali_gives_pillows_pixels_bit_for_bit(decoder: dali.DaliDecoder) -> None:
    """Both call libjpeg-turbo with its exact transform and smooth upsampling."""
    images = list(PLAIN.values())

    pictures = decoder.start(images)()

    same(pictures, images)
    assert (decoder.batches, decoder.lost) == (1, 0)
    assert len({picture.shape for picture in pictures}) > 2


def test_what_is_not_plain_never_reaches_dali(decoder: dali.DaliDecoder) -> None:
    images = list(NOT_PLAIN.values())[: len(PLAIN)]

    pictures = decoder.start(images)()

    same(pictures, images)
    assert decoder.batches == 0


def test_order_is_kept_whoever_decodes(decoder: dali.DaliDecoder) -> None:
    images = [
        data for pair in zip(PLAIN.values(), NOT_PLAIN.values(), strict=False) for data in pair
    ]
    items = list(enumerate(images))

    batches = decode_ahead(items, lambda item: item[1], len(PLAIN), decoder)

    found = [pair for batch in batches for pair in batch]
    assert [item for item, _ in found] == items
    same([picture for _, picture in found if picture is not None], images)


def damaged_inside() -> bytes:
    """Plain by its markers, but a Huffman table has a code too many."""
    data = bytearray(photo())
    at = data.index(b"\xff\xc4")
    data[at + 5] = 255
    return bytes(data)


def test_a_batch_that_dali_loses_is_decoded_by_pillow_and_the_next_by_dali(
    decoder: dali.DaliDecoder, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [photo(), damaged_inside(), photo(40, 30), photo()[:900], b"<html>", bytes(900)]
    good = [photo(40, 30), photo()]
    assert dali.plain(bad[1])

    first, second = decoder.start(bad), decoder.start(good)

    pictures = first()
    same(pictures, bad)
    assert [isinstance(picture, Tensor) for picture in pictures] == [1, 0, 1, 0, 0, 0]
    same(second(), good)
    assert (decoder.batches, decoder.lost) == (2, 1)
    decoder.close()
    assert "DALI lost 1 of 2 batches" in caplog.text


def test_pictures_outlive_the_batches_after_them(decoder: dali.DaliDecoder) -> None:
    images = [photo(width, 48) for width in (64, 65, 66)]
    kept = decoder.start(images)()

    for number in range(20):
        decoder.start([photo(64 + number % 3, 48, quality=20 + number)] * 3)()

    same(kept, images)


def test_a_hundred_batches_leave_nothing_behind(decoder: dali.DaliDecoder) -> None:
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


@pytest.mark.parametrize("lost", [False, True], ids=["whole", "lost"])
def test_all_pictures_lie_on_the_device_whoever_decoded_them(lost: bool) -> None:
    images = [photo(), IMAGE, b"no picture", *([damaged_inside()] if lost else [])]
    # Pictures without data: DALI takes what is no CUDA device for the CPU.
    with closing(dali.DaliDecoder(torch.device("meta"), 4, workers=2)) as made:
        pictures = made.start(images)()

        assert made.lost == lost
    found = [getattr(picture, "device", None) for picture in pictures]
    assert found[:3] == [torch.device("meta"), torch.device("meta"), None]


def test_closing_ends_the_threads() -> None:
    before = threading.active_count()
    made = dali.DaliDecoder(torch.device("cpu"), 4, workers=2)
    made.start([photo(), IMAGE])()
    assert threading.active_count() > before

    made.close()

    assert threading.active_count() == before


def test_a_reader_that_stops_early_can_close(decoder: dali.DaliDecoder) -> None:
    endless = repeat(photo())

    batches = decode_ahead(endless, lambda data: data, 4, decoder)

    assert sum(len(batch) for batch in islice(batches, 2)) == 8


def without_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "dali" in name else find(name)
    )


def test_asked_for_by_name_dali_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    without_dali(monkeypatch)

    with pytest.raises(ValueError, match=r"not installed: pip install 'miro-trainer\[dali\]'"):
        build_decoder("dali")


def test_auto_says_once_that_dali_is_not_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_dali(monkeypatch)
    open_decoder._say_once.cache_clear()

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with closing(build_decoder("auto")) as made:
                assert isinstance(made, pillow.PillowDecoder)

    assert caplog.text.count("pip install 'miro-trainer[dali]'") == 1


@pytest.mark.parametrize("name", ["auto", "dali", "pillow"])
def test_the_decoder_is_the_one_asked_for(name: open_decoder.DecoderName) -> None:
    kind = pillow.PillowDecoder if name == "pillow" else dali.DaliDecoder

    with closing(build_decoder(name, workers=1)) as made:
        assert isinstance(made, kind)


def test_pixels_are_the_same_whichever_decoder_annotates() -> None:
    assert AnnotateConfig().decoder == "auto"
    images = [
        photo(),
        photo(mode="CMYK"),
        IMAGE,
        b"",
        photo(exif=exif(8)),
        photo(progressive=True),
    ]
    found = []
    for name in ("pillow", "dali"):
        with closing(build_decoder(name, batch_size=2, workers=2)) as made:
            batches = list(decode_ahead(images, lambda data: data, 2, made))
        found.append([image for batch in batches for _, image in batch])

    for ours, theirs in zip(*found, strict=True):
        if isinstance(ours, Tensor):
            assert torch.equal(ours, theirs)
        else:
            assert str(ours) == str(theirs)
