"""Aspect-ratio buckets."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence


def aspect(name: str) -> float:
    """Width over height of an aspect such as "4:3"; ValueError for anything else."""
    parts = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", name)
    if parts is None:
        raise ValueError(f"an aspect is WIDTH:HEIGHT, as 4:3, got {name!r}")
    return int(parts[1]) / int(parts[2])


def nearest(sides: Sequence[tuple[int, int]], wanted: float) -> tuple[int, int]:
    """The (height, width) whose aspect differs least from `wanted`, by their ratio."""
    return min(sides, key=lambda side: abs(math.log(side[1] / side[0] / wanted)))
