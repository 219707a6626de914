"""Dataset folders, written directly. Imported by the tests of what reads them."""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

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


def write_images(folder: Path, sides: Sequence[tuple[int, int]], each: int = 8) -> Path:
    """An images folder as annotate makes it: image n is of sides[n], (width, height)."""
    manifest = Manifest("images", ("original", "short"), (), ("sharpness",))
    for shard, start in enumerate(range(0, len(sides), each)):
        numbers = range(start, min(start + each, len(sides)))
        made = write_shard(folder / "shards" / f"{shard:05d}.tar", map(_image(sides), numbers))
        rows = [(n, kind) for n in numbers for kind in manifest.captions]
        write_scores(
            scores_path(folder, made),
            [f"k{n}" for n, _ in rows],
            [kind for _, kind in rows],
            {"sharpness": [n for n, _ in rows]},
        )
        manifest = replace(manifest, shards=(*manifest.shards, made))
    manifest.write(folder)
    return folder


def _image(sides: Sequence[tuple[int, int]]) -> Callable[[int], tuple[str, dict[str, bytes]]]:
    def sample(n: int) -> tuple[str, dict[str, bytes]]:
        width, height = sides[n]
        pixels = np.random.default_rng(n).integers(0, 256, (height, width, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        captions = {"original": f"a photo of {n} red apples", "short": f"{n % 3} apples"}
        record = json.dumps({"captions": captions}).encode()
        return f"k{n}", {"png": file.getvalue(), "json": record}

    return sample
