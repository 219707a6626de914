"""The one owner of randomness: every stream of the trainer is seeded by a hash of its purpose.

A stream is named by numbers and words, e.g. ``seed_from(seed, rank, images)`` for the noise of a
step or ``seed_from(seed, "epoch", 3)`` for the order of an epoch. Nothing depends on a stream's
history, so a run that is stopped and resumed repeats the uninterrupted one without any saved
generator state.
"""

from __future__ import annotations

import hashlib
import operator
from typing import SupportsIndex

import torch


def seed_from(*parts: SupportsIndex | str) -> int:
    """A stable seed in [0, 2**63) for integers and words, in their order.

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
    """A fresh generator seeded with `seed_from(*parts)`; the global ones stay as they are."""
    return torch.Generator(device).manual_seed(seed_from(*parts))
