"""Bytes to pictures: what is turned right, and what is refused with a reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.corrupt import NOISE_PNG, bomb, encoded, noise
from PIL import Image

from miro.images.decoder import DecodeError
from miro.images.pillow import decode


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (bytes(1000), "1,000 zero bytes"),
        (b"<!DOCTYPE html><html>404</html>", "HTML page.*download failed"),
        (b"\n <HTML><body>", "HTML"),
        (b'<?xml version="1.0"?><svg/>', "SVG"),
        (b"hello, I am a text", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (NOISE_PNG[: len(NOISE_PNG) // 2], "cut short"),
        (NOISE_PNG[:20], "damaged|cut short"),
        (encoded(noise(64, 64), "JPEG")[:-200], "cut short"),
        (encoded(noise(64, 64), "WEBP")[:-100], "damaged|cut short"),
        (encoded(noise(64, 64), "TIFF")[:-3000], "damaged|cut short"),
        (NOISE_PNG[:60] + b"\0\0\0\0" + NOISE_PNG[64:], "damaged|cut short"),
        (bomb(9000), r"9000 x 9000 pixels, more than 64,000,000"),
        (bomb(60000), "more than 64,000,000"),
        (encoded(Image.fromarray(np.full((2, 2), 0.5, np.float32)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(np.full((2, 2), 10**6, np.int32)), "TIFF"), "32-bit"),
    ],
)
def test_what_is_no_picture_is_refused_with_a_reason(data: bytes, says: str) -> None:
    with pytest.raises(DecodeError, match=says):
        decode(data)


@pytest.mark.filterwarnings("ignore")  # Pillow's own remarks about damage
def test_no_mutation_of_a_picture_escapes_as_another_error() -> None:
    generator = np.random.default_rng(0)
    pictures = [encoded(noise(), form) for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF")]
    refused = 0
    for number in range(600):
        data = bytearray(pictures[number % len(pictures)])
        for at in generator.integers(0, len(data), 3):
            data[at] = generator.integers(256)
        try:
            assert decode(bytes(data[: generator.integers(1, 2 * len(data))])).shape[0] == 3
        except DecodeError as error:
            refused += 1
            assert str(error)
    assert refused > 100


def test_a_plain_picture_keeps_its_pixels() -> None:
    image = decode(NOISE_PNG)
    assert (image.shape, image.dtype) == ((3, 12, 10), torch.uint8)
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.asarray(noise()))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_turned_picture_is_turned_upright(form: str) -> None:
    upright = Image.new("RGB", (32, 16), "red")
    upright.paste("blue", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture must be turned clockwise
    image = decode(encoded(upright.transpose(Image.Transpose.ROTATE_90), form, exif=exif))
    assert image.shape == (3, 16, 32)
    assert image[2, 8, 4] > 200 > 60 > image[2, 8, 28]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    picture = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "PA":
        palette = Image.new("P", (2, 1), 0)
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.putpixel((1, 0), 1)
        data = encoded(palette, "PNG", transparency=0)
    else:
        data = encoded(picture.convert(mode))
    assert decode(data)[:, 0].tolist() == [[255, 0]] * 3


def test_grey_palette_cmyk_and_16_bit_become_the_same_colours() -> None:
    grey = Image.fromarray(np.array([[0, 100, 255]], np.uint8))
    sixteen = Image.fromarray(np.array([[0, 100 * 257, 65535]], np.uint16))
    expected = [[0, 100, 255]] * 3
    assert decode(encoded(grey))[:, 0].tolist() == expected
    assert decode(encoded(sixteen))[:, 0].tolist() == expected
    assert decode(encoded(sixteen, "TIFF"))[:, 0].tolist() == expected
    assert decode(encoded(grey.convert("P")))[:, 0].tolist() == expected
    assert decode(encoded(grey.convert("1")))[0, 0, 0] == 0
    red = decode(encoded(Image.new("RGB", (16, 16), "red").convert("CMYK"), "JPEG", quality=100))
    assert red[0].min() > 240 and red[1:].max() < 15


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for form in ("GIF", "WEBP"):
        image = decode(encoded(frames[0], form, save_all=True, append_images=frames[1:]))
        assert image[0].min() > 240 and image[2].max() < 15
