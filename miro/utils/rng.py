"""Random number generators seeded by a hash of their purpose.

A stream is named by numbers and words, e.g. ``seed_from(seed, "epoch", 3)`` for the order of an
epoch. No stream depends on earlier draws, so a resumed run repeats the uninterrupted one bit for
bit without any saved generator state.
"""

from __future__ import annotations

import hashlib
import operator
from typing import SupportsIndex

import torch


def seed_from(*parts: SupportsIndex | str) -> int:
    """Hash integers and strings, in order, to a seed in [0, 2**63).

    The same on every machine, Python version and process: BLAKE2b over the parts as text, each with
    its type and length, so that (1, 23), (12, 3) and ("1", 23) are three different streams.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        word = f"s{part}" if isinstance(part, str) else f"i{operator.index(part)}"
        data = word.encode()
        digest.update(len(data).to_bytes(4, "little") + data)
    return int.from_bytes(digest.digest(), "little") >> 1


def generator_from(
    *parts: SupportsIndex | str, device: str | torch.device = "cpu"
) -> torch.Generator:
    """Return a new generator seeded with `seed_from(*parts)`; global generators are untouched."""
    return torch.Generator(device).manual_seed(seed_from(*parts))
