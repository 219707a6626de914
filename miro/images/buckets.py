"""Aspect-ratio buckets."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence


def aspect_ratio(name: str) -> float:
    """Width over height of an aspect ratio such as "4:3"; ValueError for another format."""
    parts = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", name)
    if parts is None:
        raise ValueError(f"an aspect ratio is WIDTH:HEIGHT, as 4:3, got {name!r}")
    return int(parts[1]) / int(parts[2])


def nearest_bucket(sizes: Sequence[tuple[int, int]], ratio: float) -> tuple[int, int]:
    """The (height, width) whose aspect ratio is nearest to `ratio`, compared by logarithm."""
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0] / ratio)))
