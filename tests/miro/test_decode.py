"""Decoding with Pillow: conversions to upright RGB, and the reasons of errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.corrupt import NOISE_PNG, bomb, encoded, noise
from PIL import Image

from miro.images.decoder import DecodeError
from miro.images.pillow import decode


@pytest.mark.parametrize(
    ("data", "message"),
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
def test_corrupt_files_raise_an_error_with_a_reason(data: bytes, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        decode(data)


@pytest.mark.filterwarnings("ignore")  # Pillow's own warnings about corrupt files
def test_random_corruption_never_raises_another_error() -> None:
    generator = np.random.default_rng(0)
    files = [encoded(noise(), form) for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF")]
    errors = 0
    for number in range(600):
        data = bytearray(files[number % len(files)])
        for position in generator.integers(0, len(data), 3):
            data[position] = generator.integers(256)
        try:
            assert decode(bytes(data[: generator.integers(1, 2 * len(data))])).shape[0] == 3
        except DecodeError as error:
            errors += 1
            assert str(error)
    assert errors > 100


def test_pixels_of_an_rgb_image_are_unchanged() -> None:
    image = decode(NOISE_PNG)
    assert (image.shape, image.dtype) == ((3, 12, 10), torch.uint8)
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.asarray(noise()))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_the_exif_orientation_is_applied(form: str) -> None:
    upright = Image.new("RGB", (32, 16), "red")
    upright.paste("blue", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    image = decode(encoded(upright.transpose(Image.Transpose.ROTATE_90), form, exif=exif))
    assert image.shape == (3, 16, 32)
    assert image[2, 8, 4] > 200 > 60 > image[2, 8, 28]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_composited_on_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "PA":
        palette = Image.new("P", (2, 1), 0)
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.putpixel((1, 0), 1)
        data = encoded(palette, "PNG", transparency=0)
    else:
        data = encoded(image.convert(mode))
    assert decode(data)[:, 0].tolist() == [[255, 0]] * 3


def test_grey_palette_cmyk_and_16_bit_are_converted_to_rgb() -> None:
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


def test_an_animation_is_decoded_to_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for form in ("GIF", "WEBP"):
        image = decode(encoded(frames[0], form, save_all=True, append_images=frames[1:]))
        assert image[0].min() > 240 and image[2].max() < 15
