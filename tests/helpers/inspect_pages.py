"""Small dataset folders with given scores, and their inspect pages."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from miro.data.shards import Manifest, scores_path, write_scores, write_shard
from miro.inspect.inspect_dataset import InspectConfig, inspect


def shade(number: int) -> np.ndarray:
    """An image of one grey level, which identifies it on a contact sheet."""
    return np.full((24 + number % 10, 40, 3), 20 * (number % 10), np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_dataset(
    folder: Path,
    scores: Mapping[str, Sequence[float]],
    *,
    captions: Sequence[Mapping[str, str]] = (),
    images: Mapping[int, bytes] | None = None,
    shards: int = 2,
    count: int = 10,
) -> Path:
    """Write `count` samples in shards; `scores` has a value for each caption of each sample."""
    captions = captions or [{"original": f"image {i}"} for i in range(count)]
    types = list(dict.fromkeys(name for texts in captions for name in texts))
    rows = [(i, name) for i, texts in enumerate(captions) for name in texts]
    infos = []
    for shard, samples in enumerate(np.array_split(np.arange(len(captions)), shards)):
        content = [
            (
                f"key{i}",
                {
                    "png": (images or {}).get(int(i), png(shade(int(i)))),
                    "json": json.dumps({"captions": captions[i]}).encode(),
                },
            )
            for i in samples
        ]
        infos.append(write_shard(folder / "shards" / f"{shard:05d}.tar", content))
        here = [row for row, (i, _) in enumerate(rows) if i in samples]
        write_scores(
            scores_path(folder, infos[-1]),
            [f"key{rows[row][0]}" for row in here],
            [rows[row][1] for row in here],
            {name: [values[row] for row in here] for name, values in scores.items()},
        )
    Manifest("images", tuple(types), tuple(infos), tuple(scores)).write(folder)
    return folder


def page_of(folder: Path, **options: Any) -> tuple[str, dict[str, Any]]:
    """The HTML of the page and the JSON next to it."""
    page = inspect(folder, config=InspectConfig(**options))
    return page.read_text("utf-8"), json.loads(page.with_suffix(".json").read_text("utf-8"))


def text_of(html: str) -> str:
    html = re.sub(r"<(style|svg).*?</\1>", " ", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))
