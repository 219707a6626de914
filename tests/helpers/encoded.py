"""Write encoded folders and images folders without running the encoders."""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from miro.data.npy import npy_bytes
from miro.data.shards import Manifest, scores_path, write_scores, write_shard
from miro.model.packed_text import PackedText

Shape = tuple[int, int, int]
SQUARE, WIDE, TALL = (2, 4, 4), (2, 4, 6), (2, 6, 4)


def write_encoded(
    folder: Path,
    shapes: Sequence[Shape],
    *,
    caption_types: tuple[str, ...] = ("original",),
    rewards: tuple[str, ...] = ("colourfulness",),
    **encoding: Any,
) -> Path:
    """Write one shard: sample n is k{n}, has shapes[n] and scores of n."""
    draw = np.random.default_rng(len(shapes))

    def array(*shape: int) -> bytes:
        return npy_bytes(draw.standard_normal(shape).astype(np.float16))

    samples = [
        (
            f"k{n}",
            {"latent.npy": array(*shape), "json": b"{}"}
            | {f"text.{name}.npy": array(1 + n % 3, 6) for name in caption_types},
        )
        for n, shape in enumerate(shapes)
    ]
    shard = write_shard(folder / "shards" / "00000.tar", samples)
    rows = [(n, name) for n in range(len(shapes)) for name in caption_types]
    write_scores(
        scores_path(folder, shard),
        [f"k{n}" for n, _ in rows],
        [name for _, name in rows],
        {name: [n for n, _ in rows] for name in rewards},
    )
    distinct = list(dict.fromkeys(shapes))
    record = {"latent_shape": list(distinct[0]), "has_std": False, "text_dim": 6, "cut": 0}
    if len(distinct) > 1:
        record["latent_shapes"] = [list(shape) for shape in distinct]
    Manifest("encoded", caption_types, (shard,), rewards, record | encoding).write(folder)
    return folder


def write_images(folder: Path, sides: Sequence[tuple[int, int]], each: int = 8) -> Path:
    """Write an images folder as annotate does; image n has (width, height) sides[n]."""
    manifest = Manifest("images", ("original", "short"), (), ("sharpness",))
    for number, start in enumerate(range(0, len(sides), each)):
        numbers = range(start, min(start + each, len(sides)))
        shard = write_shard(
            folder / "shards" / f"{number:05d}.tar", map(_sample_of(sides), numbers)
        )
        rows = [(n, name) for n in numbers for name in manifest.captions]
        write_scores(
            scores_path(folder, shard),
            [f"k{n}" for n, _ in rows],
            [name for _, name in rows],
            {"sharpness": [n for n, _ in rows]},
        )
        manifest = replace(manifest, shards=(*manifest.shards, shard))
    manifest.write(folder)
    return folder


def _sample_of(sides: Sequence[tuple[int, int]]) -> Callable[[int], tuple[str, dict[str, bytes]]]:
    def sample(n: int) -> tuple[str, dict[str, bytes]]:
        width, height = sides[n]
        pixels = np.random.default_rng(n).integers(0, 256, (height, width, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        captions = {"original": f"a photo of {n} red apples", "short": f"{n % 3} apples"}
        record = json.dumps({"captions": captions}).encode()
        return f"k{n}", {"png": file.getvalue(), "json": record}

    return sample


def text_at(packed: PackedText, index: int) -> Tensor:
    """The states (length, dim) of one text of a batch."""
    start, stop = packed.offsets[index : index + 2].tolist()
    return packed.states[start:stop]
