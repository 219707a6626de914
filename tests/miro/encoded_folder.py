"""Encoded dataset folders, written directly. Imported by the tests of what reads them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from miro.data.npy import npy_bytes
from miro.data.shards import Manifest, scores_path, write_scores, write_shard

Shape = tuple[int, int, int]
SQUARE, WIDE, TALL = (2, 4, 4), (2, 4, 6), (2, 6, 4)


def write_encoded(
    folder: Path,
    shapes: Sequence[Shape],
    *,
    kinds: tuple[str, ...] = ("original",),
    rewards: tuple[str, ...] = ("colourfulness",),
    **encoding: Any,
) -> Path:
    """One shard: sample n is k{n}, of shape shapes[n], and each of its scores is n."""
    draw = np.random.default_rng(len(shapes))

    def array(*shape: int) -> bytes:
        return npy_bytes(draw.standard_normal(shape).astype(np.float16))

    samples = [
        (
            f"k{n}",
            {"latent.npy": array(*shape), "json": b"{}"}
            | {f"text.{kind}.npy": array(1 + n % 3, 6) for kind in kinds},
        )
        for n, shape in enumerate(shapes)
    ]
    made = write_shard(folder / "shards" / "00000.tar", samples)
    rows = [(n, kind) for n in range(len(shapes)) for kind in kinds]
    write_scores(
        scores_path(folder, made),
        [f"k{n}" for n, _ in rows],
        [kind for _, kind in rows],
        {name: [n for n, _ in rows] for name in rewards},
    )
    distinct = list(dict.fromkeys(shapes))
    record = {"latent_shape": list(distinct[0]), "has_std": False, "text_dim": 6, "cut": 0}
    if len(distinct) > 1:
        record["latent_shapes"] = [list(shape) for shape in distinct]
    Manifest("encoded", kinds, (made,), rewards, record | encoding).write(folder)
    return folder
